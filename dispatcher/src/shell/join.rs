//! Workers at the door: accepting control connections, waiting for hello, answering it.
//!
//! Everything a welcome needs is made before the core is asked, so a worker that the core knows can be reached.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use mio::Interest;
use mio::unix::SourceFd;
use rustix::io::Errno;
use worker_sdk::wire::{
    Control, Features, Hello, Refused, RefusedCode, VERSION, Welcome, WelcomeListener,
};

use super::Shell;
use super::control::{self, Fault, Peer, Received};
use super::gauges::Gauges;
use super::token::{Key, Source};
use super::worker_io::{Lane, WorkerIo, send_record};
use crate::config::Pool;
use crate::pool::{Claim, Departure, Join, ListenerId, Refusal, Time, WorkerId};

/// Most control connections accepted in one turn.
const KNOCKS_PER_TURN: usize = 64;

/// Most records read from one control connection in one turn.
const RECORDS_PER_TURN: usize = 16;

/// What we can do, beyond what every version can.
const FEATURES: Features = Features::DRAIN;

/// A control connection that has not said hello.
#[derive(Debug)]
pub(super) struct Pending {
    serial: u64,
    socket: OwnedFd,
    peer: Peer,
    deadline: Time,
}

/// All control connections that have not said hello.
#[derive(Debug, Default)]
pub(super) struct Door {
    pending: Vec<Option<Pending>>,
    serial: u64,
    /// More knocks may be waiting than one turn takes.
    pub(super) ready: bool,
}

impl Door {
    fn take(&mut self, key: Key) -> Option<Pending> {
        let place = self.pending.get_mut(key.index as usize)?;
        place.take_if(|pending| key.is(pending.serial))
    }

    fn insert(&mut self, socket: OwnedFd, peer: Peer, deadline: Time) -> Key {
        self.serial += 1;
        let pending = Some(Pending { serial: self.serial, socket, peer, deadline });
        let index = match self.pending.iter().position(Option::is_none) {
            Some(index) => {
                self.pending[index] = pending;
                index
            }
            None => {
                self.pending.push(pending);
                self.pending.len() - 1
            }
        };
        Key { index: index as u32, serial: self.serial }
    }

    /// When the first of them runs out of time.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.pending.iter().flatten().map(|pending| pending.deadline).min()
    }

    fn count_of(&self, uid: u32) -> usize {
        self.pending.iter().flatten().filter(|pending| pending.peer.uid == uid).count()
    }
}

