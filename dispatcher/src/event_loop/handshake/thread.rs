//! The handshake thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use dispatch_protocol::wire::{Control, Hello, RefusedCode};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll};

use super::super::clock;
use super::super::control::{self, Fault, Peer, Received};
use super::super::join::{forget, name_of};
use super::super::peer_thread::{self, DYING, Outbox, PeerThread, Refusals};
use super::super::token::{Key, Source};
use super::super::worker_io::{Lane, send_record};
use super::pending::{Pending, Table};
use super::rates::{Bucket, Rates};
use super::ticket::Tickets;
use super::{HandshakeCommand, HandshakeEvent, JoinRequest, Settings};
use crate::background::closer::{Bin, Watched};
use dispatcher_core::{Departure, Join, Refusal, Time, WorkerId};

mod admit;

/// Most records read from one control connection in one round.
const RECORDS: usize = 16;

/// Most claims of one worker in a window of [`CLAIM_WINDOW`]; the rest waits in its socket.
const CLAIMS: u32 = 200;
const CLAIM_WINDOW: Duration = Duration::from_millis(100);

/// A worker that has joined.
#[derive(Debug)]
struct Member {
    id: WorkerId,
    control: OwnedFd,
    /// Readable once the process has ended; `None` if the kernel does not support it.
    process: Option<OwnedFd>,
    said_goodbye: bool,
    /// The worker has gone or broken the protocol: nothing more is read.
    over: bool,
    /// The worker is in `again`: an event for it is redundant.
    unread: bool,
    claims: (Time, u32),
    /// Its connection has ended without a goodbye; reported at this time, unless its process is
    /// seen to end first.
    ended: Option<Time>,
}

pub(super) struct HandshakeThread {
    poll: Poll,
    /// The hot thread's eventfd: commands are waiting.
    waker: Arc<OwnedFd>,
    listener: OwnedFd,
    /// Whether the listener is in the poll. It is not during a pause: each arrival would cause a
    /// useless wake-up.
    watched: bool,
    /// Another dispatcher accepts from the listener.
    held: bool,
    /// More connections may be waiting than one round accepts.
    ready: bool,
    paused_until: Option<Time>,
    settings: Settings,
    tickets: Tickets,
    pending: Table,
    /// By `WorkerId::index`.
    members: Vec<Option<Member>>,
    /// Control connections that may have unread records without a new edge, with the earliest time
    /// to read them; each once.
    again: VecDeque<(Key, Time)>,
    /// Workers whose connections have ended, in the order of the report.
    ending: VecDeque<(Key, Time)>,
    connects: Bucket,
    rates: Rates,
    refusals: Refusals,
    outbox: Outbox<HandshakeEvent>,
    commands: Receiver<HandshakeCommand>,
    /// The worker that is being welcomed.
    welcomed: Option<WorkerId>,
    bin: Bin,
    /// The hot thread has told this thread to end.
    over: bool,
    now: Time,
}

impl HandshakeThread {
    pub(super) fn new(
        waker: &Arc<OwnedFd>,
        (listener, held): (OwnedFd, bool),
        settings: Settings,
        outbox: Outbox<HandshakeEvent>,
        commands: Receiver<HandshakeCommand>,
        bin: Bin,
    ) -> io::Result<HandshakeThread> {
        let mut thread = HandshakeThread {
            poll: Poll::new()?,
            waker: Arc::clone(waker),
            listener,
            watched: !held,
            held,
            ready: false,
            paused_until: None,
            settings,
            tickets: Tickets::default(),
            pending: Table::default(),
            members: Vec::new(),
            again: VecDeque::new(),
            ending: VecDeque::new(),
            connects: Bucket::default(),
            rates: Rates::default(),
            refusals: Refusals::default(),
            outbox,
            commands,
            welcomed: None,
            bin,
            over: false,
            now: clock(),
        };
        thread.register_all()?;
        Ok(thread)
    }

    /// Runs until the hot thread ends it; returns the listening socket.
    pub(super) fn run(mut self, watched: Option<&Watched>) -> OwnedFd {
        peer_thread::run(&mut self, watched);
        let pending: Vec<OwnedFd> = self.pending.drain().map(|pending| pending.socket).collect();
        let members = self.members.drain(..).flatten().map(|member| member.control);
        self.bin.close(members.chain(pending).collect());
        self.listener
    }

    fn register_all(&mut self) -> io::Result<()> {
        let registry = self.poll.registry();
        let register = |fd: &OwnedFd, source: Source| {
            registry.register(&mut SourceFd(&fd.as_raw_fd()), source.token(), Interest::READABLE)
        };
        register(&self.waker, Source::Waker)?;
        if self.watched {
            register(&self.listener, Source::Dispatch)?;
        }
        for (key, pending) in self.pending.iter() {
            register(&pending.socket, Source::Pending(key))?;
        }
        for member in self.members.iter().flatten() {
            let key = Key::from(member.id);
            register(&member.control, Source::Control(key))?;
            if let Some(process) = &member.process {
                register(process, Source::Process(key))?;
            }
        }
        Ok(())
    }
}

impl PeerThread for HandshakeThread {
    const NAME: &'static str = "handshakes";

