//! Accounts, permissions, limits, placeholders and output of processes.

use super::*;
use crate::config::{Account, Limit, Output, ProcessLimits};

/// A directory that every user may use, or only its owner.
fn directory(mode: u32) -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().expect("a directory");
    let mode = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(directory.path(), mode).expect("own");
    directory
}

pub(super) fn account(uid: u32, groups: &[u32]) -> Account {
    Account {
        uid,
        gid: groups[0],
        groups: Some(groups.to_vec()),
        user_text: format!("{uid} (other)"),
        group_text: format!("{} (others)", groups[0]),
        variables: vec![
            ("HOME".to_owned(), Some("/home/other".to_owned())),
            ("SHELL".to_owned(), None),
        ],
    }
}

pub(super) fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        test_support::skip("needs root");
    }
    root
}

/// The value of a line of `/proc/PID/status` or `/proc/PID/limits`.
#[track_caller]
fn field<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("{name} in {text}")).split_whitespace().collect()
}

/// Copies a file of `/proc/self` of a process with this setup, and returns its text.
fn of_process(file: &str, setup: ProcessSetup) -> String {
    let directory = directory(0o777);
    let bench = Bench::new();
    bench.spawn_with(0, &["cp", &format!("/proc/self/{file}"), "found"], |request| {
        request.directory = directory.path().to_str().map(str::to_owned);
        request.setup = setup;
    });
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 0");
    std::fs::read_to_string(directory.path().join("found")).expect("copied")
}

#[test]
fn another_user_has_its_groups_and_no_capabilities() {
    if !is_root() {
        return;
    }
    let setup = ProcessSetup {
        account: Some(account(65_533, &[65_531, 65_530])),
        umask: Some(0o027),
        ..ProcessSetup::default()
    };
    let status = of_process("status", setup);
    assert_eq!(field(&status, "Uid:"), ["65533"; 4]);
    assert_eq!(field(&status, "Gid:"), ["65531"; 4]);
    assert_eq!(field(&status, "Groups:"), ["65530", "65531"]);
    assert_eq!(field(&status, "Umask:"), ["0027"]);
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(&status, set), ["0000000000000000"], "{set}");
    }
}

#[test]
fn a_process_has_its_limits() {
    let limits = ProcessLimits {
        open_files: Some(Limit { soft: 64, hard: 128 }),
        core: Some(Limit { soft: 0, hard: 0 }),
        // Less than what this process has.
        memory: Some(Limit { soft: 64 << 20, hard: 2 << 30 }),
    };
    let text = of_process("limits", ProcessSetup { limits, ..ProcessSetup::default() });
    assert_eq!(field(&text, "Max open files")[..2], ["64", "128"]);
    assert_eq!(field(&text, "Max core file size")[..2], ["0", "0"]);
    assert_eq!(field(&text, "Max address space")[..2], ["67108864", "2147483648"]);
}

#[test]
fn placeholders_and_variables_of_the_user() {
    let directory = directory(0o777);
    std::fs::create_dir(directory.path().join("web-3")).expect("a directory");
    let bench = Bench::new();
    let script = "echo {n} {name} {pool} ${{HOME}} ${{SHELL-unset}} $OWN > found";
    bench.spawn_with(2, &["sh", "-c", script], |request| {
        request.name = "web-3".to_owned();
        request.directory = Some(format!("{}/{{name}}", directory.path().display()));
        request.environment = vec![("OWN".to_owned(), "<{n}>".to_owned())];
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let own = Account { uid, groups: None, ..account(uid, &[gid]) };
        request.setup.account = Some(own);
    });
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 0");
    let found = std::fs::read_to_string(directory.path().join("web-3/found")).expect("written");
    assert_eq!(found, "3 web-3 web /home/other unset <3>\n");
}

