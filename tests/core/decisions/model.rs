//! Compares the core with a naive model: after every call, a full recount checks every decision.

use std::collections::{BTreeMap, VecDeque};

use core::net::SocketAddr;

use dispatch_protocol::scoreboard::slot::{Revoke, SlotState};
use dispatch_protocol::wire::Update;
use proptest::prelude::*;

use super::naive::{At, Naive, Op, Out, SLOTS, Word, op};
use super::*;

const TIMEOUT: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_millis(300);
const WAIT: Duration = Duration::from_millis(500);

struct Model {
    core: Core,
    policy: Policy,
    now: Time,
    workers: BTreeMap<u64, Naive>,
    /// By serial number: the place, and whether it was sent before.
    conns: BTreeMap<u64, (ConnId, At, bool)>,
    revokes: VecDeque<(WorkerId, Ticket)>,
    purges: Vec<WorkerId>,
    out_of_resources: Option<Time>,
    /// No worker has been usable since then.
    alone: Option<Time>,
    /// Connections have waited since then, and none was taken.
    unserved: Option<Time>,
    /// The value after the previous call.
    refusing: bool,
}

impl Model {
    fn new(policy: Policy) -> Model {
        let mut pool = settings();
        pool.policy = policy;
        pool.history = 3;
        pool.history_candidates = 4;
        pool.max_untaken = SLOTS as u32;
        pool.handoff_timeout = TIMEOUT;
        pool.max_handoff_timeout = LONGEST;
        pool.wait_for_worker = WAIT;
        let now = Time(7);
        let mut model = Model {
            core: Core::new(vec![pool], vec![listener()], now),
            policy,
            now,
            workers: BTreeMap::new(),
            conns: BTreeMap::new(),
            revokes: VecDeque::new(),
            purges: Vec::new(),
            out_of_resources: None,
            alone: Some(now),
            unserved: None,
            refusing: false,
        };
        model.settle();
        model
    }

    fn pick(&self, n: usize) -> Option<u64> {
        let count = self.workers.len();
        (count > 0).then(|| *self.workers.keys().nth(n % count).unwrap())
    }

    fn w(&mut self, serial: u64) -> &mut Naive {
        self.workers.get_mut(&serial).unwrap()
    }

    fn queued(&self) -> usize {
        let at_queued = |(_, at, _): &&(ConnId, At, bool)| *at == At::Queued;
        self.conns.values().filter(at_queued).count()
    }

    /// Removes a ticket; its connection is queued for a moment, as one that was or was not sent.
    fn remove(&mut self, serial: u64, ticket: Ticket, sent: bool) -> Option<Out> {
        let out = &mut self.w(serial).out;
        let at = out.iter().position(|out| out.ticket == ticket)?;
        let out = out.remove(at);
        if let Some(conn) = out.conn {
            let entry = self.conns.get_mut(&conn).unwrap();
            entry.1 = At::Queued;
            entry.2 |= sent;
        }
        Some(out)
    }

    /// A report to the core about a slot, and its consequences in the model.
    fn resolved(&mut self, serial: u64, ticket: Ticket, word: Word) {
        let now = self.now;
        if word == Word::Taken {
            let w = self.w(serial);
            let Some(at) = w.out.iter().position(|out| out.ticket == ticket) else {
                return;
            };
            w.blocked = None;
            if let Some(conn) = w.out.remove(at).conn {
                w.taken += 1;
                self.conns.get_mut(&conn).unwrap().1 = At::Served;
                self.unserved = None;
            }
            return;
        }
        let Some(out) = self.remove(serial, ticket, true) else {
            return;
        };
        let w = self.w(serial);
        w.blocked = None;
        if word == Word::Lost && out.conn.is_some() {
            w.starved = Some(now + LOST_PAUSE);
        } else {
            w.gone = true;
        }
    }

    fn tick(&mut self) {
        let now = self.now;
        let due = |timer: Option<Time>| timer.is_some_and(|time| time <= now);
        if due(self.out_of_resources) {
            self.out_of_resources = None;
        }
        for w in self.workers.values_mut() {
            if due(w.blocked) {
                w.blocked = None;
            }
            if due(w.starved) {
                w.starved = None;
            }
        }
        self.clock();
        self.core.tick(now);
        if self.alone.is_some_and(|since| since + WAIT <= now) {
            assert_eq!(self.core.accepting(WEB), Accepting::Refuse, "no worker came in time");
        }
    }

