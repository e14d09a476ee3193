//! Which worker gets a connection.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use dispatch_steer::{Options, Steering, WorkerSettings};

use crate::lab::*;

#[test]
fn sequential_connections_to_http_servers_are_shared_exactly() {
    let Some(mut lab) = Lab::new() else { return };
    for _ in 0..4 {
        lab.start(&["python3", "-m", "http.server", "PORT", "--bind", "127.0.0.1"]);
    }
    for _ in 0..200 {
        assert!(http(V4).starts_with("HTTP/1.0 200"));
    }
    assert_eq!(lab.total(), [50; 4]);
    lab.empty();
    // The servers' own logs.
    for worker in 0..4 {
        let log = fs::read_to_string(lab.log_of(worker)).unwrap();
        assert_eq!(log.matches("\"GET / HTTP/1.0\" 200").count(), 50, "{log}");
    }
}

#[test]
fn sequential_connections_to_nginx_are_shared_exactly() {
    if !has(&["nginx"]) {
        return;
    }
    let Some(mut lab) = Lab::new() else { return };
    for worker in 0..3 {
        let port = 9000 + worker;
        let folder = lab.files.path().display().to_string();
        let configuration = format!(
            "daemon off; master_process off; pid {folder}/{worker}.pid; error_log stderr;\n\
             events {{}}\nhttp {{ access_log {folder}/{worker}.access; server {{ \
             listen 127.0.0.1:{port}; location / {{ return 200 \"hello\"; }} }} }}\n"
        );
        let path = lab.files.path().join(format!("{worker}.conf"));
        fs::write(&path, configuration).unwrap();
        lab.start(&["nginx", "-c", path.to_str().unwrap()]);
    }
    for _ in 0..60 {
        assert!(http(V4).ends_with("hello"));
    }
    lab.empty();
    assert_eq!(lab.total(), [20; 3]);
}

#[test]
fn a_thousand_held_connections_to_redis_are_even() {
    if !has(&["redis-server"]) {
        return;
    }
    let Some(mut lab) = Lab::new() else { return };
    for _ in 0..4 {
        let persistent = ["--save", "", "--appendonly", "no", "--maxclients", "2000"];
        let command = ["redis-server", "--port", "PORT", "--bind", "127.0.0.1"];
        lab.start(&[&command[..], &persistent[..]].concat());
    }
    // Eight clients at a time, so that handshakes overlap.
    let held: Vec<TcpStream> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| hold(125))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(held.len(), 1000);
    lab.settled();
    let live = lab.live();
    assert_eq!(live.iter().sum::<i64>(), 1000);
    assert!(spread(&live) <= 1, "{live:?}");
    assert_eq!(lab.steering().handshakes().unwrap(), 0, "completed ones are forgotten");
    drop(held);
    lab.empty();
}

/// Two processors choose at the same time, from what the other one has found out.
#[test]
fn clients_at_the_same_time_are_even_with_many_workers() {
    let Some(mut lab) = Lab::keepers(20) else { return };
    let mut held: Vec<TcpStream> = Vec::new();
    for round in 1..=4 {
        let more: Vec<TcpStream> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| hold(50))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        held.extend(more);
        lab.settled();
        let live = lab.live();
        assert!(spread(&live) <= 1, "round {round}: {live:?}");
        // Half of them, of workers as they come: the next ones even it out.
        let keep = held.len() / 2;
        held.truncate(keep);
        eventually("half to end", keep as i64, || lab.live().iter().sum::<i64>());
        while spread(&lab.live()) > 1 {
            held.push(connect(V4));
        }
    }
    drop(held);
    lab.empty();
}

fn hold(many: usize) -> Vec<TcpStream> {
    (0..many).map(|_| dial(V4)).collect()
}

