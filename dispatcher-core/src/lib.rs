//! The decision core: chooses the worker for each connection, and follows the connection until the
//! worker's application has taken it.
//!
//! Owns worker states, policies, the ledger of connections in flight, deadlines and supervision.
//! Facts and the time go in as arguments; effects come out of [`Core::effect`] as values. The core
//! never touches a file descriptor, a clock, a socket or a log, so a test or a simulator can drive
//! it through any history, and the same history gives the same decisions.
//!
//! The event loop's turn: report what happened (joins, goodbyes, deaths, `finished` counters,
//! slots), call [`Core::tick`], accept while [`Core::accepting`] says so, perform all effects,
//! sleep until [`Core::deadline`].
//!
//! Invariants, checked after every public mutator in debug builds and tests (`Core::check`):
//! 1. `accepted + returned = queued + in flight + taken + Σ closed`.
//! 2. Every connection is in exactly one place: the ticket of one worker, or the queue of one pool.
//! 3. A worker's load is `base + taken + untaken − finished`, never below what it certainly has.
//! 4. A slot has at most one ticket; sequence numbers of a worker only grow.
//! 5. Cached eligibility and counts equal what a full recount gives.

mod access_control;
mod admit;
pub mod advice;
mod affinity;
mod awaiting;
mod change;
mod check;
mod dirty;
mod discarded;
mod drain;
mod effect;
mod gauges;
mod handoff;
mod health;
pub mod histogram;
mod history;
mod host;
mod in_flight;
mod ledger;
mod line;
mod place;
mod policy;
mod proxy;
mod random;
mod ready_check;
mod redispatch;
mod ring;
mod snapshot;
mod steer;
mod stop;
mod supervise;
mod trust;
mod types;
mod weights;
mod worker;

pub use access_control::{AccessControl, AccessRules, Rate};
pub use affinity::ClaimOutcome;
pub use affinity::key::{ClientIdentity, KeySource};
pub use discarded::Discarded;
pub use drain::{COUNT_FIRST, CannotResume, Notice};
pub use effect::{Effect, Event};
pub use gauges::MAX_GAUGE_VALUE;
pub use health::LOST_PAUSE;
pub use history::{CandidateSnapshot, Decision, Explanation, Obstacle};
pub use host::{HostDrainSnapshot, HostState};
pub use line::{LineJoin, LineSnapshot, Recovery};
pub use proxy::{HeaderSeen, ProxyControl, ProxyRules};
pub use random::Random;
pub use ring::SPARE_SLOTS;
pub use snapshot::{
    AffinitySnapshot, HeaderSnapshot, ListenerSnapshot, PoolSnapshot, PoolState, ProcessSnapshot,
    Snapshot, Totals, WorkerSnapshot,
};
pub use steer::{SteerCounts, SteerJoin, SteerSettings};
pub use supervise::{
    EndReason, Generation, LeavingGeneration, PREFERRED_LOAD, ProcessCounts, ProcessTotals,
    RESTART_MAX, RESTART_MIN, RESTART_RESET, Replacement, Roll, RollBegun, RollRefusal, RollState,
    StepFailure, Supervision, Surge,
};
pub use types::*;

use std::collections::VecDeque;
use std::time::Duration;

use dispatch_protocol::scoreboard::slot::{Revoke, SlotState};

use crate::histogram::Histogram;

use access_control::UNTRACKED;
use affinity::Memory;
use awaiting::Awaiting;
use handoff::Shares;
use history::History;
use host::HostDrain;
use ledger::{Ledger, Place, PoolQueue};
use line::Tracked;
use place::WorkerWait;
use policy::{Candidates, NEVER};
use proxy::Headers;
use snapshot::{Counts, RetiredCounts};
use stop::Stop;
use supervise::Processes;
use worker::Worker;

/// Default of the pause of all placements after [`SendFailure::Resources`];
/// [`Core::set_resource_pause`] changes it.
const RESOURCE_PAUSE: Duration = Duration::from_millis(100);

