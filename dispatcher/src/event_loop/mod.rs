//! The hot thread: a mio loop that turns readiness into inputs of the core and performs its effects.
//!
//! Owns every file descriptor of the dispatcher and the one clock. Decides nothing: which worker, when to give
//! up, whether to accept are all questions to `pool`. It never waits except in `poll`: logs, HTTP, starting processes
//! and closes that may linger happen on other threads.
//!
//! A turn: sleep; read all scoreboards; handle events; let the core's deadlines fall due; perform; accept;
//! perform; hand over what is to be closed. Before sleeping, the `want` words are set and the scoreboards of those
//! workers read once more.

mod accept;
mod command;
mod conditions;
mod control;
mod doorbell_limit;
mod event_order;
mod events;
mod fault_list;
mod faults;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod gauges;
mod handoff_check;
mod handshake;
mod join;
mod leaving;
mod meters;
mod peek;
mod perform;
mod queued;
mod rate_limit;
pub mod reload;
mod start;
mod status;
mod time;
mod timer;
mod token;
mod worker_io;
mod yield_backoff;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use dispatch_protocol::scoreboard::slot::{self, SlotState};
use dispatch_protocol::wire::{Entry, Token};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll};
use signal_hook_mio::v1_0::Signals;

use self::accept::{Conn, ListenerIo};
use self::conditions::Conditions;
use self::event_order::{DelayedEvent, ExpectedEnds};
use self::fault_list::{FaultList, Seconds};
use self::handoff_check::HandoffCheck;
use self::handshake::Handshakes;
use self::meters::Meters;
use self::rate_limit::{Cause, RateLimits};
use self::time::{Stamps, clock, realtime};
use self::timer::Timer;
use self::token::{Key, Source};
use self::worker_io::WorkerIo;
use self::yield_backoff::YieldBackoff;
use crate::background::cleaner::Cleaner;
use crate::background::closer::Closers;
use crate::background::service_manager::State;
use crate::config::Config;
use crate::listen::bind::OwnedPath;
use crate::mailbox::{Side, StartSide};
use dispatcher_core::{Core, ProcessId, Threads, Ticket, Time, WorkerId};

pub use crate::listen::error::RunError;

/// Serves until a signal ends it. `ready` is called once, with the addresses of the listeners as bound, when clients and
/// workers can connect.
///
/// # Errors
/// [`RunError`] when it cannot start, or when the poll itself fails.
pub fn run(
    config: Config,
    start_side: StartSide,
    ready: impl FnOnce(&[String]),
) -> Result<(), RunError> {
    let mut event_loop = EventLoop::start(config, start_side)?;
    ready(&event_loop.addresses());
    let served = event_loop.serve();
    event_loop.finish();
    served
}

/// The hot thread's state. Tables indexed by `index` run parallel to the core's.
struct EventLoop {
    /// Its pools and listeners by id: those that were taken out stay.
    config: Config,
    /// Which start of a dispatcher this is, for people and programs.
    instance: String,
    /// Counts reloads.
    generation: u64,
    core: Core,
    poll: Poll,
    signals: Signals,
    now: Time,
    /// What to add to a time of ours to have it by `CLOCK_REALTIME`, in this turn.
    to_realtime: u64,
    started: Time,
    /// Watches over invariant 6: from waking up to sleeping again.
    longest_turn: Duration,
    meters: Meters,
    /// Set once a stop has begun.
    stop_deadline: Option<Time>,

    listeners: Vec<ListenerIo>,
    /// Whose turn it is to be accepted from first.
    next_listener: usize,
    /// Passed by a service manager, and asked for by nobody yet.
    unused: Vec<crate::listen::bind::Listening>,

