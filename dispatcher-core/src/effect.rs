//! The effects of the core. The event loop performs them in order, and reports the outcome where
//! the comment says so.

use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::GaugeName;
use dispatch_protocol::wire::EntryFlags;

use super::drain::Notice;
use super::steer::SteerSettings;
use super::supervise::{EndReason, Generation, Replacement, StepFailure};
use super::types::*;

/// An action that the event loop performs.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Write SENT into the slot and send the connection (records may be gathered per worker until
    /// the end of the turn). On failure: [`super::Core::send_failed`]. `log`: the connection was
    /// revoked from a worker that left it untaken; the event loop logs the resend.
    Send {
        worker: WorkerId,
        conn: ConnId,
        ticket: Ticket,
        listener: ListenerId,
        flags: EntryFlags,
        log: bool,
    },
    /// Write SENT into the slot and send a probe. On failure: [`super::Core::probe_failed`].
    Probe { worker: WorkerId, ticket: Ticket },
    /// Send a notice. On failure: [`super::Core::notice_failed`].
    Notify { worker: WorkerId, notice: Notice },
    /// Try to revoke the slot. Always: [`super::Core::revoked`] with the outcome.
    Revoke { worker: WorkerId, ticket: Ticket },
    /// Empty the worker's channel through the retained end, and close the descriptors that come
    /// out. The event loop delays later sends to this worker until the purge is complete, so that
    /// it removes nothing new. Always: [`super::Core::purged`].
    Purge { worker: WorkerId },
    /// The worker took the connection: close the dispatcher's copy, then write RELEASED.
    Release { worker: WorkerId, conn: ConnId, ticket: Ticket },
    /// Close the connection; for [`CloseReason::NoWorker`] send the pool's `unavailable_response`
    /// first. `shared`: a worker that had it may still hold a copy, so the connection must be shut
    /// down, because a close alone would not end it.
    Close { conn: ConnId, reason: CloseReason, shared: bool },
    /// Disconnect the worker: close its channel and control connection. The core has already
    /// removed it.
    Disconnect { worker: WorkerId, reason: &'static str },
    /// Nothing refers to this worker any more: drop its data.
    Forget { worker: WorkerId },
    /// Start this process. Always: [`super::Core::spawned`], and later [`super::Core::exited`].
    Spawn { process: ProcessId },
    /// End a process and its process group: SIGTERM, and SIGKILL after `timeout`. Always:
    /// [`super::Core::exited`].
    StopProcess { process: ProcessId, timeout: Duration },
    /// The dispatcher is stopping and has released the pool of this process: end it. Its workers
    /// had connections, or none.
    EndProcess { process: ProcessId, has_connections: bool },
    /// Check whether the worker of this process is ready, with connections of the dispatcher: each
    /// is sent by [`super::Core::send_check`]. Always: [`super::Core::checked`], or the process
    /// ends.
    CheckReady { process: ProcessId, worker: WorkerId },
    /// Write SENT into the slot and send a connection of a ready check. On failure:
    /// [`super::Core::check_failed`].
    SendCheck { worker: WorkerId, ticket: Ticket },
    /// The connection of a ready check is not in flight any more: `taken`, close the dispatcher's
    /// copy, then write RELEASED; else close it.
    CheckOver { worker: WorkerId, ticket: Ticket, taken: bool },
    /// Have the kernel treat a steered worker like this, from its next connection on.
    Steer { worker: WorkerId, settings: SteerSettings },
    /// Move the connections that wait in the accept queue of a steered worker to other workers.
    MoveQueue { worker: WorkerId },
    /// Write an event to the log.
    Event(Event),
}

/// An event for the log. Nothing depends on it.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A worker joined with `live` connections.
    Joined { worker: WorkerId, live: u64 },
    /// A worker said goodbye; `resent` untaken connections went to other workers, `live` stay with
    /// it.
    Goodbye { worker: WorkerId, resent: u32, live: u64 },
    /// A worker is gone: `resent` untaken connections went to other workers, it served `live`.
    Gone { worker: WorkerId, why: Departure, resent: u32, live: u64 },
    /// A worker left a connection untaken for `waited`: `revoked` connections moved at once.
    Suspect { worker: WorkerId, revoked: u32, waited: Duration },
    /// An operator drains the worker, which has `live` connections, until `deadline` from now.
    Draining { worker: WorkerId, live: u64, deadline: Option<Duration> },
    /// The deadline of a drain: `resent` untaken connections went to other workers, and the worker
    /// ends the `live` ones; not `notified` if its SDK is too old for notices.
    DrainOver { worker: WorkerId, resent: u32, live: u64, notified: bool },
    /// An operator resumed the worker.
    Resumed { worker: WorkerId },
    /// An operator drains the host, which has `live` connections: after `after` its workers get no
    /// connections, and `deadline` from now they end those that remain.
    HostDraining { live: u64, after: Duration, deadline: Option<Duration> },
    /// An operator ended the drain of the host.
    HostResumed,
    /// A worker paused: `resent` untaken connections went to other workers, `live` stay with it.
    Paused { worker: WorkerId, resent: u32, live: u64 },
    /// A worker changed its weight or maximum, or ended its pause: the values now used.
    Updated { worker: WorkerId, weight: u32, max: u32, paused: bool },
    /// A suspect worker took a connection.
    Trusted { worker: WorkerId, after: Duration },
    /// A worker reported that a connection did not reach it; it counts as full for a moment.
    Lost { worker: WorkerId },
    /// The worker's channel was full.
    ChannelFull { worker: WorkerId },
    /// A worker's counter, named by `what`, was impossible and has been clamped.
    Clamped { worker: WorkerId, what: &'static str, said: u64, used: u64 },
    /// A gauge, or its name, was impossible. Reported once for each worker and problem.
    BadGauge { worker: WorkerId, gauge: Option<GaugeName>, problem: GaugeProblem },
    /// The pool has no usable worker any more; clients wait.
    NoUsableWorker { pool: PoolId },
    /// The pool had no usable worker or, if `unserved`, no take for `wait_for_worker`: clients are
    /// refused from now on.
    Refusing { pool: PoolId, closed: u32, unserved: bool },
    /// Clients have been refused for the time `since`.
    StillRefusing { pool: PoolId, unserved: bool, since: Duration },
    /// A worker took a connection: clients are no longer refused.
    Served { pool: PoolId },
    /// Every usable worker is full or suspect: clients wait in the kernel's queue.
    BackPressure { pool: PoolId },
    /// A worker has room again.
    Relieved { pool: PoolId },
    /// The dispatcher is short of descriptors or memory; nothing is placed for `pause`.
    OutOfResources { pause: Duration },
    /// A process ended or did not start; it is restarted after `delay`.
    Restarting { process: ProcessId, delay: Duration },
    /// A process is replaced: the next one starts beside it.
    Replacing { process: ProcessId, why: Replacement },
    /// A process was told to end.
    ProcessStopped { process: ProcessId, reason: EndReason },
    /// So many starts of processes in the place of this one have failed in succession.
    CrashLoop { process: ProcessId, failures: u32 },
    /// A process of the pool has stayed: the crash loop is over.
    CrashLoopOver { pool: PoolId },
    /// A roll stopped, because this process of the new generation did not become ready.
    RollStopped { process: ProcessId, cause: StepFailure },
    /// A roll is done: every process is of this generation.
    Rolled { pool: PoolId, generation: Generation },
}
