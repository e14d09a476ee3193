//! Settings and results of `least-score`, and the problems of gauges.

use std::fmt;
use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::GaugeName;

/// The terms of the score.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// Cost of a live connection for a worker of weight 1.
    pub connections: f64,
    /// The scored gauges; each name once.
    pub gauges: Vec<ScoredGauge>,
    /// Maximum age of a gauge.
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

/// A gauge that is part of the score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoredGauge {
    /// Its name at the workers.
    pub name: GaugeName,
    /// Cost of one unit; negative where more is better.
    pub multiplier: f64,
}

/// A worker's score, or the gauge that makes it ineligible.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scored {
    /// The lowest one wins.
    Score(f64),
    /// Ineligible: it has no such gauge, has never set it, or set it to an impossible value.
    NeverSet(GaugeName),
    /// Ineligible: this gauge was set too long ago.
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

/// A problem with a worker's gauge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GaugeProblem {
    /// Not a number, or infinite: as if never set.
    NoNumber,
    /// A time in the future: as if never set.
    Future,
    /// Too large or too small a number: clamped.
    TooLarge,
    /// An invalid name: ignored.
    NoName,
    /// The name of another gauge of the worker: ignored.
    NameTwice,
}

impl GaugeProblem {
    /// Number of problems.
    pub const COUNT: usize = 5;

    /// Description for the log.
    pub fn text(self) -> &'static str {
        match self {
            GaugeProblem::NoNumber => "a value that is not a number: as if never set",
            GaugeProblem::Future => "a time in the future: as if never set",
            GaugeProblem::TooLarge => "a number that is too large: clamped",
            GaugeProblem::NoName => "an invalid name: ignored",
            GaugeProblem::NameTwice => "the name of another gauge: ignored",
        }
    }
}