#[test]
fn churn_keeps_workers_even() {
    let Some(mut lab) = Lab::keepers(4) else { return };
    let mut held: Vec<TcpStream> = (0..80).map(|_| connect(V4)).collect();
    // Clients end in an order that has nothing to do with their workers.
    let mut at = 7usize;
    for _ in 0..300 {
        at = (at * 31 + 17) % held.len();
        drop(held.swap_remove(at));
        eventually("a connection to end", 79, || lab.live().iter().sum::<i64>());
        held.push(connect(V4));
        let live = lab.live();
        // One worker may have lost several in a row; new ones make up for it.
        assert!(live.iter().all(|&live| (10..=30).contains(&live)), "{live:?}");
    }
    held.clear();
    lab.empty();
    let total = lab.total();
    assert_eq!(total.iter().sum::<u64>(), 380);
}

/// With many workers the program does not look at all of them each time.
#[test]
fn each_of_many_choices_is_the_least_loaded_worker() {
    const WORKERS: usize = 20;
    let Some(mut lab) = Lab::keepers(WORKERS as u32) else { return };
    let mut random = fastrand::Rng::with_seed(7);
    let mut held: Vec<TcpStream> = Vec::new();
    let mut compared = 0;
    for step in 0..1500 {
        // It grows, stays, and shrinks, twice.
        let wanted = [60, 60, 0][step / 250 % 3];
        let grows = (held.len() as u64) < wanted || (wanted > 0 && random.bool());
        if !grows && !held.is_empty() {
            drop(held.swap_remove(random.usize(..held.len())));
            let left = held.len() as i64;
            eventually("a connection to end", left, || lab.live().iter().sum::<i64>());
            continue;
        }
        let (before, pending) = (lab.live(), lab.pending());
        let totals = lab.steering().totals().unwrap();
        held.push(connect(V4));
        let after = lab.live();
        // The last segment of a connection that has ended may take a turn, too.
        if pending > 0 || lab.steering().totals().unwrap().turn != totals.turn + 1 {
            continue;
        }
        compared += 1;
        let least = before.iter().min().unwrap();
        let mut turns = (1..=WORKERS).map(|n| (totals.last as usize + n) % WORKERS);
        let expected = turns.find(|&worker| before[worker] == *least).unwrap();
        assert_eq!(after[expected], least + 1, "step {step}: {before:?}, then {after:?}");
    }
    assert!(compared > 300, "{compared} choices were compared");
    drop(held);
    lab.empty();
}

#[test]
fn weights_slow_start_and_suspicion_decide() {
    let Some(mut lab) = Lab::keepers(3) else { return };
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
    let Some(mut lab) = Lab::keepers(2) else { return };
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
fn direct_connections_count_as_load() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    let own = SocketAddr::new(V4.ip(), lab.servers[0].port);
    let mut held: Vec<TcpStream> = (0..6).map(|_| connect(own)).collect();
    assert_eq!(lab.live(), [6, 0]);
    held.extend((0..8).map(|_| connect(V4)));
    assert_eq!(lab.live(), [7, 7]);
    lab.settled();
    drop(held);
    lab.empty();
}

#[test]
fn two_pools_in_one_namespace_and_cgroup_do_not_meet() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    let options = Options { cgroup: lab.cgroup().into(), wait: Duration::ZERO };
    let mut other = Steering::load(&options).unwrap();
    let public = SocketAddr::new(V4.ip(), PUBLIC + 1);
    other.add_public(public).unwrap();
    let own = FIRST_PORT + 50;
    other.add_port(7, own).unwrap();
    other.set_worker(7, WorkerSettings::new(1)).unwrap();
    let server = lab.server(own, KEEPER);
    eventually("the other pool's server to listen", [1, 0], || other.counts(7).unwrap().listeners);

    let mut held: Vec<TcpStream> = (0..10).map(|_| connect(V4)).collect();
    held.extend((0..5).map(|_| connect(public)));
    assert_eq!(lab.live(), [5, 5]);
    assert_eq!(other.counts(7).unwrap().live, 5);
    assert_eq!((other.totals().unwrap().chosen, other.handshakes().unwrap()), (5, 0));
    drop(other);
    held.extend((0..10).map(|_| connect(V4)));
    assert_eq!(lab.live(), [10, 10], "the end of one pool changes nothing for the other");
    drop(server);
    drop(held);
    lab.empty();
}
