//! Pools whose workers the kernel chooses (`mode = "steer"`).
//!
//! A thread of its own ([`thread`]) has the programs and maps: it registers addresses of workers
//! and reads what the kernel counts. It starts with the first such pool, and reports to the hot
//! thread over a bounded mailbox. The hot thread ([`hot`], [`slots`]) passes the reports to the
//! core, and writes what the core decides about workers to a map, which never waits: it applies
//! from the next SYN on.
//!
//! A worker is known by its slot: its number in the maps of its pool. A slot belongs to a process
//! of the dispatcher, or to a member of the configuration; the core has a worker for it as long as
//! it listens or has connections.
//!
//! Processes that share the public ports ([`shared`]) inherit their listeners, which the thread
//! opens. Such a process listens, as far as the hot thread knows, when it has accepted a connection
//! that the thread made to it. Where the programs cannot be loaded, such a pool can do without them
//! ([`hashed`]): then the kernel's hash chooses, and what is decided about workers has no effect.

#![cfg_attr(not(feature = "steer"), allow(dead_code, reason = "the configuration refuses it"))]

mod early;
#[cfg(feature = "steer")]
mod hashed;
mod hot;
#[cfg(feature = "steer")]
mod open;
#[cfg(feature = "steer")]
mod ports;
#[cfg(feature = "steer")]
mod sample;
#[cfg(feature = "steer")]
mod shared;
mod slots;
mod status;
#[cfg(feature = "steer")]
mod thread;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::background::spawner::DirectConnection;
use crate::wake::Wake;
use dispatcher_core::{Policy, PoolId, ProcessId, SteerCounts, SteerSettings, WorkerId};

/// A pool for the thread.
#[derive(Clone, Debug)]
pub(super) struct PoolSpec {
    pub(super) pool: PoolId,
    /// Its name, for the log.
    pub(super) name: String,
    /// The cgroup whose processes are the workers, or that of the dispatcher.
    pub(super) cgroup: Option<PathBuf>,
    /// Where new processes listen.
    pub(super) ip: IpAddr,
    /// Where clients connect.
    pub(super) publics: Vec<Public>,
    /// Processes inherit listeners at these addresses.
    pub(super) shared: bool,
    /// Without programs, the kernel's hash chooses among these.
    pub(super) hash: bool,
    /// The longest time until a process serves.
    pub(super) start_timeout: Duration,
    /// How long clients wait while there is no usable worker.
    pub(super) wait: Duration,
    pub(super) policy: Policy,
    /// The directory on bpffs with which the choice outlives the dispatcher.
    pub(super) pins: Option<PathBuf>,
}

/// An address to which clients connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Public {
    /// The name of the listener.
    pub(super) name: String,
    pub(super) address: SocketAddr,
    /// `[::]` does not stand for all IPv4 addresses, too.
    pub(super) ipv6_only: bool,
}

/// A slot of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Slot {
    pub(super) pool: PoolId,
    /// The worker's number in the maps.
    pub(super) number: u32,
}

/// A worker that an earlier dispatcher may have had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Adopt {
    /// Its process; 0 for a member.
    pub(super) pid: i32,
}

/// What a slot belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Holder {
    /// A process of the dispatcher.
    Process(ProcessId),
    /// A member of a pool, by its position in the configuration.
    Member(PoolId, u32),
}

/// Receives a connection to a worker, or why there is none.
pub(super) type Connected = oneshot::Sender<Result<DirectConnection, String>>;

