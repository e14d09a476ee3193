//! The settings of a connector.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt::Debug, io};

use super::error::ConnectionLost;
use super::event::{Attempt, Decision, OnAttempt, OnConnectionLost};
use super::plan::{BackOff, Persistence, Plan};
use super::resolve::{self, Resolver};
use super::selection::Selection;
use super::set_aside::Pauses;
use super::{Addresses, Error};

/// The most attempts of one kind in a round. Each leaves its outcome in the error.
const MAX_RETRIES: u32 = 1_000;

/// A dispatcher with `mode = "fresh"` waits for silent ones of other hosts before it answers: by
/// default 1 s.
const ADVICE_TIMEOUT: Duration = Duration::from_secs(3);

/// Longer than any process runs, and within the range of every clock.
const FAR: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

/// The settings of a connector, for the blocking one and the one for tokio.
///
/// Every setting has a default. Creating a connector checks the settings.
///
/// ```
/// # fn main() -> Result<(), worker_sdk::connector::Error> {
/// use std::time::Duration;
/// use worker_sdk::connector::{Addresses, Connector, ConnectorConfig, Decision, Selection};
///
/// let config = ConnectorConfig::new(Addresses::list(["10.0.0.1:8000", "10.0.0.2:8000"])?)
///     .selection(Selection::RoundRobin)
///     .max_retries(3)
///     .max_retries_alternative(2)
///     .attempt_timeout(Duration::from_secs(3))
///     .total_timeout(Duration::from_secs(30))
///     .back_off(Duration::from_millis(100), Duration::from_secs(5))
///     .set_aside(Duration::from_secs(1), Duration::from_secs(15))
///     .on_attempt(|attempt| eprintln!("connecting to {}", attempt.address))
///     .on_connection_lost(|lost| {
///         eprintln!("{lost}");
///         Decision::GiveUp
///     });
/// let connector = Connector::new(config)?;
/// # let _ = connector;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct ConnectorConfig {
    pub(super) addresses: Addresses,
    pub(super) selection: Selection,
    pub(super) sticky: bool,
    pub(super) plan: Plan,
    pub(super) pauses: Pauses,
    pub(super) advice_timeout: Duration,
    pub(super) resolver: Arc<Resolver>,
    pub(super) on_attempt: Option<Arc<OnAttempt>>,
    pub(super) on_connection_lost: Option<Arc<OnConnectionLost>>,
}

impl ConnectorConfig {
    /// The defaults for these addresses.
    pub fn new(addresses: Addresses) -> ConnectorConfig {
        ConnectorConfig {
            addresses,
            selection: Selection::default(),
            sticky: false,
            plan: Plan {
                max_retries: 3,
                max_retries_alternative: 2,
                attempt_timeout: Duration::from_secs(3),
                total_timeout: Duration::from_secs(30),
                back_off: BackOff {
                    first: Duration::from_millis(100),
                    most: Duration::from_secs(5),
                },
                persistence: Persistence::Ask,
            },
            pauses: Pauses { first: Duration::from_secs(1), most: Duration::from_secs(15) },
            advice_timeout: ADVICE_TIMEOUT,
            resolver: Arc::new(resolve::system),
            on_attempt: None,
            on_connection_lost: None,
        }
    }

    /// Which address a new connection gets. Default: [`Selection::RoundRobin`].
    pub fn selection(mut self, selection: Selection) -> Self {
        self.selection = selection;
        self
    }

    /// Whether later connections go to the server of the first one while that is up. When it fails,
    /// they stay at the server that replaces it. Default: no.
    pub fn sticky(mut self, sticky: bool) -> Self {
        self.sticky = sticky;
        self
    }

    /// Attempts on the current address, the first included: 1 to 1,000. Default: 3.
    pub fn max_retries(mut self, attempts: u32) -> Self {
        self.plan.max_retries = attempts;
        self
    }

    /// Attempts on other addresses after that, at most 1,000. Default: 2.
    pub fn max_retries_alternative(mut self, attempts: u32) -> Self {
        self.plan.max_retries_alternative = attempts;
        self
    }

    /// The time limit of an attempt: the look-up of a name, the connect, and the handlers of a new
    /// connection. Default: 3 s.
    pub fn attempt_timeout(mut self, limit: Duration) -> Self {
        self.plan.attempt_timeout = limit;
        self
    }

    /// The time limit of all attempts together, with the pauses between them. Default: 30 s.
    pub fn total_timeout(mut self, limit: Duration) -> Self {
        self.plan.total_timeout = limit;
        self
    }

    /// The longest wait before the second attempt, and before any: the wait grows exponentially and
    /// is a random part of that (full jitter). More than 0. Default: 100 ms and 5 s.
    pub fn back_off(mut self, first: Duration, most: Duration) -> Self {
        self.plan.back_off = BackOff { first, most };
        self
    }

    /// How long an address is set aside after its first failure, and at most. The pause doubles
    /// with each failed probe, and is shortened by up to half at random. More than 0. Default: 1 s
    /// and 15 s.
    pub fn set_aside(mut self, first: Duration, most: Duration) -> Self {
        self.pauses = Pauses { first, most };
        self
    }

    /// The time limit of a question to an advice host. Default: 3 s. It must be longer than the
    /// `request_timeout` of the dispatchers (1 s), which each answer can take with `mode =
    /// "fresh"`. The questions before an attempt take at most half of what is left of
    /// [`total_timeout`](ConnectorConfig::total_timeout); then the last list is used.
    pub fn advice_timeout(mut self, limit: Duration) -> Self {
        self.advice_timeout = limit;
        self
    }

