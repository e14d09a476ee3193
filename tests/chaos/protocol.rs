//! The protocol between clients and workers of the chaos test, and how a connection is identified.
//!
//! A connection's id is in the client's address, 127.x.y.z or [`NETWORK`], so a worker can record
//! what it took before it has read a byte.

#![allow(dead_code)] // the test does not answer, the worker does not ask

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use worker_sdk::PeerAddr;

/// 127.0.0.0/16 is reserved: the listener uses it.
const FIRST: u32 = u32::from_be_bytes([127, 1, 0, 0]);

/// Clients of IPv6 have addresses of this network; the id is in the last 32 bits.
pub const NETWORK: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xc, 0, 0, 0, 0, 0, 0);

/// The number of ids.
pub const MOST: u32 = 0x00fe_0000;

pub fn address_of(id: u32) -> Ipv4Addr {
    assert!(id < MOST, "out of connection ids; run it for less long");
    Ipv4Addr::from(FIRST + id)
}

/// The address of a client that connects to one of the same family.
pub fn source_of(id: u32, is_v6: bool) -> IpAddr {
    match is_v6 {
        false => address_of(id).into(),
        true => Ipv6Addr::from(u128::from(NETWORK) | u128::from(id)).into(),
    }
}

/// The id of a client at either family.
pub fn id_from(address: IpAddr) -> Option<u32> {
    match address.to_canonical() {
        IpAddr::V4(address) => id_at(address),
        IpAddr::V6(address) => {
            u32::try_from(u128::from(address).checked_sub(u128::from(NETWORK))?).ok()
        }
    }
}

pub fn id_at(address: Ipv4Addr) -> Option<u32> {
    u32::from(address).checked_sub(FIRST).filter(|&id| id < MOST)
}

pub fn id_of(peer: PeerAddr) -> Option<u32> {
    match peer {
        PeerAddr::Inet(address) => match address.ip() {
            IpAddr::V4(address) => id_at(address),
            IpAddr::V6(_) => None,
        },
        _ => None,
    }
}

/// Numbers of processes that the dispatcher has started: this, plus their pid.
pub const SPAWNED: u32 = 1_000_000_000;

/// The number in a worker's name: `b12` is 12, and `x4711` the process 4711 of the dispatcher's
/// own.
pub fn number_of(name: &str) -> Option<u32> {
    let number: u32 = name.get(1..)?.parse().ok()?;
    if name.starts_with('x') { number.checked_add(SPAWNED) } else { Some(number) }
}

/// The start of a question, whatever the client has sent before: a request head, a ClientHello.
const MARK: &str = "@@";

pub fn question(id: u32, text: &str) -> String {
    format!("{MARK}{id} {text}\n")
}

/// The question in a line, if there is one.
pub fn asked(line: &[u8]) -> Option<String> {
    let line = String::from_utf8_lossy(line);
    let (_, question) = line.rsplit_once(MARK)?;
    Some(question.trim_end().to_owned())
}

/// FNV-1a.
pub fn checksum(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |sum, byte| (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// A worker's answer to the line `ID TEXT` on the connection `id`.
pub fn answer(name: &str, id: Option<u32>, line: &str) -> String {
    let (said, text) = line.split_once(' ').unwrap_or((line, ""));
    let id = id.map_or_else(|| "none".to_owned(), |id| id.to_string());
    let agreed = if said == id { "" } else { " from-another-connection" };
    format!("{name} {id} {:08x}{agreed}\n", checksum(text))
}

/// The question of a client that says nothing more for a long time.
pub const STAY: &str = "stay";

/// Answers questions until the client ends; `stays` is called for [`STAY`].
pub fn serve<'a, S>(
    stream: &'a S,
    name: &str,
    id: Option<u32>,
    stays: impl Fn(),
) -> std::io::Result<()>
where
    &'a S: Read + Write,
{
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        if let Some(question) = asked(&line) {
            if question.ends_with(STAY) {
                stays();
            }
            let text = answer(name, id, &question);
            reader.get_mut().write_all(text.as_bytes())?;
        }
        line.clear();
    }
    Ok(())
}

/// Microseconds of a clock that all processes share.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default() / 1000
}