/// The state of all pools of one dispatcher.
#[derive(Debug)]
pub struct Core {
    pools: Vec<Pool>,
    listeners: Vec<Listener>,
    /// An entry outlives its worker until another worker reuses it, so that an index is always
    /// valid.
    workers: Vec<Worker>,
    /// Number of open tickets by `WorkerId::index`. Apart from the workers, because every turn
    /// reads it for all of them.
    out: Vec<u32>,
    /// Whether each worker has connections, by `WorkerId::index`, for the same reason.
    live: Vec<bool>,
    free_workers: Vec<u32>,
    joins: u64,
    ledger: Ledger,
    /// Connections of workers of the line protocol.
    tracked: Tracked,
    totals: Totals,
    effects: VecDeque<Effect>,
    resource_pause: Duration,
    /// `Some` while nothing is placed because this machine is short of descriptors or memory.
    out_of_resources: Option<Time>,
    stop: Option<Stop>,
    host_drain: Option<HostDrain>,
    /// Connections that workers had at the deadlines of their drains and were notified to end.
    ended: u64,
    discarded: Vec<Discarded>,
    /// Counts of removed listeners and pools whose entries have been reused.
    retired_counts: RetiredCounts,
    #[cfg(any(test, debug_assertions))]
    check_credit: usize,
}

#[derive(Debug)]
struct Listener {
    settings: ListenerSettings,
    pool: usize,
    accepted: u64,
    /// In the order of [`CloseReason::ALL`].
    closed: [u64; CloseReason::ALL.len()],
    /// `None` admits every client.
    access_control: Option<Box<AccessControl>>,
    /// Connections whose PROXY header is awaited, and the rules about them.
    headers: Headers,
    /// Removed from the configuration: its queue is emptied, then it is closed.
    retired: bool,
    /// The event loop has closed its sockets.
    closed_for_good: bool,
    /// Workers whose join number is above the first value and at most the second know this
    /// listener's name by its id.
    named_for: (u64, u64),
}

#[derive(Debug)]
struct Pool {
    settings: PoolSettings,
    candidates: Candidates,
    history: History,
    /// When gauges that are read at intervals are due next.
    sample_at: Time,
    /// `Some` iff the settings have an affinity key.
    memory: Option<Memory>,
    awaiting: Awaiting,
    queued: PoolQueue,
    /// Workers active or suspect.
    usable: u32,
    /// Connections sent to its workers and not yet taken.
    untaken: u32,
    /// Connections that its line workers had perhaps not read when they left, as long as that is
    /// not known.
    unrecovered: u32,
    /// Sums over its workers.
    shares: Shares,
    /// Queued connections wait until then for the outcome of a trial.
    trial_until: Time,
    /// New connections wait until then for the first takes of untested workers.
    first_until: Time,
    ticked: Time,
    /// Workers that failed every trial get no trial before then.
    retrial_wait: Option<Time>,
    /// When a connection may next move to an idle thread.
    idle_at: Option<Time>,
    worker_wait: WorkerWait,
    /// Since when connections have waited without any being taken.
    unserved: Option<Time>,
    refusing_since: Time,
    /// When, and after which interval, the log repeats that clients are refused.
    refusal_logged_at: Time,
    refusal_interval: Duration,
    /// Clients wait because no worker can be given a connection.
    pressure: bool,
    /// Whether the last logged state was back-pressure, and when it was logged.
    pressure_reported: bool,
    pressure_at: Option<Time>,
    processes: Processes,
    counts: Counts,
    /// From accept to take.
    handoff: Histogram,
    /// Removed from the configuration: no worker can join it.
    retired: bool,
    /// Since when the pool had been without a usable worker, or without a take, when it began to
    /// refuse clients.
    lacking_since: Time,
    /// The dispatcher is stopping, and this pool has nothing left to do.
    released: bool,
}

