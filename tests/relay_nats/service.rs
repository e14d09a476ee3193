//! A worker of the test with several hosts: clients log in, and send each other messages.
//!
//! ```text
//! client: login ID        answer: ready
//! client: send ID NUMBER  answer, later and in any order: out ID NUMBER OUTCOME
//!                         message of another client: in ID NUMBER
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::io::{BufRead, BufReader, Write};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;

use worker_sdk::relay::{Id, Outcome, Pending, Relay, RelayConfig};
use worker_sdk::{Connection, Worker, WorkerConfig};

fn main() {
    let mut worker = Worker::connect(WorkerConfig::from_env().unwrap()).unwrap();
    let config = RelayConfig::new().with_env().ticket(worker.relay_ticket());
    let relay = Arc::new(Relay::connect(config).wait().unwrap());
    for connection in worker.incoming() {
        let relay = Arc::clone(&relay);
        thread::spawn(move || serve(connection, &relay));
    }
}

fn say(out: &Mutex<Arc<Connection>>, line: &str) {
    // A client that has gone needs no answers.
    let _ = (&**out.lock().unwrap()).write_all(line.as_bytes());
}

fn serve(connection: Connection, relay: &Relay) {
    let connection = Arc::new(connection);
    let out = Arc::new(Mutex::new(Arc::clone(&connection)));
    let mut lines = BufReader::new(&*connection).lines();
    let Some(Ok(first)) = lines.next() else { return };
    let name = first.strip_prefix("login ").unwrap();
    let inbox = Arc::new(relay.register(&Id::new(name).unwrap()).wait().unwrap());
    say(&out, "ready\n");
    let (receiver, messages) = (Arc::clone(&inbox), Arc::clone(&out));
    thread::spawn(move || {
        while let Some(message) = receiver.recv().wait() {
            say(&messages, &format!("in {}\n", str::from_utf8(message.bytes()).unwrap()));
        }
    });
    let (sent, pending) = mpsc::channel();
    let answers = Arc::clone(&out);
    thread::spawn(move || outcomes(&pending, &answers));
    for line in lines.map_while(Result::ok) {
        let (to, number) = line.strip_prefix("send ").unwrap().split_once(' ').unwrap();
        let outcome = relay.send(&Id::new(to).unwrap(), format!("{name} {number}"));
        sent.send((format!("{to} {number}"), outcome)).unwrap();
    }
    inbox.close();
}

fn outcomes(pending: &Receiver<(String, Pending<Outcome>)>, out: &Mutex<Arc<Connection>>) {
    for (message, outcome) in pending {
        say(out, &format!("out {message} {:?}\n", outcome.wait()));
    }
}
