//! Ends what blocks on a socket when its time is over, for programs that block.
//!
//! Handlers of the application run on the thread of the connect, and each of their reads may be
//! answered in time while all together take for ever. So a thread shuts the socket down at the end
//! of the attempt: then every read and write on it returns, also on copies of its descriptor. One
//! thread serves the process; it ends when nothing has been watched for a while.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, process, thread};

/// How long the thread waits for something to watch.
const REST: Duration = Duration::from_secs(10);

static WATCHDOG: LazyLock<Arc<Watchdog>> = LazyLock::new(|| Watchdog::new(REST));

#[derive(Default)]
struct State {
    /// By the end of the time, and a number that makes each key unique.
    watched: BTreeMap<(Instant, u64), OwnedFd>,
    last: u64,
    /// The process that the thread belongs to, while there is one. A child has none at first.
    running_in: Option<u32>,
}

pub(super) struct Watchdog {
    state: Mutex<State>,
    changed: Condvar,
    rest: Duration,
}

impl Watchdog {
    fn new(rest: Duration) -> Arc<Watchdog> {
        Arc::new(Watchdog { state: Mutex::default(), changed: Condvar::new(), rest })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(self: &Arc<Watchdog>, stream: &TcpStream, end: Instant) -> io::Result<Watched> {
        let copy = OwnedFd::from(stream.try_clone()?);
        let mut state = self.lock();
        let own = process::id();
        if state.running_in != Some(own) {
            // What a parent watched is the parent's matter.
            state.watched.clear();
            let watchdog = Arc::clone(self);
            let run = move || watchdog.run();
            thread::Builder::new().name("connect-watchdog".to_owned()).spawn(run)?;
            state.running_in = Some(own);
        }
        state.last = state.last.wrapping_add(1);
        let key = (end, state.last);
        let is_first = state.watched.first_key_value().is_none_or(|(first, _)| key < *first);
        state.watched.insert(key, copy);
        drop(state);
        if is_first {
            self.changed.notify_one();
        }
        Ok(Watched { watchdog: Arc::clone(self), key })
    }

    fn run(&self) {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            while let Some(first) = state.watched.first_entry().filter(|first| first.key().0 <= now)
            {
                // Fails if the connection has ended already.
                let _ = rustix::net::shutdown(first.remove(), rustix::net::Shutdown::Both);
            }
            let next = state.watched.first_key_value().map(|((end, _), _)| *end);
            let wait = next.map_or(self.rest, |end| end.saturating_duration_since(now));
            let waited = self.changed.wait_timeout(state, wait);
            let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = guard;
            if next.is_none() && timeout.timed_out() && state.watched.is_empty() {
                state.running_in = None;
                return;
            }
        }
    }
}

/// A socket that is watched until this is dropped.
pub(super) struct Watched {
    watchdog: Arc<Watchdog>,
    key: (Instant, u64),
}

impl Watched {
    /// Ends the watch; false if the time is over, so that the socket has been shut down or may be.
    pub(super) fn ended_in_time(self) -> bool {
        self.watchdog.lock().watched.remove(&self.key).is_some()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watchdog.lock().watched.remove(&self.key);
    }
}

/// Shuts the socket down at this time, unless the result is dropped before. It fails if the process
/// has no more descriptors or threads.
pub(super) fn watch(stream: &TcpStream, end: Instant) -> io::Result<Watched> {
    WATCHDOG.watch(stream, end)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn sockets_are_shut_down_at_the_end_of_their_times_in_any_order() {
        let watchdog = Watchdog::new(REST);
        let now = Instant::now();
        let mut watched = Vec::new();
        for milliseconds in [300, 100, 200, 0] {
            let (client, server) = pair();
            let end = now + Duration::from_millis(milliseconds);
            let watch = watchdog.watch(&client, end).unwrap();
            watched.push((client, server, end, watch));
        }
        for (mut client, _server, end, watch) in watched {
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            assert!(Instant::now() >= end);
            assert!(!watch.ended_in_time());
        }
    }

    #[test]
    fn what_ends_in_time_is_left_alone_and_nothing_stays() {
        let watchdog = Watchdog::new(Duration::from_millis(10));
        for _ in 0..3 {
            let (mut client, server) = pair();
            let end = Instant::now() + Duration::from_secs(60);
            let watch = watchdog.watch(&client, end).unwrap();
            drop(watchdog.watch(&client, end).unwrap());
            assert!(watch.ended_in_time());
            drop(server);
            assert_eq!(client.read(&mut [0]).unwrap(), 0, "by the server");
            assert!(watchdog.lock().watched.is_empty());
            let limit = Instant::now() + Duration::from_secs(60);
            // The thread ends, and another one begins with the next watch.
            while watchdog.lock().running_in.is_some() {
                assert!(Instant::now() < limit);
                thread::yield_now();
            }
        }
    }
}
