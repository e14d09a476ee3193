//! Permanent tasks of the side thread: one that panics is reported and started again, with back-off.
//!
//! What such a task owns must outlive it, so it is shared with whoever makes the task anew.

use std::time::{Duration, Instant};

use crate::logger::quoted;

/// How long the first restart waits.
const FIRST: Duration = Duration::from_millis(100);

/// The longest wait.
const LONGEST: Duration = Duration::from_secs(30);

/// One that ran this long is started again after [`FIRST`].
const STEADY: Duration = Duration::from_secs(60);

/// Runs a task until it returns or the runtime ends.
pub(super) async fn keep<T>(name: &'static str, mut make: impl FnMut() -> T)
where
    T: Future<Output = ()> + Send + 'static,
{
    let mut wait = FIRST;
    loop {
        let began = Instant::now();
        let Err(error) = tokio::spawn(make()).await else { return };
        // Only the end of the runtime cancels it.
        let Ok(panic) = error.try_into_panic() else { return };
        if began.elapsed() >= STEADY {
            wait = FIRST;
        }
        log::error!(
            "event=task_failed task={name} error={} restart_in={}",
            quoted(message(&*panic)),
            humantime::format_duration(wait).to_string().replace(' ', "")
        );
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST);
    }
}

/// What a panic says.
pub(super) fn message(panic: &(dyn std::any::Any + Send)) -> &str {
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
        runtime.expect("a runtime").block_on(keep("test", || {
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
    fn a_panic_says_why() {
        let caught = |f: fn()| std::panic::catch_unwind(f).expect_err("it panics");
        assert_eq!(message(&*caught(|| panic!("plain"))), "plain");
        assert_eq!(message(&*caught(|| panic!("number {}", 1))), "number 1");
    }
}
