//! The server process of every contender: one server, three ways to wait, five sources of
//! connections.

mod blocking;
mod mio;
mod tokio;

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use clap::ValueEnum;
use worker_sdk::WorkerConfig;

use crate::{machine, socket};

/// Bytes of one answer of the bulk server.
pub const CHUNK: usize = 64 * 1024;

/// How a worker waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Blocking,
    Mio,
    Tokio,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Blocking => "blocking",
            Kind::Mio => "mio",
            Kind::Tokio => "tokio",
        }
    }
}

/// The source of a worker's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// The dispatcher.
    Sdk,
    /// Its own listener, with `SO_REUSEPORT`.
    ReusePort,
    /// A listener that several processes share; standard input.
    Shared,
    /// A listener of its own that another process has opened.
    Inherited,
    /// The bare accept-and-pass loop; standard input.
    Passed,
}

/// What a worker does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Serve {
    /// Writes one byte and closes.
    Byte,
    /// Writes the time at which it got the connection and closes.
    Stamp,
    /// Writes its index and waits for the client to close.
    Hold,
    /// Answers each byte with 64 KiB.
    Bulk,
}

impl Serve {
    pub fn name(self) -> &'static str {
        match self {
            Serve::Byte => "byte",
            Serve::Stamp => "stamp",
            Serve::Hold => "hold",
            Serve::Bulk => "bulk",
        }
    }

    /// What is written at once, and how many bytes of `greeting` that is.
    fn greeting(self, index: u16, greeting: &mut [u8; 8]) -> usize {
        match self {
            Serve::Byte => 1,
            Serve::Stamp => {
                *greeting = machine::now_ns().to_le_bytes();
                8
            }
            Serve::Hold => {
                greeting[..2].copy_from_slice(&index.to_le_bytes());
                2
            }
            Serve::Bulk => 0,
        }
    }

    /// Whether the connection ends after the greeting.
    fn is_brief(self) -> bool {
        match self {
            Serve::Byte | Serve::Stamp => true,
            Serve::Hold | Serve::Bulk => false,
        }
    }
}

/// Arguments of the hidden command.
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerArgs {
    #[arg(long)]
    pub kind: Kind,
    #[arg(long)]
    pub source: Source,
    #[arg(long)]
    pub serve: Serve,
    /// For `reuse-port`.
    #[arg(long)]
    pub listen: Option<SocketAddr>,
    /// For `inherited`.
    #[arg(long)]
    pub descriptor: Option<i32>,
    /// For `sdk`.
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// The number of workers in this process; only with mio and the SDK.
    #[arg(long, default_value_t = 1)]
    pub count: u16,
    /// Pause after each accept, in microseconds: a slow worker.
    #[arg(long, default_value_t = 0)]
    pub delay: u64,
    /// How long a round of an event loop, or the service of one client of a blocking worker, takes,
    /// in microseconds.
    #[arg(long, default_value_t = 0)]
    pub round: u64,
    /// Takes nothing.
    #[arg(long)]
    pub stuck: bool,
    /// The first worker's index.
    pub index: u16,
}

impl WorkerArgs {
    fn config(&self, number: u16) -> WorkerConfig {
        let socket = self.socket.clone().unwrap_or_default();
        let name = format!("w{}", self.index + number);
        // Without a limit the worker would wait for a missing dispatcher for ever.
        let patience = std::time::Duration::from_secs(20);
        WorkerConfig::new().dispatch_socket(socket).pool("web").name(name).join_timeout(patience)
    }

    /// The listener, for the sources that have one.
    fn listener(&self) -> io::Result<TcpListener> {
        match self.source {
            Source::ReusePort => {
                let address = self.listen.ok_or_else(|| io::Error::other("--listen is missing"))?;
                socket::listen(address, true)
            }
            Source::Inherited => {
                let number = self.descriptor;
                let number = number.ok_or_else(|| io::Error::other("--descriptor is missing"))?;
                socket::inherited(number)
            }
            Source::Shared => Ok(socket::from_stdin()?.into()),
            Source::Sdk | Source::Passed => Err(io::Error::other("this source has no listener")),
        }
    }

    fn round(&self) -> std::time::Duration {
        std::time::Duration::from_micros(self.round)
    }

    fn dawdle(&self) {
        if self.delay > 0 {
            std::thread::sleep(std::time::Duration::from_micros(self.delay));
        }
    }
}

/// Serves until it is killed.
pub fn run(args: &WorkerArgs) -> io::Result<()> {
    machine::die_with_parent();
    machine::raise_descriptors();
    if args.stuck {
        return stuck(args);
    }
    match args.kind {
        Kind::Blocking => blocking::run(args),
        Kind::Mio => mio::run(args),
        Kind::Tokio => tokio::run(args),
    }
}

/// Takes nothing.
fn stuck(args: &WorkerArgs) -> io::Result<()> {
    let _there = match args.source {
        Source::Sdk => Some(worker_sdk::Worker::connect(args.config(0)).map_err(io::Error::other)?),
        Source::ReusePort | Source::Shared | Source::Inherited | Source::Passed => None,
    };
    ready()?;
    loop {
        std::thread::park();
    }
}

/// Tells the harness that clients may connect.
fn ready() -> io::Result<()> {
    let mut out = io::stdout();
    out.write_all(b"ready\n")?;
    out.flush()
}
