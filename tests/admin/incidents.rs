//! Incidents as an operator reads them in the log at level `info`: event, subject, order and end.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod order;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use test_support::peer::{Peer, hello};
use test_support::*;

/// A parsed line: its level, and the pairs after it.
#[derive(Debug)]
struct Line {
    level: String,
    pairs: BTreeMap<String, String>,
}

impl Line {
    /// `TIME LEVEL TARGET: key=value key="a value" …`, and nothing else.
    fn of(text: &str) -> Line {
        let mut words = text.splitn(4, ' ');
        let (_time, level) = (words.next().unwrap(), words.next().unwrap());
        assert!(words.next().is_some_and(|target| target.ends_with(':')), "{text}");
        let mut rest = words.next().unwrap_or_else(|| panic!("no pairs: {text}"));
        let mut pairs = BTreeMap::new();
        while !rest.is_empty() {
            let (key, after) = rest.split_once('=').unwrap_or_else(|| panic!("no pair: {text}"));
            let known = key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            assert!(known && !key.is_empty(), "not a key: {key:?} in {text}");
            let (value, after) = match after.strip_prefix('"') {
                Some(after) => after.split_once('"').unwrap(),
                None => after.split_at(after.find(' ').unwrap_or(after.len())),
            };
            pairs.insert(key.to_owned(), value.to_owned());
            rest = after.trim_start_matches(' ');
        }
        assert!(pairs.contains_key("event"), "{text}");
        Line { level: level.to_owned(), pairs }
    }

    fn get(&self, key: &str) -> &str {
        self.pairs.get(key).unwrap_or_else(|| panic!("no {key} in {self:?}"))
    }

    fn number(&self, key: &str) -> u64 {
        self.get(key).parse().unwrap()
    }
}

/// The log as read after an incident.
struct Story {
    lines: Vec<Line>,
    at: usize,
}

impl Story {
    /// Waits until the log has this many lines of the event; earlier events are in it by then.
    fn after(dispatcher: &Dispatcher, event: &str, count: usize) -> Story {
        let text = format!("event={event} ");
        wait_until(&format!("{count} lines of {event}"), || {
            let log = dispatcher.log();
            log.ends_with('\n') && log.lines().filter(|line| line.contains(&text)).count() >= count
        });
        Story { lines: dispatcher.log().lines().map(Line::of).collect(), at: 0 }
    }

    /// The next line with all these pairs, after the previously found one.
    #[track_caller]
    fn then(&mut self, pairs: &[(&str, &str)]) -> &Line {
        let fits = |line: &Line| {
            pairs.iter().all(|(key, value)| line.pairs.get(*key).is_some_and(|has| has == value))
        };
        let found = self.lines[self.at..].iter().position(fits);
        let found = found.unwrap_or_else(|| {
            panic!("the story has no {pairs:?} after line {} of {:#?}", self.at, self.lines)
        });
        self.at += found + 1;
        &self.lines[self.at - 1]
    }

    fn all(&self, event: &str) -> Vec<&Line> {
        self.lines.iter().filter(|line| line.get("event") == event).collect()
    }
}

/// A dispatcher that logs at `info`, as in production.
fn start(keys: &str) -> Dispatcher {
    let temp = configure(&one_pool(keys));
    let mut command = Command::new("env");
    command.args(["-u", "DISPATCHER_LOG", "-u", "NOTIFY_SOCKET", dispatcher_bin()]);
    let mut dispatcher = Dispatcher::start_as(temp.path(), &mut command);
    dispatcher.keep(temp);
    dispatcher
}

fn post(socket: &Path, path: &str, body: &str) -> (u16, serde_json::Value) {
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    (code, serde_json::from_str(body).unwrap())
}

