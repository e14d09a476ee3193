//! The thread that has the programs and maps.
//!
//! It reads the counts of all workers ten times a second: the kernel decides with the counts
//! themselves, so only the view of operators, and the watch over workers that do not accept, are
//! that old.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::time::{Duration, Instant};

use dispatch_steer::{
    Correction, Count, Error, MAX_WORKERS, Options, Policy, Steering, WorkerCounts, WorkerSettings,
    listening, second,
};
use dispatcher_core::{PoolId, SteerCounts};

use super::ports::Ports;
use super::{Opened, PoolSpec, Slot, SteerCommand, SteerEvent, SteerTotals};
use crate::wake::Wake;

/// How often the counts are read.
const TICK: Duration = Duration::from_millis(100);

/// How often listeners are compared with the kernel's list of them, in ticks.
const VERIFY: u32 = 10;

/// How often counts are compared with the kernel's list of all sockets, in ticks.
const RECONCILE: u32 = 300;

/// Most events that wait for the hot thread.
pub(super) const MAILBOX: usize = 256;

pub(super) struct SteerThread {
    commands: Receiver<SteerCommand>,
    events: SyncSender<SteerEvent>,
    wake: Wake,
    pools: BTreeMap<PoolId, PoolMaps>,
    ports: Ports,
    ticks: u32,
    /// There are events that the hot thread was not woken for.
    unannounced: bool,
    /// The hot thread has ended.
    over: bool,
}

/// A pool and its workers.
struct PoolMaps {
    spec: PoolSpec,
    steering: Steering,
    /// The cgroup of its workers.
    cgroup: PathBuf,
    slots: BTreeMap<u32, Known>,
    totals: SteerTotals,
    /// The last failure that was reported.
    failure: Option<String>,
}

/// A slot in use.
struct Known {
    address: SocketAddr,
    /// What the core was last told.
    counts: SteerCounts,
    listens: bool,
    problem: Option<String>,
    /// Why the listener that it had before is not registered.
    not_adopted: Option<String>,
    /// Nothing holds it: it is removed when it is free.
    freed: bool,
}

impl SteerThread {
    pub(super) fn new(
        commands: Receiver<SteerCommand>,
        events: SyncSender<SteerEvent>,
        wake: Wake,
        seed: u32,
    ) -> SteerThread {
        SteerThread {
            commands,
            events,
            wake,
            pools: BTreeMap::new(),
            ports: Ports::new(seed),
            ticks: 0,
            unannounced: false,
            over: false,
        }
    }

    /// Runs until it is told to end, or the hot thread has ended.
    pub(super) fn run(mut self) {
        let mut next = Instant::now() + TICK;
        while !self.over {
            let left = next.saturating_duration_since(Instant::now());
            match self.commands.recv_timeout(left) {
                Ok(SteerCommand::End(kept, ended)) => {
                    self.end(&kept);
                    // The hot thread may not wait for it any more.
                    let _ = ended.send(());
                    return;
                }
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => {}
                // The dispatcher has ended without a word: what is pinned goes on.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if next <= Instant::now() {
                self.read_all();
                next = Instant::now() + TICK;
            }
            if std::mem::take(&mut self.unannounced) {
                (self.wake)();
            }
        }
    }

    fn end(&mut self, kept: &HashSet<PoolId>) {
        for (id, pool) in std::mem::take(&mut self.pools) {
            if !kept.contains(&id) {
                pool.detach();
            }
        }
    }

    fn report(&mut self, event: SteerEvent) {
        let event = match self.events.try_send(event) {
            Ok(()) => {
                self.unannounced = true;
                return;
            }
            Err(TrySendError::Disconnected(_)) => {
                self.over = true;
                return;
            }
            Err(TrySendError::Full(event)) => event,
        };
        (self.wake)();
        self.unannounced = true;
        self.over |= self.events.send(event).is_err();
    }

    fn obey(&mut self, command: SteerCommand) {
        match command {
            SteerCommand::Open(spec) => {
                let (id, opened) = (spec.pool, open(*spec));
                let told = match opened {
                    Ok((pool, opened)) => {
                        self.pools.insert(id, pool);
                        Ok(opened)
                    }
                    Err(error) => Err(error),
                };
                self.report(SteerEvent::Opened(id, told));
            }
            SteerCommand::Change(spec) => {
                let id = spec.pool;
                let changed = self.pools.get_mut(&id).map(|pool| pool.change(*spec));
                self.note(id, changed.unwrap_or(Ok(())));
            }
            SteerCommand::Prepare { pool, holder, address, adopt } => {
                let event = match self.prepare(pool, address, adopt) {
                    Ok((number, address)) => {
                        SteerEvent::Prepared { holder, slot: Slot { pool, number }, address }
                    }
                    Err(error) => SteerEvent::NotPrepared { holder, error },
                };
                self.report(event);
            }
            SteerCommand::Sweep(id) => {
                let swept = self.pools.get_mut(&id).map(PoolMaps::sweep);
                self.note(id, swept.unwrap_or(Ok(())));
            }
            SteerCommand::Free(slot) => {
                let freed = self.pools.get_mut(&slot.pool).map(|pool| pool.free(slot.number));
                self.note(slot.pool, freed.unwrap_or(Ok(())));
            }
            SteerCommand::Close(id) => {
                if let Some(pool) = self.pools.remove(&id) {
                    pool.detach();
                }
            }
            // `run` handles it.
            SteerCommand::End(..) => {}
        }
    }

