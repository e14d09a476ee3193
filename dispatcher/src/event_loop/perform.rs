//! Performing the core's effects: sending, revoking, releasing, closing. One exhaustive match, no decision.
//!
//! Nothing here touches a description that another process may hold, but for `sendmsg` on a channel, which takes no lock
//! of a socket: what else there is to do with descriptors goes to the [closers](crate::background::closer).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::slot::{self, SlotState};
use dispatch_protocol::wire::{
    Drain, Entry, EntryFlags, Handoff, MAX_FDS_PER_RECORD, Probe, Resume,
};
use rustix::io::Errno;

use super::connections::Conn;
use super::event_order::DelayedEvent;
use super::handshake::HandshakeCommand;
use super::rate_limit::Cause;
use super::worker_io::{Deferred, WorkerIo, classify, send_record};
use super::{EventLoop, clock};
use crate::background::closer::{Owner, Task};
use crate::background::logger::quoted;
use dispatcher_core::{
    CloseReason, ConnId, Core, Effect, Notice, SendFailure, Ticket, Time, WorkerId,
};

impl EventLoop {
    /// Performs effects until there are none, and sends what they gathered.
    pub(super) fn perform(&mut self) {
        loop {
            while let Some(effect) = self.core.effect() {
                self.carry_out(effect);
            }
            match self.workers.dirty.pop() {
                Some(index) => self.flush(index),
                None => return self.write_delayed_events(),
            }
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Send { worker, conn, ticket, listener, flags, tell } => {
                self.connections.unwatch(self.wakeup.registry(), conn);
                let found = self.connections.get_mut(conn.index);
                let Some(Conn { peer, accepted, at_worker, .. }) = found else { return };
                let (peer, accepted) = (*peer, *accepted);
                *at_worker = Some(worker.serial);
                let Ticket { slot, seq } = ticket;
                let accepted_ns = accepted.0.wrapping_add(self.connections.to_realtime);
                // As it was accepted; a worker that had it before could have changed that.
                let flags = match flags.contains(EntryFlags::RESENT) {
                    true => flags,
                    false => flags | EntryFlags::NONBLOCKING,
                };
                let (listener, number) = (listener.0, conn.serial);
                let entry = Entry { seq, slot, listener, flags, accepted_ns, peer, number };
                if tell {
                    self.delay_event(DelayedEvent::Resent { to: worker, conn, peer: entry.peer });
                }
                let Some(io) = self.workers.get_mut(worker) else { return };
                if let Some(deferred) = &mut io.purge {
                    if let Some(slot) = io.lane.board.slot(slot) {
                        slot::offer(slot, seq);
                    }
                    deferred.entries.push((conn, entry));
                    return;
                }
                io.outbox.push((conn, entry));
                let (first, full) = (io.outbox.len() == 1, io.outbox.len() == MAX_FDS_PER_RECORD);
                if full {
                    self.flush(worker.index);
                } else if first {
                    self.workers.dirty.push(worker.index);
                }
            }
            Effect::Probe { worker, ticket } => {
                self.flush(worker.index);
                self.probe(worker, ticket);
            }
            Effect::Tell { worker, notice } => {
                // After what it was sent before.
                self.flush(worker.index);
                self.give_notice(worker, notice);
            }
            Effect::Revoke { worker, ticket } => {
                // What is revoked must have been sent first, or the record would follow its revocation.
                self.flush(worker.index);
                let Some(io) = self.workers.get_mut(worker) else { return };
                if let Some(deferred) = &mut io.purge {
                    deferred.entries.retain(|(_, entry)| entry.seq != ticket.seq);
                    deferred.probe.take_if(|probe| *probe == ticket);
                }
                let Some(slot) = io.lane.board.slot(ticket.slot) else { return };
                let outcome = slot::revoke(slot, ticket.seq);
                self.core.revoked(self.now, worker, ticket, outcome);
            }
            Effect::Purge { worker } => {
                self.flush(worker.index);
                let Some(io) = self.workers.get_mut(worker) else { return };
                // Nothing has been sent since a purge began that is still under way.
                if io.purge.is_none() {
                    io.purge = Some(Deferred::default());
                    let retained = Arc::clone(&io.lane.retained);
                    let most = io.lane.most_records();
                    self.background.closers.task(Task::Purge { worker, retained, most });
                }
                self.core.purged(self.now, worker);
            }
            Effect::Release { worker, conn, ticket } => {
                // RELEASED is written after the close. A worker that closes before finds its slot not released, and shuts
                // the connection down; the slot is not used again so soon, see the ring in `pool`.
                let Some(Conn { fd, .. }) = self.connections.take(conn) else { return };
                match self.workers.get(worker) {
                    Some(io) => {
                        let slot = (ticket.slot, ticket.seq);
                        self.background.closers.release(fd, &io.lane.board, slot, worker);
                    }
                    None => self.background.closers.task(Task::Close(fd)),
                }
            }
            Effect::Close { conn, reason, shared } => {
                self.connections.unwatch(self.wakeup.registry(), conn);
                self.close_client(conn, reason, shared);
            }
            Effect::Disconnect { worker, reason } => {
                let Some(io) = self.workers.get(worker) else { return };
                // Both at once: the worker finds its channel ended, and rejoins if it can.
                io.lane.shut();
                self.handshakes.send(HandshakeCommand::Cut(worker));
                let pool = self.core.pool_of_worker(worker);
                if let Some(suppressed) = self.observation.allow(self.now, pool, Cause::Broken) {
                    log::warn!(
                        "event=worker_expelled {} reason={reason} left_out={suppressed}",
                        self.worker(worker),
                        reason = quoted(&reason)
                    );
                }
            }
            Effect::Forget { worker } => {
                if let Some(io) = self.workers.remove(self.wakeup.registry(), worker) {
                    self.put_away(io);
                }
            }
            Effect::Spawn { process } => self.spawn(process),
            Effect::StopProcesses { pool } => {
                self.side.spawner.stop_pool(pool, self.config.limits.stop_timeout);
            }
            Effect::Event(event) => self.write_event_in_order(event),
        }
    }

