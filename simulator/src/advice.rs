//! Clients that follow the advice of several dispatchers, in virtual time.
//!
//! Each host has one dispatcher, and each dispatcher an advisor that learns the loads of all hosts
//! once in an interval, as it does in `mode = "interval"`. Clients ask the dispatchers in turn,
//! connect a moment later, and stay for a while. Owns the hosts, the clients and the clock; decides
//! nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dispatcher_core::advice::{Advisor, Asked, Server, ServerState, Terms};

use crate::{Random, Time};

/// A world of equal hosts.
#[derive(Clone, Copy, Debug)]
pub struct AdvisedWorld {
    /// Number of hosts, each with a dispatcher.
    pub hosts: usize,
    /// How often each dispatcher asks all others for their loads.
    pub interval: Duration,
    /// The longest time from an answer to the connection of its client.
    pub connects_in: Duration,
    /// How long a connection lasts on average; each has a duration of its own.
    pub session: Duration,
}

/// What happened to the hosts' loads.
#[derive(Clone, Debug)]
pub struct AdvisedLoads {
    /// Connections that each host got, by its number.
    pub got: Vec<u64>,
    /// The load of each host: the mean over the measured time, or that at the end.
    pub mean: Vec<f64>,
}

#[derive(Debug)]
struct Run {
    world: AdvisedWorld,
    loads: Vec<u64>,
    got: Vec<u64>,
    /// Hosts that are down: no dispatcher there answers.
    down: Vec<bool>,
    /// How often each host has failed: an earlier connection of it ends without an effect.
    failures: Vec<u32>,
    /// What each dispatcher knows of each host.
    known: Vec<Vec<Option<Server>>>,
    advisors: Vec<Advisor>,
    random: Random,
    /// What comes, by time; the second part makes the keys distinct.
    coming: BTreeMap<(Time, u64), Coming>,
    count: u64,
}

#[derive(Clone, Copy, Debug)]
enum Coming {
    Connects(usize),
    Ends(usize, u32),
    Ask(usize),
    Collects(usize),
    Fails(usize),
    Returns(usize),
}

fn address(host: usize) -> Arc<str> {
    Arc::from(format!("10.0.0.{}:80", host + 1))
}

impl Run {
    fn new(world: AdvisedWorld, seed: u64) -> Run {
        let mut random = Random::new(seed);
        let advisors = (0..world.hosts).map(|_| Advisor::new(random.number())).collect();
        Run {
            world,
            loads: vec![0; world.hosts],
            got: vec![0; world.hosts],
            down: vec![false; world.hosts],
            failures: vec![0; world.hosts],
            known: vec![vec![None; world.hosts]; world.hosts],
            advisors,
            random,
            coming: BTreeMap::new(),
            count: 0,
        }
    }

    fn plan(&mut self, at: Time, what: Coming) {
        self.count += 1;
        self.coming.insert((at, self.count), what);
    }

    /// Dispatcher `host` learns the loads of all hosts that are up.
    fn collect(&mut self, now: Time, host: usize) {
        for other in 0..self.world.hosts {
            self.known[host][other] = (!self.down[other]).then(|| Server {
                addresses: vec![address(other)],
                state: ServerState::Ok,
                load: self.loads[other],
                capacity: Some(10_000),
                weight: 4.0,
                gauges: Vec::new(),
                at: now,
            });
        }
    }

    /// A client asks dispatcher `host`, or the next one that is up.
    fn ask(&mut self, now: Time, host: usize) {
        let hosts = self.world.hosts;
        let up = (0..hosts).map(|n| (host + n) % hosts).find(|&host| !self.down[host]);
        let Some(host) = up else { return };
        let servers: Vec<Server> = self.known[host].iter().flatten().cloned().collect();
        let counts_for = self.world.interval * 3;
        let asked = (Asked::Best, None);
        let advisor = &mut self.advisors[host];
        let answer = advisor.advise(now, &servers, &Terms::default(), counts_for, asked);
        let Some(best) = answer.usable.first() else { return };
        let chosen = (0..hosts).find(|&host| address(host) == best.address);
        let most = u64::try_from(self.world.connects_in.as_nanos()).unwrap_or(u64::MAX);
        let after = Duration::from_nanos(self.random.below(most));
        if let Some(chosen) = chosen {
            self.plan(now + after, Coming::Connects(chosen));
        }
    }

