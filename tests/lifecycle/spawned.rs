//! What processes of a pool get from `[pool.NAME.spawn]`: account, limits, placeholders, and a
//! reader of their output.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod outlive;
mod prefork;
mod recipes;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;
use test_support::reloading::{reload, run};
use test_support::*;

/// The user of most tests, as on every Linux.
const NOBODY: u32 = 65_534;

fn is_root() -> bool {
    if !geteuid().is_root() {
        skip("needs root");
    }
    geteuid().is_root()
}

/// A directory that every user may search, with a copy of the test worker that every user may run.
fn directory() -> TempDir {
    let temp = tempfile::tempdir().unwrap();
    // See `unprivileged` for why `cp` makes the copy.
    let copied = Command::new("cp").arg(example("test-worker")).arg(temp.path()).status().unwrap();
    assert!(copied.success());
    for path in [temp.path(), &temp.path().join("test-worker")] {
        std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    temp
}

/// One pool whose processes run this script with these keys; `WORKER` is the test worker.
fn scripted(dir: &Path, script: &str, keys: &str) -> String {
    let worker = format!("exec {}/test-worker blocking", dir.display());
    let script = script.replace("WORKER", &worker);
    one_pool(&format!("[pool.web.spawn]\ncommand = [\"/bin/sh\", \"-c\", {script:?}]\n{keys}"))
}

fn start(temp: TempDir, body: &str) -> Dispatcher {
    write_config(temp.path(), body);
    let mut dispatcher = Dispatcher::start_in(temp.path());
    dispatcher.keep(temp);
    dispatcher
}

/// The process of a worker.
fn pid(dispatcher: &Dispatcher, name: &str) -> i32 {
    worker(&dispatcher.status(), name).expect("joined").pid
}

/// The words of a line of a file of `/proc/PID`.
#[track_caller]
fn words(pid: i32, file: &str, line: &str) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find_map(|other| other.strip_prefix(line));
    line.expect("a line").split_whitespace().map(str::to_owned).collect()
}

#[test]
fn a_worker_serves_as_another_user_within_limits() {
    if !is_root() {
        return;
    }
    let temp = directory();
    let script = "echo mask $(umask); echo \\\"ready\\\" >&2; echo $HOME {n} {pool}; WORKER";
    let keys = "user = \"nobody\"\ngroup = 65534\numask = \"0027\"\noutput = \"log\"\nprocesses = 2\n\
                limits = { nofile = \"500:600\", core = 0, memory = \"4GiB\" }";
    let mut dispatcher = start(temp, &scripted(Path::new("DIR"), script, keys));
    dispatcher.wait_joined("web", 2);
    let mut clients: Vec<Client> =
        (0..4).map(|_| Client::connect(dispatcher.address("web")).unwrap()).collect();
    assert_eq!(tally(&clients).into_values().collect::<Vec<_>>(), [2, 2]);
    clients.iter_mut().for_each(|client| client.echo("as another user"));

    let pid = pid(&dispatcher, "web-2");
    let nobody = NOBODY.to_string();
    assert_eq!(words(pid, "status", "Uid:"), vec![nobody.clone(); 4]);
    assert_eq!(words(pid, "status", "Gid:"), vec![nobody.clone(); 4]);
    assert_eq!(words(pid, "status", "Groups:"), [nobody]);
    assert_eq!(words(pid, "status", "Umask:"), ["0027"]);
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(words(pid, "status", set), ["0000000000000000"], "{set}");
    }
    assert_eq!(words(pid, "limits", "Max open files")[..2], ["500", "600"]);
    assert_eq!(words(pid, "limits", "Max core file size")[..2], ["0", "0"]);
    assert_eq!(words(pid, "limits", "Max address space")[..2], ["4294967296", "4294967296"]);

    let line = |stream: &str, line: &str| {
        format!("event=process_output pool=web name=web-2 pid={pid} stream={stream} line={line}")
    };
    wait_for_log(&dispatcher, &line("stdout", "\"mask 0027\""));
    wait_for_log(&dispatcher, &line("stderr", "\"\\\"ready\\\"\""));
    wait_for_log(&dispatcher, &line("stdout", "\"/nonexistent 2 web\""));
    drop(clients);
    assert!(dispatcher.stop().success());
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the stop left it");
}

