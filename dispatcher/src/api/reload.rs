//! The JSON of `/v1/reload`.

use serde::{Deserialize, Serialize};

/// The result of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reloaded {
    /// The configuration file.
    pub file: String,
    /// Names of new parts.
    pub added: Vec<String>,
    /// Names of removed parts.
    pub removed: Vec<String>,
    /// Names of changed parts.
    pub changed: Vec<String>,
    /// Changes in the file that need a restart and are not in force.
    pub needs_restart: Vec<String>,
    /// Pools whose processes were started with other settings: a restart of the pool replaces them.
    pub outdated_pools: Vec<String>,
    /// Values in the file that are valid but probably wrong.
    pub warnings: Vec<String>,
}

/// The body of a request to reload: an empty object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadRequest {}
