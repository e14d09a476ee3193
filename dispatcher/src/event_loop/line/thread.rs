//! The thread that accepts and reads the streams of workers.
//!
//! A report can carry descriptors, and closing them may block: see the handshake thread, which has
//! the same reason to be a thread of its own.
//!
//! Bounds: `join_rate` and `join_burst` for each user, `max_handshakes` and `max_pending_hellos`
//! for streams without a report, a time for the first report, [`MAILBOX`](super::MAILBOX) events,
//! and so much of each stream in one round. This thread may wait for the hot thread; the hot thread
//! never waits for this thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll};

use super::super::clock;
use super::super::control::{self, Peer};
use super::super::handshake::rates::Rates;
use super::super::join::forget;
use super::super::peer_thread::{self, DYING, Outbox, PeerThread, Refusals};
use super::super::token::{Key, Source};
use super::kernel::Kernel;
use super::recovery::{Recoveries, recover};
use super::streams::{Received, Stage, Stream, Streams, later};
use super::{LineCommand, LineEvent, Socket, Tracking, Unread};
use crate::background::closer::{Bin, Watched};
use crate::config::Limits;
use dispatcher_core::{Departure, LineJoin, Recovery, Time, WorkerId};

mod admit;

/// Reads of one stream in one round, and the time between its rounds. What a worker writes beyond
/// that waits in its socket.
const READS: usize = 2;
const READ_AGAIN: Duration = Duration::from_millis(10);

/// Reads at the end of a stream: more than fits into its socket.
const LAST_READS: usize = 256;

/// The least time between two lists of all sockets: ends are not read meanwhile, so more of them
/// could be missed without end.
const LIST_AGAIN: Duration = Duration::from_secs(1);

/// A listening socket.
struct Listener {
    socket: Socket,
    /// More streams may be waiting than one round accepts.
    ready: bool,
    /// It is in the poll.
    watched: bool,
}

pub(super) struct LineThread {
    poll: Poll,
    /// The hot thread's eventfd: commands are waiting.
    waker: Arc<OwnedFd>,
    listeners: Vec<Listener>,
    /// Nothing is accepted: another dispatcher accepts from the sockets.
    held: bool,
    paused_until: Option<Time>,
    limits: Limits,
    streams: Streams,
    /// Streams that may have unread bytes without a new edge, with the earliest time to read them.
    again: VecDeque<(Key, Time)>,
    /// Streams that have ended, in the order of the report.
    ending: VecDeque<(Key, Time)>,
    rates: Rates,
    refusals: Refusals,
    kernel: Option<Kernel>,
    overruns: u64,
    /// More ends may be waiting than one round reads.
    more_ends: bool,
    /// Ends were missed: when to list all sockets.
    list_at: Option<Time>,
    listed_at: Time,
    recoveries: Recoveries,
    outbox: Outbox<LineEvent>,
    commands: Receiver<LineCommand>,
    bin: Bin,
    over: bool,
    now: Time,
}

impl LineThread {
    pub(super) fn new(
        waker: &Arc<OwnedFd>,
        held: bool,
        limits: Limits,
        outbox: Outbox<LineEvent>,
        commands: Receiver<LineCommand>,
        bin: Bin,
    ) -> io::Result<LineThread> {
        let mut thread = LineThread {
            poll: Poll::new()?,
            waker: Arc::clone(waker),
            listeners: Vec::new(),
            held,
            paused_until: None,
            limits,
            streams: Streams::default(),
            again: VecDeque::new(),
            ending: VecDeque::new(),
            rates: Rates::default(),
            refusals: Refusals::default(),
            kernel: None,
            overruns: 0,
            more_ends: false,
            list_at: None,
            listed_at: Time::default(),
            recoveries: Recoveries::default(),
            outbox,
            commands,
            bin,
            over: false,
            now: clock(),
        };
        // Before the first worker joins, so that the ends of all its connections are told.
        let tracking = match Kernel::subscribe() {
            Ok(kernel) => {
                let namespace = kernel.namespace;
                thread.kernel = Some(kernel);
                Tracking::Exact { namespace, overruns: 0 }
            }
            Err(error) => Tracking::Counts(error.to_string()),
        };
        thread.outbox.report(LineEvent::Tracking(tracking));
        thread.register_all()?;
        Ok(thread)
    }

    /// Runs until the hot thread ends it; returns the listening sockets.
    pub(super) fn run(mut self, watched: Option<&Watched>) -> Vec<OwnedFd> {
        peer_thread::run(&mut self, watched);
        let streams: Vec<OwnedFd> = self.streams.drain().map(|stream| stream.socket).collect();
        self.bin.close(streams);
        self.listeners.into_iter().filter_map(|listener| listener.socket.fd).collect()
    }

