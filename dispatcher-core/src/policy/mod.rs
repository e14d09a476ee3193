//! Policies: the table of candidates from which a worker is chosen, and the state of each policy.
//!
//! Owns the compact table of candidates and the state of the pool's policy. A policy is a pure
//! function of these and does not know workers' states, tickets or time: ineligible workers get the
//! sentinel cost `UNAVAILABLE`.

mod failover;
mod hash;
mod least_connections;
mod least_score;
mod random;
mod round_robin;
mod tournament;
mod two_choices;
mod weighted_sampler;

use dispatch_protocol::scoreboard::gauge::Reading;

use self::failover::{Change, Failover};
use self::hash::Rendezvous;
use self::least_score::LeastScore;
use self::round_robin::RoundRobin;
use self::tournament::Tournament;
use self::weighted_sampler::WeightedSampler;
use super::random::Random;
use super::types::{AffinityKey, Policy, Scored, Scores, Time, Why};

/// The end of time: a timer that is not running.
pub(super) const NEVER: Time = Time(u64::MAX);

/// The cost of an ineligible worker: more than that of any eligible one (at most 2³⁴), and small
/// enough that its product with a weight (below 2²⁴) fits in 64 bits.
pub(super) const UNAVAILABLE: u64 = 1 << 40;

/// A configured weight of 1 in units of the table, so that a worker can have a fraction of it
/// during its slow start.
pub(super) const FULL_WEIGHT: u32 = 256;

/// The table's entry of one worker. 16 bytes, so that 1,000 stay in the first-level cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Twice its load after one more connection, plus 1 if it is a trial; or [`UNAVAILABLE`].
    pub(super) cost: u64,
    /// Its weight in parts of [`FULL_WEIGHT`], or 1 if unavailable.
    pub(super) weight: u32,
    /// Position in the core's workers.
    pub(super) worker: u32,
}

/// The properties of a worker that do not change while it is a candidate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    /// Position in the core's workers.
    pub(super) worker: u32,
    /// Seed of its numbers for `hash`: the same for a worker of the same name that replaces it.
    pub(super) node: u64,
    /// For `failover`.
    pub(super) priority: u16,
}

/// The changing properties of an eligible worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Available {
    /// Live connections, untaken ones included.
    pub(super) load: u64,
    /// In parts of [`FULL_WEIGHT`].
    pub(super) weight: u32,
    /// It is without trust: among equals it comes last.
    pub(super) trial: bool,
}

/// The current state of a worker for the policy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing {
    /// `Some` if it may be chosen.
    pub(super) available: Option<Available>,
    /// Whether it may get a connection if there is no better worker.
    pub(super) open: bool,
    /// Whether it counts as up for `failover`, even if it is full.
    pub(super) up: bool,
    /// Its next timer.
    pub(super) due: Time,
}

/// The state of a policy.
#[derive(Debug)]
enum Index {
    LeastConnections,
    RoundRobin(RoundRobin),
    Random(WeightedSampler),
    TwoChoices(WeightedSampler),
    Hash(Rendezvous),
    Failover(Failover),
    LeastScore(LeastScore),
}

/// The workers of a pool that have not left, each with its next timer.
#[derive(Debug)]
pub(super) struct Candidates {
    list: Vec<Candidate>,
    /// The minimum over `list`: for least connections, and for policies that fall back to it.
    tournament: Tournament,
    index: Index,
    /// Runs parallel to `list`, apart from it because ticks scan only this.
    due: Vec<Time>,
    /// Which workers may get a connection if there is no better one. Runs parallel to `list`.
    open: Vec<bool>,
    opens: usize,
    /// Where the next decision starts, so that ties rotate.
    start: usize,
    eligible: usize,
    random: Random,
}

/// A decision that has not been committed.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    /// Position of the worker among the candidates.
    pub(super) at: usize,
    /// With `two-choices`, the other drawn worker.
    pub(super) other: Option<usize>,
    now: Time,
    pub(super) by: By,
    random: Random,
}

/// The basis of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// The policy.
    Policy,
    /// The client's key is bound to the worker, or its session id names it.
    Memory,
    /// The connection was at another worker, or no worker is likely to take it soon.
    Handoff,
    /// During a roll: the worker is of the new generation, and that of the policy is not.
    Generation,
}