    /// Tries for ever: when all attempts have failed, they begin again after a back-off, and the
    /// handler of [`on_connection_lost`](ConnectorConfig::on_connection_lost) is not called.
    /// Default: no.
    pub fn retry_forever(mut self, forever: bool) -> Self {
        self.plan.persistence = if forever { Persistence::Rounds } else { Persistence::Ask };
        self
    }

    /// Resolves host names instead of the system's resolver. It runs on a thread of its own, and
    /// may block.
    pub fn resolver(
        mut self,
        resolver: impl Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> Self {
        self.resolver = Arc::new(resolver);
        self
    }

    /// Called before each attempt. It may replace [`Attempt::address`]. Its time counts towards the
    /// limit of all attempts; if nothing is left, the attempt is not made. With tokio it runs on a
    /// thread of the runtime, so it must not block.
    pub fn on_attempt(mut self, handler: impl Fn(&mut Attempt) + Send + Sync + 'static) -> Self {
        self.on_attempt = Some(Arc::new(handler));
        self
    }

    /// Called when all attempts have failed: it decides whether they begin again. Without it the
    /// result is the error. It is outside all limits, so it may wait; with tokio it must not block.
    pub fn on_connection_lost(
        mut self,
        handler: impl Fn(&ConnectionLost) -> Decision + Send + Sync + 'static,
    ) -> Self {
        self.on_connection_lost = Some(Arc::new(handler));
        self
    }

    /// Checks every setting, and brings times into the range of every clock.
    pub(super) fn checked(mut self) -> Result<ConnectorConfig, Error> {
        if !(1..=MAX_RETRIES).contains(&self.plan.max_retries) {
            let problem = format!("must be from 1 to {MAX_RETRIES}");
            return Err(Error::config("max_retries", problem));
        }
        if self.plan.max_retries_alternative > MAX_RETRIES {
            let problem = format!("must be at most {MAX_RETRIES}");
            return Err(Error::config("max_retries_alternative", problem));
        }
        for (setting, time) in [
            ("attempt_timeout", &mut self.plan.attempt_timeout),
            ("total_timeout", &mut self.plan.total_timeout),
            ("advice_timeout", &mut self.advice_timeout),
        ] {
            if time.is_zero() {
                return Err(Error::config(setting, "is 0; no attempt could be made"));
            }
            *time = (*time).min(FAR);
        }
        let Plan { back_off, .. } = &mut self.plan;
        for (setting, first, most, zero) in [
            (
                "back_off",
                &mut back_off.first,
                &mut back_off.most,
                "attempts would keep a processor busy; write at least a millisecond",
            ),
            (
                "set_aside",
                &mut self.pauses.first,
                &mut self.pauses.most,
                "a failed address would be tried again at once; write at least a millisecond",
            ),
        ] {
            if first > most {
                let problem = "the first pause is longer than the longest; exchange them";
                return Err(Error::config(setting, problem));
            }
            // It is doubled with each failure.
            if first.is_zero() {
                return Err(Error::config(setting, format!("the first pause is 0; {zero}")));
            }
            (*first, *most) = ((*first).min(FAR), (*most).min(FAR));
        }
        if self.selection == Selection::Best && self.addresses.advice.is_none() {
            let problem = "best is known by advice only; use Addresses::advice";
            return Err(Error::config("selection", problem));
        }
        Ok(self)
    }
}

impl Debug for ConnectorConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectorConfig")
            .field("addresses", &self.addresses)
            .field("selection", &self.selection)
            .field("sticky", &self.sticky)
            .field("plan", &self.plan)
            .field("pauses", &self.pauses)
            .field("advice_timeout", &self.advice_timeout)
            .finish_non_exhaustive()
    }
}

#[test]
fn a_bad_setting_is_named() {
    let config = || ConnectorConfig::new(Addresses::list(["a:1"]).unwrap());
    let (long, short) = (Duration::from_secs(2), Duration::from_secs(1));
    for (config, expected) in [
        (config().max_retries(0), "max_retries: "),
        (config().max_retries(1_001), "max_retries: "),
        (config().max_retries_alternative(1_001), "max_retries_alternative: "),
        (config().attempt_timeout(Duration::ZERO), "attempt_timeout: "),
        (config().total_timeout(Duration::ZERO), "total_timeout: "),
        (config().advice_timeout(Duration::ZERO), "advice_timeout: "),
        (config().back_off(long, short), "back_off: "),
        (config().back_off(Duration::ZERO, Duration::ZERO), "back_off: "),
        (config().back_off(Duration::ZERO, long), "back_off: the first pause is 0"),
        (config().set_aside(long, short), "set_aside: "),
        (config().set_aside(Duration::ZERO, long), "set_aside: the first pause is 0"),
        (config().selection(Selection::Best), "selection: "),
    ] {
        let problem = config.checked().unwrap_err().to_string();
        assert!(problem.starts_with(expected), "{problem}");
    }
    let longest = config()
        .total_timeout(Duration::MAX)
        .attempt_timeout(Duration::MAX)
        .back_off(Duration::MAX, Duration::MAX)
        .set_aside(Duration::MAX, Duration::MAX);
    assert!(longest.checked().is_ok());
}
