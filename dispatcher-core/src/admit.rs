//! Admission of workers to pools.

use dispatch_protocol::wire::{Features, Hello, RefusedCode, VERSION};

use super::handoff::Shares;
use super::policy::Member;
use super::ring::Ring;
use super::trust::Trust;
use super::types::*;
use super::worker::{Peer, Worker, node};
use super::{Core, Event};

/// More takes than any process can reach: 285 years at a million a second. Sums stay exact in an
/// `f64`, too.
pub(super) const MOST_TAKEN: u64 = 1 << 53;

/// More live connections than `max_connections_per_worker` can be.
pub(super) const MOST_LIVE: u64 = 10_000_000;

/// The taken and finished counts of a hello. If they are impossible, the worker counts as having
/// its own maximum of connections.
fn possible(hello: &Hello) -> (u64, u64) {
    let finished = hello.finished.min(hello.base);
    let live = hello.base - finished;
    if hello.base <= MOST_TAKEN && live <= MOST_LIVE {
        return (hello.base, finished);
    }
    let finished = if finished <= MOST_TAKEN { finished } else { 0 };
    (finished + live.min(u64::from(hello.max_connections)), finished)
}

impl Core {
    /// Whether [`Core::join`] would accept this worker now. The event loop asks before it allocates
    /// anything for the worker.
    ///
    /// # Errors
    /// The refusal that `join` would return.
    pub fn may_join(&self, join: &Join) -> Result<(), Refusal> {
        self.admit(join).map(|_| ())
    }

    /// A worker joins, and is eligible from then on. The event loop has everything that a welcome
    /// needs, and sends it on success.
    pub fn join(&mut self, now: Time, join: &Join) -> Result<WorkerId, Refusal> {
        let pool = self.admit(join)?;
        let id = self.add_worker(now, pool, join, Peer::Native);
        self.drain_with_host(now, id);
        self.settle_join(now, id);
        Ok(id)
    }

    /// A worker has joined: the supervision of its process learns of it.
    pub(super) fn settle_join(&mut self, now: Time, id: WorkerId) {
        self.process_joined(now, id.index as usize);
        // Fewer processes may be wanted than when it was started, or another one has its place.
        if self.is_surplus(id.index as usize) {
            let deadline = self.drain_deadline(now, id.index as usize);
            self.drain_unwanted(now, id, deadline);
        }
        self.after(now, self.workers[id.index as usize].pool);
    }

    /// The pool that a worker may join, or the refusal.
    pub(super) fn admit(&self, join: &Join) -> Result<usize, Refusal> {
        let hello = &join.hello;
        let refusal = |code, key: Option<String>, reason| Refusal { code, reason, key };
        if hello.version != VERSION {
            return Err(refusal(
                RefusedCode::Version,
                None,
                format!(
                    "this dispatcher speaks version {VERSION} of the protocol, the worker version {}: \
                     upgrade the older of the two",
                    hello.version
                ),
            ));
        }
        self.is_not_over()?;
        // A process outlives its pool: its worker joins to be drained.
        let own = || {
            let pool = join.spawned?.pool;
            (self.pools.get(usize::from(pool.0))?.settings.name == hello.pool).then_some(pool)
        };
        let named = self.pool_named(&hello.pool).or_else(own);
        let Some(p) = named.map(|pool| usize::from(pool.0)) else {
            let known: Vec<&str> = self.pool_names().collect();
            return Err(refusal(
                RefusedCode::UnknownPool,
                Some("pool".to_owned()),
                format!(
                    "there is no pool `{}`: the configuration has {}",
                    hello.pool,
                    known.join(", ")
                ),
            ));
        };
        let pool = &self.pools[p];
        if pool.released {
            return Err(stopping());
        }
        let name = &pool.settings.name;
        if pool.settings.steered {
            return Err(refusal(
                RefusedCode::NotAllowed,
                Some(format!("pool.{name}.mode")),
                format!(
                    "the kernel chooses the workers of pool `{name}` (mode = \"steer\"): its workers \
                     listen at addresses of their own, and do not join"
                ),
            ));
        }
        if !self.is_allowed(p, join) {
            let groups: Vec<String> = join.gids.iter().map(u32::to_string).collect();
            return Err(refusal(
                RefusedCode::NotAllowed,
                Some(format!("pool.{name}.allow_users")),
                format!(
                    "user {} with groups {} (process {}) may not join pool `{name}`: \
                     add it to pool.{name}.allow_users or allow_groups",
                    join.uid,
                    groups.join(", "),
                    join.pid
                ),
            ));
        }
        self.may_hold_one_more(p)?;
        Ok(p)
    }

    /// Whether the stop of the dispatcher leaves time for a worker.
    fn is_not_over(&self) -> Result<(), Refusal> {
        match self.stop.is_some_and(|stop| stop.over) {
            true => Err(stopping()),
            false => Ok(()),
        }
    }

