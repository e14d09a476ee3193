//! Connects to a dispatcher: sends the hello and receives the answer. Does not decide when to
//! retry.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, ReturnFlags, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recvmsg, send, socket_with,
};

use super::channel::take_fds;
use super::error::Error;
use super::log_queue::readable;
use super::outbox::Outbox;
use dispatch_protocol::scoreboard::gauge::GaugeName;
use dispatch_protocol::scoreboard::{Scoreboard, slot};
use dispatch_protocol::wire::{
    Control, Features, Hello, MAX_CONTROL_RECORD, RefusedCode, VERSION, WELCOME_FDS, Welcome,
};

/// The connection to one dispatcher, without the channel. Dropping it tells the dispatcher that the
/// worker has gone.
pub(super) struct Session {
    pub(super) control: OwnedFd,
    pub(super) outbox: Outbox,
    /// Shared with connections, which may outlive the session.
    pub(super) doorbell: Arc<OwnedFd>,
    pub(super) board: Arc<Scoreboard>,
    pub(super) worker_id: u64,
    /// Abilities of both sides.
    pub(super) features: Features,
    listeners: Vec<(u16, Arc<str>)>,
    /// The gauges that the pool uses for scores.
    pub(super) gauges: Vec<GaugeName>,
    /// The ticket of the relay; empty for none.
    #[cfg(feature = "relay")]
    pub(super) relay_ticket: Vec<u8>,
}

impl Session {
    pub(super) fn new(control: OwnedFd, joined: Joined) -> (Session, OwnedFd) {
        let listeners = joined.welcome.listeners.into_iter();
        let session = Session {
            control,
            outbox: Outbox::default(),
            doorbell: Arc::new(joined.doorbell),
            board: Arc::new(joined.board),
            worker_id: joined.welcome.worker_id,
            features: joined.welcome.features,
            listeners: listeners.map(|l| (l.index, l.name.into())).collect(),
            gauges: joined.welcome.gauges,
            #[cfg(feature = "relay")]
            relay_ticket: joined.welcome.relay_ticket,
        };
        (session, joined.channel)
    }

    /// Rings the doorbell if the dispatcher waits for a change of the kind `bit`. Call it after the
    /// change.
    pub(super) fn ring_if_wanted(&self, bit: u32) {
        if slot::must_ring(self.board.want(), bit) {
            // It fails only if the counter is full; then the dispatcher is awake.
            let _ = rustix::io::write(&*self.doorbell, &1u64.to_ne_bytes());
        }
    }

    /// Tells the dispatcher that the worker has gone. A shutdown works even if a forked child has a
    /// copy of the control connection; a close would not.
    pub(super) fn end(&self) {
        end(&self.control);
    }

    pub(super) fn listener(&self, index: u16) -> Option<Arc<str>> {
        let found = self.listeners.iter().find(|(i, _)| *i == index);
        found.map(|(_, name)| Arc::clone(name))
    }
}

/// See [`Session::end`].
pub(super) fn end(control: &OwnedFd) {
    // It fails if the dispatcher is gone.
    let _ = rustix::net::shutdown(control, rustix::net::Shutdown::Both);
}

/// Why a join failed.
pub(super) enum Failure {
    /// No dispatcher has dealt with the attempt: none listens, or it is stopping. The next one may
    /// be ready at any time.
    Absent(String),
    /// Likely to pass: the dispatcher is full, or lacks a resource.
    Transient(String),
    /// A configuration or a program has to change.
    Permanent(Error),
}

/// The place of a dispatch socket. It changes when another socket takes the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    device: u64,
    inode: u64,
}

