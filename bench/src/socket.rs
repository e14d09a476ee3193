//! Listening sockets, and descriptors passed as standard input. Used by the contenders with the
//! bench's worker.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    sockopt,
};

/// The queue every listener asks for; the kernel uses the smaller of this and `somaxconn`.
pub const BACKLOG: i32 = 4096;

/// Listens with the options the dispatcher's listeners have by default.
pub fn listen(address: SocketAddr, reuse_port: bool) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    if reuse_port {
        sockopt::set_socket_reuseport(&fd, true)?;
    }
    sockopt::set_tcp_nodelay(&fd, true)?;
    rustix::net::bind(&fd, &address)?;
    rustix::net::listen(&fd, BACKLOG)?;
    Ok(fd.into())
}

/// A free address.
pub fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

/// Several free addresses: each stays bound until all are found, so they differ.
pub fn free_addresses(count: u16) -> io::Result<Vec<SocketAddr>> {
    let bind = |_| TcpListener::bind("127.0.0.1:0");
    let listeners = (0..count).map(bind).collect::<io::Result<Vec<_>>>()?;
    listeners.iter().map(TcpListener::local_addr).collect()
}

/// The descriptor that the parent put in place of standard input.
pub fn from_stdin() -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?)
}

/// A listener that this process has inherited, at this descriptor, with the options of [`listen`].
pub fn inherited(descriptor: i32) -> io::Result<TcpListener> {
    let listeners = worker_sdk::inherited_listeners()?;
    let mut found = listeners.into_iter().filter(|it| it.as_raw_fd() == descriptor);
    let missing = || io::Error::other(format!("descriptor {descriptor} is not inherited"));
    let listener = found.next().ok_or_else(missing)?;
    sockopt::set_tcp_nodelay(&listener, true)?;
    Ok(listener)
}

/// Receives one record with one descriptor; `None` if there is none or the peer has closed.
pub fn receive_fd(channel: BorrowedFd<'_>, wait: bool) -> io::Result<Option<OwnedFd>> {
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    if !wait {
        flags |= RecvFlags::DONTWAIT;
    }
    let mut byte = [0; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    match rustix::net::recvmsg(channel, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags) {
        Ok(_) => Ok(ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A pair whose halves children can inherit.
pub fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok((ours.as_fd().try_clone_to_owned()?, theirs))
}
