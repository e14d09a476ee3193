//! Shared ports: which worker gets a connection, and when it counts.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use dispatch_steer::{Policy, WorkerSettings};
use nix::sys::signal::Signal;
use test_support::wait_until;

use crate::counting::begin;
use crate::hostile::{ACK, Forger, SYN, black_hole};
use crate::lab::*;
use crate::shared_lab::*;

#[test]
fn sequential_connections_are_shared_exactly() {
    let Some(mut lab) = Lab::sharing(4) else { return };
    for _ in 0..200 {
        let mut client = connect(V4);
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0, "the worker has ended its side");
    }
    lab.empty();
    assert_eq!(lab.total(), [50; 4]);
    let totals = lab.steering().totals().unwrap();
    // An acknowledgement may come when the worker's end of the connection is gone.
    assert_eq!((totals.chosen, totals.failed), (200, 0), "{totals:?}");
}

#[test]
fn a_thousand_held_connections_are_even() {
    let Some(mut lab) = Lab::sharing(4) else { return };
    let held: Vec<TcpStream> = std::thread::scope(|scope| {
        let hold = || (0..125).map(|_| connect(V4)).collect::<Vec<_>>();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(hold)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    lab.settled();
    let live = lab.live();
    assert_eq!(live.iter().sum::<i64>(), 1000);
    assert!(spread(&live) <= 1, "{live:?}");
    assert_eq!(lab.steering().handshakes().unwrap(), 0, "completed ones are forgotten");
    drop(held);
    lab.empty();
}

#[test]
fn weights_slow_start_and_suspicion_decide() {
    let Some(mut lab) = Lab::sharing(3) else { return };
    lab.steering().set_worker(0, WorkerSettings::new(3)).unwrap();
    let slow = WorkerSettings { slow_start: 500, ..WorkerSettings::new(2) };
    lab.steering().set_worker(2, slow).unwrap();
    let held: Vec<TcpStream> = (0..50).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [30, 10, 10]);
    drop(held);
    lab.empty();

    let suspect = WorkerSettings { suspect: 1, ..WorkerSettings::new(1) };
    lab.steering().set_worker(0, suspect).unwrap();
    let limited = WorkerSettings { maximum: 2, ..WorkerSettings::new(1) };
    lab.steering().set_worker(1, limited).unwrap();
    lab.steering().set_worker(2, limited).unwrap();
    let held: Vec<TcpStream> = (0..7).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [3, 2, 2], "suspects only when the others are full");
    drop(held);
    lab.empty();
}

#[test]
fn a_draining_worker_keeps_its_clients_and_gets_no_new_ones() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    let mut held: Vec<TcpStream> = (0..10).map(|_| connect(V4)).collect();
    let draining = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
    lab.steering().set_worker(1, draining).unwrap();
    held.extend((0..10).map(|_| connect(V4)));
    assert_eq!(lab.live(), [15, 5]);
    lab.steering().set_worker(1, WorkerSettings::new(1)).unwrap();
    held.extend((0..10).map(|_| connect(V4)));
    assert_eq!(lab.live(), [15, 15]);
    lab.settled();
    drop(held);
    lab.empty();
}

#[test]
fn when_all_workers_are_full_clients_wait_and_then_get_the_first_place() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    for worker in 0..2 {
        let limited = WorkerSettings { maximum: 3, ..WorkerSettings::new(1) };
        lab.steering().set_worker(worker, limited).unwrap();
    }
    let mut held: Vec<TcpStream> = (0..6).map(|_| connect(V4)).collect();
    let waiting = std::thread::spawn(|| connect(V4));
    wait_until("its SYN to be dropped", || lab.steering().totals().unwrap().full > 0);
    assert_eq!(lab.live(), [3, 3]);
    held.pop();
    held.push(waiting.join().unwrap());
    assert_eq!(lab.live(), [3, 3]);
    assert_eq!(lab.steering().totals().unwrap().no_sink, 0);
    drop(held);
    lab.empty();
}

