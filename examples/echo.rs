//! An echo server with one thread per connection.
//!
//! Alone it listens on 127.0.0.1:7000; with `DISPATCH_SOCKET` it is a worker of a dispatcher.

use std::io;
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use worker_sdk::{Connection, Worker, WorkerConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let config = WorkerConfig::new().listen("127.0.0.1:7000").with_env()?;
    let mut worker = Worker::connect(config)?;

    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let closing = worker.clone();
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            closing.close();
        }
    });

    for connection in worker.incoming() {
        thread::spawn(move || echo(&connection));
    }
    // The worker is drained or closed. Its live connections may still end by themselves.
    worker.close();
    worker.wait_until_idle();
    Ok(())
}

fn echo(connection: &Connection) {
    // Both directions of one connection: `&Connection` reads and writes.
    if let Err(error) = io::copy(&mut &*connection, &mut &*connection) {
        eprintln!("{}: {error}", connection.peer_addr());
    }
}
