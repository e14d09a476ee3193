//! The hot thread's part: passes the events of the thread to the core, and the core's decisions to
//! the thread.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::super::fault_kind::FaultKind;
use super::super::{EventLoop, RunError, clock};
use super::{
    Adopt, Holder, Opened, PoolSpec, Public, Slot, SlotIo, SteerCommand, SteerEvent, SteeredPool,
    pin_name, start_thread,
};
use crate::background::logger::{quoted, value};
use crate::config::{Fallback, OnDispatcherLoss, Ports, Steer};
use dispatcher_core::{Departure, PoolId, ProcessId, SteerCounts};

/// Most events of the thread handled in one turn; the rest waits for the next turn.
const EVENTS_PER_TURN: usize = 256;

/// The longest time that the kernel may take to accept the programs of a pool.
const OPENING: Duration = Duration::from_secs(30);

/// The longest time that the end waits for the thread.
const ENDING: Duration = Duration::from_secs(2);

impl EventLoop {
    // --- pools -----------------------------------------------------------------------------

    /// Whether the kernel chooses the workers of a pool.
    pub(in crate::event_loop) fn is_steered(&self, pool: PoolId) -> bool {
        self.steers.pools.contains_key(&pool)
    }

    /// The start: has the kernel choose for the pools that want it, and waits until it does. A pool
    /// with `fallback` is passed, or served by the kernel's hash, where the kernel cannot choose.
    ///
    /// # Errors
    /// The kernel cannot choose for a pool without `fallback`.
    pub(in crate::event_loop) fn begin_steering(
        &mut self,
        survivors: &[(ProcessId, i32, SocketAddr)],
    ) -> Result<(), RunError> {
        self.serve_steered(survivors).map_err(RunError::system("steer thread"))?;
        let deadline = Instant::now() + OPENING;
        while self.steers.pools.values().any(|pool| pool.opened.is_none()) {
            let left = deadline.saturating_duration_since(Instant::now());
            let running = self.steers.running.as_ref();
            let event = running.and_then(|it| it.events.recv_timeout(left).ok());
            let event = event.ok_or(std::io::ErrorKind::TimedOut);
            match event.map_err(RunError::system("programs in the kernel"))? {
                SteerEvent::Opened(pool, Err(error)) => self.pass_instead(pool, error)?,
                event => self.steer_event(event),
            }
        }
        // The first turn begins now: a pool without workers is no fault yet.
        self.now = clock();
        self.run.started = self.now;
        Ok(())
    }

    /// The kernel cannot choose for a pool.
    fn pass_instead(&mut self, pool: PoolId, error: String) -> Result<(), RunError> {
        let name = self.core.pool_name(pool).to_owned();
        let resources = self.pools.get_mut(usize::from(pool.0));
        let falls_back = |steer: &mut Steer| steer.passes();
        let steer = resources.and_then(|pool| pool.steer.take_if(falls_back));
        if steer.is_none() {
            return Err(RunError::Steer { pool: name, error });
        }
        self.steers.pools.remove(&pool);
        self.core.pass_instead(pool);
        log::warn!(
            "event=steering_not_possible pool={} mode=pass error={} hint=\"dispatcher doctor\"",
            value(&name),
            quoted(&error)
        );
        let text = || format!("the kernel cannot choose its workers, so they are passed: {error}");
        self.fault(FaultKind::Steering, &name, text);
        Ok(())
    }

    /// Has the kernel choose for every pool that is to be steered, and was not yet. To be called
    /// before the first process is started, and after each reload. `survivors`: processes of an
    /// earlier dispatcher, with their process ids and addresses.
    ///
    /// # Errors
    /// No thread can be started.
    pub(in crate::event_loop) fn serve_steered(
        &mut self,
        survivors: &[(ProcessId, i32, SocketAddr)],
    ) -> std::io::Result<()> {
        for id in (0..self.pools.len() as u16).map(PoolId) {
            let steers = self.pools.get(usize::from(id.0)).is_some_and(|it| it.steer.is_some());
            // A reload tries again what has failed.
            let opened = self.steers.pools.get(&id);
            let begun = opened.is_some_and(|it| it.opened.is_some() || it.failure.is_none());
            if !steers || self.core.is_pool_retired(id) || begun {
                continue;
            }
            let Some(spec) = self.pool_spec(id) else { continue };
            if self.steers.running.is_none() {
                self.steers.running = Some(start_thread(std::sync::Arc::clone(&self.wake))?);
            }
            self.steers.pools.insert(id, SteeredPool::default());
            self.steers.send(SteerCommand::Open(Box::new(spec)));
            for &(process, pid, address) in survivors.iter().filter(|it| it.0.pool == id) {
                let holder = Holder::Process(process);
                self.steers.expected.insert(holder, pid);
                let address = Some(address);
                let adopt = Some(Adopt { pid });
                self.steers.send(SteerCommand::Prepare { pool: id, holder, address, adopt });
            }
            self.prepare_members(id);
            self.steers.send(SteerCommand::Sweep(id));
        }
        Ok(())
    }

