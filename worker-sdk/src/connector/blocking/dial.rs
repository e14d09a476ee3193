//! Connecting to an address with a time limit: non-blocking connects to all addresses that a host
//! name has, as the race wants them, and one `poll` for them.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use crate::connector::core::Core;
use crate::connector::race::{Race, RaceStep};
use crate::connector::{Address, resolve};

/// A connected stream in blocking mode, and its peer. `preferred` is tried first, if it belongs to
/// a host name.
pub(super) fn dial(
    core: &Core,
    address: &Address,
    preferred: Option<SocketAddr>,
    deadline: Instant,
) -> io::Result<(TcpStream, SocketAddr)> {
    let ordered = match address.host_name() {
        None => address.socket_addr().into_iter().collect(),
        Some(host) => {
            let resolver = &core.config.resolver;
            let resolved = resolve::wait(resolver, host, address.port(), deadline)?;
            core.order(&resolved, preferred)
        }
    };
    let mut race = Race::new(ordered);
    let mut under_way: Vec<(OwnedFd, SocketAddr)> = Vec::new();
    loop {
        let now = Instant::now();
        if now >= deadline {
            under_way.iter().for_each(|(_, peer)| core.peer_failed(*peer));
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in the time limit"));
        }
        match race.next(now) {
            RaceStep::Failed(error) => return Err(error),
            RaceStep::Begin(peer) => match begin(peer) {
                Ok(socket) => under_way.push((socket, peer)),
                Err(error) => {
                    core.peer_failed(peer);
                    race.failed(error.into());
                }
            },
            RaceStep::Wait(until) => {
                let until = until.map_or(deadline, |until| until.min(deadline));
                for (place, ready) in wait(&under_way, until)?.into_iter().enumerate().rev() {
                    if !ready {
                        continue;
                    }
                    let (socket, peer) = under_way.remove(place);
                    match finish(socket) {
                        Ok(stream) => {
                            // Those before it had a head start.
                            under_way[..place].iter().for_each(|(_, peer)| core.peer_failed(*peer));
                            return Ok((stream, peer));
                        }
                        Err(error) => {
                            core.peer_failed(peer);
                            race.failed(error);
                        }
                    }
                }
            }
        }
    }
}

fn begin(peer: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if peer.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, &peer) {
        // The kernel continues after a signal.
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// Which connects have a result; none of them at `until`, and after a signal.
fn wait(under_way: &[(OwnedFd, SocketAddr)], until: Instant) -> io::Result<Vec<bool>> {
    let mut polled: Vec<PollFd<'_>> =
        under_way.iter().map(|(socket, _)| PollFd::new(socket, PollFlags::OUT)).collect();
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).ok();
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect())
}

fn finish(socket: OwnedFd) -> io::Result<TcpStream> {
    sockopt::socket_error(&socket)??;
    let stream = TcpStream::from(socket);
    // Fails if the peer has reset the connection already.
    if stream.peer_addr()? == stream.local_addr()? {
        // Nothing listens on the port, and the kernel gave it to this end: it met itself.
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    stream.set_nonblocking(false)?;
    Ok(stream)
}
