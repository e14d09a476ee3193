//! What a reload answers.

use serde::{Deserialize, Serialize};

/// What a reload did, for people and programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// The file that was read.
    pub file: String,
    /// What is new, by name.
    pub added: Vec<String>,
    /// What is no more.
    pub removed: Vec<String>,
    /// What has changed.
    pub changed: Vec<String>,
    /// What is different in the file and stays as it was until a restart.
    pub needs_restart: Vec<String>,
    /// What the file has that is probably not meant.
    pub warnings: Vec<String>,
}

/// The body of a request to reload: an empty object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadRequest {}
