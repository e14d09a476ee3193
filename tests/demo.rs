//! `dispatcher demo`, as somebody sees it who has just cloned the repository.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dispatcher::status::Status;
use nix::sys::signal::Signal;
use support::*;
use tempfile::TempDir;

/// A demo on a free port, whose directory is made in one of ours.
struct Demo {
    process: Process,
    dir: TempDir,
    /// What it printed.
    printed: String,
    address: SocketAddr,
}

impl Demo {
    fn start(arguments: &[&str]) -> Demo {
        let dir = tempfile::tempdir().unwrap();
        let file = |name| File::create(dir.path().join(name)).unwrap();
        let mut command = Command::new(dispatcher_bin());
        command.args(["demo", "--listen", "127.0.0.1:0"]).args(arguments);
        command.env_remove("NOTIFY_SOCKET").env("XDG_RUNTIME_DIR", dir.path());
        command.stdin(Stdio::null()).stdout(file("out")).stderr(file("log"));
        let mut process = Process::start("demo", &mut command);
        let printed = wait_for("what to try", || {
            let log = || std::fs::read_to_string(dir.path().join("log")).unwrap();
            assert!(process.running(), "{}", log());
            let text = std::fs::read_to_string(dir.path().join("out")).unwrap();
            text.contains("status --admin").then_some(text).filter(|text| text.ends_with('\n'))
        });
        let address = printed.split("http://").nth(1).and_then(|rest| rest.split('/').next());
        let address = address.unwrap().parse().unwrap();
        Demo { process, dir, printed, address }
    }

    /// Runs the command that it says to try, and the same for programs.
    fn status(&self) -> Status {
        let line = self.printed.lines().find(|line| line.contains("status --admin")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        let table = Command::new(words[0]).args(&words[1..]).output().unwrap();
        assert!(table.status.success() && table.stdout.starts_with(b"dispatcher "));
        let json = Command::new(words[0]).args(&words[1..]).arg("--json").output().unwrap();
        serde_json::from_slice(&json.stdout).unwrap()
    }

    fn wait_joined(&self, count: usize) -> BTreeSet<i32> {
        wait_for("the workers", || {
            let status = self.status();
            let workers = &pool(&status, "web").workers;
            (workers.len() == count).then(|| workers.iter().map(|w| w.pid).collect())
        })
    }

    /// What it made for itself.
    fn directories(&self) -> Vec<PathBuf> {
        let entries =
            std::fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir()).collect()
    }
}

/// A request on a connection that stays open.
fn get(address: SocketAddr) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET / HTTP/1.1\r\nHost: {address}\r\n\r\n").unwrap();
    let mut text = String::new();
    while !text.ends_with("\n") || text.ends_with("\r\n") {
        let mut buffer = [0; 1024];
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "ended after {text:?}");
        text.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    (stream, text.split("\r\n\r\n").nth(1).unwrap().to_owned())
}

/// The pid in `worker web-3, pid 5747, holds …`.
fn pid(answer: &str) -> i32 {
    let rest = answer.split("pid ").nth(1).expect(answer);
    rest.split(',').next().unwrap().parse().unwrap()
}

/// Whether a process is there and not just waiting to be noticed.
fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

#[test]
fn four_processes_serve_http() {
    let demo = Demo::start(&[]);
    let pids = demo.wait_joined(4);
    let mut open = Vec::new();
    for round in 1..=3 {
        let mut served = BTreeSet::new();
        for _ in 0..4 {
            let (stream, answer) = get(demo.address);
            served.insert(pid(&answer));
            let plural = if round == 1 { "" } else { "s" };
            assert!(answer.contains(&format!("holds {round} connection{plural};")), "{answer}");
            let peer = stream.local_addr().unwrap();
            assert!(answer.ends_with(&format!("you are {peer}\n")), "{answer}");
            open.push(stream);
        }
        assert_eq!(served, pids);
    }
    let status = demo.status();
    assert_eq!((loads(&status, "web"), status.accepted), ((vec![3; 4], 0), 12));
    for part in ["4 workers serve http://", "Ctrl-C stops everything", "  curl http://"] {
        assert!(demo.printed.contains(part), "{}", demo.printed);
    }
}

#[test]
fn curl_is_served() {
    if Command::new("curl").arg("--version").output().is_err() {
        return skip("needs curl");
    }
    let demo = Demo::start(&[]);
    let pids = demo.wait_joined(4);
    let url = format!("http://{}/", demo.address);
    let mut seen = BTreeSet::new();
    wait_until("answers of all four", || {
        let output = Command::new("curl").args(["-sS", "--max-time", "60", &url]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        seen.insert(pid(std::str::from_utf8(&output.stdout).unwrap()));
        seen.len() == 4
    });
    assert_eq!(seen, pids);
}

#[test]
fn as_many_workers_and_where_one_likes() {
    let dir = tempfile::tempdir().unwrap();
    let admin = dir.path().join("mine.sock");
    let mut demo = Demo::start(&["--workers", "2", "--admin", admin.to_str().unwrap()]);
    assert_eq!(demo.wait_joined(2).len(), 2);
    assert!(demo.printed.starts_with("2 workers serve http://"), "{}", demo.printed);
    assert!(demo.printed.contains(&format!("status --admin {}", admin.display())));
    demo.process.signal(Signal::SIGTERM);
    assert!(demo.process.wait().success());
    assert!(!admin.exists());
}

#[test]
fn ctrl_c_stops_everything() {
    let mut demo = Demo::start(&[]);
    let pids = demo.wait_joined(4);
    // Open connections do not keep it.
    let _open: Vec<_> = (0..8).map(|_| get(demo.address)).collect();
    assert_eq!(demo.directories().len(), 1);
    assert!(pids.iter().all(|&pid| runs(pid)));
    demo.process.signal(Signal::SIGINT);
    assert!(demo.process.wait().success());
    assert!(!pids.iter().any(|&pid| Path::new(&format!("/proc/{pid}")).exists()));
    assert_eq!(demo.directories(), [] as [PathBuf; 0]);
    assert!(TcpStream::connect(demo.address).is_err());
}

#[test]
fn a_killed_demo_leaves_no_worker() {
    let mut demo = Demo::start(&[]);
    let pids = demo.wait_joined(4);
    let _open: Vec<_> = (0..8).map(|_| get(demo.address)).collect();
    demo.process.kill();
    wait_until("the workers' end", || !pids.iter().any(|&pid| runs(pid)));
}

#[test]
fn a_killed_worker_is_replaced() {
    let demo = Demo::start(&["--workers", "2"]);
    let before = demo.wait_joined(2);
    let victim = *before.first().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    let after = wait_for("a new one", || {
        let pids = demo.wait_joined(2);
        (!pids.contains(&victim)).then_some(pids)
    });
    assert_eq!(before.intersection(&after).count(), 1);
    assert_eq!((0..2).map(|_| get(demo.address)).map(|(_, answer)| pid(&answer)).len(), 2);
}
