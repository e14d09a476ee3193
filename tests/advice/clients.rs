//! What the client library of the SDK makes of the answers of real dispatchers.

use std::time::Duration;

use worker_sdk::connector::{Addresses, Connector, ConnectorConfig, Selection};

use crate::hosts::*;
use test_support::*;

/// Each host answers after its `request_timeout`, for which it has waited for the silent one. By
/// default the client waits longer than that.
#[test]
fn a_silent_host_does_not_keep_clients_from_fresh_advice() {
    let silent = FakePeer::silent();
    let listen = [free_address(), free_address()];
    let peers = [listen[0], listen[1], silent.address];
    let hosts = listen.map(|listen| Host::start(listen, "mode = \"fresh\"", &peers, 1));
    let web = hosts.each_ref().map(|host| host.web());
    for selection in [Selection::Best, Selection::RoundRobin] {
        let advice = Addresses::advice(listen.map(|listen| listen.to_string()), "web").unwrap();
        let config = ConnectorConfig::new(advice).selection(selection);
        let blocks = Connector::new(config.clone()).unwrap();
        let tasks = worker_sdk::connector::tokio::Connector::new(config).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for with_tokio in [true, false] {
            let before = silent.asked();
            let peer = match with_tokio {
                true => runtime.block_on(tasks.connect()).map(|connection| connection.peer()),
                false => blocks.connect().map(|connection| connection.peer()),
            };
            assert!(web.contains(&peer.unwrap()), "{selection:?}, tokio: {with_tokio}");
            // The silent one was waited for.
            assert!(silent.asked() > before, "{selection:?}, tokio: {with_tokio}");
        }
    }
}

/// A peer with this many servers of the pool `web`.
fn peer_with(count: usize, network: u8) -> FakePeer {
    let server = |n: usize| {
        format!(
            "{{\"addresses\":[\"10.{network}.{}.{}:80\"],\"state\":\"ok\",\"load\":9,\
             \"capacity\":1,\"weight\":1,\"age_ms\":0}}",
            n / 256,
            n % 256
        )
    };
    let servers: Vec<String> = (0..count).map(server).collect();
    let servers = servers.join(",");
    let body = format!(
        "{{\"instance\":\"n{network}\",\"pools\":[{{\"pool\":\"web\",\"servers\":[{servers}]}}]}}"
    );
    FakePeer::start(move |stream| say(stream, &body))
}

#[test]
fn a_list_has_no_more_addresses_than_a_client_reads_and_the_rest_is_counted_and_named_once() {
    let peers = [peer_with(1_024, 1), peer_with(1_000, 2), peer_with(1_025, 3)];
    let addresses = peers.each_ref().map(|peer| peer.address);
    let keys = "interval = \"100ms\"\nvalid_for = \"1m\"";
    let host = Host::start(free_address(), keys, &addresses, 1);
    host.wait_peer(addresses[0], "ok");
    host.wait_peer(addresses[1], "ok");
    // No dispatcher has so many addresses of a pool.
    host.wait_peer(addresses[2], "too-long");
    let known = 1 + 1_024 + 1_000;
    for round in 1..=3 {
        let list = host.addresses("");
        assert_eq!((list.addresses.len(), list.left_out), (1_024, known - 1_024));
        assert_eq!(list.addresses[0].address, host.web().to_string(), "the best come first");
        let left_out = host.status().left_out;
        assert_eq!(left_out["addresses"], round * (known as u64 - 1_024), "{left_out:?}");
    }
    let (_, metrics) = http_get(&host.dispatcher.admin(), "/metrics").unwrap();
    let metric = format!("dispatcher_advice_left_out_total{{what=\"addresses\"}} {}", 3 * 1_001);
    assert!(metrics.contains(&metric), "{metrics}");
    let line = "event=advice_shortened to=clients pool=web left_out=1001 details=0";
    wait_for_log(&host.dispatcher, line);
    let status = reloading::run(&host.dispatcher, &["status"]);
    let text = String::from_utf8_lossy(&status.stdout);
    assert!(text.contains("lists for clients had no room for 3003 addresses"), "{text}");

    let advice = Addresses::advice([host.advice.to_string()], "web").unwrap();
    let config = ConnectorConfig::new(advice)
        .selection(Selection::InOrder)
        .attempt_timeout(Duration::from_secs(60))
        .advice_timeout(Duration::from_secs(60));
    let connection = Connector::new(config).unwrap().connect().unwrap();
    assert_eq!(connection.peer(), host.web());
    let log = host.dispatcher.log();
    assert_eq!(log.matches("event=advice_shortened").count(), 1, "{log}");
}
