//! Looking up host names with a time limit.
//!
//! The system's resolver blocks for as long as its servers are silent. So look-ups run on threads
//! of their own, which may outlive the wait for them. Their number is bounded; further look-ups
//! wait in a queue, which is bounded, too. A look-up that could not begin in time says nothing
//! about the name: its failure is one of this machine.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use std::{process, thread};

use super::failure::Failure;

/// The most look-ups under way in the process.
const MOST: usize = 64;

/// The most look-ups that wait for one of them to end.
const MOST_WAITING: usize = 4_096;

/// Resolves a host and a port.
pub(super) type Resolver = dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// The resolver of the system.
pub(super) fn system(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

/// The result of a look-up.
pub(super) type Resolved = Result<Vec<SocketAddr>, Failure>;

/// The look-ups of the process.
static LOOK_UPS: LazyLock<Arc<LookUps>> = LazyLock::new(|| LookUps::new(MOST, MOST_WAITING));

struct LookUp {
    resolver: Arc<Resolver>,
    host: String,
    port: u16,
    /// Nothing waits for the result after this time.
    deadline: Instant,
    /// Whether the resolver has been asked.
    begun: Arc<AtomicBool>,
    done: Box<dyn FnOnce(Resolved) + Send>,
}

impl LookUp {
    fn run(self) {
        self.begun.store(true, Ordering::SeqCst);
        let resolved = (self.resolver)(&self.host, self.port);
        (self.done)(resolved.map_err(|error| {
            let problem = format!("cannot resolve {}: {error}", self.host);
            Failure { problem, ..Failure::of_io(&error) }
        }));
    }
}

#[derive(Default)]
struct State {
    /// The process that the threads belong to: a child has none of its parent's.
    process: u32,
    threads: usize,
    waiting: VecDeque<LookUp>,
}

/// Look-ups under way and waiting.
struct LookUps {
    state: Mutex<State>,
    most: usize,
    most_waiting: usize,
}

impl LookUps {
    fn new(most: usize, most_waiting: usize) -> Arc<LookUps> {
        Arc::new(LookUps { state: Mutex::default(), most, most_waiting })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the look-up, or lets it wait for the end of another one.
    fn begin(self: &Arc<LookUps>, look_up: LookUp) -> Result<(), Failure> {
        let mut state = self.lock();
        let own = process::id();
        if state.process != own {
            *state = State { process: own, ..State::default() };
        }
        if state.threads < self.most {
            state.threads += 1;
            drop(state);
            return self.start_thread(look_up);
        }
        if state.waiting.len() >= self.most_waiting {
            let now = Instant::now();
            state.waiting.retain(|waiting| waiting.deadline > now);
        }
        if state.waiting.len() >= self.most_waiting {
            let problem = format!("{} look-ups of host names wait already", self.most_waiting);
            let error = io::Error::new(io::ErrorKind::ResourceBusy, problem);
            return Err(Failure::local(&error));
        }
        state.waiting.push_back(look_up);
        Ok(())
    }

    fn start_thread(self: &Arc<LookUps>, first: LookUp) -> Result<(), Failure> {
        let look_ups = Arc::clone(self);
        let run = move || {
            let mut next = Some(first);
            while let Some(look_up) = next {
                // The panic hook has reported a panic of the application's resolver.
                let _ = catch_unwind(AssertUnwindSafe(|| look_up.run()));
                next = look_ups.next_or_end();
            }
        };
        thread::Builder::new().name("name-lookup".to_owned()).spawn(run).map(drop).map_err(
            |error| {
                self.lock().threads -= 1;
                let problem = format!("cannot start a thread for a look-up: {error}");
                Failure::local(&io::Error::new(error.kind(), problem))
            },
        )
    }

    /// The next look-up whose result something waits for. Without one the thread ends.
    fn next_or_end(&self) -> Option<LookUp> {
        let now = Instant::now();
        let mut state = self.lock();
        while let Some(next) = state.waiting.pop_front() {
            if next.deadline > now {
                return Some(next);
            }
        }
        state.threads -= 1;
        None
    }
}

/// A look-up that has been asked for.
pub(super) struct Asked {
    begun: Arc<AtomicBool>,
    host: String,
}

impl Asked {
    /// The failure of a look-up without an answer in time, or without an end in order.
    pub(super) fn timed_out(&self) -> Failure {
        let host = &self.host;
        if self.begun.load(Ordering::SeqCst) {
            let problem = format!("cannot resolve {host}: the resolver did not answer in time");
            return Failure::timed_out(&problem);
        }
        let problem = format!(
            "cannot resolve {host}: {MOST} look-ups of host names are under way without an answer"
        );
        Failure::local(&io::Error::new(io::ErrorKind::ResourceBusy, problem))
    }
}

/// Asks for a look-up; `done` gets the result, on another thread. If the resolver panics, or the
/// look-up has not begun at `deadline`, `done` is dropped.
#[cfg(feature = "tokio")]
pub(super) fn begin(
    resolver: &Arc<Resolver>,
    (host, port): (&str, u16),
    deadline: Instant,
    done: impl FnOnce(Resolved) + Send + 'static,
) -> Result<Asked, Failure> {
    begin_in(&LOOK_UPS, resolver, (host, port), deadline, done)
}

fn begin_in(
    look_ups: &Arc<LookUps>,
    resolver: &Arc<Resolver>,
    (host, port): (&str, u16),
    deadline: Instant,
    done: impl FnOnce(Resolved) + Send + 'static,
) -> Result<Asked, Failure> {
    let (begun, host) = (Arc::new(AtomicBool::new(false)), host.to_owned());
    let asked = Asked { begun: Arc::clone(&begun), host: host.clone() };
    let (resolver, done) = (Arc::clone(resolver), Box::new(done));
    look_ups.begin(LookUp { resolver, host, port, deadline, begun, done })?;
    Ok(asked)
}

/// Waits for a look-up until `deadline`.
pub(super) fn wait(resolver: &Arc<Resolver>, name: (&str, u16), deadline: Instant) -> Resolved {
    wait_in(&LOOK_UPS, resolver, name, deadline)
}

fn wait_in(
    look_ups: &Arc<LookUps>,
    resolver: &Arc<Resolver>,
    name: (&str, u16),
    deadline: Instant,
) -> Resolved {
    let (sender, receiver) = sync_channel(1);
    let done = move |result| drop(sender.send(result));
    let asked = begin_in(look_ups, resolver, name, deadline, done)?;
    let left = deadline.saturating_duration_since(Instant::now());
    receiver.recv_timeout(left).unwrap_or_else(|_| Err(asked.timed_out()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    const NAME: (&str, u16) = ("h.example", 80);

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// A resolver that answers while the gate is open, and the number of its look-ups.
    fn gated() -> (Arc<Mutex<()>>, Arc<Resolver>, Arc<AtomicUsize>) {
        let (gate, count): (Arc<Mutex<()>>, Arc<AtomicUsize>) = Default::default();
        let (waiting, counted) = (Arc::clone(&gate), Arc::clone(&count));
        let resolver: Arc<Resolver> = Arc::new(move |_: &str, port| {
            counted.fetch_add(1, Ordering::SeqCst);
            drop(waiting.lock());
            Ok(vec![([127, 0, 0, 1], port).into()])
        });
        (gate, resolver, count)
    }

    #[test]
    fn a_resolver_that_hangs_costs_its_time_limit() {
        let (gate, resolver, count) = gated();
        let closed = gate.lock().unwrap();
        let look_ups = LookUps::new(1, 10);
        let failure = wait_in(&look_ups, &resolver, NAME, soon()).unwrap_err();
        assert_eq!((failure.kind, failure.local), (io::ErrorKind::TimedOut, false), "{failure:?}");
        assert!(failure.problem.contains("h.example"), "{failure:?}");
        // One that could not begin says nothing about the name.
        let failure = wait_in(&look_ups, &resolver, NAME, soon()).unwrap_err();
        assert!(failure.local, "{failure:?}");
        assert_eq!(count.load(Ordering::SeqCst), 1);
        drop(closed);
        assert!(wait_in(&look_ups, &resolver, NAME, later()).is_ok());
        // The one that nothing waited for has not been made.
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn look_ups_wait_in_a_bounded_queue_and_all_are_made() {
        let (gate, resolver, count) = gated();
        let closed = gate.lock().unwrap();
        let look_ups = LookUps::new(4, 10);
        let (sender, results) = channel();
        let ask = |deadline| {
            let sender = sender.clone();
            let done = move |result: Resolved| sender.send(result.is_ok()).unwrap();
            begin_in(&look_ups, &resolver, NAME, deadline, done)
        };
        for _ in 0..4 + 10 {
            assert!(ask(later()).is_ok());
        }
        let Err(failure) = ask(later()) else { panic!("the queue has no bound") };
        assert_eq!((failure.kind, failure.local), (io::ErrorKind::ResourceBusy, true));
        drop(closed);
        for _ in 0..4 + 10 {
            assert!(results.recv_timeout(Duration::from_secs(60)).unwrap());
        }
        assert_eq!(count.load(Ordering::SeqCst), 14);
        // No thread stays.
        let end = later();
        while look_ups.lock().threads > 0 {
            assert!(Instant::now() < end);
            thread::yield_now();
        }
    }

    #[test]
    fn what_nothing_waits_for_makes_room() {
        let (gate, resolver, _) = gated();
        let closed = gate.lock().unwrap();
        let look_ups = LookUps::new(1, 2);
        let ask = |deadline| begin_in(&look_ups, &resolver, NAME, deadline, drop);
        assert!(ask(later()).is_ok());
        let past = Instant::now();
        assert!(ask(past).is_ok() && ask(past).is_ok());
        assert!(ask(later()).is_ok() && ask(later()).is_ok());
        assert!(ask(later()).is_err());
        drop(closed);
    }

    #[test]
    fn a_resolver_that_panics_keeps_no_place() {
        let panics: Arc<Resolver> = Arc::new(|_: &str, _| panic!("a mistake of the application"));
        let (_, resolver, _) = gated();
        let look_ups = LookUps::new(1, 10);
        for _ in 0..3 {
            let failure = wait_in(&look_ups, &panics, NAME, later()).unwrap_err();
            assert_eq!(failure.kind, io::ErrorKind::TimedOut);
            assert!(wait_in(&look_ups, &resolver, NAME, later()).is_ok());
        }
    }
}
