//! Shared ports: workers that die, hang and return.

use std::fs;
use std::net::TcpStream;

use dispatch_steer::{Error, WorkerSettings};
use nix::sys::signal::Signal;
use test_support::wait_until;

use crate::hostile::{Forger, SYN, black_hole};
use crate::lab::*;
use crate::shared_lab::*;

/// Each client is answered.
fn all_served(clients: &mut [TcpStream]) {
    for client in clients {
        read_hello(client);
    }
}

/// What waits in a queue of a killed worker is served by others, without and with the kernel's own
/// migration.
fn queue_of_a_killed_worker(migrate_req: &str) {
    let Some(mut lab) = Lab::sharing(4) else { return };
    fs::write("/proc/sys/net/ipv4/tcp_migrate_req", migrate_req).unwrap();
    lab.signal(1, Signal::SIGSTOP);
    let mut clients: Vec<TcpStream> = (0..200).map(|_| dial(V4)).collect();
    eventually("all to be connected", vec![50; 4], || lab.live());
    assert_eq!(lab.steering().queue_len(1).unwrap(), 50);
    lab.slay(1);
    assert_eq!(lab.steering().queue_len(1).unwrap(), 50, "the listener outlives its worker");
    lab.steering().evict(1).unwrap();
    assert_eq!(lab.steering().queue_len(1).unwrap(), 0);
    all_served(&mut clients);
    let live = lab.live();
    assert_eq!((live[1], live.iter().sum()), (0, 200), "{live:?}");
    assert!(spread(&[live[0], live[2], live[3]]) <= 1, "{live:?}");
    let moves = lab.steering().moves().unwrap();
    assert_eq!((moves.migrated, moves.lost), (50, 0));
    lab.settled();
    // A new process of the worker serves the same listener.
    lab.steering().restore(1).unwrap();
    lab.inherit(1, HEIR, &[V4]);
    clients.extend((0..64).map(|_| connect(V4)));
    let live = lab.live();
    assert_eq!(live[1], 64, "{live:?}");
    drop(clients);
    lab.empty();
}

#[test]
fn the_queue_of_a_killed_worker_is_served_by_others() {
    queue_of_a_killed_worker("0");
}

#[test]
fn the_queue_of_a_killed_worker_is_served_by_others_if_the_kernel_migrates() {
    queue_of_a_killed_worker("1");
}

#[test]
fn a_new_process_of_a_worker_inherits_the_queue() {
    let Some(mut lab) = Lab::sharing(1) else { return };
    lab.signal(0, Signal::SIGSTOP);
    let mut clients: Vec<TcpStream> = (0..20).map(|_| dial(V4)).collect();
    lab.slay(0);
    let refused = lab.steering().evict(0);
    assert!(matches!(refused, Err(Error::Invalid(_))), "it is the only one: {refused:?}");
    lab.inherit(0, HEIR, &[V4]);
    all_served(&mut clients);
    lab.settled();
    drop(clients);
    lab.empty();
}

#[test]
fn the_queue_of_a_hanging_worker_is_moved_and_the_worker_returns() {
    let Some(mut lab) = Lab::sharing(3) else { return };
    let mut early: Vec<TcpStream> = (0..30).map(|_| connect(V4)).collect();
    lab.signal(2, Signal::SIGSTOP);
    let mut waiting: Vec<TcpStream> = (0..30).map(|_| dial(V4)).collect();
    eventually("all to be connected", vec![20; 3], || lab.live());
    assert_eq!(lab.steering().queue_len(2).unwrap(), 10);
    lab.steering().evict(2).unwrap();
    all_served(&mut waiting);
    assert_eq!(lab.live(), [25, 25, 10], "it keeps what it has accepted");
    waiting.extend((0..10).map(|_| connect(V4)));
    assert_eq!(lab.live(), [30, 30, 10], "it gets nothing new");
    lab.steering().restore(2).unwrap();
    lab.signal(2, Signal::SIGCONT);
    waiting.extend((0..20).map(|_| connect(V4)));
    assert_eq!(lab.live(), [30, 30, 30]);
    lab.settled();
    // Those that were moved end where they went.
    drop(waiting);
    eventually("only the first ones to count", vec![10; 3], || lab.live());
    lab.settled();
    early.clear();
    lab.empty();
}

