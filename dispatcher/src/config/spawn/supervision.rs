//! The keys of `[pool.NAME.spawn]` about supervision: timeouts, replacement, and restarts.

use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};

use super::super::file::{OnFailure, SpawnKeys};
use super::super::validate::Check;
use super::limits;
use crate::config::ReadyCheck;
use dispatcher_core::{Supervision, Surge};

/// `max_surge`: a number of processes, or a percentage of `processes`.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct ASurge(pub(super) Surge);

impl<'de> Deserialize<'de> for ASurge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;

        impl Visitor<'_> for V {
            type Value = ASurge;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number of processes such as 1, or a percentage such as \"25%\"")
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<ASurge, E> {
                match u32::try_from(number) {
                    Ok(processes @ 1..=1024) => Ok(ASurge(Surge::Processes(processes))),
                    _ => Err(E::custom(format!("must be from 1 to 1024, not {number}"))),
                }
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<ASurge, E> {
                match percent(text) {
                    Some(percent @ 1..) => Ok(ASurge(Surge::Percent(percent))),
                    _ => Err(E::custom(format!(
                        "`{text}` is no percentage from \"1%\" to \"100%\"\n\
                         a number of processes has no quotes: max_surge = 1"
                    ))),
                }
            }
        }

        deserializer.deserialize_any(V)
    }
}

/// `jitter`: a percentage.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct AJitter(pub(super) u32);

impl<'de> Deserialize<'de> for AJitter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;

        impl Visitor<'_> for V {
            type Value = AJitter;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a percentage such as \"10%\"")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<AJitter, E> {
                percent(text).map(AJitter).ok_or_else(|| {
                    E::custom(format!("`{text}` is no percentage from \"0%\" to \"100%\""))
                })
            }
        }

        deserializer.deserialize_any(V)
    }
}

/// From 0 to 100.
fn percent(text: &str) -> Option<u32> {
    let digits = text.strip_suffix('%')?;
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|&percent| percent <= 100)
}

/// The settings of the core, and `max_memory` in bytes. `stop_timeout`: the key at the top.
pub(super) fn supervision(
    check: &mut Check<'_>,
    own: &SpawnKeys,
    defaults: Option<&SpawnKeys>,
    stop_timeout: Duration,
    ready_check: &ReadyCheck,
) -> (Supervision, Option<u64>) {
    // The core owns the defaults.
    let core = Supervision::default();
    macro_rules! key {
        ($name:ident) => {
            own.$name.or(defaults.and_then(|defaults| defaults.$name))
        };
    }
    let memory = own.max_memory.as_ref().or(defaults.and_then(|d| d.max_memory.as_ref()));
    let memory = memory.and_then(|size| check.keep(limits::bytes(size)));
    let supervision = Supervision {
        start_timeout: key!(start_timeout).map_or(core.start_timeout, |wait| wait.0),
        stop_timeout: key!(stop_timeout).map_or(stop_timeout, |wait| wait.0),
        drain_timeout: key!(drain_timeout).map(|wait| wait.0),
        kill_hung_after: key!(kill_hung_after).map(|wait| wait.0),
        max_age: key!(max_age).map(|wait| wait.0),
        max_connections_served: key!(max_connections_served).map(|count| count.0.into()),
        jitter: key!(jitter).map_or(core.jitter, |jitter| jitter.0),
        max_surge: key!(max_surge).map_or(core.max_surge, |surge| surge.0),
        crash_loop_after: key!(crash_loop_after).map_or(core.crash_loop_after, |count| count.0),
        max_restart_delay: key!(max_restart_delay).map_or(core.max_restart_delay, |wait| wait.0),
        ready_check: *ready_check != ReadyCheck::None,
        ready_timeout: key!(ready_timeout).map_or(core.ready_timeout, |wait| wait.0),
        min_ready: key!(min_ready).map_or(core.min_ready, |wait| wait.0),
        max_leaving_generations: key!(max_leaving_generations)
            .map_or(core.max_leaving_generations, |count| count.0),
        undo_on_failure: key!(on_failure) == Some(OnFailure::Undo),
        prefer_new: core.prefer_new,
    };
    (supervision, memory)
}