    fn step(&mut self, now: Time, what: Coming) {
        match what {
            Coming::Ask(host) => self.ask(now, host),
            Coming::Collects(host) => {
                self.collect(now, host);
                self.plan(now + self.world.interval, Coming::Collects(host));
            }
            // The client of a host that is down asks again at once.
            Coming::Connects(host) if self.down[host] => self.ask(now, host + 1),
            Coming::Connects(host) => {
                self.loads[host] += 1;
                self.got[host] += 1;
                let mean = u64::try_from(self.world.session.as_nanos()).unwrap_or(u64::MAX);
                let lasts = Duration::from_nanos(self.random.around(mean));
                self.plan(now + lasts, Coming::Ends(host, self.failures[host]));
            }
            Coming::Ends(host, failures) if failures != self.failures[host] => {}
            Coming::Ends(host, _) => self.loads[host] -= 1,
            Coming::Fails(host) => {
                self.down[host] = true;
                self.failures[host] += 1;
                // Its clients ask again at once.
                let lost = std::mem::take(&mut self.loads[host]);
                (0..lost).for_each(|n| self.ask(now, host + n as usize));
            }
            Coming::Returns(host) => self.down[host] = false,
        }
    }

    fn next(&mut self, until: Time) -> Option<(Time, Coming)> {
        let entry = self.coming.first_entry()?;
        let now = entry.key().0;
        (now <= until).then(|| (now, entry.remove()))
    }
}

impl AdvisedWorld {
    /// `requests` clients ask at random moments of one interval, in which no dispatcher learns a
    /// new load; `askable` of the dispatchers are asked.
    pub fn one_interval(self, seed: u64, requests: u64, askable: usize) -> AdvisedLoads {
        let mut run = Run::new(self, seed);
        let start = Time(1_000_000_000);
        (0..self.hosts).for_each(|host| run.collect(start, host));
        let interval = u64::try_from(self.interval.as_nanos()).unwrap_or(u64::MAX);
        for n in 0..requests {
            let at = start + Duration::from_nanos(run.random.below(interval));
            run.plan(at, Coming::Ask(n as usize % askable.max(1)));
        }
        let end = start + self.interval + self.connects_in;
        while let Some((now, what)) = run.next(end) {
            run.step(now, what);
        }
        AdvisedLoads { got: run.got.clone(), mean: run.loads.iter().map(|&l| l as f64).collect() }
    }

    /// `per_second` clients ask. Host 0 fails after a minute and returns after half a minute more;
    /// a minute after its return the loads are measured for a minute.
    pub fn after_a_failure(self, seed: u64, per_second: u64) -> AdvisedLoads {
        let mut run = Run::new(self, seed);
        let second = Duration::from_secs(1);
        let start = Time(1_000_000_000);
        for host in 0..self.hosts {
            let first = start + self.interval * host as u32 / self.hosts as u32;
            run.collect(start, host);
            run.plan(first, Coming::Collects(host));
        }
        let (fails, returns, measured) = (start + second * 60, start + second * 90, second * 150);
        run.plan(fails, Coming::Fails(0));
        run.plan(returns, Coming::Returns(0));
        let end = start + measured + second * 60;
        let between = second / u32::try_from(per_second.max(1)).unwrap_or(u32::MAX);
        let mut sums = vec![0.0; self.hosts];
        let (mut at, mut sample, mut samples) = (start, start + measured, 0.0);
        let mut turn = 0;
        while at < end {
            run.plan(at, Coming::Ask(turn % self.hosts));
            turn += 1;
            at = at + between;
            while let Some((now, what)) = run.next(at) {
                run.step(now, what);
            }
            if at >= sample {
                sample = sample + second / 4;
                samples += 1.0;
                for (sum, &load) in sums.iter_mut().zip(&run.loads) {
                    *sum += load as f64;
                }
            }
        }
        let mean = sums.iter().map(|sum| sum / samples).collect();
        AdvisedLoads { got: run.got.clone(), mean }
    }
}
