//! Servers on loopback addresses, and a client of either flavour.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, connect, getsockname, listen, socket_with,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;
use worker_sdk::connector::{self, Addresses, Attempt, ConnectorConfig, Error};

/// Long enough for every wait in these tests.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The flavours of the connector.
#[derive(Clone, Copy, Debug)]
pub enum Flavour {
    Blocking,
    Tokio,
}

pub const BOTH: [Flavour; 2] = [Flavour::Blocking, Flavour::Tokio];

/// A connector of either flavour.
pub enum Client {
    Blocking(connector::Connector),
    Tokio(Runtime, connector::tokio::Connector),
}

/// Its connection.
pub enum Connection {
    Blocking(connector::Connection),
    Tokio(connector::tokio::Connection),
}

impl Client {
    pub fn new(flavour: Flavour, config: ConnectorConfig) -> Result<Client, Error> {
        Ok(match flavour {
            Flavour::Blocking => Client::Blocking(connector::Connector::new(config)?),
            Flavour::Tokio => {
                let runtime = tokio::runtime::Builder::new_current_thread();
                let runtime = { runtime }.enable_all().build().unwrap();
                Client::Tokio(runtime, connector::tokio::Connector::new(config)?)
            }
        })
    }

    /// Each new connection has to be greeted with this byte.
    pub fn greeted_with(self, greeting: u8) -> Client {
        let check = move |byte: u8| match byte == greeting {
            true => Ok(()),
            false => Err(io::Error::other("another greeting")),
        };
        match self {
            Client::Blocking(connector) => Client::Blocking(connector.on_connect(move |stream| {
                let mut byte = [0];
                stream.read_exact(&mut byte).and_then(|()| check(byte[0]))
            })),
            Client::Tokio(runtime, connector) => {
                let connector = connector.on_connect(move |mut stream| async move {
                    let byte = stream.read_u8().await?;
                    check(byte).map(|()| stream)
                });
                Client::Tokio(runtime, connector)
            }
        }
    }

    /// After a reconnect the session is restored with this text.
    pub fn restored_with(self, text: &'static str) -> Client {
        match self {
            Client::Blocking(connector) => Client::Blocking(
                connector.on_reconnect(move |stream| stream.write_all(text.as_bytes())),
            ),
            Client::Tokio(runtime, connector) => {
                let connector = connector.on_reconnect(move |mut stream| async move {
                    stream.write_all(text.as_bytes()).await?;
                    Ok(stream)
                });
                Client::Tokio(runtime, connector)
            }
        }
    }

    pub fn connect(&self) -> Result<Connection, Error> {
        match self {
            Client::Blocking(connector) => connector.connect().map(Connection::Blocking),
            Client::Tokio(runtime, connector) => {
                runtime.block_on(connector.connect()).map(Connection::Tokio)
            }
        }
    }

    pub fn reconnect(&self, connection: &mut Connection) -> Result<(), Error> {
        match (self, connection) {
            (Client::Blocking(_), Connection::Blocking(connection)) => connection.reconnect(),
            (Client::Tokio(runtime, _), Connection::Tokio(connection)) => {
                runtime.block_on(connection.reconnect())
            }
            _ => panic!("of another client"),
        }
    }

    pub fn write(&self, connection: &mut Connection, text: &str) -> io::Result<()> {
        match (self, connection) {
            (Client::Blocking(_), Connection::Blocking(connection)) => {
                connection.write_all(text.as_bytes())
            }
            (Client::Tokio(runtime, _), Connection::Tokio(connection)) => {
                runtime.block_on(connection.write_all(text.as_bytes()))
            }
            _ => panic!("of another client"),
        }
    }

    pub fn read(&self, connection: &mut Connection, length: usize) -> io::Result<String> {
        let mut buffer = vec![0; length];
        match (self, connection) {
            (Client::Blocking(_), Connection::Blocking(connection)) => {
                connection.read_exact(&mut buffer)?;
            }
            (Client::Tokio(runtime, _), Connection::Tokio(connection)) => {
                runtime.block_on(connection.read_exact(&mut buffer))?;
            }
            _ => panic!("of another client"),
        }
        Ok(String::from_utf8(buffer).unwrap())
    }
}

