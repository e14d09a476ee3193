//! Why an attempt failed: because of the server, or because of this machine.
//!
//! A process without free descriptors, or with too many look-ups under way, learns nothing about a
//! server. Such a failure uses up the attempt, and never sets the address aside.

use std::io;
use std::net::SocketAddr;

use rustix::io::Errno;

/// The failure of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: io::ErrorKind,
    pub(crate) problem: String,
    /// A shortage of this machine; the address may be fine.
    pub(crate) local: bool,
}

impl Failure {
    /// A failure of the server, or of the way to it.
    pub(crate) fn of_server(error: &io::Error) -> Failure {
        Failure { kind: error.kind(), problem: error.to_string(), local: false }
    }

    /// A shortage of this machine.
    pub(crate) fn local(error: &io::Error) -> Failure {
        Failure { local: true, ..Failure::of_server(error) }
    }

    /// The failure of a handler, or of reading and writing.
    pub(crate) fn of_io(error: &io::Error) -> Failure {
        Failure { local: is_shortage(error), ..Failure::of_server(error) }
    }

    /// The failure of a connect to `peer`.
    pub(crate) fn of_connect(error: &io::Error, peer: SocketAddr) -> Failure {
        // The kernel says the same when no port is free as when this machine has no address from
        // which the peer could be reached.
        let no_port =
            || Errno::from_io_error(error) == Some(Errno::ADDRNOTAVAIL) && has_source_address(peer);
        Failure { local: is_shortage(error) || no_port(), ..Failure::of_server(error) }
    }

    /// An answer that is none.
    pub(crate) fn of_answer(problem: String) -> Failure {
        Failure { kind: io::ErrorKind::InvalidData, problem, local: false }
    }

    /// The end of a time limit.
    pub(crate) fn timed_out(problem: &str) -> Failure {
        let problem = problem.to_owned();
        Failure { kind: io::ErrorKind::TimedOut, problem, local: false }
    }
}

/// Whether this process or machine has no more descriptors or memory.
fn is_shortage(error: &io::Error) -> bool {
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| shortages.contains(&errno))
}

/// Whether this machine has an address from which it could connect to `peer`. A datagram socket
/// tells without sending anything, and its ports are others than those of connections.
fn has_source_address(peer: SocketAddr) -> bool {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
    let family = if peer.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    match socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None) {
        Ok(socket) => connect(&socket, &peer) != Err(Errno::ADDRNOTAVAIL),
        Err(_) => true,
    }
}

#[test]
fn shortages_of_this_machine_are_no_failures_of_a_server() {
    let peer = SocketAddr::from(([127, 0, 0, 1], 9));
    for (errno, local) in [
        (Errno::MFILE, true),
        (Errno::NFILE, true),
        (Errno::NOBUFS, true),
        (Errno::NOMEM, true),
        // Every machine has a way to its loopback address, so the ports were used up.
        (Errno::ADDRNOTAVAIL, true),
        (Errno::CONNREFUSED, false),
        (Errno::NETUNREACH, false),
        (Errno::TIMEDOUT, false),
    ] {
        assert_eq!(Failure::of_connect(&errno.into(), peer).local, local, "{errno:?}");
    }
    // A name that the server gave, for example: no address of this machine.
    assert!(!Failure::of_io(&Errno::ADDRNOTAVAIL.into()).local);
    assert!(!Failure::of_io(&io::Error::other("no")).local);
}