    fn register_all(&mut self) -> io::Result<()> {
        let registry = self.poll.registry();
        let register = |fd: &OwnedFd, source: Source| {
            registry.register(&mut SourceFd(&fd.as_raw_fd()), source.token(), Interest::READABLE)
        };
        register(&self.waker, Source::Waker)?;
        if let Some(kernel) = &self.kernel {
            register(&kernel.socket, Source::Dispatch)?;
        }
        for (position, listener) in self.listeners.iter().enumerate() {
            if let Some(fd) = listener.socket.fd.as_ref().filter(|_| listener.watched) {
                register(fd, Source::Listener(position))?;
            }
        }
        for (key, stream) in self.streams.iter() {
            register(&stream.socket, Source::Pending(key))?;
            if let Some(process) = stream.process.as_ref().filter(|_| stream.worker().is_some()) {
                register(process, Source::Process(key))?;
            }
        }
        Ok(())
    }
}

impl PeerThread for LineThread {
    const NAME: &'static str = "line";

    fn poll(&mut self) -> &mut Poll {
        &mut self.poll
    }

    fn round(&mut self, now: Time, events: &Events, watched: Option<&Watched>) {
        self.now = now;
        // Without the entries that this round adds.
        let unread = self.again.len();
        let mut kernel = std::mem::take(&mut self.more_ends);
        for event in events {
            if let Some(watched) = watched {
                watched.next();
            }
            match Source::of(event.token()) {
                Some(Source::Listener(position)) => {
                    if let Some(listener) = self.listeners.get_mut(position) {
                        listener.ready = true;
                    }
                }
                Some(Source::Pending(key)) => self.read_soon(key),
                Some(Source::Process(key)) => self.left(key, Departure::Died),
                Some(Source::Dispatch) => kernel = true,
                Some(Source::Waker) => _ = rustix::io::read(&self.waker, &mut [0; 8]),
                Some(_) | None => {}
            }
        }
        if kernel {
            self.read_ends();
        }
        // Bounded: each command answers an event, or belongs to a reload.
        while let Ok(command) = self.commands.try_recv() {
            self.carry_out(command);
        }
        for _ in 0..unread {
            let Some((key, time)) = self.again.pop_front() else { break };
            if time > self.now {
                self.again.push_back((key, time));
            } else if let Some(stream) = self.streams.get(key) {
                stream.again = false;
                self.read(key);
            }
        }
        if self.paused_until.is_some_and(|until| until <= self.now) {
            self.paused_until = None;
            self.watch();
        }
        if self.paused_until.is_none() && !self.held {
            for position in 0..self.listeners.len() {
                self.accept(position);
            }
        }
        while let Some(&(key, until)) = self.ending.front()
            && until <= self.now
        {
            self.ending.pop_front();
            if self.streams.get(key).is_some_and(|stream| stream.ended.is_some()) {
                self.left(key, Departure::Disconnected);
            }
        }
        while let Some((key, _)) = self.streams.earliest().filter(|(_, until)| *until <= self.now) {
            if let Some(stream) = self.take(key) {
                self.refused(&stream.peer, "no report in time".to_owned(), None);
                self.bin.close(vec![stream.socket]);
            }
        }
        if self.list_at.is_some_and(|at| at <= self.now) {
            self.list();
        }
        self.report_suppressed();
    }

    fn timeout(&self) -> Option<Duration> {
        let accepts = self.paused_until.is_none() && !self.held;
        if self.more_ends || (accepts && self.listeners.iter().any(|listener| listener.ready)) {
            return Some(Duration::ZERO);
        }
        let again = self.again.iter().map(|(_, time)| *time).min();
        let unreported = self.refusals.due();
        let ending = self.ending.front().map(|(_, until)| *until);
        let first = self.streams.earliest().map(|(_, until)| until);
        let next = [self.paused_until, again, unreported, ending, first, self.list_at];
        Some(next.into_iter().flatten().min()? - clock())
    }

    fn announce(&mut self) {
        self.outbox.announce();
    }

    fn is_over(&self) -> bool {
        self.over || self.outbox.is_over()
    }

    fn begin_again(&mut self) -> io::Result<()> {
        self.poll = Poll::new()?;
        self.now = clock();
        self.register_all()
    }
}

impl LineThread {
    // --- the kernel ------------------------------------------------------------------------

    fn read_ends(&mut self) {
        let Some(kernel) = &self.kernel else { return };
        match kernel.read() {
            Ok(ends) => {
                self.more_ends = ends.more;
                if !ends.cookies.is_empty() {
                    self.outbox.report(LineEvent::Ended(ends.cookies));
                }
                if ends.overrun {
                    self.overruns += 1;
                    self.list_at = Some(self.now.max(self.listed_at + LIST_AGAIN));
                    let (namespace, overruns) = (kernel.namespace, self.overruns);
                    let tracking = Tracking::Exact { namespace, overruns };
                    self.outbox.report(LineEvent::Tracking(tracking));
                }
            }
            Err(error) => {
                if let Some(kernel) = self.kernel.take() {
                    forget(self.poll.registry(), &kernel.socket);
                }
                self.list_at = None;
                let tracking = Tracking::Counts(error.to_string());
                self.outbox.report(LineEvent::Tracking(tracking));
            }
        }
    }

