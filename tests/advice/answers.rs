//! What clients are told: three dispatchers that know each other.

use dispatcher::api::advice::AddressRecord;

use crate::hosts::*;
use test_support::*;

/// Three hosts with the same list of peers, each with two workers.
fn three(keys: &str) -> Vec<Host> {
    let peers: Vec<_> = (0..3).map(|_| free_address()).collect();
    let start = |&listen| Host::start(listen, keys, &peers, 2);
    peers.iter().map(start).collect()
}

fn find(addresses: &[AddressRecord], address: impl ToString) -> &AddressRecord {
    let address = address.to_string();
    addresses.iter().find(|one| one.address == address).expect("the address")
}

#[test]
fn every_host_advises_the_same_addresses_with_their_loads() {
    for keys in ["interval = \"50ms\"", "mode = \"fresh\""] {
        let hosts = three(keys);
        let web: Vec<_> = hosts.iter().map(Host::web).collect();
        for host in &hosts {
            host.wait_addresses(&web);
        }
        let clients: Vec<_> = (0..12).map(|_| Client::connect(web[0]).unwrap()).collect();
        let more: Vec<_> = (0..6).map(|_| Client::connect(web[1]).unwrap()).collect();
        for host in &hosts {
            wait_until("the loads to be known", || {
                let all = host.view();
                let load = |n: usize| find(&all, web[n]).load;
                (load(0), load(1), load(2)) == (12, 6, 0)
            });
            let answer = host.addresses("");
            assert_eq!(answer.pool, "web");
            let first = &answer.addresses[0];
            assert_eq!((&first.address, &*first.state), (&web[2].to_string(), "ok"));
            assert_eq!((first.weight, first.capacity.is_some()), (2.0, true));
            assert!(answer.addresses.is_sorted_by(|a, b| a.score <= b.score), "{answer:?}");
            let last = &answer.addresses[2];
            assert_eq!((&last.address, last.load), (&web[0].to_string(), 12));
            assert!(answer.valid_for_ms <= 3_000 && first.age_ms <= 3_000, "{answer:?}");
            assert_eq!(host.best().address, web[2].to_string());
        }
        drop((clients, more));
    }
}

#[test]
fn a_host_that_is_gone_is_left_out_and_advised_again_when_it_is_back() {
    let mut hosts = three("interval = \"50ms\"\nrequest_timeout = \"200ms\"");
    let web: Vec<_> = hosts.iter().map(Host::web).collect();
    hosts.iter().for_each(|host| host.wait_addresses(&web));
    // A stopped host is silent, a killed one refuses connections.
    let stopped = hosts[2].advice;
    hosts[2].dispatcher.process.signal(nix::sys::signal::Signal::SIGSTOP);
    hosts[0].wait_addresses(&web[..2]);
    let left_out = |why: &str| format!("event=advice_peer_left_out peer={stopped} why={why}");
    wait_for_log(&hosts[0].dispatcher, &left_out("silent"));
    hosts[2].dispatcher.process.signal(nix::sys::signal::Signal::SIGCONT);
    hosts[0].wait_addresses(&web);
    hosts[2].kill();
    wait_for_log(&hosts[0].dispatcher, &left_out("unreachable"));
    hosts[0].wait_addresses(&web[..2]);
    hosts[2].start_again();
    let again = hosts[2].web();
    hosts[0].wait_addresses(&[web[0], web[1], again]);
    let answers = format!("event=advice_peer_answers peer={stopped}");
    wait_for_log(&hosts[0].dispatcher, &answers);
    // The fault is in the status, and over.
    let over = "the fault to be over";
    hosts[0].dispatcher.wait_status(over, |status| {
        let peer = stopped.to_string();
        let mut faults = status.faults.iter().filter(|fault| fault.kind == "advice_peer");
        faults.any(|fault| fault.subject == peer && !fault.ongoing)
    });
}