    /// Where workers connect, for people.
    dispatch_address: String,
    /// Removes the dispatch socket's file at the end.
    dispatch_path: Option<OwnedPath>,
    handshakes: Handshakes,
    /// By `WorkerId::index`. Side by side in memory: every turn looks at all of them.
    workers: Vec<Option<WorkerIo>>,
    /// Workers that are not listened to for a while.
    muted: usize,
    /// Workers of pools that score by gauges.
    gauge_readers: usize,
    /// Something has just happened, so more is likely to happen soon: see [`WAKEUP_GRACE`].
    in_grace: bool,
    timer: Timer,
    /// Woken after a [`BATCHING_THRESHOLD`]: nobody else has asked for anything lately.
    slept_long: bool,
    yield_backoff: YieldBackoff,
    scanned_all: Time,
    /// The last turn left some out.
    scan_due: bool,
    /// Our limits of open files before we raised them, soft and hard: for the processes we start.
    descriptors: Option<(u64, u64)>,
    /// Tokens of the processes we started.
    tokens: HashMap<Token, ProcessId>,

    /// By `ConnId::index`.
    conns: Vec<Option<Conn>>,
    /// Workers with connections gathered for them this turn.
    dirty: Vec<u32>,
    /// What other processes may hold is closed there. Handed over at the end of the turn: clients go first.
    closers: Closers,
    /// Not all could be handed over at the end of the turn.
    closing_due: Option<Time>,
    /// Workers whose channels are empty now.
    purged: Receiver<WorkerId>,
    handoff_check: HandoffCheck,
    cleaner: Cleaner,

    side: Side,
    /// Removes the admin socket's file at the end.
    admin_path: Option<OwnedPath>,
    /// The side thread's queues may hold more than one turn takes.
    side_ready: bool,
    limits: RateLimits,
    /// Lines were left out that the log is to be told of by then.
    suppressed_due: Option<Time>,
    faults: FaultList,
    /// What is wrong with pools now.
    conditions: Conditions,
    expected_ends: ExpectedEnds,
    /// Lines of the log that come after others of this turn.
    delayed_events: Vec<DelayedEvent>,
    seconds: Seconds,
    /// Scratch space, kept warm.
    gauges_due: Vec<bool>,
    seen: Vec<(Ticket, SlotState, Time)>,
    entries: Vec<Entry>,
    record: Vec<u8>,
    first_bytes: Vec<u8>,
    decoded: Vec<u8>,
}

/// For this long after an event no worker is asked to ring the doorbell: at any rate worth mentioning the next client wakes us before,
/// and what was taken is then seen without a system call of the worker and a wake-up of ours for each connection. Workers
/// that close meanwhile find their slot not released and shut the connection down, so no client waits for this.
const WAKEUP_GRACE: Duration = Duration::from_millis(2);

/// After a sleep this long a client goes to its worker at once. Otherwise more clients are likely to have come with it, and
/// one record for all of a worker's is cheaper.
const BATCHING_THRESHOLD: Duration = Duration::from_micros(200);

/// How often workers that have nothing are looked at, at most; see [`EventLoop::scan_all`].
const SCAN_ALL: Duration = Duration::from_millis(10);

/// What a look without sleeping found.
enum PollOutcome {
    /// Events, to be handled now.
    Found,
    /// Nothing: sleep, at most for this long.
    Sleep(Option<Duration>),
}

/// A turn this long is worth a line; it is said again only for longer ones.
const SLOW_TURN: Duration = Duration::from_millis(100);

impl EventLoop {
    fn serve(&mut self) -> Result<(), RunError> {
        let mut events = Events::with_capacity(1024);
        loop {
            self.perform();
            self.hand_over();
            if self.is_over() {
                return Ok(());
            }
            let timeout = self.before_sleep();
            self.watch_turn();
            self.slept_long = false;
            if let PollOutcome::Sleep(timeout) = self.poll_again(&mut events, timeout)? {
                self.sleep(&mut events, timeout)?;
            }
            self.now = clock();
            self.to_realtime = realtime().wrapping_sub(self.now.0);
            self.in_grace =
                events.iter().any(|event| Source::of(event.token()) != Some(Source::Timer));
            // First: what is taken in the scan may give somebody who waits a place.
            self.read_gauges();
            self.scan_all();
            self.handle_all(&events);
            self.core.tick(self.now);
            self.perform();
            self.accept_all();
            self.seconds.note(self.now, self.core.totals().accepted);
        }
    }

