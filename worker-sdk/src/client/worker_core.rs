//! The worker's state and logic, shared by the blocking, tokio and mio layers.
//!
//! This module owns the link to the dispatcher (a state machine whose steps never block), the queue
//! of received connections, and the two counters. It takes every slot under one lock, at the moment
//! the application asks for its next connection.
//!
//! Blocking threads work as leader and followers: the leader waits on the channel itself, with one
//! system call per record; the followers wait until the leader hands over entries or the
//! leadership. So the threads share a record with many connections, and the SDK needs no thread of
//! its own.

use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::channel::{self, Arrived, ReceiveMode, Received};
use super::clock::after;
use super::config::{OnDispatcherLoss, WorkerConfig};
use super::connection::{AcceptTime, Accepted, Origin};
use super::dispatchers::{self, Dispatchers, Failed, Next};
use super::drain::{Drain, Draining, start_thread};
use super::error::Error;
use super::events::{LinkCallback, LinkEvent, LinkEvents};
use super::gauges::{Gauge, Gauges};
use super::guard::{Guard, TakenSlot};
use super::idle_signal::IdleSignal;
use super::idle_threads::IdleThreads;
use super::join::{self, Failure, Joined, Place, Session};
use super::live_connections::LiveConnections;
use super::log_queue::{LogQueue, RateLimited, connections, log_now, readable, readable_path};
use super::outbox::{GOODBYE_TIMEOUT, Record};
use super::process::{Forks, Process};
use super::readiness::Readiness;
use super::sample::Sampler;
use super::standalone::StandaloneListener;
use crate::{PeerAddr, Proxy};
use dispatch_protocol::scoreboard::slot::{self, want};
use dispatch_protocol::wire::{EntryFlags, Features, Hello, Probe, Update, VERSION};

mod accept;
mod link;
mod lock;
mod shutdown;

use self::lock::Locked;

/// After this time without an answer to a hello that the dispatcher has read, the worker tries
/// again.
pub(super) const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);

/// The pause of a worker without a dispatcher after an accept that lacked a descriptor or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(crate) struct WorkerCore {
    hello: Hello,
    /// The setting, with all sockets.
    socket: PathBuf,
    local_addr: Option<PeerAddr>,
    process: Process,
    readiness: Readiness,
    state: Mutex<State>,
    handed_over: Condvar,
    /// The session in which ended connections are counted. It stays after a goodbye until the last
    /// connection has ended.
    current: RwLock<Option<Arc<Session>>>,
    closed: AtomicBool,
    /// Connections taken by the application since the worker was created; grows under the lock
    /// only.
    opened: AtomicU64,
    /// Those of them that have ended.
    finished: AtomicU64,
    gauges: Arc<Gauges>,
    /// Its thread ends when the worker is dropped.
    sampler: Sampler,
    live_connections: LiveConnections,
    draining: Draining,
    events: LinkEvents,
    on_loss: OnDispatcherLoss,
    /// A loss has closed the worker, and the work that needs the lock to be free is left.
    closed_by_loss: AtomicBool,
    idle: IdleSignal,
    /// The session with an unsent goodbye, set when the last connection has ended.
    unsent_goodbye: Mutex<Option<Arc<Session>>>,
    log_queue: Arc<LogQueue>,
}

pub(super) struct State {
    pub(super) link: Link,
    pub(super) queue: VecDeque<Pending>,
    /// Whether a thread waits for the dispatcher on behalf of all threads, outside the lock. Then
    /// no other thread calls `step`.
    leader: bool,
    /// Threads that wait for the leader.
    followers: usize,
    idle_threads: IdleThreads,
    dispatchers: Dispatchers,
    ever_joined: bool,
    join_deadline: Option<(Instant, Duration)>,
    last_problem: String,
    buffer: Vec<u8>,
    /// The dispatcher had ended before the goodbye, so no other worker can get the connections it
    /// sent.
    orphaned: Option<Arc<Session>>,
    /// Taken before the first entry of the queue was received: a child forked since may have a copy
    /// of the queue's descriptors.
    forks: Forks,
    /// The settings that the dispatcher should know.
    pub(super) settings: Update,
    /// Connections offered while the worker is paused: see [`State::set_aside`].
    pub(super) aside: Vec<Pending>,
}

