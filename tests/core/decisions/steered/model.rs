//! A kernel that chooses, counts and loses workers at random: after every step the core's load is
//! the kernel's, the totals are conserved, and the kernel knows what the core has decided.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Join {
        weight: u16,
        live: u64,
    },
    /// A SYN: the worker with the least load gets it, as the kernel was told.
    Syn,
    /// A handshake ends, or does not.
    Establish(usize, bool),
    Accept(usize, u64),
    End(usize, u64),
    /// The counts are read; the queue at another moment than the rest.
    Read(usize, bool),
    /// New programs: every count is 0.
    Reset(usize),
    Absurd(usize, u64, u64),
    Close(usize),
    Leave(usize),
    Drain(usize),
    Resume(usize),
    Weight(usize, u16),
    Host(bool),
    Change {
        most: u32,
        slow_start: u64,
    },
    Scale(u32),
    Start,
    Wait(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let worker = 0..8usize;
    prop_oneof![
        2 => (0..4u16, 0..3u64).prop_map(|(weight, live)| Op::Join { weight, live }),
        12 => Just(Op::Syn),
        8 => (worker.clone(), prop::bool::weighted(0.8)).prop_map(|(w, ok)| Op::Establish(w, ok)),
        6 => (worker.clone(), 1..4u64).prop_map(|(w, n)| Op::Accept(w, n)),
        6 => (worker.clone(), 1..4u64).prop_map(|(w, n)| Op::End(w, n)),
        12 => (worker.clone(), any::<bool>()).prop_map(|(w, early)| Op::Read(w, early)),
        1 => worker.clone().prop_map(Op::Reset),
        1 => (worker.clone(), any::<u64>(), any::<u64>())
            .prop_map(|(w, live, total)| Op::Absurd(w, live, total)),
        1 => worker.clone().prop_map(Op::Close),
        1 => worker.clone().prop_map(Op::Leave),
        1 => worker.clone().prop_map(Op::Drain),
        1 => worker.clone().prop_map(Op::Resume),
        1 => (worker, 0..4u16).prop_map(|(w, weight)| Op::Weight(w, weight)),
        1 => any::<bool>().prop_map(Op::Host),
        1 => (1..9u32, 0..2_000u64).prop_map(|(most, slow_start)| Op::Change { most, slow_start }),
        1 => (0..4u32).prop_map(Op::Scale),
        2 => Just(Op::Start),
        4 => (1..700u64).prop_map(Op::Wait),
    ]
}

/// What the core was last told about a worker, and the sum of what it must have counted.
struct Model {
    lab: Lab,
    /// Counts in the kernel; those of the lab are the last ones that were read.
    real: BTreeMap<WorkerId, SteerCounts>,
    process: BTreeMap<WorkerId, ProcessId>,
    established: u64,
}

impl Model {
    fn pick(&self, n: usize) -> Option<WorkerId> {
        let count = self.real.len();
        (count > 0).then(|| *self.real.keys().nth(n % count).unwrap())
    }

    fn real(&mut self, worker: WorkerId) -> &mut SteerCounts {
        self.real.get_mut(&worker).unwrap()
    }

    fn read(&mut self, worker: WorkerId, counts: SteerCounts) {
        let before = self.lab.sockets[&worker].counts;
        let most = |total: u64| total.min(1 << 53);
        self.established += most(counts.total).saturating_sub(most(before.total));
        self.lab.counts(worker, counts);
    }