impl Core {
    /// A core with these pools and listeners, no workers, and the time `now`. The configuration
    /// guarantees that each listener's pool is one of `pools`.
    pub fn new(pools: Vec<PoolSettings>, listeners: Vec<ListenerSettings>, now: Time) -> Core {
        let mut effects = VecDeque::new();
        let mut seeds = Random::new(0);
        let pools = (0..)
            .map(PoolId)
            .zip(pools)
            .map(|(id, settings)| Pool::new(id, settings, now, &mut seeds, &mut effects))
            .collect();
        let listeners = listeners.into_iter().map(|settings| Listener::new(settings, 0)).collect();
        Core {
            pools,
            listeners,
            workers: Vec::new(),
            out: Vec::new(),
            live: Vec::new(),
            free_workers: Vec::new(),
            joins: 0,
            ledger: Ledger::default(),
            tracked: Tracked::default(),
            totals: Totals::default(),
            effects,
            resource_pause: RESOURCE_PAUSE,
            out_of_resources: None,
            stop: None,
            host_drain: None,
            ended: 0,
            discarded: Vec::new(),
            retired_counts: RetiredCounts::default(),
            #[cfg(any(test, debug_assertions))]
            check_credit: 0,
        }
    }

    /// Sets how long nothing is placed after [`SendFailure::Resources`].
    pub fn set_resource_pause(&mut self, pause: Duration) {
        self.resource_pause = pause;
    }

    // --- workers ---------------------------------------------------------------------------

    /// A worker said goodbye: its untaken connections are revoked and purged, and it gets no more.
    pub fn goodbye(&mut self, now: Time, worker: WorkerId) {
        if let Some(w) = self.find(worker) {
            self.say_goodbye(now, w);
            self.after(now, self.workers[w].pool);
        }
    }

    /// A worker is gone. Its untaken connections are revoked and placed again; once the last
    /// outcome is known, `Event::Gone` and `Effect::Forget` follow. For `Expelled`,
    /// `Effect::Disconnect` comes first. This method and all others ignore a stale id.
    pub fn leave(&mut self, now: Time, worker: WorkerId, why: Departure) {
        if let Some(w) = self.find(worker) {
            self.remove(now, w, why);
            self.after(now, self.workers[w].pool);
        }
    }

    /// The worker's `finished` counter. The event loop reads the counter, reads and reports the
    /// slots, then calls this; so a correct counter never exceeds the takes that the core knows of.
    pub fn finished(&mut self, now: Time, worker: WorkerId, finished: u64) {
        if let Some(w) = self.find(worker)
            && self.set_finished(now, w, finished)
        {
            self.after(now, self.workers[w].pool);
        }
    }

    /// A slot of the worker that holds `ticket` reads `state` (`Sent` is ignored; `Invalid` expels
    /// the worker).
    ///
    /// `taken_at` is the time of the take as the worker reports it; an impossible time is clamped.
    pub fn slot(
        &mut self,
        now: Time,
        worker: WorkerId,
        ticket: Ticket,
        state: SlotState,
        taken_at: Time,
    ) {
        if let Some(w) = self.find(worker)
            && state != SlotState::Sent
        {
            self.resolve(now, w, ticket, state, taken_at);
            self.after(now, self.workers[w].pool);
        }
    }

    /// The outcome of an [`Effect::Revoke`].
    pub fn revoked(&mut self, now: Time, worker: WorkerId, ticket: Ticket, outcome: Revoke) {
        if let Some(w) = self.find(worker) {
            match outcome {
                Revoke::Revoked => self.take_back(now, w, ticket),
                Revoke::Was(state) => self.resolve(now, w, ticket, state, now),
            }
            self.after(now, self.workers[w].pool);
        }
    }

    // --- connections -----------------------------------------------------------------------