/// What the hot thread asks the thread to do.
#[derive(Debug)]
pub(super) enum SteerCommand {
    /// Attach the programs of a pool: [`SteerEvent::Opened`].
    Open(Box<PoolSpec>),
    /// The settings of a pool have changed; its workers stay.
    Change(Box<PoolSpec>),
    /// Find a slot for a worker: [`SteerEvent::Prepared`], [`SteerEvent::NotPrepared`] or
    /// [`SteerEvent::HasClosed`]. Without an address it gets a free one, or listeners. `adopt`: it
    /// may listen already.
    Prepare { pool: PoolId, holder: Holder, address: Option<SocketAddr>, adopt: Option<Adopt> },
    /// Every worker of an earlier dispatcher was asked for: other slots are freed.
    Sweep(PoolId),
    /// Move what waits in the queue of a worker with an inherited listener to other workers:
    /// [`SteerEvent::QueueMoved`].
    MoveQueue(Slot),
    /// Make a connection to a worker with an inherited listener.
    Connect(Slot, Connected),
    /// The process of a slot runs. For pools that the kernel's hash serves.
    Runs(Slot, i32),
    /// The worker will not come back. `returns`: another process follows in its place.
    Free { slot: Slot, returns: bool },
    /// The pool is removed: detach its programs.
    Close(PoolId),
    /// End the thread. The choice goes on for these pools, if it has pins.
    End(HashSet<PoolId>, Sender<()>),
}

/// How a pool was opened.
#[derive(Debug, Default)]
pub(super) struct Opened {
    /// The choice outlives the dispatcher.
    pub(super) pinned: bool,
    /// Programs and counts are those of an earlier dispatcher.
    pub(super) adopted: bool,
    /// Why the choice does not outlive the dispatcher although it is to.
    pub(super) not_pinned: Option<String>,
    /// There are no programs, for this reason: the kernel's hash chooses.
    pub(super) hashed: Option<String>,
    /// For what the core decides about workers: it applies from the next SYN on.
    #[cfg(feature = "steer")]
    pub(super) writer: Option<dispatch_steer::Writer>,
}

/// What the thread reports.
#[derive(Debug)]
pub(super) enum SteerEvent {
    /// The kernel chooses the workers of this pool, or why it cannot.
    Opened(PoolId, Result<Opened, String>),
    /// The worker is to listen at this address, or inherits these listeners.
    Prepared { holder: Holder, slot: Slot, address: SocketAddr, listeners: Vec<(String, OwnedFd)> },
    /// There is no slot for it.
    NotPrepared { holder: Holder, address: Option<SocketAddr>, error: String },
    /// A process of an earlier dispatcher has closed its listeners.
    HasClosed(Holder),
    /// A worker listens.
    Listens(Slot, SteerCounts),
    /// It has closed its last listener.
    Closed(Slot, SteerCounts),
    /// What the kernel counts for it.
    Counts(Slot, SteerCounts),
    /// Why it gets no connections although it listens; `None` if it does again.
    Problem(Slot, Option<String>),
    /// Why the connections of a process are not known; `None` if they are again.
    NotCounted(Slot, Option<String>),
    /// The thread has written the settings of a worker while it moved its queue.
    QueueMoved(Slot),
    /// What the kernel counts for a pool.
    Totals(PoolId, SteerTotals),
    /// Counts of a pool differed from the kernel's list of sockets, and were corrected.
    Corrected(PoolId, Vec<String>),
    /// The counts of a pool cannot be read, or its settings cannot be written.
    Failed(PoolId, String),
}

/// What the kernel counts for a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SteerTotals {
    /// SYNs given to a worker.
    pub(super) chosen: u64,
    /// SYNs dropped because all workers were at their maximum.
    pub(super) full: u64,
    /// SYNs dropped while no worker was usable.
    pub(super) waited: u64,
    /// SYNs reset because no worker was usable.
    pub(super) unserved: u64,
    /// Workers whose listener could not be given a connection.
    pub(super) failed: u64,
}

/// The hot thread's table.
#[derive(Debug, Default)]
pub(super) struct Steers {
    /// The thread has reported.
    pub(super) ready: bool,
    running: Option<SteerHandle>,
    pools: HashMap<PoolId, SteeredPool>,
    slots: HashMap<Slot, SlotIo>,
    workers: HashMap<WorkerId, Slot>,
    /// Workers of before that were asked for, with their process ids.
    expected: HashMap<Holder, i32>,
    /// Members for which the thread is to find a slot. A reload may change their positions
    /// meanwhile.
    preparing: HashSet<(PoolId, SocketAddr)>,
}

/// One steered pool.
#[derive(Debug, Default)]
struct SteeredPool {
    /// `None` until the kernel has accepted the programs.
    opened: Option<Opened>,
    totals: SteerTotals,
    /// What does not work.
    failure: Option<String>,
}

