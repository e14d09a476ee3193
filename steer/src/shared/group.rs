//! The sockets of a group: the listeners of workers, and the sink that drops SYNs.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use aya::programs::SkReuseport;
use rustix::net::{
    AddressFamily, Shutdown, SocketFlags, SocketType, bind, getsockname, ipproto, listen, shutdown,
    socket_with, sockopt,
};

use crate::error::Error;
use crate::sys;

/// A public address.
#[derive(Debug)]
pub(super) struct Group {
    pub address: SocketAddr,
    /// `Some` if the program chooses here: a listener of the group that drops every segment.
    pub sink: Option<OwnedFd>,
}

/// This process's duplicate of the listener of a worker.
#[derive(Debug)]
pub(super) struct Listener {
    pub fd: OwnedFd,
    pub is_open: bool,
    pub is_v6: bool,
    backlog: u32,
}

pub(super) fn open_sink(address: SocketAddr) -> Result<OwnedFd, Error> {
    let failed = |error| failed("open the listener that drops SYNs", error);
    let sink = open_socket(address).map_err(failed)?;
    sys::drop_everything(&sink).map_err(failed)?;
    listen(&sink, 1).map_err(|error| failed(error.into()))?;
    Ok(sink)
}

impl Listener {
    /// Bound, and not listening yet.
    pub fn bind(public: SocketAddr, backlog: u32) -> Result<Listener, Error> {
        let fd = open_socket(public).map_err(|error| failed("open a listener", error))?;
        Ok(Listener { fd, is_open: true, is_v6: public.is_ipv6(), backlog })
    }

    /// Of an earlier process, with its address.
    pub fn from_socket(fd: OwnedFd) -> Result<(SocketAddr, Listener), Error> {
        let not_one = || Error::Invalid("not a TCP listener of a shared port".to_owned());
        let address = getsockname(&fd).ok().and_then(|address| SocketAddr::try_from(address).ok());
        let public = address.filter(|address| address.port() != 0).ok_or_else(not_one)?;
        if !sockopt::socket_reuseport(&fd).unwrap_or(false) {
            return Err(not_one());
        }
        let queue = sys::accept_queue(&fd).map_err(|_| not_one())?;
        let backlog = queue.map_or(DEFAULT_BACKLOG, |(_, backlog)| backlog);
        let is_v6 = public.is_ipv6();
        Ok((public, Listener { fd, is_open: queue.is_some(), is_v6, backlog }))
    }

    pub fn listen(&self) -> Result<(), Error> {
        // The kernel's limit is `net.core.somaxconn`.
        let backlog = i32::try_from(self.backlog).unwrap_or(i32::MAX);
        listen(&self.fd, backlog).map_err(|error| failed("listen", error.into()))
    }

    /// Ends listening; the connections in the queue migrate.
    pub fn close(&mut self) -> Result<(), Error> {
        self.is_open = false;
        match shutdown(&self.fd, Shutdown::Both) {
            // It does not listen.
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Ok(()),
            Err(error) => Err(failed("close the queue of a worker", error.into())),
        }
    }

    /// From now on the worker cannot attach another program to the group.
    pub fn lock(&self) -> Result<(), Error> {
        sys::lock_filters(&self.fd).map_err(|error| failed("lock a listener", error))
    }

    /// Detaches the program of an earlier process from the group, if there is one.
    pub fn detach_program(&self) {
        let _ = SkReuseport::detach(&self.fd);
    }

    pub fn duplicate(&self) -> Result<OwnedFd, Error> {
        self.fd.try_clone().map_err(|error| failed("duplicate a listener", error))
    }

    pub fn queue_len(&self) -> Result<u32, Error> {
        let queue = sys::accept_queue(&self.fd);
        let queue = queue.map_err(|error| failed("read the length of a queue", error))?;
        Ok(queue.map_or(0, |(waiting, _)| waiting))
    }
}

/// Of a listener that does not tell its own.
const DEFAULT_BACKLOG: u32 = 4096;

fn open_socket(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    // TCP by name: the default protocol can be made MPTCP.
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    if address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED) {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    bind(&socket, &address)?;
    Ok(socket)
}

fn failed(step: &'static str, error: io::Error) -> Error {
    Error::System { step, error }
}
