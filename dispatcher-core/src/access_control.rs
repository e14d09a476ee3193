//! Access control of a listener: by client address, by rate, and by the number of a client's
//! waiting connections.
//!
//! Owns a listener's rules and a bounded table of client prefixes with their numbers of
//! connections; the time comes in as an argument. The rate is a token bucket for each prefix,
//! stored as one time instead of a count of tokens: the "generic cell rate algorithm" in its
//! virtual scheduling form (ITU-T I.371, annex A).
//!
//! The table is a hash table with chains, and a list from the least to the most recently seen
//! prefix. All its memory is reserved at the start and it never rehashes. Clients cannot make an
//! operation slow: the place of a prefix depends on a seed that they do not know.

use core::net::{IpAddr, Ipv6Addr};
use std::hash::{DefaultHasher, Hasher};
use std::time::Duration;

use dispatch_protocol::ClientAddr;
use ipnet::IpNet;

use super::Core;
use super::discarded::Contents;
use super::types::{CloseReason, ListenerId, Time};

/// No entry.
const NONE: u32 = u32::MAX;

/// A listener's rules about clients. `config` makes them. Clients of Unix sockets have no address
/// and are always admitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessRules {
    /// Prefixes that may connect; empty: all.
    pub allow: Vec<IpNet>,
    /// Prefixes that may not connect; takes precedence over `allow`.
    pub deny: Vec<IpNet>,
    /// Rate limit for new connections of one prefix.
    pub rate: Option<Rate>,
    /// Most untaken connections of one prefix.
    pub max_queued_per_client: Option<u32>,
    /// Leading bits of an IPv4 address that identify a client.
    pub prefix_ipv4: u8,
    /// Leading bits of an IPv6 address that identify a client.
    pub prefix_ipv6: u8,
    /// Most prefixes remembered at once.
    pub max_clients: u32,
}

impl Default for AccessRules {
    fn default() -> AccessRules {
        AccessRules {
            allow: Vec::new(),
            deny: Vec::new(),
            rate: None,
            max_queued_per_client: None,
            prefix_ipv4: 32,
            prefix_ipv6: 64,
            max_clients: 65_536,
        }
    }
}

impl AccessRules {
    /// Whether the rules admit every client.
    pub fn is_open(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty() && !self.counts()
    }

    /// Whether the rules need a table of clients.
    fn counts(&self) -> bool {
        self.rate.is_some() || self.max_queued_per_client.is_some()
    }
}

/// A rate limit: a token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Time between two connections at the full rate.
    pub every: Duration,
    /// Most connections at once: the size of the bucket.
    pub burst: u32,
}

/// Addresses as sorted ranges that neither touch nor overlap.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    ipv4: Vec<(u32, u32)>,
    ipv6: Vec<(u128, u128)>,
}

impl Addresses {
    pub(super) fn new(nets: &[IpNet]) -> Addresses {
        let mut addresses = Addresses::default();
        for net in IpNet::aggregate(&nets.to_vec()) {
            match net {
                IpNet::V4(net) => {
                    addresses.ipv4.push((net.network().to_bits(), net.broadcast().to_bits()));
                }
                IpNet::V6(net) => {
                    addresses.ipv6.push((net.network().to_bits(), net.broadcast().to_bits()));
                }
            }
        }
        addresses.ipv4.sort_unstable();
        addresses.ipv6.sort_unstable();
        addresses
    }

    pub(super) fn contain(&self, ip: IpAddr) -> bool {
        fn find<T: Ord + Copy>(ranges: &[(T, T)], bits: T) -> bool {
            let after = ranges.partition_point(|&(first, _)| first <= bits);
            after > 0 && bits <= ranges[after - 1].1
        }
        match ip {
            IpAddr::V4(ip) => find(&self.ipv4, ip.to_bits()),
            IpAddr::V6(ip) => find(&self.ipv6, ip.to_bits()),
        }
    }
}

/// The entry of a client prefix.
#[derive(Clone, Copy, Debug)]
struct Client {
    prefix: u128,
    /// When its bucket is full again: "theoretical arrival time" in I.371.
    full_at: Time,
    /// Its untaken connections. The entry is not removed while there are any.
    queued: u32,
    /// Next in the chain of its hash.
    chain: u32,
    /// Its neighbours in the list by last use.
    older: u32,
    newer: u32,
}

