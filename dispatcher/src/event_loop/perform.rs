//! Performs the effects of the core: sending, revoking, releasing, closing. One exhaustive match
//! without decisions.
//!
//! The hot thread makes no call on a socket that another process may hold, except `sendmsg` on a
//! channel, which takes no socket lock. All other calls go to the
//! [closers](crate::background::closer).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::slot::{self, SlotState};
use dispatch_protocol::wire::{
    Drain, Entry, EntryFlags, Handoff, MAX_FDS_PER_RECORD, MAX_PROXY_HEADERS, Probe, Resume,
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
    /// Performs effects until there are none, and sends the gathered connections.
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
            Effect::Send { worker, conn, ticket, log, .. } if self.lines.has(worker) => {
                self.send_line(worker, conn, ticket, log);
            }
            // No listener of a steered pool is accepted from.
            Effect::Send { worker, ticket, .. } if self.steers.has(worker) => {
                self.core.send_failed(self.now, worker, ticket, SendFailure::Client);
            }
            Effect::Send { worker, conn, ticket, listener, flags, log } => {
                self.connections.unwatch(self.wakeup.registry(), conn);
                let found = self.connections.get_mut(conn.index);
                let Some(Conn { peer, accepted, at_worker, .. }) = found else { return };
                let (peer, accepted) = (*peer, *accepted);
                *at_worker = Some(worker.serial);
                let Ticket { slot, seq } = ticket;
                let accepted_ns = accepted.0.wrapping_add(self.connections.to_realtime);
                // Accepted sockets are non-blocking; an earlier worker could have changed that.
                let flags = match flags.contains(EntryFlags::RESENT) {
                    true => flags,
                    false => flags | EntryFlags::NONBLOCKING,
                };
                let (listener, number) = (listener.0, conn.serial);
                let entry = Entry { seq, slot, listener, flags, accepted_ns, peer, number };
                if log {
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
            Effect::Notify { worker, notice } => {
                // The notice follows the connections that were sent before it.
                self.flush(worker.index);
                self.give_notice(worker, notice);
            }
            Effect::Revoke { worker, ticket } => {
                // The connection must be sent before it is revoked, or its record would follow the
                // revocation.
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
                // If a purge is under way, nothing has been sent since it began.
                if io.purge.is_none() {
                    io.purge = Some(Deferred::default());
                    let retained = Arc::clone(&io.lane.retained);
                    let most = io.lane.most_records();
                    self.background.closers.task(Task::Purge { worker, retained, most });
                }
                self.core.purged(self.now, worker);
            }
            Effect::Release { worker, conn, ticket } => {
                // RELEASED is written after the close. A worker that closes before that finds its
                // slot not released and shuts the connection down. The slot is not reused so soon;
                // see the ring in the core.
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
                if let Some(io) = self.workers.get(worker) {
                    // Both at once: the worker finds its channel ended, and rejoins if it can.
                    io.lane.shut();
                    self.handshakes.send(HandshakeCommand::Cut(worker));
                } else if self.lines.has(worker) {
                    self.cut_line(worker);
                } else {
                    return;
                }
                let pool = self.core.pool_of_worker(worker);
                if let Some(suppressed) = self.observation.allow(self.now, pool, Cause::Broken) {
                    log::warn!(
                        "event=worker_expelled {} reason={reason} suppressed={suppressed}",
                        self.worker(worker),
                        reason = quoted(&reason)
                    );
                }
            }
            Effect::Forget { worker } if self.lines.has(worker) => self.forget_line(worker),
            Effect::Forget { worker } if self.steers.has(worker) => self.forget_steered(worker),
            Effect::Forget { worker } => {
                if let Some(io) = self.workers.remove(self.wakeup.registry(), worker) {
                    self.put_away(io);
                }
            }
            Effect::Spawn { process } => {
                if !self.prepare_process(process) {
                    self.spawn_at(process, None, Vec::new());
                }
            }
            Effect::StopProcess { process, timeout } => {
                self.side.spawner.stop_process(process, Duration::ZERO, timeout);
            }
            Effect::EndProcess { process, has_connections } => {
                self.end_process(process, has_connections);
            }
            Effect::CheckReady { process, worker: _ } => self.check_ready(process),
            Effect::SendCheck { worker, ticket } => {
                self.flush(worker.index);
                self.send_check(worker, ticket);
            }
            Effect::CheckOver { worker, ticket, taken } => self.check_over(worker, ticket, taken),
            Effect::Steer { worker, settings } => self.steer(worker, settings),
            Effect::MoveQueue { worker } => self.move_queue(worker),
            Effect::Event(event) => self.write_event_in_order(event),
        }
    }

    fn give_notice(&mut self, worker: WorkerId, notice: Notice) {
        let Some(io) = self.workers.get_mut(worker) else { return };
        if let Some(deferred) = &mut io.purge {
            // The last notice replaces earlier ones.
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
    /// The slots are written before the record, because the worker may read them as soon as the
    /// record arrives.
    fn flush(&mut self, index: u32) {
        let Some(io) = self.workers.at_mut(index) else { return };
        if io.outbox.is_empty() {
            return;
        }
        let worker = io.id;
        let mut outbox = std::mem::take(&mut io.outbox);
        let mut rest = &outbox[..];
        while !rest.is_empty() {
            let (part, later) = rest.split_at(fitting(rest, &self.connections.table));
            rest = later;
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
                            // A descriptor of the dispatcher passes, so the error concerns this
                            // client.
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
        // The empty vector is reused, so that a warm worker's record costs no allocation.
        io.outbox = outbox;
    }

    /// A worker's channel is empty: sends what was deferred meanwhile and is still valid.
    pub(super) fn purged(&mut self, worker: WorkerId) {
        let Some(io) = self.workers.get_mut(worker) else { return };
        let Some(Deferred { entries, probe, notice }) = io.purge.take() else { return };
        for (conn, entry) in entries {
            let Some(io) = self.workers.at_mut(worker.index) else { return };
            let ours = self.connections.get(conn.index);
            let sent = io.lane.board.slot(entry.slot).map(|slot| slot::state(slot, entry.seq));
            // A misbehaving worker can have claimed or declined the slot; the core knows, or will
            // know soon.
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

    /// Hands the closers the tasks of this turn.
    pub(super) fn hand_over(&mut self) {
        self.background.closing_due =
            (!self.background.closers.hand_over()).then(|| self.now + HAND_OVER_AGAIN);
    }

    fn close_client(&mut self, conn: ConnId, reason: CloseReason, shared: bool) {
        let Some(taken) = self.connections.take(conn) else { return };
        let source = taken.source();
        let Conn { fd, peer, listener, at_worker, .. } = taken;
        if matches!(reason, CloseReason::HandedOver | CloseReason::Unread) {
            // Another dispatcher has a copy, or a worker that has left may have one. The last close
            // of this socket is not here.
            return self.background.closers.task(Task::Drop(Owner::Other, Box::new(fd)));
        }
        match reason {
            CloseReason::NoWorker | CloseReason::Shutdown => {
                self.observation.conditions.turned_away(self.core.pool_of_listener(listener));
                self.delay_event(DelayedEvent::Closed { conn, peer, listener, reason });
            }
            _ => self.write_closed(conn, &peer, listener, reason),
        }
        let response = match reason {
            CloseReason::NoWorker => {
                let pool = self.core.pool_of_listener(listener);
                let pool = pool.and_then(|pool| self.pools.get(usize::from(pool.0)));
                pool.and_then(|pool| pool.unavailable_response.clone())
            }
            CloseReason::ClientGone
            | CloseReason::Shutdown
            | CloseReason::Denied
            | CloseReason::RateLimited
            | CloseReason::TooManyQueued
            | CloseReason::Unsendable
            | CloseReason::HandedOver
            | CloseReason::ProxyMissing
            | CloseReason::ProxyUntrusted
            | CloseReason::ProxyMalformed
            | CloseReason::ProxyTooLong
            | CloseReason::ProxyTimeout
            | CloseReason::Unread => None,
        };
        let owner = match (at_worker, source) {
            // A worker that had the connection may hold a copy, and the socket's lock.
            (Some(serial), _) if shared => Some(Owner::Worker(serial)),
            (_, ClientAddr::Inet(_)) => None,
            // The client's queue may hold descriptors whose closes linger.
            (_, _) => Some(Owner::Other),
        };
        // A worker may hold a copy, so that a close alone would not end the connection.
        if response.is_some() || shared {
            self.background.closers.task(Task::End { fd, response, owner });
        } else {
            match owner {
                Some(owner) => self.background.closers.task(Task::Drop(owner, Box::new(fd))),
                None => self.background.closers.task(Task::Close(fd)),
            }
        }
    }

    /// Tells a worker whose process this stop ends that its connections have some time left: a
    /// process with `on_dispatcher_loss = "stop"` would take the end of its channel for a crash and
    /// shut them down.
    pub(super) fn announce_stop(&self, io: &WorkerIo) {
        let (Some(pool), Some(_)) = (io.started_by, self.run.stop_deadline) else { return };
        let spawn = self.pools.get(usize::from(pool.0)).and_then(|pool| pool.spawn.as_ref());
        if spawn.is_none() || self.leaves(pool) {
            return;
        }
        let settings = self.core.pool_settings(pool).map(|settings| &settings.supervision);
        let left = settings.map_or(self.config.limits.stop_timeout, |it| it.stop_timeout);
        let deadline_ns = (self.now + left).0;
        let mut record = Vec::new();
        Drain { deadline_ns, left: Some(left) }.encode(&mut record);
        // It fails if the worker is gone, or reads nothing.
        let _ = io.lane.send(&record);
    }

    /// Drops the state of a worker that is out of the table: the channel before the control
    /// connection.
    pub(super) fn put_away(&mut self, io: WorkerIo) {
        self.announce_stop(&io);
        io.lane.shut();
        // The queue of the channel is dropped with its last reference, which may be this one.
        let owner = Owner::Worker(io.id.serial);
        self.background.closers.task(Task::Drop(owner, Box::new(io.lane)));
        self.handshakes.send(HandshakeCommand::Forget(io.id));
    }
}

/// When to hand over again after the closers' queue was locked.
const HAND_OVER_AGAIN: Duration = Duration::from_millis(1);

/// Reports entries that were not sent. No worker knows of them, so no worker can have claimed them.
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

/// How many of these connections fit into one record: its entries are bounded, and so is its room
/// for what proxies said.
fn fitting(outbox: &[(ConnId, Entry)], conns: &[Option<Conn>]) -> usize {
    let most = outbox.len().min(MAX_FDS_PER_RECORD);
    let mut headers = 0;
    for (count, (conn, _)) in outbox[..most].iter().enumerate() {
        let found = conns.get(conn.index as usize).and_then(Option::as_ref);
        let header = found.and_then(|found| found.proxy.as_ref());
        headers += header.map_or(0, |header| header.encoded_len());
        if headers > MAX_PROXY_HEADERS {
            return count.max(1);
        }
    }
    most
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
    for (index, (conn, _)) in (0u16..).zip(outbox) {
        let found = conns.get(conn.index as usize).and_then(Option::as_ref);
        if let Some(header) = found.and_then(|found| found.proxy.as_ref()) {
            header.encode(index, record);
        }
    }
    send_record(io.lane.channel.as_fd(), record, &fds[..entries.len()])
}
