//! What the core asks for. The event loop performs each effect in order, and reports back where the comment says so.

use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::GaugeName;
use dispatch_protocol::wire::EntryFlags;

use super::drain::Notice;
use super::types::*;

/// One thing for the event loop to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Write SENT into the slot and send the connection (records may be gathered per worker until the end of the turn).
    /// On failure: [`super::Core::send_failed`].
    /// `tell`: it was taken back from another worker that failed it, which an operator may want to read.
    Send {
        worker: WorkerId,
        conn: ConnId,
        ticket: Ticket,
        listener: ListenerId,
        flags: EntryFlags,
        tell: bool,
    },
    /// Write SENT into the slot and send a probe. On failure: [`super::Core::probe_failed`].
    Probe { worker: WorkerId, ticket: Ticket },
    /// Send a notice. On failure: [`super::Core::notice_failed`].
    Tell { worker: WorkerId, notice: Notice },
    /// Try to revoke the slot. Always: [`super::Core::revoked`] with the outcome.
    Revoke { worker: WorkerId, ticket: Ticket },
    /// Empty the worker's channel through the retained end, closing what comes out. What is asked for afterwards is sent when
    /// that is done: the event loop keeps it back, so that nothing new is taken out. Always: [`super::Core::purged`].
    Purge { worker: WorkerId },
    /// The worker has the connection: close the copy of the dispatcher, then write RELEASED.
    Release { worker: WorkerId, conn: ConnId, ticket: Ticket },
    /// Close the connection; for [`CloseReason::NoWorker`] send the pool's `unavailable_response` first. If it is `shared`, a
    /// worker that had it may still hold a copy: then a close alone ends nothing, it must be shut down.
    Close { conn: ConnId, reason: CloseReason, shared: bool },
    /// Cut the worker off: close its channel and control connection. [`super::Core::leave`] has already happened.
    Disconnect { worker: WorkerId, reason: &'static str },
    /// Nothing refers to this worker any more: drop everything kept for it.
    Forget { worker: WorkerId },
    /// Start this process. Always: [`super::Core::spawned`], and later [`super::Core::exited`].
    Spawn { process: ProcessId },
    /// The dispatcher is stopping and this pool is done: end its processes.
    StopProcesses { pool: PoolId },
    /// Something an operator may want to read.
    Event(Event),
}

/// Something that happened, for the log. The event loop writes it out; nothing depends on it.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A worker joined, holding `live` connections already.
    Joined { worker: WorkerId, live: u64 },
    /// A worker said goodbye; `resent` untaken connections went elsewhere, `live` stay with it.
    Goodbye { worker: WorkerId, resent: u32, live: u64 },
    /// A worker is gone: `resent` untaken connections went elsewhere, `live` were being served by it.
    Gone { worker: WorkerId, why: Departure, resent: u32, live: u64 },
    /// A worker left a connection untaken for `waited`: `revoked` went elsewhere at once.
    Suspect { worker: WorkerId, revoked: u32, waited: Duration },
    /// An operator drains the worker, which has `live` connections, until `deadline` from now.
    Draining { worker: WorkerId, live: u64, deadline: Option<Duration> },
    /// That deadline has come: `resent` untaken connections went elsewhere, and the worker shall end the `live` ones; it
    /// cannot be `told` if its SDK is too old.
    DrainOver { worker: WorkerId, resent: u32, live: u64, told: bool },
    /// An operator has made the worker active again.
    Resumed { worker: WorkerId },
    /// A worker takes no connections for now: `resent` untaken ones went elsewhere, `live` stay with it.
    Paused { worker: WorkerId, resent: u32, live: u64 },
    /// A worker has another weight or maximum, or ended its pause: these are in force.
    Updated { worker: WorkerId, weight: u32, max: u32, paused: bool },
    /// A suspect worker took a connection.
    Trusted { worker: WorkerId, after: Duration },
    /// A worker reported that `lost` connections did not reach it; it is treated as full for a moment.
    Lost { worker: WorkerId },
    /// The worker's channel was full.
    ChannelFull { worker: WorkerId },
    /// A counter was impossible and has been clamped: `what` names it.
    Clamped { worker: WorkerId, what: &'static str, said: u64, used: u64 },
    /// A gauge, or its name, was impossible. Said once for each worker and problem.
    BadGauge { worker: WorkerId, gauge: Option<GaugeName>, problem: GaugeProblem },
    /// The pool's last usable worker is gone; clients wait.
    NoUsableWorker { pool: PoolId },
    /// No worker came for `wait_for_worker`, or, if the pool is `unserved`, none took anything: clients are refused from now
    /// on.
    Refusing { pool: PoolId, closed: u32, unserved: bool },
    /// Clients are still refused, for the time `since`.
    StillRefusing { pool: PoolId, unserved: bool, since: Duration },
    /// A worker has taken a connection: clients are not refused any more.
    Served { pool: PoolId },
    /// Every usable worker is full or suspect: clients wait in the kernel's queue.
    BackPressure { pool: PoolId },
    /// A worker has room again.
    Relieved { pool: PoolId },
    /// Short of descriptors or memory; everything waits for `pause`.
    OutOfResources { pause: Duration },
    /// A process ended or did not start; it is started again after `delay`.
    Restarting { process: ProcessId, delay: Duration },
}
