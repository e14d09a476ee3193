//! What the journal has of the deploys of a pool: its generations, and its last roll.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::Spawn;

/// What a later dispatcher needs to know of the deploys of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deploys {
    /// The name of the pool.
    pub pool: String,
    /// The generation of new places.
    pub current: u32,
    /// The last roll.
    pub roll: Option<RollRecord>,
    /// What the processes of each generation are started from.
    pub versions: BTreeMap<u32, Spawn>,
}

/// A roll in the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollRecord {
    /// The generation of the new processes.
    pub generation: u32,
    /// The generation to return to.
    pub former: u32,
    /// The only place whose process is replaced.
    pub place: Option<u32>,
    /// `progressing`, `stopped` or `done`.
    pub state: String,
    /// It returns to an earlier generation.
    pub undo: bool,
    /// Steps that became ready.
    pub replaced: u32,
    /// When it began: seconds since 1970.
    pub began: u64,
    /// Why it stopped, and the last lines of the process's output.
    pub reason: Option<String>,
    /// See `reason`.
    pub output: Vec<String>,
}

impl Deploys {
    /// The line in the journal.
    pub(super) fn line(&self) -> String {
        // A map with numbers as keys and plain values always has a JSON form.
        let json = serde_json::to_string(self).unwrap_or_default();
        format!("deploys {json}\n")
    }

    /// Reads the JSON of a line.
    pub(super) fn parse(json: &str) -> Option<Deploys> {
        serde_json::from_str(json).ok()
    }
}