    fn poll(&mut self) -> &mut Poll {
        &mut self.poll
    }

    fn round(&mut self, now: Time, events: &Events, watched: Option<&Watched>) {
        self.now = now;
        // Without the entries that this round adds.
        let unread = self.again.len();
        for event in events {
            if let Some(watched) = watched {
                watched.next();
            }
            match Source::of(event.token()) {
                Some(Source::Dispatch) => self.ready = true,
                Some(Source::Pending(key)) => self.hello(key),
                Some(Source::Control(key)) => self.control(key),
                Some(Source::Process(key)) => self.left(key, Departure::Died),
                Some(_) | None => {}
            }
        }
        // Bounded: each command answers an event.
        while let Ok(command) = self.commands.try_recv() {
            self.carry_out(command);
        }
        for _ in 0..unread {
            let Some((key, time)) = self.again.pop_front() else { break };
            if time > self.now {
                self.again.push_back((key, time));
            } else if let Some(member) = self.member(key) {
                member.unread = false;
                self.read_records(key);
            }
        }
        if self.paused_until.is_some_and(|until| until <= self.now) {
            self.paused_until = None;
            if !self.held && self.watch().is_err() {
                self.pause(self.settings.limits.resource_pause);
            }
        }
        if self.ready && self.paused_until.is_none() {
            self.accept();
        }
        while let Some(&(key, until)) = self.ending.front()
            && until <= self.now
        {
            self.ending.pop_front();
            if self.member(key).is_some_and(|member| member.ended.take().is_some()) {
                self.left(key, Departure::Disconnected);
            }
        }
        self.refuse_silent();
        self.report_suppressed();
    }

    fn timeout(&self) -> Option<Duration> {
        let again = self.again.iter().map(|(_, time)| *time).min();
        if self.ready && self.paused_until.is_none() {
            return Some(Duration::ZERO);
        }
        let unreported = self.refusals.due();
        let ending = self.ending.front().map(|(_, until)| *until);
        let next = [self.paused_until, self.pending.deadline(), again, unreported, ending];
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
        self.register_all()?;
        self.now = clock();
        // The thread failed while it welcomed this worker.
        if let Some(worker) = self.welcomed.take()
            && self.member(Key::from(worker)).is_none()
        {
            self.outbox.report(HandshakeEvent::Left(worker, Departure::Disconnected));
        }
        Ok(())
    }
}

impl HandshakeThread {
    /// A control connection without a hello is readable: its hello, or its end.
    fn hello(&mut self, key: Key) {
        let Some(pending) = self.pending.get(key) else { return };
        // The hello has come; later records are read after the answer.
        if pending.deadline.is_none() {
            return;
        }
        let mut rubbish = Vec::new();
        let received = control::receive(&pending.socket, &mut rubbish);
        self.bin.close(rubbish);
        let fault = match received {
            Received::Empty => return,
            Received::End => {
                if let Some(pending) = self.pending.take(key) {
                    forget(self.poll.registry(), &pending.socket);
                    self.bin.close(vec![pending.socket]);
                }
                return;
            }
            Received::Record(Control::Hello(hello)) => return self.ask(key, hello),
            Received::Record(other) => Fault::Unexpected(name_of(&other)),
            Received::Broken(fault) => fault,
        };
        if let Some(pending) = self.pending.take(key) {
            let reason = format!("not a hello: {fault}");
            self.refuse(pending, Refusal { code: RefusedCode::Malformed, reason, key: None });
        }
    }

    /// Makes everything that a welcome needs before it asks the hot thread, so that the hot thread
    /// makes nothing.
    fn ask(&mut self, key: Key, hello: Hello) {
        let slots = self.settings.slots.get(&hello.pool).copied();
        let Some(pending) = self.pending.get(key) else { return };
        pending.process = control::process_of(&pending.socket, &pending.peer);
        let lane = slots.map(|slots| Lane::new(slots, hello.finished).map_err(|e| e.to_string()));
        let Peer { pid, uid, gids } = pending.peer.clone();
        let join = Join { pid, uid, gids, hello, spawned: None };
        pending.deadline = None;
        pending.pool.clone_from(&join.hello.pool);
        self.outbox.report(HandshakeEvent::Hello(Box::new(JoinRequest { key, join, lane })));
    }

    fn carry_out(&mut self, command: HandshakeCommand) {
        match command {
            HandshakeCommand::Welcome { key, worker, record, fds } => {
                self.welcomed = Some(worker);
                self.welcome(key, worker, record, fds);
                self.welcomed = None;
            }
            HandshakeCommand::Refuse { key, refusal } => {
                if let Some(pending) = self.pending.take(key) {
                    self.refuse(pending, refusal);
                }
            }
            HandshakeCommand::Cut(worker) => {
                if let Some(member) = self.member(Key::from(worker)) {
                    let _ = rustix::net::shutdown(&member.control, rustix::net::Shutdown::Both);
                }
            }
            HandshakeCommand::Forget(worker) => {
                let place = self.members.get_mut(worker.index as usize);
                let member = place.and_then(|p| p.take_if(|member| member.id == worker));
                if let Some(member) = member {
                    let registry = self.poll.registry();
                    forget(registry, &member.control);
                    if let Some(process) = &member.process {
                        forget(registry, process);
                    }
                    self.bin.close(vec![member.control]);
                }
            }
            HandshakeCommand::Settings(settings) => self.settings = settings,
            HandshakeCommand::Listen(listener) => self.listen(listener),
            HandshakeCommand::Hold(held) => self.hold(held),
            HandshakeCommand::End => self.over = true,
        }
    }