/// The output of a command that is refused because of its configuration.
fn refused(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{text}");
    text
}

#[test]
fn another_user_is_refused_clearly_without_the_permission() {
    let temp = directory();
    write_config(temp.path(), &scripted(Path::new("DIR"), "WORKER", "user = \"root\""));
    let file = temp.path().join("dispatcher.toml");
    std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    for words in [vec!["check"], vec!["run", "--config"]] {
        let text = refused(unprivileged(temp.path()).args(words).arg(&file));
        let lines: Vec<&str> = text.lines().collect();
        let own = if geteuid().is_root() { NOBODY } else { geteuid().as_raw() };
        let expected = format!(
            "the dispatcher may not start processes as another user: it runs as user {own} without \
             CAP_SETUID, CAP_SETGID, CAP_KILL"
        );
        assert!(lines[0].contains(&format!("{}:11:8: ", file.display())), "{text}");
        assert!(!text.contains("2 mistakes"), "{text}");
        assert!(lines[0].ends_with(&expected), "{text}");
        assert!(lines[1].ends_with("user = \"root\"") && lines[2].ends_with("^^^^^^"), "{text}");
        assert!(text.contains("help: run it (and this check) as root, give it"), "{text}");
    }
}

#[test]
fn a_reload_without_the_permission_changes_nothing() {
    let temp = directory();
    let dir = temp.path().to_owned();
    let body = |keys: &str| scripted(Path::new("DIR"), "WORKER", keys);
    write_config(&dir, &body(""));
    let mut command = unprivileged(&dir);
    // It makes its sockets there.
    if geteuid().is_root() {
        std::os::unix::fs::chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let file = dir.join("dispatcher.toml");
    std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    let mut dispatcher = Dispatcher::start_as(&dir, command.env_remove("NOTIFY_SOCKET"));
    dispatcher.keep(temp);
    dispatcher.wait_joined("web", 1);
    let before = pid(&dispatcher, "web-1");
    write_config(&dir, &body("user = \"root\""));
    let output = run(&dispatcher, &["reload"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("may not start processes as another user"), "{text}");
    assert_eq!(pid(&dispatcher, "web-1"), before);
    Client::connect(dispatcher.address("web")).unwrap().echo("still served");
}

/// Capabilities of a dispatcher that is not root do not reach the processes of another user.
#[test]
fn a_dispatcher_with_capabilities_passes_none_on() {
    if !is_root() {
        return;
    }
    if Command::new("setpriv").arg("--version").output().is_err() {
        return skip("needs setpriv");
    }
    let temp = directory();
    let dir = temp.path().to_owned();
    write_config(&dir, &scripted(&dir, "WORKER", "user = 65533\ngroup = 65532\noutput = \"log\""));
    // Copies the program to the directory.
    let program = unprivileged(&dir).get_program().to_owned();
    std::os::unix::fs::chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
    let few = "+setuid,+setgid,+kill";
    let with = |capabilities: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(format!("--inh-caps={capabilities}"));
        command.arg(format!("--ambient-caps={capabilities}")).arg(&program);
        command
    };
    // A dispatcher that adopts a process of another user needs one more to read its output.
    let body = std::fs::read_to_string(dir.join("dispatcher.toml")).unwrap();
    let serve = dir.join("serve.toml");
    std::fs::write(&serve, format!("{body}\non_dispatcher_loss = \"serve\"\n")).unwrap();
    std::fs::set_permissions(&serve, Permissions::from_mode(0o644)).unwrap();
    for (capabilities, warns) in [(few.to_owned(), true), (format!("{few},+sys_ptrace"), false)] {
        let output = with(&capabilities).arg("check").arg(&serve).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{text}");
        assert_eq!(text.contains("it lacks CAP_SYS_PTRACE"), warns, "{text}");
    }
    let mut command = with(few);
    let mut dispatcher = Dispatcher::start_as(&dir, command.env_remove("NOTIFY_SOCKET"));
    dispatcher.keep(temp);
    dispatcher.wait_joined("web", 1);
    let of_dispatcher = words(dispatcher.process.pid(), "status", "CapAmb:");
    assert_ne!(of_dispatcher, ["0000000000000000"], "the test gave it some");
    let pid = pid(&dispatcher, "web-1");
    assert_eq!(words(pid, "status", "Uid:"), ["65533"; 4]);
    assert_eq!(words(pid, "status", "Gid:"), ["65532"; 4]);
    assert_eq!(words(pid, "status", "Groups:"), ["65532"]);
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(words(pid, "status", set), ["0000000000000000"], "{set}");
    }
    Client::connect(dispatcher.address("web")).unwrap().echo("served");
    // It can end the process of another user.
    assert!(dispatcher.stop().success());
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the stop left it");
}

