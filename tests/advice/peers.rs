//! Peers that are silent, slow, or answer what no dispatcher answers.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::hosts::*;
use test_support::*;

/// Sends pieces until the other side has gone.
fn endless(stream: &mut TcpStream, head: &str, piece: &[u8]) {
    let mut open = stream.write_all(head.as_bytes()).is_ok();
    while open {
        open = stream.write_all(piece).is_ok();
    }
}

/// Sends one byte after the other until the other side has gone.
fn slowly(stream: &mut TcpStream, text: &str) {
    for byte in text.bytes().cycle() {
        if stream.write_all(&[byte]).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn many(count: usize) -> String {
    let server = "{\"addresses\":[\"192.0.2.1:80\"],\"state\":\"ok\",\"load\":0,\"capacity\":1,\"weight\":1,\"age_ms\":0}";
    let servers = vec![server; count].join(",");
    format!("{{\"instance\":\"fake\",\"pools\":[{{\"pool\":\"web\",\"servers\":[{servers}]}}]}}")
}

const OK: &str = "HTTP/1.1 200 OK\r\n";

/// Each kind of peer, with the state that names it.
fn hostile() -> Vec<(&'static str, &'static str, FakePeer)> {
    let said = |body: String| FakePeer::start(move |stream| say(stream, &body));
    let with = |from: &str, to: &str| said(figures("192.0.2.1:80", 5, "1").replace(from, to));
    vec![
        ("silent", "silent", FakePeer::silent()),
        ("not HTTP", "malformed", FakePeer::start(|stream| _ = stream.write_all(&[0xff; 64]))),
        ("nothing", "malformed", FakePeer::start(|_| ())),
        ("not JSON", "malformed", said("<html>".to_owned())),
        ("other JSON", "malformed", said("{\"pools\":[7]}".to_owned())),
        ("no instance", "malformed", with("\"fake\"", "\"\"")),
        ("a wildcard", "malformed", said(figures("0.0.0.0:80", 5, "1"))),
        ("no address", "malformed", said(figures("javascript:alert(1)", 5, "1"))),
        ("a negative weight", "malformed", said(figures("192.0.2.1:80", 5, "-1"))),
        ("no weight", "malformed", said(figures("192.0.2.1:80", 5, "0"))),
        ("an endless load", "malformed", said(figures("192.0.2.1:80", u64::MAX, "1"))),
        ("an unknown state", "malformed", with("\"ok\"", "\"best\"")),
        (
            "a cut answer",
            "malformed",
            FakePeer::start(|stream| {
                let _ = write!(stream, "{OK}Content-Length: 100\r\n\r\n{{\"in");
            }),
        ),
        (
            "slow body",
            "slow",
            FakePeer::start(|stream| {
                slowly_after(stream, &format!("{OK}Content-Length: 100000\r\n\r\n"));
            }),
        ),
        ("slow head", "silent", FakePeer::start(|stream| slowly(stream, "HTTP/1.1 200 OK "))),
        (
            "endless body",
            "too-long",
            FakePeer::start(|stream| {
                let head = format!("{OK}Transfer-Encoding: chunked\r\n\r\n");
                let piece = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
                endless(stream, &head, &piece);
            }),
        ),
        (
            "endless head",
            "malformed",
            FakePeer::start(|stream| {
                endless(stream, OK, format!("X: {}\r\n", "x".repeat(1000)).as_bytes());
            }),
        ),
        ("a huge list", "too-long", said(many(5_000))),
        ("very many bytes", "too-long", said(many(20_000))),
        (
            "another status",
            "refused",
            FakePeer::start(|stream| {
                let _ = stream.write_all(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n");
            }),
        ),
    ]
}

fn slowly_after(stream: &mut TcpStream, head: &str) {
    if stream.write_all(head.as_bytes()).is_ok() {
        slowly(stream, " ");
    }
}

#[test]
fn hostile_peers_are_left_out_and_named() {
    let good = Host::start(free_address(), "interval = \"50ms\"", &[], 1);
    for keys in ["interval = \"100ms\"", "mode = \"fresh\""] {
        let hostile = hostile();
        let mut peers: Vec<_> = hostile.iter().map(|(_, _, peer)| peer.address).collect();
        peers.push(good.advice);
        let keys = format!("{keys}\nrequest_timeout = \"500ms\"\nvalid_for = \"1m\"");
        let listen = free_address();
        let host = Host::start(listen, &keys, &[good.advice], 1);
        host.wait_addresses(&[host.web(), good.web()]);
        let before = host.dispatcher.fds();
        reloading::reload(&host.dispatcher, &one_host(listen, &keys, &peers, ""));
        // With `mode = "fresh"` a request asks them.
        host.wait_addresses(&[host.web(), good.web()]);
        for (what, state, peer) in &hostile {
            host.wait_peer(peer.address, state);
            let status = host.status();
            let known = status.peers.iter().find(|p| p.address == peer.address.to_string());
            let known = known.unwrap();
            assert!(known.failures[*state] > 0 && known.error.is_some(), "{what}: {known:?}");
            let line = format!("event=advice_peer_left_out peer={} why={state}", peer.address);
            wait_for_log(&host.dispatcher, &line);
            let metric = format!("dispatcher_advice_peer_up{{peer=\"{}\"}} 0", peer.address);
            let (_, metrics) = http_get(&host.dispatcher.admin(), "/metrics").unwrap();
            assert!(metrics.contains(&metric), "{what}: {metrics}");
            let faults = host.dispatcher.status().faults;
            let named = |fault: &dispatcher::api::status::FaultStatus| {
                fault.kind == "advice_peer" && fault.subject == peer.address.to_string()
            };
            assert!(faults.iter().any(|fault| named(fault) && fault.ongoing), "{what}: {faults:?}");
        }
        host.wait_peer(good.advice, "ok");
        // They change nothing in the answers.
        for _ in 0..3 {
            let all = host.addresses("?all").addresses;
            let known: Vec<_> = all.iter().map(|one| one.address.as_str()).collect();
            assert_eq!(known.len(), 2, "{known:?}");
            assert!(!known.contains(&"192.0.2.1:80"), "{known:?}");
        }
        // Nothing of them stays.
        reloading::reload(&host.dispatcher, &one_host(listen, &keys, &[good.advice], ""));
        wait_until("their descriptors to be closed", || host.dispatcher.fds() <= before + 2);
        assert_eq!(host.status().peers.len(), 1);
        let faults = host.dispatcher.status().faults;
        let ongoing = faults.iter().filter(|fault| fault.kind == "advice_peer" && fault.ongoing);
        assert_eq!(ongoing.count(), 0, "{faults:?}");
    }
}

#[test]
fn a_silent_peer_costs_a_fresh_request_one_timeout() {
    let silent = FakePeer::silent();
    let timeout = Duration::from_millis(500);
    let keys = "mode = \"fresh\"\nrequest_timeout = \"500ms\"\nvalid_for = \"1h\"";
    let host = Host::start(free_address(), keys, &[silent.address], 1);
    assert_eq!(silent.asked(), 0, "no client has asked for advice");
    let web = host.web().to_string();
    for round in 1..=3 {
        let began = Instant::now();
        assert_eq!(host.best().address, web);
        assert!(began.elapsed() >= timeout, "the peer was waited for");
        // One question, and no more: it was left out of this answer only, and is asked again.
        assert_eq!(silent.asked(), round);
    }
    // Requests that come during a round share it: with 30 at once there are two rounds at most.
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..30).map(|_| scope.spawn(|| host.best().address)).collect();
        asking.into_iter().for_each(|answer| assert_eq!(answer.join().unwrap(), web));
    });
    assert!((4..=5).contains(&silent.asked()), "{} questions", silent.asked());
    host.wait_peer(silent.address, "silent");
}

