//! The sinks: listeners that drop every segment, one for IPv4 and one for IPv6.
//!
//! A look-up can choose a socket or reset, not drop. So SYNs that should be dropped go to such a
//! listener, whose filter drops them. It listens on a loopback address and accepts nothing.
//! A map of sockets holds no reference: a sink exists as long as a process has its descriptor.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with};

use crate::error::Error;
use crate::layout::MAX_WORKERS;
use crate::maps::Maps;
use crate::sys;

/// Opens the sinks of a pool and registers them as one more worker.
pub(crate) fn open_for(maps: &Maps) -> Result<(OwnedFd, Option<OwnedFd>), Error> {
    let failed = |error| Error::System { step: "open the listeners that drop SYNs", error };
    let sinks = open().map_err(failed)?;
    let listeners = maps.listeners.fd().as_fd();
    for (is_v6, sink) in (0..).zip(std::iter::once(&sinks.0).chain(&sinks.1)) {
        sys::set_socket(listeners, 2 * MAX_WORKERS + is_v6, sink.as_fd()).map_err(failed)?;
    }
    Ok(sinks)
}

/// Opens the sinks, IPv4 first, in the network namespace of the calling thread. Without IPv6 there
/// are no IPv6 clients.
fn open() -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    Ok((open_at(Ipv4Addr::LOCALHOST.into())?, open_at(Ipv6Addr::LOCALHOST.into()).ok()))
}

fn open_at(ip: IpAddr) -> io::Result<OwnedFd> {
    let family = if ip.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    // TCP by name: the default protocol can be made MPTCP.
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    sys::drop_everything(&socket)?;
    bind(&socket, &SocketAddr::new(ip, 0))?;
    listen(&socket, 1)?;
    Ok(socket)
}
