//! Single decisions, step by step, with the simulator's workers.

mod access_rules;
mod admission;
mod advice;
mod affinity;
mod balance;
mod change;
mod draining;
mod failures;
mod handoff;
mod history;
mod hosts;
mod lifecycle;
mod model;
mod naive;
mod policies;
mod proxy;
mod scores;
mod steered;
mod supervision;
mod waiting;
mod weights;

use std::time::Duration;

use dispatch_protocol::wire::{EntryFlags, Hello};

use ::simulator::Driver;
use dispatcher_core::*;

use self::affinity::AffinitySteps;
use self::draining::DrainSteps;
use self::policies::PolicySteps;

const WEB: ListenerId = ListenerId(0);

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn settings() -> PoolSettings {
    PoolSettings {
        name: "web".to_owned(),
        policy: Policy::LeastConnections,
        max_connections_per_worker: 1_000_000,
        max_untaken: 256,
        max_workers: 1_000,
        handoff_timeout: ms(1_000),
        max_handoff_timeout: ms(30_000),
        wait_for_worker: ms(5_000),
        access: AllowedAccounts { users: vec![0], groups: vec![] },
        supervision: Supervision { ready_check: false, ..Supervision::default() },
        ..PoolSettings::default()
    }
}

fn listener() -> ListenerSettings {
    ListenerSettings { name: "http".to_owned(), address: "0.0.0.0:80".to_owned(), pool: PoolId(0) }
}

fn hello() -> Hello {
    Hello { pool: "web".to_owned(), max_connections: 1_000_000, ..Hello::default() }
}

fn driver_with(change: impl FnOnce(&mut PoolSettings)) -> Driver {
    let mut pool = settings();
    change(&mut pool);
    Driver::new(vec![pool], vec![listener()])
}

fn driver() -> Driver {
    driver_with(|_| {})
}

/// Short forms for most tests.
trait Steps {
    fn worker(&mut self) -> WorkerId;
    fn trusted(&mut self, hello: Hello) -> WorkerId;
    fn vouch(&mut self, worker: WorkerId);
    fn loads(&self, workers: &[WorkerId]) -> Vec<u64>;
    fn state(&self, worker: WorkerId) -> State;
    fn take_all(&mut self, worker: WorkerId) -> usize;
    fn finish(&mut self, worker: WorkerId, count: u64);
    fn leave(&mut self, worker: WorkerId, why: Departure);
    fn goodbye(&mut self, worker: WorkerId);
    fn events(&mut self) -> Vec<Event>;
    fn sends(&mut self) -> Vec<(WorkerId, bool)>;
}

impl Steps for Driver {
    /// A trusted worker joins.
    fn worker(&mut self) -> WorkerId {
        self.trusted(hello())
    }

    fn trusted(&mut self, hello: Hello) -> WorkerId {
        let worker = self.join(hello).unwrap();
        self.vouch(worker);
        worker
    }

    /// The worker answers its first probe, and gets full trust.
    fn vouch(&mut self, worker: WorkerId) {
        self.answer(worker);
        self.turn();
        self.core.vouch(self.now, worker);
        self.pump();
    }

    fn loads(&self, workers: &[WorkerId]) -> Vec<u64> {
        workers.iter().map(|&worker| self.core.load(worker).unwrap()).collect()
    }

    fn state(&self, worker: WorkerId) -> State {
        self.core.worker_state(worker).unwrap()
    }

    /// The worker takes everything in its channel, and a turn reports it to the core.
    fn take_all(&mut self, worker: WorkerId) -> usize {
        let taken = std::iter::from_fn(|| self.take(worker)).count();
        self.turn();
        taken
    }

    /// The worker closes `count` connections, and a turn reports it to the core.
    fn finish(&mut self, worker: WorkerId, count: u64) {
        self.link(worker).finished += count;
        self.turn();
    }

    fn leave(&mut self, worker: WorkerId, why: Departure) {
        self.core.leave(self.now, worker, why);
        self.pump();
    }

    fn goodbye(&mut self, worker: WorkerId) {
        self.core.goodbye(self.now, worker);
        self.pump();
    }

    /// The events since the last call.
    fn events(&mut self) -> Vec<Event> {
        self.log
            .drain(..)
            .filter_map(|effect| match effect {
                Effect::Event(event) => Some(event),
                _ => None,
            })
            .collect()
    }

    /// The workers that connections were sent to since the last call, and whether each was resent.
    fn sends(&mut self) -> Vec<(WorkerId, bool)> {
        self.log
            .drain(..)
            .filter_map(|effect| match effect {
                Effect::Send { worker, flags, .. } => {
                    Some((worker, flags.contains(EntryFlags::RESENT)))
                }
                _ => None,
            })
            .collect()
    }
}
