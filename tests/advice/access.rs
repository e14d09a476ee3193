//! Who may ask, what is answered, and what one client can take from others.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::hosts::*;
use test_support::*;

#[test]
fn only_allowed_networks_and_peers_may_ask() {
    let listen = free_address();
    let config = |allow: &str| format!("{allow}{}", one_host(listen, "", &[], ""));
    let host = Host::start_with(&config("advice_allow = [\"192.0.2.0/24\"]\n"), listen, 1);
    for path in ["/v1/pools/web/best", "/v1/pools/web/addresses", "/v1/own", "/"] {
        let (code, body) = ask(listen, path);
        assert_eq!((code, &body["problem"]), (403, &"forbidden".into()), "{path}");
        assert!(body["hint"].as_str().unwrap().contains("advice_allow"), "{body}");
    }
    assert_eq!(host.status().refused["denied"], 4);
    // A peer is told so, and names it.
    let other = free_address();
    let asking = Host::start(other, "interval = \"50ms\"", &[listen], 1);
    asking.wait_peer(listen, "refused");
    reloading::reload(&host.dispatcher, &config("advice_allow = [\"127.0.0.0/8\"]\n"));
    assert_eq!(host.best().address, host.web().to_string());
    asking.wait_peer(listen, "ok");
    reloading::reload(&host.dispatcher, &config("advice_allow = []\n"));
    assert_eq!(ask(listen, "/v1/own").0, 403);
    // The default allows this machine.
    reloading::reload(&host.dispatcher, &config(""));
    assert_eq!(ask(listen, "/v1/own").0, 200);
}

#[test]
fn it_is_read_only_and_answers_three_paths() {
    let host = Host::start(free_address(), "", &[], 1);
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        for path in ["/v1/pools/web/best", "/v1/pools/web/addresses", "/v1/own"] {
            let (code, head, body) = request(host.advice, &format!("{method} {path} HTTP/1.1"));
            assert_eq!(code, 405, "{method} {path}: {body}");
            assert!(head.contains("allow: get, head"), "{head}");
        }
    }
    for path in ["/", "/v1/status", "/metrics", "/v1/workers", "/v1/pools/web", "/v1/reload"] {
        let (code, body) = ask(host.advice, path);
        assert_eq!((code, &body["problem"]), (404, &"not_found".into()), "{path}");
    }
    assert_eq!(ask(host.advice, "/v1/pools/web/addresses?everything").0, 400);
    let (code, head, body) = request(host.advice, "HEAD /v1/pools/web/best HTTP/1.1");
    assert_eq!((code, body.as_str()), (200, ""));
    assert!(head.contains("content-type: application/json") && head.contains("no-store"), "{head}");
    for line in ["nonsense", "GET /v1/own HTTP/9.9", "GET /v1/pools/%ff%fe/best HTTP/1.1"] {
        let (code, _, body) = request(host.advice, line);
        assert!(code == 400 && body.contains("\"error\""), "{line}: {code} {body}");
    }
}

#[test]
fn processes_are_named_only_with_advice_detail() {
    let listen = free_address();
    let config =
        |detail: bool| format!("advice_detail = {detail}\n{}", one_host(listen, "", &[], ""));
    let host = Host::start_with(&config(false), listen, 2);
    let pids = host.workers.iter().map(|worker| worker.pid().to_string()).collect::<Vec<_>>();
    let raw = |path: &str| request(listen, &format!("GET {path} HTTP/1.1")).2;
    for path in ["/v1/pools/web/best", "/v1/pools/web/addresses?all", "/v1/own"] {
        let body = raw(path);
        for word in pids.iter().map(String::as_str).chain(["workers", "pid", "w0"]) {
            assert!(
                !body.contains(&format!("\"{word}")) && !body.contains(&format!(":{word},")),
                "{path}: {word} in {body}"
            );
        }
    }
    reloading::reload(&host.dispatcher, &config(true));
    wait_until("the workers to be named", || {
        let all = host.addresses("").addresses;
        let mut named: Vec<_> =
            all[0].workers.iter().map(|worker| worker.pid.to_string()).collect();
        named.sort();
        let mut pids = pids.clone();
        pids.sort();
        named == pids && all[0].workers.iter().any(|worker| worker.name == "w0")
    });
}

#[test]
fn one_client_cannot_keep_others_out() {
    let host = Host::start(free_address(), "", &[], 1);
    let before = host.dispatcher.fds();
    // Idle connections, then more than one address may have.
    let mut idle: Vec<TcpStream> = (0..192).map(|_| connect(host.advice)).collect();
    wait_until("a further connection to be refused", || {
        let (code, _, body) = request(host.advice, "GET /v1/own HTTP/1.1");
        idle.push(connect(host.advice));
        code == 503 && body.contains("has 192 connections already")
    });
    // The admin socket is not affected.
    assert_eq!(http_get(&host.dispatcher.admin(), "/healthz").unwrap().0, 200);
    drop(idle);
    wait_until("room again", || request(host.advice, "GET /v1/own HTTP/1.1").0 == 200);
    wait_until("the descriptors to be closed", || host.dispatcher.fds() <= before + 2);
}

#[test]
fn a_long_head_and_a_slow_client_are_refused() {
    let host = Host::start(free_address(), "", &[], 1);
    let mut long = connect(host.advice);
    long.set_read_timeout(Some(PATIENCE)).unwrap();
    let line = format!("GET /v1/own HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    let _ = long.write_all(line.as_bytes());
    let mut answer = String::new();
    long.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    let mut slow = connect(host.advice);
    slow.set_read_timeout(Some(PATIENCE)).unwrap();
    slow.write_all(b"GET /v1/o").unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[test]
fn one_connection_may_ask_many_times() {
    let host = Host::start(free_address(), "", &[], 1);
    let mut stream = connect(host.advice);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let web = host.web().to_string();
    for _ in 0..20 {
        stream.write_all(b"GET /v1/pools/web/best HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        assert!(String::from_utf8(answer).unwrap().contains(&web));
    }
}
