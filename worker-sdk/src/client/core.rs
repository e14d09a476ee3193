//! The worker itself, shared by the blocking, tokio and mio layers.
//!
//! Owns the link to the dispatcher (a state machine that advances by steps which never block), the queue
//! of what was received and not yet asked for, and the two counters. Every claim is made here, under one
//! lock, at the moment the application asks for its next connection.
//!
//! Blocking threads share the work as leader and followers: the leader waits on the channel itself, one
//! system call per record; the others wait for it to hand over entries or its place. A record with many
//! connections is so shared among threads, and nobody needs a thread of their own.

use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::backoff::Backoff;
use super::channel::{self, Received, Wait};
use super::clock::after;
use super::config::WorkerConfig;
use super::connection::{Accepted, Origin};
#[cfg(any(feature = "mio", feature = "tokio"))]
use super::drain::start_thread;
use super::drain::{Drain, Draining};
use super::error::Error;
use super::events::{Callback, Event, Events};
use super::gauges::{Gauge, Gauges};
use super::guard::{Custody, Guard};
use super::idle::Idle;
use super::join::{self, Failure, Joined, Session};
use super::live::Live;
use super::process::{Forks, Process};
use super::ready::Ready;
use super::said::Said;
use super::sample::Sampler;
use super::standalone::Listener;
use super::waiting::Waiting;
use crate::scoreboard::claim::{self, want};
use crate::wire::{Entry, EntryFlags, Features, Hello, PeerAddr, Probe, Update, VERSION};

mod ends;
mod link;
mod lock;

use self::lock::Locked;

/// A dispatcher that accepts and then says nothing is tried again after this.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a worker without a dispatcher waits when the system has no descriptor or memory for an accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A session that lasted this long shows that joining works, so the next waits start small again.
const RELIABLE: Duration = Duration::from_secs(5);

pub(crate) struct Core {
    hello: Hello,
    socket: PathBuf,
    local_addr: Option<PeerAddr>,
    process: Process,
    ready: Ready,
    state: Mutex<State>,
    handed_over: Condvar,
    /// The session that finished connections are told to. Kept after a goodbye until the last one ended.
    current: RwLock<Option<Arc<Session>>>,
    closed: AtomicBool,
    /// Connections the application has taken since the worker was made; grows under the lock only.
    opened: AtomicU64,
    /// Of those, how many have ended.
    finished: AtomicU64,
    gauges: Arc<Gauges>,
    /// Ends with this, and with it the thread that measures.
    sampler: Sampler,
    live: Live,
    draining: Draining,
    events: Events,
    idle: Idle,
    said: Arc<Said>,
}

pub(super) struct State {
    pub(super) link: Link,
    pub(super) queue: VecDeque<Pending>,
    /// Whether a thread waits for the dispatcher on behalf of all, outside the lock. Nobody else steps then.
    leader: bool,
    /// Threads that wait for the leader.
    followers: usize,
    waiting: Waiting,
    backoff: Backoff,
    ever_joined: bool,
    /// Whether the log has said that we wait; then it is not repeated aloud.
    complained: bool,
    join_deadline: Option<(Instant, Duration)>,
    last_problem: String,
    buffer: Vec<u8>,
    /// Its dispatcher had died when we said goodbye: what it sent is nobody else's.
    orphaned: Option<Arc<Session>>,
    /// Taken before the first of the queue was received: a child forked since then may have a copy of what is in it.
    forks: Forks,
    /// What the dispatcher is to know of this worker.
    pub(super) told: Update,
    /// Offered while paused: see [`State::set_aside`].
    pub(super) aside: Vec<Pending>,
}

pub(super) enum Link {
    Waiting {
        until: Instant,
    },
    Greeting {
        control: OwnedFd,
        until: Instant,
    },
    Joined {
        session: Arc<Session>,
        channel: Arc<OwnedFd>,
    },
    /// No dispatcher; `paused` while the system has no room for a connection.
    Standalone {
        listener: Listener,
        paused: Option<Instant>,
    },
    Closed,
}

/// What was received and not yet asked for.
pub(super) enum Pending {
    /// Not touched before its claim succeeds.
    Offered { entry: Entry, fd: OwnedFd },
    /// Claimed when its dispatcher went away: nobody else can serve it.
    Taken(Accepted),
    /// Answered when the application asks for its next connection: that is what it tests.
    Probe(Probe),
}

enum Step {
    /// Something changed; look again.
    Again,
    /// Nothing to do until `ready` says so.
    Blocked,
}