#[test]
fn the_same_list_of_peers_on_all_hosts_is_no_loop() {
    let hosts = three("interval = \"50ms\"");
    for host in &hosts {
        host.wait_peer(host.advice, "itself");
        let status = host.status();
        assert!(status.peers.iter().all(|peer| peer.error.is_none()), "{status:?}");
        assert_eq!(host.addresses("?all").addresses.len(), 3);
    }
}

#[test]
fn pools_that_cannot_take_clients_are_omitted_or_last() {
    let listen = free_address();
    let pools = ["web", "full", "draining", "refusing", "unserved"];
    let mut body = advice(listen, "interval = \"50ms\"", &[]);
    for pool in pools {
        let wait = if pool == "refusing" { "0s" } else { "1h" };
        body += &format!(
            "[[listener]]\nname = \"{pool}\"\naddress = \"{}:0\"\npool = \"{pool}\"\n\
             [pool.{pool}]\nmax_connections_per_worker = 1\nwait_for_worker = \"{wait}\"\n",
            listen.ip()
        );
    }
    let host = Host::start_with(&body, listen, 1);
    let dispatcher = &host.dispatcher;
    let _workers = ["full", "draining"].map(|pool| dispatcher.worker("tokio", pool, pool));
    for pool in ["full", "draining"] {
        dispatcher.wait_joined(pool, 1);
    }
    let _clients =
        ["full", "draining"].map(|pool| Client::connect(dispatcher.address(pool)).unwrap());
    let drained = reloading::run(dispatcher, &["drain", "--pool", "draining"]);
    assert!(drained.status.success());
    for pool in pools {
        let state = if pool == "web" { "ok" } else { pool };
        let path = format!("/v1/pools/{pool}/addresses?all");
        let all = wait_for(&format!("pool {pool} to be {state}"), || {
            let (code, all) = ask(listen, &path);
            assert_eq!(code, 200, "{all}");
            (all["addresses"][0]["state"] == state).then_some(all)
        });
        let address = dispatcher.address(pool).to_string();
        assert_eq!(all["addresses"][0]["address"], address);
        assert_eq!(all["addresses"].as_array().unwrap().len(), 1);
        let (_, usable) = ask(listen, &format!("/v1/pools/{pool}/addresses"));
        let (code, best) = ask(listen, &format!("/v1/pools/{pool}/best"));
        if pool == "web" {
            assert_eq!(
                (code, &best["address"], usable["addresses"].as_array().unwrap().len()),
                (200, &address.into(), 1)
            );
        } else {
            assert_eq!((code, &usable["addresses"]), (503, &serde_json::json!([])), "{pool}");
            assert!(best["error"].as_str().unwrap().contains(pool), "{best}");
        }
    }
    let (code, unknown) = ask(listen, "/v1/pools/wep/best");
    assert_eq!((code, &unknown["error"]), (404, &"there is no pool `wep`".into()));
    assert_eq!(unknown["hint"], serde_json::Value::Null, "clients are not told the names");
    let status = host.status();
    assert_eq!((status.refused["no_address"], status.refused["unknown_pool"]), (4, 1));
}

#[test]
fn a_dispatcher_that_stops_is_not_advised() {
    let (one, two) = (free_address(), free_address());
    let first = Host::start(one, "interval = \"50ms\"", &[two], 1);
    let second = Host::start(two, "interval = \"50ms\"", &[one], 1);
    first.wait_addresses(&[first.web(), second.web()]);
    let (web, leaving) = (first.web(), second.web());
    // An untaken connection delays the end of the stop.
    second.workers[0].signal(nix::sys::signal::Signal::SIGSTOP);
    let _waiting = connect(leaving);
    second.dispatcher.wait_status("a connection in flight", |status| status.in_flight == 1);
    second.dispatcher.process.signal(nix::sys::signal::Signal::SIGTERM);
    wait_until("it to be draining", || {
        first.view().iter().any(|one| one.address == leaving.to_string() && one.state == "draining")
    });
    first.wait_addresses(&[web]);
}

