//! Tests with real processes, without a shell.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc::Receiver};
use std::time::Instant;

mod listeners;
mod setup;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::*;
use dispatcher_core::PoolId;

const PATIENCE: Duration = Duration::from_secs(30);

/// A service on a thread of its own.
struct Bench {
    spawner: Spawner,
    reports: Receiver<Report>,
    wakes: Arc<AtomicUsize>,
}

impl Bench {
    fn new() -> Bench {
        let wakes = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&wakes);
        let (spawner, mut service, reports) = service(Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime")
                .block_on(service.run());
        });
        Bench { spawner, reports, wakes }
    }

    fn spawn(&self, number: u32, command: &[&str]) -> ProcessId {
        self.spawn_with(number, command, |_| {})
    }

    fn spawn_with(
        &self,
        number: u32,
        command: &[&str],
        change: impl FnOnce(&mut SpawnRequest),
    ) -> ProcessId {
        let process = ProcessId { pool: PoolId(0), place: number, start: number + 1 };
        let mut request = SpawnRequest {
            process,
            command: command.iter().map(|&word| word.to_owned()).collect(),
            environment: Vec::new(),
            directory: None,
            dispatch_socket: "/run/d.sock".into(),
            pool: "web".to_owned(),
            name: "web-1".to_owned(),
            token: Token([0xab; 16]),
            generation: 1,
            on_dispatcher_loss: OnDispatcherLoss::Serve,
            descriptors: None,
            setup: ProcessSetup::default(),
            max_memory: None,
            fork: None,
            address: None,
            listeners: Listeners::default(),
            patience: PATIENCE,
        };
        change(&mut request);
        self.spawner.spawn(request).expect("room");
        process
    }

    fn next(&self) -> Report {
        self.reports.recv_timeout(PATIENCE).expect("a report")
    }

    fn started(&self) -> i32 {
        match self.next() {
            Report::Spawned { pid, .. } => pid,
            other => panic!("{other:?}"),
        }
    }

    fn exit_text(&self) -> String {
        match self.next() {
            Report::Exited { status_text, .. } => status_text,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Bench {
    /// A test that fails leaves nothing running.
    fn drop(&mut self) {
        self.spawner.stop(Duration::ZERO);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            match self.reports.recv_timeout(PATIENCE) {
                Ok(Report::Stopped { .. }) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }
}

#[test]
fn a_process_runs_and_ends() {
    let bench = Bench::new();
    let process = bench.spawn(3, &["true"]);
    let pid = bench.started();
    assert_eq!(
        bench.next(),
        Report::Exited { process, pid, status_text: "exit status 0".to_owned() }
    );
    // The hot thread is woken after each report is there, so the last wake-up may come a moment
    // late.
    let deadline = Instant::now() + PATIENCE;
    while bench.wakes.load(Ordering::SeqCst) != 2 {
        assert!(Instant::now() < deadline, "not woken for each report");
        std::thread::yield_now();
    }
    bench.spawn(3, &["false"]);
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 1");
}

#[test]
fn what_cannot_start_says_why() {
    let bench = Bench::new();
    let process = bench.spawn(0, &["/nonexistent/server"]);
    let Report::SpawnFailed { process: which, error } = bench.next() else {
        panic!("it should not start");
    };
    assert_eq!(which, process);
    assert!(error.starts_with("/nonexistent/server: No such file"), "{error}");
    bench.spawn_with(0, &["true"], |request| request.directory = Some("/nonexistent".into()));
    let Report::SpawnFailed { error, .. } = bench.next() else {
        panic!("it should not start");
    };
    assert!(error.starts_with("cannot enter the directory /nonexistent: No such"), "{error}");
}

#[test]
fn a_process_finds_its_place_in_its_environment() {
    let directory = tempfile::tempdir().expect("a directory");
    let bench = Bench::new();
    // `cp` shows the environment without a shell: /proc/self is the copying process.
    bench.spawn_with(0, &["cp", "/proc/self/environ", "found"], |request| {
        request.directory = directory.path().to_str().map(str::to_owned);
        request.environment = vec![
            ("EXTRA".to_owned(), "1".to_owned()),
            ("DISPATCH_POOL".to_owned(), "mine".to_owned()),
        ];
    });
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 0");
    let found = std::fs::read(directory.path().join("found")).expect("copied");
    let found: Vec<&str> = found
        .split(|&byte| byte == 0)
        .filter_map(|variable| std::str::from_utf8(variable).ok())
        .collect();
    for variable in [
        "EXTRA=1",
        "DISPATCH_SOCKET=/run/d.sock",
        "DISPATCH_POOL=web",
        "DISPATCH_NAME=web-1",
        "DISPATCH_TOKEN=abababababababababababababababab",
        "DISPATCH_ON_LOSS=serve",
    ] {
        assert!(found.contains(&variable), "{variable}");
    }
    assert!(!found.iter().any(|variable| variable.starts_with("NOTIFY_SOCKET=")));
}

#[test]
fn stopping_asks_first() {
    let bench = Bench::new();
    bench.spawn(0, &["sleep", "1000"]);
    let pid = bench.started();
    // A process group of its own, so that no other process gets the signal.
    let group = nix::unistd::getpgid(Some(Pid::from_raw(pid))).expect("running");
    assert_eq!(group.as_raw(), pid);
    bench.spawner.stop(PATIENCE);
    assert_eq!(bench.exit_text(), "signal 15 (SIGTERM)");
    assert_eq!(bench.next(), Report::Stopped { killed: 0 });
}

#[test]
fn stopping_insists() {
    let bench = Bench::new();
    // `env` starts a program that ignores SIGTERM.
    bench.spawn(0, &["env", "--ignore-signal=TERM", "sleep", "1000"]);
    let pid = bench.started();
    // Until the exec, SIGTERM would still end the process.
    let deadline = Instant::now() + PATIENCE;
    let comm = format!("/proc/{pid}/comm");
    while std::fs::read_to_string(&comm).expect("running") != "sleep\n" {
        assert!(Instant::now() < deadline, "it never became sleep");
        std::thread::yield_now();
    }
    bench.spawner.stop(Duration::from_millis(50));
    assert_eq!(bench.exit_text(), "signal 9 (SIGKILL)");
    assert_eq!(bench.next(), Report::Stopped { killed: 1 });
}

/// The numbers in a file that a script has written completely.
fn pids(path: &std::path::Path, count: usize) -> Vec<i32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let pids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
        if pids.len() == count && text.ends_with('\n') {
            return pids;
        }
        assert!(Instant::now() < deadline, "{text:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process exists and is no zombie.
fn lives(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

#[test]
fn what_a_wrapper_started_is_ended_before_its_end_is_reported() {
    let directory = tempfile::tempdir().expect("a directory");
    let bench = Bench::new();
    let script = "sleep 1000 & echo $! >> pids; echo $$ >> pids; wait";
    bench.spawn_with(0, &["sh", "-c", script], |request| {
        request.directory = directory.path().to_str().map(str::to_owned);
    });
    let pid = bench.started();
    let [server, shell] = pids(&directory.path().join("pids"), 2)[..] else { panic!("two") };
    assert_eq!(shell, pid);
    nix::sys::signal::kill(Pid::from_raw(shell), Signal::SIGKILL).expect("running");
    assert_eq!(bench.exit_text(), "signal 9 (SIGKILL); what it had started was ended");
    assert!(!lives(server), "it stayed");
}

#[test]
fn what_a_wrapper_started_and_does_not_end_is_killed() {
    let directory = tempfile::tempdir().expect("a directory");
    let bench = Bench::new();
    let script = "trap '' TERM; (echo up >> up; while :; do sleep 0.05; done) & \
                  echo $! >> pids; while [ ! -e up ]; do sleep 0.01; done; exit 3";
    bench.spawn_with(0, &["sh", "-c", script], |request| {
        request.directory = directory.path().to_str().map(str::to_owned);
        request.patience = Duration::from_millis(50);
    });
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 3; what it had started was killed");
    assert!(!lives(pids(&directory.path().join("pids"), 1)[0]), "it stayed");
}

#[test]
fn stopping_waits_for_the_whole_group() {
    let directory = tempfile::tempdir().expect("a directory");
    let bench = Bench::new();
    // The wrapper ends at once; the server ends later.
    let script = "(trap 'sleep 0.3; echo done >> done; exit' TERM; echo up >> up; \
                  while :; do sleep 0.02; done) & trap 'exit 0' TERM; wait";
    bench.spawn_with(0, &["sh", "-c", script], |request| {
        request.directory = directory.path().to_str().map(str::to_owned);
    });
    bench.started();
    let deadline = Instant::now() + PATIENCE;
    while !directory.path().join("up").exists() {
        assert!(Instant::now() < deadline, "it never came up");
        std::thread::sleep(Duration::from_millis(5));
    }
    bench.spawner.stop(PATIENCE);
    let text = bench.exit_text();
    assert!(text.starts_with("exit status 0") || text.starts_with("signal 15"), "{text}");
    assert!(directory.path().join("done").exists(), "the server had no time to end");
    assert_eq!(bench.next(), Report::Stopped { killed: 0 });
}

/// Whatever this process ignores or blocks.
#[test]
fn a_process_starts_with_default_dispositions_and_an_empty_mask() {
    use nix::sys::signal::{SigSet, SigmaskHow};
    let directory = tempfile::tempdir().expect("a directory");
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGUSR1);
    let mut before = SigSet::empty();
    nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&blocked), Some(&mut before))
        .expect("a mask");
    // The threads of the service have this mask.
    let bench = Bench::new();
    nix::sys::signal::pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)
        .expect("a mask");
    bench.spawn_with(0, &["cp", "/proc/self/status", "found"], |request| {
        request.directory = directory.path().to_str().map(str::to_owned);
    });
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 0");
    let found = std::fs::read_to_string(directory.path().join("found")).expect("copied");
    assert!(found.contains("SigBlk:\t0000000000000000"), "{found}");
    // The runtime of Rust ignores SIGPIPE here, and the parent of the test may ignore other
    // signals.
    assert!(found.contains("SigIgn:\t0000000000000000"), "{found}");
}

#[test]
fn nothing_starts_while_stopping() {
    let bench = Bench::new();
    bench.spawner.stop(PATIENCE);
    assert_eq!(bench.next(), Report::Stopped { killed: 0 });
    let request = SpawnRequest {
        process: ProcessId { pool: PoolId(0), place: 0, start: 1 },
        command: vec!["true".to_owned()],
        environment: Vec::new(),
        directory: None,
        dispatch_socket: "/x".into(),
        pool: "web".to_owned(),
        name: "web-1".to_owned(),
        token: Token([0; 16]),
        generation: 1,
        on_dispatcher_loss: OnDispatcherLoss::Drain,
        descriptors: None,
        setup: ProcessSetup::default(),
        max_memory: None,
        fork: None,
        address: None,
        listeners: Listeners::default(),
        patience: PATIENCE,
    };
    bench.spawner.spawn(request).expect_err("no service any more");
}
