//! The entries of the maps, as `bpf/steer.h` has them. A test compares sizes and offsets with the
//! compiled object.
//!
//! Each map has one writer: the loader writes [`Settings`], [`WorkerSettings`], and the two maps
//! with [`Address`] as key; the programs write everything else. `bpf/steer.h` has two exceptions.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Changes when a layout or the meaning of a field changes.
pub(crate) const VERSION: u32 = 4;
/// Most workers of a pool.
pub const MAX_WORKERS: u32 = 1024;
/// With more workers than this, two random ones are compared instead of all.
pub const SCAN_WORKERS: u32 = 256;
/// Random draws for two choices; if none of them has room, all workers are compared.
pub(crate) const DRAWS: u32 = 8;
/// [`WorkerSettings::slow_start`] of a worker at full speed.
pub const FULL_SPEED: u32 = 1000;
/// With round-robin: virtual time between two turns of a worker with the least weight, at the
/// slowest of its slow start.
pub(crate) const TURN: u64 = 1 << 40;
/// A turn that is further ahead than this is one that was missed.
pub(crate) const TURN_FAR: u64 = 1 << 50;
/// Seconds in which a pending connection counts: the current one and those before it.
pub const PENDING_SECONDS: u32 = 4;

/// The one entry of `settings`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    pub version: u32,
    /// Workers from 0 to this number, exclusive, are looked at.
    pub workers: u32,
    /// Cookie of the network namespace of the pool: listeners elsewhere do not register.
    pub netns: u64,
    /// How long SYNs are dropped while no worker is usable, in nanoseconds; then they are reset.
    pub wait_ns: u64,
    /// Random: the source of draws, with the number of the decision.
    pub seed: u64,
    /// The number of a [`crate::Policy`].
    pub policy: u32,
    pub reserved: u32,
}

/// What the loader decides about a worker.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerSettings {
    /// 1 to 65535; 0: there is no such worker.
    pub weight: u32,
    /// 1 to [`FULL_SPEED`]: the part of its weight that the worker has now.
    pub slow_start: u32,
    /// Most connections, pending ones included; 0: no limit.
    pub maximum: u32,
    /// Not 0: gets no new connections.
    pub draining: u8,
    /// Not 0: gets new connections only if no other worker has room.
    pub suspect: u8,
    /// With failover: workers of the highest priority get all connections.
    pub priority: u16,
    /// With hash: what the worker's draws depend on, see [`crate::policy::node`]; 0: its number.
    pub node: u64,
}

impl WorkerSettings {
    /// A worker of this weight at full speed, without a limit.
    pub fn new(weight: u16) -> WorkerSettings {
        WorkerSettings { weight: weight.into(), slow_start: FULL_SPEED, ..Default::default() }
    }

    /// The weight that connections are divided by.
    pub(crate) fn effective_weight(&self) -> u64 {
        u64::from(self.weight) * u64::from(self.slow_start)
    }
}

/// What the programs count for a worker.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerCounts {
    /// Connections whose handshake is complete and that neither side has ended completely.
    pub live: i64,
    /// Connections whose handshake was completed, ever.
    pub total: u64,
    /// Handshakes under way, by the second of their SYN modulo [`PENDING_SECONDS`]: the second in
    /// the upper half, their number in the lower one. Older seconds do not count.
    pub pending: [u64; PENDING_SECONDS as usize],
    /// Open listeners: IPv4, IPv6.
    pub listeners: [u32; 2],
    /// Number of registered listeners, ever.
    pub listens: u32,
    /// [`WorkerCounts::listens`] when the map had no socket although one was open.
    pub lost_at: u32,
    /// [`WorkerCounts::listens`] when the IPv6 listener refused an IPv4 connection.
    pub no_v4_at: u32,
    /// The error with which the last listener could not be registered, negative; 0 if it was.
    pub refused: i32,
    /// With round-robin: the virtual time of its last turn.
    pub last_turn: u64,
    /// With shared ports: connections that came from the queue of another worker, ever.
    pub moved_in: u64,
    /// Connections that went from its queue to another worker, ever.
    pub moved_out: u64,
}