impl Shell {
    /// Accepts control connections; each has until `hello_timeout` to say hello.
    pub(super) fn knock(&mut self) {
        for _ in 0..KNOCKS_PER_TURN {
            let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&self.dispatch.fd, flags) {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(Errno::AGAIN) => {
                    self.door.ready = false;
                    return;
                }
                Err(errno) => {
                    // EMFILE and its kind: the worker stays in the socket's queue until `resource_pause` is over.
                    self.door.ready = false;
                    self.door_paused_until = Some(self.now + self.config.limits.resource_pause);
                    if let Some(left_out) = self.limits.shortage.allow(self.now) {
                        log::warn!(
                            "event=worker_not_accepted error=\"{errno}\" left_out={left_out}"
                        );
                        let pause = humantime::format_duration(self.config.limits.resource_pause);
                        self.fault("worker_not_accepted", "dispatch_socket", || {
                            format!("a worker waits for {pause}: {errno}")
                        });
                    }
                    return;
                }
            };
            self.admit(socket);
        }
    }

    fn admit(&mut self, socket: OwnedFd) {
        let peer = match Peer::of(&socket) {
            Ok(peer) => peer,
            Err(error) => {
                self.meters.workers_refused += 1;
                if let Some(left_out) = self.limits.refused.allow(self.now) {
                    log::warn!(
                        "event=worker_refused reason=\"no credentials: {error}\" left_out={left_out}"
                    );
                }
                return;
            }
        };
        let limit = self.config.limits.max_pending_hellos as usize;
        if self.door.count_of(peer.uid) >= limit {
            let reason = format!(
                "user {} has {limit} connections that have not said hello; try again",
                peer.uid
            );
            let key = Some("max_pending_hellos".to_owned());
            self.refuse(&socket, &peer, Refusal { code: RefusedCode::Resources, reason, key });
            return;
        }
        let raw = socket.as_raw_fd();
        let deadline = self.now + self.config.limits.hello_timeout;
        let key = self.door.insert(socket, peer, deadline);
        let token = Source::Pending(key).token();
        let registered =
            self.poll.registry().register(&mut SourceFd(&raw), token, Interest::READABLE);
        if let Err(error) = registered {
            self.meters.workers_refused += 1;
            if let Some(left_out) = self.limits.unwatched.allow(self.now) {
                log::warn!(
                    "event=worker_refused reason=\"cannot watch its connection: {error}\" left_out={left_out}"
                );
            }
            self.door.take(key);
        }
    }

    /// Closes those that have not said hello in time.
    pub(super) fn close_silent(&mut self) {
        for position in 0..self.door.pending.len() {
            let place = self.door.pending.get_mut(position);
            let late = place.and_then(|p| p.take_if(|pending| pending.deadline <= self.now));
            if let Some(pending) = late {
                forget(self.poll.registry(), &pending.socket);
                let Peer { pid, uid, .. } = pending.peer;
                self.meters.workers_refused += 1;
                if let Some(left_out) = self.limits.refused.allow(self.now) {
                    log::warn!(
                        "event=worker_refused pid={pid} uid={uid} reason=\"no hello in time\" left_out={left_out}"
                    );
                    self.fault("worker_refused", "dispatch_socket", || {
                        format!("process {pid} of user {uid} was refused: no hello in time")
                    });
                }
            }
        }
    }

    /// A pending control connection is readable: its hello, or its end.
    pub(super) fn hello(&mut self, key: Key) {
        let Some(pending) = self.door.take(key) else { return };
        match control::receive(&pending.socket) {
            Received::Empty => {
                self.door.pending[key.index as usize] = Some(pending);
            }
            Received::End => forget(self.poll.registry(), &pending.socket),
            Received::Record(Control::Hello(hello)) => self.join(pending, &hello),
            Received::Record(other) => {
                self.refuse_malformed(pending, &Fault::Unexpected(name_of(&other)));
            }
            Received::Broken(fault) => self.refuse_malformed(pending, &fault),
        }
    }

    fn refuse_malformed(&mut self, pending: Pending, fault: &Fault) {
        forget(self.poll.registry(), &pending.socket);
        let reason = format!("not a hello: {fault}");
        let refusal = Refusal { code: RefusedCode::Malformed, reason, key: None };
        self.refuse(&pending.socket, &pending.peer, refusal);
    }

    fn join(&mut self, pending: Pending, hello: &Hello) {
        let Pending { socket, peer, .. } = pending;
        let join = Join {
            pid: peer.pid,
            uid: peer.uid,
            gids: peer.gids.clone(),
            hello: hello.clone(),
            spawned: hello.token.and_then(|token| self.tokens.get(&token).copied()),
        };
        let result = self.welcome(socket, &join);
        if let Err((socket, refusal)) = result {
            forget(self.poll.registry(), &socket);
            self.refuse(&socket, &peer, refusal);
        }
    }

    fn welcome(&mut self, socket: OwnedFd, join: &Join) -> Result<(), (OwnedFd, Refusal)> {
        if let Err(refusal) = self.core.may_join(join) {
            return Err((socket, refusal));
        }
        let short_of = |error: &dyn std::fmt::Display| Refusal {
            code: RefusedCode::Resources,
            reason: format!("the dispatcher is short of a resource ({error}); try again"),
            key: None,
        };
        let pool = self.configured(&join.hello.pool);
        let slots = pool.map_or(1, |pool| pool.settings.max_untaken);
        let timeout = pool.map_or(std::time::Duration::ZERO, |p| p.settings.handoff_timeout);
        let (lane, theirs) = match Lane::new(slots, join.hello.finished) {
            Ok(made) => made,
            Err(error) => return Err((socket, short_of(&error))),
        };
        let peer = Peer { pid: join.pid, uid: join.uid, gids: Vec::new() };
        let pidfd = control::process_of(&socket, &peer);
        let id = match self.core.join(self.now, join) {
            Ok(id) => id,
            Err(refusal) => return Err((socket, refusal)),
        };
        let key = Key::from(id);
        let registry = self.poll.registry();
        let watched = registry
            .reregister(
                &mut SourceFd(&socket.as_raw_fd()),
                Source::Control(key).token(),
                Interest::READABLE,
            )
            .and_then(|()| {
                registry.register(
                    &mut SourceFd(&lane.poke.as_raw_fd()),
                    Source::Poke.token(),
                    Interest::READABLE,
                )
            })
            .and_then(|()| match &pidfd {
                None => Ok(()),
                Some(pidfd) => registry.register(
                    &mut SourceFd(&pidfd.as_raw_fd()),
                    Source::Process(key).token(),
                    Interest::READABLE,
                ),
            });
        let pool_id = self.core.pool_of_worker(id);
        let scored = pool_id.map_or(&[][..], |pool| self.core.scored_gauges(pool));
        let mut record = Vec::new();
        Welcome {
            version: VERSION,
            slots,
            worker_id: id.serial,
            features: self.features_for(&join.hello),
            max_connections: self.core.max_connections_of(id).unwrap_or(join.hello.max_connections),
            handoff_timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
            listeners: self.listeners_of(&join.hello.pool),
            gauges: scored.iter().map(|gauge| gauge.name).collect(),
        }
        .encode(&mut record);
        let fds = [theirs.channel.as_fd(), theirs.board.as_fd(), lane.poke.as_fd()];
        let sent = send_record(socket.as_fd(), &record, &fds);
        let finished = join.hello.finished;
        let outbox = Vec::new();
        let gauges = pool_id.and_then(|pool| Gauges::new(&self.core, pool));
        self.gauge_readers += usize::from(gauges.is_some());
        let io = WorkerIo {
            id,
            control: socket,
            lane,
            pidfd,
            outbox,
            finished,
            gauges,
            said_goodbye: false,
            unread: false,
        };
        let index = id.index as usize;
        if self.workers.len() <= index {
            self.workers.resize_with(index + 1, || None);
        }
        self.workers[index] = Some(io);
        if let Err(error) = watched {
            if let Some(left_out) = self.limits.unwatched.allow(self.now) {
                log::warn!(
                    "event=worker_not_watched {} error=\"{error}\" left_out={left_out}",
                    self.worker(id)
                );
            }
            self.core.leave(self.now, id, Departure::Expelled("its connection cannot be watched"));
        } else if sent.is_err() {
            self.core.leave(self.now, id, Departure::Disconnected);
        }
        Ok(())
    }

    /// What the worker and its pool both can.
    fn features_for(&self, hello: &Hello) -> Features {
        let claims =
            match self.configured(&hello.pool).and_then(|pool| pool.settings.affinity.as_ref()) {
                Some(_) => Features::OWN,
                None => Features::NONE,
            };
        Features(hello.features.0 & (FEATURES.0 | claims.0))
    }

    /// A worker claims a key. It may be leaving, and need not know what its pool's keys look like: no reason to cut it off.
    fn own(&mut self, worker: WorkerId, key: &[u8]) {
        let reason = match self.core.own(self.now, worker, key) {
            Claim::Noted | Claim::Leaving => return,
            Claim::NoAffinity => "its pool has no affinity.key",
            Claim::NotAKey => "its pool's affinity.key has no such values",
        };
        if let Some(left_out) = self.limits.claims.allow(self.now) {
            log::warn!(
                "event=claim_ignored {} reason=\"{reason}\" left_out={left_out}",
                self.worker(worker)
            );
        }
    }

    /// The pool of this name that there is now.
    fn configured(&self, name: &str) -> Option<&Pool> {
        self.config.pools.get(usize::from(self.core.pool_named(name)?.0))
    }

    fn listeners_of(&self, pool: &str) -> Vec<WelcomeListener> {
        let Some(pool) = self.core.pool_named(pool) else { return Vec::new() };
        let serves = |id: &ListenerId| self.core.pool_of_listener(*id) == Some(pool);
        let name = |id: ListenerId| self.core.listener_name(id).to_owned();
        let listeners = self.core.listeners().filter(serves);
        listeners.map(|id| WelcomeListener { index: id.0, name: name(id) }).collect()
    }

    /// A worker's control connection is readable: claims, goodbye, or its end.
    pub(super) fn control(&mut self, key: Key) {
        if self.worker_mut(key).is_some_and(|io| !io.unread) {
            self.read_records(key);
        }
    }

    /// Reads on where earlier turns stopped: the first so many of those that wait for it.
    pub(super) fn read_on(&mut self, count: usize) {
        for _ in 0..count {
            let Some(key) = self.again.pop_front() else { return };
            if let Some(io) = self.worker_mut(key) {
                io.unread = false;
                self.read_records(key);
            }
        }
    }

    /// At most so many of one worker in a turn, whatever it sends: called once for each.
    fn read_records(&mut self, key: Key) {
        for _ in 0..RECORDS_PER_TURN {
            let Some(io) = self.worker_mut(key) else { return };
            let id = io.id;
            match control::receive(&io.control) {
                Received::Empty => return,
                Received::Record(Control::Own(own)) => self.own(id, own.key()),
                Received::Record(Control::Goodbye(_)) if !io.said_goodbye => {
                    io.said_goodbye = true;
                    self.core.goodbye(self.now, id);
                }
                Received::End => {
                    self.core.leave(self.now, id, Departure::Disconnected);
                    return;
                }
                Received::Record(other) => {
                    let fault = Fault::Unexpected(name_of(&other));
                    return self.expel(key, &fault);
                }
                Received::Broken(fault) => return self.expel(key, &fault),
            }
        }
        // There may be more, and the edge is used up.
        if let Some(io) = self.worker_mut(key) {
            io.unread = true;
            self.again.push_back(key);
        }
    }

    fn expel(&mut self, key: Key, fault: &Fault) {
        let Some(io) = self.worker_mut(key) else { return };
        let id = io.id;
        if let Some(left_out) = self.limits.broken.allow(self.now) {
            log::warn!(
                "event=worker_broke_protocol {} reason=\"{fault}\" left_out={left_out}",
                self.worker(id)
            );
        }
        self.core.leave(self.now, id, Departure::Expelled("it broke the protocol"));
    }

    /// Says why, in the log and to the peer. The record is small and the socket new, so it fits or nobody reads it.
    fn refuse(&mut self, socket: &OwnedFd, peer: &Peer, refusal: Refusal) {
        let Peer { pid, uid, gids } = peer;
        let gid = gids.first().copied().unwrap_or_default();
        let Refusal { code, reason, key } = refusal;
        self.meters.workers_refused += 1;
        if let Some(left_out) = self.limits.refused.allow(self.now) {
            log::warn!(
                "event=worker_refused pid={pid} uid={uid} gid={gid} reason=\"{}\" key={} left_out={left_out}",
                reason.replace('"', "'"),
                key.as_deref().unwrap_or("-")
            );
            self.fault("worker_refused", "dispatch_socket", || {
                let key = key.as_ref().map_or(String::new(), |key| format!(" (see {key})"));
                format!("process {pid} of user {uid} was refused: {reason}{key}")
            });
        }
        let mut record = Vec::new();
        Refused { code, reason, key }.encode(&mut record);
        let _ = send_record(socket.as_fd(), &record, &[]);
    }

    /// The worker behind a key, unless it has gone since.
    pub(super) fn worker_mut(&mut self, key: Key) -> Option<&mut WorkerIo> {
        let io = self.workers.get_mut(key.index as usize)?.as_mut()?;
        key.is(io.id.serial).then_some(io)
    }
}

/// Takes a socket out of the poll before it is closed, so that no event for it can follow.
pub(super) fn forget(registry: &mio::Registry, socket: &OwnedFd) {
    let _ = registry.deregister(&mut SourceFd(&socket.as_raw_fd()));
}

fn name_of(record: &Control) -> &'static str {
    match record {
        Control::Hello(_) => "hello",
        Control::Welcome(_) => "welcome",
        Control::Refused(_) => "refused",
        Control::Goodbye(_) => "second goodbye",
        Control::Own(_) => "claim of a key",
        Control::Update(_) => "update",
    }
}
