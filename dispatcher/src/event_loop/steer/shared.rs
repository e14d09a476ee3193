//! The thread's part for processes that share the public ports: it opens their listeners, which
//! they inherit, and has a duplicate of each.
//!
//! A connection to each worker ([`Probe`]) waits in the worker's queue until it is accepted: so a
//! process that starts gets no clients before it accepts, and one whose queue was moved is trusted
//! again when it accepts. The probe of a worker does not count in what is reported.
//!
//! What waits in the queue of a process that has ended goes to other workers. Without another one,
//! the listeners wait for the next process, with all that is in their queues.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use dispatch_steer::{Direct, Error, MAX_WORKERS, Probe, Probed, WorkerSettings};
use dispatcher_core::SteerCounts;
use tokio::sync::oneshot::{self, error::TryRecvError};

use super::Connected;
use super::sample::{sockets_of, tree_of};
use super::thread::{Known, PoolMaps};
use crate::background::logger::{quoted, value};
use crate::background::spawner::DirectConnection;

/// The backlog of each listener; the kernel caps it at `net.core.somaxconn`.
pub(super) const BACKLOG: u32 = 4096;

/// What the slot of a process has more that shares its port.
#[derive(Default)]
pub(super) struct Shared {
    probe: Option<Probe>,
    /// It has yet to accept a connection of the dispatcher. There may be no descriptor for one.
    must_accept: bool,
    /// It has accepted a connection.
    pub(super) accepts: bool,
    /// Its process has ended, and no other worker could take its queue.
    left_at: Option<Instant>,
    pid: Option<i32>,
    /// How many connections it had accepted, and since when: or when it was looked for the last
    /// time whether it still has its listener.
    stands: Option<(u64, Instant)>,
    /// The process has closed its listener.
    pub(super) closed: bool,
}

/// Connections to certain workers, and what tells that one is over.
pub(super) type Directs = Vec<(Direct, oneshot::Receiver<()>)>;

/// How long a process does not accept before that is looked for, and how often.
const LOOK: Duration = Duration::from_secs(1);

/// What a process is started with: the number of its slot, its address, and its listeners with
/// their names.
pub(super) type Inherits = (u32, SocketAddr, Vec<(String, OwnedFd)>);

impl PoolMaps {
    /// The slots of an earlier dispatcher.
    pub(super) fn recover_shared(&mut self) -> Result<(), Error> {
        for number in 0..MAX_WORKERS {
            if self.steering.worker(number)?.weight != 0 {
                let unspecified = SocketAddr::new(self.spec.ip, 0);
                let mut known = Known::new(unspecified);
                known.freed = true;
                self.slots.insert(number, known);
            }
        }
        Ok(())
    }

    /// Takes over the listeners that a process of an earlier dispatcher has. `None` if it has
    /// closed them.
    pub(super) fn take_listeners(&mut self, pid: i32) -> Result<Option<Inherits>, Error> {
        let free = self.free_number()?;
        let processes: Vec<u32> = tree_of(pid).into_iter().map(i32::cast_unsigned).collect();
        let taken = self.steering.take_listeners_of(&processes, &self.cgroup, free)?;
        let Some(number) = taken else { return Ok(None) };
        let address = self.public()?;
        // It has accepted connections before.
        let mut known = Known::new(address);
        known.shared = Some(Shared { accepts: true, pid: Some(pid), ..Shared::default() });
        self.slots.insert(number, known);
        Ok(Some((number, address, Vec::new())))
    }

    fn public(&self) -> Result<SocketAddr, Error> {
        let public = self.spec.publics.first().map(|public| public.address);
        public.ok_or_else(|| Error::Invalid("no listener sends connections to the pool".to_owned()))
    }

    /// Opens the listeners of a new process, or finds those that wait for one.
    pub(super) fn open_listeners(&mut self) -> Result<Inherits, Error> {
        let address = self.public()?;
        let left = |known: &Known| known.shared.as_ref().is_some_and(|it| it.left_at.is_some());
        let waiting = self.slots.iter().find(|(_, known)| left(known)).map(|(number, _)| *number);
        let number = match waiting {
            Some(number) => number,
            None => self.free_number()?,
        };
        // It is no worker for the kernel before the core decides so.
        let settings = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
        self.steering.set_worker(number, settings)?;
        let mut known = Known::new(address);
        let opened = self.duplicates(number);
        if opened.is_err() && waiting.is_none() {
            self.steering.remove_worker(number)?;
        }
        let listeners = opened?;
        known.shared = Some(Shared { must_accept: true, ..Shared::default() });
        self.slots.insert(number, known);
        self.probe(number);
        Ok((number, address, listeners))
    }

