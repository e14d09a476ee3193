//! Ports of workers: free ones, and which listeners are those of a worker.

use std::net::{IpAddr, SocketAddr};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Whether listeners at the loopback and at all addresses are those of the worker, too.
pub(super) fn is_own(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified()
}

/// Whether a listener at `ip` is one of the worker at `own`, if the port is the same.
pub(super) fn is_at(ip: IpAddr, own: IpAddr) -> bool {
    ip == own || (is_own(ip) && is_own(own))
}

/// Ports that are tried: those below the range from which the kernel takes the ports of outgoing
/// connections (32,768 on), so that none of these takes a worker's port before it listens.
const RANGE: std::ops::Range<u16> = 20_000..32_768;

/// Goes through the ports in turn, so that a port is not used again soon.
#[derive(Debug)]
pub(super) struct Ports {
    next: u16,
}

impl Ports {
    /// Begins at a place in the range that differs between dispatchers.
    pub(super) fn new(seed: u32) -> Ports {
        let length = u32::from(RANGE.end - RANGE.start);
        Ports { next: RANGE.start + (seed % length) as u16 }
    }

    /// A port at `ip` that no socket uses, and that `taken` does not know.
    ///
    /// # Errors
    /// All ports are in use, or no socket can be made.
    pub(super) fn free(
        &mut self,
        ip: IpAddr,
        taken: impl Fn(u16) -> bool,
    ) -> std::io::Result<SocketAddr> {
        for _ in RANGE {
            let port = self.next;
            self.next = if port + 1 == RANGE.end { RANGE.start } else { port + 1 };
            let address = SocketAddr::new(ip, port);
            if !taken(port) && is_free(address)? {
                return Ok(address);
            }
        }
        let message = format!("no free port from {} to {}", RANGE.start, RANGE.end - 1);
        Err(std::io::Error::other(message))
    }
}

/// Whether a server can listen at the address, and at its port on all addresses.
fn is_free(address: SocketAddr) -> std::io::Result<bool> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    Ok(rustix::net::bind(&socket, &address).is_ok())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    #[test]
    fn ports_are_free_and_different() {
        let ip = IpAddr::from(Ipv4Addr::LOCALHOST);
        let mut ports = Ports::new(u32::MAX);
        let one = ports.free(ip, |_| false).expect("a port");
        let listener = TcpListener::bind(one).expect("it is free");
        assert!(!is_free(one).expect("a socket"));
        let other = ports.free(ip, |_| false).expect("a port");
        assert_ne!(one, other);
        // Another round comes to the first port, which is in use.
        ports.next = one.port();
        assert_ne!(ports.free(ip, |_| false).expect("a port"), one);
        drop(listener);
        assert!(ports.free(ip, |_| true).is_err(), "all are taken");
    }

    #[test]
    fn the_range_wraps() {
        let mut ports = Ports { next: RANGE.end - 1 };
        let ip = IpAddr::from(Ipv4Addr::LOCALHOST);
        let all: Vec<_> = (0..2).filter_map(|_| ports.free(ip, |_| false).ok()).collect();
        assert_eq!(all.len(), 2);
        assert!(all[1].port() < all[0].port() || all[0].port() < RANGE.end - 1);
    }
}