    fn clock(&mut self) {
        if self.workers.values().any(Naive::usable) {
            self.alone = None;
        } else {
            self.alone.get_or_insert(self.now);
        }
    }

    fn apply(&mut self, op: &Op) {
        let now = self.now;
        match *op {
            Op::Join { weight, max, priority } => self.join(weight, max, priority),
            Op::Weight(n, weight) => {
                let Some(serial) = self.pick(n) else { return };
                let w = self.w(serial);
                w.weight = u64::from(weight);
                w.weight_set = true;
                let id = w.id;
                assert!(self.core.set_weight(now, id, weight), "known until it is forgotten");
            }
            Op::Update(n, weight, max, paused) => {
                let Some(serial) = self.pick(n) else { return };
                let id = self.w(serial).update(weight, max, paused);
                self.core.update(now, id, Update { weight, max_connections: max, paused });
            }
            Op::Goodbye(n) => {
                let Some(serial) = self.pick(n) else { return };
                self.w(serial).draining = true;
                let id = self.w(serial).id;
                self.core.goodbye(now, id);
            }
            Op::Leave(n) => {
                let Some(serial) = self.pick(n) else { return };
                self.w(serial).gone = true;
                let id = self.w(serial).id;
                self.core.leave(now, id, Departure::Died);
            }
            Op::Accept(from) => {
                let peer = SocketAddr::from(([10, 0, 0, from], 1));
                let conn = self.core.accepted(now, Client::new(WEB, peer.into()));
                self.conns.insert(conn.serial, (conn, At::Queued, false));
            }
            Op::ClientGone(n) => {
                let count = self.conns.len().max(1);
                let Some(&(conn, ..)) = self.conns.values().nth(n % count) else {
                    return;
                };
                self.core.client_gone(now, conn);
            }
            Op::Touch(n, slot, word, read) => {
                let Some(serial) = self.pick(n) else { return };
                let w = self.w(serial);
                let id = w.id;
                let Some(out) = w.out.get_mut(slot) else {
                    return;
                };
                if out.word == Word::Sent {
                    out.word = word;
                }
                let (ticket, word) = (out.ticket, out.word);
                if read {
                    self.read(serial, id, ticket, word);
                }
            }
            Op::Scan(n) => {
                let Some(serial) = self.pick(n) else { return };
                let id = self.w(serial).id;
                for out in self.w(serial).out.clone() {
                    self.read(serial, id, out.ticket, out.word);
                    self.settle();
                }
            }
            Op::Finish(n, count) => {
                let Some(serial) = self.pick(n) else { return };
                let w = self.w(serial);
                // Sometimes a lie, in either direction.
                let said = (w.finished + count).saturating_sub(1);
                let used = said.min(w.base + w.taken).max(w.finished);
                if !w.gone && used > w.finished {
                    w.starved = None;
                }
                if !w.gone {
                    w.finished = used;
                }
                let id = w.id;
                self.core.finished(now, id, said);
            }
            Op::Fail(n, slot, why) => self.fail(n, slot, why),
            Op::Outcome => self.outcome(),
            Op::Wait(millis) => {
                self.now = now + ms(millis);
                self.tick();
            }
        }
    }

    fn join(&mut self, weight: u16, max: u32, priority: u16) {
        if self.workers.values().filter(|w| !w.gone).count() >= 6 {
            return;
        }
        let join = Join {
            pid: 1,
            uid: 0,
            gids: vec![],
            hello: Hello {
                weight,
                max_connections: max,
                priority,
                base: 9,
                finished: 8,
                ..hello()
            },
            spawned: None,
        };
        let id = self.core.join(self.now, &join).unwrap();
        let naive = Naive {
            id,
            weight: u64::from(weight),
            max: u64::from(max),
            base: 9,
            taken: 0,
            finished: 8,
            out: Vec::new(),
            draining: false,
            weight_set: false,
            paused: false,
            gone: false,
            blocked: None,
            starved: None,
        };
        self.workers.insert(id.serial, naive);
        (self.alone, self.unserved) = (None, None);
    }

    fn read(&mut self, serial: u64, id: WorkerId, ticket: Ticket, word: Word) {
        let state = match word {
            Word::Sent => SlotState::Sent,
            Word::Taken => SlotState::Taken,
            Word::Lost => SlotState::Lost,
            Word::Bad => SlotState::Invalid,
        };
        if word != Word::Sent {
            self.resolved(serial, ticket, word);
        }
        self.core.slot(self.now, id, ticket, state, self.now);
    }

