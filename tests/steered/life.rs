//! The dispatcher ends, is killed, restarts: the kernel goes on choosing where that was asked for.

use std::net::TcpStream;

use nix::sys::signal::Signal;
use test_support::{Dispatcher, wait_until};

use crate::place::*;
use crate::shared::{answer, dial, pid_of, signal, sockets};

#[test]
fn a_stop_ends_the_processes_and_refuses_clients() {
    if !enter() {
        return;
    }
    let mut dispatcher = Dispatcher::start(&keepers(2, ""));
    let processes = processes_of(&ready(&dispatcher, 2));
    let held = connect();
    assert!(dispatcher.stop().success());
    drop(held);
    assert!(processes.iter().all(|&pid| !is_alive(pid)));
    assert!(TcpStream::connect(PUBLIC).is_err());
}

/// The processes know nothing of the dispatcher, and end with it nevertheless.
#[test]
fn a_killed_dispatcher_leaves_no_process_behind() {
    if !enter() {
        return;
    }
    let mut dispatcher = Dispatcher::start(&keepers(2, ""));
    let processes = processes_of(&ready(&dispatcher, 2));
    dispatcher.process.kill();
    wait_until("the processes to end", || processes.iter().all(|&pid| !is_alive(pid)));
    assert!(TcpStream::connect(PUBLIC).is_err());
}

/// With pins and `on_dispatcher_loss = "serve"`, nothing is noticed by clients.
#[test]
fn the_kernel_chooses_while_the_dispatcher_is_gone() {
    if !enter() {
        return;
    }
    chooses_without_dispatcher(&keepers(3, ""), |_| {});
}

/// Three processes of `pool` serve on without a dispatcher, and with the next one; `more` is done
/// to it.
pub fn chooses_without_dispatcher(pool: &str, more: impl FnOnce(&Dispatcher)) {
    let (pins, folder) = outliving(pool);
    let mut dispatcher = Dispatcher::start_in(folder.path());
    let processes = processes_of(&ready(&dispatcher, 3));
    assert!(dispatcher.status().pools[0].steer.as_ref().unwrap().pinned);
    let mut held: Vec<TcpStream> = (0..30).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[10; 3]);
    for (round, signal) in [Signal::SIGKILL, Signal::SIGUSR1].into_iter().enumerate() {
        dispatcher.process.signal(signal);
        dispatcher.process.wait();
        // No dispatcher: the kernel shares these exactly, too.
        held.extend((0..15).map(|_| connect()));
        dispatcher = Dispatcher::start_in(folder.path());
        let pool = ready(&dispatcher, 3);
        assert_eq!(processes_of(&pool).len(), 3);
        assert!(processes_of(&pool).iter().all(|pid| processes.contains(pid)));
        let each = 10 + 5 * (round as u64 + 1);
        wait_loads(&dispatcher, &[each; 3]);
    }
    // It is in command again.
    command(&dispatcher, &["drain", "web/web-2"]);
    held.extend((0..10).map(|_| connect()));
    wait_loads(&dispatcher, &[25, 25]);
    command(&dispatcher, &["resume", "web/web-2"]);
    more(&dispatcher);
    drop(held);
    wait_loads(&dispatcher, &[0; 3]);
    command(&dispatcher, &["restart", "web", "--wait"]);
    assert!(dispatcher.stop().success());
    assert!(!has_files(&pins.path().join("pins")), "no pin is left");
    assert!(TcpStream::connect(PUBLIC).is_err());
}

/// A process that died while there was no dispatcher is replaced, and its slot used again.
#[test]
fn a_process_that_died_meanwhile_is_replaced() {
    if !enter() {
        return;
    }
    let (_pins, folder) = outliving(&keepers(2, ""));
    let mut dispatcher = Dispatcher::start_in(folder.path());
    let processes = processes_of(&ready(&dispatcher, 2));
    dispatcher.process.kill();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(processes[0]), Signal::SIGKILL).unwrap();
    wait_until("its end", || !is_alive(processes[0]));
    let held: Vec<TcpStream> = (0..4).map(|_| connect()).collect();
    let dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 2);
    let more: Vec<TcpStream> = (0..4).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[4, 4]);
    drop((held, more));
    command(&dispatcher, &["status"]);
}

/// It ends after its last connection. The next dispatcher does not know what it counts.
#[test]
fn a_process_that_closed_its_listener_meanwhile_keeps_its_connections_and_is_replaced() {
    if !enter() {
        return;
    }
    closes_without_dispatcher(&keepers(2, ""));
}

/// One of two processes of `pool` closes its listener without a dispatcher.
pub fn closes_without_dispatcher(pool: &str) {
    let (_pins, folder) = outliving(pool);
    let mut dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 2);
    let leaves = pid_of(&dispatcher, "web-2");
    let mut clients: Vec<TcpStream> = (0..20).map(|_| dial()).collect();
    clients.retain_mut(|client| answer(client) == leaves);
    assert!(!clients.is_empty());
    dispatcher.process.kill();
    signal(leaves, Signal::SIGUSR1);
    wait_until("its listener to be closed", || sockets(leaves) == clients.len());
    for _ in 0..2 {
        dispatcher.process.kill();
        dispatcher = Dispatcher::start_in(folder.path());
        let pool = ready(&dispatcher, 2);
        assert!(!processes_of(&pool).contains(&leaves));
        let log = dispatcher.log();
        assert!(log.contains("event=process_leaves") && !log.contains("worker_not_steered"));
        assert!((0..20).all(|_| answer(&mut dial()) != leaves));
    }
    clients.iter_mut().for_each(assert_open);
    signal(leaves, Signal::SIGTERM);
    wait_until("it to end", || !is_alive(leaves));
    dispatcher.wait_status("its end to be known", |status| {
        status.pools[0].processes.as_ref().is_some_and(|it| (it.active, it.leaving) == (2, 0))
    });
}

/// Its listener may be at all addresses: it serves on.
#[test]
fn a_server_at_all_addresses_is_adopted() {
    if !enter() {
        return;
    }
    // Its first argument is its own address.
    let program = KEEPER.replace("sys.argv[1], int", "'0.0.0.0', int");
    let pool = keepers(2, "").replace(&quoted(KEEPER), &quoted(&program));
    stays_without_dispatcher(&pool);
}

/// The two processes of `pool` are those of the next dispatcher.
pub fn stays_without_dispatcher(pool: &str) {
    let (_pins, folder) = outliving(pool);
    let mut dispatcher = Dispatcher::start_in(folder.path());
    let processes = processes_of(&ready(&dispatcher, 2));
    let mut clients: Vec<TcpStream> = (0..20).map(|_| dial()).collect();
    clients.iter_mut().for_each(|client| assert!(answer(client) > 0));
    dispatcher.process.kill();
    let dispatcher = Dispatcher::start_in(folder.path());
    wait_loads(&dispatcher, &[10; 2]);
    let pool = dispatcher.status().pools.remove(0);
    assert!(processes_of(&pool).iter().all(|pid| processes.contains(pid)));
    assert!(!dispatcher.log().contains("event=process_leaves"), "{}", dispatcher.log());
    clients.iter_mut().for_each(assert_open);
}