    /// Finds a slot, and registers the address there.
    fn prepare(
        &mut self,
        id: PoolId,
        address: Option<SocketAddr>,
        adopt: bool,
    ) -> Result<(u32, SocketAddr), String> {
        let address = match address {
            Some(address) => address,
            None => {
                let ip = self.pools.get(&id).map(|pool| pool.spec.ip);
                let ip = ip.ok_or("its pool has no programs in the kernel")?;
                let used = self.pools.values().flat_map(|pool| pool.slots.values());
                let used: HashSet<u16> = used.map(|known| known.address.port()).collect();
                let free = self.ports.free(ip, |port| used.contains(&port));
                free.map_err(|error| format!("no address for it: {error}"))?
            }
        };
        let pool = self.pools.get_mut(&id).ok_or("its pool has no programs in the kernel")?;
        let number = pool.register(address, adopt).map_err(|error| error.to_string())?;
        Ok((number, address))
    }

    fn note(&mut self, id: PoolId, result: Result<(), Error>) {
        let Err(error) = result else { return };
        let error = error.to_string();
        let Some(pool) = self.pools.get_mut(&id) else { return };
        if pool.failure.as_ref() != Some(&error) {
            pool.failure = Some(error.clone());
            self.report(SteerEvent::Failed(id, error));
        }
    }

    /// Reads what the kernel counts, and reports what has changed.
    fn read_all(&mut self) {
        if self.pools.values().all(|pool| pool.slots.is_empty()) {
            return;
        }
        let has_live = |pool: &PoolMaps| pool.slots.values().any(|known| known.counts.live > 0);
        let queues = match self.pools.values().any(has_live) {
            true => Queues::read(),
            false => Queues::default(),
        };
        self.ticks = self.ticks.wrapping_add(1);
        let ids: Vec<PoolId> = self.pools.keys().copied().collect();
        for id in ids {
            let Some(pool) = self.pools.get_mut(&id) else { continue };
            let mut events = Vec::new();
            let compared = pool.compare(id, self.ticks, &mut events);
            let read = compared.and_then(|()| pool.read(id, &queues, &mut events));
            events.into_iter().for_each(|event| self.report(event));
            match read {
                Ok(()) => {
                    if let Some(pool) = self.pools.get_mut(&id) {
                        pool.failure = None;
                    }
                }
                Err(error) => self.note(id, Err(error)),
            }
        }
    }
}

/// Attaches the programs, or adopts those of an earlier dispatcher.
fn open(spec: PoolSpec) -> Result<(PoolMaps, Opened), String> {
    let mut opened = Opened::default();
    let mut adopted = None;
    if let Some(pins) = spec.pins.as_deref().filter(|pins| pins.exists()) {
        match Steering::adopt(pins) {
            Ok(steering) => adopted = Some(steering),
            Err(error) => {
                log::warn!(
                    "event=steer_not_adopted pool={} path={} error={}",
                    spec.name,
                    crate::background::logger::value(&pins.display()),
                    crate::background::logger::quoted(&error)
                );
                dispatch_steer::remove_pins(pins).map_err(|error| error.to_string())?;
            }
        }
    }
    let cgroup = match &spec.cgroup {
        Some(cgroup) => cgroup.clone(),
        None => dispatch_steer::machine::own_cgroup().map_err(|error| error.to_string())?,
    };
    let steering = match adopted {
        Some(steering) => {
            (opened.adopted, opened.pinned) = (true, true);
            steering
        }
        None => {
            let options = Options { cgroup: cgroup.clone(), wait: spec.wait };
            let steering = Steering::load(&options).map_err(|error| error.to_string())?;
            match &spec.pins {
                None => steering,
                Some(pins) => pin(steering, &options, pins, &mut opened)?,
            }
        }
    };
    let mut pool = PoolMaps {
        spec,
        steering,
        cgroup,
        slots: BTreeMap::new(),
        totals: SteerTotals::default(),
        failure: None,
    };
    pool.recover().map_err(|error| error.to_string())?;
    let spec = pool.spec.clone();
    pool.change(spec).map_err(|error| error.to_string())?;
    opened.writer = Some(pool.steering.writer().map_err(|error| error.to_string())?);
    Ok((pool, opened))
}