    fn fail(&mut self, n: usize, slot: usize, why: SendFailure) {
        let now = self.now;
        let Some(serial) = self.pick(n) else { return };
        let id = self.w(serial).id;
        let Some(out) = self.w(serial).out.get(slot).cloned() else {
            return;
        };
        if out.word != Word::Sent {
            return;
        }
        self.remove(serial, out.ticket, false);
        let w = self.workers.get_mut(&serial).unwrap();
        match why {
            SendFailure::Closed => w.draining = true,
            SendFailure::Full if out.conn.is_some() => w.blocked = Some(now + TIMEOUT),
            SendFailure::Resources if out.conn.is_some() => {
                self.out_of_resources = Some(now + ms(100))
            }
            // A probe is repeated later.
            SendFailure::Full | SendFailure::Resources | SendFailure::Client => w.blocked = None,
        }
        match out.conn {
            Some(_) => self.core.send_failed(now, id, out.ticket, why),
            None => self.core.probe_failed(now, id, out.ticket, why),
        }
    }

    fn outcome(&mut self) {
        let Some((id, ticket)) = self.revokes.pop_front() else {
            return;
        };
        let serial = id.serial;
        let out =
            self.workers.get(&serial).and_then(|w| w.out.iter().find(|out| out.ticket == ticket));
        let word = out.map_or(Word::Bad, |out| out.word);
        let outcome = match word {
            Word::Sent => Revoke::Revoked,
            Word::Taken => Revoke::Was(SlotState::Taken),
            Word::Lost => Revoke::Was(SlotState::Lost),
            Word::Bad => Revoke::Was(SlotState::Invalid),
        };
        if out.is_some() {
            if word == Word::Sent {
                self.remove(serial, ticket, true);
                self.w(serial).blocked = None;
            } else {
                self.resolved(serial, ticket, word);
            }
        }
        self.core.revoked(self.now, id, ticket, outcome);
    }

    /// Checks every effect of the last call, then compares everything.
    fn settle(&mut self) {
        self.clock();
        loop {
            while let Some(effect) = self.core.effect() {
                self.absorb(effect);
            }
            let Some(worker) = self.purges.pop() else { break };
            self.core.purged(self.now, worker);
        }
        self.core.check();
        let totals = self.core.totals();
        let count = |f: fn(&At) -> bool| {
            let conns = self.conns.values();
            conns.filter(|(_, at, _)| f(at)).count() as u64
        };
        assert_eq!(totals.queued, count(|at| *at == At::Queued));
        assert_eq!(totals.in_flight, count(|at| matches!(at, At::InFlight(_))));
        assert_eq!(totals.taken, count(|at| *at == At::Served));
        assert_eq!(totals.accepted, self.conns.len() as u64);
        for w in self.workers.values() {
            assert_eq!(self.core.load(w.id), Some(w.load()), "{w:?}");
        }
        let open = self.workers.values().any(Naive::is_open);
        if totals.in_flight > 0 || (totals.queued > 0 && open) {
            self.unserved.get_or_insert(self.now);
        } else {
            self.unserved = None;
        }
        let open = self.workers.values().any(Naive::is_open);
        let accepting = self.core.accepting(WEB);
        match accepting {
            Accepting::Refuse => {}
            Accepting::Yes => {
                assert!(open && self.out_of_resources.is_none() && self.queued() == 0)
            }
            Accepting::Pause => {
                let full = !open || self.policy == Policy::Failover;
                assert!(full || self.out_of_resources.is_some() || self.queued() > 0);
            }
            Accepting::Finish => panic!("nothing was removed"),
        }
        let refuses = accepting == Accepting::Refuse;
        assert!(!refuses || totals.queued == 0, "a pool that refuses lets no client wait");
        self.refusing = refuses;
    }

