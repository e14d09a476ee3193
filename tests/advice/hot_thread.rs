//! Requests for advice cost the hot thread nothing: it is asked at most ten times a second, in
//! `mode = "interval"` once in an interval.

use std::io::{Read, Write};
use std::time::Instant;

use crate::hosts::*;
use test_support::*;

/// Turns of the event loop since the start. Each begins with a wake-up, and without a turn the hot
/// thread makes no system call.
fn turns(host: &Host) -> u64 {
    host.dispatcher.status().meters.turn.counts.iter().sum()
}

/// Times the hot thread went to sleep by itself.
fn sleeps(host: &Host) -> u64 {
    let pid = host.dispatcher.process.pid();
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.unwrap().trim().parse().unwrap()
}

/// Asks so often over connections that stay open; a request for the list after each one for an
/// address.
fn ask_often(host: &Host, requests: usize) {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut stream = connect(host.advice);
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                for n in 0..requests / 4 {
                    let path = if n % 2 == 0 { "best" } else { "addresses" };
                    write!(stream, "GET /v1/pools/web/{path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
                    read_answer(&mut stream);
                }
            });
        }
    });
}

fn read_answer(stream: &mut std::net::TcpStream) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 200"), "{head}");
    let length = head.split("content-length: ").nth(1).unwrap().lines().next().unwrap();
    stream.read_exact(&mut vec![0; length.parse().unwrap()]).unwrap();
}

#[test]
fn with_an_interval_requests_do_not_wake_it() {
    let host = Host::start(free_address(), "interval = \"50ms\"", &[], 1);
    // The workers are known; from here on nothing is collected.
    let keys = "interval = \"1h\"\nvalid_for = \"2h\"";
    reloading::reload(&host.dispatcher, &one_host(host.advice, keys, &[], ""));
    let requests = |host: &Host| {
        let status = host.status();
        status.requests["best"] + status.requests["addresses"]
    };
    let asked = requests(&host);
    let (turns_before, sleeps_before) = (turns(&host), sleeps(&host));
    ask_often(&host, 1_000);
    let slept = sleeps(&host) - sleeps_before;
    let turned = turns(&host) - turns_before;
    // The status above, and timers of the dispatcher itself.
    assert!(turned <= 20, "{turned} turns for 1,000 requests");
    assert!(slept <= 40, "{slept} sleeps for 1,000 requests");
    assert_eq!(requests(&host), asked + 1_000);
}

#[test]
fn without_one_it_is_asked_at_most_ten_times_a_second() {
    let host = Host::start(free_address(), "mode = \"fresh\"", &[], 1);
    host.wait_addresses(&[host.web()]);
    let (turns_before, began) = (turns(&host), Instant::now());
    ask_often(&host, 1_000);
    let tenths = began.elapsed().as_millis() as u64 / 100 + 1;
    let turned = turns(&host) - turns_before;
    // A question is one turn; the answer may cost a second one. Timers come in addition.
    assert!(turned <= 3 * tenths + 20, "{turned} turns in {tenths} tenths of a second");
}