    /// What to do with a listener's queue now. O(1).
    pub fn accepting(&self, listener: ListenerId) -> Accepting {
        let listener = &self.listeners[usize::from(listener.0)];
        let pool = &self.pools[listener.pool];
        if self.stop.is_some() || listener.retired {
            Accepting::Finish
        } else if pool.settings.steered {
            Accepting::Pause
        } else if pool.worker_wait == WorkerWait::Refusing {
            Accepting::Refuse
        } else if self.out_of_resources.is_none()
            && pool.candidates.opens() > 0
            && pool.queued.is_empty()
        {
            // Even without room one connection is accepted: its place in the queue shows that
            // clients wait.
            Accepting::Yes
        } else {
            Accepting::Pause
        }
    }

    /// A connection was accepted. The core places it, queues it, awaits its PROXY header (see
    /// [`Core::awaits_header`]) or its first bytes (see [`Core::awaits_bytes`]), or closes it if
    /// the listener's rules deny it or the pool refuses clients.
    pub fn accepted(&mut self, now: Time, mut client: Client) -> ConnId {
        let listener = &mut self.listeners[usize::from(client.listener.0)];
        listener.accepted += 1;
        let pool = listener.pool;
        self.totals.accepted += 1;
        if listener.headers.control.is_some() {
            let conn = self.ledger.open(now, client);
            self.arrive_with_header(now, pool, conn.index, client.header);
            self.after(now, pool);
            return conn;
        }
        if client.key.is_none() {
            client.key = self.pools[pool].settings.policy.key_of(&client.peer);
        }
        let admitted = match &mut listener.access_control {
            Some(access_control) => access_control.admit(now, client.peer),
            None => Ok(UNTRACKED),
        };
        let conn = self.ledger.open(now, client);
        match admitted {
            Ok(place) => {
                self.ledger.get_mut(conn.index).client = place;
                self.arrive(now, pool, conn.index);
            }
            Err(reason) => self.close(conn.index, reason),
        }
        self.after(now, pool);
        conn
    }