#[test]
fn a_killed_worker_with_untaken_connections_is_logged() {
    let dispatcher = start("handoff_timeout = \"10m\"");
    let mut first = dispatcher.worker("blocking", "web", "first");
    dispatcher.wait_joined("web", 1);
    let _second = dispatcher.worker("blocking", "web", "second");
    dispatcher.wait_joined("web", 2);
    let address = dispatcher.address("web");
    let served: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    first.signal(Signal::SIGSTOP);
    let waiting: Vec<TcpStream> = (0..10).map(|_| connect(address)).collect();
    dispatcher
        .wait_status("five in flight", |s| worker(s, "first").is_some_and(|w| w.in_flight == 5));
    let pid = first.pid().to_string();
    first.kill();
    all_greeted(waiting);
    drop(served);

    let mut story = Story::after(&dispatcher, "connection_resent", 5);
    let joined = story.then(&[("event", "worker_joined"), ("name", "first")]);
    assert_eq!((joined.get("pid"), joined.get("pool")), (&*pid, "web"));
    let id = joined.get("worker").to_owned();
    let other = story.then(&[("event", "worker_joined"), ("name", "second")]);
    let other = other.get("worker").to_owned();
    // Five connections were sent and went elsewhere; the two that the worker served ended with it.
    let gone = story.then(&[("event", "worker_gone"), ("worker", &id), ("pid", &pid)]);
    assert_eq!((gone.get("resent"), gone.get("live"), &*gone.level), ("5", "2", "warn"));
    assert!(matches!(gone.get("why"), "died" | "disconnected"));
    // The connections and their new workers.
    let resent = story.all("connection_resent");
    let conns: BTreeSet<u64> = resent.iter().map(|line| line.number("conn")).collect();
    assert_eq!((resent.len(), conns.len()), (5, 5));
    for line in &resent {
        assert_eq!((line.get("worker"), line.get("pool")), (&*other, "web"));
        assert!(line.get("peer").starts_with("127.0.0.1:"));
    }
    // Four connections were served before them.
    assert!(conns.iter().all(|&conn| (5..=14).contains(&conn)), "{conns:?}");
}

#[test]
fn a_stopped_and_continued_worker_is_logged() {
    let dispatcher = start("handoff_timeout = \"100ms\"");
    let stopped = dispatcher.worker("blocking", "web", "stopped");
    dispatcher.wait_joined("web", 1);
    let _other = dispatcher.worker("blocking", "web", "other");
    dispatcher.wait_joined("web", 2);
    let address = dispatcher.address("web");
    dispatcher.prove_all(address);
    stopped.signal(Signal::SIGSTOP);
    let waiting: Vec<TcpStream> = (0..6).map(|_| connect(address)).collect();
    let served = all_greeted(waiting);
    stopped.signal(Signal::SIGCONT);
    // The worker is trusted again after it has taken connections.
    let mut more = Vec::new();
    wait_until("trust", || {
        more.push(Client::connect(address).unwrap());
        dispatcher.log().contains("event=worker_trusted")
    });
    drop((served, more));

    let mut story = Story::after(&dispatcher, "worker_trusted", 1);
    let joined = story.then(&[("event", "worker_joined"), ("name", "stopped")]);
    let id = joined.get("worker").to_owned();
    let suspect = story.then(&[("event", "worker_suspect"), ("worker", &id), ("pool", "web")]);
    assert_eq!(suspect.level, "warn");
    let revoked = suspect.number("revoked");
    assert!(revoked > 0);
    assert!(suspect.get("waited").ends_with('s'), "{suspect:?}");
    let trusted = story.then(&[("event", "worker_trusted"), ("worker", &id), ("name", "stopped")]);
    assert!(trusted.get("after").ends_with('s'), "{trusted:?}");
    assert!(story.all("connection_resent").len() as u64 >= revoked);
}

#[test]
fn loss_and_return_of_all_workers_is_logged() {
    let dispatcher = start("wait_for_worker = \"300ms\"");
    let mut workers = dispatcher.workers("blocking", "web", 2);
    workers.iter_mut().for_each(Process::kill);
    dispatcher.wait_status("no worker to be left", |s| pool(s, "web").workers.is_empty());
    dispatcher.wait_status("clients to be refused", |s| pool(s, "web").state == "refusing");
    let address = dispatcher.address("web");
    let mut refused = connect(address);
    assert_eq!(refused.read(&mut [0]).unwrap_or(0), 0, "closed at once");
    let _again = dispatcher.worker("blocking", "web", "again");
    dispatcher.wait_joined("web", 1);
    Client::connect(address).unwrap();

    let mut story = Story::after(&dispatcher, "worker_joined", 3);
    let mut ids = BTreeSet::new();
    for _ in 0..2 {
        ids.insert(story.then(&[("event", "worker_joined"), ("pool", "web")]).number("worker"));
    }
    let none = story.then(&[("event", "no_worker"), ("pool", "web"), ("clients", "wait")]);
    assert_eq!(none.level, "warn");
    let refusing = story.then(&[("event", "refusing"), ("pool", "web")]);
    assert_eq!((&*refusing.level, refusing.get("closed")), ("error", "0"));
    let turned = story.then(&[("event", "client_turned_away"), ("listener", "web")]);
    assert_eq!((turned.get("reason"), turned.get("pool")), ("no_worker", "web"));
    assert_eq!(turned.get("conn"), "1");
    let back = story.then(&[("event", "worker_joined"), ("name", "again"), ("pool", "web")]);
    let back = back.number("worker");
    let gone: BTreeSet<u64> =
        story.all("worker_gone").iter().map(|line| line.number("worker")).collect();
    assert_eq!(gone, ids, "those that joined are those that left");
    assert!(!ids.contains(&back));
}

