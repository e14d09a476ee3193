//! A virtual environment for the core: an event loop without descriptors, and workers without
//! processes.
//!
//! Owns models of what the kernel provides: channels, scoreboards (the real claim functions on
//! ordinary atomics), descriptors and clients. Asserts the invariants after every effect: a
//! connection's copy exists until a worker takes it or it is closed, no connection is served twice,
//! no worker serves a revoked connection. It decides nothing. For tests only; nothing here runs in
//! the dispatcher.

pub mod advice;
mod clients;
pub mod lines;
mod plan;
mod process;
mod run;
pub mod waits;

pub use plan::{Fault, FaultKind, Plan, attempt, shrink};
pub use run::{Outcome, run};

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::gauge::Reading;
use dispatch_protocol::scoreboard::slot::{self, Revoke};
use dispatch_protocol::wire::{EntryFlags, Hello};

pub use dispatcher_core::Random;
use dispatcher_core::*;

/// A record in a channel.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Its ticket.
    pub ticket: Ticket,
    /// Its connection; a probe has none.
    pub conn: Option<ConnId>,
}

/// Both ends of a worker's channel and scoreboard.
#[derive(Debug)]
pub struct Link {
    /// The worker.
    pub id: WorkerId,
    /// Records sent and not received.
    pub channel: VecDeque<Record>,
    /// Most records in the channel.
    pub capacity: usize,
    /// The worker closed its end of the channel.
    pub closed: bool,
    /// Its process lives and may take a connection at any time.
    pub alive: bool,
    /// The event loop has disconnected the worker.
    pub cut: bool,
    /// The event loop has dropped the worker's state.
    pub forgotten: bool,
    /// The `finished` counter in the scoreboard, as the worker writes it.
    pub finished: u64,
    /// The worker's slots.
    pub board: Vec<AtomicU64>,
    /// The time of the last claim in each slot.
    pub taken_at: Vec<Time>,
    /// The scored gauges in the scoreboard, as the worker writes them.
    pub gauges: Vec<Option<Reading>>,
    /// The gauges as last reported to the core.
    told: Vec<Option<Reading>>,
    /// Notices sent and not received; the worker reads them after the records.
    pub notices: Vec<Notice>,
    gathered: Vec<Record>,
}

/// The state of a connection.
#[derive(Clone, Copy, Debug, Default)]
struct Fate {
    served: bool,
    closed: Option<CloseReason>,
}

/// The virtual event loop and its environment.
#[derive(Debug)]
pub struct Driver {
    /// The core under test.
    pub core: Core,
    /// The clock.
    pub now: Time,
    /// The state of every worker that ever joined, by serial number from 1 on.
    pub links: Vec<Link>,
    /// Number of following sends that fail for lack of resources.
    pub scarcity: u32,
    /// All effects, while `logging`.
    pub log: Vec<Effect>,
    /// Whether to record `log`.
    pub logging: bool,
    /// Selects the revocations that a worker's take precedes at the last moment.
    pub races: Option<Random>,
    /// The workers of these takes, once for each connection.
    pub raced: Vec<WorkerId>,
    slots: usize,
    pools: u16,
    /// The dispatcher's copies, by the connection's index.
    copies: Vec<Option<u64>>,
    /// All connections by serial number, from 1 on.
    fates: Vec<Fate>,
    scratch: Vec<Ticket>,
}

impl Driver {
    /// An environment with this configuration.
    pub fn new(pools: Vec<PoolSettings>, listeners: Vec<ListenerSettings>) -> Driver {
        let now = Time(1_000_000_000);
        let slots = pools.iter().map(|pool| pool.max_untaken).max().unwrap_or(1) + SPARE_SLOTS;
        let slots = slots as usize;
        let many = pools.len() as u16;
        let mut driver = Driver {
            core: Core::new(pools, listeners, now),
            now,
            links: Vec::new(),
            scarcity: 0,
            log: Vec::new(),
            logging: true,
            races: None,
            raced: Vec::new(),
            slots,
            pools: many,
            copies: Vec::new(),
            fates: Vec::new(),
            scratch: Vec::new(),
        };
        // The first processes are started.
        driver.core.tick(now);
        driver.pump();
        driver
    }

