//! `[pool.NAME.scores]`: the gauges and weights of the policy `least-score`.

use std::collections::BTreeMap;
use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::{GAUGES, GaugeName, names};
use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};
use toml::Spanned;

use super::error::{Mistake, nearest};
use super::validate::{Check, Checked};
use super::value::{Wait, YEAR};
use dispatcher_core::{Policy, ScoredGauge, Scores};

/// Default of `interval`.
const INTERVAL: Duration = Duration::from_secs(1);

/// The name for the multiplier of the exact load.
pub(super) const CONNECTIONS: &str = "connections";

/// `[pool.NAME.scores]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScoreKeys {
    pub multipliers: Option<BTreeMap<Spanned<String>, Spanned<Multiplier>>>,
    pub valid_for: Option<Spanned<Wait<1, YEAR>>>,
    pub mode: Option<Spanned<Mode>>,
    pub interval: Option<Spanned<Wait<1, YEAR>>>,
}

/// The values of `mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    Fresh,
    Interval,
}

/// A finite number, small enough that sums stay finite.
#[derive(Clone, Copy, Debug)]
pub(super) struct Multiplier(pub f64);

/// Largest absolute value of a multiplier.
const MOST: f64 = 1e9;

impl<'de> Deserialize<'de> for Multiplier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;

        impl Visitor<'_> for V {
            type Value = Multiplier;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number")
            }

            fn visit_f64<E: Error>(self, number: f64) -> Result<Multiplier, E> {
                if number.abs() <= MOST {
                    return Ok(Multiplier(number));
                }
                Err(E::custom(format!("must be from -{MOST} to {MOST}, not {number}")))
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Multiplier, E> {
                self.visit_f64(number as f64)
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Multiplier, E> {
                self.visit_f64(number as f64)
            }
        }

        deserializer.deserialize_any(V)
    }
}

/// The scores of a pool, merged with `[defaults.scores]`.
pub(super) fn scores(
    check: &mut Check<'_>,
    keys: Option<&Spanned<ScoreKeys>>,
    defaults: Option<&Spanned<ScoreKeys>>,
    policy: Policy,
) -> Scores {
    if let Some(keys) = keys
        && policy != Policy::LeastScore
    {
        check.warn(
            Mistake::new(keys.span(), "`scores` has no effect with this policy")
                .help("set policy = \"least-score\""),
        );
    }
    let keys = keys.map(Spanned::get_ref);
    let tables: Vec<&ScoreKeys> = keys.into_iter().chain(defaults.map(Spanned::get_ref)).collect();
    let valid_for = tables.iter().find_map(|table| table.valid_for.as_ref());
    let interval = tables.iter().find_map(|table| table.interval.as_ref());
    let mode = tables.iter().find_map(|table| table.mode.as_ref());
    let multipliers = tables.iter().find_map(|table| table.multipliers.as_ref());

    let mut scores = Scores::default();
    if let Some(valid_for) = valid_for {
        scores.valid_for = valid_for.get_ref().0;
    }
    if mode.is_some_and(|mode| *mode.get_ref() == Mode::Interval) {
        let every = interval.map_or(INTERVAL, |interval| interval.get_ref().0);
        if every >= scores.valid_for {
            let spans = [valid_for.map(Spanned::span), interval.map(Spanned::span)];
            let span = spans.into_iter().flatten().next().unwrap_or(0..0);
            check.mistake(
                Mistake::new(span, "`valid_for` must be longer than `interval`")
                    .help("otherwise every gauge is stale before it is read again"),
            );
        }
        scores.interval = Some(every);
    } else if let Some(interval) = keys.and_then(|keys| keys.interval.as_ref()) {
        check.warn(
            Mistake::new(interval.span(), "`interval` has no effect in this mode")
                .help("set mode = \"interval\""),
        );
    }
    if let Some(multipliers) = multipliers {
        read(check, multipliers, &mut scores);
    }
    scores
}

fn read(
    check: &mut Check<'_>,
    multipliers: &BTreeMap<Spanned<String>, Spanned<Multiplier>>,
    scores: &mut Scores,
) {
    let mut multipliers: Vec<_> = multipliers.iter().collect();
    multipliers.sort_by_key(|(name, _)| name.span().start);
    let mut connections = 0..0;
    for (name, multiplier) in multipliers {
        let (text, multiplier) = (name.get_ref().as_str(), multiplier.get_ref().0);
        if text == CONNECTIONS {
            scores.connections = multiplier;
            connections = name.span();
            continue;
        }
        let Some(gauge) = gauge(check, name) else { continue };
        // With a multiplier of zero, the age of the gauge does not matter either.
        if multiplier == 0.0 {
            continue;
        }
        if scores.gauges.len() == GAUGES as usize {
            check.mistake(
                Mistake::new(name.span(), format!("more than {GAUGES} gauges"))
                    .help("a worker can have no more gauges"),
            );
            return;
        }
        scores.gauges.push(ScoredGauge { name: gauge, multiplier });
    }
    if scores.connections == 0.0 && scores.gauges.is_empty() {
        check.warn(Mistake::new(connections, "all multipliers are zero: workers take turns"));
    }
}

/// The gauge that a multiplier is for; a name that is nearly a predefined one gives a warning.
pub(super) fn gauge(check: &mut Check<'_>, name: &Spanned<String>) -> Option<GaugeName> {
    let text = name.get_ref().as_str();
    let gauge: Checked<GaugeName> = text.parse().map_err(|problem| {
        Mistake::new(name.span(), "not a name for a gauge").help(format!("{problem}"))
    });
    let gauge = check.keep(gauge)?;
    if !names::ALL.contains(&text)
        && let Some(meant) = nearest(text, names::ALL.into_iter().chain([CONNECTIONS]))
    {
        let help = format!(
            "did you mean `{meant}`? If workers set a gauge with this name, ignore this warning"
        );
        let message = format!("`{text}` is not a predefined gauge");
        check.warn(Mistake::new(name.span(), message).help(help));
    }
    Some(gauge)
}