/// A process without a `user` keeps what its service may need, but not what the kernel's choice of
/// workers needs.
#[test]
fn capabilities_for_steering_stay_with_the_dispatcher() {
    if !is_root() {
        return;
    }
    if Command::new("setpriv").arg("--version").output().is_err() {
        return skip("needs setpriv");
    }
    let temp = directory();
    let dir = temp.path().to_owned();
    write_config(&dir, &scripted(&dir, "WORKER", ""));
    let program = unprivileged(&dir).get_program().to_owned();
    std::os::unix::fs::chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    for set in ["inh", "ambient"] {
        command.arg(format!("--{set}-caps=+bpf,+net_admin,+sys_ptrace,+net_bind_service"));
    }
    command.arg(&program).env_remove("NOTIFY_SOCKET");
    let mut dispatcher = Dispatcher::start_as(&dir, &mut command);
    dispatcher.keep(temp);
    dispatcher.wait_joined("web", 1);
    let bits = |pid, set| u64::from_str_radix(&words(pid, "status", set)[0], 16).unwrap();
    let few = 1 << 10;
    let own = 1 << 39 | 1 << 12 | 1 << 19;
    assert_eq!(bits(dispatcher.process.pid(), "CapAmb:"), own | few, "the test gave it these");
    let pid = pid(&dispatcher, "web-1");
    for set in ["CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(bits(pid, set), few, "{set}");
    }
}

#[test]
fn a_step_that_fails_is_named_and_tried_again() {
    if !is_root() {
        return;
    }
    let temp = directory();
    let closed = temp.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, Permissions::from_mode(0o700)).unwrap();
    let keys = "user = \"nobody\"\ngroup = 65534\ndirectory = \"DIR/closed\"";
    let dispatcher = start(temp, &scripted(Path::new("DIR"), "WORKER", keys));
    let error = format!(
        "event=process_not_started pool=web process=1 program=/bin/sh error=\"cannot enter the \
         directory {} as user 65534 (nobody): Permission denied (os error 13)\"",
        closed.display()
    );
    wait_for_log(&dispatcher, &error);
    std::fs::set_permissions(&closed, Permissions::from_mode(0o755)).unwrap();
    dispatcher.wait_joined("web", 1);
}

