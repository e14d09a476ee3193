//! What a process gets besides its program: account, permissions, limits, and a reader of its
//! output.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The part of `[pool.NAME.spawn]` that the dispatcher applies between fork and exec.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSetup {
    /// The account, if not the dispatcher's.
    pub account: Option<Account>,
    /// Permission bits that new files do not get, if not the dispatcher's.
    pub umask: Option<u32>,
    /// Resource limits.
    pub limits: ProcessLimits,
    /// The destination of stdout and stderr.
    pub output: Output,
    /// Most lines of output per second that the log takes of one process.
    pub output_rate: u32,
}

impl Default for ProcessSetup {
    fn default() -> ProcessSetup {
        ProcessSetup {
            account: None,
            umask: None,
            limits: ProcessLimits::default(),
            output: Output::default(),
            output_rate: 1_000,
        }
    }
}

/// The user and the groups of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// All groups of the process, as `initgroups` sets them. `None` if the dispatcher may not
    /// change its own and the ids are its own.
    pub groups: Option<Vec<u32>>,
    /// The user for messages, such as `33 (www-data)`.
    pub user_text: String,
    /// The group for messages.
    pub group_text: String,
    /// `HOME`, `USER`, `LOGNAME` and `SHELL` of the user. `None` removes the dispatcher's value.
    pub variables: Vec<(String, Option<String>)>,
}

/// Resource limits of a process; `None` keeps the dispatcher's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLimits {
    /// RLIMIT_NOFILE.
    pub open_files: Option<Limit>,
    /// RLIMIT_CORE, bytes.
    pub core: Option<Limit>,
    /// RLIMIT_AS, bytes.
    pub memory: Option<Limit>,
}

/// A soft and a hard limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// The limit that applies; [`UNLIMITED`] for none.
    pub soft: u64,
    /// The most to which the process may raise it.
    pub hard: u64,
}

/// The value of a limit that does not limit.
pub const UNLIMITED: u64 = u64::MAX;

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one = |f: &mut fmt::Formatter<'_>, value| match value {
            UNLIMITED => f.write_str("unlimited"),
            value => write!(f, "{value}"),
        };
        one(f, self.soft)?;
        if self.soft != self.hard {
            f.write_str(":")?;
            one(f, self.hard)?;
        }
        Ok(())
    }
}

/// The destination of stdout and stderr of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// The same as the dispatcher's.
    #[default]
    Inherit,
    /// The log, as whole lines.
    Log,
}
