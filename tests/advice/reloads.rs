//! Which keys a reload puts into force.

use crate::hosts::*;
use test_support::*;

#[test]
fn every_key_but_the_address_applies_at_once() {
    let listen = free_address();
    let peer = FakePeer::start(|stream| say(stream, &figures("192.0.2.1:80", 5, "1")));
    let host = Host::start(listen, "interval = \"50ms\"", &[], 1);
    host.wait_addresses(&[host.web()]);
    let reload = |body: &str| reloading::reload(&host.dispatcher, body);

    // A peer comes, and goes.
    let with = one_host(listen, "interval = \"50ms\"", &[peer.address], "");
    assert_eq!(reloading::names(&reload(&with)["changed"]), ["advice"]);
    host.wait_addresses(&[host.web(), "192.0.2.1:80".parse().unwrap()]);
    reload(&one_host(listen, "interval = \"50ms\"", &[], ""));
    host.wait_addresses(&[host.web()]);
    assert_eq!(host.status().peers.len(), 0);

    // The mode: peers are asked with each request, and only then.
    reload(&one_host(listen, "mode = \"fresh\"", &[peer.address], ""));
    host.wait_addresses(&[host.web(), "192.0.2.1:80".parse().unwrap()]);
    let asked = peer.asked();
    host.best();
    assert_eq!((peer.asked(), host.status().mode.as_str()), (asked + 1, "fresh"));

    // The history, and its end.
    reload(&one_host(listen, "history = 2", &[], ""));
    host.wait_addresses(&[host.web()]);
    (0..3).for_each(|_| _ = host.best());
    let kept = |host: &Host| {
        let path = "/v1/pools/web/advice/history";
        let (code, body) = http_get(&host.dispatcher.admin(), path).unwrap();
        assert_eq!(code, 200, "{body}");
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        (body["size"].as_u64().unwrap(), body["answers"].as_array().unwrap().len())
    };
    assert_eq!(kept(&host), (2, 2));
    reload(&one_host(listen, "", &[], ""));
    wait_until("the answers to be dropped", || kept(&host) == (0, 0));

    // What a listener advertises.
    let plain = one_host(listen, "interval = \"50ms\"", &[], "");
    let advertised =
        plain.replace("pool = \"web\"\n", "pool = \"web\"\nadvertise = \"www.example.org:443\"\n");
    let changed = reload(&advertised);
    assert_eq!(reloading::names(&changed["changed"]), ["listener web", "advice"]);
    wait_until("the name to be advised", || host.best().address == "www.example.org:443");
    assert_eq!(reloading::names(&reload(&plain)["changed"]), ["listener web"]);
    wait_until("the address to be advised", || host.best().address == host.web().to_string());

    // The address itself needs a restart; the rest of the file is put into force.
    let moved = one_host(free_address(), "interval = \"60ms\"", &[], "");
    let moved = reload(
        &moved.replace(&format!("address = \"{}", free_address().ip()), "address = \"127.0.0.1"),
    );
    assert_eq!(reloading::names(&moved["needs_restart"]), ["advice_listen"]);
    assert!(reloading::names(&moved["changed"]).contains(&"advice"), "{moved}");
    assert_eq!(ask(listen, "/v1/own").0, 200, "it listens where it did");
    let off = one_pool("");
    let off = reload(&off);
    assert_eq!(reloading::names(&off["needs_restart"]), ["advice_listen"]);
    assert_eq!(ask(listen, "/v1/own").0, 200);
}

#[test]
fn a_bad_key_changes_nothing() {
    let listen = free_address();
    let host = Host::start(listen, "interval = \"50ms\"", &[], 1);
    let bad = one_host(listen, "interval = \"1m\"", &[], "");
    write_config(&host.dispatcher.dir, &bad);
    let refused = reloading::run(&host.dispatcher, &["reload"]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78));
    assert!(
        error.contains("`valid_for` must be longer than `interval`") && error.contains('^'),
        "{error}"
    );
    host.wait_addresses(&[host.web()]);
}

#[test]
fn wildcards_are_not_advised() {
    let listen = free_address();
    let config = one_host(listen, "interval = \"50ms\"", &[], "")
        .replace(&format!("address = \"{}:0\"", listen.ip()), "address = \"0.0.0.0:0\"");
    let host = Host::start_with(&config, listen, 1);
    assert_eq!(host.addresses("?all").addresses, []);
    assert_eq!(ask(listen, "/v1/pools/web/best").0, 503);
    let check = reloading::run(
        &host.dispatcher,
        &["check", host.dispatcher.dir.join("dispatcher.toml").to_str().unwrap()],
    );
    let said = String::from_utf8_lossy(&check.stderr).into_owned();
    assert!(said.contains("it listens on all addresses") && said.contains("^^^"), "{said}");
    let wild = config.replace("pool = \"web\"\n", "pool = \"web\"\nadvertise = \"0.0.0.0:80\"\n");
    write_config(&host.dispatcher.dir, &wild);
    let refused = reloading::run(&host.dispatcher, &["reload"]);
    assert_eq!(refused.status.code(), Some(78));
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(error.contains("stands for all addresses"), "{error}");
}
