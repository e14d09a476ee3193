//! Each policy of the kernel, with real listeners.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};

use dispatch_steer::decision::{Choice, Pool};
use dispatch_steer::policy::{key_of, node};
use dispatch_steer::{Policy, WorkerCounts, WorkerSettings};
use rustix::net::{AddressFamily, SocketType, bind, connect as connect_socket, socket};

use crate::lab::*;

/// A lab of these weights, with a policy.
fn lab(policy: Policy, weights: &[u16]) -> Option<Lab> {
    let mut lab = Lab::keepers(weights.len() as u32)?;
    lab.steering().set_policy(policy).unwrap();
    assert_eq!(lab.steering().policy(), policy);
    for (worker, &weight) in (0..).zip(weights) {
        lab.steering().set_worker(worker, WorkerSettings::new(weight)).unwrap();
    }
    Some(lab)
}

fn settings(lab: &mut Lab, worker: u32, change: impl FnOnce(&mut WorkerSettings)) {
    let mut settings = lab.steering().worker(worker).unwrap();
    change(&mut settings);
    lab.steering().set_worker(worker, settings).unwrap();
}

fn connections(many: usize) -> Vec<TcpStream> {
    (0..many).map(|_| connect(V4)).collect()
}

/// A connection from this local address.
fn connect_from(from: IpAddr, to: SocketAddr) -> TcpStream {
    let family = if from.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let client = socket(family, SocketType::STREAM, None).unwrap();
    bind(&client, &SocketAddr::new(from, 0)).unwrap();
    connect_socket(&client, &to).unwrap();
    let mut client = TcpStream::from(client);
    read_hello(&mut client);
    client
}

#[test]
fn round_robin_counts_connections_not_load() {
    let Some(mut lab) = lab(Policy::RoundRobin, &[1, 2, 1]) else { return };
    let held = connections(40);
    assert_eq!(lab.live(), [10, 20, 10]);
    drop(held);
    lab.empty();
    // The workers' turns go on, whatever happened to their connections.
    settings(&mut lab, 2, |settings| settings.draining = 1);
    let mut held = connections(30);
    assert_eq!(lab.live(), [10, 20, 0]);
    settings(&mut lab, 2, |settings| settings.draining = 0);
    held.extend(connections(40));
    let live = lab.live();
    assert!(live[2] <= 11, "it does not catch up: {live:?}");
    // A worker that ends and returns.
    lab.kill(0);
    held.extend(connections(30));
    lab.spawn(0, &["python3", "-c", KEEPER, "127.0.0.1", "PORT"]);
    lab.wait_listening(0);
    let before = lab.total();
    held.extend(connections(40));
    let after = lab.total();
    let turns: Vec<u64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    assert!(turns[0].abs_diff(10) <= 1 && turns[1].abs_diff(20) <= 1, "{turns:?}");
    drop(held);
    lab.empty();
}

#[test]
fn round_robin_is_even_when_many_connect_at_once() {
    let Some(mut lab) = lab(Policy::RoundRobin, &[1, 1, 2]) else { return };
    let held: Vec<TcpStream> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| connections(50))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    // Processors that choose at the same moment can give a worker the same turn; it waits longer
    // for the next one.
    let live = lab.live();
    let processors = std::thread::available_parallelism().unwrap().get() as u64;
    let error = (live[0].abs_diff(100)).max(live[1].abs_diff(100)).max(live[2].abs_diff(200));
    assert!(error <= processors, "{live:?}");
    drop(held);
    lab.empty();
}

#[test]
fn random_and_two_choices_draw_by_weight() {
    let Some(mut lab) = lab(Policy::Random, &[1, 1, 2]) else { return };
    let held = connections(400);
    let live = lab.live();
    // Five standard deviations.
    assert!((57..=143).contains(&live[0]) && (57..=143).contains(&live[1]), "{live:?}");
    assert_ne!(live, [100, 100, 200], "not by load");
    drop(held);
    lab.empty();
    lab.steering().set_policy(Policy::TwoChoices).unwrap();
    let held = connections(400);
    let live = lab.live();
    assert!((90..=110).contains(&live[0]) && (185..=215).contains(&live[2]), "{live:?}");
    drop(held);
    lab.empty();
}