    /// A worker with this hello joins, as user 0.
    pub fn join(&mut self, hello: Hello) -> Result<WorkerId, Refusal> {
        self.join_as(hello, None)
    }

    /// Like `join`, for a process that the dispatcher has started.
    pub fn join_as(
        &mut self,
        hello: Hello,
        spawned: Option<ProcessId>,
    ) -> Result<WorkerId, Refusal> {
        let join = Join { pid: 1, uid: 0, gids: vec![0], hello, spawned };
        let id = self.core.join(self.now, &join)?;
        let pool = self.core.pool_of_worker(id);
        let scored = pool.map_or(0, |pool| self.core.scored_gauges(pool).len());
        self.links.push(Link {
            id,
            channel: VecDeque::new(),
            capacity: 278,
            closed: false,
            alive: true,
            cut: false,
            forgotten: false,
            finished: join.hello.finished,
            board: (0..self.slots).map(|_| AtomicU64::new(0)).collect(),
            taken_at: vec![Time::default(); self.slots],
            gauges: vec![None; scored],
            told: vec![None; scored],
            notices: Vec::new(),
            gathered: Vec::new(),
        });
        self.pump();
        Ok(id)
    }

    /// The state of a worker.
    pub fn link(&mut self, worker: WorkerId) -> &mut Link {
        &mut self.links[worker.serial as usize - 1]
    }

    /// Accepts a client; [`Driver::pump`] performs the effects.
    pub fn accept_only(&mut self, listener: ListenerId) -> ConnId {
        self.accept_only_from(listener, ClientAddr::Unix)
    }

    /// Like `accept_only`, from this address.
    pub fn accept_only_from(&mut self, listener: ListenerId, peer: ClientAddr) -> ConnId {
        self.accept_client(Client::new(listener, peer))
    }

    /// Like `accept_only`, for this client.
    pub fn accept_client(&mut self, client: Client) -> ConnId {
        let conn = self.core.accepted(self.now, client);
        self.fates.push(Fate::default());
        assert_eq!(self.fates.len() as u64, conn.serial);
        let index = conn.index as usize;
        if self.copies.len() <= index {
            self.copies.resize(index + 1, None);
        }
        let before = self.copies[index].replace(conn.serial);
        assert_eq!(before, None, "an index is not used again too early");
        conn
    }

    /// Accepts a client and performs the effects.
    pub fn accept(&mut self, listener: ListenerId) -> ConnId {
        let conn = self.accept_only(listener);
        self.pump();
        conn
    }

    /// Whether a worker has taken the connection.
    pub fn is_served(&self, conn: ConnId) -> bool {
        self.fates[conn.serial as usize - 1].served
    }

    /// Why the dispatcher has closed the connection, if it has.
    pub fn closed(&self, conn: ConnId) -> Option<CloseReason> {
        self.fates[conn.serial as usize - 1].closed
    }

    /// Connections of which the dispatcher has a copy.
    pub fn open_copies(&self) -> usize {
        self.copies.iter().flatten().count()
    }

    /// Performs effects and sends the gathered records until neither is left.
    pub fn pump(&mut self) {
        loop {
            while let Some(effect) = self.core.effect() {
                self.perform(&effect);
                if self.logging {
                    self.log.push(effect);
                }
            }
            if !self.flush() {
                break;
            }
        }
    }