#[test]
fn descriptors_run_out_and_workers_are_full() {
    let dispatcher = start("max_connections_per_worker = 3");
    let _worker = dispatcher.workers("blocking", "web", 1);
    let address = dispatcher.address("web");
    dispatcher.process.limit_descriptors(Some(0));
    let first = connect(address);
    wait_for_log(&dispatcher, "event=accept_paused");
    dispatcher.process.limit_descriptors(None);
    let mut clients = vec![Client::greeted(first).unwrap()];
    clients.extend((0..2).map(|_| Client::connect(address).unwrap()));
    let waiting = connect(address);
    wait_for_log(&dispatcher, "event=back_pressure ");
    clients.pop().unwrap().finish();
    clients.push(Client::greeted(waiting).unwrap());
    clients.into_iter().for_each(Client::finish);

    let mut story = Story::after(&dispatcher, "back_pressure_over", 1);
    let paused = story.then(&[("event", "accept_paused"), ("listener", "web"), ("pool", "web")]);
    assert!(paused.get("error").contains("open files"), "{paused:?}");
    assert_eq!((paused.get("pause"), &*paused.level), ("100ms", "warn"));
    story.then(&[("event", "accept_resumed"), ("listener", "web"), ("pool", "web")]);
    let full = story.then(&[("event", "back_pressure"), ("pool", "web"), ("clients", "wait")]);
    assert_eq!(full.get("reason"), "every worker is full or suspect");
    story.then(&[("event", "back_pressure_over"), ("pool", "web")]);
}

#[test]
fn invalid_records_of_a_stranger_and_of_a_worker() {
    let dispatcher = start("handoff_timeout = \"10m\"");
    let stranger = Peer::connect(&dispatcher.dispatch());
    stranger.send(b"GET / HTTP/1.1", &[]).unwrap();
    assert!(stranger.ended());
    let babbler = Peer::connect(&dispatcher.dispatch());
    let (welcome, _fds) = babbler.join(&hello());
    let client = connect(dispatcher.address("web"));
    dispatcher.wait_status("one in flight", |s| s.in_flight == 1);
    let _honest = dispatcher.worker("blocking", "web", "honest");
    dispatcher.wait_joined("web", 2);
    babbler.send(b"\xff\xff nonsense", &[]).unwrap();
    Client::greeted(client).unwrap();

    let mut story = Story::after(&dispatcher, "connection_resent", 1);
    let own = std::process::id().to_string();
    let refused = story.then(&[("event", "worker_refused"), ("pid", &own)]);
    assert!(refused.get("reason").starts_with("not a hello"), "{refused:?}");
    assert!(refused.pairs.contains_key("uid"));
    let id = welcome.worker_id.to_string();
    story.then(&[("event", "worker_joined"), ("worker", &id), ("name", "bad"), ("pid", &own)]);
    let broke = story.then(&[("event", "worker_broke_protocol"), ("worker", &id), ("pid", &own)]);
    assert!(!broke.get("reason").is_empty());
    story.then(&[("event", "worker_expelled"), ("worker", &id), ("name", "bad")]);
    let gone = story.all("worker_gone");
    assert_eq!(gone.len(), 1);
    assert_eq!((gone[0].get("worker"), gone[0].get("why")), (&*id, "expelled"));
    assert_eq!((gone[0].get("resent"), gone[0].get("pool")), ("1", "web"));
    // The first connection of all went to the honest worker.
    let resent = story.all("connection_resent");
    assert_eq!((resent[0].get("conn"), resent[0].get("name")), ("1", "honest"));
}