    /// Whether a pool takes one more worker, of any kind.
    pub(super) fn may_hold_one_more(&self, p: usize) -> Result<(), Refusal> {
        self.is_not_over()?;
        let Some(pool) = self.pools.get(p) else { return Err(stopping()) };
        // Before its release a pool accepts workers even during a stop, because its clients wait
        // for one.
        if pool.released {
            return Err(stopping());
        }
        let (name, max) = (&pool.settings.name, pool.settings.max_workers);
        if pool.candidates.len() >= max as usize {
            return Err(Refusal {
                code: RefusedCode::TooManyWorkers,
                key: Some(format!("pool.{name}.max_workers")),
                reason: format!(
                    "pool `{name}` has {max} worker{}, as many as pool.{name}.max_workers allows",
                    if max == 1 { "" } else { "s" }
                ),
            });
        }
        Ok(())
    }

    fn is_allowed(&self, pool: usize, join: &Join) -> bool {
        let access = &self.pools[pool].settings.access;
        join.spawned.is_some_and(|process| usize::from(process.pool.0) == pool)
            || access.users.contains(&join.uid)
            || join.gids.iter().any(|gid| access.groups.contains(gid))
    }

    /// Adds an admitted worker.
    pub(super) fn add_worker(&mut self, now: Time, p: usize, join: &Join, peer: Peer) -> WorkerId {
        self.joins += 1;
        let index = match self.free_workers.pop() {
            Some(index) => index,
            None => self.workers.len() as u32,
        };
        let id = WorkerId { index, serial: self.joins };
        let hello = &join.hello;
        let instance = self.free_instance(p, &hello.name);
        let node = node(&hello.name, instance);
        let pool = &mut self.pools[p];
        let workers = &self.workers;
        let binding = pool.memory.as_mut().map_or(0, |memory| {
            memory.bind(&hello.name, index, |w| workers[w as usize].is_usable())
        });
        let priority = hello.priority;
        let (base, finished) = possible(hello);
        let mut worker = Worker {
            id,
            pool: p,
            at: pool.candidates.add(Member { worker: index, node, priority }),
            name: hello.name.as_str().into(),
            instance,
            binding,
            pid: join.pid,
            priority,
            advertise: hello.advertise.as_deref().map(std::sync::Arc::from),
            ramp: None,
            weight: u32::from(hello.weight.max(1)),
            max: hello.max_connections.min(pool.settings.max_connections_per_worker),
            own_max: hello.max_connections,
            weight_set: false,
            paused: false,
            process: join.spawned,
            state: State::Active,
            base,
            taken: 0,
            finished,
            sent: 0,
            revoked: 0,
            ring: Ring::new(pool.settings.max_untaken),
            round: None,
            resent: 0,
            suspect_since: Time::default(),
            said_goodbye: false,
            closed: false,
            unproven: false,
            supports_notices: hello.features.contains(Features::DRAIN),
            notice: None,
            notice_again: None,
            drain_deadline: None,
            unwanted: false,
            ended: 0,
            forgotten: false,
            blocked: None,
            starved: None,
            checking: false,
            // A worker that has served before, under this dispatcher or another, starts with trust.
            trust: match peer {
                // It takes what it is sent, as far as the dispatcher can see.
                Peer::Line(_) | Peer::Steered(_) => Trust::full(now),
                Peer::Native => Trust::new(now, hello.base > 0),
            },
            threads: None,
            trial_wait: None,
            purging: false,
            stale: 0,
            shares: Shares::default(),
            probe_again: None,
            reported_clamped: false,
            reported_decrease: false,
            reported_gauges: [false; GaugeProblem::COUNT],
            channel_full: 0,
            line: None,
            steered: None,
        };
        match peer {
            Peer::Native => {}
            Peer::Line(line) => worker.line = Some(line),
            Peer::Steered(steered) => worker.steered = Some(steered),
        }
        worker.start_slowly(now, pool.settings.slow_start);
        pool.counts.joined += 1;
        let live = worker.load();
        match self.workers.get_mut(index as usize) {
            Some(entry) => *entry = worker,
            None => {
                self.workers.push(worker);
                self.out.push(0);
                self.live.push(false);
            }
        }
        self.add_usable(p);
        self.event(Event::Joined { worker: id, live });
        if base != hello.base {
            self.event(Event::Clamped { worker: id, what: "base", said: hello.base, used: base });
        }
        self.refresh(index as usize);
        self.probe(now, index as usize);
        id
    }

    /// The smallest number that no other worker of this name has. A worker that said goodbye no
    /// longer needs its number.
    fn free_instance(&self, p: usize, name: &str) -> u32 {
        let mut used: Vec<u32> = self.pools[p]
            .candidates
            .workers()
            .map(|w| &self.workers[w as usize])
            .filter(|worker| *worker.name == *name && !worker.said_goodbye)
            .map(|worker| worker.instance)
            .collect();
        used.sort_unstable();
        (0..)
            .zip(&used)
            .find(|(free, used)| free != *used)
            .map_or(used.len() as u32, |(free, _)| free)
    }
}

fn stopping() -> Refusal {
    Refusal {
        code: RefusedCode::Stopping,
        key: None,
        reason: "the dispatcher is stopping: try again after its restart".to_owned(),
    }
}