/// What taking from the queue leaves to do outside the lock.
#[derive(Default)]
struct Popped {
    accepted: Option<Accepted>,
    /// Woken if it waits for takes.
    poke: Option<Arc<Session>>,
    /// Somebody else's now; closed, never shut down.
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

impl Core {
    pub(crate) fn new(config: &WorkerConfig) -> Result<Arc<Core>, Error> {
        config.check()?;
        let failed = |error| Error::io("prepare to wait for connections", error);
        let said = Arc::new(Said::default());
        let ready = Ready::new(Arc::clone(&said)).map_err(failed)?;
        let (mut socket, mut local_addr) = (PathBuf::new(), None);
        let link = match (&config.dispatch_socket, &config.listen) {
            (None, Some(address)) => {
                let listener = Listener::bind(address)?;
                ready.watch(listener.as_fd()).map_err(failed)?;
                local_addr = listener.local_addr();
                said.say(log::Level::Info, || format!("no dispatcher: listening on {address}"));
                Link::Standalone { listener, paused: None }
            }
            (path, _) => {
                // `check` has refused a configuration with neither.
                socket = path.clone().unwrap_or_default();
                ready.arm(Duration::ZERO);
                Link::Waiting { until: Instant::now() }
            }
        };
        let timeout = config.join_timeout;
        let max_connections = config.effective_max_connections();
        let gauges = Gauges::new(Arc::clone(&said));
        let sampler = Sampler::new(config.sample, config.sample_interval);
        sampler.start(&gauges);
        said.flush();
        Ok(Arc::new(Core {
            hello: Hello {
                version: VERSION,
                weight: config.weight,
                priority: config.priority,
                features: Features(Features::DRAIN.0 | Features::OWN.0 | Features::UPDATE.0),
                max_connections,
                base: 0,
                finished: 0,
                pool: config.pool.clone(),
                name: config.effective_name(),
                token: config.token,
            },
            socket,
            local_addr,
            process: Process::current(),
            ready,
            state: Mutex::new(State {
                link,
                queue: VecDeque::new(),
                leader: false,
                followers: 0,
                waiting: Waiting::default(),
                backoff: Backoff::new(config.reconnect_min, config.reconnect_max),
                ever_joined: false,
                complained: false,
                join_deadline: timeout.map(|timeout| (after(timeout), timeout)),
                last_problem: "it did not answer".to_owned(),
                buffer: vec![0; channel::BUFFER],
                orphaned: None,
                forks: Forks::now(),
                told: Update { weight: config.weight, paused: false, max_connections },
                aside: Vec::new(),
            }),
            handed_over: Condvar::new(),
            current: RwLock::new(None),
            closed: AtomicBool::new(false),
            opened: AtomicU64::new(0),
            finished: AtomicU64::new(0),
            gauges,
            sampler,
            live: Live::default(),
            draining: Draining::default(),
            events: Events::default(),
            idle: Idle::default(),
            said,
        }))
    }

    /// The next connection, waited for, but not beyond `until`; `None` once closed, and while drained.
    pub(crate) fn accept(
        self: &Arc<Self>,
        until: Option<Instant>,
    ) -> Result<Option<Accepted>, Error> {
        self.check_process()?;
        let mut waits = false;
        let accepted = self.accept_waiting(until, &mut waits);
        if waits {
            self.stop_waiting(&mut self.lock());
        }
        accepted
    }

    /// `waits`: whether this thread is counted among those that wait.
    fn accept_waiting(
        self: &Arc<Self>,
        until: Option<Instant>,
        waits: &mut bool,
    ) -> Result<Option<Accepted>, Error> {
        let mut state = self.lock();
        // Whether a look without waiting has found nothing since the time was up.
        let mut looked = false;
        loop {
            if !state.queue.is_empty() {
                if mem::take(waits) {
                    self.stop_waiting(&mut state);
                }
                let Some(popped) = self.pop(&mut state) else { continue };
                if popped.accepted.is_some() {
                    state.waiting.takes();
                }
                match self.hand_out(state, popped, false) {
                    Some(accepted) => return Ok(Some(accepted)),
                    None => state = self.lock(),
                }
                continue;
            }
            if !mem::replace(waits, true) {
                self.start_waiting(&mut state);
            }
            if matches!(state.link, Link::Closed) {
                return Ok(None);
            } else if self.draining.now().is_some() {
                // Perhaps it has ended since.
                match if state.leader { Step::Blocked } else { self.step(&mut state)? } {
                    Step::Again => {}
                    Step::Blocked => {
                        self.pass_on(&state);
                        return Ok(None);
                    }
                }
            } else if until.is_some_and(|until| until <= Instant::now()) {
                let step = if state.leader || looked {
                    Step::Blocked
                } else {
                    looked = true;
                    self.step(&mut state)?
                };
                if let Step::Blocked = step {
                    self.pass_on(&state);
                    return Err(Error::TimedOut);
                }
            } else {
                let result;
                (state, result) = self.follow_or_lead(state, until);
                result?;
            }
        }
    }