/// Pins the programs. Without pins the choice ends with the dispatcher, which is better than none.
fn pin(
    steering: Steering,
    options: &Options,
    pins: &Path,
    opened: &mut Opened,
) -> Result<Steering, String> {
    let made = match pins.parent() {
        Some(parent) => make_directory(parent),
        None => Ok(()),
    };
    let pinned = match made {
        Ok(()) => steering.pin(pins).map_err(|error| error.to_string()),
        Err(error) => {
            opened.not_pinned = Some(format!("{}: {error}", pins.display()));
            return Ok(steering);
        }
    };
    match pinned {
        Ok(steering) => {
            opened.pinned = true;
            Ok(steering)
        }
        Err(error) => {
            opened.not_pinned = Some(error);
            Steering::load(options).map_err(|error| error.to_string())
        }
    }
}

/// Makes a directory and those above it that do not exist, for this user only.
fn make_directory(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

impl PoolMaps {
    /// The slots of an earlier dispatcher.
    fn recover(&mut self) -> Result<(), Error> {
        for (address, number) in self.steering.addresses()? {
            // A worker has several addresses with one port.
            let known = self.slots.entry(number).or_insert_with(|| Known::new(address));
            known.freed = true;
            if address.ip() == self.spec.ip {
                known.address = address;
            }
        }
        Ok(())
    }

    /// Frees the slots that nothing has asked for.
    fn sweep(&mut self) -> Result<(), Error> {
        let freed = self.slots.iter().filter(|(_, known)| known.freed);
        let freed: Vec<u32> = freed.map(|(number, _)| *number).collect();
        freed.into_iter().try_for_each(|number| self.free(number))
    }

    fn change(&mut self, spec: PoolSpec) -> Result<(), Error> {
        self.steering.set_wait(spec.wait)?;
        self.steering.set_policy(policy(spec.policy))?;
        for &new in &spec.publics {
            self.steering.add_public(new)?;
        }
        for old in self.steering.public_addresses()? {
            if !spec.publics.iter().any(|new| includes(*new, old)) {
                self.steering.remove_public(old)?;
            }
        }
        self.spec = spec;
        Ok(())
    }

    fn register(&mut self, address: SocketAddr, adopt: bool) -> Result<u32, Error> {
        let same = |(_, known): &(&u32, &mut Known)| known.address == address;
        if let Some((number, known)) = self.slots.iter_mut().find(same) {
            // Another holder would share the counts.
            if !known.freed {
                return Err(Error::Invalid(format!("{address} is the address of another worker")));
            }
            *known = Known::new(address);
            let number = *number;
            self.adopt(number);
            return Ok(number);
        }
        let mut number = None;
        for candidate in (0..MAX_WORKERS).filter(|number| !self.slots.contains_key(number)) {
            if self.steering.is_free(candidate)? {
                number = Some(candidate);
                break;
            }
        }
        let Some(number) = number else {
            return Err(Error::Invalid(format!("the pool has {MAX_WORKERS} workers already")));
        };
        // It is no worker for the kernel before the core decides so.
        let settings = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
        self.steering.set_worker(number, settings)?;
        match is_own(address.ip()) {
            true => self.steering.add_port(number, address.port())?,
            false => self.steering.add_address(number, address)?,
        }
        self.slots.insert(number, Known::new(address));
        if adopt {
            self.adopt(number);
        }
        Ok(number)
    }

    /// Registers listeners that the worker has already.
    fn adopt(&mut self, number: u32) {
        let adopted = self.steering.adopt_listeners(number, &self.cgroup);
        if let Some(known) = self.slots.get_mut(&number) {
            known.not_adopted = adopted.err().map(|error| error.to_string());
        }
    }

    /// Compares listeners and counts with the kernel's lists.
    fn compare(
        &mut self,
        id: PoolId,
        ticks: u32,
        events: &mut Vec<SteerEvent>,
    ) -> Result<(), Error> {
        let corrections = match ticks {
            ticks if ticks.is_multiple_of(RECONCILE) => self.steering.reconcile()?,
            ticks if ticks.is_multiple_of(VERIFY) => self.steering.verify_listeners()?,
            _ => return Ok(()),
        };
        if !corrections.is_empty() {
            let text = |it: &Correction| {
                let count = match it.count {
                    Count::Live => "connections",
                    Count::ListenersV4 => "IPv4 listeners",
                    Count::ListenersV6 => "IPv6 listeners",
                };
                let known = self.slots.get(&it.worker);
                let at = known.map_or(String::new(), |known| known.address.to_string());
                format!("{count} of {at} by {:+}", it.change)
            };
            let texts = corrections.iter().map(text).collect();
            events.push(SteerEvent::Corrected(id, texts));
        }
        Ok(())
    }

    fn free(&mut self, number: u32) -> Result<(), Error> {
        match self.slots.remove(&number) {
            Some(_) => self.steering.remove_worker(number),
            None => Ok(()),
        }
    }

    fn read(
        &mut self,
        id: PoolId,
        queues: &Queues,
        events: &mut Vec<SteerEvent>,
    ) -> Result<(), Error> {
        let now = second();
        for (&number, known) in &mut self.slots {
            if known.freed {
                continue;
            }
            let slot = Slot { pool: id, number };
            let found = self.steering.counts(number)?;
            let listens = found.listeners != [0, 0];
            let counts = counts(&found, now, if listens { queues.of(known.address) } else { 0 });
            let not_adopted = known.not_adopted.as_ref().filter(|_| !listens).cloned();
            let problem = found.problem().or(not_adopted);
            if problem != known.problem {
                known.problem = problem;
                events.push(SteerEvent::Problem(slot, known.problem.clone()));
            }
            let before = std::mem::replace(&mut known.counts, counts);
            match (std::mem::replace(&mut known.listens, listens), listens) {
                (false, true) => events.push(SteerEvent::Listens(slot, counts)),
                (true, false) => events.push(SteerEvent::Closed(slot, counts)),
                // While connections wait, the core looks at the time.
                _ if before != counts || counts.queued > 0 => {
                    events.push(SteerEvent::Counts(slot, counts));
                }
                _ => {}
            }
        }
        let totals = self.steering.totals()?;
        let totals = SteerTotals {
            chosen: totals.chosen,
            full: totals.full,
            waited: totals.waited,
            unserved: totals.unserved,
            failed: totals.failed,
        };
        if std::mem::replace(&mut self.totals, totals) != totals {
            events.push(SteerEvent::Totals(id, totals));
        }
        Ok(())
    }

    fn detach(self) {
        let pins = self.spec.pins.clone();
        if let Err(error) = self.steering.detach() {
            log::warn!(
                "event=steer_not_detached pool={} error={}",
                self.spec.name,
                crate::background::logger::quoted(&error)
            );
        }
        if let Some(parent) = pins.as_deref().and_then(Path::parent) {
            // Another pool of this dispatcher may have pins there.
            let _ = std::fs::remove_dir(parent);
        }
    }
}

impl Known {
    fn new(address: SocketAddr) -> Known {
        Known {
            address,
            counts: SteerCounts::default(),
            listens: false,
            problem: None,
            not_adopted: None,
            freed: false,
        }
    }
}

fn policy(policy: dispatcher_core::Policy) -> Policy {
    use dispatcher_core::Policy as Core;
    match policy {
        // The configuration refuses the last one here.
        Core::LeastConnections | Core::LeastScore => Policy::LeastConnections,
        Core::RoundRobin => Policy::RoundRobin,
        Core::Random => Policy::Random,
        Core::TwoChoices => Policy::TwoChoices,
        Core::Hash => Policy::Hash,
        Core::Failover => Policy::Failover,
    }
}

/// Whether a public address stands for another one: `[::]:P` also for `0.0.0.0:P`.
fn includes(public: SocketAddr, other: SocketAddr) -> bool {
    let any = |ip: IpAddr| ip.is_unspecified();
    let both = public.is_ipv6() && any(public.ip()) && any(other.ip());
    public == other || (both && public.port() == other.port())
}

/// Whether listeners at the loopback and at all addresses are those of the worker, too.
fn is_own(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified()
}

fn counts(found: &WorkerCounts, second: u32, queued: u32) -> SteerCounts {
    SteerCounts {
        live: u64::try_from(found.live).unwrap_or(0),
        pending: found.pending(second),
        total: found.total,
        queued: queued.into(),
    }
}

/// The accept queues of listening sockets.
#[derive(Default)]
struct Queues(HashMap<u16, Vec<(IpAddr, u32)>>);

impl Queues {
    fn read() -> Queues {
        let mut queues: HashMap<u16, Vec<(IpAddr, u32)>> = HashMap::new();
        // Without the list no worker becomes suspect; the next reading may succeed.
        for socket in listening::list().unwrap_or_default() {
            let port = queues.entry(socket.address.port()).or_default();
            port.push((socket.address.ip(), socket.queued));
        }
        Queues(queues)
    }

    /// The connections that wait at the listeners of a worker.
    fn of(&self, address: SocketAddr) -> u32 {
        let own = |ip: &IpAddr| *ip == address.ip() || (is_own(*ip) && is_own(address.ip()));
        let sockets = self.0.get(&address.port());
        sockets.into_iter().flatten().filter(|(ip, _)| own(ip)).map(|(_, queued)| *queued).sum()
    }
}