    fn opened(&mut self, id: PoolId, opened: Result<Opened, String>) {
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => return self.pool_failed(id, error),
        };
        let plain = self.core.pool_name(id).to_owned();
        let name = value(&plain);
        let Opened { pinned, adopted, .. } = &opened;
        match &opened.hashed {
            None => log::info!("event=steering pool={name} pinned={pinned} adopted={adopted}"),
            Some(error) => {
                log::warn!(
                    "event=steering_not_possible pool={name} mode=hash error={} \
                     hint=\"dispatcher doctor\"",
                    quoted(error)
                );
                let text = || format!("the kernel's hash chooses its workers: {error}");
                self.fault(FaultKind::Steering, &plain, text);
            }
        }
        if let Some(error) = &opened.not_pinned {
            log::warn!(
                "event=steering_not_pinned pool={name} error={} \
                 hint=\"the kernel's choice ends with this process\"",
                quoted(error)
            );
        }
        if let Some(pool) = self.steers.pools.get_mut(&id) {
            pool.opened = Some(opened);
        }
        self.reset_early(id);
    }

    pub(super) fn pool_failed(&mut self, pool: PoolId, error: String) {
        let name = self.core.pool_name(pool).to_owned();
        log::error!("event=steering_failed pool={} error={}", value(&name), quoted(&error));
        let text = || format!("the kernel's programs of pool {name}: {error}");
        self.fault(FaultKind::Steering, &name, text);
        if let Some(pool) = self.steers.pools.get_mut(&pool) {
            pool.failure = Some(error);
        }
    }

    /// What the thread is to know of a pool.
    fn pool_spec(&self, id: PoolId) -> Option<PoolSpec> {
        let resources = self.pools.get(usize::from(id.0))?;
        let steer = resources.steer.as_ref()?;
        let settings = self.core.pool_settings(id)?;
        let listeners = self.core.listeners().filter(|&it| {
            self.core.pool_of_listener(it) == Some(id) && !self.core.is_listener_retired(it)
        });
        let publics = listeners.flat_map(|listener| self.listeners.of(listener)).filter_map(|it| {
            let address = it.listening.as_ref()?.address.parse().ok()?;
            let ipv6_only = self.listeners.resources(it.id)?.options.ipv6_only;
            let name = self.core.listener_name(it.id).to_owned();
            Some(Public { name, address, ipv6_only })
        });
        let serves = resources.spawn.as_ref().is_some_and(|spawn| {
            spawn.on_dispatcher_loss == OnDispatcherLoss::Serve || !steer.members.is_empty()
        });
        let outlives = serves || !steer.members.is_empty();
        Some(PoolSpec {
            pool: id,
            name: settings.name.clone(),
            cgroup: common_cgroup(steer.members.iter().map(|member| member.cgroup.as_path())),
            ip: steer.address,
            publics: publics.collect(),
            shared: steer.ports == Ports::Shared,
            hash: steer.fallback == Some(Fallback::Hash),
            start_timeout: settings.supervision.start_timeout,
            wait: settings.wait_for_worker,
            policy: settings.policy,
            pins: self.config.steer_pins.as_ref().filter(|_| outlives).map(|pins| {
                let dispatcher = pin_name(&self.endpoints.dispatch_address);
                pins.join(dispatcher).join(pin_name(&settings.name))
            }),
        })
    }

    /// The settings, listeners or members of pools may have changed.
    pub(in crate::event_loop) fn change_steered(&mut self) {
        let ids: Vec<PoolId> = self.steers.pools.keys().copied().collect();
        for id in ids {
            // Without its listeners, a removed pool has no public addresses.
            if let Some(spec) = self.pool_spec(id) {
                self.steers.send(SteerCommand::Change(Box::new(spec)));
            }
            match self.core.is_pool_retired(id) {
                true => self.retire_pool(id),
                false => self.prepare_members(id),
            }
        }
    }

    /// A pool was removed. Its processes are drained; its members are no workers any more.
    fn retire_pool(&mut self, id: PoolId) {
        let members = self
            .steers
            .slots
            .iter()
            .filter(|(slot, io)| slot.pool == id && matches!(io.holder, Holder::Member(..)));
        let members: Vec<Slot> = members.map(|(slot, _)| *slot).collect();
        for slot in members {
            self.lose_slot(slot, Departure::Disconnected);
        }
        self.close_pool(id);
    }

    /// Detaches the programs of a removed pool without workers.
    pub(super) fn close_pool(&mut self, id: PoolId) {
        let busy = self.steers.slots.keys().any(|slot| slot.pool == id);
        if !busy {
            self.steers.pools.remove(&id);
            self.steers.send(SteerCommand::Close(id));
        }
    }

    /// Asks for slots of members that have none, and frees those of members that are gone.
    fn prepare_members(&mut self, id: PoolId) {
        let steer = self.pools.get(usize::from(id.0)).and_then(|pool| pool.steer.clone());
        let Some(steer) = steer else { return };
        let wanted = |io: &SlotIo| steer.members.iter().any(|it| it.address == io.address);
        let gone = self.steers.slots.iter().filter(|(slot, io)| {
            slot.pool == id && matches!(io.holder, Holder::Member(..)) && !wanted(io)
        });
        let gone: Vec<Slot> = gone.map(|(slot, _)| *slot).collect();
        for slot in gone {
            self.lose_slot(slot, Departure::Disconnected);
        }
        for (position, member) in (0..).zip(&steer.members) {
            let of_member =
                |slot: &Slot, io: &SlotIo| slot.pool == id && io.address == member.address;
            let known = self.steers.slots.iter_mut().find(|(slot, io)| of_member(slot, io));
            let holder = Holder::Member(id, position);
            if let Some((_, io)) = known {
                io.holder = holder;
                continue;
            }
            let is_new = self.steers.preparing.insert((id, member.address));
            if is_new {
                let (address, adopt) = (Some(member.address), Some(Adopt { pid: 0 }));
                self.steers.send(SteerCommand::Prepare { pool: id, holder, address, adopt });
            }
        }
    }

    /// A stop begins: clients of pools that do not outlive it find them closed.
    pub(in crate::event_loop) fn stop_steering(&mut self) {
        let ids: Vec<PoolId> = self.steers.pools.keys().copied().collect();
        for id in ids.into_iter().filter(|&id| !self.leaves(id)) {
            if let Some(spec) = self.pool_spec(id) {
                let spec = PoolSpec { publics: Vec::new(), ..spec };
                self.steers.send(SteerCommand::Change(Box::new(spec)));
            }
        }
    }

    /// Ends the thread. The kernel goes on choosing for pools that outlive the dispatcher.
    pub(in crate::event_loop) fn end_steering(&mut self) {
        let kept: HashSet<PoolId> =
            self.steers.pools.keys().copied().filter(|&id| self.leaves(id)).collect();
        for &id in &kept {
            let pinned = self.steers.is_pinned(id);
            log::info!("event=steering_left pool={} pinned={pinned}", self.core.pool_name(id));
        }
        let (answer, ended) = channel();
        self.steers.send(SteerCommand::End(kept, answer));
        if self.steers.running.take().is_some() {
            let _ = ended.recv_timeout(ENDING);
        }
    }

    // --- events ----------------------------------------------------------------------------

    /// Handles the events of the thread.
    pub(in crate::event_loop) fn handle_steering(&mut self) {
        if !std::mem::take(&mut self.steers.ready) {
            return;
        }
        // A pool whose first workers are leaving would seem to have none.
        let mut leaving = Vec::new();
        for _ in 0..EVENTS_PER_TURN {
            let event = self.steers.running.as_ref().and_then(|it| it.events.try_recv().ok());
            match event {
                Some(event) if self.is_of_leaving(&event, &leaving) => leaving.push(event),
                Some(event) => self.steer_event(event),
                None => {
                    leaving.into_iter().for_each(|event| self.steer_event(event));
                    return;
                }
            }
        }
        leaving.into_iter().for_each(|event| self.steer_event(event));
        self.steers.ready = true;
    }

    /// Whether the worker of a process that gets no connections listens, or one of `others` is
    /// about the same worker.
    fn is_of_leaving(&self, event: &SteerEvent, others: &[SteerEvent]) -> bool {
        let (SteerEvent::Listens(slot, _)
        | SteerEvent::Closed(slot, _)
        | SteerEvent::Counts(slot, _)) = event
        else {
            return false;
        };
        let same = |other: &SteerEvent| matches!(other, SteerEvent::Listens(of, _) if of == slot);
        let holder = self.steers.slots.get(slot).map(|io| io.holder);
        let leaves =
            matches!(holder, Some(Holder::Process(process)) if !self.core.wants_process(process));
        others.iter().any(same) || (leaves && matches!(event, SteerEvent::Listens(..)))
    }

    fn steer_event(&mut self, event: SteerEvent) {
        match event {
            SteerEvent::Prepared { holder, slot, address, listeners } => {
                self.prepared(holder, slot, address, listeners);
            }
            SteerEvent::NotCounted(slot, why) => self.not_counted(slot, why),
            SteerEvent::QueueMoved(slot) => self.steer_again(slot),
            SteerEvent::NotPrepared { holder, address, error } => {
                self.not_prepared(holder, address, &error);
            }
            SteerEvent::HasClosed(holder) => self.has_closed(holder),
            SteerEvent::Listens(slot, counts) => {
                self.reset_early(slot.pool);
                self.slot_listens(slot, counts);
            }
            SteerEvent::Closed(slot, counts) => {
                let Some(io) = self.steers.slots.get_mut(&slot) else { return };
                io.listens = None;
                let Some(worker) = io.worker else { return };
                self.core.steer_counts(self.now, worker, counts);
                self.core.steer_closed(self.now, worker);
                self.end_member(slot, counts);
            }
            SteerEvent::Counts(slot, counts) => {
                let Some(io) = self.steers.slots.get_mut(&slot) else { return };
                if let Some(listens) = &mut io.listens {
                    *listens = counts;
                }
                let Some(worker) = io.worker else { return };
                self.core.steer_counts(self.now, worker, counts);
                self.end_member(slot, counts);
            }
            SteerEvent::Problem(slot, problem) => self.slot_problem(slot, problem),
            SteerEvent::Totals(pool, totals) => {
                if let Some(pool) = self.steers.pools.get_mut(&pool) {
                    pool.totals = totals;
                    pool.failure = None;
                }
                self.reset_early(pool);
            }
            SteerEvent::Corrected(pool, corrections) => {
                log::warn!(
                    "event=steering_corrected pool={} corrections={}",
                    value(self.core.pool_name(pool)),
                    quoted(&corrections.join(", "))
                );
            }
            SteerEvent::Failed(pool, error) => self.pool_failed(pool, error),
            SteerEvent::Opened(pool, opened) => self.opened(pool, opened),
        }
    }

    fn prepared(
        &mut self,
        holder: Holder,
        slot: Slot,
        address: SocketAddr,
        listeners: Vec<(String, OwnedFd)>,
    ) {
        let (holder, pid) = match holder {
            // It may have ended, or its pool may have been removed meanwhile.
            Holder::Process(process) => {
                let pid = self.steers.expected.remove(&holder);
                let wanted = pid.is_some() || self.core.generation_of(process).is_some();
                (wanted.then_some(holder), pid)
            }
            // A reload may have removed it, or changed its position.
            Holder::Member(pool, _) => {
                self.steers.preparing.remove(&(pool, address));
                let position = self.member_at(pool, address);
                (position.map(|position| Holder::Member(pool, position)), Some(0))
            }
        };
        let Some(holder) = holder else {
            return self.steers.send(SteerCommand::Free { slot, returns: false });
        };
        let io = SlotIo {
            holder,
            address,
            pid,
            worker: None,
            listens: None,
            settings: None,
            problem: None,
            not_counted: None,
        };
        self.steers.slots.insert(slot, io);
        if let Holder::Process(process) = holder
            && pid.is_none()
        {
            self.spawn_at(process, Some(address), listeners);
        }
    }

    /// The position of the member with this address, unless its pool was removed.
    fn member_at(&self, pool: PoolId, address: SocketAddr) -> Option<u32> {
        let steer = self.pools.get(usize::from(pool.0))?.steer.as_ref()?;
        if self.core.is_pool_retired(pool) {
            return None;
        }
        let position = steer.members.iter().position(|member| member.address == address)?;
        u32::try_from(position).ok()
    }

    fn not_prepared(&mut self, holder: Holder, address: Option<SocketAddr>, error: &str) {
        if let (Holder::Member(pool, _), Some(address)) = (holder, address) {
            self.steers.preparing.remove(&(pool, address));
        }
        let expected = self.steers.expected.remove(&holder);
        match holder {
            Holder::Process(process) if expected.is_none() => self.not_started(process, error),
            Holder::Process(process) => {
                let name = self.process_name(process);
                log::error!(
                    "event=worker_not_steered pool={} worker={} error={} \
                     hint=\"it gets no new connections: restart it\"",
                    self.core.pool_name(process.pool),
                    value(&name),
                    quoted(error)
                );
                let text = || format!("it gets no new connections: {error}");
                self.fault(FaultKind::Steering, &name, text);
            }
            Holder::Member(pool, position) => {
                let steer = self.pools.get(usize::from(pool.0)).and_then(|it| it.steer.as_ref());
                let member = steer.and_then(|steer| steer.members.get(position as usize));
                let name = member.map(|member| member.name.clone()).unwrap_or_default();
                log::error!(
                    "event=worker_not_steered pool={} worker={} error={}",
                    self.core.pool_name(pool),
                    value(&name),
                    quoted(error)
                );
                let text = || format!("it gets no connections: {error}");
                self.fault(FaultKind::Steering, &name, text);
            }
        }
    }

    /// A process of an earlier dispatcher ends after its last connection: nothing counts for it.
    fn has_closed(&mut self, holder: Holder) {
        self.steers.expected.remove(&holder);
        let Holder::Process(process) = holder else { return };
        log::info!(
            "event=process_leaves pool={} worker={} reason=\"it has closed its listeners\"",
            value(self.core.pool_name(process.pool)),
            value(&self.process_name(process))
        );
        self.core.process_has_closed(self.now, process);
    }

    fn slot_listens(&mut self, slot: Slot, counts: SteerCounts) {
        let Some(io) = self.steers.slots.get_mut(&slot) else { return };
        io.listens = Some(counts);
        if let (Holder::Member(..), Some(worker)) = (io.holder, io.worker.take()) {
            // It listens again while connections of before are open: they count for the new one.
            self.core.leave(self.now, worker, Departure::Disconnected);
        }
        self.join_slot(slot);
    }

    /// A member that listens no more is gone with its last connection. A process is gone when it
    /// ends.
    fn end_member(&mut self, slot: Slot, counts: SteerCounts) {
        let Some(io) = self.steers.slots.get(&slot) else { return };
        let over = io.listens.is_none() && counts.live == 0;
        if let (Holder::Member(..), Some(worker), true) = (io.holder, io.worker, over) {
            self.core.leave(self.now, worker, Departure::Disconnected);
        }
    }

    /// Only what is new is logged: the load of the worker is not known meanwhile.
    fn not_counted(&mut self, slot: Slot, why: Option<String>) {
        let Some(io) = self.steers.slots.get_mut(&slot) else { return };
        io.not_counted.clone_from(&why);
        let (Some(why), Holder::Process(process)) = (why, io.holder) else { return };
        log::warn!(
            "event=worker_not_counted pool={} worker={} error={}",
            value(self.core.pool_name(slot.pool)),
            value(&self.process_name(process)),
            quoted(&why)
        );
    }

    fn slot_problem(&mut self, slot: Slot, problem: Option<String>) {
        let Some(io) = self.steers.slots.get_mut(&slot) else { return };
        io.problem.clone_from(&problem);
        let (holder, address) = (io.holder, io.address);
        let Some(problem) = problem else { return };
        let name = match holder {
            Holder::Process(process) => self.process_name(process),
            Holder::Member(..) => address.to_string(),
        };
        let pool = self.core.pool_name(slot.pool);
        log::warn!(
            "event=worker_not_steered pool={} worker={} address={address} error={}",
            value(pool),
            value(&name),
            quoted(&problem)
        );
        let text = || format!("it gets no connections: {problem}");
        self.fault(FaultKind::Steering, &name, text);
    }
}

