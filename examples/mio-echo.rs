//! An echo server with a mio event loop: one thread, any number of connections.
//!
//! Alone it listens on 127.0.0.1:7000; with `DISPATCH_SOCKET` it is a worker of a dispatcher.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};

use mio::{Events, Interest, Poll, Token};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook_mio::v1_0::Signals;
use worker_sdk::{Connection, Error, WorkerConfig, mio::MioWorker};

const WORKER: Token = Token(0);
const SIGNALS: Token = Token(1);
const FIRST_CLIENT: usize = 2;

/// A connection and the bytes that it has not sent yet; it reads nothing until they are sent.
struct Client {
    connection: Connection,
    unsent: Vec<u8>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let config = WorkerConfig::new().listen("127.0.0.1:7000").with_env()?;
    let mut worker = MioWorker::new(config)?;
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let (mut poll, mut events) = (Poll::new()?, Events::with_capacity(256));
    let registry = poll.registry().try_clone()?;
    registry.register(&mut worker, WORKER, Interest::READABLE)?;
    registry.register(&mut signals, SIGNALS, Interest::READABLE)?;

    let (mut clients, mut next) = (HashMap::new(), FIRST_CLIENT);
    let mut closing = false;
    while !closing || !clients.is_empty() {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            match event.token() {
                SIGNALS if signals.pending().next().is_some() => {
                    // After the goodbye the live connections may still end by themselves.
                    worker.close();
                    closing = true;
                }
                SIGNALS => {}
                WORKER if closing => {}
                WORKER => {
                    loop {
                        let mut connection = match worker.try_accept() {
                            Ok(Some(connection)) => connection,
                            Ok(None) => break,
                            // An operator drains this worker: it serves its live connections until
                            // they end.
                            Err(Error::Draining) => {
                                worker.close();
                                closing = true;
                                break;
                            }
                            Err(error) => return Err(error.into()),
                        };
                        // Tokens are never reused, so an old event cannot reach a new client.
                        let token = Token(next);
                        next += 1;
                        let interests = Interest::READABLE | Interest::WRITABLE;
                        registry.register(&mut connection, token, interests)?;
                        let unsent = Vec::new();
                        clients.insert(token, Client { connection, unsent });
                    }
                }
                token => {
                    if let Some(client) = clients.get_mut(&token)
                        && !client.echo().unwrap_or(false)
                        && let Some(mut client) = clients.remove(&token)
                    {
                        registry.deregister(&mut client.connection)?;
                    }
                }
            }
        }
    }
    Ok(())
}

impl Client {
    /// Echoes until an operation would block; false at the end of the connection.
    fn echo(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 16 * 1024];
        loop {
            while !self.unsent.is_empty() {
                match self.connection.write(&self.unsent) {
                    Ok(n) => drop(self.unsent.drain(..n)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            match self.connection.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(n) => self.unsent.extend_from_slice(&buffer[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
