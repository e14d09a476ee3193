//! Restarts permanent threads and tasks that panic or fail, with back-off, and logs each failure.
//!
//! A thread restarts its work on itself, so it needs no new thread. What it owns outlives the
//! failure; a task shares its state with its replacement.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::background::logger::quoted;

/// How long the first restart waits.
const FIRST: Duration = Duration::from_millis(100);

/// The longest wait.
const LONGEST: Duration = Duration::from_secs(30);

/// After a run this long the next restart waits [`FIRST`] again.
const STEADY: Duration = Duration::from_secs(60);

/// The back-off of one thread or task.
#[derive(Debug)]
struct Backoff {
    next: Duration,
    began: Instant,
}

impl Backoff {
    fn new() -> Backoff {
        Backoff { next: FIRST, began: Instant::now() }
    }

    fn begin(&mut self) {
        self.began = Instant::now();
    }

    /// Logs a failure and returns how long to wait before the restart.
    fn failed(&mut self, name: &str, error: &str) -> Duration {
        if self.began.elapsed() >= STEADY {
            self.next = FIRST;
        }
        let wait = self.next;
        self.next = (wait * 2).min(LONGEST);
        log::error!(
            "event=task_failed task={name} error={} restart_in={}",
            quoted(error),
            humantime::format_duration(wait).to_string().replace(' ', "")
        );
        wait
    }
}

/// Runs a task until it returns or the runtime ends.
pub(crate) async fn task<T>(name: &'static str, mut make: impl FnMut() -> T)
where
    T: Future<Output = ()> + Send + 'static,
{
    let mut backoff = Backoff::new();
    loop {
        backoff.begin();
        let Err(error) = tokio::spawn(make()).await else { return };
        // Only the end of the runtime cancels a task.
        let Ok(panic) = error.try_into_panic() else { return };
        let wait = backoff.failed(name, message(&*panic));
        tokio::time::sleep(wait).await;
    }
}

/// Runs `work` on this thread until it returns without an error.
pub(crate) fn thread<T>(name: &str, mut work: impl FnMut() -> Result<T, String>) -> T {
    let mut backoff = Backoff::new();
    loop {
        backoff.begin();
        let error = match caught(&mut work) {
            Ok(Ok(value)) => return value,
            Ok(Err(error)) | Err(error) => error,
        };
        std::thread::sleep(backoff.failed(name, &error));
    }
}

/// Runs one piece of work of a thread that continues afterwards; logs a panic.
pub(crate) fn piece(name: &str, work: impl FnOnce()) {
    if let Err(error) = caught(work) {
        log::error!("event=task_failed task={name} error={} restart_in=0s", quoted(error));
    }
}

/// Runs one piece of work and turns a panic into its message.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| message(&*panic).to_owned())
}

/// The message of a panic.
pub(crate) fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_task_that_panics_is_started_again_until_it_returns() {
        let runs = Arc::new(AtomicUsize::new(0));
        let began = Instant::now();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime").block_on(task("test", || {
            let runs = Arc::clone(&runs);
            async move {
                tokio::task::yield_now().await;
                assert!(runs.fetch_add(1, Ordering::SeqCst) == 2, "not this time");
            }
        }));
        assert_eq!(runs.load(Ordering::SeqCst), 3);
        assert!(began.elapsed() >= FIRST * 3, "with back-off");
    }

    #[test]
    fn a_thread_that_fails_restarts_with_its_state() {
        let mut runs = Vec::new();
        let began = Instant::now();
        let value = thread("test", || {
            runs.push(());
            match runs.len() {
                1 => panic!("on purpose"),
                2 => Err("given up".to_owned()),
                _ => Ok(7),
            }
        });
        assert_eq!((value, runs.len()), (7, 3));
        assert!(began.elapsed() >= FIRST * 3, "with back-off");
    }

    #[test]
    fn waits_double_up_to_a_bound() {
        let mut backoff = Backoff::new();
        let waits: Vec<Duration> = (0..12).map(|_| backoff.failed("test", "no")).collect();
        assert!(waits.windows(2).all(|pair| pair[1] == (pair[0] * 2).min(LONGEST)), "{waits:?}");
        assert_eq!((waits[0], waits[11]), (FIRST, LONGEST));
    }

    #[test]
    fn a_panic_says_why() {
        let panics = |work: fn()| caught(work).expect_err("it panics");
        assert_eq!(panics(|| panic!("plain")), "plain");
        assert_eq!(panics(|| panic!("number {}", 1)), "number 1");
    }
}
