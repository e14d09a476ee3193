//! Gauges of this worker: what the application set, and where the dispatcher sees it.
//!
//! Owns the values, which outlive every dispatcher, and their way into the scoreboard of the present one. Knows nothing of
//! what they mean; who measures something is in `sample`.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError, RwLock};

use rustix::time::{ClockId, clock_gettime};

use super::error::Error;
use super::log_queue::LogQueue;
use super::process::Process;
use dispatch_protocol::scoreboard::Scoreboard;
use dispatch_protocol::scoreboard::gauge::{self, GAUGES, GaugeName, Reading};

/// All gauges of a worker. A gauge has the same number here and in every scoreboard.
pub(crate) struct Gauges {
    process: Process,
    values: [Value; GAUGES as usize],
    shown: RwLock<Shown>,
    pub(super) log_queue: Arc<LogQueue>,
}

#[derive(Default)]
struct Value {
    bits: AtomicU64,
    time: AtomicU64,
}

#[derive(Default)]
struct Shown {
    names: Vec<GaugeName>,
    /// `None` while there is no dispatcher.
    board: Option<Arc<Scoreboard>>,
}

impl Gauges {
    pub(super) fn new(log_queue: Arc<LogQueue>) -> Arc<Gauges> {
        let (values, shown) = Default::default();
        Arc::new(Gauges { process: Process::current(), values, shown, log_queue })
    }

    /// The gauge of this name, made if there is none.
    pub(crate) fn gauge(self: &Arc<Self>, name: &str) -> Result<Gauge, Error> {
        let name: GaugeName = name
            .parse()
            .map_err(|problem| Error::config("gauge", format!("{name:?} is no name: {problem}")))?;
        let mut shown = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        let number = match shown.names.iter().position(|&known| known == name) {
            Some(number) => number,
            None if shown.names.len() == self.values.len() => {
                let most = self.values.len();
                let problem = format!("there are {most} gauges already: no room for {name:?}");
                return Err(Error::config("gauge", problem));
            }
            None => {
                let number = shown.names.len();
                if let Some(board) = &shown.board
                    && !named(board, number, &name, &self.log_queue)
                {
                    shown.board = None;
                }
                shown.names.push(name);
                number
            }
        };
        Ok(Gauge { gauges: Arc::clone(self), number: number as u32 })
    }

    /// Shows everything in the scoreboard of a new dispatcher.
    ///
    /// With the lock held: who sets a gauge stores it here first, and then waits for the lock. So either it is found
    /// here, or it follows; and nothing that follows is overwritten.
    pub(super) fn show(&self, board: &Arc<Scoreboard>) {
        let mut shown = self.shown.write().unwrap_or_else(PoisonError::into_inner);
        shown.board = None;
        for ((number, name), value) in (0..).zip(&shown.names).zip(&self.values) {
            if !named(board, number as usize, name, &self.log_queue) {
                return;
            }
            if let Some(reading) = gauge::read(&value.bits, &value.time) {
                board.set_gauge(number, reading);
            }
        }
        shown.board = Some(Arc::clone(board));
    }

    /// The dispatcher is gone.
    pub(super) fn hide(&self) {
        self.shown.write().unwrap_or_else(PoisonError::into_inner).board = None;
    }

    fn set(&self, number: u32, reading: Reading) {
        let Some(value) = self.values.get(number as usize) else { return };
        gauge::write(&value.bits, &value.time, reading);
        let shown = self.shown.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(board) = &shown.board {
            board.set_gauge(number, reading);
        }
    }
}

/// Whether the gauge can be shown there: if it has room, under the number that it has here. A dispatcher where it has
/// another one is shown nothing more, as it would take one gauge for another.
fn named(board: &Scoreboard, number: usize, name: &GaugeName, log_queue: &LogQueue) -> bool {
    match board.name_gauge(name) {
        Some(there) if there as usize == number => true,
        // Less room than here: setting it does nothing there.
        None if number >= board.gauges() as usize => {
            log_queue.push(log::Level::Debug, || {
                format!(
                    "the dispatcher has room for {} gauges: {name} is not shown",
                    board.gauges()
                )
            });
            true
        }
        _ => {
            log_queue.push(log::Level::Error, || {
                format!("{name} is not gauge {number} in the scoreboard: nothing more is shown")
            });
            false
        }
    }
}

/// A number that this worker shows to the dispatcher under a name, such as the time requests wait in its queue.
///
/// A pool with the policy `least-score` chooses by such numbers; every pool shows them in its status. What
/// was set stays set over a change of dispatchers. Without a dispatcher setting does nothing.
///
/// **Set it regularly**, even when it has not changed, from the part of the program whose standstill should be noticed: what
/// is older than the pool's `valid_for` (5 s unless configured) takes the worker out of the choice until it
/// is set again.
///
/// Clones are the same gauge, and so is another one of the same name. Setting is cheap: no system call, no allocation, no
/// lock that anybody holds for long. In a forked child it does nothing.
///
/// ```
/// use dispatch_protocol::scoreboard::gauge::names;
/// use worker_sdk::{Worker, WorkerConfig};
///
/// # fn main() -> Result<(), worker_sdk::Error> {
/// let worker = Worker::connect(WorkerConfig::new().listen("127.0.0.1:0"))?;
/// let queue_wait = worker.gauge(names::QUEUE_WAIT)?;
/// let tenants = worker.gauge("my.tenants")?;
///
/// queue_wait.set(0.35); // Seconds, by agreement.
/// tenants.set(12.0);
///
/// assert!(worker.gauge("not a name").is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Gauge {
    gauges: Arc<Gauges>,
    number: u32,
}

impl Gauge {
    /// Sets it, as of now. Infinities and what is no number are left out: the gauge keeps its value and gets old.
    #[inline]
    pub fn set(&self, value: f64) {
        if value.is_finite() && self.gauges.process.is_current() {
            self.gauges.set(self.number, Reading { value, at: now() });
        }
    }
}

impl fmt::Debug for Gauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.gauges.shown.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_tuple("Gauge").field(&shown.names.get(self.number as usize)).finish()
    }
}

/// Nanoseconds of `CLOCK_REALTIME`, which no time namespace shifts; never 0.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    (seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)).max(1)
}