    fn perform(&mut self, effect: &Effect) {
        match *effect {
            Effect::Send { worker, conn, ticket, flags, .. } => {
                assert_eq!(self.copies[conn.index as usize], Some(conn.serial));
                assert!(EntryFlags::RESENT.contains(flags));
                let link = self.link(worker);
                slot::offer(&link.board[ticket.slot as usize], ticket.seq);
                let conn = Some(conn);
                link.gathered.push(Record { ticket, conn });
            }
            // The worker takes it like a probe; the answer is up to the test.
            Effect::Probe { worker, ticket } | Effect::SendCheck { worker, ticket } => {
                let link = self.link(worker);
                slot::offer(&link.board[ticket.slot as usize], ticket.seq);
                link.gathered.push(Record { ticket, conn: None });
            }
            Effect::Revoke { worker, ticket } => {
                self.race(worker);
                let slot = &self.link(worker).board[ticket.slot as usize];
                let outcome = slot::revoke(slot, ticket.seq);
                self.core.revoked(self.now, worker, ticket, outcome);
            }
            Effect::Notify { worker, notice } => {
                // The gathered records are sent first.
                self.flush();
                let link = self.link(worker);
                let failure = if link.closed || link.cut {
                    Some(SendFailure::Closed)
                } else {
                    (link.channel.len() >= link.capacity).then_some(SendFailure::Full)
                };
                match failure {
                    None => link.notices.push(notice),
                    Some(why) => self.core.notice_failed(self.now, worker, why),
                }
            }
            Effect::Purge { worker } => {
                let link = self.link(worker);
                link.channel.clear();
                link.notices.clear();
                self.core.purged(self.now, worker);
            }
            Effect::Release { worker, conn, ticket } => {
                assert!(self.is_served(conn), "released, so a worker has it");
                self.drop_copy(conn);
                slot::release(&self.link(worker).board[ticket.slot as usize], ticket.seq);
            }
            Effect::Close { conn, reason, .. } => {
                let fate = &mut self.fates[conn.serial as usize - 1];
                assert!(!fate.served, "closed by the dispatcher, so no worker has it");
                assert_eq!(fate.closed.replace(reason), None);
                self.drop_copy(conn);
            }
            Effect::Disconnect { worker, .. } => self.link(worker).cut = true,
            Effect::Forget { worker } => {
                let link = self.link(worker);
                assert!(!link.forgotten);
                link.forgotten = true;
                // Its process may live on, but cannot claim any more.
                for record in link.channel.drain(..).chain(link.gathered.drain(..)) {
                    let slot = &link.board[record.ticket.slot as usize];
                    assert!(!slot::take(slot, record.ticket.seq));
                }
            }
            Effect::CheckOver { worker, ticket, taken: true } => {
                slot::release(&self.link(worker).board[ticket.slot as usize], ticket.seq);
            }
            Effect::Spawn { .. }
            | Effect::StopProcess { .. }
            | Effect::EndProcess { .. }
            | Effect::CheckReady { .. }
            | Effect::CheckOver { taken: false, .. }
            | Effect::Steer { .. }
            | Effect::MoveQueue { .. }
            | Effect::Event(_) => {}
        }
    }

    /// Sometimes a worker takes the connection just before the dispatcher revokes it.
    fn race(&mut self, worker: WorkerId) {
        if self.link(worker).alive
            && self.races.as_mut().is_some_and(|races| races.once_in(4))
            && self.take(worker).is_some()
        {
            self.raced.push(worker);
        }
    }

    fn drop_copy(&mut self, conn: ConnId) {
        let copy = self.copies[conn.index as usize].take();
        assert_eq!(copy, Some(conn.serial));
    }

    /// Sends the gathered records; true if it reported a failure to the core.
    fn flush(&mut self) -> bool {
        let mut told = false;
        for link in &mut self.links {
            if link.gathered.is_empty() {
                continue;
            }
            for record in std::mem::take(&mut link.gathered) {
                let failure = if link.closed || link.cut {
                    Some(SendFailure::Closed)
                } else if self.scarcity > 0 {
                    self.scarcity -= 1;
                    Some(SendFailure::Resources)
                } else if link.channel.len() >= link.capacity {
                    Some(SendFailure::Full)
                } else {
                    None
                };
                let Some(failure) = failure else {
                    link.channel.push_back(record);
                    continue;
                };
                told = true;
                let ticket = record.ticket;
                slot::revoke(&link.board[ticket.slot as usize], ticket.seq);
                match record.conn {
                    Some(_) => self.core.send_failed(self.now, link.id, ticket, failure),
                    None => self.core.probe_failed(self.now, link.id, ticket, failure),
                }
            }
        }
        told
    }