/// One slot.
#[derive(Debug)]
struct SlotIo {
    holder: Holder,
    address: SocketAddr,
    /// The process id, once the process runs; 0 for a member.
    pid: Option<i32>,
    /// Its worker in the core.
    worker: Option<WorkerId>,
    /// The last counts, if it listens.
    listens: Option<SteerCounts>,
    /// How the kernel is to treat it.
    settings: Option<SteerSettings>,
    problem: Option<String>,
    /// Why its connections are not known.
    not_counted: Option<String>,
}

/// The thread.
#[derive(Debug)]
struct SteerHandle {
    commands: Sender<SteerCommand>,
    events: Receiver<SteerEvent>,
}

/// Starts the thread.
#[cfg(feature = "steer")]
fn start_thread(wake: Wake) -> std::io::Result<SteerHandle> {
    use std::sync::mpsc::{channel, sync_channel};
    let (commands, receiver) = channel();
    let (sender, events) = sync_channel(thread::MAILBOX);
    let seed = std::process::id();
    let thread = thread::SteerThread::new(receiver, sender, wake, seed);
    std::thread::Builder::new().name("steer".to_owned()).spawn(move || thread.run())?;
    Ok(SteerHandle { commands, events })
}

#[cfg(not(feature = "steer"))]
fn start_thread(_wake: Wake) -> std::io::Result<SteerHandle> {
    // The configuration refuses the mode.
    Err(std::io::ErrorKind::Unsupported.into())
}

/// A name for a file of bpffs, where dots are reserved.
fn pin_name(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let mut name = String::new();
    for c in text.trim_start_matches("unix:").chars() {
        match c {
            c if plain(c) => name.push(c),
            c => name.push_str(&format!("_{:x}", u32::from(c))),
        }
    }
    // The longest name of a file; longer ones are told apart by their ends.
    let skip = name.len().saturating_sub(200);
    name.split_off(skip)
}

impl Opened {
    /// Has the kernel treat a worker like this.
    #[cfg(feature = "steer")]
    fn set(&mut self, number: u32, settings: SteerSettings) -> Result<(), String> {
        use dispatch_steer::{FULL_SPEED, WorkerSettings};
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let weight = u16::try_from(settings.weight).unwrap_or(u16::MAX).max(1);
        let settings = WorkerSettings {
            slow_start: settings.slow_start.clamp(1, FULL_SPEED),
            maximum: settings.maximum,
            draining: settings.draining.into(),
            suspect: settings.suspect.into(),
            priority: settings.priority,
            node: settings.node,
            ..WorkerSettings::new(weight)
        };
        writer.set(number, settings).map_err(|error| error.to_string())
    }

    #[cfg(not(feature = "steer"))]
    fn set(&mut self, _number: u32, _settings: SteerSettings) -> Result<(), String> {
        Ok(())
    }
}

impl Steers {
    /// Whether the kernel chooses this worker's connections.
    pub(super) fn has(&self, worker: WorkerId) -> bool {
        self.workers.contains_key(&worker)
    }

    /// Whether the kernel goes on choosing for a pool without this dispatcher.
    pub(super) fn is_pinned(&self, pool: PoolId) -> bool {
        let opened = self.pools.get(&pool).and_then(|pool| pool.opened.as_ref());
        opened.is_some_and(|opened| opened.pinned)
    }

    /// Why the kernel's hash chooses the workers of a pool.
    pub(super) fn hashed(&self, pool: PoolId) -> Option<&str> {
        self.pools.get(&pool)?.opened.as_ref()?.hashed.as_deref()
    }

    fn of_process(&self, process: ProcessId) -> Option<Slot> {
        let of = |(_, io): &(&Slot, &SlotIo)| io.holder == Holder::Process(process);
        self.slots.iter().find(of).map(|(slot, _)| *slot)
    }

    fn send(&self, command: SteerCommand) {
        if let Some(running) = &self.running {
            // The thread ends only when told to.
            let _ = running.commands.send(command);
        }
    }
}
