//! Listeners that a process inherits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;
use crate::config::{Account, Limit, Output};

/// A listener, where it listens, and the inode of its socket.
fn listener() -> (OwnedFd, SocketAddr, u64) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let inode = rustix::fs::fstat(listener.as_fd()).expect("open").st_ino;
    (listener.into(), address, inode)
}

/// Two listeners, and the inodes of their sockets in this order.
fn two() -> (Listeners, [u64; 2]) {
    let ((first, _, one), (second, _, two)) = (listener(), listener());
    // The first one has the higher number.
    let listeners = [("web".to_owned(), second), ("admin:1 é".to_owned(), first)];
    (Listeners::new(listeners), [two, one])
}

/// How many descriptors of this process are this socket.
fn open_here(inode: u64) -> usize {
    let entries = std::fs::read_dir("/proc/self/fd").expect("readable").flatten();
    let links = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.filter(|link| link.as_os_str() == format!("socket:[{inode}]").as_str()).count()
}

#[track_caller]
fn becomes(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn at(directory: &Path) -> impl Fn(&mut SpawnRequest) {
    let directory = directory.to_str().map(str::to_owned);
    move |request| request.directory.clone_from(&directory)
}

/// The descriptors of a process that has these listeners, by number.
fn descriptors(listeners: Listeners) -> BTreeMap<i32, String> {
    let bench = Bench::new();
    // Before its first instruction a program has files open for its libraries.
    let stops = ["sh", "-c", "kill -STOP $$"];
    bench.spawn_with(0, &stops, |request| request.listeners = listeners);
    let pid = bench.started();
    becomes("the process to stop", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("running");
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    });
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("running");
    let of = |entry: std::fs::DirEntry| {
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let file = std::fs::read_link(entry.path()).expect("open");
        (number.expect("a number"), file.to_string_lossy().into_owned())
    };
    entries.flatten().map(of).collect()
}

#[test]
fn a_process_has_its_listeners_and_no_other_descriptor() {
    let (listeners, inodes) = two();
    // What this process has inherited itself is passed on, but for these numbers.
    let mut expected = descriptors(Listeners::default());
    expected.extend((3..).zip(inodes.map(|inode| format!("socket:[{inode}]"))));
    assert_eq!(descriptors(listeners), expected);
}

#[test]
fn a_process_finds_its_listeners_in_its_environment() {
    let directory = tempfile::tempdir().expect("a directory");
    let bench = Bench::new();
    let script = "echo {fd} $OWN $$ $LISTEN_PID $LISTEN_FDS \"$LISTEN_FDNAMES\" >> found";
    bench.spawn_with(0, &["sh", "-c", script], |request| {
        at(directory.path())(request);
        request.environment = vec![("OWN".to_owned(), "fd={fd}".to_owned())];
        request.listeners = two().0;
    });
    let pid = bench.started();
    assert_eq!(bench.exit_text(), "exit status 0");
    let found = std::fs::read_to_string(directory.path().join("found")).expect("written");
    assert_eq!(found, format!("3 fd=3 {pid} {pid} 2 web:admin_1 _\n"));
}

/// The environment of a process, copied by the process itself.
fn environment(listeners: Listeners) -> BTreeSet<String> {
    let directory = tempfile::tempdir().expect("a directory");
    let bench = Bench::new();
    bench.spawn_with(0, &["cp", "/proc/self/environ", "found"], |request| {
        at(directory.path())(request);
        request.environment = vec![
            ("EXTRA".to_owned(), "{name} {n}".to_owned()),
            ("EMPTY".to_owned(), String::new()),
            ("EQUAL".to_owned(), "a=b".to_owned()),
            ("NOTIFY_SOCKET".to_owned(), "removed".to_owned()),
        ];
        // Variables of its user, one of which it does not have.
        request.setup.account = Some(Account {
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            groups: None,
            user_text: "own".to_owned(),
            group_text: "own".to_owned(),
            variables: vec![
                ("HOME".to_owned(), Some("/home/other".to_owned())),
                ("PWD".to_owned(), None),
            ],
        });
        request.listeners = listeners;
    });
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 0");
    let found = std::fs::read(directory.path().join("found")).expect("copied");
    let texts = found.split(|&byte| byte == 0).map(|text| String::from_utf8_lossy(text).into());
    texts.collect()
}

#[test]
fn the_rest_of_the_environment_is_the_same() {
    let without = environment(Listeners::default());
    assert!(without.contains("EXTRA=web-1 1") && without.contains("HOME=/home/other"));
    assert!(!without.iter().any(|text| text.starts_with("LISTEN_")), "{without:?}");
    let mut with = environment(two().0);
    for name in ["LISTEN_FDS=", "LISTEN_PID=", "LISTEN_FDNAMES="] {
        let text = with.iter().find(|text| text.starts_with(name)).cloned();
        assert!(text.is_some_and(|text| with.remove(&text)), "{name} in {with:?}");
    }
    assert_eq!(with, without);
}

