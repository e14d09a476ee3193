//! Who asks over HTTP, how often, and over how many connections. Too many requests of one user wait, so that others are
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
const CONNECTS: Duration = Duration::from_micros(2_000);

/// As far as it can be known: the user behind a Unix socket, the address behind TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Who {
    User(u32),
    Address(IpAddr),
    Unknown,
}

#[derive(Clone, Copy, Debug)]
struct Guest {
    /// When its bucket would be full again.
    full: Instant,
    connections: usize,
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Guests {
    all: Arc<Mutex<HashMap<Who, Guest>>>,
    /// `admin_rate`.
    rate: Arc<AtomicU32>,
}

impl Guests {
    /// Where the rate is set.
    pub(super) fn rate(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.rate)
    }

    /// A new connection; `None` if there are too many of this user.
    pub(super) fn connect(&self, who: Who) -> Option<Connection> {
        let now = Instant::now();
        let mut all = self.lock();
        // As many as there are connections, and those of the last second.
        all.retain(|_, guest| guest.connections > 0 || guest.full > now);
        let guest = all.entry(who).or_insert(Guest { full: now, connections: 0 });
        if guest.connections >= MOST_CONNECTIONS {
            return None;
        }
        guest.connections += 1;
        Some(Connection { guests: self.clone(), who, counted: true })
    }

    /// One that is there only to be told that there are too many.
    pub(super) fn refused(&self, who: Who) -> Connection {
        Connection { guests: self.clone(), who, counted: false }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Who, Guest>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    guests: Guests,
    who: Who,
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
        let rate = self.guests.rate.load(Ordering::Relaxed).max(1);
        let every = Duration::from_secs(1) / rate;
        let mut all = self.guests.lock();
        let guest = all.get_mut(&self.who)?;
        guest.full = guest.full.max(now) + every;
        guest.full.checked_sub(every * BURST).filter(|from| *from > now)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(guest) = self.guests.lock().get_mut(&self.who).filter(|_| self.counted) {
            guest.connections -= 1;
        }
    }
}

/// Paces the connects of one listener.
#[derive(Debug)]
pub(super) struct Connects {
    next: Instant,
}

impl Connects {
    pub(super) fn new() -> Connects {
        Connects { next: Instant::now() }
    }

    /// Waits until the next may be accepted; some in a row come without waiting.
    pub(super) async fn pace(&mut self) {
        let now = Instant::now();
        self.next = self.next.max(now) + CONNECTS;
        if let Some(from) = self.next.checked_sub(CONNECTS * 64).filter(|from| *from > now) {
            tokio::time::sleep_until(from).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_requests_of_one_user_wait_and_those_of_another_do_not() {
        let guests = Guests::default();
        guests.rate().store(10, Ordering::Relaxed);
        let [one, other] = [1, 2].map(|uid| guests.connect(Who::User(uid)).expect("room"));
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
        let guests = Guests::default();
        let mut mine: Vec<_> = (0..100).map_while(|_| guests.connect(Who::User(1))).collect();
        assert_eq!(mine.len(), MOST_CONNECTIONS);
        assert!(guests.connect(Who::User(2)).is_some());
        mine.pop();
        assert!(guests.connect(Who::User(1)).is_some());
    }
}
