//! The worker with an event loop: one thread for any number of connections and of SDK workers.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use mio::net::{TcpListener, TcpStream};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};
use worker_sdk::Connection;
use worker_sdk::mio::MioWorker;

use super::{CHUNK, Serve, Source, WorkerArgs};
use crate::socket;

enum Acceptor {
    Sdk(MioWorker),
    Listener(TcpListener),
    Passed(OwnedFd),
}

enum Stream {
    Sdk(Connection),
    Tcp(TcpStream),
}

struct Client {
    stream: Stream,
    /// Bytes of the answer that are not yet written.
    unsent: usize,
}

impl Acceptor {
    fn new(args: &WorkerArgs, number: u16) -> io::Result<Acceptor> {
        match args.source {
            Source::Sdk => {
                let worker = MioWorker::new(args.config(number)).map_err(io::Error::other)?;
                Ok(Acceptor::Sdk(worker))
            }
            Source::ReusePort | Source::Shared | Source::Inherited => {
                let listener = args.listener()?;
                listener.set_nonblocking(true)?;
                Ok(Acceptor::Listener(TcpListener::from_std(listener)))
            }
            Source::Passed => Ok(Acceptor::Passed(socket::from_stdin()?)),
        }
    }

    fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match self {
            Acceptor::Sdk(worker) => registry.register(worker, token, Interest::READABLE),
            Acceptor::Listener(listener) => registry.register(listener, token, Interest::READABLE),
            Acceptor::Passed(channel) => {
                registry.register(&mut SourceFd(&channel.as_raw_fd()), token, Interest::READABLE)
            }
        }
    }

    fn is_ready(&self) -> bool {
        match self {
            Acceptor::Sdk(worker) => worker.is_joined(),
            Acceptor::Listener(_) | Acceptor::Passed(_) => true,
        }
    }

    fn try_accept(&self) -> io::Result<Option<Stream>> {
        match self {
            Acceptor::Sdk(worker) => {
                Ok(worker.try_accept().map_err(io::Error::other)?.map(Stream::Sdk))
            }
            Acceptor::Listener(listener) => match listener.accept() {
                Ok((stream, _)) => Ok(Some(Stream::Tcp(stream))),
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error),
            },
            Acceptor::Passed(channel) => {
                let fd = socket::receive_fd(channel.as_fd(), false)?;
                Ok(fd.map(|fd| Stream::Tcp(TcpStream::from_std(fd.into()))))
            }
        }
    }
}

impl Stream {
    fn raw(&self) -> RawFd {
        match self {
            Stream::Sdk(connection) => connection.as_raw_fd(),
            Stream::Tcp(stream) => stream.as_raw_fd(),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Sdk(connection) => connection.read(buffer),
            Stream::Tcp(stream) => stream.read(buffer),
        }
    }

    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Sdk(connection) => connection.write(buffer),
            Stream::Tcp(stream) => stream.write(buffer),
        }
    }
}

impl Client {
    /// Reads and writes without blocking; false when the connection has ended.
    fn go_on(&mut self, serve: Serve, answer: &[u8]) -> io::Result<bool> {
        let again = |error: io::Error| match error.kind() {
            ErrorKind::WouldBlock => Ok(true),
            _ => Err(error),
        };
        let mut buffer = [0; 256];
        loop {
            while self.unsent > 0 {
                match self.stream.write(&answer[..self.unsent.min(CHUNK)]) {
                    Ok(count) => self.unsent -= count,
                    Err(error) => return again(error),
                }
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(count) if serve == Serve::Bulk => self.unsent = count * CHUNK,
                Ok(_) => {}
                Err(error) => return again(error),
            }
        }
    }
}

struct Server<'a> {
    args: &'a WorkerArgs,
    clients: Vec<Option<Client>>,
    free: Vec<usize>,
    acceptors: usize,
}

pub(super) fn run(args: &WorkerArgs) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut acceptors = Vec::new();
    for number in 0..args.count {
        let mut acceptor = Acceptor::new(args, number)?;
        acceptor.register(poll.registry(), Token(usize::from(number)))?;
        acceptors.push(acceptor);
    }
    let mut server =
        Server { args, clients: Vec::new(), free: Vec::new(), acceptors: acceptors.len() };
    let mut events = Events::with_capacity(1024);
    let answer = vec![b'.'; CHUNK];
    let mut waiting = true;
    // A worker that works between its rounds does not sleep in the poll.
    let timeout = (args.round > 0).then_some(std::time::Duration::ZERO);
    loop {
        if waiting && acceptors.iter().all(Acceptor::is_ready) {
            super::ready()?;
            waiting = false;
        }
        std::thread::sleep(args.round());
        match poll.poll(&mut events, timeout) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            let token = event.token().0;
            match acceptors.get(token) {
                Some(acceptor) => {
                    while let Some(stream) = acceptor.try_accept()? {
                        server.welcome(poll.registry(), stream, token)?;
                    }
                }
                None => server.go_on(poll.registry(), token, &answer)?,
            }
        }
    }
}

impl Server<'_> {
    fn welcome(
        &mut self,
        registry: &Registry,
        mut stream: Stream,
        number: usize,
    ) -> io::Result<()> {
        self.args.dawdle();
        let (mut greeting, serve) = ([0; 8], self.args.serve);
        let len = serve.greeting(self.args.index + number as u16, &mut greeting);
        // The byte fits into an empty send buffer; a client that has disconnected is closed below.
        let written = len == 0 || stream.write(&greeting[..len]).is_ok();
        if !written || serve.is_brief() {
            return Ok(());
        }
        let place = self.free.pop().unwrap_or_else(|| {
            self.clients.push(None);
            self.clients.len() - 1
        });
        let interest = match serve {
            Serve::Bulk => Interest::READABLE | Interest::WRITABLE,
            Serve::Hold | Serve::Byte | Serve::Stamp => Interest::READABLE,
        };
        let token = Token(self.acceptors + place);
        registry.register(&mut SourceFd(&stream.raw()), token, interest)?;
        self.clients[place] = Some(Client { stream, unsent: 0 });
        Ok(())
    }

    fn go_on(&mut self, registry: &Registry, token: usize, answer: &[u8]) -> io::Result<()> {
        let place = token - self.acceptors;
        let Some(Some(client)) = self.clients.get_mut(place) else { return Ok(()) };
        if client.go_on(self.args.serve, answer).unwrap_or(false) {
            return Ok(());
        }
        // Before the close: another process may have a copy, which would go on causing events.
        registry.deregister(&mut SourceFd(&client.stream.raw()))?;
        self.clients[place] = None;
        self.free.push(place);
        Ok(())
    }
}
