//! The thread at the take-over socket of the running dispatcher. It serves one new dispatcher at a
//! time; another one waits in the queue of the socket, and then takes over from the first one.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, SocketType};

use super::{Ask, Commit, Offer, Peer};
use crate::background::logger::{quoted, value};
use crate::listen::bind::{self, Listening, OwnedPath, SocketAttributes};
use crate::listen::take_over::{Broken, Channel, Record, VERSION, path_of};
use crate::wake::Wake;

/// How long one record may take.
const RECORD: Duration = Duration::from_secs(10);

/// How long the new dispatcher may take to bind its sockets and to start its threads.
const START: Duration = Duration::from_secs(60);

/// Pause after a failed accept.
const REST: Duration = Duration::from_millis(100);

/// The take-over socket and its thread.
pub(in crate::event_loop) struct Giver {
    /// A copy of the socket, for the new dispatcher.
    pub(super) socket: OwnedFd,
    pub(super) path: Option<OwnedPath>,
}

impl Giver {
    /// Makes the socket beside the dispatch socket. Only root and the own user can connect to it.
    pub(in crate::event_loop) fn bind(dispatch_socket: &Path) -> Result<Listening, String> {
        let attributes = SocketAttributes { backlog: 16, mode: 0o600, user: None, group: None };
        let path = path_of(dispatch_socket);
        bind::listen_unix(&path, SocketType::SEQPACKET, attributes, None).map_err(|e| e.to_string())
    }

    /// Starts the thread.
    pub(super) fn start(listening: Listening, wake: Wake) -> io::Result<(Giver, Receiver<Ask>)> {
        let (sender, asks) = sync_channel(1);
        let (socket, _, path) = listening.into_parts();
        rustix::io::ioctl_fionbio(&socket, false)?;
        let thread = Thread { listener: socket.try_clone()?, asks: sender, wake };
        std::thread::Builder::new().name("take_over".to_owned()).spawn(move || thread.run())?;
        Ok((Giver { socket, path }, asks))
    }

    /// Ends the thread.
    pub(super) fn end(self) {
        if self.path.as_ref().is_some_and(|path| !path.file().lock.is_shared()) {
            // No other dispatcher uses the socket. The accept of the thread fails.
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        }
    }
}

struct Thread {
    listener: OwnedFd,
    asks: SyncSender<Ask>,
    wake: Wake,
}

impl Thread {
    fn run(self) {
        loop {
            match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    if self.serve(socket) {
                        return;
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED | Errno::AGAIN) => {}
                // The dispatcher has shut the socket down.
                Err(Errno::INVAL) => return,
                Err(errno) => {
                    log::warn!("event=take_over_accept_failed error={}", quoted(errno));
                    std::thread::sleep(REST);
                }
            }
        }
    }

    /// Serves one new dispatcher. True once it has taken over.
    fn serve(&self, socket: OwnedFd) -> bool {
        let credentials =
            nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials);
        let peer = match credentials {
            Ok(credentials) => Peer { pid: credentials.pid(), uid: credentials.uid() },
            Err(error) => {
                log::warn!("event=take_over_refused reason={}", quoted(error));
                return false;
            }
        };
        let channel = Arc::new(Channel::new(socket));
        match self.give(peer, &channel) {
            Ok(()) => true,
            Err(Broken::Refused(reason)) => {
                log::warn!("event=take_over_refused pid={} reason={}", peer.pid, quoted(&reason));
                let refused = Record::Refused { reason };
                let _ = channel.send(&refused, &[], Instant::now() + RECORD);
                false
            }
            Err(broken) => {
                log::warn!("event=take_over_failed pid={} error={}", peer.pid, quoted(&broken));
                let reason = format!("the running dispatcher serves on: {broken}");
                let _ = channel.send(&Record::Refused { reason }, &[], Instant::now());
                false
            }
        }
    }

    /// Speaks with the new dispatcher. [`Broken::Refused`] is a refusal of this side.
    fn give(&self, peer: Peer, channel: &Arc<Channel>) -> Result<(), Broken> {
        let soon = || Instant::now() + RECORD;
        let unexpected = |record| Broken::Other(format!("unexpected: {record:?}"));
        match channel.receive(soon())?.0 {
            Record::Hello { version: VERSION, program } => {
                log::info!("event=take_over_begun pid={} version={}", peer.pid, value(&program))
            }
            Record::Hello { version, program } => {
                return Err(Broken::Refused(format!(
                    "the running dispatcher {} has version {VERSION} of the take-over, dispatcher \
                     {program} has version {version}: restart it instead",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            record => return Err(unexpected(record)),
        }
        let (answer, answered) = sync_channel(1);
        self.ask(Ask::Sockets { peer, channel: Arc::downgrade(channel), answer })?;
        let offer = answered.recv().map_err(|_| Broken::Ended)?.map_err(Broken::Refused)?;
        let own = std::process::id() as i32;
        channel.send(&Record::Welcome { pid: own }, &[], soon())?;
        send_sockets(channel, &offer, soon)?;
        let started = Instant::now() + START;
        let mut unused = HashSet::new();
        loop {
            match channel.receive(started)?.0 {
                Record::Unused { socket } if (socket as usize) < offer.sockets.len() => {
                    unused.insert(socket);
                }
                Record::Ready => break,
                record => return Err(unexpected(record)),
            }
        }
        let (answer, answered) = sync_channel(1);
        let channel = Arc::clone(channel);
        self.ask(Ask::Commit(Box::new(Commit { peer, channel, offer, unused, answer })))?;
        answered.recv().map_err(|_| Broken::Ended)?.map_err(Broken::Other)
    }

    fn ask(&self, ask: Ask) -> Result<(), Broken> {
        self.asks.send(ask).map_err(|_| Broken::Ended)?;
        (self.wake)();
        Ok(())
    }
}

fn send_sockets(
    channel: &Channel,
    offer: &Offer,
    soon: impl Fn() -> Instant,
) -> Result<(), Broken> {
    for socket in &offer.sockets {
        let lock = socket.file.as_ref().map(|file| file.lock.file().as_fd());
        let fds: Vec<BorrowedFd<'_>> = std::iter::once(socket.fd.as_fd()).chain(lock).collect();
        channel.send(&Record::Socket { about: socket.about.clone() }, &fds, soon())?;
    }
    channel.send(&Record::End { sockets: offer.sockets.len() as u32 }, &[], soon())
}
