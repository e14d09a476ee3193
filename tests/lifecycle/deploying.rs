//! The recipes of docs/DEPLOYING.md, run as they are printed there, and their output compared with
//! what is printed there. Only paths, times and lines of progress differ.
//! `tests/system/systemd/deploying.rs` has the units.

mod containers;

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::sys::signal::Signal;
use test_support::*;

use super::adoption::free_address;

const PAGE: &str = include_str!("../../docs/DEPLOYING.md");

/// The sections with recipes, each of which has a test.
const SECTIONS: [&str; 9] = [
    "Supervised pools",
    "A version that does not work",
    "Undo by itself",
    "When a process is ready",
    "One worker first",
    "Old connections",
    "systemd units of your own",
    "Containers",
    "The dispatcher itself",
];

fn section(title: &str) -> &'static str {
    let (_, rest) = PAGE.split_once(&format!("\n## {title}\n")).expect("a section");
    rest.split("\n## ").next().unwrap()
}

/// The blocks of a section in this language.
fn blocks(title: &str, language: &str) -> Vec<&'static str> {
    let start = format!("```{language}\n");
    let blocks = section(title).split(&start).skip(1);
    blocks.map(|rest| rest.split("```").next().unwrap()).collect()
}

#[test]
fn every_section_with_a_block_is_tested() {
    let sections = PAGE.split("\n## ").skip(1).filter(|section| section.contains("```"));
    let titles: Vec<&str> = sections.map(|section| section.lines().next().unwrap()).collect();
    assert_eq!(titles, SECTIONS);
    // Other blocks would not be run.
    let languages = PAGE.lines().filter_map(|line| line.strip_prefix("```"));
    for language in languages.filter(|language| !language.is_empty()) {
        assert!(["toml", "console", "sh"].contains(&language), "{language}");
    }
}

/// A directory with programs, a configuration and a dispatcher.
struct Site {
    dispatcher: Dispatcher,
    dir: PathBuf,
}

fn program(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}

impl Site {
    /// The pool of this section. Versions 1.4 and 1.5 run `server`, version 1.6 does not start.
    fn new(title: &str, server: &str) -> Site {
        let [pool] = blocks(title, "toml")[..] else { panic!("{title}: one pool") };
        let pool = pool.replace("/opt/", "DIR/opt/").replace("\"5s\"", "\"200ms\"");
        let temp = configure(&one_pool(&pool));
        let dir = temp.path().to_owned();
        for version in ["1.4", "1.5"] {
            let start = format!("VERSION={version} exec {server}");
            program(&dir.join(format!("opt/my-server/{version}/my-server")), &start);
        }
        program(
            &dir.join("opt/my-server/1.6/my-server"),
            "echo 'my-server 1.6: cannot read /etc/my-server.conf' >&2; exit 3",
        );
        commands_in(&dir);
        let mut dispatcher = Dispatcher::start_in(temp.path());
        dispatcher.keep(temp);
        dispatcher.wait_joined("web", 4);
        Site { dispatcher, dir }
    }

    /// With the test worker.
    fn echoing(title: &str) -> Site {
        Site::new(title, &format!("{} blocking", example("test-worker").display()))
    }

    /// Runs the commands of a block, which prints what the page prints.
    #[track_caller]
    fn follows(&self, block: &str) {
        let mut printed = run(&self.dir, block);
        if !block.contains("\nleaving: ") {
            // A client of the test may still be there.
            let lines = printed.lines().filter(|line| !line.starts_with("leaving: "));
            printed = lines.map(|line| format!("{line}\n")).collect();
        }
        assert_eq!(printed, comparable(block), "--- printed:\n{printed}");
    }

    /// The versions of the active workers, by name.
    fn versions(&self) -> BTreeMap<String, String> {
        let status = self.dispatcher.status();
        // On a busy machine a worker may be suspect for a moment.
        let workers = pool(&status, "web").workers.iter().filter(|it| it.state != "draining");
        workers.map(|worker| (worker.name.clone(), version(worker.pid))).collect()
    }

    fn pids(&self) -> Vec<i32> {
        let status = self.dispatcher.status();
        pool(&status, "web").workers.iter().map(|worker| worker.pid).collect()
    }

    fn address(&self) -> SocketAddr {
        self.dispatcher.address("web")
    }
}

/// The version in the environment of a process.
fn version(pid: i32) -> String {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let mut words = environment.split(|&byte| byte == 0);
    let version = words.find_map(|word| word.strip_prefix(b"VERSION=")).expect("a version");
    String::from_utf8(version.to_vec()).unwrap()
}

