//! Random histories of processes: the limits hold at each step, and in the end every place has one
//! process that gets connections.

use std::collections::HashMap;

use super::*;

const POOL: PoolId = PoolId(0);

/// What a process does.
#[derive(Debug, Default)]
struct Life {
    worker: Option<WorkerId>,
    ending: bool,
    drained: bool,
}

struct World {
    driver: Driver,
    random: Random,
    lives: HashMap<ProcessId, Life>,
    surge: Surge,
    wanted: u32,
    most_beyond: u32,
    /// Whether an operator rolls the pool, and the processes whose ready check is under way.
    rolls: bool,
    checks: Vec<ProcessId>,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Random::new(seed);
        let wanted = 1 + random.below(6) as u32;
        let surge = match random.once_in(2) {
            true => Surge::Processes(1 + random.below(3) as u32),
            false => Surge::Percent(1 + random.below(100) as u32),
        };
        let mut some = |chance: u64, time: u64| random.once_in(chance).then(|| ms(time));
        let supervision = Supervision {
            kill_hung_after: some(2, 20_000),
            max_age: some(2, 60_000),
            drain_timeout: some(2, 30_000),
            max_surge: surge,
            max_connections_served: some(2, 30).map(|most| most.as_millis() as u64),
            ready_check: random.once_in(2),
            min_ready: ms(random.below(3) * 1_000),
            undo_on_failure: random.once_in(2),
            ..Supervision::default()
        };
        let mut driver = driver_with(|pool| {
            pool.processes = wanted;
            pool.supervision = supervision;
        });
        driver.logging = true;
        let rolls = random.once_in(2);
        World {
            driver,
            random,
            lives: HashMap::new(),
            surge,
            wanted,
            most_beyond: 0,
            rolls,
            checks: Vec::new(),
        }
    }

    /// Carries out what was asked for, and checks the limit of processes beyond one per place.
    fn obey(&mut self) {
        self.driver.pump();
        for life in self.lives.values_mut() {
            let drains = |worker| self.driver.state(worker) == State::Draining;
            life.drained |= life.worker.is_some_and(drains);
        }
        for effect in std::mem::take(&mut self.driver.log) {
            match effect {
                Effect::Spawn { process } => {
                    let beside = self.lives.keys().any(|other| other.place == process.place);
                    self.lives.insert(process, Life::default());
                    let beyond = self.beyond();
                    let most = self.surge.of(self.wanted);
                    assert!(!beside || beyond <= most, "{beyond} of {most}: {:?}", self.lives);
                    assert!(process.place < self.wanted);
                    self.most_beyond = self.most_beyond.max(beyond);
                }
                Effect::StopProcess { process, .. } => {
                    // It may end at the same moment.
                    if let Some(life) = self.lives.get_mut(&process) {
                        assert!(!std::mem::replace(&mut life.ending, true), "once");
                    }
                }
                Effect::CheckReady { process, .. } => self.checks.push(process),
                _ => {}
            }
        }
    }

    /// Processes that a roll replaced do not count while they leave.
    fn beyond(&self) -> u32 {
        let mut places = HashMap::new();
        let rolled = |life: &Life| self.rolls && !life.ending && life.drained;
        let counted = self.lives.iter().filter(|(_, life)| !rolled(life));
        for (process, _) in counted.filter(|(process, _)| process.place < self.wanted) {
            *places.entry(process.place).or_insert(0) += 1;
        }
        places.values().map(|count: &u32| count.saturating_sub(1)).sum()
    }

    fn die(&mut self, process: ProcessId) {
        let Some(life) = self.lives.remove(&process) else { return };
        self.driver.dies(process, life.worker);
    }

    fn join(&mut self, process: ProcessId) {
        if self.lives[&process].worker.is_none() {
            self.driver.core.spawned(self.driver.now, process, true);
            let worker = self.driver.join_as(hello(), Some(process)).expect("it may join");
            self.lives.get_mut(&process).expect("it runs").worker = Some(worker);
        }
    }

    /// A ready check is over.
    fn check_one(&mut self) {
        if !self.checks.is_empty() {
            let at = self.random.below(self.checks.len() as u64) as usize;
            let process = self.checks.swap_remove(at);
            let passed = !self.random.once_in(4);
            self.driver.core.checked(self.driver.now, process, passed);
        }
    }

    /// Something happens.
    fn step(&mut self) {
        let mut all: Vec<ProcessId> = self.lives.keys().copied().collect();
        all.sort_by_key(|process| process.start);
        let pick = self.random.below(all.len() as u64) as usize;
        let process = all.get(pick).copied();
        let now = self.driver.now;
        match (self.random.below(14), process) {
            (0 | 1, Some(process)) => self.join(process),
            (2, Some(process)) => self.die(process),
            (3, Some(process)) => self.driver.core.exceeds_memory(now, process),
            (4, Some(process)) => {
                if let Some(worker) = self.lives[&process].worker {
                    self.driver.goodbye(worker);
                }
            }
            (5, Some(process)) => {
                let worker = self.lives.get_mut(&process).and_then(|life| life.worker.take());
                if let Some(worker) = worker {
                    self.driver.leave(worker, Departure::Disconnected);
                }
            }
            (6, _) if self.random.once_in(8) => {
                self.wanted = 1 + self.random.below(8) as u32;
                self.driver.core.scale(now, POOL, self.wanted);
            }
            (7, _) if self.rolls && self.random.once_in(8) => {
                let end_oldest = self.random.once_in(2);
                let _ = self.driver.core.roll(now, POOL, end_oldest);
            }
            (8, Some(process)) => {
                if let Some(worker) = self.lives[&process].worker {
                    self.driver.take_all(worker);
                }
            }
            (9, Some(process)) if self.rolls => {
                let _ = self.driver.core.roll_one(now, process, None, false);
            }
            (10, _) => drop(self.driver.accept(WEB)),
            (11, _) if self.rolls => {
                let _ = self.driver.core.undo_roll(now, POOL);
            }
            (12, _) => self.check_one(),
            _ => self.driver.wait(ms(self.random.below(4_000))),
        }
        self.obey();
    }

    /// Everything goes well from now on.
    fn calm_down(&mut self) {
        for _ in 0..2_000 {
            self.driver.wait(ms(500));
            self.obey();
            for process in std::mem::take(&mut self.checks) {
                self.driver.core.checked(self.driver.now, process, true);
            }
            let all: Vec<ProcessId> = self.lives.keys().copied().collect();
            for process in all {
                let ending = self.lives[&process].ending;
                let drained = |worker| self.driver.state(worker) == State::Draining;
                let worker = self.lives[&process].worker;
                match worker {
                    None => match ending {
                        true => self.die(process),
                        false => self.join(process),
                    },
                    Some(worker) if ending || drained(worker) => self.die(process),
                    Some(worker) => drop(self.driver.take_all(worker)),
                }
                self.obey();
            }
        }
    }
}

#[test]
fn limits_hold_in_random_histories_and_every_place_is_filled() {
    let mut beyond = 0;
    for seed in 0..60 {
        let mut world = World::new(seed);
        world.obey();
        for _ in 0..400 {
            world.step();
        }
        world.calm_down();
        let counts = world.driver.core.processes(POOL);
        assert!(counts.starting <= 1, "seed {seed}: {counts:?}");
        assert!(counts.active >= world.wanted - 1, "seed {seed}: {counts:?}");
        let mut places: Vec<u32> = world.lives.keys().map(|process| process.place).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places, (0..world.wanted).collect::<Vec<_>>(), "seed {seed}");
        world.driver.core.check();
        beyond = beyond.max(world.most_beyond);
    }
    assert!(beyond >= 3, "the histories use max_surge: {beyond}");
}
