//! ClientId asks over HTTP, how often, and over how many connections. Too many requests of one user wait, so that others are
//! served meanwhile; nobody is told off for it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Requests of one user at once, before they are served at the rate.
const BURST: u32 = 100;

/// Most connections of one user, of each kind of socket together: others find room in what is left.
pub(super) const MOST_CONNECTIONS: usize = super::http::MAX_CONNECTIONS * 3 / 4;

/// Connections accepted in a second, of each listener.
const ACCEPT_INTERVAL: Duration = Duration::from_micros(2_000);

/// As far as it can be known: the user behind a Unix socket, the address behind TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ClientId {
    User(u32),
    Address(IpAddr),
    Unknown,
}

#[derive(Clone, Copy, Debug)]
struct Usage {
    /// When its bucket would be full again.
    full: Instant,
    connections: usize,
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub(super) struct ClientLimits {
    all: Arc<Mutex<HashMap<ClientId, Usage>>>,
    /// `admin_rate`.
    rate: Arc<AtomicU32>,
}

impl ClientLimits {
    /// Where the rate is set.
    pub(super) fn rate(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.rate)
    }

    /// A new connection; `None` if there are too many of this user.
    pub(super) fn connect(&self, id: ClientId) -> Option<Connection> {
        let now = Instant::now();
        let mut all = self.lock();
        // As many as there are connections, and those of the last second.
        all.retain(|_, usage| usage.connections > 0 || usage.full > now);
        let usage = all.entry(who).or_insert(Usage { full: now, connections: 0 });
        if usage.connections >= MOST_CONNECTIONS {
            return None;
        }
        usage.connections += 1;
        Some(Connection { limits: self.clone(), id, counted: true })
    }

    /// One that is there only to be told that there are too many.
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
    /// Among those of its user.
    counted: bool,
}

impl Connection {
    /// Waits until this user's next request may be served. At most as long as all its connections' requests take.
    pub(super) async fn pace(&self) {
        if let Some(from) = self.next(Instant::now()) {
            tokio::time::sleep_until(from).await;
        }
    }

    /// When the next request may be served, if it has to wait.
    fn next(&self, now: Instant) -> Option<Instant> {
        let rate = self.limits.rate.load(Ordering::Relaxed).max(1);
        let every = Duration::from_secs(1) / rate;
        let mut all = self.limits.lock();
        let usage = all.get_mut(&self.who)?;
        usage.full = usage.full.max(now) + every;
        usage.full.checked_sub(every * BURST).filter(|from| *from > now)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(usage) = self.limits.lock().get_mut(&self.who).filter(|_| self.counted) {
            usage.connections -= 1;
        }
    }
}

/// Paces the connects of one listener.
#[derive(Debug)]
pub(super) struct AcceptPace {
    next: Instant,
}

impl AcceptPace {
    pub(super) fn new() -> AcceptPace {
        AcceptPace { next: Instant::now() }
    }

    /// Waits until the next may be accepted; some in a row come without waiting.
    pub(super) async fn pace(&mut self) {
        let now = Instant::now();
        self.next = self.next.max(now) + ACCEPT_INTERVAL;
        if let Some(from) = self.next.checked_sub(ACCEPT_INTERVAL * 64).filter(|from| *from > now) {
            tokio::time::sleep_until(from).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_requests_of_one_user_wait_and_those_of_another_do_not() {
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