/// A listener's rules with the table of its clients. It may be large: it is made and dropped
/// outside the hot thread ([`super::Discarded`]).
#[derive(Debug)]
pub struct AccessControl {
    rules: AccessRules,
    allow: Addresses,
    deny: Addresses,
    seed: u64,
    heads: Vec<u32>,
    clients: Vec<Client>,
    free: Vec<u32>,
    oldest: u32,
    newest: u32,
}

/// The entry of a client that has none.
pub(super) const UNTRACKED: u32 = NONE;

impl AccessControl {
    /// For these rules; `None` if they admit every client. `seed` is secret: clients must not be
    /// able to predict their place in the table.
    pub fn new(rules: AccessRules, seed: u64) -> Option<Box<AccessControl>> {
        if rules.is_open() {
            return None;
        }
        let most = if rules.counts() { rules.max_clients.max(1) as usize } else { 0 };
        Some(Box::new(AccessControl {
            allow: Addresses::new(&rules.allow),
            deny: Addresses::new(&rules.deny),
            seed,
            heads: vec![NONE; most.next_power_of_two()],
            clients: Vec::with_capacity(most),
            free: Vec::with_capacity(most),
            oldest: NONE,
            newest: NONE,
            rules,
        }))
    }

    /// Admits a client or returns why not. The connection of an admitted client counts as queued in
    /// the returned entry until [`AccessControl::uncount`].
    pub(super) fn admit(&mut self, now: Time, peer: ClientAddr) -> Result<u32, CloseReason> {
        let Some(ip) = peer.ip().map(|ip| ip.to_canonical()) else {
            return Ok(UNTRACKED);
        };
        let allowed = self.rules.allow.is_empty() || self.allow.contain(ip);
        if !allowed || self.deny.contain(ip) {
            return Err(CloseReason::Denied);
        }
        if !self.rules.counts() {
            return Ok(UNTRACKED);
        }
        let prefix = self.prefix(ip);
        let Some(at) = self.find(prefix).or_else(|| self.remember(prefix)) else {
            // No entry can be removed, because each has queued connections: the client is admitted
            // without being counted.
            return Ok(UNTRACKED);
        };
        self.touch(at);
        let client = &mut self.clients[at as usize];
        if self.rules.max_queued_per_client.is_some_and(|most| client.queued >= most) {
            return Err(CloseReason::TooManyQueued);
        }
        if let Some(rate) = self.rules.rate {
            let full_at = client.full_at.max(now);
            if full_at - now > rate.every * (rate.burst - 1) {
                return Err(CloseReason::RateLimited);
            }
            client.full_at = full_at + rate.every;
        }
        client.queued += 1;
        Ok(at)
    }

    /// Admits a trusted proxy or returns why not. Only `deny` applies to it: `proxy_protocol_from`
    /// allows it, and what counts connections would count those of all its clients as one client's.
    pub(super) fn admit_proxy(&self, peer: ClientAddr) -> Result<(), CloseReason> {
        let ip = peer.ip().map(|ip| ip.to_canonical());
        match ip.is_some_and(|ip| self.deny.contain(ip)) {
            true => Err(CloseReason::Denied),
            false => Ok(()),
        }
    }

    /// A connection of this client was taken or closed.
    pub(super) fn uncount(&mut self, at: u32) {
        if let Some(client) = self.clients.get_mut(at as usize) {
            debug_assert!(client.queued > 0);
            client.queued -= 1;
        }
    }

    /// Prefixes remembered.
    pub(super) fn len(&self) -> usize {
        self.clients.len() - self.free.len()
    }

    /// The bits that identify a client. An IPv4 address is mapped to IPv6 (`::ffff:a.b.c.d`); no
    /// prefix of a real IPv6 address looks like that.
    fn prefix(&self, ip: IpAddr) -> u128 {
        let (bits, length) = match ip {
            IpAddr::V4(ip) => (ip.to_ipv6_mapped().to_bits(), 96 + self.rules.prefix_ipv4.min(32)),
            IpAddr::V6(ip) => (Ipv6Addr::to_bits(ip), self.rules.prefix_ipv6.min(128)),
        };
        bits & u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
    }