pub(super) enum Link {
    Waiting {
        until: Instant,
    },
    Greeting {
        control: OwnedFd,
        until: Instant,
        /// The socket to which `control` is connected.
        place: Option<Place>,
    },
    Joined {
        session: Arc<Session>,
        channel: Arc<OwnedFd>,
    },
    /// No dispatcher; `paused` while the system has no room for a connection.
    Standalone {
        listener: StandaloneListener,
        paused: Option<Instant>,
    },
    Closed,
}

/// Received and not yet requested by the application.
pub(super) enum Pending {
    /// Not used before its slot is taken.
    Offered(Arrived),
    /// Taken when its dispatcher ended, because no other worker can get it.
    Taken(Accepted),
    /// Answered when the application asks for its next connection, because the probe tests the
    /// application.
    Probe(Probe),
}

enum Step {
    /// The state has changed; check again.
    Again,
    /// Nothing to do until the readiness descriptor is readable.
    Blocked,
}

/// Work left after a pop, to be done outside the lock.
#[derive(Default)]
struct Popped {
    accepted: Option<Accepted>,
    /// The doorbell to ring if the dispatcher waits for takes.
    doorbell: Option<Arc<Session>>,
    /// Another worker has it; closed, never shut down.
    stale: Option<OwnedFd>,
}

impl Link {
    pub(super) fn session(&self) -> Option<&Arc<Session>> {
        match self {
            Link::Joined { session, .. } => Some(session),
            Link::Waiting { .. }
            | Link::Greeting { .. }
            | Link::Standalone { .. }
            | Link::Closed => None,
        }
    }
}

impl WorkerCore {
    pub(crate) fn new(config: &WorkerConfig) -> Result<Arc<WorkerCore>, Error> {
        config.check()?;
        let failed = |error| Error::io("prepare to wait for connections", error);
        let log_queue = Arc::new(LogQueue::default());
        let readiness = Readiness::new(Arc::clone(&log_queue)).map_err(failed)?;
        let (mut socket, mut local_addr) = (PathBuf::new(), None);
        let link = match (&config.dispatch_socket, &config.listen) {
            (None, Some(address)) => {
                let listener = StandaloneListener::bind(address)?;
                readiness.watch(listener.as_fd()).map_err(failed)?;
                local_addr = listener.local_addr();
                log_queue
                    .push(log::Level::Info, || format!("no dispatcher: listening on {address}"));
                Link::Standalone { listener, paused: None }
            }
            (path, _) => {
                // `check` refuses a configuration with neither.
                socket = path.clone().unwrap_or_default();
                readiness.arm(Duration::ZERO);
                Link::Waiting { until: Instant::now() }
            }
        };
        let (min, max) = (config.reconnect_min, config.reconnect_max);
        let dispatchers = Dispatchers::new(dispatchers::sockets(&socket), min, max);
        let timeout = config.join_timeout;
        let max_connections = config.effective_max_connections();
        let gauges = Gauges::new(Arc::clone(&log_queue));
        let sampler = Sampler::new(config.sample, config.sample_interval);
        sampler.start(&gauges);
        log_queue.flush();
        Ok(Arc::new(WorkerCore {
            hello: Hello {
                version: VERSION,
                weight: config.weight,
                priority: config.priority,
                features: Features(Features::DRAIN.0 | Features::CLAIM.0 | Features::UPDATE.0),
                max_connections,
                base: 0,
                finished: 0,
                pool: config.pool.clone(),
                name: config.effective_name(),
                token: config.token,
                advertise: config.advertise.clone(),
            },
            socket,
            local_addr,
            process: Process::current(),
            readiness,
            state: Mutex::new(State {
                link,
                queue: VecDeque::new(),
                leader: false,
                followers: 0,
                idle_threads: IdleThreads::default(),
                dispatchers,
                ever_joined: false,
                join_deadline: timeout.map(|timeout| (after(timeout), timeout)),
                last_problem: "it did not answer".to_owned(),
                buffer: vec![0; channel::BUFFER],
                orphaned: None,
                forks: Forks::now(),
                settings: Update { weight: config.weight, paused: false, max_connections },
                aside: Vec::new(),
            }),
            handed_over: Condvar::new(),
            current: RwLock::new(None),
            closed: AtomicBool::new(false),
            opened: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            gauges,
            sampler,
            live_connections: LiveConnections::default(),
            draining: Draining::default(),
            events: LinkEvents::default(),
            on_loss: config.on_dispatcher_loss,
            closed_by_loss: AtomicBool::new(false),
            idle: IdleSignal::default(),
            unsent_goodbye: Mutex::new(None),
            log_queue,
        }))
    }