    /// Ends were missed: tells the hot thread which sockets are left.
    fn list(&mut self) {
        self.list_at = None;
        let Some(kernel) = &self.kernel else { return };
        let began = clock();
        match kernel.list() {
            Ok(cookies) => self.outbox.report(LineEvent::Alive { began, cookies }),
            // Until it succeeds, loads are higher than they are.
            Err(_) => self.list_at = Some(clock() + LIST_AGAIN),
        }
        self.listed_at = clock();
    }

    // --- reading ---------------------------------------------------------------------------

    /// A stream is readable: it is read now, or at the end of its pause.
    fn read_soon(&mut self, key: Key) {
        let Some(stream) = self.streams.get(key).filter(|stream| !stream.again) else { return };
        let next = stream.read_at + READ_AGAIN;
        if next > self.now && stream.worker().is_some() {
            stream.again = true;
            self.again.push_back((key, next));
        } else {
            self.read(key);
        }
    }

    fn read(&mut self, key: Key) {
        let mut last = None;
        for turn in 0..=READS {
            let Some(stream) = self.streams.get(key).filter(|stream| stream.is_readable()) else {
                break;
            };
            stream.read_at = self.now;
            if turn == READS {
                stream.again = true;
                self.again.push_back((key, self.now + READ_AGAIN));
                break;
            }
            let mut rubbish = Vec::new();
            let received = stream.read(&mut rubbish);
            self.bin.close(rubbish);
            match received {
                Received::Bytes(Some(report)) => last = Some(later(last.take(), report)),
                Received::Bytes(None) => {}
                Received::Empty => break,
                Received::End => {
                    self.pass(key, last.take());
                    return self.ended(key);
                }
                Received::Broken(fault) => {
                    match self.streams.get(key) {
                        Some(stream) if stream.worker().is_none() => {
                            self.refuse(key, format!("not a report: {fault}"), None);
                        }
                        Some(stream) => {
                            if let Stage::Joined(worker) = stream.stage {
                                stream.stage = Stage::Over(worker);
                                self.outbox.report(LineEvent::Broke(worker, fault));
                            }
                        }
                        None => {}
                    }
                    return;
                }
            }
        }
        self.pass(key, last);
    }

    /// Passes the last report of a round to the hot thread.
    fn pass(&mut self, key: Key, report: Option<dispatch_protocol::line::Report>) {
        let Some(report) = report else { return };
        let Some(stream) = self.streams.get(key) else { return };
        match stream.stage {
            Stage::Joined(worker) => {
                self.outbox.report(LineEvent::Report(worker, Box::new(report)));
            }
            Stage::New { .. } => {
                stream.process = control::process_of(&stream.socket, &stream.peer);
                let pool = stream.types.get(&report.kind).unwrap_or(&stream.pool).clone();
                let Peer { pid, uid, gids } = stream.peer.clone();
                match stream.socket.try_clone() {
                    Ok(copy) => {
                        stream.stage = Stage::Asked;
                        let join = Box::new(LineJoin { pid, uid, gids, pool, report });
                        self.outbox.report(LineEvent::Joins { key, join, stream: copy });
                    }
                    Err(error) => {
                        let reason = format!("the dispatcher is short of a resource ({error})");
                        self.refuse(key, reason, None);
                    }
                }
            }
            Stage::Asked | Stage::Over(_) => {}
        }
    }

    /// A stream has ended, perhaps because its process has.
    fn ended(&mut self, key: Key) {
        let until = self.now + DYING;
        let Some(stream) = self.streams.get(key) else { return };
        match stream.stage {
            Stage::New { .. } => {
                if let Some(stream) = self.take(key) {
                    self.bin.close(vec![stream.socket]);
                }
            }
            // The answer comes first.
            Stage::Asked => stream.ended = Some(until),
            Stage::Joined(_) if stream.process.is_none() => {
                self.left(key, Departure::Disconnected);
            }
            Stage::Joined(_) => {
                if stream.ended.replace(until).is_none() {
                    self.ending.push_back((key, until));
                }
            }
            Stage::Over(_) => {}
        }
    }