    fn welcome(&mut self, key: Key, worker: WorkerId, mut record: Vec<u8>, fds: [OwnedFd; 3]) {
        let Some(pending) = self.pending.take(key) else { return };
        let Pending { socket, process, pool, peer, .. } = pending;
        let file = self.settings.limits.relay_ticket_key.as_deref();
        self.tickets.append(file, &mut record, &pool, peer.uid);
        let key = Key::from(worker);
        let registry = self.poll.registry();
        let interest = Interest::READABLE;
        let raw = socket.as_raw_fd();
        let watched = registry
            .reregister(&mut SourceFd(&raw), Source::Control(key).token(), interest)
            .and_then(|()| match &process {
                None => Ok(()),
                Some(process) => {
                    let token = Source::Process(key).token();
                    registry.register(&mut SourceFd(&process.as_raw_fd()), token, interest)
                }
            });
        let [channel, board, doorbell] = &fds;
        let theirs = [channel.as_fd(), board.as_fd(), doorbell.as_fd()];
        let sent = send_record(socket.as_fd(), &record, &theirs);
        let index = worker.index as usize;
        if self.members.len() <= index {
            self.members.resize_with(index + 1, || None);
        }
        self.members[index] = Some(Member {
            id: worker,
            control: socket,
            process,
            said_goodbye: false,
            over: false,
            unread: true,
            claims: (self.now, 0),
            ended: None,
        });
        if watched.is_err() {
            self.left(key, Departure::Expelled("its connection cannot be watched"));
        } else if sent.is_err() {
            self.left(key, Departure::Disconnected);
        }
        // Records that came since the hello cause no further edge.
        self.again.push_back((key, self.now));
        // The worker's end of the channel: the last reference if the welcome did not arrive.
        self.bin.close(fds.into());
    }

    /// A worker's control connection is readable: claims, goodbye, or its end.
    fn control(&mut self, key: Key) {
        if self.member(key).is_some_and(|member| !member.unread) {
            self.read_records(key);
        }
    }

    fn read_records(&mut self, key: Key) {
        let now = self.now;
        for _ in 0..RECORDS {
            let Some(member) = self.member(key) else { return };
            if member.over {
                return;
            }
            if now - member.claims.0 >= CLAIM_WINDOW {
                member.claims = (now, 0);
            } else if member.claims.1 >= CLAIMS {
                let next = member.claims.0 + CLAIM_WINDOW;
                return self.read_on(key, next);
            }
            let id = member.id;
            let mut rubbish = Vec::new();
            let received = control::receive(&member.control, &mut rubbish);
            let fault = match received {
                Received::Empty => return,
                Received::Record(Control::Claim(claim)) => {
                    member.claims.1 += 1;
                    self.outbox.report(HandshakeEvent::Claim(id, claim));
                    continue;
                }
                Received::Record(Control::Update(update)) => {
                    // Updates count towards the same bound.
                    member.claims.1 += 1;
                    self.outbox.report(HandshakeEvent::Update(id, update));
                    continue;
                }
                Received::Record(Control::Goodbye(_)) if !member.said_goodbye => {
                    member.said_goodbye = true;
                    self.outbox.report(HandshakeEvent::Goodbye(id));
                    continue;
                }
                Received::End => return self.ended(key),
                Received::Record(other) => Fault::Unexpected(name_of(&other)),
                Received::Broken(fault) => fault,
            };
            member.over = true;
            self.bin.close(rubbish);
            return self.outbox.report(HandshakeEvent::Broke(id, fault));
        }
        // There may be more records, without a new edge.
        self.read_on(key, now);
    }

    fn read_on(&mut self, key: Key, time: Time) {
        if let Some(member) = self.member(key) {
            member.unread = true;
            self.again.push_back((key, time));
        }
    }

    /// A control connection has ended, perhaps because its process has.
    fn ended(&mut self, key: Key) {
        let until = self.now + DYING;
        let Some(member) = self.member(key) else { return };
        if member.said_goodbye || member.process.is_none() {
            return self.left(key, Departure::Disconnected);
        }
        if !std::mem::replace(&mut member.over, true) {
            member.ended = Some(until);
            self.ending.push_back((key, until));
        }
    }

    fn left(&mut self, key: Key, why: Departure) {
        let Some(member) = self.member(key) else { return };
        member.over = true;
        member.ended = None;
        let id = member.id;
        self.outbox.report(HandshakeEvent::Left(id, why));
    }

    fn member(&mut self, key: Key) -> Option<&mut Member> {
        let member = self.members.get_mut(key.index as usize)?.as_mut()?;
        key.is(member.id.serial).then_some(member)
    }
}