#[test]
fn the_level_changes_at_run_time() {
    let dispatcher = start("");
    let level = || http_get(&dispatcher.admin(), "/v1/log_level").unwrap().1;
    assert!(level().contains("\"info\""));
    let _worker = dispatcher.workers("blocking", "web", 1);
    // No lines at level `debug` so far; a disconnecting client would cause one.
    let noise = || {
        let mut stream = UnixStream::connect(dispatcher.admin()).unwrap();
        stream.write_all(b"\x00 nonsense\r\n\r\n").unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    };
    noise();
    let (code, answer) = post(&dispatcher.admin(), "/v1/log_level", r#"{"level": "debug"}"#);
    assert_eq!(
        (code, answer["level"].as_str(), answer["previous"].as_str()),
        (200, Some("debug"), Some("info"))
    );
    let mut story = Story::after(&dispatcher, "log_level", 1);
    assert!(story.lines.iter().all(|line| line.level != "debug"));
    story.then(&[("event", "log_level"), ("from", "info"), ("to", "debug")]);
    noise();
    wait_for_log(&dispatcher, " debug ");

    let (code, _) = post(&dispatcher.admin(), "/v1/log_level", r#"{"level": "error"}"#);
    assert_eq!(code, 200);
    let before = dispatcher.log().lines().count();
    let _other = dispatcher.worker("blocking", "web", "unseen");
    dispatcher.wait_joined("web", 2);
    // A turn logs its events after its answers, so the next answer comes after the events.
    dispatcher.status();
    let (code, _) = post(&dispatcher.admin(), "/v1/log_level", r#"{"level": "info"}"#);
    assert_eq!(code, 200);
    let _third = dispatcher.worker("blocking", "web", "seen");
    wait_for_log(&dispatcher, "name=seen");
    let log = dispatcher.log();
    assert!(!log.contains("name=unseen"), "{log}");
    assert!(log.lines().count() > before);

    let (code, answer) = post(&dispatcher.admin(), "/v1/log_level", r#"{"level": "loud"}"#);
    assert_eq!(code, 400, "{answer}");
    assert!(answer["hint"].as_str().unwrap().contains("debug"), "{answer}");
}

#[test]
fn the_environment_overrides_the_configured_log_level() {
    let quiet = format!("log_level = \"error\"\n{}", one_pool(""));
    for (variable, level) in [(None, "error"), (Some("debug"), "debug")] {
        let temp = configure(&quiet);
        let mut command = Command::new("env");
        command.arg("-uDISPATCHER_LOG");
        command.args(variable.map(|value| format!("DISPATCHER_LOG={value}")));
        command.arg(dispatcher_bin());
        let dispatcher = Dispatcher::start_as(temp.path(), &mut command);
        let (_, body) = http_get(&dispatcher.admin(), "/v1/log_level").unwrap();
        assert!(body.contains(level), "{body}");
        match level {
            "debug" => wait_for_log(&dispatcher, "event=ready"),
            _ => assert!(!dispatcher.log().contains("event=ready")),
        }
    }
}

#[test]
fn the_journal_gets_priorities() {
    for (inode, journal) in [(0, true), (1, false)] {
        let temp = configure(&one_pool("wait_for_worker = \"0s\""));
        // Any file works: stderr must be the file that the variable names.
        let log = File::create(temp.path().join("log")).unwrap().metadata().unwrap();
        let mut command = Command::new("env");
        command.arg(format!("JOURNAL_STREAM={}:{}", log.dev(), log.ino() + inode));
        command.arg(dispatcher_bin());
        let dispatcher = Dispatcher::start_as(temp.path(), &mut command);
        wait_for_log(&dispatcher, "event=refusing");
        let log = dispatcher.log();
        let line = |event: &str| log.lines().find(|line| line.contains(event)).unwrap();
        if journal {
            assert!(line("event=ready").starts_with("<6>event_loop"), "{log}");
            assert!(line("event=no_worker").starts_with("<4>event_loop"), "{log}");
            assert!(line("event=refusing").starts_with("<3>event_loop"), "{log}");
        } else {
            assert!(!log.contains('<'), "{log}");
            assert!(line("event=refusing").contains(" error event_loop"), "{log}");
        }
    }
}

/// Every event in the sources is in docs/LOGS.md, and every event there exists.
#[test]
fn every_event_is_documented() {
    fn events_in(text: &str, start: &str, found: &mut BTreeSet<String>) {
        for part in text.split(start).skip(1) {
            let end =
                part.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(part.len());
            if end > 0 {
                found.insert(part[..end].to_owned());
            }
        }
    }
    fn look(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                look(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                events_in(&std::fs::read_to_string(&path).unwrap(), "\"event=", found);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut written = BTreeSet::new();
    look(&root.join("src"), &mut written);
    assert!(written.len() > 40, "{written:?}");
    let docs = std::fs::read_to_string(root.join("../docs/LOGS.md")).unwrap();
    let mut documented = BTreeSet::new();
    let events = docs.split_once("## Events").unwrap().1.split_once("## An incident").unwrap().0;
    for row in events.lines().filter(|line| line.starts_with("| `")) {
        events_in(row.split('|').nth(1).unwrap(), "`", &mut documented);
    }
    assert_eq!(written, documented);
}