/// The result for one worker in a decision: the number that was compared, and why the worker was
/// chosen or not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Verdict {
    pub(super) score: Option<f64>,
    pub(super) why: Why,
    /// With `least-score`: the gauge that made it ineligible.
    pub(super) out: Option<Scored>,
}

impl Verdict {
    fn new(score: Option<f64>, why: Why) -> Verdict {
        Verdict { score, why, out: None }
    }
}

/// See [`Candidate::cost`].
pub(super) fn cost(load: u64, trial: bool) -> u64 {
    2 * (load + 1) + u64::from(trial)
}

impl Candidates {
    /// An empty list; `seed` starts the random source.
    pub(super) fn new(policy: Policy, scores: &Scores, seed: u64) -> Candidates {
        let mut random = Random::new(seed);
        let index = match policy {
            Policy::LeastConnections => Index::LeastConnections,
            Policy::RoundRobin => Index::RoundRobin(RoundRobin::new(random.number())),
            Policy::Random => Index::Random(WeightedSampler::default()),
            Policy::TwoChoices => Index::TwoChoices(WeightedSampler::default()),
            Policy::Hash => Index::Hash(Rendezvous::default()),
            Policy::Failover => Index::Failover(Failover::default()),
            Policy::LeastScore => Index::LeastScore(LeastScore::new(scores.clone())),
        };
        Candidates {
            list: Vec::new(),
            tournament: Tournament::default(),
            index,
            due: Vec::new(),
            open: Vec::new(),
            opens: 0,
            start: 0,
            eligible: 0,
            random,
        }
    }

    /// Restarts the random source.
    pub(super) fn set_seed(&mut self, seed: u64) {
        self.random = Random::new(seed);
        if let Index::RoundRobin(turns) = &mut self.index {
            turns.set_first(self.random.number());
        }
    }

    /// Adds a worker as ineligible; returns its position.
    pub(super) fn add(&mut self, member: Member) -> usize {
        self.list.push(Candidate { cost: UNAVAILABLE, weight: 1, worker: member.worker });
        self.due.push(NEVER);
        self.open.push(false);
        self.tournament.rebuild(&self.list);
        match &mut self.index {
            Index::LeastConnections => {}
            Index::RoundRobin(turns) => turns.add(),
            Index::Random(sampler) | Index::TwoChoices(sampler) => sampler.rebuild(&self.list),
            Index::Hash(nodes) => nodes.add(member.node),
            Index::Failover(stands) => stands.add(member.priority),
            Index::LeastScore(scores) => scores.add(),
        }
        self.list.len() - 1
    }

    /// Removes the worker at `at`; returns the worker whose position becomes `at`, if any.
    pub(super) fn remove(&mut self, at: usize) -> Option<u32> {
        self.eligible -= usize::from(self.list[at].cost != UNAVAILABLE);
        self.list.swap_remove(at);
        self.due.swap_remove(at);
        self.opens -= usize::from(self.open.swap_remove(at));
        self.tournament.rebuild(&self.list);
        let mut change = Change::One;
        match &mut self.index {
            Index::LeastConnections => {}
            Index::RoundRobin(turns) => turns.remove(at),
            Index::Random(sampler) | Index::TwoChoices(sampler) => sampler.rebuild(&self.list),
            Index::Hash(nodes) => nodes.remove(at),
            Index::Failover(stands) => change = stands.remove(at),
            Index::LeastScore(scores) => scores.remove(at),
        }
        if change == Change::All {
            self.apply_all();
        }
        self.list.get(at).map(|moved| moved.worker)
    }

    /// Updates the worker at `at`.
    pub(super) fn set(&mut self, at: usize, standing: Standing) {
        self.due[at] = standing.due;
        let (mut available, mut open) = (standing.available, standing.open);
        if let Index::Failover(stands) = &mut self.index {
            if stands.set(at, standing.up, available, open) == Change::All {
                return self.apply_all();
            }
            (available, open) = stands.standing(at);
        }
        self.apply(at, available, open);
    }

    /// With `failover`: applies a change of the highest priority.
    fn apply_all(&mut self) {
        for at in 0..self.list.len() {
            if let Index::Failover(stands) = &self.index {
                let (available, open) = stands.standing(at);
                self.apply(at, available, open);
            }
        }
    }

