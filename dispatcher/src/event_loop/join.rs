//! Workers that join and leave: passes the events of the [handshake thread](super::handshake) to
//! the core, and the core's answers back.

use std::os::fd::{AsRawFd, OwnedFd};

use dispatch_protocol::wire::{
    Control, Features, Hello, RefusedCode, VERSION, Welcome, WelcomeListener,
};
use mio::Interest;
use mio::unix::SourceFd;

use super::EventLoop;
use super::control::Fault;
use super::doorbell_limit::DoorbellLimit;
use super::fault_kind::FaultKind;
use super::gauges::Gauges;
use super::handshake::{HandshakeCommand, HandshakeEvent, JoinRequest, Settings};
use super::rate_limit::Cause;
use super::token::{Key, Source};
use super::worker_io::{Lane, WorkerIo};
use crate::background::logger::{quoted, value};
use crate::config;
use dispatcher_core::{
    ClaimOutcome, Departure, ListenerId, PoolId, PoolSettings, Refusal, SPARE_SLOTS, WorkerId,
};

/// Most events of the handshake thread handled in one turn; the rest waits for the next turn.
const EVENTS_PER_TURN: usize = 64;

/// The optional features of this dispatcher.
const FEATURES: Features = Features(Features::DRAIN.0 | Features::UPDATE.0);

impl EventLoop {
    /// Handles the events of the handshake thread.
    pub(super) fn handle_handshakes(&mut self) {
        for _ in 0..EVENTS_PER_TURN {
            let Some(event) = self.handshakes.next() else { return };
            match event {
                HandshakeEvent::Hello(request) => self.join(*request),
                HandshakeEvent::Claim(worker, claim) => self.claim(worker, claim.key()),
                HandshakeEvent::Update(worker, update) => {
                    self.core.update(self.now, worker, update)
                }
                HandshakeEvent::Goodbye(worker) => self.core.goodbye(self.now, worker),
                HandshakeEvent::Left(worker, why) => self.core.leave(self.now, worker, why),
                HandshakeEvent::Broke(worker, fault) => self.expel(worker, &fault),
                HandshakeEvent::Refused { pid, uid, gid, reason, key, more } => {
                    let peer = (pid, uid, gid);
                    self.worker_refused(peer, &reason, key.as_deref(), more, "dispatch_socket");
                }
                HandshakeEvent::RefusedMore { uid, count } => {
                    self.observation.meters.workers_refused += count;
                    log::warn!(
                        "event=lines_suppressed kind=worker_refused uid={uid} count={count}"
                    );
                }
                HandshakeEvent::Short(error) => self.worker_not_accepted(&error, "dispatch_socket"),
            }
        }
    }

    /// A worker was refused at this socket, after `more` others whose lines were suppressed.
    pub(super) fn worker_refused(
        &mut self,
        (pid, uid, gid): (i32, u32, u32),
        reason: &str,
        key: Option<&str>,
        more: u64,
        socket: &str,
    ) {
        self.observation.meters.workers_refused += 1 + more;
        log::warn!(
            "event=worker_refused pid={pid} uid={uid} gid={gid} reason={} key={} suppressed={more}",
            quoted(&reason),
            value(key.unwrap_or("-"))
        );
        self.fault(FaultKind::WorkerRefused, socket, || {
            let key = key.map_or(String::new(), |key| format!(" (see {key})"));
            format!("process {pid} of user {uid} was refused: {reason}{key}")
        });
    }

    /// Descriptors or memory ran out at this socket.
    pub(super) fn worker_not_accepted(&mut self, error: &str, socket: &str) {
        let limit = self.observation.allow(self.now, None, Cause::Shortage);
        if let Some(suppressed) = limit {
            log::warn!(
                "event=worker_not_accepted error={error} suppressed={suppressed}",
                error = quoted(&error)
            );
            let pause = humantime::format_duration(self.config.limits.resource_pause);
            self.fault(FaultKind::WorkerNotAccepted, socket, || {
                format!("a worker waits for {pause}: {error}")
            });
        }
    }