    fn duplicates(&mut self, number: u32) -> Result<Vec<(String, OwnedFd)>, Error> {
        let publics = self.spec.publics.clone();
        let open = |public: super::Public| {
            let listener = self.steering.open_listener(number, public.address, BACKLOG)?;
            Ok((public.name, listener))
        };
        publics.into_iter().map(open).collect()
    }

    /// Makes a connection to a worker, if there is none.
    fn probe(&mut self, number: u32) {
        let shared = self.slots.get_mut(&number).and_then(|known| known.shared.as_mut());
        let Some(shared) = shared.filter(|shared| shared.probe.is_none()) else { return };
        match self.steering.probe(number) {
            Ok(probe) => shared.probe = Some(probe),
            Err(error) => log::debug!(
                "event=steer_not_probed pool={} number={number} error={}",
                value(&self.spec.name),
                quoted(&error)
            ),
        }
    }

    /// Makes a connection to a worker.
    pub(super) fn connect(&mut self, number: u32, connected: Connected) {
        let connection = self.steering.connect_to(number).map(|(fd, direct)| {
            let (guard, over) = oneshot::channel();
            self.directs.push((direct, over));
            DirectConnection { fd, guard }
        });
        // The check may have ended.
        let _ = connected.send(connection.map_err(|error| error.to_string()));
    }

    /// Lets those connections go that are over.
    pub(super) fn end_directs(&mut self) -> Result<(), Error> {
        let mut ended = Ok(());
        for (direct, mut over) in std::mem::take(&mut self.directs) {
            match over.try_recv() {
                Err(TryRecvError::Empty) => self.directs.push((direct, over)),
                _ => ended = ended.and(self.steering.end_direct(direct)),
            }
        }
        ended
    }

    /// Looks whether workers have accepted the connections to them, and after listeners that wait
    /// for a process.
    pub(super) fn watch_shared(&mut self) -> Result<(), Error> {
        let numbers: Vec<u32> = self.slots.keys().copied().collect();
        for number in numbers {
            let known = self.slots.get_mut(&number);
            let Some(shared) = known.and_then(|known| known.shared.as_mut()) else { continue };
            if let Some(since) = shared.left_at {
                let late = since.elapsed() > self.spec.wait;
                self.leave_queue(number, late)?;
                continue;
            }
            if shared.closed {
                self.leave_closed(number)?;
                continue;
            }
            let outcome = match &shared.probe {
                // What the kernel does not tell now, it is asked again.
                Some(probe) => self.steering.probed(probe).unwrap_or(Probed::Waits),
                None if shared.must_accept => Probed::Failed,
                None => Probed::Waits,
            };
            if outcome == Probed::Waits {
                self.look_after_listener(number)?;
                continue;
            }
            if outcome == Probed::Accepted {
                (shared.accepts, shared.must_accept) = (true, false);
            }
            if let Some(probe) = shared.probe.take() {
                self.steering.end_probe(probe)?;
            }
            if outcome == Probed::Failed {
                self.probe(number);
            }
        }
        Ok(())
    }

    /// The process of a worker runs.
    pub(super) fn runs(&mut self, number: u32, pid: i32) {
        let shared = self.slots.get_mut(&number).and_then(|known| known.shared.as_mut());
        if let Some(shared) = shared {
            shared.pid = Some(pid);
        }
    }