    /// Reads every worker's counter and slots, as the event loop does once per turn, then calls the
    /// core's tick.
    pub fn turn(&mut self) {
        self.read_gauges();
        for link in &self.links {
            if link.forgotten {
                continue;
            }
            let finished = link.finished;
            self.scratch.clear();
            self.scratch.extend(self.core.tickets(link.id));
            for &ticket in &self.scratch {
                let state = slot::state(&link.board[ticket.slot as usize], ticket.seq);
                let taken_at = link.taken_at[ticket.slot as usize];
                self.core.slot(self.now, link.id, ticket, state, taken_at);
            }
            self.core.finished(self.now, link.id, finished);
        }
        self.core.tick(self.now);
        self.pump();
    }

    /// Reads the gauges that the core wants now.
    fn read_gauges(&mut self) {
        let pools = (0..self.pools).map(PoolId);
        let due: Vec<bool> = pools.map(|pool| self.core.reads_gauges(self.now, pool)).collect();
        for link in self.links.iter_mut().filter(|link| !link.forgotten) {
            let pool = self.core.pool_of_worker(link.id);
            let due = pool.is_some_and(|pool| due.get(usize::from(pool.0)) == Some(&true));
            if !due && !self.core.lacks_gauges(link.id) {
                continue;
            }
            for (gauge, (said, told)) in link.gauges.iter().zip(&mut link.told).enumerate() {
                let bits = |reading: Reading| (reading.value.to_bits(), reading.at);
                if said.map(bits) != told.map(bits) {
                    *told = *said;
                    self.core.gauge(self.now, link.id, gauge, *said);
                }
            }
        }
    }

    /// Advances the time and runs a turn.
    pub fn wait(&mut self, time: Duration) {
        self.now = self.now + time;
        self.turn();
    }

    /// The worker receives records and answers probes until it has claimed a connection; true if it
    /// has.
    pub fn take(&mut self, worker: WorkerId) -> Option<ConnId> {
        let now = self.now;
        loop {
            let link = self.link(worker);
            let Record { ticket, conn } = link.channel.pop_front()?;
            let claimed = slot::take(&link.board[ticket.slot as usize], ticket.seq);
            if claimed {
                link.taken_at[ticket.slot as usize] = now;
            }
            if let Some(conn) = conn
                && claimed
            {
                let fate = &mut self.fates[conn.serial as usize - 1];
                assert!(!fate.served, "served twice");
                assert_eq!(fate.closed, None, "served after it was closed");
                fate.served = true;
                return Some(conn);
            }
        }
    }

    /// The worker receives its oldest record if that is a probe, and answers it.
    pub fn answer(&mut self, worker: WorkerId) -> bool {
        let link = self.link(worker);
        if link.channel.front().is_none_or(|record| record.conn.is_some()) {
            return false;
        }
        let probe = link.channel.pop_front();
        probe.is_some_and(|Record { ticket, .. }| {
            slot::take(&link.board[ticket.slot as usize], ticket.seq)
        })
    }

    /// The worker receives one record whose connection does not arrive.
    pub fn lose(&mut self, worker: WorkerId) -> bool {
        let link = self.link(worker);
        let Some(Record { ticket, conn }) = link.channel.pop_front() else {
            return false;
        };
        let slot = &link.board[ticket.slot as usize];
        match conn {
            Some(_) => slot::decline(slot, ticket.seq),
            None => slot::take(slot, ticket.seq),
        }
    }

    /// The worker writes an impossible word into the slot of its oldest record.
    pub fn scribble(&mut self, worker: WorkerId) -> bool {
        let link = self.link(worker);
        let Some(Record { ticket, .. }) = link.channel.pop_front() else {
            return false;
        };
        // Only if it is SENT: a claimed slot must stay TAKEN.
        let slot = &link.board[ticket.slot as usize];
        if slot::revoke(slot, ticket.seq) == Revoke::Revoked {
            slot.store(u64::MAX, Ordering::Release);
        }
        true
    }
}