#[test]
fn a_silent_peer_costs_an_interval_request_nothing() {
    let silent = FakePeer::silent();
    let host = Host::start(free_address(), "interval = \"50ms\"", &[], 1);
    let keys = "interval = \"1h\"\nrequest_timeout = \"4s\"\nvalid_for = \"2h\"";
    let peers = [silent.address];
    reloading::reload(&host.dispatcher, &one_host(host.advice, keys, &peers, ""));
    wait_until("the peer to be asked", || silent.asked() == 1);
    let web = host.web().to_string();
    // While the peer keeps its only question unanswered, all of these are answered.
    for _ in 0..200 {
        assert_eq!(host.best().address, web);
    }
    assert_eq!(silent.asked(), 1, "no request asks it");
    host.wait_peer(silent.address, "silent");
    assert_eq!(silent.asked(), 1);
}

#[test]
fn silent_peers_are_asked_again_each_interval_and_delay_no_other() {
    let silent = FakePeer::silent();
    let answering = FakePeer::start(|stream| say(stream, &figures("192.0.2.1:80", 5, "1")));
    let keys = "interval = \"100ms\"\nrequest_timeout = \"10s\"\nvalid_for = \"1m\"";
    let peers = [silent.address, answering.address];
    let host = Host::start(free_address(), keys, &peers, 1);
    wait_until("the other peer to be asked ten times", || answering.asked() >= 10);
    assert_eq!(silent.over(), 0, "while the silent one had its first question");
    assert!(host.addresses("").addresses.iter().any(|one| one.address == "192.0.2.1:80"));
    let quick = "interval = \"100ms\"\nrequest_timeout = \"100ms\"";
    reloading::reload(&host.dispatcher, &one_host(host.advice, quick, &peers, ""));
    wait_until("the silent peer to be asked again and again", || silent.asked() >= 5);
}