#[test]
fn clients_wait_for_a_worker_for_a_while() {
    let Some(mut lab) = Lab::without_heirs(Duration::from_secs(60)) else { return };
    let worker = lab.enlist();
    let draining = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
    lab.steering().set_worker(worker, draining).unwrap();
    lab.inherit(worker, HEIR, &[V4]);
    let client = std::thread::spawn(|| connect(V4));
    wait_until("a SYN to be dropped", || lab.steering().totals().unwrap().waited > 0);
    lab.steering().set_worker(worker, WorkerSettings::new(1)).unwrap();
    drop(client.join().unwrap());
    lab.empty();
    // The end of the wait.
    lab.steering().set_worker(worker, draining).unwrap();
    lab.steering().set_wait(Duration::from_millis(1)).unwrap();
    let refused = TcpStream::connect_timeout(&V4, Duration::from_secs(20)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(lab.steering().totals().unwrap().no_sink, 0);
}

#[test]
fn ipv6_clients_are_shared_exactly() {
    let Some(mut lab) = Lab::without_heirs(Duration::ZERO) else { return };
    for _ in 0..4 {
        let worker = lab.enlist();
        lab.inherit(worker, HEIR, &[V6]);
    }
    let held: Vec<TcpStream> = (0..200).map(|_| connect(V6)).collect();
    assert_eq!(lab.live(), [50; 4]);
    lab.settled();
    drop(held);
    lab.empty();
}

#[test]
fn one_dual_stack_address_is_for_clients_of_both_families() {
    let Some(mut lab) = Lab::without_heirs(Duration::ZERO) else { return };
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PUBLIC);
    for _ in 0..2 {
        let worker = lab.enlist();
        lab.inherit(worker, HEIR, &[any]);
    }
    let held: Vec<TcpStream> =
        (0..100).map(|n| connect(if n % 3 == 0 { V6 } else { V4 })).collect();
    assert_eq!(lab.live(), [50, 50]);
    assert_eq!(lab.steering().handshakes().unwrap(), 0);
    assert_eq!(lab.pending(), 0, "the request of an IPv4 client at an IPv6 listener is known");
    lab.settled();
    drop(held);
    lab.empty();
}

#[test]
fn several_public_addresses_have_one_balance() {
    let Some(mut lab) = Lab::without_heirs(Duration::ZERO) else { return };
    let all = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), PUBLIC + 1);
    for _ in 0..3 {
        let worker = lab.enlist();
        lab.inherit(worker, HEIR, &[V4, all]);
    }
    let second = SocketAddr::new(Ipv4Addr::new(127, 0, 0, 9).into(), PUBLIC + 1);
    let held: Vec<TcpStream> =
        (0..90).map(|n| connect(if n % 5 < 2 { V4 } else { second })).collect();
    assert_eq!(lab.live(), [30; 3]);
    // A worker without a listener at one of the addresses gets nothing.
    let partial = lab.enlist();
    lab.inherit(partial, HEIR, &[V4]);
    let more: Vec<TcpStream> = (0..30).map(|_| connect(second)).collect();
    assert_eq!(lab.live(), [40, 40, 40, 0]);
    assert!(lab.steering().counts(partial).unwrap().problem().is_some());
    lab.inherit(partial, HEIR, &[V4, all]);
    let rest: Vec<TcpStream> = (0..40).map(|_| connect(second)).collect();
    assert_eq!(lab.live(), [40; 4]);
    drop((held, more, rest));
    eventually("no connection to count", vec![0; 4], || lab.live());
    // Without the address, only the other one is left.
    lab.steering().remove_public(all).unwrap();
    drop(connect(V4));
}

#[test]
fn a_connection_that_the_client_half_closed_counts_until_the_server_ends_it() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    let mut halves: Vec<TcpStream> = (0..20).map(|_| connect(V4)).collect();
    for client in &mut halves {
        client.write_all(b"stay\n").unwrap();
    }
    wait_until("the workers to read", || {
        run("ss -tnH state established")
            .lines()
            .all(|line| line.split_whitespace().next() == Some("0"))
    });
    for client in &halves {
        client.shutdown(Shutdown::Write).unwrap();
    }
    wait_until("the workers' side to be half-closed", || {
        run("ss -tnH state close-wait").lines().count() == 20
    });
    assert_eq!(lab.live(), [10, 10], "the workers still have them");
    lab.settled();
    drop(halves);
    lab.slay(0);
    lab.slay(1);
    eventually("the killed workers' connections to end", vec![0, 0], || lab.live());
}

#[test]
fn connections_that_nothing_accepts_count_and_end_with_a_reset() {
    let Some(mut lab) = Lab::without_heirs(Duration::ZERO) else { return };
    for _ in 0..2 {
        let worker = lab.enlist();
        lab.inherit(worker, IDLE, &[V4]);
    }
    let waiting: Vec<TcpStream> = (0..100).map(|_| dial(V4)).collect();
    eventually("all to be connected", vec![50, 50], || lab.live());
    assert_eq!(lab.steering().queue_len(0).unwrap(), 50);
    for client in waiting {
        rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    }
    lab.empty();
    assert_eq!(lab.total(), [50, 50]);
    // Ended connections stay in a queue until they are accepted. They are not moved as load.
    lab.steering().evict(0).unwrap();
    assert_eq!(lab.live(), [0, 0]);
    assert_eq!(lab.steering().queue_len(0).unwrap(), 0);
}

#[test]
fn a_full_backlog_leaves_nothing_behind() {
    let Some(mut lab) = Lab::without_heirs(Duration::ZERO) else { return };
    fs::write("/proc/sys/net/ipv4/tcp_syncookies", "0").unwrap();
    // Room for two connections each, so most SYNs are dropped again and again.
    for _ in 0..2 {
        let worker = lab.enlist();
        let listener = lab.steering().open_listener(worker, V4, 1).unwrap();
        lab.hand_over(worker, IDLE, vec![listener]);
    }
    let clients: Vec<TcpStream> = (0..40).map(|_| begin()).collect();
    wait_until("both backlogs to be full", || lab.live().iter().all(|&live| live == 2));
    wait_until("SYNs to be tried again", || lab.steering().totals().unwrap().chosen > 50);
    drop(clients);
    eventually("no handshake to count", 0, || lab.pending());
    // The queues are closed with the listeners.
    lab.steering().remove_worker(0).unwrap();
    lab.steering().remove_worker(1).unwrap();
    eventually("no connection to count", vec![0, 0], || lab.live());
}

