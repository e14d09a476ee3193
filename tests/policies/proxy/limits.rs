//! Headers that are refused, that come too slowly, and too many at once: each is closed with a
//! named reason, nothing is lost or left open, and others are served meanwhile.

use std::process::Command;

use super::*;

/// The listeners of these tests: one with headers, one without.
fn start(keys: &str, pool: &str) -> Dispatcher {
    let plain = "[[listener]]\nname = \"plain\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n";
    Dispatcher::start(&format!("{plain}{}", config("127.0.0.1:0", keys, pool)))
}

#[test]
fn each_failure_is_closed_and_counted_by_reason() {
    let dispatcher = start("", "");
    let _workers = dispatcher.workers("blocking", "web", 1);
    let (to, plain) = (dispatcher.address("web"), dispatcher.address("plain"));
    let fds = dispatcher.fds();
    let long = v2_of("192.0.2.1:1", &[&[0xe0, 0x02, 0x00][..], &vec![7; 512]].concat());
    let mut bad_sum = v2_of("192.0.2.1:1", b"\x03\0\x04\x01\x02\x03\x04");
    bad_sum.extend_from_slice(b"more");
    let v1_long = [&b"PROXY UNKNOWN "[..], &[b'x'; 200]].concat();
    let mut expected = std::collections::BTreeMap::new();
    for (source, bytes, reason) in [
        ("proxy", b"GET / HTTP/1.1\r\n\r\n".to_vec(), "proxy_missing"),
        ("proxy", b"\x16\x03\x01\x02\x00".to_vec(), "proxy_missing"),
        ("proxy", vec![0xff; 100_000], "proxy_missing"),
        ("proxy", b"PROXY TCP4 192.0.2.1 10.0.0.1 1 65536\r\n".to_vec(), "proxy_malformed"),
        ("proxy", v1_long, "proxy_malformed"),
        ("proxy", v2(0x21, 0x11, &[0; 11]), "proxy_malformed"),
        ("proxy", v2(0x22, 0x11, &[0; 12]), "proxy_malformed"),
        ("proxy", bad_sum, "proxy_malformed"),
        ("proxy", long, "proxy_too_long"),
        ("stranger", v1_of("192.0.2.1:1"), "proxy_untrusted"),
        ("stranger", v2_of("192.0.2.1:1", &[]), "proxy_untrusted"),
        ("stranger", v2(0x20, 0, &[]), "proxy_untrusted"),
        // It is not read to its end.
        ("stranger", b"PROXY ".to_vec(), "proxy_untrusted"),
        ("stranger", SIGNATURE.to_vec(), "proxy_untrusted"),
    ] {
        let mut stream = if source == "proxy" { connect(to) } else { stranger(to) };
        // It may be closed before it has all bytes.
        let _ = stream.write_all(&bytes);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        is_closed(&stream);
        *expected.entry(reason).or_insert(0) += 1;
        let count = expected[reason];
        dispatcher.wait_status(reason, |status| status.closed[reason] == count);
        wait_for_log(&dispatcher, &format!("reason={reason}"));
    }
    // The connection ends within the header, or before it.
    for (bytes, reason) in
        [(&b"PROXY TCP4 192.0"[..], "proxy_malformed"), (b"PRO", "proxy_missing")]
    {
        let stream = sent(connect(to), bytes);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        is_closed(&stream);
        *expected.entry(reason).or_insert(0) += 1;
    }
    // A check whether the port is open.
    drop(connect(to));
    let status = dispatcher.wait_status("all to be closed", |s| s.closed["client_gone"] == 1);
    let found: std::collections::BTreeMap<&str, u64> = status.listeners[1]
        .closed
        .iter()
        .filter(|(reason, count)| reason.starts_with("proxy_") && **count > 0)
        .map(|(reason, &count)| (reason.as_str(), count))
        .collect();
    assert_eq!(found, expected);
    // The other listener has no such reasons.
    assert!(status.listeners[0].closed.keys().all(|reason| !reason.starts_with("proxy_")));
    assert_eq!(status.listeners[0].proxy_headers, None);
    Client::connect(plain).unwrap().finish();
    wait_until("all descriptors to be closed", || dispatcher.fds() <= fds);
}