#[test]
fn hash_returns_each_client_to_its_worker() {
    let Some(mut lab) = lab(Policy::Hash, &[1, 1, 1]) else { return };
    for worker in 0..3 {
        settings(&mut lab, worker, |settings| settings.node = node(&format!("web-{worker}"), 0));
    }
    let clients: Vec<Ipv4Addr> = (1..=60).map(|n| Ipv4Addr::new(127, 0, 1, n)).collect();
    // The worker of each client.
    let owners = |lab: &mut Lab| -> Vec<usize> {
        let owner = |&client: &Ipv4Addr| {
            let before = lab.total();
            drop(connect_from(client.into(), V4));
            let after = lab.total();
            (0..3).find(|&worker| after[worker] > before[worker]).unwrap()
        };
        clients.iter().map(owner).collect()
    };
    let before = owners(&mut lab);
    for worker in 0..3 {
        let share = before.iter().filter(|&&owner| owner == worker).count();
        assert!((5..=40).contains(&share), "{before:?}");
    }
    assert_eq!(owners(&mut lab), before);
    lab.kill(1);
    for (before, now) in before.iter().zip(owners(&mut lab)) {
        assert!(if *before == 1 { now != 1 } else { now == *before });
    }
    lab.spawn(1, &["python3", "-c", KEEPER, "127.0.0.1", "PORT"]);
    lab.wait_listening(1);
    assert_eq!(owners(&mut lab), before, "its clients return");
    lab.empty();
}

#[test]
fn hash_is_that_of_the_pure_function_for_both_families() {
    let Some(mut lab) = Lab::new() else { return };
    lab.steering().set_policy(Policy::Hash).unwrap();
    for worker in 0..3 {
        lab.keeper("::");
        let weight = 1 + worker as u16;
        lab.steering().set_worker(worker, WorkerSettings::new(weight)).unwrap();
    }
    let all: Vec<WorkerSettings> = (0..3).map(|n| lab.steering().worker(n).unwrap()).collect();
    let mut held = Vec::new();
    for n in 1..=30u8 {
        let v6 = Ipv6Addr::new(0xfd00, 0x1234, 0, 0x5678, 0, 0, 0x9abc, n.into());
        run(&format!("ip -6 addr add {v6}/128 dev lo nodad"));
        for (client, to) in [(IpAddr::from([127, 0, 2, n]), V4), (v6.into(), V6)] {
            let counts: Vec<WorkerCounts> =
                (0..3).map(|n| lab.steering().counts(n).unwrap()).collect();
            let pool = Pool {
                policy: Policy::Hash,
                seed: 0,
                settings: &all,
                counts: &counts,
                totals: lab.steering().totals().unwrap(),
                second: dispatch_steer::second(),
                is_v6: to.is_ipv6(),
                key: key_of(client),
            };
            let Choice::Worker(expected) = pool.choose() else { panic!("no worker") };
            let before = lab.total();
            held.push(connect_from(client, to));
            let after = lab.total();
            assert_eq!(after[expected as usize], before[expected as usize] + 1, "{client}");
        }
    }
    assert!(lab.live().iter().all(|&live| live > 0), "{:?}", lab.live());
    drop(held);
    lab.empty();
}

#[test]
fn failover_uses_the_standby_while_the_primary_is_down() {
    let Some(mut lab) = lab(Policy::Failover, &[1, 1]) else { return };
    settings(&mut lab, 0, |settings| settings.priority = 1);
    let mut held = connections(10);
    assert_eq!(lab.live(), [10, 0]);
    settings(&mut lab, 0, |settings| settings.suspect = 1);
    held.extend(connections(5));
    assert_eq!(lab.live(), [10, 5]);
    settings(&mut lab, 0, |settings| settings.suspect = 0);
    held.extend(connections(5));
    assert_eq!(lab.live(), [15, 5]);
    // A full primary is up: clients wait for it.
    settings(&mut lab, 0, |settings| settings.maximum = 15);
    let waiting = std::thread::spawn(|| connect(V4));
    test_support::wait_until("its SYN to be dropped", || lab.steering().totals().unwrap().full > 0);
    settings(&mut lab, 0, |settings| settings.maximum = 0);
    held.push(waiting.join().unwrap());
    assert_eq!(lab.live(), [16, 5]);
    lab.kill(0);
    held.extend(connections(5));
    assert_eq!(lab.total(), [16, 10]);
    drop(held);
    lab.empty();
}
