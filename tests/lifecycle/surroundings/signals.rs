//! Signals, from the start of `main` to the end.
#![allow(unsafe_code, reason = "the test sends signals that have no name")]

use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use test_support::*;

/// A signal mask from `/proc/PID/status`; zero if there is no such process.
fn mask(pid: i32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or(":\t0");
    u64::from_str_radix(line.trim_start_matches([':', '\t']), 16).unwrap()
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: plain numbers.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "signal {signal}");
}

/// A dispatcher that waits for its configuration: a pipe without data.
fn waiting_for_its_configuration(dir: &Path) -> Process {
    let path = dir.join("dispatcher.toml");
    let _ = std::fs::remove_file(&path);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
    let mut command = Command::new(dispatcher_bin());
    command.args(["run", "--config"]).arg(&path).stderr(log).stdout(Stdio::null());
    let process = Process::start("dispatcher", command.env_remove("NOTIFY_SOCKET"));
    wait_until("main to begin", || mask(process.pid(), "SigCgt") & bit(libc::SIGHUP) != 0);
    process
}

#[test]
fn while_it_starts_hup_does_not_end_it_and_term_does() {
    let temp = tempfile::tempdir().unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT] {
        let mut process = waiting_for_its_configuration(temp.path());
        process.signal(Signal::SIGHUP);
        process.signal(signal);
        // An ordered stop is no failure.
        assert_eq!(process.wait().code(), Some(0), "{signal}");
    }

    let process = waiting_for_its_configuration(temp.path());
    process.signal(Signal::SIGHUP);
    let text = configure(&one_pool(""));
    let text = std::fs::read_to_string(text.path().join("dispatcher.toml")).unwrap();
    let old = text.lines().next().unwrap().split('"').nth(1).unwrap();
    let old = Path::new(old).parent().unwrap().to_str().unwrap();
    let text = text.replace(old, temp.path().to_str().unwrap());
    let fifo = temp.path().join("dispatcher.toml");
    std::fs::File::options().write(true).open(&fifo).unwrap().write_all(text.as_bytes()).unwrap();
    let log = || std::fs::read_to_string(temp.path().join("log")).unwrap();
    wait_until("it to serve", || log().contains("event=ready"));
    // A signal that came during the start takes effect now: the dispatcher reloads.
    wait_until("the reload", || log().contains("event=reloading by=SIGHUP"));
    let again = std::fs::File::options().write(true).open(&fifo);
    again.unwrap().write_all(text.as_bytes()).unwrap();
    wait_until("its end", || log().contains("event=reloaded by=SIGHUP"));
    drop(process);
}

#[test]
fn signals_without_a_meaning_end_nothing() {
    let (mut dispatcher, _) = start_one_pool("");
    let faults = [
        libc::SIGILL,
        libc::SIGTRAP,
        libc::SIGABRT,
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGSEGV,
        libc::SIGSYS,
    ];
    let stops = [libc::SIGKILL, libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
    let ordered = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGUSR1];
    let rest = |signal: &i32| ![&faults[..], &stops, &ordered].concat().contains(signal);
    for signal in (1..=64).filter(rest) {
        kill(dispatcher.process.pid(), signal);
        // The signal is handled before the answer.
        dispatcher.status();
    }
    assert!(dispatcher.process.running());
    assert!(dispatcher.stop().success());
}

#[test]
fn processes_start_with_default_dispositions_and_an_empty_mask() {
    if Command::new("env")
        .args(["--ignore-signal=HUP", "true"])
        .status()
        .is_ok_and(|s| !s.success())
    {
        return skip("needs an env with --ignore-signal");
    }
    let program = example("test-worker");
    let temp = configure(&one_pool(&format!(
        "[pool.web.spawn]\ncommand = [{:?}, \"blocking\"]",
        program.to_str().unwrap()
    )));
    let mut command = Command::new("env");
    command.args(["--ignore-signal=HUP,CHLD,TTOU,USR1", "--block-signal=TERM,HUP,CHLD,USR2"]);
    command.args(["-u", "NOTIFY_SOCKET"]).arg(dispatcher_bin());
    let mut dispatcher = Dispatcher::start_as(temp.path(), &mut command);
    dispatcher.wait_joined("web", 1);
    let pid = pool(&dispatcher.status(), "web").workers[0].pid;
    // The worker's own runtime ignores SIGPIPE.
    assert_eq!(mask(pid, "SigIgn") & !bit(libc::SIGPIPE), 0);
    assert_eq!(mask(pid, "SigBlk"), 0);
    // A signal that was ignored or blocked is handled by the dispatcher.
    dispatcher.process.signal(Signal::SIGHUP);
    wait_for_log(&dispatcher, "event=reloaded by=SIGHUP");
    assert!(dispatcher.stop().success());
}

/// The messages to the service manager: the first line of each.
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn told(&self) -> String {
        let mut bytes = [0; 1024];
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let count = self.socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..count]).lines().next().unwrap_or_default().to_owned()
    }

    fn is_told(&self, all: &[&str]) {
        for wanted in all {
            assert_eq!(self.told(), *wanted);
        }
    }
}

