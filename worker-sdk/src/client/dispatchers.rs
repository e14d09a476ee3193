//! The dispatchers that a worker may join, and which of them it tries next.
//!
//! They are tried in order, without a limit, by the state machine of the connector. Each is set
//! aside after a failure: for a short time if it is away, for longer and longer if it refuses. The
//! next one is tried at once, and none a second time before the others had their turn. A worker
//! that has joined stays until it loses that dispatcher.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use super::clock::bounded;
use super::error::Error;
use super::worker_core::WELCOME_TIMEOUT;
use crate::connector::machine::{Machine, Step};
use crate::connector::plan::{BackOff, Persistence, Plan};
use crate::connector::selection::{Candidate, Selection};
use crate::connector::set_aside::Pauses;
use crate::connector::targets::Targets;

/// The most sockets of a worker.
const MOST: usize = 16;

/// The sockets of a setting, which separates them by `:` as the shell does in `PATH`. Empty parts
/// are left out.
pub(super) fn sockets(setting: &Path) -> Vec<PathBuf> {
    let parts = setting.as_os_str().as_bytes().split(|byte| *byte == b':');
    let mut sockets: Vec<PathBuf> = Vec::new();
    for part in parts.filter(|part| !part.is_empty()) {
        let path = PathBuf::from(OsStr::from_bytes(part));
        if !sockets.contains(&path) {
            sockets.push(path);
        }
    }
    sockets
}

/// Checks such a setting.
pub(super) fn check(setting: &Path) -> Result<(), Error> {
    let problem = match sockets(setting).len() {
        0 => "names no socket".to_owned(),
        1..=MOST => return Ok(()),
        count => format!("names {count} sockets; a worker tries at most {MOST}"),
    };
    Err(Error::config("dispatch_socket", problem))
}

/// What comes next.
pub(super) enum Next {
    /// Try this socket now, after a call of `begin`.
    Try(PathBuf),
    /// Ask again at this time.
    Wait(Instant),
}

/// How an attempt failed, for the wait before the next one on the same socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// No dispatcher dealt with it.
    Absent,
    /// A dispatcher refused it.
    Refused,
}

struct Dispatcher {
    path: PathBuf,
    backoff: Backoff,
    /// Whether its failure has been logged as a warning; further ones are for debugging only.
    warned: bool,
    /// Its last failure does not pass by itself.
    permanent: bool,
}

pub(super) struct Dispatchers {
    all: Vec<Dispatcher>,
    /// The one that is tried, or has been joined or tried last.
    current: usize,
    targets: Targets<PathBuf>,
    machine: Machine<PathBuf>,
}

impl Dispatchers {
    pub(super) fn new(sockets: Vec<PathBuf>, min: Duration, max: Duration) -> Dispatchers {
        // The waits come from the back-off of each dispatcher.
        let pauses = Pauses { first: min, most: max };
        let mut targets = Targets::new(Selection::InOrder, false, pauses);
        targets.replace(sockets.iter().cloned().map(Candidate::new).collect(), None);
        let dispatcher = |path| {
            let backoff = Backoff::new(min, max);
            Dispatcher { path, backoff, warned: false, permanent: false }
        };
        let all = sockets.into_iter().map(dispatcher).collect();
        Dispatchers { all, current: 0, targets, machine: machine() }
    }

    pub(super) fn are_several(&self) -> bool {
        self.all.len() > 1
    }

    /// The socket that is tried, or has been joined or tried last.
    pub(super) fn current(&self) -> &Path {
        self.all.get(self.current).map_or(Path::new(""), |dispatcher| &dispatcher.path)
    }

    pub(super) fn next(&mut self, now: Instant) -> Next {
        // In order, so nothing is random.
        match self.machine.next(&mut self.targets, now, &mut || 0) {
            Step::Attempt(attempt) => Next::Try(attempt.address),
            Step::Wait(until) => Next::Wait(until),
            // Endless attempts on a fixed list neither refresh it nor end.
            Step::Refresh { .. } | Step::Ask | Step::GiveUp => Next::Wait(now + WELCOME_TIMEOUT),
        }
    }

    /// When the next attempt is due.
    pub(super) fn due(&mut self, now: Instant) -> Instant {
        match self.next(now) {
            Next::Try(_) => now,
            Next::Wait(until) => until,
        }
    }

    pub(super) fn begin(&mut self, socket: &Path, now: Instant) {
        let place = self.all.iter().position(|dispatcher| dispatcher.path == socket);
        self.current = place.unwrap_or(0);
        // There is no limit of all attempts together.
        let _ = self.machine.begin(&mut self.targets, socket.to_owned(), now);
    }

    /// The attempt failed. Returns the wait before the next one on the same socket.
    pub(super) fn failed(&mut self, how: Failed, permanent: bool, now: Instant) -> Duration {
        let Some(dispatcher) = self.all.get_mut(self.current) else { return Duration::ZERO };
        dispatcher.permanent = permanent;
        let wait = bounded(match how {
            Failed::Absent => dispatcher.backoff.absent(),
            Failed::Refused => dispatcher.backoff.refused(),
        });
        self.machine.failed_for(&mut self.targets, now, wait);
        wait
    }

