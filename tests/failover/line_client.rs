//! The example `line-client` against the example `echo`, as docs/FAILOVER.md shows it.

use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use nix::sys::signal::Signal;
use test_support::*;

/// A host: an address of the loopback interface with a dispatcher and a worker.
struct Host {
    dispatcher: Dispatcher,
    echo: Process,
    address: String,
}

impl Host {
    fn start(ip: &str) -> Host {
        Host::start_with(ip, "")
    }

    /// `keys` come before the tables of the configuration.
    fn start_with(ip: &str, keys: &str) -> Host {
        let config = format!("{keys}{}", one_pool("").replace("127.0.0.1", ip));
        let mut dispatcher = Dispatcher::start(&config);
        let address = dispatcher.address("web").to_string();
        let mut command = Command::new(example("echo"));
        command.env("DISPATCH_SOCKET", dispatcher.dispatch()).env("DISPATCH_POOL", "web");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let echo = Process::start("echo", &mut command);
        if !dispatcher.process.running() {
            panic!("{}", dispatcher.log());
        }
        dispatcher.wait_joined("web", 1);
        Host { dispatcher, echo, address }
    }

    fn kill(&mut self) {
        self.dispatcher.process.kill();
        self.echo.kill();
    }

    fn signal(&self, signal: Signal) {
        self.dispatcher.process.signal(signal);
        self.echo.signal(signal);
    }
}

/// A running line client, and its output and errors as one stream of lines.
struct LineClient {
    process: Process,
    input: PipeWriter,
    lines: Receiver<String>,
}

impl LineClient {
    fn start(arguments: &[&str]) -> LineClient {
        let (output, theirs): (PipeReader, PipeWriter) = std::io::pipe().unwrap();
        let (their_input, input) = std::io::pipe().unwrap();
        let mut command = Command::new(example("line-client"));
        command.args(arguments).stdin(their_input).stdout(theirs.try_clone().unwrap());
        let process = Process::start("line-client", command.stderr(theirs));
        // Otherwise the output would not end with the process.
        drop(command);
        let (sender, lines) = channel();
        thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.for_each(|line| drop(sender.send(line)));
        });
        LineClient { process, input, lines }
    }

    fn type_line(&mut self, text: &str) {
        writeln!(self.input, "{text}").unwrap();
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("a line of output")
    }

    /// Skips lines until this one.
    fn wait_line(&self, expected: &str) {
        let mut before = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line == expected => return,
                Ok(line) => before.push(line),
                Err(error) => panic!("no line {expected:?}: {error}; before: {before:#?}"),
            }
        }
    }
}

#[test]
fn a_session_of_the_documentation_is_true() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/FAILOVER.md");
    let page = std::fs::read_to_string(page).unwrap();
    let session = page.split("```console\n$ line-client").nth(1).expect("the session");
    let session = session.split("```").next().unwrap();
    let mut hosts = [Host::start("127.0.0.2"), Host::start("127.0.0.3")];
    let (first, second) = (hosts[0].address.clone(), hosts[1].address.clone());
    let with_ports = session.replace("127.0.0.2:7000", &first).replace("127.0.0.3:7000", &second);
    let mut lines = with_ports.lines();
    let arguments: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    let mut client = LineClient::start(&arguments);
    let mut typed = 0;
    for line in lines {
        if let Some(text) = line.strip_prefix("> ") {
            client.type_line(text);
            typed += 1;
        } else if line.starts_with("# ") {
            assert!(line.contains("host 127.0.0.2 goes down"), "{line}");
            hosts[0].kill();
        } else {
            assert_eq!(client.line(), line, "{with_ports}");
        }
    }
    assert_eq!(typed, 2);
    drop(client.input);
    assert!(client.process.wait().success());
}

#[test]
fn it_survives_hosts_that_stop_and_return_and_keeps_no_descriptors() {
    let mut hosts = [Host::start("127.0.0.4"), Host::start("127.0.0.5")];
    let addresses = hosts.each_ref().map(|host| host.address.clone());
    let mut client = LineClient::start(&[&addresses[0], &addresses[1]]);
    client.type_line("begin");
    client.wait_line("begin");
    let before = client.process.fds();
    for turn in 0..2 {
        // The host of the client hangs: its kernel accepts connections, and nothing answers.
        let hung = usize::from(turn % 2 == 1);
        hosts[hung].signal(Signal::SIGSTOP);
        client.type_line(&format!("turn {turn}"));
        client.wait_line(&format!("turn {turn}"));
        hosts[hung].signal(Signal::SIGCONT);
        assert_eq!(client.process.fds(), before);
    }
    hosts.iter_mut().for_each(Host::kill);
    client.type_line("nobody hears it");
    assert_eq!(client.process.wait().code(), Some(1));
    let text: Vec<String> = client.lines.iter().collect();
    assert!(text.iter().any(|line| line.contains("5 attempts failed")), "{text:?}");
}

/// The answer of an advice interface.
fn advised(host: &str) -> std::io::Result<String> {
    let mut stream = std::net::TcpStream::connect(host)?;
    stream.write_all(b"GET /v1/pools/web/addresses HTTP/1.0\r\nHost: test\r\n\r\n")?;
    std::io::read_to_string(stream)
}

/// The advice interface of each host knows both, and each client asks either.
#[test]
fn it_goes_where_it_is_advised_to_go() {
    let configured = ["127.0.0.6", "127.0.0.7"].map(|ip| {
        // Free for the advice of that host.
        let listener = std::net::TcpListener::bind((ip, 0)).unwrap();
        (ip, listener.local_addr().unwrap().to_string())
    });
    let peers = configured
        .each_ref()
        .map(|(_, advice)| format!("[[advice_peer]]\naddress = \"{advice}\"\n"));
    let mut hosts = configured.each_ref().map(|(ip, advice)| {
        Host::start_with(ip, &format!("advice_listen = \"{advice}\"\n{}", peers.concat()))
    });
    let advice = configured.each_ref().map(|(_, advice)| advice.as_str());
    // What a dispatcher knows of the others is up to a second old.
    wait_until("both hosts to be advised by each", || {
        let advised = |host: &str| advised(host).unwrap_or_default();
        advice.iter().all(|host| hosts.iter().all(|one| advised(host).contains(&one.address)))
    });
    let mut client = LineClient::start(&["--advice", "web", advice[0], advice[1]]);
    client.type_line("hello");
    client.wait_line("hello");
    let serves = |host: &Host| {
        pool(&host.dispatcher.status(), "web").workers.iter().any(|worker| worker.load > 0)
    };
    let place = hosts.iter().position(serves).expect("its host");
    hosts[place].kill();
    client.type_line("still there?");
    client.wait_line("still there?");
    assert!(serves(&hosts[1 - place]));
}

#[test]
fn wrong_arguments_show_the_usage() {
    for arguments in [vec![], vec!["--advice"], vec!["--help"]] {
        let output = Command::new(example("line-client")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("usage: line-client"));
    }
    let output = Command::new(example("line-client")).arg("nowhere").output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("\"nowhere\" has no port; write HOST:PORT"), "{error}");
}