#[test]
fn handshakes_with_syn_cookies_are_shared_and_leave_nothing_pending() {
    let Some(mut lab) = Lab::sharing(4) else { return };
    fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap();
    let held: Vec<TcpStream> = (0..400).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [100; 4]);
    assert_eq!(lab.pending(), 0);
    lab.settled();
    assert!(lab.steering().totals().unwrap().repeated >= 400, "each ACK is looked up");
    assert_eq!(lab.steering().handshakes().unwrap(), 0);
    drop(held);
    lab.empty();
}

#[test]
fn policies_choose_among_listeners_of_a_group() {
    let Some(mut lab) = Lab::sharing(3) else { return };
    lab.steering().set_policy(Policy::RoundRobin).unwrap();
    lab.steering().set_worker(1, WorkerSettings::new(2)).unwrap();
    let held: Vec<TcpStream> = (0..40).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [10, 20, 10]);
    drop(held);
    lab.empty();
    // A SYN that is answered with a cookie and the ACK after it are one turn.
    fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap();
    let held: Vec<TcpStream> = (0..40).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [10, 20, 10]);
    assert_eq!(lab.pending(), 0);
    drop(held);
    lab.empty();
    // A client has the worker that its address belongs to; its queue moves by the same rule.
    lab.steering().set_policy(Policy::Hash).unwrap();
    let held: Vec<TcpStream> = (0..20).map(|_| connect(V4)).collect();
    let live = lab.live();
    let owner = live.iter().position(|&many| many == 20).unwrap() as u32;
    lab.signal(owner, Signal::SIGSTOP);
    let mut waiting: Vec<TcpStream> = (0..5).map(|_| dial(V4)).collect();
    lab.steering().evict(owner).unwrap();
    waiting.iter_mut().for_each(read_hello);
    assert!(lab.live().contains(&5), "all at one worker: {:?}", lab.live());
    lab.steering().restore(owner).unwrap();
    lab.signal(owner, Signal::SIGCONT);
    drop((held, waiting));
    lab.empty();
}

#[test]
fn a_syn_flood_neither_stops_nor_skews_the_service() {
    let Some(mut lab) = Lab::without_heirs(Duration::ZERO) else { return };
    black_hole();
    // The kernel remembers few handshakes, so that most of the flood is answered with SYN cookies.
    fs::write("/proc/sys/net/ipv4/tcp_max_syn_backlog", "64").unwrap();
    fs::write("/proc/sys/net/core/somaxconn", "64").unwrap();
    for _ in 0..4 {
        let worker = lab.enlist();
        let limited = WorkerSettings { maximum: 600, ..WorkerSettings::new(1) };
        lab.steering().set_worker(worker, limited).unwrap();
        lab.inherit(worker, HEIR, &[V4]);
    }
    let forger = Forger::new();
    let mut held: Vec<TcpStream> = Vec::new();
    for round in 0..100u32 {
        for n in 0..100 {
            forger.send(round * 100 + n, 1024, SYN);
        }
        held.push(connect(V4));
    }
    let totals = lab.steering().totals().unwrap();
    assert!(totals.chosen >= 10_000, "{totals:?}");
    let cookies = run("nstat -az TcpExtSyncookiesSent");
    assert!(!cookies.contains(" 0 "), "most were answered with cookies: {cookies}");
    assert_eq!(totals.full, 0, "10,000 forged SYNs do not fill 2,400 places: {totals:?}");
    assert!(lab.pending() <= 600, "only handshakes that the kernel remembers: {}", lab.pending());
    let live = lab.live();
    assert!(live.iter().all(|&live| (10..=40).contains(&live)), "{live:?}");
    eventually("the flood to be forgotten", 0, || lab.pending());
    held.extend((0..100).map(|_| connect(V4)));
    let live = lab.live();
    assert!(spread(&live) <= 1, "{live:?}");
    assert_eq!(live.iter().sum::<i64>(), 200);
    drop(held);
    eventually("no connection to count", vec![0; 4], || lab.live());
}

#[test]
fn stray_acks_count_nothing_at_all() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    black_hole();
    let forger = Forger::new();
    for n in 0..2_000 {
        forger.send(n, 2000, ACK);
    }
    assert_eq!(lab.pending(), 0, "they are no SYNs");
    assert_eq!(lab.steering().totals().unwrap().chosen, 0);
    let held: Vec<TcpStream> = (0..50).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [25, 25]);
    drop(held);
    lab.empty();
}