    /// Whether the last failure of each dispatcher is permanent.
    pub(super) fn all_permanent(&self) -> bool {
        self.all.iter().all(|dispatcher| dispatcher.permanent)
    }

    /// Whether a failure of the current one has been logged as a warning before, since the last
    /// join.
    pub(super) fn warn(&mut self) -> bool {
        let current = self.all.get_mut(self.current);
        current.is_some_and(|dispatcher| std::mem::replace(&mut dispatcher.warned, true))
    }

    pub(super) fn joined(&mut self) {
        self.machine.succeeded(&mut self.targets);
        if let Some(dispatcher) = self.all.get_mut(self.current) {
            dispatcher.backoff.joined();
        }
        for dispatcher in &mut self.all {
            (dispatcher.warned, dispatcher.permanent) = (false, false);
        }
    }

    /// The joined dispatcher is lost. Returns the wait before the first attempt.
    pub(super) fn lost(&mut self) -> Duration {
        self.machine = machine();
        let current = self.all.get_mut(self.current);
        current.map_or(Duration::ZERO, |dispatcher| dispatcher.backoff.lost())
    }
}

fn machine() -> Machine<PathBuf> {
    let plan = Plan {
        max_retries: 1,
        max_retries_alternative: 0,
        attempt_timeout: WELCOME_TIMEOUT,
        total_timeout: Duration::MAX,
        back_off: BackOff { first: Duration::ZERO, most: Duration::ZERO },
        persistence: Persistence::Endless,
    };
    Machine::new(plan, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_separated_as_in_path() {
        let split = |text: &str| -> Vec<String> {
            let paths = sockets(Path::new(text));
            paths.iter().map(|path| path.display().to_string()).collect()
        };
        assert_eq!(split("/run/d.sock"), ["/run/d.sock"]);
        assert_eq!(split(":/b::a:/b:"), ["/b", "a"]);
        assert_eq!(split("::"), [""; 0]);
        let many: Vec<String> = (0..MOST + 1).map(|n| format!("/{n}")).collect();
        for (setting, problem) in [("::", "names no socket"), (&many.join(":"), "17 sockets")] {
            let text = check(Path::new(setting)).unwrap_err().to_string();
            assert!(text.starts_with("dispatch_socket: ") && text.contains(problem), "{text}");
        }
    }

    fn try_next(dispatchers: &mut Dispatchers, now: &mut Instant) -> PathBuf {
        loop {
            match dispatchers.next(*now) {
                Next::Wait(until) => *now = until,
                Next::Try(path) => {
                    dispatchers.begin(&path, *now);
                    return path;
                }
            }
        }
    }

    #[test]
    fn those_that_refuse_are_tried_rarely_and_those_that_are_away_steadily() {
        let (min, max) = (Duration::from_millis(50), Duration::from_secs(5));
        let [refuses, away] = ["/refuses", "/away"].map(PathBuf::from);
        let mut dispatchers = Dispatchers::new(vec![refuses.clone(), away], min, max);
        let start = Instant::now();
        let mut now = start;
        let mut counts = [0, 0];
        while now - start < Duration::from_secs(60) {
            let tried = try_next(&mut dispatchers, &mut now);
            let refused = tried == refuses;
            counts[usize::from(!refused)] += 1;
            let how = if refused { Failed::Refused } else { Failed::Absent };
            dispatchers.failed(how, refused, now);
            assert!(!dispatchers.all_permanent());
        }
        assert!((15..40).contains(&counts[0]), "{counts:?}");
        assert!((550..1_300).contains(&counts[1]), "{counts:?}");
    }

    #[test]
    fn after_a_loss_the_order_begins_again() {
        let (min, max) = (Duration::from_millis(50), Duration::from_secs(5));
        let paths = ["/a", "/b", "/c"].map(PathBuf::from);
        let mut dispatchers = Dispatchers::new(paths.to_vec(), min, max);
        let mut now = Instant::now();
        for joins in [1, 0, 2, 0] {
            for (place, path) in paths.iter().enumerate() {
                assert_eq!(try_next(&mut dispatchers, &mut now), *path);
                if place == joins {
                    dispatchers.joined();
                    break;
                }
                dispatchers.failed(Failed::Absent, false, now);
            }
            assert_eq!(dispatchers.current(), paths[joins]);
            now += Duration::from_secs(1);
            assert!(dispatchers.lost() <= min);
        }
    }

    /// A process that hangs still has a socket that accepts; each attempt there takes its limit.
    #[test]
    fn two_that_hang_do_not_keep_a_worker_from_the_third() {
        let (min, max) = (Duration::from_millis(50), Duration::from_secs(5));
        let paths = ["/hangs", "/hangs-too", "/serves"].map(PathBuf::from);
        let mut dispatchers = Dispatchers::new(paths.to_vec(), min, max);
        let start = Instant::now();
        let mut now = start;
        for _ in 0..3 {
            let tried: Vec<PathBuf> = paths
                .iter()
                .map(|_| {
                    let tried = try_next(&mut dispatchers, &mut now);
                    now += WELCOME_TIMEOUT;
                    dispatchers.failed(Failed::Absent, false, now);
                    tried
                })
                .collect();
            assert_eq!(tried, paths);
        }
    }
}