impl WorkerCounts {
    /// Handshakes under way in this second of CLOCK_MONOTONIC.
    pub fn pending(&self, second: u32) -> u64 {
        let valid = |&&slot: &&u64| second.wrapping_sub((slot >> 32) as u32) < PENDING_SECONDS;
        self.pending.iter().filter(valid).map(|slot| slot & u64::from(u32::MAX)).sum()
    }

    /// Live and pending connections.
    pub fn load(&self, second: u32) -> u64 {
        u64::try_from(self.live).unwrap_or(0) + self.pending(second)
    }

    /// Counts one more handshake, as the program does.
    #[cfg(test)]
    pub(crate) fn add_pending(&mut self, second: u32) {
        let slot = &mut self.pending[(second % PENDING_SECONDS) as usize];
        let same = (*slot >> 32) as u32 == second;
        *slot = if same { *slot + 1 } else { u64::from(second) << 32 | 1 };
    }

    /// Why the worker cannot be given connections although it listens, with what to do; `None` if
    /// it can, or does not listen.
    pub fn problem(&self) -> Option<String> {
        if self.refused == -libc::EOPNOTSUPP {
            let text = "its listener is an MPTCP socket, which cannot be steered: make it a TCP \
                        socket (Go: GODEBUG=multipathtcp=0, or \
                        net.ListenConfig.SetMultipathTCP(false))";
            return Some(text.to_owned());
        }
        if self.refused != 0 {
            let error = std::io::Error::from_raw_os_error(-self.refused);
            return Some(format!("its listener could not be registered: {error}"));
        }
        if self.listens > 0 && self.lost_at == self.listens && self.listeners != [0, 0] {
            let text = "the listener that was registered last is closed and an earlier one is \
                        open: let it open one listener for each address";
            return Some(text.to_owned());
        }
        None
    }

    /// Whether the worker can serve clients with IPv4 addresses, as far as is known.
    pub fn serves_v4(&self) -> bool {
        self.listeners[0] > 0 || (self.listeners[1] > 0 && self.no_v4_at != self.listens)
    }
}

/// The one entry of `state`: what the programs count for the pool.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Decisions, ever.
    pub turn: u64,
    /// Since when there is no usable worker, CLOCK_MONOTONIC in nanoseconds; 0: there is one.
    pub unserved_since: u64,
    /// The worker of the last decision: ties go to the next one.
    pub last: u32,
    /// The second of the last decision.
    pub second: u32,
    /// SYNs given to a worker.
    pub chosen: u64,
    /// Segments that went to the worker of the same client's SYN (SYN cookies).
    pub repeated: u64,
    /// SYNs dropped because all workers were at their maximum.
    pub full: u64,
    /// SYNs dropped while no worker was usable.
    pub waited: u64,
    /// SYNs reset because no worker was usable.
    pub unserved: u64,
    /// SYNs reset instead of dropped, because the sink was missing.
    pub no_sink: u64,
    /// Workers whose listener could not be given a connection.
    pub failed: u64,
    /// With round-robin: the virtual time of the last turn.
    pub clock: u64,
}

/// In an entry of `bounds`: the part that changes with each load that falls, and the cost.
pub(crate) const BOUND_CHANGE: u64 = 1 << 32;
pub(crate) const BOUND_COST: u64 = 0xffff;

/// An address: IPv4 as IPv4-mapped IPv6.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Address {
    /// In network byte order.
    pub ip: [u8; 16],
    /// In host byte order.
    pub port: u32,
}

impl Address {
    pub(crate) fn new(ip: IpAddr, port: u16) -> Address {
        let ip = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        Address { ip: ip.octets(), port: port.into() }
    }

    pub(crate) fn socket_addr(&self) -> SocketAddr {
        let ip = Ipv6Addr::from(self.ip).to_canonical();
        SocketAddr::new(ip, u16::try_from(self.port).unwrap_or(0))
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Address {
        Address::new(address.ip(), address.port())
    }
}

#[cfg(test)]
mod tests;
