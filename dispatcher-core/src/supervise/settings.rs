//! How the processes of a pool are supervised. `config` makes these settings.

use std::time::Duration;

/// The settings of supervision. They apply to every process of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Supervision {
    /// How long a process may take from its start until its worker has joined.
    pub start_timeout: Duration,
    /// How long a process may take to end: first by itself, once it has no connections, and then
    /// again between SIGTERM and SIGKILL.
    pub stop_timeout: Duration,
    /// How long a process that is replaced may keep its connections; `None` for any time.
    pub drain_timeout: Option<Duration>,
    /// How long a worker may be suspect before its process is replaced.
    pub kill_hung_after: Option<Duration>,
    /// The age at which a process is replaced, counted from its join.
    pub max_age: Option<Duration>,
    /// The number of taken connections at which a process is replaced.
    pub max_connections_served: Option<u64>,
    /// How much earlier than `max_age` and `max_connections_served` a process may be replaced, in
    /// percent; each process gets a random part of it.
    pub jitter: u32,
    /// Most processes beyond the wanted ones while processes are replaced.
    pub max_surge: Surge,
    /// The number of failed starts in succession at which a place is in a crash loop.
    pub crash_loop_after: u32,
    /// The longest delay before a process is started again.
    pub max_restart_delay: Duration,
    /// Whether the worker of a process that replaces another one is checked before it does.
    pub ready_check: bool,
    /// How long a process may take to become ready, from its join.
    pub ready_timeout: Duration,
    /// How long it has to stay ready before it replaces the other process.
    pub min_ready: Duration,
    /// Most generations that leave and have connections when the next roll begins; 0 for any
    /// number.
    pub max_leaving_generations: u32,
    /// Whether a roll that stops is undone.
    pub undo_on_failure: bool,
    /// Whether new connections go to the new generation during a roll. Always, but in comparisons.
    pub prefer_new: bool,
}

impl Supervision {
    /// The longest delay before a process is started again, by default.
    pub const MAX_RESTART_DELAY: Duration = Duration::from_secs(30);
}

impl Default for Supervision {
    /// The defaults of the configuration.
    fn default() -> Supervision {
        Supervision {
            start_timeout: Duration::from_secs(60),
            stop_timeout: Duration::from_secs(10),
            drain_timeout: None,
            kill_hung_after: None,
            max_age: None,
            max_connections_served: None,
            jitter: 10,
            max_surge: Surge::Processes(1),
            crash_loop_after: 8,
            max_restart_delay: Supervision::MAX_RESTART_DELAY,
            ready_check: true,
            ready_timeout: Duration::from_secs(30),
            min_ready: Duration::ZERO,
            max_leaving_generations: 2,
            undo_on_failure: false,
            prefer_new: true,
        }
    }
}

/// A limit of the processes beyond the wanted ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surge {
    /// At least 1.
    Processes(u32),
    /// Percent of the wanted processes, rounded up; at least one process.
    Percent(u32),
}

impl Surge {
    /// The limit for so many wanted processes.
    pub fn of(self, wanted: u32) -> u32 {
        match self {
            Surge::Processes(processes) => processes.max(1),
            Surge::Percent(percent) => {
                let share = (u64::from(wanted) * u64::from(percent)).div_ceil(100);
                u32::try_from(share).unwrap_or(u32::MAX).max(1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentage_is_rounded_up_and_never_nothing() {
        assert_eq!(Surge::Percent(25).of(8), 2);
        assert_eq!(Surge::Percent(25).of(9), 3);
        assert_eq!(Surge::Percent(1).of(1), 1);
        assert_eq!(Surge::Percent(0).of(100), 1);
        assert_eq!(Surge::Percent(100).of(u32::MAX), u32::MAX);
        assert_eq!(Surge::Processes(0).of(8), 1);
        assert_eq!(Surge::Processes(3).of(1), 3);
    }
}
