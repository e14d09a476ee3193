//! The listening and the connected TCP sockets of this network namespace, as the kernel lists them.
//! No privilege is needed.

use std::io;
use std::net::SocketAddr;

use crate::sockets;

/// A listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listening {
    /// Its address; IPv4-mapped ones as IPv4.
    pub address: SocketAddr,
    /// The family of the socket: an IPv6 one may serve IPv4 clients, too.
    pub is_v6: bool,
    /// Connections in its accept queue.
    pub queued: u32,
    /// The user that opened it.
    pub uid: u32,
    /// Its inode, as in `/proc/PID/fd`.
    pub inode: u32,
}

/// Every listening TCP socket, IPv4 and IPv6.
///
/// # Errors
///
/// The kernel does not answer.
pub fn list() -> io::Result<Vec<Listening>> {
    let mut found = Vec::new();
    sockets::read(None, sockets::LISTENING, &mut |socket| {
        let address = SocketAddr::new(socket.local.ip().to_canonical(), socket.local.port());
        found.push(Listening {
            address,
            is_v6: socket.is_v6,
            queued: socket.queued,
            uid: socket.uid,
            inode: socket.inode,
        });
    })?;
    Ok(found)
}

/// A connected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connected {
    /// Its own address; IPv4-mapped ones as IPv4.
    pub local: SocketAddr,
    /// Its inode, as in `/proc/PID/fd`; 0 as long as no process has accepted it.
    pub inode: u32,
    /// Its number that no other socket of this machine ever has (`SO_COOKIE`).
    pub cookie: u64,
}

/// Every connected TCP socket at one of these ports, IPv4 and IPv6. One that the client has closed
/// and its process has not is among them.
///
/// # Errors
///
/// The kernel does not answer.
pub fn connected(at: impl Fn(u16) -> bool) -> io::Result<Vec<Connected>> {
    let mut found = Vec::new();
    sockets::read(None, sockets::CONNECTED, &mut |socket| {
        if at(socket.local.port()) {
            let local = SocketAddr::new(socket.local.ip().to_canonical(), socket.local.port());
            found.push(Connected { local, inode: socket.inode, cookie: socket.cookie });
        }
    })?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_listener_and_its_queue_are_listed() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let address = listener.local_addr().expect("bound");
            let clients: Vec<_> = (0..3).map(|_| TcpStream::connect(address)).collect();
            assert!(clients.iter().all(Result::is_ok));
            let of = |all: Vec<Listening>| all.into_iter().find(|it| it.address == address);
            let found = of(list().expect("a list")).expect("it is listed");
            assert_eq!((found.queued, found.is_v6), (3, address.is_ipv6()));
            assert_eq!(found.uid, rustix::process::geteuid().as_raw());
            drop(listener);
            assert_eq!(of(list().expect("a list")), None);
        }
    }

    #[test]
    fn connections_are_listed_with_what_accepted_them() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("bound");
        let clients: Vec<_> = (0..3).map(|_| TcpStream::connect(address)).collect();
        assert!(clients.iter().all(Result::is_ok));
        let (accepted, _) = listener.accept().expect("a connection");
        let found = connected(|port| port == address.port()).expect("a list");
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found.iter().all(|it| it.local == address));
        assert_eq!(found.iter().filter(|it| it.inode == 0).count(), 2, "{found:?}");
        drop(accepted);
        assert_eq!(connected(|port| port == 0).expect("a list"), []);
    }
}