    fn join(&mut self, request: JoinRequest) {
        let JoinRequest { key, mut join, lane } = request;
        join.spawned = join.hello.token.and_then(|token| self.workers.tokens.get(&token).copied());
        if let Err(refusal) = self.core.may_join(&join) {
            return self.handshakes.send(HandshakeCommand::Refuse { key, refusal });
        }
        let slots = self.slots_for(&join.hello.pool);
        // The handshake thread made them, unless the pool has changed since.
        let made = match lane {
            Some(Ok((lane, theirs))) if lane.board.slots() == slots => Ok((lane, theirs)),
            Some(Err(error)) => Err(error),
            Some(Ok(_)) | None => {
                Lane::new(slots, join.hello.finished).map_err(|error| error.to_string())
            }
        };
        let (lane, theirs) = match made {
            Ok(made) => made,
            Err(error) => {
                let reason = format!("the dispatcher is short of a resource ({error}); try again");
                let refusal = Refusal { code: RefusedCode::Resources, reason, key: None };
                return self.handshakes.send(HandshakeCommand::Refuse { key, refusal });
            }
        };
        // The worker's copy of the eventfd. An error shows that the dispatcher has no descriptors
        // left.
        let doorbell = match lane.doorbell.try_clone() {
            Ok(doorbell) => doorbell,
            Err(error) => {
                let reason = format!("the dispatcher is short of a resource ({error}); try again");
                let refusal = Refusal { code: RefusedCode::Resources, reason, key: None };
                return self.handshakes.send(HandshakeCommand::Refuse { key, refusal });
            }
        };
        let id = match self.core.join(self.now, &join) {
            Ok(id) => id,
            Err(refusal) => return self.handshakes.send(HandshakeCommand::Refuse { key, refusal }),
        };
        let raw = lane.doorbell.as_raw_fd();
        let token = Source::Doorbell(Key::from(id)).token();
        let watched =
            self.wakeup.registry().register(&mut SourceFd(&raw), token, Interest::READABLE);
        let pool_id = self.core.pool_of_worker(id);
        let scored = pool_id.map_or(&[][..], |pool| self.core.scored_gauges(pool));
        let settings = self.settings_of(&join.hello.pool);
        let timeout = settings.map(|settings| settings.handoff_timeout).unwrap_or_default();
        let mut record = Vec::new();
        Welcome {
            version: VERSION,
            slots,
            worker_id: id.serial,
            features: self.features_for(&join.hello),
            max_connections: self.core.max_connections_of(id).unwrap_or(join.hello.max_connections),
            handoff_timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
            listeners: self.listeners_of(&join.hello.pool),
            gauges: self.config.advice.wanted_gauges(scored.iter().map(|gauge| gauge.name)),
            // The handshake thread appends one: it may read the key.
            relay_ticket: Vec::new(),
        }
        .encode(&mut record);
        let fds = [theirs.channel, theirs.board, doorbell];
        self.handshakes.send(HandshakeCommand::Welcome { key, worker: id, record, fds });
        let gauges = pool_id.and_then(|pool| Gauges::new(&self.core, pool));
        let drains = join.hello.features.contains(Features::DRAIN);
        let io = WorkerIo {
            id,
            lane,
            outbox: Vec::new(),
            finished: join.hello.finished,
            threads: None,
            gauges,
            started_by: join.spawned.map(|process| process.pool).filter(|_| drains),
            purge: None,
            doorbell_limit: DoorbellLimit::default(),
        };
        self.workers.insert(io);
        if let Err(error) = watched {
            let limit = self.observation.allow(self.now, pool_id, Cause::NotWatched);
            if let Some(suppressed) = limit {
                log::warn!(
                    "event=worker_not_watched {} error={error} suppressed={suppressed}",
                    self.worker(id),
                    error = quoted(&error)
                );
            }
            self.core.leave(self.now, id, Departure::Expelled("its connection cannot be watched"));
        } else if join.hello.token.is_some() && join.spawned.is_none() {
            self.retire_left_over(id, pool_id);
        }
    }