/// What becomes of a program that is looked for in two directories: the end of the process, or the
/// error.
fn result(directory: &Path, program: &str, listeners: Listeners) -> String {
    let bench = Bench::new();
    bench.spawn_with(0, &[program, "argument"], |request| {
        at(directory)(request);
        let path = format!("{0}/nothing:{0}/file:{0}/one:{0}/two", directory.display());
        request.environment = vec![("PATH".to_owned(), path)];
        request.listeners = listeners;
    });
    match bench.next() {
        Report::SpawnFailed { error, .. } => error,
        Report::Spawned { .. } => bench.exit_text(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn programs_are_found_as_without_listeners() {
    let directory = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str, mode: u32| {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("writable");
        std::fs::write(&path, text).expect("writable");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("own");
    };
    let script = "#!/bin/sh\n[ \"$1\" = argument ] && exit";
    write("file", "", 0o644);
    write("one/both", &format!("{script} 1"), 0o755);
    write("two/both", &format!("{script} 2"), 0o755);
    write("one/second", "not a program", 0o644);
    write("two/second", &format!("{script} 3"), 0o755);
    write("two/no-program", "", 0o644);
    write("two/no-interpreter", "#!/nonexistent/sh\n", 0o755);
    // The C library runs it with a shell.
    write("two/without-first-line", "exit 4\n", 0o755);
    write("here", &format!("{script} 5"), 0o755);
    for (program, expected) in [
        ("both", "exit status 1"),
        ("second", "exit status 3"),
        ("no-program", "no-program: Permission denied (os error 13)"),
        ("no-interpreter", "no-interpreter: No such file or directory (os error 2)"),
        ("without-first-line", "exit status 4"),
        ("./here", "exit status 5"),
        ("./file", "./file: Permission denied (os error 13)"),
        ("./file/here", "./file/here: Not a directory (os error 20)"),
        ("nowhere", "nowhere: No such file or directory (os error 2)"),
        ("", ": No such file or directory (os error 2)"),
        ("a\0b", "a\0b: nul byte found in provided data"),
    ] {
        let without = result(directory.path(), program, Listeners::default());
        assert_eq!(without, expected, "without listeners");
        assert_eq!(result(directory.path(), program, two().0), expected, "with listeners");
    }
}

#[test]
fn steps_before_the_program_fail_as_without_listeners() {
    let bench = Bench::new();
    bench.spawn_with(0, &["true"], |request| {
        request.directory = Some("/nonexistent".into());
        request.listeners = two().0;
    });
    let Report::SpawnFailed { error, .. } = bench.next() else { panic!("it should not start") };
    assert!(error.starts_with("cannot enter the directory /nonexistent: No such"), "{error}");
}

/// With everything else that happens between fork and exec, and that the exec must keep.
#[test]
fn a_process_of_another_user_has_its_listeners() {
    if !setup::is_root() {
        return;
    }
    let bench = Bench::new();
    let script = "echo $(id -u) $LISTEN_PID $LISTEN_FDS $(umask)";
    let process = bench.spawn_with(0, &["sh", "-c", script], |request| {
        request.setup.account = Some(setup::account(65_533, &[65_531]));
        request.setup.output = Output::Log;
        request.setup.umask = Some(0o027);
        request.on_dispatcher_loss = OnDispatcherLoss::Stop;
        request.listeners = two().0;
    });
    let pid = bench.started();
    assert_eq!(bench.exit_text(), "exit status 0");
    let lines = bench.spawner.last_output(process);
    let texts: Vec<&str> = lines.iter().map(|line| line.text.as_str()).collect();
    assert_eq!(texts, [format!("65533 {pid} 2 0027")]);
}

/// The limit of the process may be lower than the numbers of this process's own descriptors.
#[test]
fn a_low_limit_of_open_files_leaves_the_listeners() {
    let limit = Limit { soft: 8, hard: 8 };
    let (listeners, _) = two();
    let others: Vec<_> = (0..8).map(|_| listener()).collect();
    let bench = Bench::new();
    bench.spawn_with(0, &["sh", "-c", "exit $(($LISTEN_FDS + 7))"], |request| {
        request.setup.limits.open_files = Some(limit);
        request.listeners = listeners;
    });
    bench.started();
    assert_eq!(bench.exit_text(), "exit status 9");
    drop(others);
}

#[test]
fn nothing_of_the_listeners_stays() {
    let bench = Bench::new();
    let (fd, address, inode) = listener();
    let listeners = Listeners::new([("web".to_owned(), fd)]);
    for number in 0..100 {
        let program = if number % 2 == 0 { "true" } else { "/nonexistent/server" };
        bench.spawn_with(number, &[program], |request| request.listeners = listeners.clone());
        match bench.next() {
            Report::Spawned { .. } => assert_eq!(bench.exit_text(), "exit status 0"),
            Report::SpawnFailed { .. } => assert_eq!(program, "/nonexistent/server"),
            other => panic!("{other:?}"),
        }
    }
    becomes("copies of the listener stay", || open_here(inode) == 1);
    bench.spawn_with(0, &["sleep", "1000"], |request| request.listeners = listeners);
    bench.started();
    // Only the process has it now.
    becomes("the dispatcher keeps it", || open_here(inode) == 0);
    TcpStream::connect(address).expect("the process has it");
    bench.spawner.stop(PATIENCE);
    bench.exit_text();
    // What another test starts at this moment has all descriptors until it runs its program.
    becomes("a process has it", || TcpStream::connect(address).is_err());
}
