//! The sinks: listeners that drop every segment, one for IPv4 and one for IPv6.
//!
//! A look-up can choose a socket or reset, not drop. So SYNs that should be dropped go to such a
//! listener, whose filter drops them. It listens on a loopback address and accepts nothing.
//! A map of sockets holds no reference: a sink exists as long as a process has its descriptor.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with};

use crate::sys;

/// Opens the sinks, IPv4 first, in the network namespace of the calling thread. Without IPv6 there
/// are no IPv6 clients.
pub(crate) fn open() -> io::Result<(OwnedFd, Option<OwnedFd>)> {
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