    /// A worker with an unknown token: a dispatcher that was killed had started it, and this
    /// dispatcher has started a process in its place. The worker keeps its connections and ends
    /// with the last.
    fn retire_left_over(&mut self, worker: WorkerId, pool: Option<PoolId>) {
        if let Some(suppressed) = self.observation.allow(self.now, pool, Cause::LeftOver) {
            log::warn!(
                "event=worker_left_over {} suppressed={suppressed} hint=\"an earlier dispatcher started it: it is drained\"",
                self.worker(worker)
            );
        }
        self.core.drain_worker(self.now, worker, None);
    }

    /// The number of scoreboard slots of a worker of this pool.
    fn slots_for(&self, pool: &str) -> u32 {
        self.settings_of(pool).map_or(1, |settings| settings.max_untaken + SPARE_SLOTS)
    }

    /// The settings of the handshake thread.
    pub(super) fn handshake_settings<'a>(
        limits: &config::Limits,
        pools: impl Iterator<Item = &'a PoolSettings>,
    ) -> Settings {
        let slots =
            pools.map(|settings| (settings.name.clone(), settings.max_untaken + SPARE_SLOTS));
        Settings { limits: limits.clone(), slots: slots.collect() }
    }

    /// The features that both the worker and its pool support.
    fn features_for(&self, hello: &Hello) -> Features {
        let claims =
            match self.settings_of(&hello.pool).and_then(|settings| settings.affinity.as_ref()) {
                Some(_) => Features::CLAIM,
                None => Features::NONE,
            };
        Features(hello.features.0 & (FEATURES.0 | claims.0))
    }

    /// A worker claims a key. A wrong claim is ignored: the worker may be leaving, and need not
    /// know the key format of its pool.
    fn claim(&mut self, worker: WorkerId, key: &[u8]) {
        let reason = match self.core.claim(self.now, worker, key) {
            ClaimOutcome::Noted | ClaimOutcome::Leaving => return,
            ClaimOutcome::NoAffinity => "its pool has no affinity.key",
            ClaimOutcome::NotAKey => "its pool's affinity.key has no such values",
        };
        let pool = self.core.pool_of_worker(worker);
        if let Some(suppressed) = self.observation.allow(self.now, pool, Cause::Claim) {
            log::warn!(
                "event=claim_ignored {} reason={reason} suppressed={suppressed}",
                self.worker(worker),
                reason = quoted(&reason)
            );
        }
    }

    /// The current pool of this name.
    fn settings_of(&self, name: &str) -> Option<&PoolSettings> {
        self.core.pool_settings(self.core.pool_named(name)?)
    }

    fn listeners_of(&self, pool: &str) -> Vec<WelcomeListener> {
        let Some(pool) = self.core.pool_named(pool) else { return Vec::new() };
        let serves = |id: &ListenerId| self.core.pool_of_listener(*id) == Some(pool);
        let name = |id: ListenerId| self.core.listener_name(id).to_owned();
        let listeners = self.core.listeners().filter(serves);
        listeners.map(|id| WelcomeListener { index: id.0, name: name(id) }).collect()
    }

    fn expel(&mut self, id: WorkerId, fault: &Fault) {
        let pool = self.core.pool_of_worker(id);
        if let Some(suppressed) = self.observation.allow(self.now, pool, Cause::Broken) {
            log::warn!(
                "event=worker_broke_protocol {} reason={fault} suppressed={suppressed}",
                self.worker(id),
                fault = quoted(&fault)
            );
        }
        self.core.leave(self.now, id, Departure::Expelled("it broke the protocol"));
    }
}

/// Takes a socket out of the poll before it is closed, so that no event for it can follow.
pub(super) fn forget(registry: &mio::Registry, socket: &OwnedFd) {
    let _ = registry.deregister(&mut SourceFd(&socket.as_raw_fd()));
}

pub(super) fn name_of(record: &Control) -> &'static str {
    match record {
        Control::Hello(_) => "hello",
        Control::Welcome(_) => "welcome",
        Control::Refused(_) => "refused",
        Control::Goodbye(_) => "second goodbye",
        Control::Claim(_) => "claim of a key",
        Control::Update(_) => "update",
    }
}