    fn bucket(&self, prefix: u128) -> usize {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.seed);
        hasher.write_u128(prefix);
        hasher.finish() as usize & (self.heads.len() - 1)
    }

    fn find(&self, prefix: u128) -> Option<u32> {
        let mut at = self.heads[self.bucket(prefix)];
        while let Some(client) = self.clients.get(at as usize) {
            if client.prefix == prefix {
                return Some(at);
            }
            at = client.chain;
        }
        None
    }

    /// Makes an entry. If the table is full, it replaces the least recently seen client without
    /// queued connections.
    fn remember(&mut self, prefix: u128) -> Option<u32> {
        let bucket = self.bucket(prefix);
        if self.free.is_empty() && self.clients.len() == self.rules.max_clients.max(1) as usize {
            self.forget_one();
        }
        let client = Client {
            prefix,
            full_at: Time(0),
            queued: 0,
            chain: self.heads[bucket],
            older: NONE,
            newer: NONE,
        };
        let at = match self.free.pop() {
            Some(at) => {
                self.clients[at as usize] = client;
                at
            }
            None if self.clients.len() < self.rules.max_clients.max(1) as usize => {
                self.clients.push(client);
                (self.clients.len() - 1) as u32
            }
            None => return None,
        };
        self.heads[bucket] = at;
        self.append(at);
        Some(at)
    }

    /// The size of an entry.
    #[cfg(test)]
    pub(super) const CLIENT: usize = size_of::<Client>();

    /// How many entries `forget_one` examines for one without queued connections.
    const SCAN_LIMIT: usize = 8;

    fn forget_one(&mut self) {
        for _ in 0..Self::SCAN_LIMIT {
            let at = self.oldest;
            let Some(client) = self.clients.get(at as usize) else { return };
            if client.queued > 0 {
                // It cannot be removed; as the newest entry it is not examined again soon.
                self.touch(at);
                continue;
            }
            self.unlink(at);
            self.unchain(at);
            self.free.push(at);
            return;
        }
    }

    fn unchain(&mut self, at: u32) {
        let Client { prefix, chain, .. } = self.clients[at as usize];
        let bucket = self.bucket(prefix);
        let mut before = self.heads[bucket];
        if before == at {
            self.heads[bucket] = chain;
            return;
        }
        while let Some(client) = self.clients.get_mut(before as usize) {
            if client.chain == at {
                client.chain = chain;
                return;
            }
            before = client.chain;
        }
    }

    /// Makes an entry the most recently seen one.
    fn touch(&mut self, at: u32) {
        if self.newest != at {
            self.unlink(at);
            self.append(at);
        }
    }

    fn unlink(&mut self, at: u32) {
        let Client { older, newer, .. } = self.clients[at as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.clients[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.clients[newer as usize].older = older,
        }
    }

    fn append(&mut self, at: u32) {
        let last = std::mem::replace(&mut self.newest, at);
        match last {
            NONE => self.oldest = at,
            last => self.clients[last as usize].newer = at,
        }
        let client = &mut self.clients[at as usize];
        (client.older, client.newer) = (last, NONE);
    }

    /// Recounts everything; panics on a difference.
    pub(super) fn check(&self) {
        assert!(self.clients.len() <= self.rules.max_clients.max(1) as usize);
        let (mut count, mut last, mut at) = (0, NONE, self.oldest);
        while let Some(client) = self.clients.get(at as usize) {
            assert_eq!(client.older, last);
            assert_eq!(self.find(client.prefix), Some(at));
            (last, at) = (at, client.newer);
            count += 1;
        }
        assert_eq!((last, count), (self.newest, self.len()));
    }

    /// Queued connections of all clients in the table.
    pub(super) fn queued(&self) -> u64 {
        let mut sum = 0;
        let mut at = self.oldest;
        while let Some(client) = self.clients.get(at as usize) {
            sum += u64::from(client.queued);
            at = client.newer;
        }
        sum
    }
}

impl Core {
    /// Sets the access control of a listener, also while it runs. The new table starts empty:
    /// waiting connections are not counted in it.
    pub fn set_access_control(
        &mut self,
        listener: ListenerId,
        access_control: Option<Box<AccessControl>>,
    ) {
        let Some(entry) = self.listeners.get_mut(usize::from(listener.0)) else { return };
        if let Some(old) = std::mem::replace(&mut entry.access_control, access_control) {
            self.ledger.untrack(listener);
            self.discard(Contents::AccessControl(old));
        }
    }

    /// Stops counting a connection for its client: it was taken or closed.
    pub(super) fn uncount(&mut self, conn: u32) {
        let entry = self.ledger.get_mut(conn);
        let place = std::mem::replace(&mut entry.client, UNTRACKED);
        if place != UNTRACKED
            && let Some(access_control) =
                &mut self.listeners[usize::from(entry.listener.0)].access_control
        {
            access_control.uncount(place);
        }
    }
}

#[cfg(test)]
mod tests;
