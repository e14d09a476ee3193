//! How long clients wait until a worker takes them: compares the core with two references, in
//! virtual time.
//!
//! A [`Scenario`] defines the workers, the arrivals of clients and the events of workers. [`run`]
//! runs it with one [`Contender`]: the real core as the event loop drives it, one accept queue that
//! all workers share, or a dispatcher that never moves a connection. Service times belong to the
//! connection and round lengths to the worker, both drawn from the seed alone, so contenders meet
//! the same clients and the same workers. For tests only.

mod core;
mod outcome;
mod references;
mod workers;
mod world;

use std::time::Duration;

pub use outcome::{Client, Outcome, percentile};
pub use world::run;

use super::Random;

/// How a worker takes connections.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A busy event loop: takes the waiting connections at the end of each round, at most `most`.
    Loop {
        /// Mean length of a round.
        round: Duration,
        /// Most connections taken in one round.
        most: u32,
    },
    /// An event loop that is idle: takes everything as soon as it arrives.
    Fast,
    /// Blocking threads that each accept a connection and serve it to its end. Reports the number
    /// of threads that wait in accept.
    Serial {
        /// Threads.
        threads: u32,
    },
    /// Receives, answers probes, and never takes a connection.
    Stuck,
    /// Receives nothing and answers nothing.
    Dead,
    /// Hostile: alternately [`Kind::Fast`] and [`Kind::Stuck`].
    Flapping {
        /// How long it serves.
        serves: Duration,
        /// How long it does not serve.
        rests: Duration,
    },
}

impl Kind {
    /// An event loop without a bound on the connections of a round.
    pub fn event_loop(round: Duration) -> Kind {
        Kind::Loop { round, most: u32::MAX }
    }

    /// Whether the worker serves its connections.
    pub fn is_honest(self) -> bool {
        match self {
            Kind::Loop { .. } | Kind::Fast | Kind::Serial { .. } => true,
            Kind::Stuck | Kind::Dead | Kind::Flapping { .. } => false,
        }
    }
}

/// How the rounds of event loops are distributed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    /// Uniform, mean ± 30 %.
    Uniform,
    /// Exponential.
    Exponential,
    /// Uniform, mean ± 30 %, and 3 % of the rounds ten times as long.
    LongTail,
}

impl Rounds {
    /// One round.
    fn draw(self, random: &mut Random, mean: Duration) -> u64 {
        let mean = mean.as_nanos() as f64;
        let uniform = mean * (0.7 + 0.6 * unit(random));
        let nanos = match self {
            Rounds::Uniform => uniform,
            Rounds::Exponential => -mean * (1.0 - unit(random)).ln(),
            Rounds::LongTail if unit(random) < 0.03 => 10.0 * uniform,
            Rounds::LongTail => uniform,
        };
        nanos as u64
    }
}

/// How long a worker serves a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Service {
    /// Exponential with this mean.
    Exponential(Duration),
    /// Pareto with shape 1.5 and this mean.
    Pareto(Duration),
    /// Until the end of the run.
    Forever,
}

impl Service {
    /// The service time of one connection; `None` if it is unlimited.
    fn draw(self, random: &mut Random) -> Option<u64> {
        let u = 1.0 - unit(random);
        match self {
            Service::Exponential(mean) => Some((-u.ln() * mean.as_nanos() as f64) as u64),
            Service::Pareto(mean) => {
                Some((mean.as_nanos() as f64 / 3.0 * u.powf(-1.0 / 1.5)) as u64)
            }
            Service::Forever => None,
        }
    }
}

/// An event of a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// The worker takes and answers nothing from now on. Threads that serve one connection each
    /// stop too; event loops still end their connections, which makes them look idle to a balancer.
    Stop,
    /// It continues.
    Continue,
    /// It becomes a worker of another kind.
    Become(Kind),
}

/// A worker of a scenario.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WorkerPlan {
    /// How it takes connections.
    pub kind: Kind,
    /// When it joins.
    pub joins: Duration,
}

/// A scenario.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// The workers.
    pub workers: Vec<WorkerPlan>,
    /// How rounds of event loops are distributed.
    pub rounds: Rounds,
    /// Number of clients that arrive at once, just after the start.
    pub burst: u32,
    /// Clients per second after that, a Poisson process.
    pub rate: f64,
    /// Number of clients, including those of the burst.
    pub clients: u32,
    /// The service time of each client.
    pub service: Service,
    /// The events of workers: time, worker, event.
    pub changes: Vec<(Duration, usize, Change)>,
    /// Clients that arrive earlier are served but not counted.
    pub warm: Duration,
    /// `handoff_timeout` of the pool.
    pub handoff_timeout: Duration,
    /// `max_handoff_timeout` of the pool.
    pub max_handoff_timeout: Duration,
    /// `wait_for_worker` of the pool.
    pub wait_for_worker: Duration,
    /// `max_untaken` of the pool.
    pub max_untaken: u32,
    /// Whether to compare the loads of honest workers at every arrival.
    pub compare_loads: bool,
}

impl Scenario {
    /// These workers from the start on, clients at this rate, the usual values for everything else.
    pub fn new(kinds: impl IntoIterator<Item = Kind>, rate: f64) -> Scenario {
        let plan = |kind| WorkerPlan { kind, joins: Duration::ZERO };
        Scenario {
            workers: kinds.into_iter().map(plan).collect(),
            rounds: Rounds::Uniform,
            burst: 0,
            rate,
            clients: 30_000,
            service: Service::Exponential(Duration::from_secs(5)),
            changes: Vec::new(),
            warm: Duration::ZERO,
            handoff_timeout: Duration::from_millis(200),
            max_handoff_timeout: Duration::from_secs(30),
            wait_for_worker: Duration::from_secs(10),
            max_untaken: 256,
            compare_loads: false,
        }
    }

    /// The scenario without stops: the reference for the waits of the other clients.
    #[must_use]
    pub fn undisturbed(&self) -> Scenario {
        Scenario { changes: Vec::new(), ..self.clone() }
    }

    /// The arrival time of each client in nanoseconds, and its service time.
    fn arrivals(&self, seed: u64) -> Vec<(u64, Option<u64>)> {
        let mut random = Random::new(seed);
        let mut at = 1_000_000;
        (0..self.clients)
            .map(|number| {
                if number == self.burst {
                    at += 1_000_000;
                }
                if number >= self.burst {
                    at += (-(1.0 - unit(&mut random)).ln() / self.rate * 1e9) as u64;
                }
                (at, self.service.draw(&mut random))
            })
            .collect()
    }
}

/// The mechanism that places the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// One queue that every worker accepts from: a lower bound, approximately.
    Shared,
    /// Each connection goes to the least loaded worker and stays there.
    Never,
    /// The core.
    Core,
}

impl Contender {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Contender::Shared => "shared queue",
            Contender::Never => "never moving",
            Contender::Core => "core",
        }
    }
}

/// At least 0 and less than 1.
fn unit(random: &mut Random) -> f64 {
    (random.number() >> 11) as f64 / (1u64 << 53) as f64
}