    fn give_notice(&mut self, worker: WorkerId, notice: Notice) {
        let Some(io) = self.workers.get_mut(worker) else { return };
        if let Some(deferred) = &mut io.purge {
            // Each says all there is to say.
            deferred.notice = Some(notice);
            return;
        }
        let mut record = Vec::new();
        match notice {
            Notice::Drain { deadline } => {
                let left = deadline.map(|deadline| deadline - clock());
                Drain { deadline_ns: deadline.map_or(0, |time| time.0), left }.encode(&mut record);
            }
            Notice::Resume => Resume.encode(&mut record),
        }
        if let Err(why) = io.lane.send(&record) {
            self.core.notice_failed(self.now, worker, why);
        }
    }

    /// Sends the gathered connections of a worker in one record.
    ///
    /// The slots are written before the record: the worker may read them the moment it arrives.
    fn flush(&mut self, index: u32) {
        let Some(io) = self.workers.at_mut(index) else { return };
        if io.outbox.is_empty() {
            return;
        }
        let worker = io.id;
        let mut outbox = std::mem::take(&mut io.outbox);
        for part in outbox.chunks(MAX_FDS_PER_RECORD) {
            match send_gathered(
                io,
                part,
                &self.connections.table,
                &mut self.connections.entries,
                &mut self.connections.record,
            ) {
                Ok(()) => {}
                Err(Errno::TOOMANYREFS) => {
                    for one in part.chunks(1) {
                        let result = send_gathered(
                            io,
                            one,
                            &self.connections.table,
                            &mut self.connections.entries,
                            &mut self.connections.record,
                        );
                        let Err(errno) = result else { continue };
                        let why = match errno {
                            // What a descriptor of our own can, this client's cannot.
                            Errno::TOOMANYREFS if self.connections.handoff_check.passes() => {
                                SendFailure::Client
                            }
                            other => classify(other),
                        };
                        not_sent(&mut self.core, self.now, io, worker, one, why);
                    }
                }
                Err(errno) => not_sent(&mut self.core, self.now, io, worker, part, classify(errno)),
            }
        }
        outbox.clear();
        // The emptied vector goes back, so that a warm worker's record costs no allocation.
        io.outbox = outbox;
    }

    /// A worker's channel is empty: what was kept for it meanwhile is sent, as far as it still counts.
    pub(super) fn purged(&mut self, worker: WorkerId) {
        let Some(io) = self.workers.get_mut(worker) else { return };
        let Some(Deferred { entries, probe, notice }) = io.purge.take() else { return };
        for (conn, entry) in entries {
            let Some(io) = self.workers.at_mut(worker.index) else { return };
            let ours = self.connections.get(conn.index);
            let sent = io.lane.board.slot(entry.slot).map(|slot| slot::state(slot, entry.seq));
            // A worker that guesses can have claimed or declined it; then the core knows by now, or will.
            if ours.is_some_and(|ours| ours.serial == conn.serial) && sent == Some(SlotState::Sent)
            {
                io.outbox.push((conn, entry));
            }
        }
        self.flush(worker.index);
        if let Some(ticket) = probe {
            self.probe(worker, ticket);
        }
        if let Some(notice) = notice {
            self.give_notice(worker, notice);
        }
    }