    fn start_waiting(&self, state: &mut State) {
        state.waiting.enter(self.live());
        if let Some(session) = state.link.session() {
            state.waiting.show(&session.board);
            session.poke_if_wanted(want::IDLE);
        }
    }

    fn stop_waiting(&self, state: &mut State) {
        state.waiting.leave();
        if let Some(session) = state.link.session() {
            state.waiting.show(&session.board);
        }
    }

    /// The next connection if there is one now; `None` means wait until the descriptor is readable.
    pub(crate) fn try_accept(self: &Arc<Self>) -> Result<Option<Accepted>, Error> {
        self.check_process()?;
        let mut state = self.lock();
        if state.waiting.asks()
            && let Some(session) = state.link.session()
        {
            state.waiting.show(&session.board);
        }
        loop {
            if let Some(popped) = self.pop(&mut state) {
                match self.hand_out(state, popped, true) {
                    Some(accepted) => return Ok(Some(accepted)),
                    None => state = self.lock(),
                }
            } else {
                match if state.leader { Step::Blocked } else { self.step(&mut state)? } {
                    Step::Again => {}
                    Step::Blocked => {
                        self.pass_on(&state);
                        let drained = self.draining.now().is_some();
                        return if drained { Err(Error::Draining) } else { Ok(None) };
                    }
                }
            }
        }
    }

    /// Waits until no drain is under way (true), or the worker is closed (false).
    pub(crate) fn resumed(self: &Arc<Self>) -> Result<bool, Error> {
        self.check_process()?;
        let mut state = self.lock();
        loop {
            if matches!(state.link, Link::Closed) {
                return Ok(false);
            } else if self.draining.now().is_none() {
                self.pass_on(&state);
                return Ok(true);
            }
            let result;
            (state, result) = self.follow_or_lead(state, None);
            result?;
        }
    }

    /// The same without waiting; `None` means wait until the descriptor is readable.
    #[cfg(feature = "tokio")]
    pub(crate) fn try_resumed(self: &Arc<Self>) -> Result<Option<bool>, Error> {
        self.check_process()?;
        let mut state = self.lock();
        loop {
            if matches!(state.link, Link::Closed) {
                return Ok(Some(false));
            } else if self.draining.now().is_none() {
                return Ok(Some(true));
            } else if state.leader {
                return Ok(None);
            } else if let Step::Blocked = self.step(&mut state)? {
                return Ok(None);
            }
        }
    }

    /// Waits for something to change, on behalf of all if nobody does yet.
    fn follow_or_lead<'a>(
        self: &'a Arc<Self>,
        mut state: Locked<'a>,
        until: Option<Instant>,
    ) -> (Locked<'a>, Result<(), Error>) {
        if state.leader {
            state.followers += 1;
            state = state.wait(&self.handed_over, self, until);
            state.followers -= 1;
            return (state, Ok(()));
        }
        state.leader = true;
        let result;
        (state, result) = self.lead(state, until);
        state.leader = false;
        if result.is_err() {
            self.pass_on(&state);
        }
        (state, result)
    }

    /// Advances until joined (true) or until there is nothing to do before the descriptor is readable (false).
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

