//! The decision core: which worker gets which connection, and what becomes of it until the worker has it.
//!
//! Owns worker states, policies, the custody ledger, deadlines and supervision. Facts and the time go in as
//! arguments; effects come out of [`Core::effect`] as values. It never touches a file descriptor, a clock, a socket or
//! a log, so a test or a simulator can drive it through any history, and the same history gives the same decisions.
//!
//! The shell's turn: report what happened (joins, goodbyes, deaths, `finished` counters, slots), call
//! [`Core::tick`], accept while [`Core::accepting`] says so, perform all effects, sleep until [`Core::deadline`].
//!
//! Invariants, checked after every public mutator in debug builds and tests (`Core::check`):
//! 1. `accepted = held + custody + taken + Σ closed`.
//! 2. Every connection is in exactly one place: one worker's ticket, or one pool's queue of held ones.
//! 3. A worker's load is `base + taken + untaken − finished`, never below what it certainly has.
//! 4. A slot has at most one ticket; sequence numbers of a worker only grow.
//! 5. Cached eligibility and counts equal what a full recount gives.

mod effect;
mod types;

pub use effect::{Effect, Event};
pub use types::*;

use worker_sdk::scoreboard::claim::{Revoke, SlotState};

/// The state of all pools of one dispatcher.
#[derive(Debug)]
pub struct Core {}

impl Core {
    /// A core with these pools and listeners, no workers, and the clock at `now`.
    pub fn new(pools: Vec<PoolSettings>, listeners: Vec<ListenerSettings>, now: Time) -> Core {
        todo!()
    }

    // --- workers ---------------------------------------------------------------------------

    /// A worker wants to join. On success the shell gives it its channel, and from then on it is chosen.
    /// The shell calls this only once it has everything a welcome needs.
    pub fn join(&mut self, now: Time, join: &Join) -> Result<WorkerId, Refusal> {
        todo!()
    }

    /// A worker said goodbye: revoke (and purge) what is untaken, send it nothing more.
    pub fn goodbye(&mut self, now: Time, worker: WorkerId) {
        todo!()
    }

    /// A worker is gone. Its untaken connections are revoked and placed again; when the last is sorted out: Event::Gone, Forget.
    /// For `Expelled`, effect Disconnect comes first. A stale id is ignored, here and everywhere.
    pub fn leave(&mut self, now: Time, worker: WorkerId, why: Departure) {
        todo!()
    }

    /// The worker's `finished` counter reads `finished`. Call before reporting slots of the same scan… (see below: clamping
    /// needs the slots of the same scan, so the shell calls: read finished; report slots; then this with the value read.)
    pub fn finished(&mut self, now: Time, worker: WorkerId, finished: u64) {
        todo!()
    }

    /// A slot of the worker that holds `ticket` reads `state` (`Sent` is ignored; `Invalid` expels the worker).
    pub fn slot(&mut self, now: Time, worker: WorkerId, ticket: Ticket, state: SlotState) {
        todo!()
    }

    /// The outcome of an [`Effect::Revoke`].
    pub fn revoked(&mut self, now: Time, worker: WorkerId, ticket: Ticket, outcome: Revoke) {
        todo!()
    }

    /// The tickets a worker has not yet resolved (SENT as far as we know), oldest first.
    pub fn tickets(&self, worker: WorkerId) -> impl Iterator<Item = Ticket> + '_ {
        std::iter::empty()
    }

    // --- connections -----------------------------------------------------------------------

    /// What to do with a listener's queue now. O(1).
    pub fn accepting(&self, listener: ListenerId) -> Accepting {
        todo!()
    }

    /// A connection was accepted. It is placed (effect Send), held, or closed at once (when refusing).
    pub fn accepted(&mut self, now: Time, client: Client) -> ConnId {
        todo!()
    }

    /// A held connection's client is gone (the shell saw a reset). In custody: ignored.
    pub fn client_gone(&mut self, now: Time, conn: ConnId) {
        todo!()
    }

    /// An [`Effect::Send`] could not be carried out. The shell has already taken the slot back.
    pub fn send_failed(&mut self, now: Time, worker: WorkerId, ticket: Ticket, why: SendFailure) {
        todo!()
    }

    /// An [`Effect::Probe`] could not be carried out; it is tried again after `handoff_timeout`.
    pub fn probe_failed(&mut self, now: Time, worker: WorkerId, ticket: Ticket, why: SendFailure) {
        todo!()
    }

    // --- processes -------------------------------------------------------------------------

    /// A process was started (`true`) or could not be.
    pub fn spawned(&mut self, now: Time, process: ProcessId, started: bool) {
        todo!()
    }

    /// A process ended.
    pub fn exited(&mut self, now: Time, process: ProcessId) {
        todo!()
    }

    // --- time ------------------------------------------------------------------------------

    /// Lets everything happen that was due by `now`.
    pub fn tick(&mut self, now: Time) {
        todo!()
    }

    /// When [`Core::tick`] should be called next at the latest.
    pub fn deadline(&self) -> Option<Time> {
        todo!()
    }

    /// Stop: accept nothing new, empty custody until `deadline`; then place what is held wherever a slot is free, and close the rest.
    pub fn stop(&mut self, now: Time, deadline: Time) {
        todo!()
    }

    /// Whether a stop is complete: nothing held, nothing in custody, or the deadline has passed.
    pub fn stopped(&self) -> bool {
        todo!()
    }

    /// The next effect, in order. The shell takes all of them before it sleeps.
    pub fn effect(&mut self) -> Option<Effect> {
        todo!()
    }

    // --- for the shell's sleep, and for people ---------------------------------------------

    /// Bits of the `want` word for this worker: TAKEN when something is out, ROOM when its pool cannot place a connection.
    pub fn wants(&self, worker: WorkerId) -> u32 {
        todo!()
    }

    /// Everything, for the status.
    pub fn status(&self) -> crate::status::Status {
        todo!()
    }
}
