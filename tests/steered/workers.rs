//! Decisions of the core, applied by the kernel: drains, weights, limits, suspicion, processes.

use std::net::TcpStream;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_support::{Dispatcher, wait_until};

use crate::place::*;

#[test]
fn connections_are_shared_exactly() {
    if !enter() {
        return;
    }
    let dispatcher = Dispatcher::start(&keepers(4, ""));
    ready(&dispatcher, 4);
    let status = in_turn(&dispatcher, 200, 200);
    assert_eq!(taken(&status), [50; 4]);
    let held: Vec<TcpStream> = (0..1_000).map(|_| connect()).collect();
    let status = wait_loads(&dispatcher, &[250; 4]);
    let pool = &status.pools[0];
    assert_eq!(pool.steer.as_ref().unwrap().chosen, 1_200);
    assert_eq!((status.accepted, status.taken), (1_200, 1_200));
    drop(held);
    wait_loads(&dispatcher, &[0; 4]);
}

#[test]
fn drain_resume_weight_and_maximum_apply_in_the_kernel() {
    if !enter() {
        return;
    }
    limits_apply(&Dispatcher::start(&keepers(3, LIMITED)));
}

pub const LIMITED: &str = "max_connections_per_worker = 40\n";

/// At three workers that are [`LIMITED`].
pub fn limits_apply(dispatcher: &Dispatcher) {
    ready(dispatcher, 3);
    command(dispatcher, &["drain", "web/web-1"]);
    let mut held: Vec<TcpStream> = (0..20).map(|_| connect()).collect();
    wait_loads(dispatcher, &[10, 10]);
    command(dispatcher, &["resume", "web/web-1"]);
    held.extend((0..10).map(|_| connect()));
    wait_loads(dispatcher, &[10; 3]);
    command(dispatcher, &["weight", "web/web-2", "2"]);
    held.extend((0..10).map(|_| connect()));
    wait_loads(dispatcher, &[10, 20, 10]);
    // 120 have room; the next one waits for a place.
    held.extend((0..80).map(|_| connect()));
    wait_loads(dispatcher, &[40; 3]);
    let waiting = std::thread::spawn(connect);
    dispatcher.wait_status("a SYN to be dropped", |status| {
        status.pools[0].state == "back-pressure"
            && status.pools[0].steer.as_ref().is_some_and(|it| it.dropped_full > 0)
    });
    held.pop();
    held.push(waiting.join().unwrap());
    wait_loads(dispatcher, &[40; 3]);
}

/// A worker that stops accepting is suspect, and trusted again when it accepts.
#[test]
fn a_worker_that_does_not_accept_is_suspect() {
    if !enter() {
        return;
    }
    let dispatcher = Dispatcher::start(&keepers(2, "handoff_timeout = \"300ms\"\n"));
    let pool = ready(&dispatcher, 2);
    let stopped = pool.workers.iter().find(|it| it.name == "web-1").unwrap().pid;
    let mut held: Vec<TcpStream> = (0..4).map(|_| connect()).collect();
    kill(Pid::from_raw(stopped), Signal::SIGSTOP).unwrap();
    // Two of these wait in its accept queue.
    let stuck: Vec<TcpStream> = (0..4).map(|_| TcpStream::connect(PUBLIC).unwrap()).collect();
    let status = dispatcher.wait_status("it to be suspect", |status| {
        status.pools[0].workers.iter().any(|it| it.name == "web-1" && it.state == "suspect")
    });
    let suspect = status.pools[0].workers.iter().find(|it| it.name == "web-1").unwrap();
    assert_eq!(suspect.steer.as_ref().unwrap().queued, 2);
    held.extend((0..10).map(|_| connect()));
    kill(Pid::from_raw(stopped), Signal::SIGCONT).unwrap();
    dispatcher.wait_status("it to be trusted", |status| active(&status.pools[0]).len() == 2);
    let status = dispatcher.status();
    assert_eq!(status.pools[0].suspects, 1);
    drop(stuck);
    // It gets connections again.
    held.extend((0..20).map(|_| connect()));
    wait_loads(&dispatcher, &[17, 17]);
}

/// A killed worker is replaced; the connections of the others go on, and no client is refused.
#[test]
fn a_killed_worker_is_replaced() {
    if !enter() {
        return;
    }
    let dispatcher = Dispatcher::start(&keepers(3, ""));
    let before = processes_of(&ready(&dispatcher, 3));
    let held: Vec<TcpStream> = (0..30).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[10; 3]);
    kill(Pid::from_raw(before[1]), Signal::SIGKILL).unwrap();
    dispatcher.wait_status("another process", |status| {
        let now = processes_of(&status.pools[0]);
        now.len() == 3 && !now.contains(&before[1])
    });
    let loads = active(&dispatcher.status().pools[0]);
    assert_eq!(loads.iter().map(|(_, load)| load).sum::<u64>(), 20);
    let more: Vec<TcpStream> = (0..10).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[10; 3]);
    drop((held, more));
    wait_loads(&dispatcher, &[0; 3]);
}

/// Rolling restart and scaling, while clients come without a pause: each of them is served.
#[test]
fn processes_are_replaced_without_losing_a_client() {
    if !enter() {
        return;
    }
    let dispatcher = Dispatcher::start(&keepers(2, ""));
    let before = processes_of(&ready(&dispatcher, 2));
    let held = connect();
    let load = Load::begin();
    command(&dispatcher, &["restart", "web", "--wait"]);
    let status = dispatcher.status();
    let now = active(&status.pools[0]);
    assert_eq!(now.len(), 2);
    // The one with the held connection stays until that ends.
    let holder = status.pools[0].workers.iter().find(|it| it.load > 0 && it.state == "draining");
    assert!(holder.is_some(), "{:?}", status.pools[0].workers);
    command(&dispatcher, &["scale", "web", "4"]);
    ready(&dispatcher, 4);
    command(&dispatcher, &["scale", "web", "1"]);
    ready(&dispatcher, 1);
    drop(held);
    dispatcher.wait_status("the others to end", |status| status.pools[0].workers.len() == 1);
    assert!(before.iter().all(|&pid| !is_alive(pid)));
    load.end();
    assert_eq!(dispatcher.status().pools[0].steer.as_ref().unwrap().refused, 0);
}

/// Processes that never listen where they are to, and such that end at once.
#[test]
fn a_process_that_does_not_listen_is_ended() {
    if !enter() {
        return;
    }
    let deaf = "import sys, time\nprint(sys.argv, flush=True)\ntime.sleep(1000)\n";
    let config = format!(
        "{}[pool.web]\nmode = \"steer\"\nwait_for_worker = \"1s\"\n{}start_timeout = \"500ms\"\n",
        listener(),
        spawn(1, &["python3", "-c", deaf])
    );
    let dispatcher = Dispatcher::start(&config);
    dispatcher.wait_status("it to be ended", |status| {
        status.pools[0].processes.as_ref().is_some_and(|it| it.ended_late > 0)
    });
    // Nothing serves, so clients are refused after the wait.
    wait_until("a client to be refused", || try_connect().is_err());
    assert!(dispatcher.status().pools[0].steer.as_ref().unwrap().dropped_no_worker > 0);
}