    /// A process that does not accept any more may have closed its listener: what waits there goes
    /// to other workers. The duplicate here keeps the listener open, so the kernel tells nothing.
    fn look_after_listener(&mut self, number: u32) -> Result<(), Error> {
        let Some(known) = self.slots.get_mut(&number) else { return Ok(()) };
        let SteerCounts { total, moved_in, moved_out, queued, .. } = known.counts;
        let Some(shared) = known.shared.as_mut().filter(|shared| shared.accepts) else {
            return Ok(());
        };
        if queued == 0 && shared.probe.is_none() {
            shared.stands = None;
            return Ok(());
        }
        let accepted =
            total.saturating_add(moved_in).saturating_sub(moved_out).saturating_sub(queued);
        match shared.stands {
            Some((before, since)) if before == accepted && since.elapsed() < LOOK => return Ok(()),
            Some((before, _)) if before == accepted => {}
            _ => {
                shared.stands = Some((accepted, Instant::now()));
                return Ok(());
            }
        }
        shared.stands = Some((accepted, Instant::now()));
        // What may not be looked at is taken for open.
        let Some(Ok(sockets)) = shared.pid.map(sockets_of) else { return Ok(()) };
        let own = self.steering.listener_inodes(number)?;
        let has = |inode: &u64| u32::try_from(*inode).is_ok_and(|it| sockets.contains(&it));
        shared.closed = !own.iter().any(has);
        if shared.closed
            && let Some(probe) = shared.probe.take()
        {
            self.steering.end_probe(probe)?;
        }
        Ok(())
    }

    /// The connections that wait in the queue of a worker, and what it counts without the probe.
    pub(super) fn without_probe(&self, number: u32, counts: SteerCounts) -> SteerCounts {
        let Some(known) = self.slots.get(&number) else { return counts };
        if known.shared.as_ref().is_none_or(|shared| shared.probe.is_none()) {
            return counts;
        }
        // The kernel counts it some time after it was made.
        let total = counts.total.saturating_sub(1).max(known.counts.total);
        let (live, pending) = match counts.live {
            0 => (0, counts.pending.saturating_sub(1)),
            live => (live - 1, counts.pending),
        };
        SteerCounts { live, pending, total, queued: counts.queued.saturating_sub(1), ..counts }
    }

    /// Moves the queue of a worker that does not accept.
    pub(super) fn move_queue(&mut self, number: u32) -> Result<(), Error> {
        let known = self.slots.get_mut(&number);
        let Some(shared) = known.and_then(|known| known.shared.as_mut()) else { return Ok(()) };
        if shared.closed {
            return Ok(());
        }
        shared.must_accept = true;
        if let Some(probe) = shared.probe.take() {
            self.steering.end_probe(probe)?;
        }
        let moved = match self.steering.move_queue(number) {
            // No other worker can take it.
            Err(Error::Invalid(_)) => Ok(()),
            moved => moved,
        };
        self.probe(number);
        moved
    }

    /// The process of a worker has ended.
    pub(super) fn free_shared(&mut self, number: u32) -> Result<(), Error> {
        let known = self.slots.get_mut(&number);
        let Some(shared) = known.and_then(|known| known.shared.as_mut()) else {
            // No process has claimed it.
            return match self.slots.remove(&number) {
                Some(_) => self.steering.remove_worker(number),
                None => Ok(()),
            };
        };
        if let Some(probe) = shared.probe.take() {
            self.steering.end_probe(probe)?;
        }
        let known = self.slots.get_mut(&number);
        if let Some(known) = known {
            known.freed = true;
            known.shared = Some(Shared { left_at: Some(Instant::now()), ..Shared::default() });
        }
        let settings = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
        self.steering.set_worker(number, settings)?;
        self.leave_queue(number, false)
    }

    /// Gives the queue of a process that has closed its listener to other workers, as soon as there
    /// are any.
    fn leave_closed(&mut self, number: u32) -> Result<(), Error> {
        if self.steering.queue_len(number)? == 0 {
            return Ok(());
        }
        match self.steering.evict(number) {
            Err(Error::Invalid(_)) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Gives the queue of a process that has ended to other workers, if there are any. `late`:
    /// closes it in any case.
    fn leave_queue(&mut self, number: u32, late: bool) -> Result<(), Error> {
        match self.steering.evict(number) {
            Err(Error::Invalid(_)) if !late => return Ok(()),
            Err(Error::Invalid(_)) | Ok(()) => {}
            Err(error) => return Err(error),
        }
        self.slots.remove(&number);
        self.steering.remove_worker(number)
    }
}
