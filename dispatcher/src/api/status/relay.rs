//! The part of the status about the directory of the relay.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The directory of the relay, through which workers find each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayStatus {
    /// Its socket.
    pub socket: String,
    /// `up`: it answers; `down`: it does not; `starting`: this dispatcher starts it.
    pub state: String,
    /// Why it does not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Its process, if this dispatcher has started it; absent otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<RelayProcess>,
    /// Its numbers by name, as in `dispatcher relay stats`; the last ones that it told.
    #[serde(default)]
    pub numbers: BTreeMap<String, u64>,
}

/// The process of a directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayProcess {
    /// Its process id; absent while it does not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// How often it was started.
    pub starts: u64,
}
