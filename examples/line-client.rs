//! A line client for the example `echo` on several hosts: it sends what is typed, line by line, and
//! prints the answers. When its server is gone it goes on with another one.
//!
//! `line-client HOST:PORT…` connects to one of these addresses, the first that works.
//! `line-client --advice POOL HOST:PORT…` asks the advice interface of these hosts for the best
//! server of the pool, and for the others.

use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use worker_sdk::connector::{
    Addresses, Connection, Connector, ConnectorConfig, Decision, Selection,
};

const USAGE: &str = "usage: line-client HOST:PORT…\n       line-client --advice POOL HOST:PORT…";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let config = match arguments.split_first() {
        Some((first, rest)) if first == "--advice" => {
            let (pool, hosts) = rest.split_first().ok_or(USAGE)?;
            ConnectorConfig::new(Addresses::advice(hosts, pool)?).selection(Selection::Best)
        }
        Some((first, _)) if first.starts_with('-') => return Err(USAGE.into()),
        Some(_) => ConnectorConfig::new(Addresses::list(&arguments)?).selection(Selection::InOrder),
        None => return Err(USAGE.into()),
    };
    let config = config
        .max_retries(2)
        .max_retries_alternative(3)
        .attempt_timeout(Duration::from_secs(1))
        .on_attempt(|attempt| {
            let which = if attempt.alternative { "another server" } else { "server" };
            eprintln!("{which} {}, retries left: {}", attempt.address, attempt.retries_left);
        })
        .on_connection_lost(|lost| {
            eprintln!("{lost}");
            // A person can decide when to stop.
            if io::stdin().is_terminal() { Decision::TryAgain } else { Decision::GiveUp }
        });
    // A server that hangs still accepts connections, so each new one has to answer an empty line.
    let connector = Connector::new(config)?.on_connect(|stream| {
        stream.set_nodelay(true)?;
        ask(stream, "\n").map(drop)
    });
    // A server that stops answering is given up after this time.
    let patient = |connection: &Connection| {
        connection.stream().set_read_timeout(Some(Duration::from_secs(2)))
    };

    let mut connection = connector.connect()?;
    patient(&connection)?;
    prompt();
    for line in io::stdin().lock().lines() {
        let line = line? + "\n";
        let answer = loop {
            match ask(connection.stream(), &line) {
                Ok(answer) => break answer,
                Err(error) => {
                    eprintln!("lost {}: {error}", connection.address());
                    connection.reconnect()?;
                    patient(&connection)?;
                    // The connector sends nothing again. An echo may be asked for twice.
                }
            }
        };
        print!("{answer}");
        io::stdout().flush()?;
        prompt();
    }
    Ok(())
}

fn prompt() {
    if io::stdin().is_terminal() {
        eprint!("> ");
    }
}

/// Sends a line, and waits for the whole answer.
fn ask(mut stream: &TcpStream, line: &str) -> io::Result<String> {
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    // The server sends a line for a line, so nothing after it is read.
    BufReader::new(stream.take(1 << 20)).read_line(&mut answer)?;
    if answer.ends_with('\n') { Ok(answer) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