/// The cgroup that is above all workers, and stays when one of them is restarted.
fn common_cgroup<'a>(cgroups: impl Iterator<Item = &'a Path>) -> Option<PathBuf> {
    cgroups.map(|path| path.parent().unwrap_or(path).to_path_buf()).reduce(|one, other| {
        let same = one.components().zip(other.components()).take_while(|(a, b)| a == b);
        same.map(|(part, _)| part).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_is_above_all_members() {
        let of = |paths: &[&str]| common_cgroup(paths.iter().map(Path::new));
        assert_eq!(of(&[]), None);
        assert_eq!(of(&["/s/web.service"]), Some("/s".into()));
        assert_eq!(of(&["/s/web@1.service", "/s/web@2.service"]), Some("/s".into()));
        assert_eq!(of(&["/s/a/web@1.service", "/s/b/web@2.service"]), Some("/s".into()));
        assert_eq!(of(&["/s/a/b/1", "/s/a/2"]), Some("/s/a".into()));
    }

    #[test]
    fn names_of_pins_differ_and_have_no_dots() {
        let names = ["web", "web.1", "web_1", "web-1", "web/1", "w\u{e9}b"].map(pin_name);
        assert!(names.iter().all(|name| !name.contains(['.', '/'])), "{names:?}");
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
        assert!(pin_name(&"x".repeat(1000)).len() <= 200);
    }
}
