//! `dispatcher serve`: a server as several processes, without a configuration.

use std::fs::File;
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use dispatcher::api::status::{PoolStatus, Status};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use test_support::{Process, dispatcher_bin, skip, wait_for, wait_until};

use crate::place::*;

/// A running `dispatcher serve` with keepers, in a directory of its own.
struct Serve {
    process: Process,
    dir: TempDir,
    /// What it printed.
    printed: String,
}

/// `dispatcher serve` at the public address; the last word is the keepers' program.
fn command(dir: &TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(dispatcher_bin());
    command.arg("serve").arg("--listen").arg(PUBLIC.to_string()).args(arguments);
    command.args(["--", "python3", "-c", &KEEPER.replace('{', "{{").replace('}', "}}")]);
    command.args(["{addr}", "{port}"]);
    command.env_remove("NOTIFY_SOCKET").env("XDG_RUNTIME_DIR", dir.path()).stdin(Stdio::null());
    command
}

impl Serve {
    fn start(arguments: &[&str]) -> Serve {
        let dir = tempfile::tempdir().unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        Serve::start_with(dir, arguments, log.into())
    }

    fn start_with(dir: TempDir, arguments: &[&str], stderr: Stdio) -> Serve {
        let out = dir.path().join("out");
        let mut command = command(&dir, arguments);
        command.stdout(File::create(&out).unwrap()).stderr(stderr);
        let mut process = Process::start("serve", &mut command);
        drop(command);
        let printed = wait_for("what to try", || {
            let log = || std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
            assert!(process.running(), "{}", log());
            let text = std::fs::read_to_string(&out).unwrap();
            text.contains("scale").then_some(text).filter(|text| text.ends_with('\n'))
        });
        Serve { process, dir, printed }
    }

    /// What the suggested status command says.
    fn status(&self) -> Status {
        let line = self.printed.lines().find(|line| line.contains(" status ")).unwrap();
        let out = Command::new("sh").args(["-c", &format!("{line} --json")]).output().unwrap();
        serde_json::from_slice(&out.stdout).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    /// The pool, once it has so many active workers.
    fn ready(&self, count: usize) -> PoolStatus {
        wait_for("the workers", || {
            let status = self.status();
            let pool = status.pools[0].clone();
            (active(&pool).len() == count && pool.workers.len() == count).then_some(pool)
        })
    }

    /// The directories that it has made.
    fn directories(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
    }
}

fn finish(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn one_command_serves_evenly_and_stops_in_order() {
    if !enter() {
        return;
    }
    let mut serve = Serve::start(&["--workers", "3", "--name", "web"]);
    let pool = serve.ready(3);
    assert_eq!((pool.name.as_str(), pool.policy.as_str()), ("web", "least-connections"));
    let held: Vec<TcpStream> = (0..12).map(|_| connect()).collect();
    wait_until("each to have its share", || {
        active(&serve.status().pools[0]).iter().all(|(_, load)| *load == 4)
    });
    let log = std::fs::read_to_string(serve.dir.path().join("log")).unwrap();
    assert!(log.contains("dispatcher: steering: the kernel chooses among 3 processes"), "{log}");
    assert_eq!(serve.directories().len(), 1);

    // SIGHUP replaces the processes; clients keep what they have.
    let before = processes_of(&pool);
    serve.process.signal(Signal::SIGHUP);
    let renewed = wait_for("other processes", || {
        let pool = serve.status().pools[0].clone();
        let active = pool.workers.iter().filter(|worker| worker.state == "active");
        let active: Vec<i32> = active.map(|worker| worker.pid).collect();
        let all = active.len() == 3 && active.iter().all(|pid| !before.contains(pid));
        all.then_some(active)
    });
    for _ in 0..6 {
        connect();
    }
    drop(held);
    wait_until("the former processes to end", || before.iter().all(|&pid| !is_alive(pid)));

    serve.process.signal(Signal::SIGINT);
    assert!(serve.process.wait().success());
    assert!(renewed.iter().all(|&pid| !is_alive(pid)));
    assert_eq!(serve.directories(), [] as [PathBuf; 0], "nothing is left");
    assert!(TcpStream::connect(PUBLIC).is_err());
}

/// Commands find the only one that runs, and name the paths of several.
#[test]
fn commands_find_it_without_a_path() {
    if !enter() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let status = || {
        let mut command = Command::new(dispatcher_bin());
        command.arg("status").env("XDG_RUNTIME_DIR", dir.path()).env_remove("DISPATCHER_ADMIN");
        let Output { status, stdout, stderr } = command.output().unwrap();
        (status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
    };
    let start = |port: &str| {
        let mut command = Command::new(dispatcher_bin());
        command.args(["serve", "--workers", "1", "--name", &format!("p{port}"), "--listen", port]);
        command.args(["--", "python3", "-c", &KEEPER.replace('{', "{{").replace('}', "}}")]);
        command.args(["{addr}", "{port}"]).env("XDG_RUNTIME_DIR", dir.path());
        command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).stdout(Stdio::null());
        let process = Process::start("serve", command.stderr(Stdio::null()));
        let at = (std::net::Ipv4Addr::LOCALHOST, port.trim_start_matches(':').parse().unwrap());
        wait_until("a client to be served", || {
            let stream = TcpStream::connect(at);
            stream.is_ok_and(|mut stream| stream.read_exact(&mut [0; 6]).is_ok())
        });
        process
    };
    let _first = start("8000");
    let (code, text) = status();
    assert!(code == Some(0) && text.contains("p8000"), "{text}");
    let mut second = start(":8001");
    let (code, text) = status();
    assert_eq!((code, text.matches("--admin ").count()), (Some(64), 2), "{text}");
    // The socket that a killed one leaves is no running one.
    second.kill();
    let (code, text) = status();
    assert!(code == Some(0) && text.contains("p8000"), "{text}");
}

/// IPv4 and IPv6 at the same port.
#[test]
fn it_serves_both_families() {
    if !enter() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program = "import socket, sys\n\
                   family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n\
                   listener = socket.socket(family)\n\
                   listener.bind((sys.argv[1], int(sys.argv[2])))\n\
                   listener.listen()\n\
                   while True: listener.accept()[0].sendall(b'hello ')\n";
    let mut command = Command::new(dispatcher_bin());
    command.args(["serve", "--workers", "2", "--listen", "8000", "--listen", "[::1]:8000", "--"]);
    command.args(["python3", "-c", program, "{addr}", "{port}"]);
    command.env_remove("NOTIFY_SOCKET").env("XDG_RUNTIME_DIR", dir.path()).stdin(Stdio::null());
    let _process = Process::start("serve", command.stdout(Stdio::null()).stderr(Stdio::null()));
    for address in ["127.0.0.1:8000", "[::1]:8000"] {
        wait_until("a client to be served", || {
            let stream = TcpStream::connect(address);
            stream.is_ok_and(|mut stream| stream.read_exact(&mut [0; 6]).is_ok())
        });
    }
}

#[test]
fn it_ends_with_its_terminal() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    if !enter() {
        return;
    }
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let mut options = File::options();
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOCTTY);
    let slave = options.read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut serve = Serve::start_with(dir, &["--workers", "1"], slave.into());
    let processes = processes_of(&serve.ready(1));
    // What it has written does not fill the terminal meanwhile.
    let mut bytes = [0; 65_536];
    assert!(File::from(master).read(&mut bytes).unwrap() > 0);
    serve.process.signal(Signal::SIGHUP);
    assert!(serve.process.wait().success());
    assert!(processes.iter().all(|&pid| !is_alive(pid)));
}

