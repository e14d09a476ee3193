//! Performing the core's effects: sending, revoking, releasing, closing. One exhaustive match, no decision.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::net::Shutdown;
use rustix::net::sockopt::socket_linger;
use worker_sdk::scoreboard::claim;
use worker_sdk::wire::{Drain, Entry, EntryFlags, Handoff, MAX_FDS_PER_RECORD, Probe, Resume};

use super::accept::Conn;
use super::join::forget;
use super::worker_io::WorkerIo;
use super::{Shell, clock};
use crate::closer::{Closing, answer};
use crate::pool::{CloseReason, ConnId, Effect, Notice, SendFailure, Ticket, WorkerId};

impl Shell {
    /// Performs effects until there are none, and sends what they gathered.
    pub(super) fn perform(&mut self) {
        loop {
            while let Some(effect) = self.core.effect() {
                self.carry_out(effect);
            }
            let Some(index) = self.dirty.pop() else { return };
            self.flush(index);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Send { worker, conn, ticket, listener, flags } => {
                self.unwatch(conn);
                let found = self.conns.get(conn.index as usize).and_then(Option::as_ref);
                let Some(&Conn { peer, accepted, .. }) = found else { return };
                let Ticket { slot, seq } = ticket;
                let accepted_ns = accepted.0;
                // As it was accepted; a worker that had it before could have changed that.
                let flags = match flags.contains(EntryFlags::RESENT) {
                    true => flags,
                    false => flags | EntryFlags::NONBLOCKING,
                };
                let (listener, number) = (listener.0, conn.serial);
                let entry = Entry { seq, slot, listener, flags, accepted_ns, peer, number };
                if flags.contains(EntryFlags::RESENT) {
                    self.tell_resent(worker, conn, &entry.peer);
                }
                let Some(io) = self.io_mut(worker) else { return };
                io.outbox.push((conn, entry));
                let (first, full) = (io.outbox.len() == 1, io.outbox.len() == MAX_FDS_PER_RECORD);
                if full {
                    self.flush(worker.index);
                } else if first {
                    self.dirty.push(worker.index);
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
                let Some(io) = self.io(worker) else { return };
                let Some(slot) = io.lane.board.slot(ticket.slot) else { return };
                let outcome = claim::revoke(slot, ticket.seq);
                self.core.revoked(self.now, worker, ticket, outcome);
            }
            Effect::Purge { worker } => {
                self.flush(worker.index);
                if let Some(io) = self.io(worker) {
                    io.lane.purge();
                }
            }
            Effect::Release { worker, conn, ticket } => {
                // The slot is free for the next from here on. A worker that closes before the end of this turn leaves the
                // connection's end to our copy.
                let copy = self.take_conn(conn);
                self.copies.extend(copy.map(|conn| conn.fd));
                if let Some(slot) = self.io(worker).and_then(|io| io.lane.board.slot(ticket.slot)) {
                    claim::release(slot, ticket.seq);
                }
            }
            Effect::Close { conn, reason, shared } => {
                self.unwatch(conn);
                self.close_client(conn, reason, shared);
            }
            Effect::Disconnect { worker, reason } => {
                let Some(io) = self.io(worker) else { return };
                // Both ends at once: the worker finds its channel ended, and rejoins if it can.
                let _ = rustix::net::shutdown(&io.lane.channel, Shutdown::Both);
                let _ = rustix::net::shutdown(&io.control, Shutdown::Both);
                if let Some(left_out) = self.limits.broken.allow(self.now) {
                    log::warn!(
                        "event=worker_expelled {} reason=\"{reason}\" left_out={left_out}",
                        self.worker(worker)
                    );
                }
            }
            Effect::Forget { worker } => {
                let place = self.workers.get_mut(worker.index as usize);
                if let Some(io) = place.and_then(|place| place.take_if(|io| io.id == worker)) {
                    self.put_away(io);
                }
            }
            Effect::Spawn { process } => self.spawn(process),
            Effect::StopProcesses { pool } => {
                self.side.spawner.stop_pool(pool, self.config.limits.stop_timeout);
            }
            Effect::Event(event) => self.tell(&event),
        }
    }

    fn give_notice(&mut self, worker: WorkerId, notice: Notice) {
        let Some(io) = self.io(worker) else { return };
        let mut record = Vec::new();
        match notice {
            Notice::Drain { deadline } => {
                let left = deadline.map(|deadline| deadline - clock());
                Drain { deadline_ns: deadline.map_or(0, |time| time.0), left }.encode(&mut record);
            }
            Notice::Resume => Resume.encode(&mut record),
        }
        if let Err(why) = io.lane.send(&record, &[]) {
            self.core.notice_failed(self.now, worker, why);
        }
    }

    pub(super) fn io(&self, worker: WorkerId) -> Option<&WorkerIo> {
        let io = self.workers.get(worker.index as usize)?.as_ref()?;
        (io.id == worker).then_some(io)
    }

    fn io_mut(&mut self, worker: WorkerId) -> Option<&mut WorkerIo> {
        let io = self.workers.get_mut(worker.index as usize)?.as_mut()?;
        (io.id == worker).then_some(io)
    }

    /// Sends the gathered connections of a worker in one record.
    ///
    /// The slots are written before the record: the worker may read them the moment it arrives.
    fn flush(&mut self, index: u32) {
        let Some(io) = self.workers.get_mut(index as usize).and_then(Option::as_mut) else {
            return;
        };
        if io.outbox.is_empty() {
            return;
        }
        let worker = io.id;
        let mut outbox = std::mem::take(&mut io.outbox);
        let result = send_gathered(io, &outbox, &self.conns, &mut self.entries, &mut self.record);
        if let Err(why) = result {
            for (_, entry) in &outbox {
                let ticket = Ticket { slot: entry.slot, seq: entry.seq };
                // Nobody was told of it, so nobody can have claimed it.
                if let Some(slot) = io.lane.board.slot(entry.slot) {
                    let _ = claim::revoke(slot, entry.seq);
                }
                self.core.send_failed(self.now, worker, ticket, why);
            }
        }
        outbox.clear();
        // The emptied vector goes back, so that a warm worker's record costs no allocation.
        io.outbox = outbox;
    }

    fn probe(&mut self, worker: WorkerId, ticket: Ticket) {
        let Some(io) = self.io(worker) else { return };
        let Some(slot) = io.lane.board.slot(ticket.slot) else { return };
        claim::offer(slot, ticket.seq);
        let mut record = Vec::with_capacity(32);
        Probe { seq: ticket.seq, slot: ticket.slot }.encode(&mut record);
        if let Err(why) = io.lane.send(&record, &[]) {
            let _ = claim::revoke(slot, ticket.seq);
            self.core.probe_failed(self.now, worker, ticket, why);
        }
    }

    /// Closes our copies of connections that workers have.
    ///
    /// A worker may have asked for a lingering close and closed its own copy already; then ours is the
    /// last and could block for seconds, so another thread does it.
    pub(super) fn close_copies(&mut self) {
        while let Some(fd) = self.copies.pop() {
            match socket_linger(&fd) {
                Ok(Some(linger)) if linger > Duration::ZERO => {
                    self.close_elsewhere(Closing::copy(fd))
                }
                Ok(_) | Err(_) => drop(fd),
            }
        }
    }

    fn close_elsewhere(&mut self, closing: Closing) {
        if let Err(closing) = self.closer.close(closing) {
            self.lingering.push_back(closing);
        }
    }

    /// Offers the closer again what it had no room for.
    pub(super) fn retry_lingering(&mut self) {
        while let Some(closing) = self.lingering.pop_front() {
            if let Err(closing) = self.closer.close(closing) {
                self.lingering.push_front(closing);
                return;
            }
        }
    }

    fn close_client(&mut self, conn: ConnId, reason: CloseReason, shared: bool) {
        let Some(Conn { fd, peer, listener, .. }) = self.take_conn(conn) else { return };
        self.tell_closed(conn, &peer, listener, reason);
        let listener = self.config.listeners.get(usize::from(listener.0));
        let pool = listener.and_then(|listener| self.config.pools.get(usize::from(listener.pool)));
        let response = pool
            .filter(|_| reason == CloseReason::NoWorker)
            .and_then(|pool| pool.unavailable_response.as_deref());
        if shared {
            // A worker that had it may hold a copy: ours is not the last. It may hold up whoever touches it, too.
            self.close_elsewhere(Closing::whole(fd, response));
        } else if let Some(response) = response {
            answer(&fd, response);
        }
    }

    fn take_conn(&mut self, conn: ConnId) -> Option<Conn> {
        self.conns.get_mut(conn.index as usize)?.take()
    }

    /// Drops everything kept for a worker: out of the poll first, the channel before the control connection.
    pub(super) fn put_away(&mut self, io: WorkerIo) {
        let registry = self.poll.registry();
        forget(registry, &io.control);
        forget(registry, &io.lane.poke);
        if let Some(pidfd) = &io.pidfd {
            forget(registry, pidfd);
        }
        self.gauge_readers -= usize::from(io.gauges.is_some());
        drop(io.lane);
        drop(io.control);
    }
}

fn send_gathered(
    io: &WorkerIo,
    outbox: &[(ConnId, Entry)],
    conns: &[Option<Conn>],
    entries: &mut Vec<Entry>,
    record: &mut Vec<u8>,
) -> Result<(), SendFailure> {
    entries.clear();
    record.clear();
    let mut fds: [BorrowedFd<'_>; MAX_FDS_PER_RECORD] = [io.control.as_fd(); MAX_FDS_PER_RECORD];
    for ((conn, entry), place) in outbox.iter().zip(&mut fds) {
        let found = conns.get(conn.index as usize).and_then(Option::as_ref);
        let (Some(found), Some(slot)) = (found, io.lane.board.slot(entry.slot)) else {
            debug_assert!(false, "an effect names a connection or slot that does not exist");
            return Err(SendFailure::Closed);
        };
        *place = found.fd.as_fd();
        entries.push(*entry);
        claim::offer(slot, entry.seq);
    }
    Handoff::encode_entries(entries, record);
    io.lane.send(record, &fds[..entries.len()])
}