    /// Stops receiving. What was claimed already is still handed out.
    pub(crate) fn close(self: &Arc<Self>) {
        if !self.process.is_current() {
            return;
        }
        let mut state = self.lock();
        match mem::replace(&mut state.link, Link::Closed) {
            Link::Joined { session, channel } => {
                let heard = session.goodbye(&self.said);
                self.ready.forget(channel.as_fd());
                // Wakes the leader, and lets nothing more in.
                let _ = rustix::net::shutdown(&*channel, rustix::net::Shutdown::Read);
                if !heard {
                    // The leader may have just received something.
                    state.orphaned = Some(Arc::clone(&session));
                    state.take_up();
                    self.claim_all(&mut state, &session);
                }
                // What is left there is the dispatcher's again: it has copies and revokes them. If it has died, it is ours.
                let mut buffer = vec![0; channel::BUFFER];
                loop {
                    match channel::receive(channel.as_fd(), &mut buffer, Wait::No) {
                        Received::Handoff { arrived, .. } if !heard => {
                            self.adopt(&mut state, &session, arrived);
                        }
                        Received::Handoff { .. }
                        | Received::Probe(_)
                        | Received::Drain(_)
                        | Received::Resume => {}
                        Received::Empty | Received::End | Received::Broken(_) => break,
                    }
                }
            }
            Link::Greeting { control, .. } => {
                self.ready.forget(control.as_fd());
                join::end(&control);
            }
            Link::Standalone { listener, paused } => {
                if paused.is_none() && !state.told.paused {
                    self.ready.forget(listener.as_fd());
                }
                listener.unlink(&self.said);
            }
            Link::Waiting { .. } | Link::Closed => {}
        }
        state.queue.retain(|pending| matches!(pending, Pending::Taken(_)));
        (state.told.paused, state.aside) = (false, Vec::new());
        self.closed.store(true, Ordering::SeqCst);
        self.ready.close();
        self.handed_over.notify_all();
        drop(state);
        // Without the lock: what a callback owns may be a handle of this very worker.
        self.draining.close();
        self.events.close();
        self.end_session_if_over();
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
        // In this order the difference can't be negative.
        let finished = self.finished.load(Ordering::SeqCst);
        self.opened.load(Ordering::SeqCst) - finished
    }

    pub(crate) fn gauge(&self, name: &str) -> Result<Gauge, Error> {
        // The scoreboard is the parent's, too.
        self.check_process()?;
        let gauge = self.gauges.gauge(name);
        self.said.flush();
        gauge
    }

    pub(crate) fn id(&self) -> Option<u64> {
        self.read_current().map(|session| session.worker_id)
    }

    pub(crate) fn is_joined(&self) -> bool {
        matches!(self.lock().link, Link::Joined { .. } | Link::Standalone { .. })
    }

    pub(crate) fn ready_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    /// A guard was dropped. No lock is taken that is held while anything waits.
    pub(super) fn finished_one(&self) {
        let finished = self.finished.fetch_add(1, Ordering::SeqCst) + 1;
        if let Some(session) = self.read_current() {
            session.board.raise_finished(finished);
            session.poke_if_wanted(want::ROOM);
        }
        self.end_session_if_over();
        self.idle.ended(|| self.live());
    }

    pub(crate) fn draining(&self) -> &Draining {
        &self.draining
    }

    pub(super) fn ready(&self) -> &Ready {
        &self.ready
    }

    pub(super) fn events(&self) -> &Events {
        &self.events
    }

    pub(super) fn said(&self) -> &Said {
        &self.said
    }

    pub(super) fn live_connections(&self) -> &Live {
        &self.live
    }

    /// The deadline of a drain has come.
    pub(super) fn end_all(&self, round: u64) {
        if let Some(ended) = self.live.end_all(round) {
            log::warn!("the deadline of the drain has come: {ended} connections are shut down");
        }
    }

    fn read_current(&self) -> Option<Arc<Session>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_current(&self, session: Option<Arc<Session>>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = session;
    }

    /// After a goodbye the control connection ends with the last connection: the dispatcher counts until then.
    fn end_session_if_over(&self) {
        // Whoever closes sets the flag, then looks at the counters; whoever finishes does the opposite.
        if self.closed.load(Ordering::SeqCst) && self.live() == 0 {
            let over = self.current.write().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(session) = over {
                session.end();
            }
            self.gauges.hide();
            self.draining.forget_deadline();
            // An event loop that waits for this is told, on the one descriptor it watches.
            self.ready.close();
        }
    }

    fn check_process(&self) -> Result<(), Error> {
        if self.process.is_current() { Ok(()) } else { Err(Error::Forked) }
    }

    fn wait(&self, until: Option<Instant>) -> Result<(), Error> {
        let failed = |error| Error::io("wait for the dispatcher", error);
        self.ready.wait(until).map_err(failed)
    }

    /// Every way out of the lock passes here, or entries (or the leader's place) would wait for a thread
    /// that sleeps.
    fn pass_on(&self, state: &State) {
        if !state.leader && state.followers > 0 {
            self.handed_over.notify_one();
        }
    }
}