#[test]
fn a_slow_header_is_awaited_until_its_time_is_over() {
    let dispatcher = start("proxy_timeout = '2s'", "");
    let _workers = dispatcher.workers("blocking", "web", 1);
    let (to, plain) = (dispatcher.address("web"), dispatcher.address("plain"));
    let header = v2_of("192.0.2.1:7000", AUTHORITY);
    // One never ends its header; the other sends a byte from time to time, which does not help.
    let silent = sent(connect(to), &header[..20]);
    let mut dripping = connect(to);
    let mut sent_bytes = 0;
    dispatcher.wait_status("both to time out", |status| {
        if sent_bytes + 1 < header.len() && status.closed["proxy_timeout"] == 0 {
            let _ = dripping.write_all(&header[sent_bytes..=sent_bytes]);
            sent_bytes += 1;
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        Client::connect(plain).unwrap().finish();
        status.closed["proxy_timeout"] == 2
    });
    assert!(sent_bytes > 1);
    is_closed(silent);
    is_closed(dripping);
    wait_for_log(&dispatcher, "reason=proxy_timeout");
    Client::greeted(sent(connect(to), &header)).unwrap().finish();
}

#[test]
fn a_thousand_half_open_headers_are_bounded() {
    const CLIENTS: usize = 1_000;
    const MOST: u64 = 100;
    if !descriptors(CLIENTS as u64 + 1_000) {
        return;
    }
    let dispatcher = start("proxy_timeout = '10m'", &format!("max_awaiting = {MOST}"));
    let _workers = dispatcher.workers("blocking", "web", 1);
    let (to, plain) = (dispatcher.address("web"), dispatcher.address("plain"));
    let fds = dispatcher.fds();
    let header = v2_of("192.0.2.1:7000", AUTHORITY);
    let mut half_open = Vec::with_capacity(CLIENTS);
    let mut most = 0;
    for n in 0..CLIENTS {
        half_open.push(sent(connect(to), &header[..n % header.len()]));
        if n % 100 == 0 {
            let status = dispatcher.status();
            most = most.max(status.listeners[1].proxy_headers.as_ref().unwrap().awaited);
            // Others are served, on the other listener and behind the same proxy.
            Client::connect(plain).unwrap().finish();
            let mut client = Client::greeted(sent(connect(to), &header)).unwrap();
            client.echo("served meanwhile");
            client.finish();
        }
    }
    let status = dispatcher.wait_status("all to be accepted", |status| {
        status.listeners[1].accepted == CLIENTS as u64 + 10
    });
    let headers = status.listeners[1].proxy_headers.as_ref().unwrap();
    assert!(most <= MOST && headers.awaited <= MOST, "{most}, {headers:?}");
    assert!(headers.awaited > 0 && headers.read == 10, "{headers:?}");
    assert!(dispatcher.fds() <= fds + MOST as usize + 50, "{} after {fds}", dispatcher.fds());
    assert!(status.closed["proxy_timeout"] >= CLIENTS as u64 - 2 * MOST, "{:?}", status.closed);
    // The newest are still awaited, and are served when the rest of their header comes.
    let last = half_open.pop().unwrap();
    let rest = (CLIENTS - 1) % header.len();
    assert_eq!(Client::greeted(sent(last, &header[rest..])).unwrap().peer, "192.0.2.1:7000");
    drop(half_open);
    dispatcher.wait_status("all to be gone", |s| s.queued == 0 && s.in_flight == 0);
    wait_until("all descriptors to be closed", || dispatcher.fds() <= fds);
}

/// The system calls of the hot thread that could read from a client.
#[test]
fn other_listeners_cost_no_system_call_more() {
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("needs strace");
    }
    let plain = "[[listener]]\nname = \"plain\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n";
    let temp = configure(&format!("{plain}{}", config("127.0.0.1:0", "", "")));
    let trace = temp.path().join("trace");
    let mut command = Command::new("strace");
    // Only the hot thread: strace follows no other.
    command.args(["-e", "trace=recvfrom,recvmsg,getsockopt,setsockopt,accept4", "-o"]);
    command.arg(&trace).arg(dispatcher_bin()).args(["run", "--config"]);
    command.arg(temp.path().join("dispatcher.toml"));
    command.stderr(std::fs::File::create(temp.path().join("log")).unwrap());
    let dispatcher = Dispatcher::start_by(temp.path(), &mut command);
    let _workers = dispatcher.workers("blocking", "web", 1);
    let (to, plain) = (dispatcher.address("web"), dispatcher.address("plain"));
    let calls = || {
        let text = std::fs::read_to_string(&trace).unwrap();
        // strace may be writing another line.
        let (text, _) = text.rsplit_once('\n').unwrap_or_default();
        let count = |name: &str| text.lines().filter(|line| line.starts_with(name)).count();
        (count("accept4("), text.lines().count() - count("accept4(") - count("---"))
    };
    // The first ones also prove the worker.
    (0..5).for_each(|_| Client::connect(plain).unwrap().finish());
    let (accepts, others) = calls();
    for _ in 0..20 {
        let mut client = Client::connect(plain).unwrap();
        client.echo("not looked at");
        client.finish();
    }
    wait_until("20 to be accepted", || calls().0 >= accepts + 20);
    assert_eq!(calls().1, others, "a client of another listener is passed as it is");
    for _ in 0..5 {
        Client::greeted(sent(connect(to), &v2_of("192.0.2.1:7000", &[]))).unwrap().finish();
    }
    // One look at the header, and one read of it.
    wait_until("5 headers to be read", || calls().1 >= others + 10);
}
