//! Processes that the dispatcher starts or inherits.

use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use test_support::*;

/// State and parent of a process, if it exists.
fn state(pid: i32) -> Option<(String, i32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit(") ").next()?.split(' ').map(str::to_owned);
    Some((fields.next()?, fields.next()?.parse().ok()?))
}

pub(super) fn lives(pid: i32) -> bool {
    state(pid).is_some_and(|(state, _)| state != "Z")
}

/// A shell that runs the test worker, like `npm start`.
fn wrapped(script: &str) -> String {
    let program = example("test-worker");
    let script = script.replace("SERVER", &format!("{} blocking", program.display()));
    format!("[pool.web.spawn]\ncommand = [\"/bin/sh\", \"-c\", {script:?}]\nprocesses = 1")
}

pub(super) fn worker_pids(dispatcher: &Dispatcher) -> Vec<i32> {
    let status = dispatcher.status();
    pool(&status, "web").workers.iter().map(|worker| worker.pid).collect()
}

#[test]
fn a_wrapper_that_dies_leaves_nothing_beside_its_replacement() {
    for script in ["SERVER & wait", "SERVER; true"] {
        let (mut dispatcher, address) = start_one_pool(&wrapped(script));
        dispatcher.wait_joined("web", 1);
        for _ in 0..3 {
            let server = worker_pids(&dispatcher)[0];
            let (_, wrapper) = state(server).unwrap();
            assert_ne!(wrapper, dispatcher.process.pid(), "there is a wrapper");
            kill(Pid::from_raw(wrapper), Signal::SIGKILL).unwrap();
            wait_until("another server", || {
                let pids = worker_pids(&dispatcher);
                assert!(pids.len() <= 1, "two at once: {pids:?}");
                pids.first().is_some_and(|&pid| pid != server)
            });
            assert!(!lives(server), "it stayed beside its replacement");
        }
        wait_for_log(&dispatcher, "what it had started was ended");
        let mut client = Client::connect(address).unwrap();
        client.echo("served");
        drop(client);
        let server = worker_pids(&dispatcher)[0];
        assert!(dispatcher.stop().success());
        assert!(!lives(server), "the stop left it");
    }
}

#[test]
fn a_stop_ends_what_ignores_it_after_its_timeout() {
    let body = one_pool(&wrapped("trap '' TERM; SERVER & sleep 1000"));
    let mut dispatcher = Dispatcher::start(&format!("stop_timeout = \"500ms\"\n{body}"));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 1);
    let _live = Client::connect(address).unwrap();
    let server = worker_pids(&dispatcher)[0];
    let (_, wrapper) = state(server).unwrap();
    assert!(dispatcher.stop().success());
    assert!(!lives(server) && !lives(wrapper));
    wait_for_log(&dispatcher, "event=processes_killed");
}

#[test]
fn as_process_1_it_reaps_what_it_inherits_and_hears_of_its_own() {
    let possible = Command::new("unshare").args(["-pf", "--mount-proc", "true"]).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        return skip("needs unshare and the right to make a pid namespace");
    }
    let script = "for i in 1 2 3 4 5; do setsid sh -c 'sleep 0.2' & done; exec sleep 0.3";
    let temp = configure(&one_pool(&format!(
        "[pool.web.spawn]\ncommand = [\"/bin/sh\", \"-c\", {script:?}]\nprocesses = 2"
    )));
    let mut command = Command::new("unshare");
    command.args(["-pf", "--mount-proc", "--kill-child", dispatcher_bin()]);
    let dispatcher = Dispatcher::start_as(temp.path(), command.env_remove("NOTIFY_SOCKET"));
    let one = children_of(dispatcher.process.pid())[0];
    // Every end of its own processes is reported with its status and followed by a restart.
    wait_until("some ends", || dispatcher.log().matches("status=\"exit status 0\"").count() >= 4);
    let log = dispatcher.log();
    assert!(!log.contains("status=\"unknown"), "{log}");
    wait_for_log(&dispatcher, "event=process_reaped");
    wait_until("no zombie to be there", || {
        children_of(one).into_iter().all(|child| state(child).is_none_or(|(state, _)| state != "Z"))
    });
    // Process 1 has no default dispositions: an unhandled signal has no effect.
    kill(Pid::from_raw(one), Signal::SIGTERM).unwrap();
    let mut dispatcher = dispatcher;
    assert!(dispatcher.process.wait().success());
}

/// Processes that end with the test, however it ends.
pub(super) struct Ended(pub(super) Vec<i32>);

impl Drop for Ended {
    fn drop(&mut self) {
        for &pid in self.0.iter().filter(|&&pid| lives(pid)) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

#[test]
fn processes_without_a_journal_end_when_they_are_idle() {
    let program = example("test-worker");
    let spawn = format!(
        "[pool.web.spawn]\ncommand = [{program:?}, \"blocking\"]\nprocesses = 2\n\
         on_dispatcher_loss = \"serve\"\n"
    );
    let (mut dispatcher, address) = start_one_pool(&spawn);
    // The same address for the next dispatcher.
    write_config(&dispatcher.dir, &one_pool(&spawn).replace("127.0.0.1:0", &address.to_string()));
    dispatcher.wait_joined("web", 2);
    let mut client = Client::connect(address).unwrap();
    client.echo("before");
    let before = worker_pids(&dispatcher);
    let _ends = Ended(before.clone());
    dispatcher.process.kill();
    std::fs::remove_file(dispatcher.dir.join("dispatch.sock.processes")).unwrap();

    let next = Dispatcher::start_in(&dispatcher.dir);
    let status = next.wait_status("those of before to leave, but for one", |status| {
        let workers = &pool(status, "web").workers;
        let of_before: Vec<_> = workers.iter().filter(|w| before.contains(&w.pid)).collect();
        let active = workers.iter().filter(|w| w.state == "active").count();
        active == 2 && workers.len() == 3 && of_before.len() == 1
    });
    let left = pool(&status, "web").workers.iter().find(|w| before.contains(&w.pid)).unwrap();
    assert_eq!((left.state.as_str(), left.load), ("draining", 1));
    wait_for_log(&next, "event=worker_left_over");
    client.echo("served on");
    drop(client);
    next.wait_joined("web", 2);
    wait_until("the last of before to end", || !before.iter().any(|&pid| lives(pid)));
    Client::connect(address).unwrap().echo("served by the others");
}
