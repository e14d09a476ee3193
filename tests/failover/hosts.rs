//! Three hosts, each with a dispatcher and four workers, and 200 clients with sessions, while hosts
//! are killed, stopped, cut off and revived.
//!
//! No client may be without a server for longer than its own limits while one host is up, and each
//! host has to serve again after its revival. The hosts are loopback addresses, or network
//! namespaces whose links go down and drop packets. `FAILOVER_SECONDS` sets the duration,
//! `FAILOVER_SEED` repeats the faults of a run.
//!
//! Clients with a list choose in turn. Clients with advice ask the dispatchers, and in a run of
//! five minutes or more the faults are two minutes apart: the mean loads of the second one are
//! within a tenth of even.

mod clients;
pub mod host;
pub mod network;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use test_support::*;
use worker_sdk::connector::{Addresses, ConnectorConfig, Selection};

use self::clients::{Call, Clients, LIMITS};
use self::host::{Fault, Host};
use self::network::Network;

/// The duration of the faults without `FAILOVER_SECONDS`.
const SECONDS: u64 = 15;

const HOSTS: usize = 3;

/// How much later than its limits a client may have its connection, because the machine is loaded.
const SLACK: Duration = Duration::from_secs(10);

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text}, which is no number")))
}

#[test]
fn clients_with_a_list_survive_the_faults_of_hosts_on_loopback_addresses() {
    run(&Network::Loopback, Source::List);
}

#[test]
fn clients_with_advice_survive_the_faults_of_hosts_in_network_namespaces() {
    let test = "hosts::clients_with_advice_survive_the_faults_of_hosts_in_network_namespaces";
    if let Some(network) = Network::namespaces(test, HOSTS) {
        run(&network, Source::Advice);
    }
}

/// Where clients have the addresses from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    List,
    Advice,
}

impl Source {
    fn config(self, hosts: &[Host]) -> ConnectorConfig {
        match self {
            Source::List => ConnectorConfig::new(
                Addresses::list(hosts.iter().map(|host| host.address.as_str())).unwrap(),
            ),
            Source::Advice => {
                let hosts = hosts.iter().map(|host| host.advice.as_str());
                let addresses = Addresses::advice(hosts, "web").unwrap();
                ConnectorConfig::new(addresses).selection(Selection::Best)
            }
        }
    }
}

/// A time in which a host could not serve.
struct Outage {
    host: usize,
    fault: Fault,
    from: Instant,
    to: Instant,
}