#[test]
fn a_restart_after_a_reload_applies_its_settings() {
    let temp = directory();
    let body = |mask: &str| {
        let keys = format!("umask = \"{mask}\"\nenvironment = {{ MASK = \"{{name}}-{mask}\" }}");
        scripted(Path::new("DIR"), "WORKER", &keys)
    };
    let dispatcher = start(temp, &body("0022"));
    dispatcher.wait_joined("web", 1);
    let first = pid(&dispatcher, "web-1");
    reload(&dispatcher, &body("0077"));
    assert_eq!(pid(&dispatcher, "web-1"), first);
    assert_eq!(words(first, "status", "Umask:"), ["0022"]);
    let next = |before: i32| {
        dispatcher.wait_status("another process", |status| {
            worker(status, "web-1").is_some_and(|worker| worker.pid != before)
        });
        pid(&dispatcher, "web-1")
    };
    // A process that ends is started with the settings that it had.
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    let second = next(first);
    assert_eq!(words(second, "status", "Umask:"), ["0022"]);
    assert!(run(&dispatcher, &["restart", "web", "--wait"]).status.success());
    let third = next(second);
    assert_eq!(words(third, "status", "Umask:"), ["0077"]);
    let environment = std::fs::read(format!("/proc/{third}/environ")).unwrap();
    assert!(environment.split(|&byte| byte == 0).any(|word| word == b"MASK=web-1-0077"));
}

#[test]
fn a_process_that_writes_without_end_disturbs_no_other() {
    let temp = directory();
    let worker = format!("exec {}/test-worker blocking", temp.path().display());
    let body = format!(
        "{}[[listener]]\nname = \"calm\"\naddress = \"127.0.0.1:0\"\npool = \"calm\"\n\n[pool.calm]\n\
         [pool.calm.spawn]\ncommand = [\"/bin/sh\", \"-c\", {:?}]\noutput = \"log\"\n",
        scripted(
            temp.path(),
            "while :; do echo a lot of noise; done & WORKER",
            "output = \"log\"\noutput_rate = 50\nprocesses = 2\n"
        ),
        format!(
            "(i=0; while [ $i -lt 40 ]; do echo calm $i; i=$((i+1)); sleep 0.05; done) & {worker}"
        ),
    );
    let mut dispatcher = start(temp, &body);
    dispatcher.wait_joined("web", 2);
    dispatcher.wait_joined("calm", 1);
    wait_for_log(&dispatcher, "event=process_output_lost pool=web name=web-1");
    wait_for_log(&dispatcher, "event=process_output_lost pool=web name=web-2");
    for pool in ["web", "calm"] {
        let mut client = Client::connect(dispatcher.address(pool)).unwrap();
        client.echo("served meanwhile");
    }
    // Not a line of the other process, nor of the dispatcher, is missing.
    for number in 0..40 {
        wait_for_log(
            &dispatcher,
            &format!(
                "name=calm-1 pid={} stream=stdout line=\"calm {number}\"",
                pid(&dispatcher, "calm-1")
            ),
        );
    }
    let log = dispatcher.log();
    assert!(!log.contains("event=process_output_lost pool=calm"), "lost");
    assert!(!log.contains("event=log_lines_dropped"), "lost");
    // At most 50 lines in a second; a run that lasts minutes has more.
    let noise = log.lines().filter(|line| line.contains("a lot of noise")).count();
    assert!(noise < 100_000, "{noise}");
    assert!(dispatcher.metric("dispatcher_process_output_lost_lines_total") > 0.0);
    assert!(dispatcher.stop().success());
}

#[test]
fn check_says_that_the_user_cannot_reach_the_socket() {
    if !is_root() {
        return;
    }
    let temp = directory();
    std::fs::set_permissions(temp.path(), Permissions::from_mode(0o700)).unwrap();
    write_config(
        temp.path(),
        &one_pool("[pool.web.spawn]\ncommand = [\"/bin/true\"]\nuser = \"nobody\"\ngroup = 65534"),
    );
    let mut command = Command::new(dispatcher_bin());
    let output = command.arg("check").arg(temp.path().join("dispatcher.toml")).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    let expected = format!(
        "user 65534 (nobody) cannot reach the dispatch socket in {}",
        temp.path().display()
    );
    assert!(text.contains(&expected), "{text}");
    assert!(text.contains("help: the processes cannot join: let the user search"), "{text}");
    let summary = String::from_utf8(output.stdout).unwrap();
    assert!(summary.contains("1 x /bin/true as user 65534 (nobody)\n"), "{summary}");
}