    /// Every queued connection. Their number is bounded by what all workers' rings can give back at
    /// once.
    pub fn queued(&self) -> impl Iterator<Item = ConnId> + '_ {
        let queued = self.pools.iter().flat_map(|pool| self.ledger.walk(&pool.queued));
        queued.map(|index| self.ledger.id(index))
    }

    /// The client of a queued or awaited connection is gone: the event loop saw a reset. Ignored
    /// for a connection in flight.
    pub fn client_gone(&mut self, now: Time, conn: ConnId) {
        self.withdraw(now, conn, CloseReason::ClientGone);
    }

    /// Closes a queued or awaited connection; ignores any other.
    fn withdraw(&mut self, now: Time, conn: ConnId, reason: CloseReason) {
        let Some(entry) = self.ledger.find(conn) else {
            return;
        };
        let pool = self.pool_of(entry.listener);
        match entry.place {
            Place::Queued => self.dequeue(pool, conn.index),
            Place::Awaiting => self.end_await(pool, conn.index),
            Place::Header => self.end_header(conn.index),
            Place::Free | Place::InFlight(_) | Place::Kept { .. } | Place::Leaving => return,
        }
        self.close(conn.index, reason);
        self.after(now, pool);
    }

    /// An [`Effect::Send`] failed. The event loop has already taken the slot back.
    pub fn send_failed(&mut self, now: Time, worker: WorkerId, ticket: Ticket, why: SendFailure) {
        if let Some(w) = self.find(worker) {
            self.not_sent(now, w, ticket, why);
            self.after(now, self.workers[w].pool);
        }
    }

    /// An [`Effect::Probe`] failed; the probe is repeated after `handoff_timeout`.
    pub fn probe_failed(&mut self, now: Time, worker: WorkerId, ticket: Ticket, why: SendFailure) {
        if let Some(w) = self.find(worker) {
            self.probe_not_sent(now, w, ticket, why);
            self.after(now, self.workers[w].pool);
        }
    }

    // --- time ------------------------------------------------------------------------------

    /// Runs everything that is due by `now`.
    pub fn tick(&mut self, now: Time) {
        if self.out_of_resources.is_some_and(|until| until <= now) {
            self.out_of_resources = None;
        }
        self.tick_headers(now);
        for pool in 0..self.pools.len() {
            self.pools[pool].ticked = now;
            self.tick_processes(now, pool);
            self.tick_handoffs(now, pool);
            self.tick_workers(now, pool);
            self.tick_awaiting(now, pool);
            self.tick_worker_wait(now, pool);
            self.tick_retired(now, pool);
        }
        self.tick_host(now);
        self.tick_stop(now);
        self.after_all(now);
    }

    /// When [`Core::tick`] should be called next at the latest.
    pub fn deadline(&self) -> Option<Time> {
        let stop = self.stop.filter(|stop| !stop.over);
        self.pools
            .iter()
            .map(|pool| {
                self.refusal_due(pool)
                    .min(self.handoffs_due(pool))
                    .min(pool.candidates.earliest())
                    .min(pool.processes.due())
                    .min(self.awaiting_due(pool))
            })
            .chain(self.listeners.iter().map(|listener| self.headers_due(listener)))
            .chain(self.out_of_resources)
            .chain(self.host_due())
            .chain(stop.map(|stop| stop.deadline))
            .min()
            .filter(|&time| time != NEVER)
    }

    /// The next effect, in order. The event loop takes all of them before it sleeps.
    pub fn effect(&mut self) -> Option<Effect> {
        let effect = self.effects.pop_front()?;
        // Parallel tables of the event loop may have the entry until the event loop has seen this
        // effect.
        match &effect {
            Effect::Release { conn, .. } | Effect::Close { conn, .. } => self.ledger.forget(*conn),
            Effect::Forget { worker } => self.free_workers.push(worker.index),
            Effect::Send { worker, ticket, .. }
            | Effect::Probe { worker, ticket }
            | Effect::SendCheck { worker, ticket } => {
                self.workers[worker.index as usize].ring.offered(*ticket);
            }
            Effect::Revoke { .. }
            | Effect::Notify { .. }
            | Effect::Purge { .. }
            | Effect::Disconnect { .. }
            | Effect::Spawn { .. }
            | Effect::StopProcess { .. }
            | Effect::EndProcess { .. }
            | Effect::CheckReady { .. }
            | Effect::CheckOver { .. }
            | Effect::Steer { .. }
            | Effect::MoveQueue { .. }
            | Effect::Event(_) => {}
        }
        Some(effect)
    }

    // --- inside ----------------------------------------------------------------------------

    /// The index of a worker that is not forgotten.
    fn find(&self, id: WorkerId) -> Option<usize> {
        let index = id.index as usize;
        self.workers.get(index).filter(|worker| worker.id == id && !worker.forgotten).map(|_| index)
    }

    fn pool_of(&self, listener: ListenerId) -> usize {
        self.listeners[usize::from(listener.0)].pool
    }

    fn event(&mut self, event: Event) {
        self.effects.push_back(Effect::Event(event));
    }

    /// Ends every mutator that changes one pool: places connections, reports changes, checks.
    fn after(&mut self, now: Time, pool: usize) {
        self.place_and_report(now, pool);
        #[cfg(any(test, debug_assertions))]
        self.check_sometimes();
    }

    /// Ends every public mutator that may change all pools. The invariants hold again only after
    /// the last pool.
    fn after_all(&mut self, now: Time) {
        for pool in 0..self.pools.len() {
            self.place_and_report(now, pool);
        }
        #[cfg(any(test, debug_assertions))]
        self.check_sometimes();
    }

    fn place_and_report(&mut self, now: Time, pool: usize) {
        self.place_queued(now, pool);
        self.use_idle_threads(now, pool);
        self.note_waiting(now, pool);
        self.report_pressure(now, pool);
    }
}
