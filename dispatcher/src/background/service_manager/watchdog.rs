//! The watchdog of the service manager: a message at regular intervals, each after a turn of the
//! hot thread. If the hot thread stops turning, the messages stop, and the service manager restarts
//! the dispatcher.
//!
//! An idle hot thread sleeps without a limit, so it is asked: the question wakes it, and it answers
//! in its turn.

use std::time::Duration;

use super::{ServiceManager, State};
use crate::background::logger::quoted;

/// The interval of the service manager in which it wants a message; `None` if it wants none from
/// this process.
pub(crate) fn interval() -> Option<Duration> {
    match wanted(|name| std::env::var(name).ok(), std::process::id()) {
        Ok(interval) => interval,
        Err(error) => {
            log::warn!("event=watchdog_ignored error={}", quoted(error));
            None
        }
    }
}

fn wanted(variable: impl Fn(&str) -> Option<String>, pid: u32) -> Result<Option<Duration>, String> {
    let Some(microseconds) = variable("WATCHDOG_USEC").filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    // The variables of a service that started this process concern that service.
    if variable("WATCHDOG_PID").is_some_and(|wanted| wanted != pid.to_string()) {
        return Ok(None);
    }
    match microseconds.parse() {
        Ok(0) | Err(_) => Err(format!("WATCHDOG_USEC={microseconds} is not an interval")),
        Ok(microseconds) => Ok(Some(Duration::from_micros(microseconds))),
    }
}

/// Sends a message three times in each interval, as long as the hot thread answers. `turned` asks
/// it to make a turn and waits for that; false if it was not answered.
pub(crate) async fn feed<T: Future<Output = bool>>(
    interval: Duration,
    manager: ServiceManager,
    turned: impl Fn() -> T,
) {
    let pause = interval / 3;
    loop {
        if turned().await {
            // Waits until it is sent, so that messages do not gather. The receiver gets no value.
            let _ = manager.tell(State::Watchdog).await;
        }
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use super::super::manager_at;
    use super::*;

    #[test]
    fn the_interval_is_for_the_process_that_is_named() {
        let with = |microseconds: Option<&str>, pid: Option<&str>| {
            let variable = |name: &str| match name {
                "WATCHDOG_USEC" => microseconds.map(str::to_owned),
                _ => pid.map(str::to_owned),
            };
            wanted(variable, 77)
        };
        let second = Ok(Some(Duration::from_secs(1)));
        assert_eq!(with(Some("1000000"), Some("77")), second);
        assert_eq!(with(Some("1000000"), None), second);
        assert_eq!(with(Some("1000000"), Some("78")), Ok(None));
        assert_eq!((with(None, Some("77")), with(Some(""), None)), (Ok(None), Ok(None)));
        for bad in ["0", "-1", "soon", "1s"] {
            assert!(with(Some(bad), None).is_err(), "{bad}");
        }
    }

    #[test]
    fn messages_follow_turns() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("notify");
        let listener = UnixDatagram::bind(&path).expect("a socket");
        listener.set_nonblocking(true).expect("not blocking");
        let count = || {
            let mut bytes = [0; 64];
            let mut count = 0u32;
            while let Ok(size) = listener.recv(&mut bytes) {
                assert_eq!(&bytes[..size], b"WATCHDOG=1\n");
                count += 1;
            }
            count
        };
        let (manager, mut teller) = manager_at(Some(path.clone().into()));
        let turns = Arc::new(AtomicBool::new(true));
        let asked = Arc::clone(&turns);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime").block_on(async move {
            tokio::spawn(async move { teller.run().await });
            let interval = Duration::from_millis(90);
            tokio::spawn(feed(interval, manager, move || {
                let turned = asked.load(Ordering::SeqCst);
                async move { turned }
            }));
            let enough = async || {
                let (mut sent, began) = (0, Instant::now());
                while sent < 9 {
                    assert!(began.elapsed() < Duration::from_secs(60), "{sent} messages");
                    tokio::time::sleep(interval).await;
                    sent += count();
                }
                (sent, began.elapsed())
            };
            let (sent, took) = enough().await;
            // Not more than three in each interval.
            let most = took.as_millis() * 3 / interval.as_millis() + 2;
            assert!(u128::from(sent) <= most, "{sent} in {took:?}");
            turns.store(false, Ordering::SeqCst);
            tokio::time::sleep(interval).await;
            count();
            tokio::time::sleep(interval * 10).await;
            assert_eq!(count(), 0, "without turns");
            turns.store(true, Ordering::SeqCst);
            enough().await;
        });
    }
}
