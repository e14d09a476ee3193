//! What `least-score` goes by, how a worker stands, and what can be wrong with a gauge.

use std::fmt;
use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::GaugeName;

/// What the policy `least-score` goes by.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// What a live connection costs, for a worker of weight 1.
    pub connections: f64,
    /// What else counts; none twice.
    pub gauges: Vec<ScoredGauge>,
    /// How old a gauge may be.
    pub valid_for: Duration,
    /// How often gauges are read; `None` for before every decision.
    pub interval: Option<Duration>,
}

impl Default for Scores {
    fn default() -> Scores {
        let valid_for = Duration::from_secs(5);
        Scores { connections: 1.0, gauges: Vec::new(), valid_for, interval: None }
    }
}

/// A gauge that counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredGauge {
    /// What workers call it.
    pub name: GaugeName,
    /// What one unit of it costs; less than nothing where more is better.
    pub multiplier: f64,
}

/// How a worker stands in a pool that scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scored {
    /// The lowest one wins.
    Score(f64),
    /// It is passed over: it has no such gauge, has never set it, or set it to something impossible.
    NeverSet(GaugeName),
    /// It is passed over: it set this gauge so long ago.
    Stale(GaugeName, Duration),
}

impl fmt::Display for Scored {
    /// `12.5`, or `gauge queue_wait stale: set 7s ago`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scored::Score(score) => write!(f, "{score}"),
            Scored::NeverSet(gauge) => write!(f, "gauge {gauge} never set"),
            Scored::Stale(gauge, age) => {
                // Whole milliseconds: readers need no more precision.
                let age = Duration::from_millis(u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
                write!(f, "gauge {gauge} stale: set {age:?} ago")
            }
        }
    }
}

/// What was wrong with a worker's gauge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GaugeProblem {
    /// Not a number, or an infinite one: as if never set.
    NoNumber,
    /// A time that is yet to come: as if never set.
    Future,
    /// Too large, or too small, a number: clamped.
    TooLarge,
    /// A name that is none: ignored.
    NoName,
    /// A name that another gauge of the worker has: ignored.
    NameTwice,
}

impl GaugeProblem {
    /// How many there are.
    pub const COUNT: usize = 5;

    /// What happened, for the log.
    pub fn text(self) -> &'static str {
        match self {
            GaugeProblem::NoNumber => "what is no number: as if never set",
            GaugeProblem::Future => "a time in the future: as if never set",
            GaugeProblem::TooLarge => "a number that is too large: clamped",
            GaugeProblem::NoName => "a name that is none: ignored",
            GaugeProblem::NameTwice => "a name it has given before: ignored",
        }
    }
}