impl Connection {
    pub fn address(&self) -> String {
        match self {
            Connection::Blocking(connection) => connection.address().to_string(),
            Connection::Tokio(connection) => connection.address().to_string(),
        }
    }

    pub fn peer(&self) -> SocketAddr {
        match self {
            Connection::Blocking(connection) => connection.peer(),
            Connection::Tokio(connection) => connection.peer(),
        }
    }
}

/// Short pauses, so that the tests are short too.
pub fn config(addresses: Addresses) -> ConnectorConfig {
    ConnectorConfig::new(addresses)
        .attempt_timeout(PATIENCE)
        .total_timeout(PATIENCE)
        .back_off(Duration::from_millis(2), Duration::from_millis(10))
}

pub fn list(addresses: &[SocketAddr]) -> Addresses {
    Addresses::list(addresses.iter().map(ToString::to_string)).unwrap()
}

/// Collects the events.
#[derive(Clone, Default)]
pub struct Events(Arc<Mutex<Vec<Attempt>>>);

impl Events {
    pub fn handler(&self) -> impl Fn(&mut Attempt) + Send + Sync + 'static {
        let events = Arc::clone(&self.0);
        move |attempt| events.lock().unwrap().push(attempt.clone())
    }

    pub fn take(&self) -> Vec<Attempt> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

pub fn kinds(events: &[Attempt]) -> Vec<(bool, u32)> {
    events.iter().map(|event| (event.alternative, event.retries_left)).collect()
}

/// An address of this host on which nothing listens.
///
/// A bound socket keeps the port, so that no other test gets it.
pub struct Refusing {
    pub address: SocketAddr,
    socket: rustix::fd::OwnedFd,
}

impl Refusing {
    /// From now on it accepts.
    pub fn listen(self) -> TcpListener {
        listen(&self.socket, 128).unwrap();
        self.socket.into()
    }
}

pub fn refusing() -> Refusing {
    let socket =
        socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = SocketAddr::try_from(getsockname(&socket).unwrap()).unwrap();
    Refusing { address, socket }
}

/// An address that does not answer: the queue of its listener is full.
pub struct Silent {
    pub address: SocketAddr,
    _sockets: Vec<rustix::fd::OwnedFd>,
}

pub fn silent(at: SocketAddr) -> Silent {
    let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let new = |flags| socket_with(family, SocketType::STREAM, flags, None).unwrap();
    let listener = new(SocketFlags::CLOEXEC);
    bind(&listener, &at).unwrap();
    listen(&listener, 0).unwrap();
    let address = SocketAddr::try_from(getsockname(&listener).unwrap()).unwrap();
    let mut sockets = vec![listener];
    // The queue has room for one, and the kernel may have accepted a further one.
    for _ in 0..4 {
        let client = new(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        let _ = connect(&client, &address);
        sockets.push(client);
    }
    Silent { address, _sockets: sockets }
}

/// A server that greets each connection with one byte, and reports what it then receives, until the
/// end.
pub struct Server {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    pub received: Receiver<String>,
}

impl Server {
    pub fn start(greeting: u8) -> Server {
        Server::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), greeting)
    }

    pub fn start_at(address: SocketAddr, greeting: u8) -> Server {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, streams) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (sender, received) = channel();
        let (stopped, kept) = (Arc::clone(&stop), Arc::clone(&streams));
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let mut stream: TcpStream = stream.unwrap();
                let kept: &Mutex<Vec<TcpStream>> = &kept;
                kept.lock().unwrap().push(stream.try_clone().unwrap());
                let _ = stream.write_all(&[greeting]);
                let sender = sender.clone();
                thread::spawn(move || {
                    let mut text = Vec::new();
                    let _ = stream.read_to_end(&mut text);
                    let _ = sender.send(String::from_utf8(text).unwrap());
                });
            }
        });
        Server { address, stop, streams, received }
    }

    /// Ends all its connections.
    pub fn disconnect(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Ends its connections, and listens no more.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the listener, which then closes.
        let _ = TcpStream::connect(self.address);
        while TcpStream::connect(self.address).is_ok() {
            thread::yield_now();
        }
        self.disconnect();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.stop.load(Ordering::SeqCst) {
            self.stop();
        }
    }
}
