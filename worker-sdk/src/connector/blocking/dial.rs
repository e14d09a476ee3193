//! Connecting to an address with a time limit: non-blocking connects to all addresses that a host
//! name has, as the race wants them, and one `poll` for them.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use crate::connector::core::Core;
use crate::connector::dialling::{Dialling, Reached};
use crate::connector::failure::Failure;
use crate::connector::race::RaceStep;
use crate::connector::{Address, resolve};

/// A connected stream in blocking mode, and its server. `preferred` is tried first, if it belongs
/// to a host name.
pub(super) fn dial(
    core: &Arc<Core>,
    address: &Address,
    preferred: Option<SocketAddr>,
    deadline: Instant,
) -> Result<(TcpStream, Reached), Failure> {
    let ordered = match address.host_name() {
        None => address.socket_addr().into_iter().collect(),
        Some(host) => {
            let name = (host, address.port());
            core.order(&resolve::wait(&core.config.resolver, name, deadline)?, preferred)
        }
    };
    let mut dialling = Dialling::new(core, ordered, deadline);
    // In the order in which they began.
    let mut under_way: Vec<(OwnedFd, SocketAddr)> = Vec::new();
    loop {
        match dialling.next() {
            RaceStep::Failed(failure) => return Err(failure),
            RaceStep::Begin(peer) => match begin(peer) {
                Ok(socket) => under_way.push((socket, peer)),
                Err(error) => dialling.failed(peer, &error.into()),
            },
            RaceStep::Wait(until) => {
                let first = first(&under_way, until).map_err(|error| Failure::local(&error))?;
                let Some(place) = first else { continue };
                let (socket, peer) = under_way.remove(place);
                match finish(socket) {
                    Ok(stream) => return Ok((stream, dialling.won(peer))),
                    Err(error) => dialling.failed(peer, &error),
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

/// The first connect with a result; none at `until`, and after a signal.
fn first(under_way: &[(OwnedFd, SocketAddr)], until: Instant) -> io::Result<Option<usize>> {
    let mut polled: Vec<PollFd<'_>> =
        under_way.iter().map(|(socket, _)| PollFd::new(socket, PollFlags::OUT)).collect();
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).ok();
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(polled.iter().position(|fd| !fd.revents().is_empty()))
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

#[test]
fn of_several_results_the_first_is_that_of_the_connect_that_began_first() {
    let far = Instant::now() + std::time::Duration::from_secs(60);
    let listeners = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let peers = listeners.each_ref().map(|listener| listener.local_addr().unwrap());
    let mut under_way: Vec<_> = peers.map(|peer| (begin(peer).unwrap(), peer)).into();
    for one in &under_way {
        // Each has a result.
        assert_eq!(first(std::slice::from_ref(one), far).unwrap(), Some(0));
    }
    for peer in peers {
        let place = first(&under_way, far).unwrap().unwrap();
        let (socket, reached) = under_way.remove(place);
        assert_eq!((reached, finish(socket).unwrap().peer_addr().unwrap()), (peer, peer));
    }
}
