//! The hot thread's part: passes the events of the thread to the core, and sends connections.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::line::AddressText;
use rustix::io::Errno;
use rustix::net::{Shutdown, sockopt};

use super::super::connections::Conn;
use super::super::event_order::DelayedEvent;
use super::super::fault_kind::FaultKind;
use super::super::rate_limit::Cause;
use super::super::token::Key;
use super::super::worker_io::classify;
use super::super::{EventLoop, PoolResources};
use super::workers::{Costs, LineIo, LinePath, Written};
use super::{Fault, LineCommand, LineEvent, LineHandle, Socket, Tracking, Unread};
use crate::api::status::LineStatus;
use crate::background::closer::{Owner, Task};
use crate::background::logger::{quoted, value};
use crate::listen::bind::Listening;
use crate::sys;
use dispatcher_core::{
    ConnId, Departure, LineJoin, PoolId, Recovery, SendFailure, Ticket, WorkerId,
};

/// Most events of the thread handled in one turn; the rest waits for the next turn.
const EVENTS_PER_TURN: usize = 64;

impl EventLoop {
    // --- the thread ------------------------------------------------------------------------

    /// Starts the thread if there is a socket for it, and gives it the sockets. `opened` are new
    /// ones. Called at the start and in each reload.
    pub(in crate::event_loop) fn serve_lines(
        &mut self,
        opened: Vec<(PoolId, Listening)>,
        held: bool,
    ) -> std::io::Result<()> {
        let has_socket = |(_, pool): &(PoolId, &PoolResources)| pool.line.is_some();
        let ids = (0u16..).map(PoolId).zip(&self.pools);
        let current: Vec<PoolId> = ids
            .filter(has_socket)
            .map(|(id, _)| id)
            .filter(|&id| !self.core.is_pool_retired(id))
            .collect();
        if current.is_empty() && self.lines.running.is_none() {
            return Ok(());
        }
        if self.lines.running.is_none() {
            let wake = Arc::clone(&self.wake);
            let closers = &self.background.closers;
            let (bin, watch) = (closers.bin(), closers.watch());
            let costs = Costs::new()?;
            let handle = LineHandle::start(&self.config.limits, held, wake, bin, Some(watch))?;
            self.lines.set_running(handle, costs);
        }
        let mut opened: Vec<(PoolId, Option<OwnedFd>)> = opened
            .into_iter()
            .map(|(pool, listening)| {
                let name = self.core.pool_name(pool);
                log::info!(
                    "event=line_listening pool={} address={}",
                    value(name),
                    value(&listening.address)
                );
                let (fd, _, path) = listening.into_parts();
                let copy = fd.try_clone().ok();
                // The file of a socket that was replaced must not be removed with the old one.
                if let Some(at) = self.lines.sockets.iter().position(|it| it.pool == pool) {
                    let old = self.lines.sockets.swap_remove(at);
                    self.background.cleaner.clean(old);
                }
                self.lines.sockets.push(LinePath { pool, path, copy });
                (pool, Some(fd))
            })
            .collect();
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.lines.sockets)
            .into_iter()
            .partition(|socket| current.contains(&socket.pool));
        self.lines.sockets = kept;
        for socket in gone {
            log::info!("event=line_closed pool={}", value(self.core.pool_name(socket.pool)));
            self.background.cleaner.clean(socket);
        }
        let sockets = current.into_iter().filter_map(|id| {
            let line = self.pools.get(usize::from(id.0))?.line.as_ref()?;
            let fd = opened.iter_mut().find(|(pool, _)| *pool == id).and_then(|(_, fd)| fd.take());
            let pool = self.core.pool_name(id).to_owned();
            Some(Socket { pool, types: Arc::new(line.types.clone()), fd })
        });
        let sockets = sockets.collect();
        self.line_command(LineCommand::Sockets(sockets));
        let bound = self.listeners.sockets.iter().filter_map(|it| it.listening.as_ref());
        let address = |it: &Listening| it.address.parse::<SocketAddr>().ok();
        let ports = bound.filter_map(address).map(|address| address.port()).collect();
        self.line_command(LineCommand::Ports(ports));
        self.line_command(LineCommand::Limits(Box::new(self.config.limits.clone())));
        Ok(())
    }

    pub(in crate::event_loop) fn line_command(&self, command: LineCommand) {
        if let Some(running) = &self.lines.running {
            running.handle.send(command);
        }
    }

    /// Ends the thread and closes all streams.
    pub(in crate::event_loop) fn end_lines(&mut self, patience: std::time::Duration) {
        let Some(running) = self.lines.running.take() else { return };
        let mut fds: Vec<OwnedFd> = running.handle.end(patience);
        fds.extend(self.lines.drain());
        self.background.closers.task(Task::Drop(Owner::Other, Box::new(fds)));
        for socket in std::mem::take(&mut self.lines.sockets) {
            self.background.cleaner.clean(socket);
        }
    }

    // --- events ----------------------------------------------------------------------------

    /// Handles the events of the thread, and what workers have read since the last turn.
    pub(in crate::event_loop) fn handle_lines(&mut self) {
        let ready = std::mem::take(&mut self.lines.ready);
        if self.lines.running.is_none() {
            return;
        }
        // First: a worker reports after it has read.
        for index in 0..self.lines.len() {
            if let Some(worker) = self.lines.behind(index) {
                self.note_reads(worker);
            }
        }
        if !ready {
            return;
        }
        for _ in 0..EVENTS_PER_TURN {
            let event = self.lines.running.as_ref().and_then(|running| running.handle.next());
            let Some(event) = event else { return };
            self.line_event(event);
        }
        self.lines.ready = true;
    }

    fn line_event(&mut self, event: LineEvent) {
        match event {
            LineEvent::Joins { key, join, stream } => self.line_joins(key, &join, stream),
            LineEvent::Report(worker, report) => {
                self.lines.reports += 1;
                // It may have read connections after the beginning of this turn.
                self.note_reads(worker);
                self.core.line_report(self.now, worker, *report);
            }
            LineEvent::Left { worker, why, read } => {
                if let Some(io) = self.lines.get(worker) {
                    io.read_all = read;
                }
                self.core.leave(self.now, worker, why);
            }
            LineEvent::Broke(worker, fault) => self.line_broke(worker, &fault),
            LineEvent::Refused { pid, uid, gid, reason, key, more } => {
                self.worker_refused((pid, uid, gid), &reason, key.as_deref(), more, "line_socket");
            }
            LineEvent::RefusedMore { uid, count } => {
                self.observation.meters.workers_refused += count;
                log::warn!("event=lines_suppressed kind=worker_refused uid={uid} count={count}");
            }
            LineEvent::Short(error) => self.worker_not_accepted(&error, "line_socket"),
            LineEvent::Tracking(tracking) => self.set_tracking(tracking),
            LineEvent::Ended(cookies) => self.core.sockets_ended(self.now, &cookies),
            LineEvent::Alive { began, cookies } => {
                self.core.sockets_alive(self.now, began, &cookies);
            }
            LineEvent::Recovered(worker, connections) => self.recovered(worker, &connections),
        }
    }

    fn line_joins(&mut self, key: Key, join: &LineJoin, stream: OwnedFd) {
        let worker = match self.core.join_line(self.now, join) {
            Ok(worker) => worker,
            Err(refusal) => return self.line_command(LineCommand::Refuse { key, refusal }),
        };
        self.lines.reports += 1;
        self.line_command(LineCommand::Accept { key, worker });
        // Room for as many messages as may be unread, with room to spare: the kernel tells that
        // the worker has read something only while three quarters are free. It caps the value.
        let pool = self.core.pool_of_worker(worker);
        let settings = pool.and_then(|pool| self.core.pool_settings(pool));
        let wanted = 4096 * settings.map_or(1, |settings| settings.max_untaken as usize);
        if sockopt::socket_send_buffer_size(&stream).is_ok_and(|size| size < wanted) {
            let _ = sockopt::set_socket_send_buffer_size(&stream, wanted);
        }
        let io = LineIo::new(worker, stream);
        if let Err(error) = self.lines.insert(self.wakeup.registry(), io) {
            if let Some(suppressed) = self.observation.allow(self.now, pool, Cause::NotWatched) {
                log::warn!(
                    "event=worker_not_watched {} error={error} suppressed={suppressed}",
                    self.worker(worker),
                    error = quoted(&error)
                );
            }
            let why = Departure::Expelled("its connection cannot be watched");
            self.core.leave(self.now, worker, why);
        }
    }

    fn line_broke(&mut self, worker: WorkerId, fault: &Fault) {
        let pool = self.core.pool_of_worker(worker);
        if let Some(suppressed) = self.observation.allow(self.now, pool, Cause::Broken) {
            log::warn!(
                "event=worker_broke_protocol {} reason={fault} suppressed={suppressed}",
                self.worker(worker),
                fault = quoted(fault)
            );
        }
        self.core.leave(self.now, worker, Departure::Expelled("it broke the protocol"));
    }

    fn set_tracking(&mut self, tracking: Tracking) {
        match &tracking {
            Tracking::Counts(reason) => {
                log::warn!(
                    "event=line_loads_by_count reason={} hint=\"loads of workers of the line protocol are \
                     their last counts and what was sent since\"",
                    quoted(reason)
                );
                self.core.tracking_ended(self.now);
            }
            Tracking::Exact { overruns: 0, .. } => log::info!("event=line_loads_exact"),
            Tracking::Exact { overruns, .. } => {
                if let Some(suppressed) = self.observation.allow(self.now, None, Cause::Broken) {
                    log::warn!(
                        "event=line_ends_missed overruns={overruns} suppressed={suppressed}"
                    );
                }
            }
            Tracking::Off => {}
        }
        self.lines.tracking = tracking;
    }

    /// The line protocol in the status; `None` without `line_socket`.
    pub(in crate::event_loop) fn line_status(&self) -> Option<LineStatus> {
        self.lines.running.as_ref()?;
        let (exact, reason, overruns) = match &self.lines.tracking {
            Tracking::Off => (false, None, 0),
            Tracking::Exact { overruns, .. } => (true, None, *overruns),
            Tracking::Counts(reason) => (false, Some(reason.clone()), 0),
        };
        Some(LineStatus {
            exact,
            reason,
            overruns,
            tracked: self.core.tracked_sockets() as u64,
            reports: self.lines.reports,
            recovered: self.lines.recovered,
            unread_closed: self.lines.unread_lost,
        })
    }

    // --- sending ---------------------------------------------------------------------------

    /// Performs [`dispatcher_core::Effect::Send`] to a worker of the line protocol, at once: a
    /// message has one descriptor.
    pub(in crate::event_loop) fn send_line(
        &mut self,
        worker: WorkerId,
        conn: ConnId,
        ticket: Ticket,
        log: bool,
    ) {
        self.connections.unwatch(self.wakeup.registry(), conn);
        let namespace = match &self.lines.tracking {
            Tracking::Exact { namespace, .. } => Some(*namespace),
            Tracking::Off | Tracking::Counts(_) => None,
        };
        let Some(found) = self.connections.get_mut(conn.index) else { return };
        let fresh = found.at_worker.is_none();
        let cookie = namespace.and_then(|namespace| cookie_of(found, namespace));
        let text = AddressText::new(&found.peer);
        // acl's servers expect blocking mode. It belongs to the open file description, which this
        // dispatcher never relies on. Unlike F_SETFL, this never takes the lock of the socket.
        let blocking = rustix::io::ioctl_fionbio(&found.fd, false);
        let Some((io, costs)) = self.lines.with_costs(worker) else { return };
        let written = match blocking {
            Ok(()) => io.write(costs, conn, text.as_bytes(), found.fd.as_fd()),
            Err(errno) => Err(errno),
        };
        let why = match written {
            Ok(Written::Sent) => {
                found.at_worker = Some(worker.serial);
                if log {
                    let peer = found.peer;
                    self.delay_event(DelayedEvent::Resent { to: worker, conn, peer });
                }
                return self.core.line_sent(self.now, worker, ticket, cookie);
            }
            Ok(Written::Held) => SendFailure::Full,
            // As on a channel: the error concerns this client if another descriptor passes.
            Err(Errno::TOOMANYREFS) if self.connections.handoff_check.passes() => {
                SendFailure::Client
            }
            Err(errno) => classify(errno),
        };
        // Workers of the native protocol are told that a fresh connection is non-blocking.
        if let Some(found) = self.connections.get(conn.index).filter(|_| fresh) {
            let _ = rustix::io::ioctl_fionbio(&found.fd, true);
        }
        self.core.send_failed(self.now, worker, ticket, why);
    }

    /// A worker has read something, perhaps.
    pub(in crate::event_loop) fn line_room(&mut self, key: Key) {
        if let Some(worker) = self.lines.by_key(key) {
            self.note_reads(worker);
        }
    }

    /// Releases the connections that a worker has read, and writes what is pending for it.
    fn note_reads(&mut self, worker: WorkerId) {
        let Some((io, costs)) = self.lines.with_costs(worker) else { return };
        // An error is seen by the thread, too.
        let _ = io.write_rest(costs);
        let Some(occupied) = io.unread_now() else { return };
        let mut any = false;
        while let Some(conn) = self.lines.get(worker).and_then(|io| io.next_read(occupied)) {
            any = true;
            self.core.line_read(self.now, worker, conn);
        }
        if any {
            self.core.line_room(self.now, worker);
        }
    }

    // --- the end of a worker ---------------------------------------------------------------

    /// The core has removed a worker: shuts its stream down.
    pub(in crate::event_loop) fn cut_line(&mut self, worker: WorkerId) {
        if let Some(io) = self.lines.get(worker) {
            let _ = rustix::net::shutdown(&io.stream, Shutdown::Both);
        }
    }

    /// Nothing refers to the worker any more. What it had perhaps not read is looked at by the
    /// thread; `pid` is its process.
    pub(in crate::event_loop) fn forget_line(&mut self, worker: WorkerId) {
        let pid = self.core.worker_pid(worker).unwrap_or_default();
        let why = self.core.line_departure(worker);
        let (left, died) = (why != Some(Departure::Released), why == Some(Departure::Died));
        let Some(mut io) = self.lines.remove(self.wakeup.registry(), worker) else { return };
        let unread: Vec<ConnId> = io.unread.drain(..).map(|(conn, _)| conn).collect();
        let closed = io.occupied() == 0;
        if !left || io.has_read_all() {
            // It has them; or the dispatcher ends, and the worker still finds them in its socket.
            for conn in unread {
                self.core.recovered(self.now, worker, conn, Recovery::Read);
            }
        } else if !unread.is_empty() {
            let connections = unread.into_iter().map(|id| {
                let conn = self.connections.get(id.index).filter(|conn| conn.serial == id.serial);
                let copy = conn.and_then(|conn| conn.fd.try_clone().ok());
                (id, copy, conn.map_or(0, |conn| u64::from(conn.header_len)))
            });
            let connections = connections.collect();
            let unread = Unread { worker, pid, died, closed, connections };
            self.line_command(LineCommand::Recover(Box::new(unread)));
        }
        self.line_command(LineCommand::Forget(worker));
        self.background.closers.task(Task::Drop(Owner::Worker(worker.serial), Box::new(io.stream)));
    }

    fn recovered(&mut self, worker: WorkerId, connections: &[(ConnId, Recovery)]) {
        let count = |wanted| connections.iter().filter(|(_, it)| *it == wanted).count() as u64;
        let (untouched, unknown) = (count(Recovery::Untouched), count(Recovery::Unknown));
        self.lines.recovered += untouched;
        self.lines.unread_lost += unknown;
        for &(conn, recovery) in connections {
            self.core.recovered(self.now, worker, conn, recovery);
        }
        if untouched + unknown > 0
            && let Some(suppressed) = self.observation.allow(self.now, None, Cause::Resent)
        {
            log::warn!(
                "event=line_unread worker={worker} resent={untouched} closed={unknown} \
                 read={} suppressed={suppressed}",
                count(Recovery::Read)
            );
            if unknown > 0 {
                let text = || {
                    format!(
                        "{unknown} connections were in the socket of a worker that left, and could \
                         not be recovered"
                    )
                };
                self.fault(FaultKind::ConnectionUnread, "line_socket", text);
            }
        }
    }
}

/// The cookie of a TCP socket whose end the kernel will tell; `None` for other sockets. These calls
/// take no lock of the socket.
fn cookie_of(conn: &Conn, namespace: Option<u64>) -> Option<u64> {
    if !matches!(conn.source(), ClientAddr::Inet(_)) {
        return None;
    }
    let own = sys::network_namespace(&conn.fd).ok();
    if own.zip(namespace).is_some_and(|(own, heard)| own != heard) {
        return None;
    }
    sockopt::socket_cookie(&conn.fd).ok()
}