#[test]
fn a_connection_that_moves_twice_counts_once() {
    let Some(mut lab) = Lab::sharing(3) else { return };
    for worker in 0..3 {
        lab.signal(worker, Signal::SIGSTOP);
    }
    let mut clients: Vec<TcpStream> = (0..30).map(|_| dial(V4)).collect();
    eventually("all to be connected", vec![10; 3], || lab.live());
    lab.steering().evict(0).unwrap();
    assert_eq!(lab.live(), [0, 15, 15]);
    lab.steering().evict(1).unwrap();
    assert_eq!(lab.live(), [0, 0, 30]);
    lab.steering().restore(0).unwrap();
    lab.steering().evict(2).unwrap();
    assert_eq!(lab.live(), [30, 0, 0]);
    // Some end in the queue, some in a worker.
    drop(clients.split_off(20));
    lab.signal(0, Signal::SIGCONT);
    all_served(&mut clients);
    eventually("the others to end", vec![20, 0, 0], || lab.live());
    lab.settled();
    drop(clients);
    lab.empty();
}

#[test]
fn full_and_draining_workers_take_what_would_be_lost() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    let one = WorkerSettings { maximum: 5, ..WorkerSettings::new(1) };
    lab.steering().set_worker(0, one).unwrap();
    lab.signal(1, Signal::SIGSTOP);
    let mut clients: Vec<TcpStream> = (0..10).map(|_| dial(V4)).collect();
    eventually("all to be connected", vec![5; 2], || lab.live());
    lab.steering().evict(1).unwrap();
    all_served(&mut clients);
    assert_eq!(lab.live(), [10, 0]);
    lab.signal(0, Signal::SIGSTOP);
    lab.steering().restore(1).unwrap();
    clients.push(dial(V4));
    lab.signal(1, Signal::SIGCONT);
    let draining = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
    lab.steering().set_worker(0, draining).unwrap();
    lab.signal(0, Signal::SIGCONT);
    lab.signal(1, Signal::SIGSTOP);
    clients.push(dial(V4));
    lab.steering().evict(1).unwrap();
    all_served(&mut clients[11..]);
    assert_eq!(lab.steering().moves().unwrap().lost, 0);
    eventually("all to count", 12, || lab.live().iter().sum::<i64>());
    lab.signal(1, Signal::SIGCONT);
    drop(clients);
    lab.empty();
}

#[test]
fn handshakes_under_way_move_too() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    black_hole();
    let draining = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
    lab.steering().set_worker(1, draining).unwrap();
    let forger = Forger::new();
    for n in 0..20 {
        forger.send(n, 1024, SYN);
    }
    let by_worker = |lab: &mut Lab, worker| {
        lab.steering().counts(worker).unwrap().pending(dispatch_steer::second())
    };
    assert_eq!((by_worker(&mut lab, 0), by_worker(&mut lab, 1)), (20, 0));
    lab.steering().set_worker(1, WorkerSettings::new(1)).unwrap();
    lab.steering().evict(0).unwrap();
    // The kernel moves a request when it sends its answer again, after a second.
    eventually("all to move", 20, || lab.steering().moves().unwrap().migrated);
    assert_eq!((by_worker(&mut lab, 0), by_worker(&mut lab, 1)), (0, 20));
    eventually("the flood to be forgotten", 0, || lab.pending());
    assert_eq!(lab.live(), [0, 0]);
}

#[test]
fn a_removed_workers_queue_is_served_by_others() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    lab.signal(0, Signal::SIGSTOP);
    let mut clients: Vec<TcpStream> = (0..10).map(|_| dial(V4)).collect();
    eventually("all to be connected", vec![5; 2], || lab.live());
    lab.steering().remove_worker(0).unwrap();
    all_served(&mut clients);
    assert_eq!(lab.live(), [0, 10]);
    assert!(lab.steering().is_free(0).unwrap());
    lab.slay(0);
    lab.steering().set_worker(0, WorkerSettings::new(1)).unwrap();
    lab.inherit(0, HEIR, &[V4]);
    clients.extend((0..10).map(|_| connect(V4)));
    assert_eq!(lab.live(), [10, 10]);
    drop(clients);
    lab.empty();
    // Its own listeners, sinks included.
    lab.steering = None;
    lab.slay(0);
    lab.slay(1);
    wait_until("no socket to listen", || run("ss -tlnH").is_empty());
}