    /// Advances until the worker has joined (true) or nothing can happen before the descriptor is
    /// readable (false).
    pub(crate) fn try_join(self: &Arc<Self>) -> Result<bool, Error> {
        self.check_process()?;
        let mut state = self.lock();
        loop {
            match &state.link {
                Link::Joined { .. } | Link::Standalone { .. } => return Ok(true),
                Link::Closed => return Err(Error::Closed),
                Link::Waiting { .. } | Link::Greeting { .. } => {
                    if let Step::Blocked = self.step(&mut state)? {
                        return Ok(false);
                    }
                }
            }
        }
    }

    pub(crate) fn join(self: &Arc<Self>) -> Result<(), Error> {
        while !self.try_join()? {
            self.wait(None)?;
        }
        Ok(())
    }

    pub(crate) fn process(&self) -> Process {
        self.process
    }

    pub(crate) fn pool(&self) -> &str {
        &self.hello.pool
    }

    pub(crate) fn local_addr(&self) -> Option<PeerAddr> {
        self.local_addr
    }

    pub(crate) fn live(&self) -> u64 {
        // This order keeps the difference from being negative.
        let finished = self.finished.load(Ordering::SeqCst);
        self.opened.load(Ordering::SeqCst) - finished
    }

    pub(crate) fn gauge(&self, name: &str) -> Result<Gauge, Error> {
        // A forked child shares the scoreboard with its parent.
        self.check_process()?;
        let gauge = self.gauges.gauge(name);
        self.log_queue.flush();
        gauge
    }

    pub(crate) fn id(&self) -> Option<u64> {
        self.read_current().map(|session| session.worker_id)
    }

    #[cfg(feature = "relay")]
    pub(crate) fn relay_ticket(&self) -> Option<Vec<u8>> {
        let session = self.read_current()?;
        (!session.relay_ticket.is_empty()).then(|| session.relay_ticket.clone())
    }

    pub(crate) fn is_joined(&self) -> bool {
        matches!(self.lock().link, Link::Joined { .. } | Link::Standalone { .. })
    }

    pub(crate) fn ready_fd(&self) -> BorrowedFd<'_> {
        self.readiness.as_fd()
    }

    /// Counts a connection as ended. Takes no lock that is held during a wait.
    pub(super) fn finished_one(&self) {
        let finished = self.finished.fetch_add(1, Ordering::SeqCst) + 1;
        if let Some(session) = self.read_current() {
            session.board.raise_finished(finished);
            session.ring_if_wanted(want::ROOM);
        }
        self.end_session_if_over();
        self.idle.ended(|| self.live());
    }

    pub(crate) fn draining(&self) -> &Draining {
        &self.draining
    }

    pub(super) fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    pub(super) fn events(&self) -> &LinkEvents {
        &self.events
    }

    pub(super) fn log_queue(&self) -> &LogQueue {
        &self.log_queue
    }

    pub(super) fn live_connections(&self) -> &LiveConnections {
        &self.live_connections
    }

    fn read_current(&self) -> Option<Arc<Session>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_current(&self, session: Option<Arc<Session>>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = session;
    }

    fn check_process(&self) -> Result<(), Error> {
        if self.process.is_current() { Ok(()) } else { Err(Error::Forked) }
    }

    fn wait(&self, until: Option<Instant>) -> Result<(), Error> {
        let failed = |error| Error::io("wait for the dispatcher", error);
        self.readiness.wait(until).map_err(failed)
    }
}

#[cfg(test)]
mod tests;
