//! The gauges of this worker: values set by the application, shown to the dispatcher.
//!
//! This module owns the values, which outlive every dispatcher, and copies them into the current
//! scoreboard. It does not interpret them; `sample` measures those of the SDK.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError, RwLock};

use rustix::time::{ClockId, clock_gettime};

use super::error::Error;
use super::log_queue::LogQueue;
use super::process::Process;
use dispatch_protocol::scoreboard::Scoreboard;
use dispatch_protocol::scoreboard::gauge::{self, GAUGES, GaugeName, Reading};

/// All gauges of a worker. A gauge has the same index here and in every scoreboard.
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
    /// `None` without a dispatcher.
    board: Option<Arc<Scoreboard>>,
}

impl Gauges {
    pub(super) fn new(log_queue: Arc<LogQueue>) -> Arc<Gauges> {
        let (values, shown) = Default::default();
        Arc::new(Gauges { process: Process::current(), values, shown, log_queue })
    }

    /// The gauge of this name, created if necessary.
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

    /// Copies all gauges into the scoreboard of a new dispatcher.
    ///
    /// Holds the lock: a writer stores its value here first, then waits for the lock. So either
    /// this function finds the value, or the writer stores it afterwards; nothing newer is
    /// overwritten.
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

/// Names the gauge in the scoreboard; true if it has the same index there, or no room. With another
/// index no gauge is shown any more, because the dispatcher would confuse gauges.
fn named(board: &Scoreboard, number: usize, name: &GaugeName, log_queue: &LogQueue) -> bool {
    match board.name_gauge(name) {
        Some(there) if there as usize == number => true,
        // The scoreboard has fewer gauges; writes to this one have no effect.
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

/// A named number that this worker shows to the dispatcher, such as the time that requests wait in
/// its queue.
///
/// A pool with the policy `least-score` chooses workers by such numbers; every pool shows them in
/// its status. A value stays set when the dispatcher changes. Without a dispatcher a set has no
/// effect.
///
/// **Set it regularly**, even if it has not changed, from the part of the program whose failure
/// should be noticed: a worker with a value older than the pool's `valid_for` (default 5 s) gets no
/// connections until the value is set again.
///
/// Clones, and gauges of the same name, are the same gauge. A set is cheap: no system call, no
/// allocation, only locks with short critical sections. In a forked child it has no effect.
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
/// queue_wait.set(0.35); // In seconds.
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
    /// Sets the value with the current time. Infinities and NaN are ignored: the gauge keeps its
    /// value and ages.
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

/// Nanoseconds of `CLOCK_REALTIME`, which is the same in every time namespace; never 0.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    (seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)).max(1)
}
