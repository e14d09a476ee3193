//! Connections of this process to one worker of a shared port: the policy does not choose it. They
//! tell whether the worker accepts.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, connect, getpeername, getsockname,
    ipproto, recv, socket_with, sockopt,
};

use super::Shared;
use super::maps::Remote;
use crate::error::Error;
use crate::layout::Address;
use crate::sockets;
use crate::steering::{Steering, check_worker};

/// A connection to a worker. It waits in the worker's queue until it is accepted. To be ended with
/// [`Steering::end_probe`].
#[derive(Debug)]
pub struct Probe {
    socket: OwnedFd,
    /// This end and the worker's.
    ends: (SocketAddr, SocketAddr),
    key: Remote,
}

/// Keeps a connection of [`Steering::connect_to`] at its worker. To be ended with
/// [`Steering::end_direct`].
#[derive(Debug)]
#[must_use]
pub struct Direct {
    key: Remote,
    /// As long as the connection has an entry, no other one gets its port.
    _own: OwnedFd,
}

/// How long [`Steering::connect_to`] waits.
const CONNECTED_WITHIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// What has become of a [`Probe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probed {
    /// The worker has not accepted it yet.
    Waits,
    /// The worker has accepted it.
    Accepted,
    /// It was refused, or has run out of time.
    Failed,
}

impl Steering {
    /// Connects to a worker at its first public address.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the worker has no listener, or an own port; [`Error::System`] if there
    /// is no socket for it; [`Error::Refused`] if the kernel refuses an entry.
    pub fn probe(&mut self, worker: u32) -> Result<Probe, Error> {
        check_worker(worker)?;
        let shared = self.sharing()?;
        let public = shared.first_address_of(worker).ok_or_else(|| {
            Error::Invalid(format!("worker {worker} has no open listener at a shared port"))
        })?;
        let to = SocketAddr::new(reachable(public.ip()), public.port());
        let failed =
            |error: Errno| Error::System { step: "make a connection", error: error.into() };
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP));
        let socket = socket.map_err(failed)?;
        bind(&socket, &SocketAddr::new(to.ip(), 0)).map_err(failed)?;
        let own = getsockname(&socket).and_then(SocketAddr::try_from).map_err(failed)?;
        let key = key(own, to);
        shared.maps.direct(&key, worker)?;
        match connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Probe { socket, ends: (own, to), key }),
            Err(error) => {
                shared.maps.direct_no_more(&key)?;
                Err(failed(error))
            }
        }
    }

    /// A connection to a worker, past the policy, in non-blocking mode. It counts as any other. No
    /// other worker gets it, until [`Steering::end_direct`]: if the worker's queue is moved, it is
    /// reset.
    ///
    /// # Errors
    ///
    /// As [`Steering::probe`]; also [`Error::System`] if the kernel has no room for it in the
    /// worker's queue.
    pub fn connect_to(&mut self, worker: u32) -> Result<(OwnedFd, Direct), Error> {
        let Probe { socket, key, .. } = self.probe(worker)?;
        // Over the loopback device it is complete already, unless its SYN was dropped.
        let waited = poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&CONNECTED_WITHIN));
        let connected = waited.map_err(Into::into).and_then(|_| is_connected(&socket));
        match connected.and_then(|()| socket.try_clone()) {
            Ok(own) => Ok((socket, Direct { key, _own: own })),
            Err(error) => {
                self.sharing()?.maps.direct_no_more(&key)?;
                Err(Error::System { step: "connect to the worker", error })
            }
        }
    }

    /// The connection is over.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    #[expect(clippy::needless_pass_by_value, reason = "it is not to be used again")]
    pub fn end_direct(&mut self, direct: Direct) -> Result<(), Error> {
        self.sharing()?.maps.direct_no_more(&direct.key)
    }

    /// Whether the worker has accepted the connection.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if the kernel does not tell.
    pub fn probed(&self, probe: &Probe) -> Result<Probed, Error> {
        match recv(&probe.socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            // The worker has sent something, or closed it.
            Ok(_) | Err(Errno::CONNRESET) => Ok(Probed::Accepted),
            Err(Errno::AGAIN | Errno::NOTCONN) if getpeername(&probe.socket).is_err() => {
                Ok(Probed::Waits)
            }
            Err(Errno::AGAIN) => {
                let (own, to) = probe.ends;
                let found = sockets::find(to, own);
                let found =
                    found.map_err(|error| Error::System { step: "find a socket", error })?;
                let accepted = found.is_some_and(|socket| socket.inode != 0);
                Ok(if accepted { Probed::Accepted } else { Probed::Waits })
            }
            Err(_) => Ok(Probed::Failed),
        }
    }

    /// Closes the connection.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    pub fn end_probe(&mut self, probe: Probe) -> Result<(), Error> {
        self.sharing()?.maps.direct_no_more(&probe.key)
    }
}

impl Shared {
    fn first_address_of(&self, worker: u32) -> Option<SocketAddr> {
        let mut own = self.listeners.range((worker, 0)..=(worker, u32::MAX));
        let (&(_, group), _) = own.find(|(_, listener)| listener.is_open)?;
        self.groups.get(&group).map(|group| group.address)
    }
}

/// Where this process reaches a listener.
fn reachable(ip: IpAddr) -> IpAddr {
    match ip {
        // A listener of a group at `::` is for IPv4, too.
        _ if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        ip => ip,
    }
}

fn is_connected(socket: &OwnedFd) -> std::io::Result<()> {
    match getpeername(socket) {
        Ok(_) => Ok(()),
        Err(Errno::NOTCONN) => match sockopt::socket_error(socket)? {
            Ok(()) => Err(std::io::ErrorKind::TimedOut.into()),
            Err(error) => Err(error.into()),
        },
        Err(error) => Err(error.into()),
    }
}

fn key(own: SocketAddr, to: SocketAddr) -> Remote {
    let mut key = [0; 20];
    key[..16].copy_from_slice(&Address::from(own).ip);
    key[16..18].copy_from_slice(&own.port().to_ne_bytes());
    key[18..].copy_from_slice(&to.port().to_ne_bytes());
    key
}