    /// Everything that has happened, and what earlier turns left.
    fn handle_all(&mut self, events: &Events) {
        for event in events {
            match Source::of(event.token()) {
                Some(Source::Queued(key)) => self.queued_event(key, event),
                Some(source) => self.handle(source),
                None => {}
            }
        }
        self.handle_leftovers();
    }

    /// Waits until something happens or `timeout` is over.
    fn sleep(&mut self, events: &mut Events, timeout: Option<Duration>) -> Result<(), RunError> {
        if timeout == Some(Duration::ZERO) {
            return self.poll_events(events, timeout);
        }
        let began = clock();
        let unset = timeout.filter(|&timeout| self.timer.set(began, began + timeout).is_err());
        self.poll_events(events, unset)?;
        self.slept_long = clock() - began >= BATCHING_THRESHOLD;
        Ok(())
    }

    /// Nothing has happened, too, if a signal handler ended it.
    fn poll_events(
        &mut self,
        events: &mut Events,
        timeout: Option<Duration>,
    ) -> Result<(), RunError> {
        match self.poll.poll(events, timeout) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                events.clear();
                Ok(())
            }
            Err(error) => Err(RunError::System { what: "poll", error }),
        }
    }

    /// Looks for events without sleeping, when some have just happened: once after letting whoever waits for this
    /// core run, and on for `busy_poll`.
    ///
    /// On a machine with more work than cores, clients and workers get on meanwhile, so that the next turn has more to
    /// do and nobody pays for putting us to sleep and waking us. With a core to spare it costs two short system calls.
    fn poll_again(
        &mut self,
        events: &mut Events,
        timeout: Option<Duration>,
    ) -> Result<PollOutcome, RunError> {
        if !self.in_grace || timeout == Some(Duration::ZERO) {
            return Ok(PollOutcome::Sleep(timeout));
        }
        let until = self.config.limits.busy_poll.min(timeout.unwrap_or(Duration::MAX));
        let began = clock();
        let mut looked = began;
        loop {
            let yielded = self.yield_backoff.wanted(looked);
            if yielded {
                std::thread::yield_now();
                let now = clock();
                self.yield_backoff.took(now, now - looked);
                looked = now;
            }
            if yielded || !until.is_zero() {
                self.poll_events(events, Some(Duration::ZERO))?;
                if !events.is_empty() {
                    return Ok(PollOutcome::Found);
                }
            }
            if !until.is_zero() {
                looked = clock();
            }
            let spent = looked - began;
            if spent >= until {
                return Ok(PollOutcome::Sleep(
                    timeout.map(|timeout| timeout.saturating_sub(spent)),
                ));
            }
        }
    }

    /// A turn that takes long means that something in it waited, which nothing may.
    fn watch_turn(&mut self) {
        let turn = clock() - self.now;
        self.meters.turn.record(turn);
        if turn > self.longest_turn {
            self.longest_turn = turn;
            if turn > SLOW_TURN {
                log::warn!("event=slow_turn took={}", events::span(turn));
            }
        }
    }

    /// Whether a stop is complete. Our own listeners are emptied first, unless time has run out.
    fn is_over(&self) -> bool {
        let Some(deadline) = self.stop_deadline else { return false };
        let emptied = self.listeners.iter().all(|listener| listener.listening.is_none());
        self.core.stopped() && (emptied || deadline <= self.now)
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Signals => self.handle_signals(),
            // Once a turn, whatever was left over from the last one.
            Source::Waker => {
                self.side_ready = true;
                self.handshakes.ready = true;
            }
            Source::Listener(position) => {
                if let Some(listener) = self.listeners.get_mut(position) {
                    listener.edge();
                }
            }
            // The door's.
            Source::Dispatch | Source::Pending(_) | Source::Control(_) | Source::Process(_) => {}
            // These were meant to end the sleep; the scan has seen what a ring was about. A queued one needs its event.
            Source::Doorbell(key) => self.rang(key),
            Source::Timer | Source::Queued(_) => {}
        }
    }

    /// What earlier turns did not finish, and what is due although no event says so.
    fn handle_leftovers(&mut self) {
        if self.handshakes.ready {
            self.hear();
        }
        if std::mem::take(&mut self.side_ready) {
            self.handle_side();
        }
        while let Ok(worker) = self.purged.try_recv() {
            self.purged(worker);
        }
        self.listen_again();
        if self.suppressed_due.is_some_and(|due| due <= self.now) {
            self.write_suppressed();
        }
        if let Some(discarded) = self.core.discarded() {
            self.cleaner.clean(discarded);
        }
    }

    fn handle_signals(&mut self) {
        let received: Vec<i32> = self.signals.pending().collect();
        for signal in received {
            match signal {
                // Reading files is nothing for this thread.
                libc::SIGHUP => self.side.reload.notify_one(),
                _ => self.begin_stop(signal),
            }
        }
    }

    /// The first signal stops gracefully, a second one at once.
    fn begin_stop(&mut self, signal: i32) {
        let patience = match self.stop_deadline {
            None => self.config.limits.stop_timeout,
            Some(_) => Duration::ZERO,
        };
        let name = match signal {
            libc::SIGINT => "SIGINT",
            libc::SIGQUIT => "SIGQUIT",
            _ => "SIGTERM",
        };
        let totals = self.core.totals();
        log::info!(
            "event=stopping signal={name} queued={} in_flight={} within={}",
            totals.queued,
            totals.in_flight,
            events::span(patience)
        );
        if self.stop_deadline.is_none() {
            drop(self.side.manager.tell(State::Stopping));
            self.finish_listeners();
        }
        let deadline = self.now + patience;
        self.stop_deadline = Some(deadline);
        self.core.stop(self.now, deadline);
    }

    /// Reads every scoreboard: what was taken, lost and finished.
    ///
    /// Under load only of workers that can have news, and now and then of all: one that has nothing can only lie.
    fn scan_all(&mut self) {
        let all = self.now - self.scanned_all >= SCAN_ALL;
        if all {
            self.scanned_all = self.now;
        }
        self.scan_due = !all;
        for index in 0..self.workers.len() {
            if all || self.core.may_be_dirty(index as u32) {
                self.scan(index);
            }
        }
    }

    /// Reads one scoreboard and reports what changed; true if anything did.
    ///
    /// `finished` is read first: every connection it counts is then seen as taken, so an honest worker is never
    /// found to have finished more than it took.
    fn scan(&mut self, index: usize) -> bool {
        let Some(io) = self.workers.get_mut(index).and_then(Option::as_mut) else {
            return false;
        };
        let id = io.id;
        let finished = io.lane.board.finished();
        // Most of many workers, most of the time.
        if finished == io.finished
            && !self.core.has_tickets(id.index)
            && io.lane.board.idle_threads() == io.threads
        {
            return false;
        }
        let mut stamps = None;
        for ticket in self.core.tickets(id) {
            if let Some(slot) = io.lane.board.slot(ticket.slot) {
                let state = slot::state(slot, ticket.seq);
                if state != SlotState::Sent {
                    let stamp = io.lane.board.stamped(ticket.slot);
                    let stamps = stamps.get_or_insert_with(Stamps::now);
                    self.seen.push((ticket, state, stamps.time(stamp)));
                }
            }
        }
        let mut changed = !self.seen.is_empty();
        let threads = io.lane.board.idle_threads();
        let reported = std::mem::replace(&mut io.threads, threads);
        for (ticket, state, at) in self.seen.drain(..) {
            self.core.slot(self.now, id, ticket, state, at);
        }
        if threads != reported {
            let threads = threads.map(|(idle, turnaround)| Threads { idle, turnaround });
            self.core.threads(self.now, id, threads);
            changed = true;
        }
        if finished != io.finished {
            io.finished = finished;
            self.core.finished(self.now, id, finished);
            changed = true;
        }
        if changed && let Some(Some(io)) = self.workers.get_mut(index) {
            io.doorbell_limit.news();
        }
        changed
    }

    /// A worker has written to its eventfd. One that does so all the time is not listened to for a while.
    fn rang(&mut self, key: Key) {
        let now = self.now;
        let Some(io) = self.worker_mut(key) else { return };
        if !io.doorbell_limit.rang(now) {
            return;
        }
        let id = io.id;
        self.muted += 1;
        if let Some(io) = self.io(id) {
            join::forget(self.poll.registry(), &io.lane.doorbell);
        }
        let pool = self.core.pool_of_worker(id);
        if let Some(suppressed) = self.limits.allow(self.now, pool, Cause::Broken) {
            log::warn!("event=worker_rings_idly {} left_out={suppressed}", self.worker(id));
        }
    }

    /// Listens again to workers that were muted.
    fn listen_again(&mut self) {
        if self.muted == 0 {
            return;
        }
        let registry = self.poll.registry();
        for io in self.workers.iter_mut().flatten() {
            if io.doorbell_limit.unmute(self.now) {
                self.muted -= 1;
                let token = Source::Doorbell(Key::from(io.id)).token();
                let raw = io.lane.doorbell.as_raw_fd();
                // Without it, the next turn that something else brings about sees what it takes.
                let _ = registry.register(&mut SourceFd(&raw), token, Interest::READABLE);
            }
        }
    }

    /// Asks workers to ring the doorbell, looks once more, and says how long to sleep.
    ///
    /// No worker is asked to ring while there is work: the next turn looks at the scoreboards anyway.
    fn before_sleep(&mut self) -> Option<Duration> {
        self.watch_queued();
        let clients = self.watch_listeners();
        if clients || self.handshakes.ready || self.side_ready {
            return Some(Duration::ZERO);
        }
        let mut changed = false;
        // Some have tickets and are not asked.
        let mut grace_applies = false;
        let room = self.core.wants_room();
        for index in 0..self.workers.len() {
            let has_tickets = self.core.has_tickets(index as u32);
            if !room && (!has_tickets || self.in_grace) {
                grace_applies |= has_tickets;
                continue;
            }
            let Some(io) = self.workers.get(index).and_then(Option::as_ref) else { continue };
            let wants = self.core.wants(io.id);
            // One that is not listened to is looked at as often as that.
            if io.doorbell_limit.muted_until.is_some() {
                grace_applies |= has_tickets;
                continue;
            }
            // A pool that is full is no reason to ask the workers of others.
            if self.in_grace && wants & slot::want::ROOM == 0 {
                grace_applies |= has_tickets;
            } else if wants != 0 {
                slot::arm(io.lane.board.want(), wants);
                changed |= self.scan(index);
            }
        }
        if changed {
            return Some(Duration::ZERO);
        }
        let paused = self.listeners.iter().filter_map(|listener| listener.paused_until).min();
        let leaving = self.listeners.iter().filter_map(ListenerIo::due).min();
        self.suppressed_due = self.limits.due();
        let muted = (self.muted > 0).then(|| {
            let muted =
                self.workers.iter().flatten().filter_map(|io| io.doorbell_limit.muted_until);
            muted.min().unwrap_or(self.now)
        });
        let deadlines =
            [self.core.deadline(), paused, leaving, self.closing_due, muted, self.suppressed_due];
        let next = deadlines.into_iter().flatten().min();
        let grace = grace_applies.then(|| self.now + WAKEUP_GRACE);
        let rest = self.scan_due.then(|| self.scanned_all + SCAN_ALL);
        let next = next.into_iter().chain(grace).chain(rest).min()?;
        Some(next - clock())
    }
}

#[cfg(test)]
mod tests;