#[test]
fn a_service_manager_at_an_abstract_socket() {
    let name = format!("dispatcher-manager-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let manager = Manager { socket: UnixDatagram::bind_addr(&address).unwrap() };
    let temp = configure(&one_pool(""));
    let mut command = Command::new(dispatcher_bin());
    command.env("NOTIFY_SOCKET", format!("@{name}"));
    let mut dispatcher = Dispatcher::start_as(temp.path(), &mut command);
    manager.is_told(&["READY=1"]);
    dispatcher.process.signal(Signal::SIGHUP);
    manager.is_told(&["RELOADING=1", "READY=1"]);
    write_config(temp.path(), "no configuration");
    dispatcher.process.signal(Signal::SIGHUP);
    manager.is_told(&["RELOADING=1", "READY=1"]);
    assert!(dispatcher.stop().success());
    manager.is_told(&["STOPPING=1"]);
}

/// Reloads by SIGHUP work while no thread can be made, and afterwards; processes are started again
/// when that is possible.
#[test]
fn a_shortage_of_threads_ends_no_task() {
    use std::os::unix::process::CommandExt;
    if !rustix::process::geteuid().is_root() {
        return skip("only root can start a dispatcher as another user");
    }
    if Command::new("prlimit").arg("--version").output().is_err() {
        return skip("needs prlimit");
    }
    // The limit counts the processes of a user, so this user must have no others.
    let user = 700_000 + std::process::id() % 100_000;
    let temp = configure(&one_pool("[pool.web.spawn]\ncommand = [\"sleep\", \"1000\"]"));
    std::os::unix::fs::chown(temp.path(), Some(user), Some(user)).unwrap();
    let copy = temp.path().join("dispatcher");
    assert!(Command::new("cp").arg(dispatcher_bin()).arg(&copy).status().unwrap().success());
    let notify = temp.path().join("notify");
    let manager = Manager { socket: UnixDatagram::bind(&notify).unwrap() };
    std::fs::set_permissions(&notify, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let log = std::fs::File::create(temp.path().join("log")).unwrap();
    let mut command = Command::new(copy);
    command.args(["run", "--config"]).arg(temp.path().join("dispatcher.toml"));
    command.env("NOTIFY_SOCKET", &notify).stderr(log).uid(user).gid(user);
    let dispatcher = Dispatcher::start_by(temp.path(), &mut command);
    manager.is_told(&["READY=1"]);
    wait_for_log(&dispatcher, "event=process_started");
    let pid = dispatcher.process.pid().to_string();
    // Root may lack the permission to do this to a process of another user; that user has it.
    let limit = |most: &str| {
        let mut prlimit = Command::new("prlimit");
        prlimit.args(["--pid", &pid, &format!("--nproc={most}:")]).uid(user).gid(user);
        assert!(prlimit.status().unwrap().success());
    };
    limit("1");
    let first = children_of(dispatcher.process.pid())[0];
    kill(first, libc::SIGKILL);
    wait_for_log(&dispatcher, "event=process_not_started");
    for number in 1..=3 {
        dispatcher.process.signal(Signal::SIGHUP);
        manager.is_told(&["RELOADING=1", "READY=1"]);
        wait_until("the reload", || {
            dispatcher.log().matches("event=reloaded by=SIGHUP").count() == number
        });
    }
    limit("1000");
    wait_until("the process to be started again", || {
        dispatcher.log().matches("event=process_started").count() == 2
    });
    dispatcher.process.signal(Signal::SIGHUP);
    manager.is_told(&["RELOADING=1", "READY=1"]);
    let log = dispatcher.log();
    assert!(!log.contains("panicked") && !log.contains("task_failed"), "{log}");
}

/// A file size limit for the log has the effect of a full disk; once it is lifted, the log reports
/// the missing lines.
#[test]
fn a_log_at_the_limit_of_the_file_size() {
    let (dispatcher, _) = start_one_pool("");
    let path = dispatcher.dir.join("log");
    let limit = |most: Option<u64>| {
        let pid = rustix::process::Pid::from_raw(dispatcher.process.pid());
        let wanted = rustix::process::Rlimit { current: most, maximum: None };
        rustix::process::prlimit(pid, rustix::process::Resource::Fsize, wanted).unwrap();
    };
    let reload = || {
        let code = http_post(&dispatcher.admin(), "/v1/reload");
        assert_eq!(code, 200);
    };
    // In the middle of a line.
    limit(Some(std::fs::metadata(&path).unwrap().len() + 70));
    while dispatcher.status().meters.log_lines_dropped < 5 {
        reload();
    }
    let full = dispatcher.log();
    assert!(!full.ends_with('\n'), "the last line is cut: {full}");
    limit(None);
    // By itself, without another event.
    wait_for_log(&dispatcher, "event=log_lines_dropped count=");
    reload();
    wait_until("the last lines", || dispatcher.log().ends_with("changed=\"\"\n"));
    for line in dispatcher.log().lines() {
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(humantime::parse_rfc3339(time).is_ok(), "{line}");
        assert_eq!(rest.matches("event=").count(), 1, "{line}");
    }
}

/// The code of an empty POST.
fn http_post(socket: &Path, path: &str) -> u16 {
    use std::io::Read;
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}
