//! Limits for clients of the admin interface: connections and requests per user or address.
//! Requests over the rate are delayed, not refused, so that clients of other users are served
//! meanwhile.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Requests of one client in a row that are not delayed.
const BURST: u32 = 100;

/// Most connections of one client, over all sockets of one kind. The rest is left for other
/// clients.
pub(super) const MOST_CONNECTIONS: usize = super::http::MAX_CONNECTIONS * 3 / 4;

/// The identity of a client: the user behind a Unix socket, or the address behind TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ClientId {
    User(u32),
    Address(IpAddr),
    Unknown,
}

#[derive(Clone, Copy, Debug)]
struct Usage {
    /// The time at which the token bucket is full again.
    full: Instant,
    connections: usize,
}

/// The limits of all clients.
#[derive(Clone, Debug)]
pub(super) struct ClientLimits {
    all: Arc<Mutex<HashMap<ClientId, Usage>>>,
    /// Requests of one client in a second.
    rate: Arc<AtomicU32>,
    /// Most connections of one client.
    most: usize,
}

impl Default for ClientLimits {
    /// The limits of the admin interface; the rate is set later.
    fn default() -> ClientLimits {
        ClientLimits::new(MOST_CONNECTIONS)
    }
}

impl ClientLimits {
    /// For at most `most` connections of one client.
    pub(super) fn new(most: usize) -> ClientLimits {
        ClientLimits { all: Arc::default(), rate: Arc::default(), most }
    }

    /// The rate, for changes by a reload.
    pub(super) fn rate(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.rate)
    }

    /// Counts a new connection; `None` if the client has too many.
    pub(super) fn connect(&self, id: ClientId) -> Option<Connection> {
        let now = Instant::now();
        let mut all = self.lock();
        // At most one entry per connection, plus the clients of the last second.
        all.retain(|_, usage| usage.connections > 0 || usage.full > now);
        let usage = all.entry(id).or_insert(Usage { full: now, connections: 0 });
        if usage.connections >= self.most {
            return None;
        }
        usage.connections += 1;
        Some(Connection { limits: self.clone(), id, counted: true })
    }

    /// A connection that exists only to send the refusal.
    pub(super) fn refused(&self, id: ClientId) -> Connection {
        Connection { limits: self.clone(), id, counted: false }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ClientId, Usage>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    limits: ClientLimits,
    id: ClientId,
    /// Whether it counts towards the limit.
    counted: bool,
}

impl Connection {
    /// Waits until the client's next request may be served.
    pub(super) async fn pace(&self) {
        if let Some(from) = self.next(Instant::now()) {
            tokio::time::sleep_until(from).await;
        }
    }

    /// The time at which the next request may be served, if it has to wait.
    fn next(&self, now: Instant) -> Option<Instant> {
        let rate = self.limits.rate.load(Ordering::Relaxed).max(1);
        let every = Duration::from_secs(1) / rate;
        let mut all = self.limits.lock();
        let usage = all.get_mut(&self.id)?;
        usage.full = usage.full.max(now) + every;
        usage.full.checked_sub(every * BURST).filter(|from| *from > now)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(usage) = self.limits.lock().get_mut(&self.id).filter(|_| self.counted) {
            usage.connections -= 1;
        }
    }
}

/// Limits the rate of accepted connections of one listener.
#[derive(Debug)]
pub(super) struct AcceptPace {
    /// Shortest average interval between two connections.
    interval: Duration,
    next: Instant,
}

impl AcceptPace {
    pub(super) fn new(interval: Duration) -> AcceptPace {
        AcceptPace { interval, next: Instant::now() }
    }

    /// Waits until the next connection may be accepted; a short burst is accepted without delay.
    pub(super) async fn pace(&mut self) {
        let now = Instant::now();
        self.next = self.next.max(now) + self.interval;
        if let Some(from) = self.next.checked_sub(self.interval * 64).filter(|from| *from > now) {
            tokio::time::sleep_until(from).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excess_requests_delay_only_their_user() {
        let limits = ClientLimits::default();
        limits.rate().store(10, Ordering::Relaxed);
        let [one, other] = [1, 2].map(|uid| limits.connect(ClientId::User(uid)).expect("room"));
        let now = Instant::now();
        assert!((0..BURST).all(|_| one.next(now).is_none()));
        for n in 1..=20 {
            assert_eq!(one.next(now), Some(now + Duration::from_millis(100) * n));
        }
        assert_eq!(other.next(now), None);
        let later = now + Duration::from_secs(3600);
        assert_eq!(one.next(later), None);
    }

    #[test]
    fn one_user_leaves_connections_to_others() {
        let limits = ClientLimits::default();
        let mut mine: Vec<_> = (0..100).map_while(|_| limits.connect(ClientId::User(1))).collect();
        assert_eq!(mine.len(), MOST_CONNECTIONS);
        assert!(limits.connect(ClientId::User(2)).is_some());
        mine.pop();
        assert!(limits.connect(ClientId::User(1)).is_some());
    }
}
