//! Segments of strangers.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::process::Command;

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, sendto, socket_with};

pub const SYN: u8 = 2;
pub const ACK: u8 = 16;

/// A bridge without members and without ARP: what is sent to its network vanishes.
pub fn black_hole() {
    for line in
        ["link add hole type bridge", "link set hole arp off up", "addr add 10.9.0.1/16 dev hole"]
    {
        let done = Command::new("ip").args(line.split(' ')).status().unwrap();
        assert!(done.success(), "ip {line}: {done}");
    }
    // Otherwise the kernel has no route for its answers, and drops each SYN.
    std::fs::write("/proc/sys/net/ipv4/conf/hole/route_localnet", "1").unwrap();
}

/// Sends TCP segments with forged sources to a port of 127.0.0.1.
pub struct Forger {
    socket: OwnedFd,
    to: u16,
}

impl Forger {
    /// To port 8000, the public one of many tests.
    #[allow(clippy::new_without_default, reason = "it opens a socket")]
    pub fn new() -> Forger {
        Forger::to(8000)
    }

    pub fn to(to: u16) -> Forger {
        let raw = SocketType::RAW;
        let all = rustix::net::ipproto::RAW;
        // Protocol RAW: the IP header is part of what is sent.
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, raw, flags, Some(all)).unwrap();
        Forger { socket, to }
    }

    /// From a port of the client with this number.
    pub fn send(&self, from: u32, port: u16, flags: u8) {
        let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 9, 1, 0)) + from);
        let to = Ipv4Addr::LOCALHOST;
        let mut tcp = Vec::new();
        tcp.extend(port.to_be_bytes());
        tcp.extend(self.to.to_be_bytes());
        tcp.extend(1_000_000u32.to_be_bytes());
        tcp.extend(if flags & ACK != 0 { 77u32 } else { 0 }.to_be_bytes());
        tcp.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        let mut sum: u32 = [source, to]
            .iter()
            .flat_map(|ip| ip.octets())
            .collect::<Vec<u8>>()
            .chunks(2)
            .chain(tcp.chunks(2))
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        sum += 6 + tcp.len() as u32;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        tcp[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        // Version, length, …, lifetime, TCP; the kernel fills in the checksum.
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
        packet.extend(source.octets());
        packet.extend(to.octets());
        packet.extend(tcp);
        let to = SocketAddr::new(to.into(), 0);
        assert_eq!(sendto(&self.socket, &packet, SendFlags::empty(), &to), Ok(40));
    }
}
