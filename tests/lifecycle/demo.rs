//! `dispatcher demo`, used as the README describes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dispatcher::api::status::Status;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use test_support::*;

/// A demo on a free port, in a temporary directory.
struct Demo {
    process: Process,
    dir: TempDir,
    /// What it printed.
    printed: String,
    address: SocketAddr,
}

impl Demo {
    fn start(arguments: &[&str]) -> Demo {
        Demo::start_in("demo", arguments)
    }

    /// Starts a demo in a directory of this name.
    fn start_in(name: &str, arguments: &[&str]) -> Demo {
        let dir = tempfile::Builder::new().prefix(name).tempdir().unwrap();
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

    /// The suggested command that contains this text.
    fn line(&self, with: &str) -> &str {
        self.printed.lines().find(|line| line.contains(with)).expect(with)
    }

    /// Runs the suggested status command, and the same with JSON output.
    fn status(&self) -> Status {
        let line = self.line("status --admin");
        assert!(shell(line).starts_with("dispatcher "));
        serde_json::from_str(&shell(&format!("{line} --json"))).unwrap()
    }

    fn wait_joined(&self, count: usize) -> BTreeSet<i32> {
        wait_for("the workers", || {
            let status = self.status();
            let workers = &pool(&status, "web").workers;
            (workers.len() == count).then(|| workers.iter().map(|w| w.pid).collect())
        })
    }

    /// The directories that the demo has made.
    fn directories(&self) -> Vec<PathBuf> {
        let entries =
            std::fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir()).collect()
    }
}

/// The output of a line typed into a shell.
#[track_caller]
fn shell(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
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

/// Whether a process exists and is no zombie.
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

/// Eight more clients that stay.
fn eight(demo: &Demo) -> Vec<(TcpStream, String)> {
    (0..8).map(|_| get(demo.address)).collect()
}

#[test]
fn it_has_a_directory_for_messages_between_workers() {
    let demo = Demo::start(&["--workers", "1"]);
    wait_until("the directory", || demo.status().relay.is_some_and(|relay| relay.state == "up"));
    let numbers = shell(demo.line("relay stats"));
    assert!(numbers.lines().any(|line| line.starts_with("members ")), "{numbers}");
}

#[test]
fn the_line_it_prints_drains_a_worker() {
    // The name needs quotes in a shell.
    let demo = Demo::start_in("it's a place", &[]);
    demo.wait_joined(4);
    let before = eight(&demo);
    let of = |status: &Status| worker(status, "web-1").cloned().unwrap();
    let (one, line) = (of(&demo.status()), demo.line("drain web/web-1"));
    let said = shell(line);
    assert_eq!(said, format!("worker {} (web/web-1): draining, 2 connections\n", one.id));
    assert!(shell(demo.line("status --admin")).lines().any(|row| {
        let words: Vec<&str> = row.split_whitespace().collect();
        words.starts_with(&["web", "web-1", "draining"])
    }));
    // Its connections stay; no new client comes to it, although it has the fewest.
    let after: Vec<_> = eight(&demo).into_iter().chain(eight(&demo)).collect();
    assert!(after.iter().all(|(_, answer)| pid(answer) != one.pid), "{after:?}");
    let drained = of(&demo.status());
    assert_eq!((&*drained.state, drained.load, drained.taken), ("draining", 2, one.taken));
    drop(before);
    wait_until("its clients to be gone", || of(&demo.status()).load == 0);
    assert_eq!(of(&demo.status()).pid, one.pid, "the process stays");
    let said = shell(&line.replace(" drain ", " resume "));
    assert_eq!(said, format!("worker {} (web/web-1): active, 0 connections\n", one.id));
    assert_eq!(pid(&get(demo.address).1), one.pid, "the least loaded");
}

/// The commands of a part of the README, and their outputs there.
fn readme(heading: &str) -> Vec<(String, Vec<String>)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(path).unwrap();
    let part = text.split(&format!("## {heading}\n")).nth(1).unwrap();
    let part = part.split("\n## ").next().unwrap();
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for block in part.split("```console\n").skip(1) {
        for line in block.split("```").next().unwrap().lines() {
            match line.strip_prefix("$ ") {
                Some(command) => found.push((command.to_owned(), Vec::new())),
                None => found.last_mut().unwrap().1.push(line.to_owned()),
            }
        }
    }
    found
}

/// A line without its numbers and padding, which differ from run to run.
fn shape(line: &str) -> String {
    let word = |word: &str| word.replace(|c: char| c.is_ascii_digit(), "");
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_readme_says_what_happens() {
    if Command::new("curl").arg("--version").output().is_err() {
        return skip("needs curl");
    }
    let demo = Demo::start(&[]);
    demo.wait_joined(4);
    let commands = readme("Try it");
    let names: Vec<&str> = commands.iter().map(|(c, _)| c.split(' ').next().unwrap()).collect();
    assert_eq!(names, ["curl", "curl", "export", "dispatcher", "dispatcher", "dispatcher"]);
    let admin = demo.line("status --admin").split("--admin ").nth(1).unwrap();
    let bin = Path::new(dispatcher_bin()).parent().unwrap().display().to_string();
    let mut exported = String::new();
    let mut open = Vec::new();
    for (command, said) in &commands {
        if let Some(variables) = command.strip_prefix("export ") {
            // The names are as in the README; the paths differ.
            let [(_, theirs), (_, path)] =
                [0, 1].map(|n| variables.split(' ').nth(n).unwrap().split_once('=').unwrap());
            let ours = variables.replace(theirs, admin).replace(path, &format!("{bin}:$PATH"));
            exported = format!("export {ours}; ");
            open = eight(&demo);
            continue;
        }
        let command = command.replace("127.0.0.1:8080", &demo.address.to_string());
        let printed = shell(&format!("{exported}{command}"));
        let mut lines: [Vec<String>; 2] =
            [printed.lines().map(shape).collect(), said.iter().map(|line| shape(line)).collect()];
        // The order of the clients is random.
        lines.iter_mut().for_each(|lines| lines.sort());
        let [printed, said] = lines;
        assert_eq!(printed, said, "{command}");
    }
    drop(open);
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
    // Open connections do not delay the end.
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