#[test]
fn without_capabilities_it_names_them_and_ends() {
    if !nix::unistd::geteuid().is_root() {
        skip("becoming an ordinary user needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = command(&dir, &[]);
    let (code, message) = finish(command.uid(65_534).gid(65_534));
    assert_eq!(code, Some(69), "{message}");
    for part in ["CAP_BPF is missing", "CAP_NET_ADMIN is missing", "sudo setcap cap_bpf"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(message.contains(dispatcher_bin()), "{message}");
}

#[test]
fn a_command_without_a_place_for_the_address_is_refused() {
    let run =
        |words: &[&str]| finish(Command::new(dispatcher_bin()).args(["serve", "--"]).args(words));
    let (code, message) = run(&["python3", "-m", "http.server"]);
    assert_eq!(code, Some(64), "{message}");
    assert!(message.contains("dispatcher serve -- python3 --host {addr} --port {port}"));
    let (code, message) = run(&["python3", "{prt}", "{port}"]);
    assert!(code != Some(0) && !message.contains("serve:"), "{message}");
    let (code, _) = run(&[]);
    assert_eq!(code, Some(64));
}

/// The printed configuration is a good one.
#[test]
fn it_prints_the_configuration_that_it_stands_for() {
    let dir = tempfile::tempdir().unwrap();
    let out = command(&dir, &["--print-config", "--policy", "hash"]).output().unwrap();
    assert!(out.status.success());
    let file = dir.path().join("dispatcher.toml");
    std::fs::write(&file, &out.stdout).unwrap();
    let out = Command::new(dispatcher_bin()).arg("check").arg(&file).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && text.contains("the kernel chooses by hash"), "{text}");
}

/// Between the opening of the listener and the start of the programs, the dispatcher's own socket
/// gets clients: none of them waits for ever.
#[test]
fn early_clients_are_not_left_waiting() {
    if !enter() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (out, log) = (dir.path().join("out"), dir.path().join("log"));
    let mut command = command(&dir, &["--workers", "1"]);
    command.stdout(File::create(&out).unwrap()).stderr(File::create(&log).unwrap());
    let _process = Process::start("serve", &mut command);
    let early = wait_for("the listener", || TcpStream::connect(PUBLIC).ok());
    early.set_read_timeout(Some(test_support::PATIENCE)).unwrap();
    let mut first = [0; 6];
    let read = (&early).read(&mut first);
    let log = || std::fs::read_to_string(&log).unwrap();
    match read {
        // The programs were quicker.
        Ok(count) => assert_eq!(&first[..count], b"hello ", "{}", log()),
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{}", log());
            wait_until("a line of the log", || log().contains("event=early_clients_reset"));
        }
    }
    wait_for("a worker", || try_connect().ok());
}