impl Place {
    pub(super) fn of(path: &Path) -> rustix::io::Result<Place> {
        let stat = rustix::fs::stat(path)?;
        Ok(Place { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// A checked welcome with its descriptors.
pub(super) struct Joined {
    pub(super) welcome: Welcome,
    pub(super) channel: OwnedFd,
    board: Scoreboard,
    doorbell: OwnedFd,
}

/// Connects and sends the hello; returns the control connection, and where it leads.
pub(super) fn greet(path: &Path, hello: &Hello) -> Result<(OwnedFd, Option<Place>), Failure> {
    let action = || format!("connect to the dispatcher at {}", path.display());
    let permanent = |error: Errno| Failure::Permanent(Error::io(action(), error));
    let address = SocketAddrUnix::new(path).map_err(|error| {
        let problem = format!("{} is not a usable socket path: {error}", path.display());
        Failure::Permanent(Error::config("dispatch_socket", problem))
    })?;
    // Before the connect: if another socket takes the path meanwhile, the worker notices it later.
    let place = match Place::of(path) {
        Ok(place) => Some(place),
        // The usual case during an outage, and cheaper than a socket.
        Err(error @ Errno::NOENT) => return Err(Failure::Absent(error.to_string())),
        // The connect has the error to report.
        Err(_) => None,
    };
    let control = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(permanent)?;
    match connect(&control, &address) {
        Ok(()) => {}
        // The socket does not exist yet, nothing listens on it, or its queue is full.
        Err(error @ (Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR)) => {
            return Err(Failure::Absent(error.to_string()));
        }
        Err(Errno::PROTOTYPE) => {
            let problem = "it is a socket of another kind".to_owned();
            return Err(Failure::Permanent(Error::Protocol { socket: path.to_owned(), problem }));
        }
        Err(error) => return Err(permanent(error)),
    }
    let mut record = Vec::new();
    hello.encode(&mut record);
    match send(&control, &record, SendFlags::NOSIGNAL) {
        Ok(_) => Ok((control, place)),
        Err(error) => Err(Failure::Absent(format!("cannot send: {error}"))),
    }
}

/// Receives the answer to a hello, without waiting; `None` if there is none yet.
pub(super) fn answer(control: &OwnedFd, path: &Path) -> Result<Option<Joined>, Failure> {
    let malformed = |problem: String| {
        let socket = path.to_owned();
        Failure::Permanent(Error::Protocol { socket, problem })
    };
    let mut buffer = [0; MAX_CONTROL_RECORD + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(WELCOME_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = match recvmsg(control, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, flags)
    {
        Ok(message) => message,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(error) => return Err(Failure::Transient(format!("cannot receive: {error}"))),
    };
    let fds = take_fds(&mut ancillary);
    if message.bytes == 0 {
        return Err(Failure::Transient("it closed the connection without an answer".to_owned()));
    }
    let decoded =
        Control::decode(&buffer[..message.bytes]).map_err(|e| malformed(e.to_string()))?;
    if message.flags.contains(ReturnFlags::CTRUNC) || fds.len() != decoded.fds() {
        // The peer sent a wrong number, or this process had no room for them, which may pass.
        let problem = format!("{} file descriptors came with its answer", fds.len());
        return if fds.len() < decoded.fds() {
            let hint = "is this process at its limit of open files?";
            Err(Failure::Transient(format!("only {problem}; {hint}")))
        } else {
            Err(malformed(problem))
        };
    }
    match decoded {
        Control::Welcome(welcome) => joined(fds, welcome).map(Some).map_err(malformed),
        Control::Refused(refused) if refused.code == RefusedCode::Stopping => {
            Err(Failure::Absent(readable(&refused.reason).into_owned()))
        }
        Control::Refused(refused) if refused.code.is_transient() => {
            Err(Failure::Transient(readable(&refused.reason).into_owned()))
        }
        Control::Refused(refused) => Err(Failure::Permanent(Error::Refused {
            socket: path.to_owned(),
            code: refused.code,
            reason: refused.reason,
            key: refused.key,
        })),
        Control::Hello(_) | Control::Goodbye(_) | Control::Claim(_) | Control::Update(_) => {
            Err(malformed("it sent a record that only workers send".to_owned()))
        }
    }
}

fn joined(fds: Vec<OwnedFd>, welcome: Welcome) -> Result<Joined, String> {
    if welcome.version != VERSION {
        return Err(format!("it speaks version {}, this worker speaks {VERSION}", welcome.version));
    }
    let Ok([channel, board, doorbell]) = <[OwnedFd; WELCOME_FDS]>::try_from(fds) else {
        return Err("wrong number of file descriptors".to_owned());
    };
    let board = Scoreboard::open(board, welcome.slots).map_err(|error| error.to_string())?;
    Ok(Joined { welcome, channel, board, doorbell })
}