/// Makes `dispatcher` a command that knows the files of this directory.
fn commands_in(dir: &Path) {
    let text = format!(
        "export DISPATCHER_ADMIN={dir}/admin.sock\n\
         [ \"$*\" != check ] || set -- check {dir}/dispatcher.toml\n\
         exec {} \"$@\"",
        dispatcher_bin(),
        dir = dir.display()
    );
    program(&dir.join("bin/dispatcher"), &text);
}

/// A command of `sh`, with the commands of this directory; `before` is what starts it.
fn shell(dir: &Path, before: &[&str], script: &str) -> Command {
    let path = format!("{}/bin:{}", dir.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(before.first().unwrap_or(&"sh"));
    command.args(before.iter().skip(1).chain(before.first().map(|_| &"sh")));
    command.arg("-c").arg(script.replace("/etc/dispatcher/", &format!("{}/", dir.display())));
    command.env("PATH", path).env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
    command
}

/// Ends commands that wait for what does not come.
const BOUNDED: [&str; 2] = ["timeout", "120"];

/// Runs the lines that begin with `$`; the result is as a terminal would show it.
fn run(dir: &Path, block: &str) -> String {
    let mut script = "last=0\n".to_owned();
    for line in block.lines().filter_map(|line| line.strip_prefix("$ ")) {
        let shown = format!("$ {line}").replace('\'', "'\\''");
        script.push_str(&format!("printf '%s\\n' '{shown}'\n(exit $last)\n{line}\nlast=$?\n"));
    }
    let path = dir.join("printed");
    let file = File::create(&path).unwrap();
    let mut command = shell(dir, &BOUNDED, &script);
    command.stdout(file.try_clone().unwrap()).stderr(file).status().unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    let dir = dir.display().to_string();
    let text = text
        .replace(&format!("{dir}/opt/"), "/opt/")
        .replace(&format!("{dir}/dispatcher.toml"), "/etc/dispatcher/dispatcher.toml")
        .replace(&dir, "/run/dispatcher");
    comparable(&text.replace("web: 127.0.0.1:0 ", "web: 127.0.0.1:8080 "))
}

/// The text without what differs each time: times, and lines of progress.
fn comparable(text: &str) -> String {
    let mut result = String::new();
    for line in text.lines() {
        let told = line.starts_with("pool web: ") && line.contains(" replaced");
        if told && line.contains(" of ") {
            continue;
        }
        match line
            .split_once("begun ")
            .and_then(|(start, _)| line.ends_with(" ago").then_some(start))
        {
            Some(start) => result.push_str(&format!("{start}begun a moment ago")),
            None => result.push_str(line),
        }
        result.push('\n');
    }
    result
}

/// Clients that come one after the other; each of them is served.
struct Clients {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Clients {
    fn come_to(address: SocketAddr, one: fn(SocketAddr)) -> Clients {
        let over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let mut served = 0;
            while !until.load(Ordering::SeqCst) {
                one(address);
                served += 1;
            }
            served
        });
        Clients { over, thread: Some(thread) }
    }

    /// None was refused or reset.
    fn were_served(mut self) {
        self.over.store(true, Ordering::SeqCst);
        let served = self.thread.take().unwrap().join();
        assert!(served.expect("a client was refused or reset") > 0);
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

fn asks(address: SocketAddr) {
    let mut client = Client::connect(address).unwrap();
    client.echo("a question");
    client.finish();
}

fn requests(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK"), "{text:?}");
}

/// All four workers have this version.
#[track_caller]
fn all(version: &str) -> BTreeMap<String, String> {
    (1..=4).map(|number| (format!("web-{number}"), version.to_owned())).collect()
}

#[test]
fn a_supervised_pool_gets_a_new_version() {
    let site = Site::echoing(SECTIONS[0]);
    let clients = Clients::come_to(site.address(), asks);
    let mut held: Vec<Client> = (0..4).map(|_| Client::connect(site.address()).unwrap()).collect();
    let [first, second] = blocks(SECTIONS[0], "console")[..] else { panic!("two blocks") };
    assert_eq!(site.versions(), all("1.4"));
    site.follows(first);
    assert_eq!(site.versions(), all("1.5"));
    held.iter_mut().for_each(|client| client.echo("it keeps its worker"));
    site.follows(second);
    assert_eq!(site.versions(), all("1.4"));
    held.iter_mut().for_each(|client| client.echo("it keeps its worker"));
    clients.were_served();
}

#[test]
fn a_version_that_does_not_start_leaves_the_old_one() {
    for title in &SECTIONS[1..3] {
        let site = Site::echoing(title);
        let before = site.pids();
        let clients = Clients::come_to(site.address(), asks);
        blocks(title, "console").into_iter().for_each(|block| site.follows(block));
        clients.were_served();
        assert_eq!(site.pids(), before, "{title}");
    }
}

#[test]
fn a_ready_check_asks_for_a_path() {
    let site = Site::new(SECTIONS[3], &example("http").display().to_string());
    let before = site.pids();
    let clients = Clients::come_to(site.address(), requests);
    let [block] = blocks(SECTIONS[3], "console")[..] else { panic!("one block") };
    site.follows(block);
    clients.were_served();
    assert!(!site.pids().iter().any(|pid| before.contains(pid)));
    let passed =
        site.dispatcher.metric("dispatcher_ready_checks_total{pool=\"web\",result=\"passed\"}");
    assert_eq!(passed, 4.0);
    // The connections of the checks are in no total.
    let status = site.dispatcher.status();
    let taken: u64 = pool(&status, "web").workers.iter().map(|worker| worker.taken).sum();
    assert!(taken <= status.accepted);
}

#[test]
fn one_worker_gets_the_new_version_first() {
    let site = Site::echoing(SECTIONS[4]);
    let clients = Clients::come_to(site.address(), asks);
    let [first, second] = blocks(SECTIONS[4], "console")[..] else { panic!("two blocks") };
    site.follows(first);
    let mut expected = all("1.4");
    expected.insert("web-4".to_owned(), "1.5".to_owned());
    assert_eq!(site.versions(), expected);
    site.follows(second);
    assert_eq!(site.versions(), all("1.5"));
    clients.were_served();
}

#[test]
fn old_connections_are_kept_until_the_operator_ends_them() {
    let site = Site::echoing(SECTIONS[5]);
    let clients = |count| -> Vec<Client> {
        (0..count).map(|_| Client::connect(site.address()).unwrap()).collect()
    };
    let restart = "$ dispatcher restart web --wait\n";
    let oldest = clients(12);
    let printed = run(&site.dir, restart);
    assert!(printed.contains("pool web: generation 2: 4 processes to replace"), "{printed}");
    let mut old = clients(8);
    let printed = run(&site.dir, restart);
    assert!(printed.contains("pool web: generation 3: 4 processes to replace"), "{printed}");
    let [block] = blocks(SECTIONS[5], "console")[..] else { panic!("one block") };
    site.follows(block);
    for mut client in oldest {
        // An end, or a reset by the end of the process.
        assert!(!client.stream.read(&mut [0]).is_ok_and(|count| count > 0));
    }
    old.iter_mut().for_each(|client| client.echo("still there"));
    let log = site.dispatcher.log();
    assert_eq!(log.matches("event=drain_over").count(), 4, "{log}");
    assert_eq!(log.lines().filter(|line| line.ends_with(" ended=3")).count(), 4, "{log}");
}

#[test]
fn a_new_dispatcher_takes_over() {
    let address = free_address();
    let listener = one_pool("").replace("127.0.0.1:0", &address.to_string());
    let temp = configure(&listener);
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let _workers = dispatcher.workers("blocking", "web", 2);
    commands_in(temp.path());
    let mut held = Client::connect(address).unwrap();
    let clients = Clients::come_to(address, asks);
    let [block] = blocks("The dispatcher itself", "sh")[..] else { panic!("one block") };
    let log = File::create(temp.path().join("new-log")).unwrap();
    // The shell becomes the dispatcher, so that it is the process to end.
    let script = block.replace("    dispatcher run", "exec dispatcher run");
    let mut command = shell(temp.path(), &[], &script);
    command.stdout(Stdio::null()).stderr(log);
    let new = Process::start("the new dispatcher", &mut command);
    assert!(dispatcher.process.wait().success(), "{}", dispatcher.log());
    let said = || std::fs::read_to_string(temp.path().join("new-log")).unwrap();
    wait_until("it to say so", || said().contains("event=taken_over"));
    dispatcher.process = new;
    dispatcher.wait_joined("web", 2);
    held.echo("still there");
    clients.were_served();
    dispatcher.process.signal(Signal::SIGTERM);
    assert!(dispatcher.process.wait().success());
}
