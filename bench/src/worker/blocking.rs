//! The blocking worker: serves brief connections one after the other, the others in threads.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use worker_sdk::{Connection, Worker};

use super::{CHUNK, Serve, Source, WorkerArgs};
use crate::socket;

enum Acceptor {
    Sdk(Worker),
    Listener(TcpListener),
    Passed(OwnedFd),
}

enum Stream {
    Sdk(Connection),
    Tcp(TcpStream),
}

impl Acceptor {
    fn new(args: &WorkerArgs) -> io::Result<Acceptor> {
        Ok(match args.source {
            Source::Sdk => {
                Acceptor::Sdk(Worker::connect(args.config(0)).map_err(io::Error::other)?)
            }
            Source::ReusePort | Source::Shared | Source::Inherited => {
                Acceptor::Listener(args.listener()?)
            }
            Source::Passed => Acceptor::Passed(socket::from_stdin()?),
        })
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Acceptor::Sdk(worker) => match worker.accept().map_err(io::Error::other)? {
                Some(connection) => Ok(Stream::Sdk(connection)),
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            },
            Acceptor::Listener(listener) => Ok(Stream::Tcp(listener.accept()?.0)),
            Acceptor::Passed(channel) => match socket::receive_fd(channel.as_fd(), true)? {
                Some(fd) => Ok(Stream::Tcp(fd.into())),
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            },
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Sdk(connection) => connection.read(buffer),
            Stream::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Sdk(connection) => connection.write(buffer),
            Stream::Tcp(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn run(args: &WorkerArgs) -> io::Result<()> {
    let acceptor = Acceptor::new(args)?;
    super::ready()?;
    loop {
        let mut stream = match acceptor.accept() {
            Ok(stream) => stream,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            // The client has disconnected already.
            Err(_) => continue,
        };
        args.dawdle();
        let mut greeting = [0; 8];
        let len = args.serve.greeting(args.index, &mut greeting);
        let written = stream.write_all(&greeting[..len]);
        std::thread::sleep(args.round());
        if written.is_err() || args.serve.is_brief() {
            continue;
        }
        let serve = args.serve;
        let thread = std::thread::Builder::new().stack_size(32 * 1024);
        thread.spawn(move || finish(stream, serve))?;
    }
}

fn finish(mut stream: Stream, serve: Serve) {
    let answer = vec![b'.'; CHUNK];
    let mut buffer = [0; 256];
    while let Ok(count) = stream.read(&mut buffer) {
        if count == 0 {
            return;
        }
        if serve == Serve::Bulk {
            for _ in 0..count {
                if stream.write_all(&answer).is_err() {
                    return;
                }
            }
        }
    }
}
