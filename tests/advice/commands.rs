//! `dispatcher advice`, the status, and the metrics.

use std::process::Output;

use crate::hosts::*;
use test_support::*;

fn run(host: &Host, arguments: &[&str]) -> Output {
    reloading::run(&host.dispatcher, arguments)
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_command_shows_addresses_and_answers_with_their_figures() {
    let silent = FakePeer::silent();
    let keys =
        "interval = \"50ms\"\nrequest_timeout = \"100ms\"\nhistory = 3\nmultiplier.queue_wait = 2";
    let host = Host::start(free_address(), keys, &[silent.address], 1);
    host.wait_peer(silent.address, "silent");
    host.wait_addresses(&[host.web()]);
    let text = out(&run(&host, &["advice", "web"]));
    for part in [
        &host.web().to_string(),
        "ADDRESS",
        "ok",
        "queue_wait ?",
        "score: 1 x connections + 2 x queue_wait; mode interval",
        &format!("left out: peer {}: it did not answer within 100ms", silent.address),
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    (0..5).for_each(|_| _ = host.best());
    let json = out(&run(&host, &["advice", "web", "--history", "--json"]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let answers = json["answers"].as_array().unwrap();
    assert_eq!((json["size"].as_u64(), answers.len()), (Some(3), 3));
    let last = answers.last().unwrap();
    assert_eq!(last["chosen"], host.web().to_string());
    assert_eq!((&last["asked"], &last["client"]), (&"best".into(), &"127.0.0.1".into()));
    let figures = &last["addresses"][0];
    assert!(figures["advised"].as_u64().unwrap() >= 4, "{figures}");
    let advised = figures["advised"].as_u64().unwrap() as f64;
    assert_eq!(figures["score"].as_f64(), Some(advised + 1.0), "no load, and a weight of 1");
    let text = out(&run(&host, &["advice", "web", "--history"]));
    assert_eq!(text.matches(" best for 127.0.0.1 -> ").count(), 3, "{text}");
    // To look is not to advise.
    let before = host.status().requests;
    (0..5).for_each(|_| _ = out(&run(&host, &["advice", "web"])));
    assert_eq!(host.status().requests, before);

    let unknown = run(&host, &["advice", "wep"]);
    assert_eq!(unknown.status.code(), Some(66));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("did you mean `web`?"));
    let status = out(&run(&host, &["status"]));
    assert!(status.contains(&format!("advice at {} (interval): ", host.advice)), "{status}");
    assert!(
        status.contains(&format!("advice peer {} silent: it did not answer", silent.address)),
        "{status}"
    );
}

#[test]
fn without_advice_listen_the_command_says_what_to_set() {
    let (dispatcher, _) = start_one_pool("");
    assert!(dispatcher.status().advice.is_none());
    for arguments in [&["advice", "web"][..], &["advice", "web", "--history"]] {
        let output = reloading::run(&dispatcher, arguments);
        assert_eq!(output.status.code(), Some(65));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains("gives no advice") && error.contains("advice_listen"), "{error}");
    }
    let output = reloading::run(&dispatcher, &["advice", "web", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["problem"], "conflict");
    let (_, metrics) = http_get(&dispatcher.admin(), "/metrics").unwrap();
    assert!(!metrics.contains("dispatcher_advice"));
}

#[test]
fn metrics_count_requests_and_peers() {
    let silent = FakePeer::silent();
    let keys = "interval = \"50ms\"\nrequest_timeout = \"100ms\"";
    let host = Host::start(free_address(), keys, &[silent.address], 1);
    host.wait_addresses(&[host.web()]);
    let dispatcher = &host.dispatcher;
    let requests = dispatcher.metric("dispatcher_advice_requests_total");
    (0..7).for_each(|_| _ = host.best());
    assert_eq!(dispatcher.metric("dispatcher_advice_requests_total"), requests + 7.0);
    assert_eq!(ask(host.advice, "/v1/pools/none/best").0, 404);
    assert_eq!(dispatcher.metric("dispatcher_advice_refused_total"), 1.0);
    assert_eq!(dispatcher.metric("dispatcher_advice_addresses"), 1.0);
    host.wait_peer(silent.address, "silent");
    assert_eq!(dispatcher.metric("dispatcher_advice_peer_up"), 0.0);
    assert!(dispatcher.metric("dispatcher_advice_peer_failures_total") >= 1.0);
}