    fn left(&mut self, key: Key, why: Departure) {
        let Some(stream) = self.streams.get(key) else { return };
        if let Stage::Joined(worker) = stream.stage {
            stream.stage = Stage::Over(worker);
            stream.ended = None;
            // Its process may be seen to end before its stream. What it wrote last does not matter.
            let mut rubbish = Vec::new();
            for _ in 0..LAST_READS {
                if stream.read_all.is_some() || matches!(stream.read(&mut rubbish), Received::Empty)
                {
                    break;
                }
            }
            let read = stream.read_all == Some(true) && stream.has_read_all(&mut rubbish);
            self.bin.close(rubbish);
            self.outbox.report(LineEvent::Left { worker, why, read });
        }
    }

    /// Takes a stream out of the table and the poll.
    fn take(&mut self, key: Key) -> Option<Stream> {
        let stream = self.streams.take(key)?;
        let registry = self.poll.registry();
        forget(registry, &stream.socket);
        if let Some(process) = &stream.process {
            forget(registry, process);
        }
        Some(stream)
    }

    // --- commands --------------------------------------------------------------------------

    fn carry_out(&mut self, command: LineCommand) {
        match command {
            LineCommand::Accept { key, worker } => self.accepted(key, worker),
            LineCommand::Refuse { key, refusal } => {
                self.refuse(key, refusal.reason, refusal.key);
            }
            LineCommand::Forget(worker) => {
                let key = self.streams.of(worker);
                if let Some(stream) = key.and_then(|key| self.take(key)) {
                    self.bin.close(vec![stream.socket]);
                }
            }
            LineCommand::Recover(unread) => self.recover(unread),
            LineCommand::Ports(ports) => {
                let Some(kernel) = &mut self.kernel else { return };
                let before = kernel.ports.len();
                kernel.ports.extend(ports);
                // Ends on a new port may have been left out before.
                if kernel.ports.len() > before {
                    self.list_at = Some(self.now.max(self.listed_at + LIST_AGAIN));
                }
            }
            LineCommand::Sockets(sockets) => self.replace_sockets(sockets),
            LineCommand::Limits(limits) => self.limits = *limits,
            LineCommand::Hold(held) => {
                self.held = held;
                self.watch();
            }
            LineCommand::End => self.over = true,
        }
    }

    /// Finds out what became of connections, on a thread of its own: a process that has one of them
    /// can hold the lock of the socket for as long as it likes.
    fn recover(&mut self, unread: Box<Unread>) {
        let worker = unread.worker;
        let connections: Vec<_> = unread.connections.iter().map(|(id, ..)| *id).collect();
        let (events, wake) = self.outbox.ends();
        let stream = self.streams.of(worker).and_then(|key| self.streams.get(key));
        let uid = stream.map_or(u32::MAX, |stream| stream.peer.uid);
        let spawned = self.recoveries.begin(uid).map(|running| {
            std::thread::Builder::new().name("line-recovery".to_owned()).spawn(move || {
                let recovered = recover(*unread);
                drop(running);
                if events.send(LineEvent::Recovered(worker, recovered)).is_ok() {
                    wake();
                }
            })
        });
        if !matches!(spawned, Some(Ok(_))) {
            let unknown = connections.into_iter().map(|id| (id, Recovery::Unknown)).collect();
            self.outbox.report(LineEvent::Recovered(worker, unknown));
        }
    }

    fn accepted(&mut self, key: Key, worker: WorkerId) {
        let Some(stream) = self.streams.joined(key, worker) else {
            let why = Departure::Disconnected;
            return self.outbox.report(LineEvent::Left { worker, why, read: false });
        };
        let ended = stream.ended.take().is_some();
        if let Some(process) = &stream.process {
            let token = Source::Process(key).token();
            let raw = process.as_raw_fd();
            let registry = self.poll.registry();
            if registry.register(&mut SourceFd(&raw), token, Interest::READABLE).is_err() {
                return self.left(key, Departure::Expelled("its process cannot be watched"));
            }
        }
        match ended {
            true => self.ended(key),
            // Bytes that came since the report cause no further edge.
            false => self.read(key),
        }
    }

    /// Replaces the listening sockets. One without a descriptor is one of before, by its pool.
    fn replace_sockets(&mut self, sockets: Vec<Socket>) {
        for listener in &mut self.listeners {
            if let Some(fd) = listener.socket.fd.as_ref().filter(|_| listener.watched) {
                forget(self.poll.registry(), fd);
            }
        }
        let mut before = std::mem::take(&mut self.listeners);
        for mut socket in sockets {
            if socket.fd.is_none() {
                let old = before.iter_mut().find(|old| old.socket.pool == socket.pool);
                socket.fd = old.and_then(|old| old.socket.fd.take());
            }
            self.listeners.push(Listener { socket, ready: false, watched: false });
        }
        let closed = before.into_iter().filter_map(|listener| listener.socket.fd);
        self.bin.close(closed.collect());
        self.watch();
    }
}