    fn joined(&mut self, joined: Result<WorkerId, Refusal>, counts: SteerCounts) {
        let worker = joined.unwrap();
        self.real.insert(worker, counts);
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Join { weight, live } if self.real.len() < 8 => {
                let counts = counts(live, live + 5, 0);
                let joined = self.lab.try_join(|join| {
                    (join.weight, join.counts) = (weight, counts);
                });
                self.joined(joined, counts);
            }
            Op::Join { .. } => {}
            Op::Syn => self.syn(),
            Op::Establish(n, established) => {
                let Some(worker) = self.pick(n) else { return };
                let counts = self.real(worker);
                if counts.pending == 0 {
                    return;
                }
                counts.pending -= 1;
                if established {
                    counts.live += 1;
                    counts.queued += 1;
                    counts.total += 1;
                }
            }
            Op::Accept(n, most) => {
                let Some(worker) = self.pick(n) else { return };
                let counts = self.real(worker);
                counts.queued -= most.min(counts.queued);
            }
            Op::End(n, most) => {
                let Some(worker) = self.pick(n) else { return };
                let counts = self.real(worker);
                counts.live -= most.min(counts.live.saturating_sub(counts.queued));
            }
            Op::Read(n, early) => {
                let Some(worker) = self.pick(n) else { return };
                let mut counts = self.real[&worker];
                if early {
                    counts.queued = counts.queued.min(self.lab.sockets[&worker].counts.queued);
                }
                self.read(worker, counts);
            }
            Op::Reset(n) => {
                let Some(worker) = self.pick(n) else { return };
                *self.real(worker) = SteerCounts::default();
            }
            Op::Absurd(n, live, total) => {
                let Some(worker) = self.pick(n) else { return };
                self.read(
                    worker,
                    SteerCounts {
                        live,
                        pending: total,
                        total,
                        queued: live,
                        ..SteerCounts::default()
                    },
                );
            }
            Op::Close(n) => {
                let Some(worker) = self.pick(n) else { return };
                self.lab.core.steer_closed(self.lab.now, worker);
            }
            Op::Leave(n) => {
                let Some(worker) = self.pick(n) else { return };
                self.lab.core.leave(self.lab.now, worker, Departure::Died);
                if let Some(process) = self.process.remove(&worker) {
                    self.lab.core.exited(self.lab.now, process);
                }
                self.real.remove(&worker);
            }
            Op::Drain(n) => {
                let Some(worker) = self.pick(n) else { return };
                self.lab.core.drain_worker(self.lab.now, worker, None);
            }
            Op::Resume(n) => {
                let Some(worker) = self.pick(n) else { return };
                // Some cannot be resumed.
                let _ = self.lab.core.resume_worker(self.lab.now, worker);
            }
            Op::Weight(n, weight) => {
                let Some(worker) = self.pick(n) else { return };
                self.lab.core.set_weight(self.lab.now, worker, weight);
            }
            Op::Host(drains) => match drains {
                true => self.lab.core.drain_host(self.lab.now, ms(100), None),
                false => self.lab.core.resume_host(self.lab.now),
            },
            Op::Change { most, slow_start } => {
                let settings = PoolSettings {
                    max_connections_per_worker: most,
                    slow_start: ms(slow_start),
                    ..self.lab.settings()
                };
                self.lab.core.change_pool(self.lab.now, PoolId(0), settings, 1);
            }
            Op::Scale(processes) => self.lab.core.scale(self.lab.now, PoolId(0), processes),
            Op::Start => {
                let Some(process) = self.lab.starts.pop() else { return };
                self.lab.core.spawned(self.lab.now, process, true);
                let joined = self.lab.try_join(|join| join.process = Some(process));
                self.process.insert(*joined.as_ref().unwrap(), process);
                self.joined(joined, SteerCounts::default());
            }
            Op::Wait(millis) => self.lab.wait(ms(millis)),
        }
        self.lab.pump();
        for worker in std::mem::take(&mut self.lab.moves) {
            self.move_queue(worker);
        }
        for process in std::mem::take(&mut self.lab.stops) {
            let of = self.process.iter().find(|(_, of)| **of == process).map(|(worker, _)| *worker);
            if let Some(worker) = of {
                self.lab.core.leave(self.lab.now, worker, Departure::Died);
                self.process.remove(&worker);
                self.real.remove(&worker);
            }
            self.lab.core.exited(self.lab.now, process);
            self.lab.pump();
        }
    }

    /// Another worker gets what waits.
    fn move_queue(&mut self, from: WorkerId) {
        let trusted = |worker: &WorkerId| self.lab.state(*worker) == State::Active;
        let others = self.real.keys().copied().filter(|worker| *worker != from);
        let Some(to) = others.filter(trusted).min_by_key(|worker| self.real[worker].live) else {
            return;
        };
        let Some(counts) = self.real.get_mut(&from) else { return };
        let moved = std::mem::take(&mut counts.queued);
        counts.live -= moved;
        counts.moved_out += moved;
        let counts = self.real(to);
        counts.live += moved;
        counts.queued += moved;
        counts.moved_in += moved;
    }

    fn syn(&mut self) {
        let load = |counts: &SteerCounts| counts.live + counts.pending;
        let sockets = &self.lab.sockets;
        let usable = self.real.iter().filter_map(|(worker, counts)| {
            let told = sockets[worker].told?;
            let has_room = !told.draining && load(counts) < u64::from(told.maximum);
            has_room.then_some((told.suspect, load(counts), *worker))
        });
        if let Some((.., worker)) = usable.min() {
            self.real(worker).pending += 1;
        }
    }

    fn check(&self) {
        let Lab { core, sockets, .. } = &self.lab;
        core.check();
        let totals = core.totals();
        assert_eq!((totals.accepted, totals.taken), (self.established, self.established));
        assert_eq!((totals.queued, totals.in_flight), (0, 0));
        let snapshot = core.snapshot();
        let pool = &snapshot.pools[0];
        assert_eq!(pool.taken, self.established);
        assert_eq!(pool.workers.len(), self.real.len());
        for worker in &pool.workers {
            let Socket { counts, told } = sockets[&worker.id];
            let live = counts.live.min(10_000_000);
            assert_eq!(worker.load, live + counts.pending.min(10_000_000 - live));
            let told = told.unwrap();
            assert_eq!(told.draining, worker.state == State::Draining);
            assert_eq!(told.suspect, worker.state == State::Suspect);
            assert_eq!((told.weight, told.maximum), (worker.weight, worker.max_connections));
            assert!((1..=1_000).contains(&told.slow_start));
            assert_eq!(told.slow_start / 10, worker.warm_percent);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_core_follows_the_kernel(ops in prop::collection::vec(op(), 1..250)) {
        let lab = lab_with(|pool| (pool.processes, pool.queues_move) = (2, true));
        let (real, process) = Default::default();
        let mut model = Model { lab, real, process, established: 0 };
        for op in &ops {
            model.apply(op);
            model.check();
        }
    }
}