    fn probe(&mut self, worker: WorkerId, ticket: Ticket) {
        let Some(io) = self.workers.get_mut(worker) else { return };
        let Some(slot) = io.lane.board.slot(ticket.slot) else { return };
        slot::offer(slot, ticket.seq);
        if let Some(deferred) = &mut io.purge {
            deferred.probe = Some(ticket);
            return;
        }
        let mut record = Vec::with_capacity(32);
        Probe { seq: ticket.seq, slot: ticket.slot }.encode(&mut record);
        if let Err(why) = io.lane.send(&record) {
            let _ = slot::revoke(slot, ticket.seq);
            self.core.probe_failed(self.now, worker, ticket, why);
        }
    }

    /// Hands the closers what the turn has gathered for them.
    pub(super) fn hand_over(&mut self) {
        self.background.closing_due =
            (!self.background.closers.hand_over()).then(|| self.now + HAND_OVER_AGAIN);
    }

    fn close_client(&mut self, conn: ConnId, reason: CloseReason, shared: bool) {
        let Some(Conn { fd, peer, listener, at_worker, .. }) = self.connections.take(conn) else {
            return;
        };
        match reason {
            CloseReason::NoWorker | CloseReason::Shutdown => {
                self.observation.conditions.turned_away(self.core.pool_of_listener(listener));
                self.delay_event(DelayedEvent::Closed { conn, peer, listener, reason });
            }
            _ => self.write_closed(conn, &peer, listener, reason),
        }
        let response = match reason {
            CloseReason::NoWorker => {
                let listener = self.config.listeners.get(usize::from(listener.0));
                let pool = listener.and_then(|l| self.config.pools.get(usize::from(l.pool)));
                pool.and_then(|pool| pool.unavailable_response.clone())
            }
            CloseReason::ClientGone
            | CloseReason::Shutdown
            | CloseReason::Denied
            | CloseReason::RateLimited
            | CloseReason::TooManyQueued
            | CloseReason::Unsendable => None,
        };
        let owner = match (at_worker, peer) {
            // A worker that had it may hold a copy, and its lock.
            (Some(serial), _) if shared => Some(Owner::Worker(serial)),
            (_, ClientAddr::Inet(_)) => None,
            // Its queue may hold descriptors, whose closes linger.
            (_, _) => Some(Owner::Other),
        };
        // With a copy elsewhere closing alone would end nothing.
        if response.is_some() || shared {
            self.background.closers.task(Task::End { fd, response, owner });
        } else {
            match owner {
                Some(owner) => self.background.closers.task(Task::Drop(owner, Box::new(fd))),
                None => self.background.closers.task(Task::Close(fd)),
            }
        }
    }

    /// Drops everything kept for a worker: out of the poll first, the channel before the control connection.
    pub(super) fn put_away(&mut self, io: WorkerIo) {
        io.lane.shut();
        // What is queued in the channel goes with its last reference, which may be ours.
        let owner = Owner::Worker(io.id.serial);
        self.background.closers.task(Task::Drop(owner, Box::new(io.lane)));
        self.handshakes.send(HandshakeCommand::Forget(io.id));
    }
}

/// When to hand over again after the closers had the queue.
const HAND_OVER_AGAIN: Duration = Duration::from_millis(1);

/// Nobody was told of these, so nobody can have claimed them.
fn not_sent(
    core: &mut Core,
    now: Time,
    io: &WorkerIo,
    worker: WorkerId,
    entries: &[(ConnId, Entry)],
    why: SendFailure,
) {
    for (_, entry) in entries {
        let ticket = Ticket { slot: entry.slot, seq: entry.seq };
        if let Some(slot) = io.lane.board.slot(entry.slot) {
            let _ = slot::revoke(slot, entry.seq);
        }
        core.send_failed(now, worker, ticket, why);
    }
}

fn send_gathered(
    io: &WorkerIo,
    outbox: &[(ConnId, Entry)],
    conns: &[Option<Conn>],
    entries: &mut Vec<Entry>,
    record: &mut Vec<u8>,
) -> Result<(), Errno> {
    entries.clear();
    record.clear();
    let mut fds: [BorrowedFd<'_>; MAX_FDS_PER_RECORD] =
        [io.lane.channel.as_fd(); MAX_FDS_PER_RECORD];
    for ((conn, entry), place) in outbox.iter().zip(&mut fds) {
        let found = conns.get(conn.index as usize).and_then(Option::as_ref);
        let (Some(found), Some(slot)) = (found, io.lane.board.slot(entry.slot)) else {
            debug_assert!(false, "an effect names a connection or slot that does not exist");
            return Err(Errno::PIPE);
        };
        *place = found.fd.as_fd();
        entries.push(*entry);
        slot::offer(slot, entry.seq);
    }
    Handoff::encode_entries(entries, record);
    send_record(io.lane.channel.as_fd(), record, &fds[..entries.len()])
}
