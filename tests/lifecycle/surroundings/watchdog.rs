//! The watchdog of the service manager: messages stop when the hot thread stops, although all other
//! threads run.
#![allow(unsafe_code, reason = "the test stops one thread with ptrace")]

use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use test_support::*;

/// Stops one thread of another process while it exists.
struct Stopped(i32);

impl Stopped {
    /// `None` where that is not allowed.
    fn thread(tid: i32) -> Option<Stopped> {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: the call has no effect on the memory of this process.
        if unsafe { libc::ptrace(libc::PTRACE_ATTACH, tid, none, none) } != 0 {
            return None;
        }
        let mut status = 0;
        // SAFETY: the kernel writes one integer, which lives on.
        let stopped = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
        assert_eq!(stopped, tid);
        Some(Stopped(tid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: as above.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, none, none) };
    }
}

#[test]
fn the_watchdog_is_fed_by_turns_of_the_hot_thread() {
    let temp = configure(&one_pool(""));
    let path = temp.path().join("notify");
    let listener = UnixDatagram::bind(&path).unwrap();
    listener.set_read_timeout(Some(PATIENCE)).unwrap();
    let next = || {
        let mut bytes = [0; 64];
        listener.recv(&mut bytes).map(|size| String::from_utf8_lossy(&bytes[..size]).into_owned())
    };
    let mut command = Command::new(dispatcher_bin());
    let interval = Duration::from_millis(300);
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", interval.as_micros().to_string());
    let dispatcher = Dispatcher::start_as(temp.path(), &mut command);
    assert_eq!(next().unwrap(), "READY=1\n");
    // The hot thread is idle, and answers.
    for _ in 0..10 {
        assert_eq!(next().unwrap(), "WATCHDOG=1\n");
    }
    // The main thread is the hot one. The others run on.
    let Some(stopped) = Stopped::thread(dispatcher.process.pid()) else {
        return skip("needs the right to trace its own child");
    };
    // One message may have been on its way.
    listener.set_read_timeout(Some(interval * 2)).unwrap();
    let late: Vec<String> = std::iter::from_fn(|| next().ok()).take(3).collect();
    assert!(late.len() < 2, "{late:?}");
    assert!(next().is_err(), "a message without a turn");
    drop(stopped);
    listener.set_read_timeout(Some(PATIENCE)).unwrap();
    for _ in 0..3 {
        assert_eq!(next().unwrap(), "WATCHDOG=1\n");
    }

    // Variables for another process are of no interest.
    let temp = configure(&one_pool(""));
    command = Command::new(dispatcher_bin());
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", interval.as_micros().to_string());
    drop(dispatcher);
    while {
        listener.set_nonblocking(true).unwrap();
        next().is_ok()
    } {}
    listener.set_nonblocking(false).unwrap();
    let mut other = Dispatcher::start_as(temp.path(), command.env("WATCHDOG_PID", "1"));
    assert_eq!(next().unwrap(), "READY=1\n");
    listener.set_read_timeout(Some(interval * 3)).unwrap();
    assert!(next().is_err(), "a message for another process");
    assert!(other.stop().success());
}
