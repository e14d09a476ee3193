//! The directory as a process of a dispatcher: `relay_directory` of its configuration.

use std::path::Path;
use std::process::{Command, Stdio};

use dispatcher::api::status::{RelayStatus, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_support::{Dispatcher, Process, dispatcher_bin, wait_for, wait_for_log, wait_until};
use worker_sdk::relay::{Outcome, Relay, RelayConfig};

use super::id;

const LISTENER: &str =
    "[[listener]]\nname = \"http\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n[pool.web]\n";

fn config(dir: &Path, name: &str) -> RelayConfig {
    RelayConfig::new().socket(dir.join("relay.sock")).name(name)
}

fn relay(dispatcher: &Dispatcher) -> impl Fn(&Status) -> RelayStatus + use<> {
    let log = dispatcher.dir.join("log");
    move |status| {
        let log = || std::fs::read_to_string(&log).unwrap();
        status.relay.clone().unwrap_or_else(|| panic!("no relay in the status\n{}", log()))
    }
}

/// Waits until the directory answers, and returns its process id and how often it was started.
fn up(dispatcher: &Dispatcher) -> (i32, u64) {
    let part = relay(dispatcher);
    let status = dispatcher.wait_status("the directory to answer", |status| {
        let relay = part(status);
        relay.state == "up" && relay.process.is_some_and(|process| process.pid.is_some())
    });
    let process = part(&status).process.unwrap();
    (i32::try_from(process.pid.unwrap()).unwrap(), process.starts)
}

fn runs(pid: i32) -> bool {
    // A zombie has ended; its parent may not have looked yet.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn one_line_starts_a_directory_and_workers_find_it() {
    let mut dispatcher = Dispatcher::start(&format!(
        "relay_directory = true\n{LISTENER}[pool.web.spawn]\n\
         command = [\"/bin/sh\", \"-c\", \"echo relay=$DISPATCH_RELAY_SOCKET; exec sleep 600\"]\n\
         output = \"log\"\nstart_timeout = \"10m\"\n"
    ));
    let socket = dispatcher.dir.join("relay.sock");
    let (pid, starts) = up(&dispatcher);
    assert_eq!(starts, 1);
    assert_ne!(pid, dispatcher.process.pid(), "a process of its own");
    wait_for_log(&dispatcher, &format!("relay={}", socket.display()));

    let a = Relay::connect(config(&dispatcher.dir, "a")).wait().unwrap();
    let b = Relay::connect(config(&dispatcher.dir, "b")).wait().unwrap();
    let alice = b.register(&id("alice")).wait().unwrap();
    assert_eq!(a.send(&id("alice"), "1").wait(), Outcome::Delivered);
    assert_eq!(alice.recv().wait().unwrap().bytes(), b"1");

    let part = relay(&dispatcher);
    let status = dispatcher.wait_status("its numbers", |status| {
        let numbers = part(status).numbers;
        numbers.get("ids") == Some(&1) && numbers.get("links_total") == Some(&1)
    });
    assert_eq!(part(&status).socket, socket.display().to_string());
    assert_eq!(part(&status).error, None);
    assert_eq!(dispatcher.metric("dispatcher_relay_up"), 1.0);
    assert_eq!(dispatcher.metric("dispatcher_relay_ids"), 1.0);
    assert_eq!(dispatcher.metric("dispatcher_relay_links_total"), 1.0);
    assert_eq!(dispatcher.metric("dispatcher_relay_process_starts_total"), 1.0);
    let mut command = Command::new(dispatcher_bin());
    let shown = command.args(["status", "--admin"]).arg(dispatcher.admin()).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let shown = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(shown.contains("relay up at"), "{shown}");
    assert!(shown.contains("ids, 0 groups"), "{shown}");

    // A restart of the directory: known workers continue, everything registers again.
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    wait_until("another one", || up(&dispatcher).1 == 2);
    assert_eq!(a.send(&id("alice"), "2").wait(), Outcome::Delivered);
    let c = Relay::connect(config(&dispatcher.dir, "c")).wait().unwrap();
    wait_until("alice to be registered again", || {
        !c.who(&id("alice")).wait().unwrap().places.is_empty()
    });
    assert_eq!(c.send(&id("alice"), "3").wait(), Outcome::Delivered);

    let pid = up(&dispatcher).0;
    assert!(dispatcher.stop().success(), "{}", dispatcher.log());
    assert!(!runs(pid), "it ends before its dispatcher");
    assert!(!socket.exists());
}

/// The accept rate cannot depend on messages: the thread that accepts does nothing for them.
#[test]
fn messages_and_registrations_do_not_wake_the_hot_thread() {
    let dispatcher = Dispatcher::start(&format!("relay_directory = true\n{LISTENER}"));
    up(&dispatcher);
    let a = Relay::connect(config(&dispatcher.dir, "a")).wait().unwrap();
    let b = Relay::connect(config(&dispatcher.dir, "b")).wait().unwrap();
    let turns = || -> u64 { dispatcher.status().meters.turn.counts.iter().sum() };
    let before = turns();
    let began = std::time::Instant::now();
    for number in 0..200 {
        let id = id(&format!("client{number}"));
        let inbox = b.register(&id).wait().unwrap();
        for _ in 0..10 {
            assert_eq!(a.send(&id, "x").wait(), Outcome::Delivered);
            assert!(inbox.recv().wait().is_some());
        }
    }
    let turned = turns() - before;
    // The status above, and timers of the dispatcher itself: a few in a second.
    let timers = 20 * (1 + began.elapsed().as_secs());
    assert!(turned <= timers, "{turned} turns for 2,000 messages and 200 registrations");
}

#[test]
fn it_ends_with_a_dispatcher_that_is_killed_or_replaced() {
    let body = format!("relay_directory = true\n{LISTENER}");
    let mut dispatcher = Dispatcher::start(&body);
    let (first, _) = up(&dispatcher);
    dispatcher.process.kill();
    wait_until("its end", || !runs(first));
    let next = Dispatcher::start_in(&dispatcher.dir);
    let (second, _) = up(&next);
    assert_ne!(first, second);

    // The new dispatcher starts its own when the former one has gone.
    let worker = Relay::connect(config(&dispatcher.dir, "a")).wait().unwrap();
    let alice = worker.register(&id("alice")).wait().unwrap();
    let log = std::fs::File::options().append(true).open(dispatcher.dir.join("log")).unwrap();
    let mut command = Command::new(dispatcher_bin());
    command.args(["run", "--take-over", "--config"]).arg(dispatcher.dir.join("dispatcher.toml"));
    command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let newest = Dispatcher::start_by(&dispatcher.dir, &mut command);
    let mut former = next;
    assert!(former.process.wait().success(), "{}", newest.log());
    let third = wait_for("the directory of the new dispatcher", || {
        Some(up(&newest).0).filter(|pid| *pid != second)
    });
    assert!(!runs(second) && runs(third));
    let asks = Relay::connect(config(&dispatcher.dir, "b")).wait().unwrap();
    wait_until("alice to be registered again", || {
        !asks.who(&id("alice")).wait().unwrap().places.is_empty()
    });
    drop(alice);
}

#[test]
fn a_directory_that_hangs_or_cannot_start_delays_nothing() {
    let mut dispatcher = Dispatcher::start(&format!("relay_directory = true\n{LISTENER}"));
    let worker = dispatcher.worker("blocking", "web", "one");
    dispatcher.wait_joined("web", 1);
    let (pid, _) = up(&dispatcher);
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    let part = relay(&dispatcher);
    // The figures are those of before until the question has run out of time; everything else
    // serves.
    let address = dispatcher.address("http");
    for _ in 0..20 {
        test_support::Client::connect(address).unwrap().echo("served");
        let _ = part(&dispatcher.status());
    }
    dispatcher.wait_status("the silence to be noticed", |status| part(status).state == "down");
    // A stop does not wait for it.
    assert!(dispatcher.stop().success(), "{}", dispatcher.log());
    assert!(!runs(pid));
    drop(worker);

    // Another directory has the socket.
    let dispatcher = Dispatcher::start_in(&dispatcher.dir);
    let (first, _) = up(&dispatcher);
    let dir = test_support::configure(&format!(
        "relay_directory = true\nrelay_socket = \"{}\"\n{LISTENER}",
        dispatcher.dir.join("relay.sock").display()
    ));
    let other = Dispatcher::start_in(dir.path());
    wait_for_log(&other, "another directory serves this path");
    wait_for_log(&other, "event=relay_directory_ended");
    assert!(runs(first));
    assert_eq!(up(&dispatcher).0, first, "it is not disturbed");
}

#[test]
fn a_file_configures_it_and_a_directory_of_its_own_is_shown_too() {
    let dir = test_support::configure("");
    let file = dir.path().join("directory.toml");
    std::fs::write(
        &file,
        format!(
            "socket = \"{}\"\nhost = \"one\"\n[namespaces.chat]\nusers = [{}]\n",
            dir.path().join("relay.sock").display(),
            rustix::process::geteuid().as_raw()
        ),
    )
    .unwrap();
    test_support::write_config(
        dir.path(),
        &format!("relay_directory = \"{}\"\n{LISTENER}", file.display()),
    );
    let dispatcher = Dispatcher::start_in(dir.path());
    up(&dispatcher);
    let joined = Relay::connect(config(dir.path(), "a").namespace("chat")).wait();
    drop(joined.unwrap());
    assert!(Relay::connect(config(dir.path(), "a")).wait().is_err(), "there is no default");

    let own = test_support::configure("");
    let mut command = Command::new(dispatcher_bin());
    command.args(["relay", "serve", "--socket"]).arg(own.path().join("relay.sock"));
    command.stdin(Stdio::null()).stderr(Stdio::null());
    let mut directory = Process::start("directory", &mut command);
    test_support::write_config(
        own.path(),
        &format!("relay_socket = \"DIR/relay.sock\"\n{LISTENER}"),
    );
    let dispatcher = Dispatcher::start_in(own.path());
    let part = relay(&dispatcher);
    let status = dispatcher.wait_status("it to answer", |status| part(status).state == "up");
    assert_eq!(part(&status).process, None, "it is not the dispatcher's");
    directory.signal(Signal::SIGTERM);
    assert!(directory.wait().success());
    let status =
        dispatcher.wait_status("its end to be noticed", |status| part(status).state == "down");
    assert!(part(&status).error.is_some());
    assert_eq!(dispatcher.metric("dispatcher_relay_up"), 0.0);
}