    fn apply(&mut self, at: usize, available: Option<Available>, open: bool) {
        self.opens += usize::from(open);
        self.opens -= usize::from(std::mem::replace(&mut self.open[at], open));
        let candidate = &mut self.list[at];
        let (cost, weight) = match available {
            Some(Available { load, weight, trial }) => (cost(load, trial), weight),
            None => (UNAVAILABLE, 1),
        };
        if (cost, weight) == (candidate.cost, candidate.weight) {
            return;
        }
        self.eligible -= usize::from(candidate.cost != UNAVAILABLE);
        self.eligible += usize::from(available.is_some());
        (candidate.cost, candidate.weight) = (cost, weight);
        match &mut self.index {
            Index::LeastConnections | Index::Failover(_) | Index::LeastScore(_) => {}
            // These policies never need the least loaded worker, so they do not update the
            // tournament.
            Index::RoundRobin(turns) => return turns.update(&self.list, at),
            Index::Random(sampler) | Index::TwoChoices(sampler) => {
                return sampler.update(&self.list, at);
            }
            Index::Hash(nodes) => nodes.update(&self.list, at),
        }
        self.tournament.update(&self.list, at);
    }

    /// Chooses the worker for the next connection, of a client with this key. Nothing changes until
    /// [`Candidates::commit`].
    #[inline]
    pub(super) fn pick(&self, now: Time, key: Option<AffinityKey>) -> Option<Choice> {
        if self.eligible == 0 {
            return None;
        }
        let mut random = self.random.clone();
        let mut other = None;
        let at = match (&self.index, key) {
            (Index::RoundRobin(turns), _) => turns.pick()?,
            (Index::Random(sampler), _) => random::pick(sampler, &mut random)?,
            (Index::TwoChoices(sampler), _) => {
                let (chosen, passed) = two_choices::pick(sampler, &self.list, &mut random)?;
                other = Some(passed);
                chosen
            }
            (Index::Hash(nodes), Some(key)) => nodes.pick(&self.list, key)?,
            (Index::LeastScore(scores), _) => match scores.pick(&self.list, self.start, now) {
                Some(at) => at,
                None => self.tournament.choose(&self.list, self.start)?,
            },
            // `hash` spreads clients without a key by load.
            (Index::LeastConnections | Index::Failover(_) | Index::Hash(_), _) => {
                self.tournament.choose(&self.list, self.start)?
            }
        };
        Some(Choice { at, other, now, by: By::Policy, random })
    }

    /// The choice of the worker at `at` for a reason outside the policy; its commit does not change
    /// the policy's state.
    pub(super) fn choice(&self, now: Time, at: usize, by: By) -> Choice {
        Choice { at, other: None, now, by, random: self.random.clone() }
    }

    /// With `hash`: the owner of this key among the workers at the given positions.
    pub(super) fn owner(
        &self,
        key: AffinityKey,
        among: impl Iterator<Item = (usize, u32)>,
    ) -> Option<usize> {
        match &self.index {
            Index::Hash(nodes) => nodes.owner(key, among),
            _ => None,
        }
    }

    /// Where the next decision starts, so that ties rotate.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    /// The worker at `at` was chosen for a reason outside the policy: the next decision starts
    /// after it.
    pub(super) fn advance(&mut self, at: usize) {
        self.start = at + 1;
    }

    /// Commits a decision; returns the worker.
    #[inline]
    pub(super) fn commit(&mut self, choice: Choice) -> u32 {
        let Choice { at, random, by, .. } = choice;
        match by {
            By::Policy => {}
            By::Generation => {
                self.start = at + 1;
                return self.list[at].worker;
            }
            By::Memory | By::Handoff => return self.list[at].worker,
        }
        self.random = random;
        self.start = at + 1;
        if let Index::RoundRobin(turns) = &mut self.index {
            turns.commit(at);
        }
        self.list[at].worker
    }

