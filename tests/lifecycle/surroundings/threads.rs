//! Permanent threads that fail.

use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use test_support::peer::{Peer, hello};
use test_support::*;

/// The thread of a process that has this name.
fn thread_of(pid: i32, name: &str) -> Option<String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.flatten().find_map(|thread| {
        let found = std::fs::read_to_string(thread.path().join("comm")).ok()?;
        (found.trim_end() == name).then(|| thread.file_name().to_string_lossy().into_owned())
    })
}

/// Makes the next `times` waits for events of one thread fail. Ends when dropped.
struct Failing(Child);

impl Failing {
    /// For the thread of this name. `None`, after a notice, where that is not possible.
    fn waits(dispatcher: &Dispatcher, name: &str, times: u32) -> Option<Failing> {
        if !nix::unistd::geteuid().is_root() {
            skip("needs root, to trace a process that is not its child");
            return None;
        }
        if Command::new("strace").arg("-V").output().is_err() {
            skip("needs strace");
            return None;
        }
        let thread = thread_of(dispatcher.process.pid(), name).unwrap();
        let thread = thread.as_str();
        let mut strace = Command::new("strace");
        strace.args(["-qq", "-o", "/dev/null", "-p", thread]);
        let inject = format!("inject=/^epoll_p?wait$:error=ENOMEM:when=1..{times}");
        strace.args(["-e", &inject]).stderr(Stdio::null());
        Some(Failing(strace.spawn().unwrap()))
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The handshake thread cannot wait any more: it logs the failure and continues with its workers.
#[test]
fn the_handshake_thread_begins_again_and_knows_its_workers() {
    let (dispatcher, address) = start_one_pool("");
    let mut before = dispatcher.worker("blocking", "web", "before");
    dispatcher.wait_joined("web", 1);
    // A connection without a hello.
    let silent = Peer::connect(&dispatcher.dispatch());
    let Some(failing) = Failing::waits(&dispatcher, "handshakes", 3) else { return };
    let failures = || dispatcher.log().matches("event=task_failed task=handshakes error=").count();
    // The thread sleeps until an event; an event makes it wait again.
    wait_until("it to fail", || {
        drop(Peer::connect(&dispatcher.dispatch()));
        failures() == 3
    });
    assert!(dispatcher.log().contains("restart_in=400ms"), "the third with back-off");
    drop(failing);
    let (_, _lane) = silent.join(&hello());
    dispatcher.wait_joined("web", 2);
    drop(silent);
    dispatcher.wait_joined("web", 1);
    before.kill();
    dispatcher.wait_joined("web", 0);
    let _after = dispatcher.worker("blocking", "web", "after");
    Client::connect(address).unwrap().echo("served");
    assert_eq!(failures(), 3);
}

/// The thread of the admin socket cannot wait any more: the log says so at once, and clients are
/// served.
#[test]
fn without_the_thread_of_the_admin_socket_clients_are_served() {
    let (dispatcher, address) = start_one_pool("");
    let _worker = dispatcher.worker("blocking", "web", "one");
    dispatcher.wait_joined("web", 1);
    let Some(_failing) = Failing::waits(&dispatcher, "admin", 3) else { return };
    wait_until("it to fail", || {
        drop(UnixStream::connect(dispatcher.admin()));
        dispatcher.log().contains("event=admin_thread_panicked error=")
    });
    Client::connect(address).unwrap().echo("served");
    dispatcher.process.signal(Signal::SIGTERM);
    wait_for_log(&dispatcher, "event=stopped");
}

/// Threads that may be needed when the system has none left exist from the start.
#[test]
fn what_may_wait_has_its_threads_before_they_are_needed() {
    let (dispatcher, _) = start_one_pool("");
    let pid = dispatcher.process.pid();
    for name in [
        "handshakes",
        "closer-1",
        "closer-2",
        "closer-slow",
        "watchdog",
        "cleaner",
        "files",
        "log",
        "admin",
    ] {
        assert!(thread_of(pid, name).is_some(), "{name}");
    }
}