fn run(network: &Network, source: Source) {
    let length = Duration::from_secs(variable("FAILOVER_SECONDS").unwrap_or(SECONDS));
    let seed = variable("FAILOVER_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("FAILOVER_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut hosts: Vec<Host> =
        (0..HOSTS).map(|number| Host::start(network, number, HOSTS)).collect();
    // Long runs have sessions of ten seconds; short ones have to see several of each client.
    let session = if length >= Duration::from_secs(120) { 10_000 } else { 2_000 };
    let clients = Clients::start(&source.config(&hosts), Duration::from_millis(session), &mut rng);
    wait_until("all clients to have a server", || loads(&hosts).iter().sum::<u64>() >= 200);

    let measures = source == Source::Advice && length >= Duration::from_secs(300);
    let began = Instant::now();
    let mut outages: Vec<Outage> = Vec::new();
    let mut kinds = network.faults().into_iter().cycle();
    while began.elapsed() < length {
        // One host goes down, or two: one is always up.
        let mut order: Vec<usize> = (0..hosts.len()).collect();
        rng.shuffle(&mut order);
        let mut down = Vec::new();
        let count = if measures { 1 } else { rng.usize(1..HOSTS) };
        for host in order.into_iter().take(count) {
            let fault = kinds.next().unwrap();
            down.push((host, fault, Instant::now()));
            hosts[host].apply(network, fault);
        }
        let longest = if measures { 20_000 } else { 4_000 };
        std::thread::sleep(Duration::from_millis(rng.u64(1_000..longest)));
        for (host, fault, from) in down {
            hosts[host].revive(network, fault);
            outages.push(Outage { host, fault, from, to: Instant::now() });
        }
        if measures {
            measure(&hosts);
        }
        std::thread::sleep(Duration::from_millis(rng.u64(100..2_000)));
    }
    // Every host has its share again. Each client chooses at random, so the shares differ a little.
    wait_until("each host to serve a fair part of the clients", || {
        loads(&hosts).iter().all(|load| *load >= 30)
    });
    let calls = clients.stop();
    report(&calls, &outages);
    assert!(!outages.is_empty() && calls.iter().any(|call| call.reconnect), "nothing happened");
    check(&calls, &outages, hosts.len()).unwrap_or_else(|problem| panic!("{problem}"));
    for host in &hosts {
        host.dispatcher().wait_status("the end of all sessions", |status| {
            pool(status, "web").workers.iter().all(|worker| worker.load == 0)
        });
    }
}

/// The mean loads of the minute that begins in a minute are within a tenth of even.
fn measure(hosts: &[Host]) {
    let recovered = Instant::now();
    let (from, to) = (Duration::from_secs(60), Duration::from_secs(120));
    std::thread::sleep(from);
    let mut samples: Vec<Vec<u64>> = Vec::new();
    while recovered.elapsed() < to {
        samples.push(loads(hosts));
        std::thread::sleep(Duration::from_millis(500));
    }
    let mean = |host: usize| {
        samples.iter().map(|loads| loads[host] as f64).sum::<f64>() / samples.len() as f64
    };
    let means: Vec<f64> = (0..hosts.len()).map(mean).collect();
    let even = means.iter().sum::<f64>() / means.len() as f64;
    println!("mean loads of {} samples: {means:.1?}", samples.len());
    let is_even = means.iter().all(|mean| (mean - even).abs() <= even / 10.0);
    assert!(is_even, "not within a tenth of even: {means:?}");
}

fn loads(hosts: &[Host]) -> Vec<u64> {
    let load = |host: &Host| {
        pool(&host.dispatcher().status(), "web").workers.iter().map(|worker| worker.load).sum()
    };
    hosts.iter().map(load).collect()
}

fn report(calls: &[Call], outages: &[Outage]) {
    let mut faults: BTreeMap<String, u32> = BTreeMap::new();
    for outage in outages {
        *faults.entry(format!("{:?}", outage.fault)).or_default() += 1;
    }
    let failed = calls.iter().filter(|call| call.problem.is_some()).count();
    let reconnects = calls.iter().filter(|call| call.reconnect).count();
    let longest = calls.iter().map(|call| call.to - call.from).max().unwrap_or_default();
    println!(
        "{} connects and {reconnects} reconnects, {failed} of them without a server; the longest \
         took {longest:?}; faults: {faults:?}",
        calls.len() - reconnects,
    );
}

/// One host is up at every time.
fn check(calls: &[Call], outages: &[Outage], hosts: usize) -> Result<(), String> {
    let limit = LIMITS.total + SLACK;
    // The begin of the time in which each client has had no server.
    let mut without: BTreeMap<usize, Instant> = BTreeMap::new();
    let mut calls: Vec<&Call> = calls.iter().collect();
    calls.sort_by_key(|call| call.from);
    for call in calls {
        // Whatever happened meanwhile: a call that is stuck overlaps with many outages.
        if call.to - call.from > limit {
            return Err(format!("longer than its limits: {call:?}"));
        }
        let since = *without.entry(call.client).or_insert(call.from);
        if call.to - since > limit {
            return Err(format!("without a server since {:?}: {call:?}", call.to - since));
        }
        if call.problem.is_none() {
            without.remove(&call.client);
            continue;
        }
        let overlaps = |outage: &&Outage| outage.from <= call.to && outage.to >= call.from;
        let was_down =
            |host: usize| outages.iter().filter(overlaps).any(|outage| outage.host == host);
        // Else no host was up during the whole call, and the next one has to succeed.
        if !(0..hosts).all(was_down) {
            return Err(format!("a host was up: {call:?}"));
        }
    }
    Ok(())
}

#[test]
fn a_call_that_is_stuck_is_a_failure_whatever_happened_meanwhile() {
    let start = Instant::now();
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    // Each host was down for a while.
    let down =
        |host: usize, from, to| Outage { host, fault: Fault::Kill, from: at(from), to: at(to) };
    let outages = [down(0, 0, 5), down(1, 5, 10), down(2, 10, 15)];
    let failed = Some("all attempts failed".to_owned());
    let call = |from, to, problem| Call {
        client: 7,
        from: at(from),
        to: at(to),
        reconnect: false,
        problem,
    };
    let check = |calls: &[Call]| check(calls, &outages, 3);
    assert_eq!(check(&[call(1, 2, None), call(1, 14, failed.clone()), call(14, 16, None)]), Ok(()));
    for stuck in [failed.clone(), None] {
        let problem = check(&[call(0, 60, stuck)]).unwrap_err();
        assert!(problem.contains("longer than its limits"), "{problem}");
    }
    // One failure after the other is the same for the client.
    let often = (0..20).map(|n| call(2 * n, 2 * n + 2, failed.clone()));
    let outages = [down(0, 0, 50), down(1, 0, 50), down(2, 0, 50)];
    let problem = super::hosts::check(&often.collect::<Vec<_>>(), &outages, 3).unwrap_err();
    assert!(problem.contains("without a server"), "{problem}");
    let problem = super::hosts::check(&[call(1, 2, failed)], &outages[..2], 3).unwrap_err();
    assert!(problem.contains("a host was up"), "{problem}");
}

/// Shared by clients and hosts: whether the run goes on.
type Running = Arc<std::sync::atomic::AtomicBool>;
