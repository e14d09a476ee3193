//! The gate: a listener that drops every segment.
//!
//! A look-up can choose a socket or reset, not drop. So SYNs that should be dropped go to this
//! listener, whose filter drops them. It listens on a loopback address and accepts nothing.
//! A map of sockets holds no reference: the gate exists as long as a process has its descriptor.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with, sockopt,
};

use crate::sys;

/// Opens a gate in the network namespace of the calling thread. An IPv6 socket also stands for IPv4;
/// without IPv6 there are no IPv6 clients.
pub(crate) fn open() -> io::Result<OwnedFd> {
    open_at(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0))
        .or_else(|_| open_at(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)))
}

fn open_at(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    // TCP by name: the default protocol can be made MPTCP.
    let socket =
        socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    if address.is_ipv6() {
        // The loopback address is IPv6 only, but the kernel compares just the family and this.
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    sys::drop_everything(&socket)?;
    bind(&socket, &address)?;
    listen(&socket, 1)?;
    Ok(socket)
}