    /// Why the worker at `at`, which was eligible, was chosen or passed over in this decision.
    pub(super) fn verdict(&self, at: usize, choice: &Choice, key: Option<AffinityKey>) -> Verdict {
        let chosen = at == choice.at;
        let say = |why| if chosen { Why::Chosen } else { why };
        let (mine, theirs) = (self.cost(at), self.cost(choice.at));
        let by_load = || {
            let why = if mine > theirs { Why::MoreLoaded } else { Why::Tie };
            Verdict::new(Some(mine), say(why))
        };
        match choice.by {
            By::Policy => {}
            By::Memory => {
                let why = if chosen { Why::Remembered } else { Why::OtherKey };
                return Verdict::new(None, why);
            }
            By::Generation if chosen => return Verdict::new(None, Why::NewGeneration),
            By::Generation => return Verdict::new(None, Why::NotPreferred),
            By::Handoff if chosen => return Verdict::new(None, Why::TakenSooner),
            By::Handoff => return Verdict::new(None, Why::TakenLater),
        }
        match (&self.index, key) {
            (Index::RoundRobin(turns), _) => {
                let (mine, theirs) = (turns.distance(at), turns.distance(choice.at));
                let why = if mine > theirs { Why::LaterTurn } else { Why::Tie };
                Verdict::new(Some(mine), say(why))
            }
            (Index::Random(_), _) => Verdict::new(None, say(Why::NotDrawn)),
            (Index::TwoChoices(_), _) if chosen || choice.other == Some(at) => by_load(),
            (Index::TwoChoices(_), _) => Verdict::new(None, Why::NotDrawn),
            (Index::Hash(nodes), Some(key)) => {
                Verdict::new(Some(nodes.score(&self.list, at, key)), say(Why::OtherKey))
            }
            (Index::LeastScore(scores), _) => {
                let standing = |at| scores.standing(at, self.list[at], choice.now);
                match (standing(at), standing(choice.at)) {
                    (Scored::Score(mine), Scored::Score(theirs)) => {
                        let why = if mine > theirs { Why::HigherScore } else { Why::Tie };
                        Verdict::new(Some(mine), say(why))
                    }
                    // The chosen worker itself has an expired gauge: then all had, and the load
                    // decided.
                    (out, Scored::NeverSet(_) | Scored::Stale(..)) => {
                        Verdict { out: Some(out), ..by_load() }
                    }
                    (out, Scored::Score(_)) => {
                        Verdict { score: None, why: Why::StaleGauge, out: Some(out) }
                    }
                }
            }
            (Index::LeastConnections | Index::Failover(_) | Index::Hash(_), _) => by_load(),
        }
    }

    /// The number that least connections compares.
    fn cost(&self, at: usize) -> f64 {
        let candidate = self.list[at];
        (candidate.cost / 2) as f64 * f64::from(FULL_WEIGHT) / f64::from(candidate.weight)
    }

    /// With `least-score`: sets the reading of a gauge of the worker at `at`.
    pub(super) fn set_gauge(&mut self, at: usize, gauge: usize, reading: Option<Reading>) {
        if let Index::LeastScore(scores) = &mut self.index {
            scores.set(at, gauge, reading);
        }
    }

    /// With `least-score`: whether the worker at `at` has a gauge that was never set.
    pub(super) fn lacks_gauges(&self, at: usize) -> bool {
        matches!(&self.index, Index::LeastScore(scores) if scores.lacks_some(at))
    }

    /// With `least-score`: the score of the worker at `at` with `load` connections before one more.
    pub(super) fn score(&self, at: usize, load: u64, weight: u32, now: Time) -> Option<Scored> {
        match &self.index {
            Index::LeastScore(scores) => {
                let candidate = Candidate { cost: cost(load, false), weight, ..self.list[at] };
                Some(scores.standing(at, candidate, now))
            }
            _ => None,
        }
    }

    /// Whether the worker at `at` stands by for workers of a higher priority.
    pub(super) fn stands_by(&self, at: usize) -> bool {
        match &self.index {
            Index::Failover(stands) => stands.stands_by(at),
            _ => false,
        }
    }

    /// Whether the worker at `at` is eligible.
    pub(super) fn is_available(&self, at: usize) -> bool {
        self.list[at].cost != UNAVAILABLE
    }

    pub(super) fn eligible(&self) -> usize {
        self.eligible
    }

    /// Whether the worker at `at` may get a connection if there is no better one.
    pub(super) fn is_open(&self, at: usize) -> bool {
        self.open[at]
    }

    /// How many workers may get a connection if there is no better one.
    pub(super) fn opens(&self) -> usize {
        self.opens
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn get(&self, at: usize) -> Candidate {
        self.list[at]
    }

    pub(super) fn due(&self, at: usize) -> Time {
        self.due[at]
    }

    /// The earliest timer of all.
    pub(super) fn earliest(&self) -> Time {
        self.due.iter().copied().min().unwrap_or(NEVER)
    }

    pub(super) fn workers(&self) -> impl Iterator<Item = u32> + '_ {
        self.list.iter().map(|candidate| candidate.worker)
    }
}
