//! The JSON of `/v1/log_level`.

use serde::{Deserialize, Serialize};

/// The body of a request that sets the level: `{"level": "debug"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetLogLevel {
    /// `off`, `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
}

/// The level in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLevel {
    /// One of the levels, or the filter that the variable `DISPATCHER_LOG` has set.
    pub level: String,
    /// The level before, in the answer to a change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<String>,
}