    fn absorb(&mut self, effect: Effect) {
        let now = self.now;
        match effect {
            Effect::Send { worker, conn, ticket, flags, .. } => {
                self.judge(worker.serial);
                let entry = self.conns.get_mut(&conn.serial).unwrap();
                assert_eq!(entry.1, At::Queued);
                assert_eq!(flags.contains(EntryFlags::RESENT), entry.2);
                entry.1 = At::InFlight(worker.serial);
                self.issue(worker, ticket, Some(conn.serial));
            }
            Effect::Probe { worker, ticket } => {
                assert!(self.workers[&worker.serial].out.iter().all(|out| out.conn.is_some()));
                self.issue(worker, ticket, None);
            }
            Effect::Revoke { worker, ticket } => {
                let w = self.w(worker.serial);
                let out = w.out.iter_mut().find(|out| out.ticket == ticket);
                out.unwrap().revoking = true;
                self.revokes.push_back((worker, ticket));
            }
            Effect::Release { worker, conn, .. } => {
                assert!(self.workers.contains_key(&worker.serial));
                assert_eq!(self.conns[&conn.serial].1, At::Served);
            }
            Effect::Close { conn, reason, .. } => {
                let entry = self.conns.get_mut(&conn.serial).unwrap();
                assert_eq!(entry.1, At::Queued);
                let refusing = self.core.accepting(WEB) == Accepting::Refuse;
                assert!(reason == CloseReason::ClientGone || refusing || self.refusing);
                entry.1 = At::Closed;
            }
            Effect::Disconnect { worker, .. } => assert!(self.workers[&worker.serial].gone),
            Effect::Forget { worker } => {
                let w = self.workers.remove(&worker.serial).unwrap();
                assert!(w.gone && w.out.is_empty());
            }
            Effect::Purge { worker } => {
                let w = &self.workers[&worker.serial];
                assert!(w.out.iter().all(|out| out.revoking), "at {now:?}: {w:?}");
                self.purges.push(worker);
            }
            Effect::Spawn { .. }
            | Effect::StopProcess { .. }
            | Effect::EndProcess { .. }
            | Effect::CheckReady { .. }
            | Effect::SendCheck { .. }
            | Effect::CheckOver { .. } => panic!("no processes are configured"),
            // The model ignores these.
            Effect::Notify { .. } => panic!("a notice for a worker without support"),
            // A pool may take nothing for longer than this, depending on its workers' usual times.
            Effect::Event(Event::Refusing { unserved, .. }) => {
                let since = if unserved { self.unserved } else { self.alone };
                let refused = since.is_some_and(|since| since + WAIT <= now);
                assert!(refused, "at {now:?}, since {since:?}, {unserved}");
                self.unserved = None;
            }
            Effect::Steer { .. } | Effect::MoveQueue { .. } | Effect::Event(_) => {}
        }
    }

    /// Checks that the chosen worker may get the connection.
    fn judge(&mut self, chosen: u64) {
        let w = &self.workers[&chosen];
        assert!(w.is_open() && self.out_of_resources.is_none(), "{w:?}");
        // Fewest connections relative to weight, among the trusted workers that no other rule
        // distinguishes.
        if matches!(self.policy, Policy::LeastConnections | Policy::LeastScore) && !self.refusing {
            let is_more =
                |a: &Naive, b: &Naive| (a.load() + 1) * b.weight > (b.load() + 1) * a.weight;
            let trusted = |w: &Naive| self.core.is_trusted(w.id) && w.is_open();
            let others = self.workers.values().filter(|other| trusted(other));
            let better = others.filter(|other| is_more(w, other)).count();
            let status = self.core.worker_state(w.id);
            assert!(better == 0 || !trusted(w), "{status:?} {w:?}");
        }
        let decisions = self.core.history(PoolId(0), 0);
        assert!(decisions.len() <= 3);
        assert!(decisions.iter().all(|d| d.candidates.len() <= 4));
    }

    fn issue(&mut self, worker: WorkerId, ticket: Ticket, conn: Option<u64>) {
        let w = self.w(worker.serial);
        let used = |out: &Out| out.ticket.slot == ticket.slot || out.ticket.seq >= ticket.seq;
        assert!(!w.out.iter().any(used), "slots are used once at a time");
        assert!((ticket.slot as usize) < SLOTS + SPARE_SLOTS as usize);
        w.out.push(Out { ticket, conn, word: Word::Sent, revoking: false });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_core_does_what_the_naive_model_allows(
        policy in prop::sample::select(&Policy::ALL[..]),
        ops in prop::collection::vec(op(), 1..250),
    ) {
        let mut model = Model::new(policy);
        for op in &ops {
            model.apply(op);
            model.settle();
        }
    }
}