/// The error of a process that cannot start.
fn not_started(change: impl FnOnce(&mut SpawnRequest)) -> String {
    let bench = Bench::new();
    bench.spawn_with(0, &["true"], change);
    match bench.next() {
        Report::SpawnFailed { error, .. } => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_error_names_its_step() {
    let impossible = Limit { soft: 1 << 40, hard: 1 << 40 };
    let error = not_started(|request| request.setup.limits.open_files = Some(impossible));
    let expected = "cannot set the limit of open files to 1099511627776: ";
    assert!(error.starts_with(expected), "{error}");
    if !is_root() {
        let own = nix::unistd::geteuid().as_raw();
        let user = Account { groups: None, ..account(own + 1, &[own]) };
        let error = not_started(|request| request.setup.account = Some(user));
        assert!(error.contains("Operation not permitted"), "{error}");
        return;
    }
    let closed = directory(0o700);
    let inside = closed.path().to_str().expect("UTF-8").to_owned();
    let error = not_started(|request| {
        request.directory = Some(inside.clone());
        request.setup.account = Some(account(65_533, &[65_533]));
    });
    // The user, not root, enters the directory.
    let expected = format!(
        "cannot enter the directory {inside} as user 65533 (other): Permission denied (os error 13)"
    );
    assert_eq!(error, expected);
    let error = not_started(|request| {
        request.command = vec![format!("{inside}/program")];
        request.setup.account = Some(account(65_533, &[65_533]));
    });
    assert!(
        error.starts_with(&format!("{inside}/program as user 65533 (other): Permission denied")),
        "{error}"
    );
}

fn log(request: &mut SpawnRequest) {
    request.setup.output = Output::Log;
}

fn last(bench: &Bench, process: ProcessId) -> Vec<String> {
    let lines = bench.spawner.last_output(process).into_iter();
    lines.map(|line| format!("{}: {}", line.stream.name(), line.text)).collect()
}

#[test]
fn the_last_lines_are_there_when_the_end_is_reported() {
    let bench = Bench::new();
    let script = "for i in 1 2 3; do echo out $i; echo err $i >&2; done; printf rest; exit 1";
    let process = bench.spawn_with(0, &["sh", "-c", script], log);
    let pid = bench.started();
    assert_eq!(bench.exit_text(), "exit status 1");
    let lines = bench.spawner.last_output(process);
    assert!(lines.iter().all(|line| line.pid == pid));
    let of = |stream: Stream| -> Vec<&str> {
        lines.iter().filter(|line| line.stream == stream).map(|line| line.text.as_str()).collect()
    };
    assert_eq!(of(Stream::Stdout), ["out 1", "out 2", "out 3", "rest"]);
    assert_eq!(of(Stream::Stderr), ["err 1", "err 2", "err 3"]);
    // The next process in this place adds its lines.
    let many = "i=0; while [ $i -lt 50 ]; do echo line $i; i=$((i+1)); done";
    bench.spawn_with(0, &["sh", "-c", many], log);
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 0");
    let expected: Vec<String> = (30..50).map(|n| format!("stdout: line {n}")).collect();
    assert_eq!(last(&bench, process), expected);
}

/// The pipes of this process that the test process reads: its own descriptors that are pipes.
fn pipes() -> usize {
    let entries = std::fs::read_dir("/proc/self/fd").expect("readable").flatten();
    let links = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("pipe:")).count()
}

#[test]
fn a_process_that_writes_much_is_never_blocked_for_long() {
    let bench = Bench::new();
    // 16 MiB in 8 Mi lines: a pipe holds less, and the log takes far less. It lasts three seconds,
    // because reading pauses.
    let process =
        bench.spawn_with(0, &["sh", "-c", "yes | head -c 16777216; echo end"], |request| {
            log(request);
            request.setup.output_rate = 10;
        });
    let lost = lost_lines();
    bench.started();
    // Another process is started and ends meanwhile.
    bench.spawn(1, &["true"]);
    let other = loop {
        if let Report::Exited { process, .. } = bench.next() {
            break process;
        }
    };
    assert_eq!(other.place, 1, "the chatty process was first");
    assert_eq!(bench.exit_text(), "exit status 0");
    assert_eq!(last(&bench, process).last().expect("a line"), "stdout: end");
    let deadline = Instant::now() + PATIENCE;
    // All but ten lines in each second.
    while lost_lines() - lost < 8_380_000 {
        assert!(Instant::now() < deadline, "{} lines are counted", lost_lines() - lost);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_grandchild_that_keeps_the_pipes_does_not_keep_the_reader() {
    let directory = tempfile::tempdir().expect("a directory");
    let bench = Bench::new();
    let before = pipes();
    // It leaves the group, so it lives on and holds the pipes.
    let script = "setsid sh -c 'echo $$ >> pids; exec sleep 1000' & \
                  while [ ! -s pids ]; do sleep 0.01; done; echo started; exit 0";
    let process = bench.spawn_with(0, &["sh", "-c", script], |request| {
        log(request);
        request.directory = directory.path().to_str().map(str::to_owned);
    });
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 0");
    assert_eq!(last(&bench, process), ["stdout: started"]);
    let grandchild = pids(&directory.path().join("pids"), 1)[0];
    let deadline = Instant::now() + PATIENCE;
    // Other tests have pipes of their own for a while.
    while pipes() > before {
        assert!(Instant::now() < deadline, "{} pipes, {before} before", pipes());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(lives(grandchild));
    nix::sys::signal::kill(Pid::from_raw(grandchild), Signal::SIGKILL).expect("running");
}

#[test]
fn the_user_may_open_its_own_streams_by_name() {
    let bench = Bench::new();
    let root = nix::unistd::geteuid().is_root();
    let process = bench.spawn_with(0, &["sh", "-c", "echo hello > /dev/stdout"], |request| {
        log(request);
        request.setup.account = root.then(|| account(65_533, &[65_533]));
    });
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 0");
    assert_eq!(last(&bench, process), ["stdout: hello"]);
}
