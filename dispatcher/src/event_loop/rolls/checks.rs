//! Ready checks: their requests, the connections that they need, and their results.

use std::os::fd::AsFd;
use std::time::{SystemTime, UNIX_EPOCH};

use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::slot;
use dispatch_protocol::wire::{Entry, EntryFlags, Handoff};

use super::super::EventLoop;
use super::super::worker_io::{classify, send_record};
use crate::background::closer::Task;
use crate::background::logger::quoted;
use crate::background::spawner::{CheckConnection, CheckFate, CheckNeed, CheckRequest, Reach};
use crate::config::ReadyCheck;
use dispatcher_core::{ListenerId, ProcessId, SendFailure, Ticket, WorkerId};

impl EventLoop {
    /// Has the worker of a process checked.
    pub(in crate::event_loop) fn check_ready(&mut self, process: ProcessId) {
        let configured = self.pools.get(usize::from(process.pool.0));
        let configured = configured.and_then(|pool| pool.spawn.as_ref());
        // A former version has its own check: an undone deploy may have changed it, too.
        let spawn = match (configured, self.spawn_of(process)) {
            (Some(configured), Some(own)) if !own.starts_like(configured) => Some(own),
            (configured, own) => configured.or(own),
        };
        let check = spawn.map_or(ReadyCheck::default(), |spawn| spawn.ready_check.clone());
        if check == ReadyCheck::None {
            return self.core.checked(self.now, process, true);
        }
        let settings = self.core.pool_settings(process.pool);
        let shares = settings.is_some_and(|settings| settings.queues_move);
        // A process that shares its port has joined because it has accepted a connection. Where the
        // kernel's hash chooses, none can be asked by itself.
        if shares && (check == ReadyCheck::Tcp || self.steers.hashed(process.pool).is_some()) {
            return self.core.checked(self.now, process, true);
        }
        let timeout = settings.map(|settings| settings.supervision.ready_timeout);
        let timeout = timeout.unwrap_or_default();
        let reach = match self.steered_address(process) {
            _ if shares => Reach::Directed,
            Some(address) => Reach::At(address),
            None => Reach::Passed,
        };
        self.side.spawner.check_ready(CheckRequest { process, check, timeout, reach });
    }

    /// Gives a check what it needs.
    pub(in crate::event_loop) fn serve_check(&mut self, need: CheckNeed) {
        match need {
            CheckNeed::Passed(connection) => self.offer_check(connection),
            CheckNeed::Directed { process, connection } => {
                // Its attempt may have run out of time; without a connection its check is over.
                if !connection.is_closed() && self.core.wants_process(process) {
                    self.connect_directed(process, connection);
                }
            }
        }
    }

    /// A connection for a worker that is being checked.
    fn offer_check(&mut self, connection: CheckConnection) {
        let process = connection.process;
        // Its attempt may have run out of time.
        if connection.taken.is_closed() {
            return self.background.closers.task(Task::Close(connection.fd));
        }
        if !self.core.wants_process(process) {
            let _ = connection.taken.send(CheckFate::Over);
            return self.background.closers.task(Task::Close(connection.fd));
        }
        let worker = self.core.workers().find(|&it| self.core.process_of(it) == Some(process));
        self.rolls.offered = Some(connection);
        if worker.is_some_and(|worker| self.core.send_check(self.now, worker)) {
            self.perform();
        }
        // If it was not sent, the checker makes another one after a pause.
        if let Some(unsent) = self.rolls.offered.take() {
            self.background.closers.task(Task::Close(unsent.fd));
        }
    }

    /// Sends the connection of a ready check.
    pub(in crate::event_loop) fn send_check(&mut self, worker: WorkerId, ticket: Ticket) {
        let offered = self.rolls.offered.take();
        let pool = self.core.pool_of_worker(worker);
        let listener = self.core.listeners().find(|&it| self.core.pool_of_listener(it) == pool);
        let sent = match (self.workers.get_mut(worker), offered) {
            // A purge could remove the record. The checker makes another connection.
            (Some(io), Some(_)) if io.purge.is_some() => Err(SendFailure::Full),
            (Some(io), Some(connection)) => {
                let entry = entry(&connection, ticket, listener.unwrap_or(ListenerId(0)));
                let Some(slot) = io.lane.board.slot(ticket.slot) else { return };
                slot::offer(slot, ticket.seq);
                let mut record = Vec::new();
                Handoff::encode_entries(&[entry], &mut record);
                let fds = [connection.fd.as_fd()];
                match send_record(io.lane.channel.as_fd(), &record, &fds) {
                    Ok(()) => {
                        let CheckConnection { fd, taken, .. } = connection;
                        self.rolls.in_flight.insert((worker, ticket), (fd, taken));
                        Ok(())
                    }
                    Err(errno) => {
                        let _ = slot::revoke(slot, ticket.seq);
                        Err(classify(errno))
                    }
                }
            }
            _ => Err(SendFailure::Client),
        };
        if let Err(why) = sent {
            self.core.check_failed(self.now, worker, ticket, why);
        }
    }

    /// The connection of a ready check was taken by the worker's application, or will not be.
    pub(in crate::event_loop) fn check_over(
        &mut self,
        worker: WorkerId,
        ticket: Ticket,
        was_taken: bool,
    ) {
        let Some((fd, taken)) = self.rolls.in_flight.remove(&(worker, ticket)) else { return };
        match self.workers.get(worker) {
            Some(io) if was_taken => {
                let slot = (ticket.slot, ticket.seq);
                self.background.closers.release(fd, &io.lane.board, slot, worker);
            }
            _ => self.background.closers.task(Task::Close(fd)),
        }
        // The check may be over.
        let _ = taken.send(if was_taken { CheckFate::Taken } else { CheckFate::Lost });
    }

    /// The result of a ready check.
    pub(in crate::event_loop) fn checked(
        &mut self,
        process: ProcessId,
        result: Result<(), String>,
    ) {
        let name = self.core.pool_name(process.pool).to_owned();
        let entry = self.rolls.pools.entry(process.pool).or_default();
        match &result {
            Ok(()) => {
                entry.passed += 1;
                log::info!("event=ready_check_passed pool={name} process={}", process.place + 1);
            }
            Err(error) => {
                entry.failed += 1;
                log::warn!(
                    "event=ready_check_failed pool={name} process={} error={}",
                    process.place + 1,
                    quoted(error)
                );
                self.rolls.note(process, error);
            }
        }
        self.core.checked(self.now, process, result.is_ok());
    }
}

fn entry(connection: &CheckConnection, ticket: Ticket, listener: ListenerId) -> Entry {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Entry {
        seq: ticket.seq,
        slot: ticket.slot,
        listener: listener.0,
        flags: EntryFlags::NONBLOCKING | EntryFlags::READY_CHECK,
        accepted_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
        peer: ClientAddr::Inet(connection.peer),
        number: 0,
    }
}