#[test]
fn figures_that_are_too_old_are_not_used() {
    let old = figures("192.0.2.1:80", 5, "1").replace("\"age_ms\":0", "\"age_ms\":2500");
    let older = old.replace("2500", "3500").replace("192.0.2.1", "192.0.2.2");
    let [old, older] = [old, older].map(|body| FakePeer::start(move |stream| say(stream, &body)));
    let keys = "mode = \"fresh\"\nvalid_for = \"3s\"";
    let host = Host::start(free_address(), keys, &[old.address, older.address], 0);
    wait_until("an answer", || {
        let answer = host.addresses("");
        let known: Vec<_> = answer.addresses.iter().map(|one| one.address.as_str()).collect();
        assert!(!known.contains(&"192.0.2.2:80"), "{known:?}");
        assert!(known.is_empty() || answer.valid_for_ms <= 500, "{answer:?}");
        known == ["192.0.2.1:80"]
    });
    host.wait_peer(older.address, "ok");
}

#[test]
fn a_pool_that_only_peers_have_can_be_asked_for() {
    let body = figures("192.0.2.1:80", 5, "1").replace("\"web\"", "\"chat\"");
    let peer = FakePeer::start(move |stream| say(stream, &body));
    let host = Host::start(free_address(), "interval = \"50ms\"", &[peer.address], 1);
    let best = wait_for("its pool to be known", || {
        let (code, best) = ask(host.advice, "/v1/pools/chat/best");
        (code == 200).then_some(best)
    });
    assert_eq!((&best["address"], &best["score"]), (&"192.0.2.1:80".into(), &6.0.into()));
}

#[test]
fn an_own_address_that_a_peer_claims_stays_the_own_one() {
    let listen = free_address();
    let web = free_address();
    let body = figures(&web.to_string(), 999, "1");
    let peer = FakePeer::start(move |stream| say(stream, &body));
    let config = one_host(listen, "interval = \"50ms\"", &[peer.address], "");
    let config = config.replace(&format!("{}:0", listen.ip()), &web.to_string());
    let host = Host::start_with(&config, listen, 1);
    host.wait_peer(peer.address, "ok");
    let all = host.addresses("?all").addresses;
    assert_eq!((all.len(), &all[0].address, all[0].load), (1, &web.to_string(), 0));
}