#[test]
fn clients_that_ask_at_the_same_time_are_spread() {
    let hosts = three("interval = \"1s\"");
    let web: Vec<_> = hosts.iter().map(Host::web).collect();
    hosts[0].wait_addresses(&web);
    // No load changes: only the advice itself counts.
    let mut tally = std::collections::BTreeMap::new();
    (0..300).for_each(|_| *tally.entry(hosts[0].best().address).or_insert(0) += 1);
    assert!(tally.len() == 3 && tally.values().all(|n| (90..=110).contains(n)), "{tally:?}");
}

#[test]
fn gauges_of_the_workers_are_part_of_the_score() {
    let (one, two) = (free_address(), free_address());
    let keys = "interval = \"50ms\"\nvalid_for = \"1h\"\n\
                multiplier = { queue_wait = 100, free_memory = -1, sessions = 0, connections = 1 }";
    let start = |listen, peer| Host::start_with(&one_host(listen, keys, &[peer], ""), listen, 0);
    let hosts = [start(one, two), start(two, one)];
    let workers = [own_worker(&hosts[0].dispatcher, "a"), own_worker(&hosts[1].dispatcher, "b")];
    let asked: Vec<_> = workers.iter().map(|worker| worker.gauge("queue_wait").unwrap()).collect();
    let memory: Vec<_> =
        workers.iter().map(|worker| worker.gauge("free_memory").unwrap()).collect();
    memory.iter().for_each(|gauge| gauge.set(0.0));
    let (slow, quick) = (hosts[0].web(), hosts[1].web());
    asked[0].set(0.5);
    asked[1].set(0.0);
    for host in &hosts {
        wait_until("the quick host to be best", || {
            let all = host.addresses("").addresses;
            all.len() == 2
                && find(&all, slow).score >= find(&all, quick).score + 40.0
                && all[0].address == quick.to_string()
        });
    }
    // More memory is better.
    memory[0].set(100.0);
    wait_until("the host with memory to be best", || hosts[1].best().address == slow.to_string());
    // The workers are asked for the gauges of advice, whatever the policy.
    let shown = hosts[0].dispatcher.status().pools[0].workers[0].gauges.clone();
    assert!(shown.iter().any(|gauge| gauge.name == "queue_wait"), "{shown:?}");
}

#[test]
fn a_worker_with_an_address_of_its_own_is_a_server_of_its_own() {
    let listen = free_address();
    let own = "127.0.0.1:7001";
    let host = Host::start(listen, "interval = \"50ms\"", &[], 1);
    let environment = [("DISPATCH_ADVERTISE", own)];
    let worker = host.dispatcher.worker_with("tokio", "web", "direct", &environment);
    host.wait_addresses(&[host.web(), own.parse().unwrap()]);
    let clients: Vec<_> = (0..6).map(|_| Client::connect(host.web()).unwrap()).collect();
    wait_until("both loads", || {
        let all = host.view();
        (find(&all, host.web()).load, find(&all, own).load) == (6, 3)
    });
    assert_eq!((find(&host.view(), host.web()).weight, find(&host.view(), own).weight), (2.0, 1.0));
    let drained = reloading::run(&host.dispatcher, &["drain", "web/direct"]);
    assert!(drained.status.success());
    wait_until("it to be draining", || find(&host.view(), own).state == "draining");
    host.wait_addresses(&[host.web()]);
    drop((clients, worker));
    wait_until("it to be gone", || host.view().len() == 1);
}

#[test]
fn the_sdk_measures_what_advice_needs() {
    let listen = free_address();
    let host = Host::start(listen, "interval = \"50ms\"\nmultiplier.process_rss = 1", &[], 1);
    let worker = "the worker to show its memory";
    host.dispatcher.wait_status(worker, |status| {
        let gauges = &pool(status, "web").workers[0].gauges;
        gauges.iter().any(|gauge| gauge.name == "process_rss" && gauge.value.is_some())
    });
    wait_until("the score to include it", || host.best().score > 1.0);
}
