//! The PROXY protocol with real dispatchers and workers: whatever the pieces in which a header
//! comes, the worker receives the connection at the byte after it, with the real client.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod haproxy;
mod limits;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use test_support::reloading::{names, reload};
use test_support::*;
use worker_sdk::{PeerAddr, Worker};

/// A listener that trusts 127.0.0.1 and ::1, with these keys and those of its pool.
fn config(address: &str, keys: &str, pool: &str) -> String {
    let from = match address.starts_with("unix:") {
        true => "",
        false => "proxy_protocol_from = ['127.0.0.1', '::1']\n",
    };
    format!(
        "[[listener]]\nname = \"web\"\naddress = \"{address}\"\npool = \"web\"\n\
         proxy_protocol = true\n{from}{keys}\n\
         [pool.web]\nhandoff_timeout = \"10m\"\nmax_handoff_timeout = \"10m\"\n{pool}\n"
    )
}

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A header of version 2.
fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let len = u16::try_from(rest.len()).unwrap().to_be_bytes();
    [SIGNATURE, &[command, family], &len, rest].concat()
}

/// A header of version 2 for this client, with these TLVs.
fn v2_of(client: &str, tlvs: &[u8]) -> Vec<u8> {
    let client: SocketAddr = client.parse().unwrap();
    let ports = [client.port().to_be_bytes(), 443u16.to_be_bytes()].concat();
    match client.ip() {
        IpAddr::V4(ip) => {
            v2(0x21, 0x11, &[&ip.octets()[..], &[10, 0, 0, 1], &ports, tlvs].concat())
        }
        IpAddr::V6(ip) => v2(0x21, 0x21, &[&ip.octets()[..], &[0; 16], &ports, tlvs].concat()),
    }
}

fn v1_of(client: &str) -> Vec<u8> {
    let client: SocketAddr = client.parse().unwrap();
    let (family, to) = if client.is_ipv4() { ("TCP4", "10.0.0.1") } else { ("TCP6", "::1") };
    format!("PROXY {family} {} {to} {} 443\r\n", client.ip(), client.port()).into_bytes()
}

/// What a worker of this process saw of a connection.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    client: String,
    proxy: Option<PeerAddr>,
    local: bool,
    tlvs: Vec<(u8, Vec<u8>)>,
    bytes: Vec<u8>,
    is_tcp: bool,
}

/// A worker of this process that reads each connection to its end.
fn watching_worker(dispatcher: &Dispatcher) -> (Worker, Receiver<Seen>) {
    let worker = own_worker(dispatcher, "watching");
    let (tell, told) = channel();
    let server = worker.clone();
    std::thread::spawn(move || {
        while let Ok(Some(mut connection)) = server.accept() {
            let mut bytes = Vec::new();
            let _ = connection.read_to_end(&mut bytes);
            let proxy = connection.proxy();
            let seen = Seen {
                client: connection.peer_addr().to_string(),
                proxy: proxy.map(|proxy| proxy.address()),
                local: proxy.is_some_and(|proxy| proxy.is_local()),
                tlvs: proxy.map_or_else(Vec::new, |proxy| {
                    proxy.tlvs().map(|(kind, value)| (kind, value.to_vec())).collect()
                }),
                bytes,
                is_tcp: connection.as_tcp().is_some(),
            };
            if tell.send(seen).is_err() {
                return;
            }
        }
    });
    dispatcher.wait_joined("web", 1);
    (worker, told)
}

/// A connection from an address that is not trusted.
fn stranger(to: SocketAddr) -> TcpStream {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 9], 0))).unwrap();
    rustix::net::connect(&socket, &to).unwrap();
    TcpStream::from(socket)
}

/// An address with a port that is free now.
fn free_address() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

fn sent(mut stream: TcpStream, bytes: &[u8]) -> TcpStream {
    stream.write_all(bytes).unwrap();
    stream
}

/// Waits for the end of a refused connection.
fn is_closed(mut stream: impl Read) {
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("it should be closed: {other:?}"),
    }
}

const AUTHORITY: &[u8] = b"\x02\0\x0bexample.org";
const ENDPOINT: &[u8] = b"\xea\0\x05\x01vpce";

/// A header, the client that it names (`None`: the proxy), and its TLVs.
type Named = (Vec<u8>, Option<&'static str>, Vec<(u8, Vec<u8>)>);

fn headers() -> Vec<Named> {
    let tlvs = [AUTHORITY, ENDPOINT].concat();
    let both = vec![(2, b"example.org".to_vec()), (0xea, b"\x01vpce".to_vec())];
    let full = [&[0xe0, 0x01, 0xf6][..], &vec![b'x'; 502]].concat();
    vec![
        (v1_of("192.0.2.1:50000"), Some("192.0.2.1:50000"), vec![]),
        (v1_of("[2001:db8::1]:50000"), Some("[2001:db8::1]:50000"), vec![]),
        (b"PROXY UNKNOWN\r\n".to_vec(), None, vec![]),
        (b"PROXY UNKNOWN ::1 ::1 1 2\r\n".to_vec(), None, vec![]),
        (v2_of("192.0.2.1:50000", &[]), Some("192.0.2.1:50000"), vec![]),
        (v2_of("[2001:db8::1]:50000", &tlvs), Some("[2001:db8::1]:50000"), both.clone()),
        (
            v2_of("192.0.2.1:50000", &full),
            Some("192.0.2.1:50000"),
            vec![(0xe0, full[3..].to_vec())],
        ),
        (v2(0x20, 0x00, &[]), None, vec![]),
        (v2(0x20, 0x00, &tlvs), None, both.clone()),
        (v2(0x21, 0x31, &[&[b'/'; 216][..], &tlvs].concat()), Some("unix"), both),
    ]
}

#[test]
fn a_worker_gets_every_byte_after_the_header_and_the_client_in_it() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let dispatcher = Dispatcher::start(&config(address, "", ""));
        let (_worker, told) = watching_worker(&dispatcher);
        let to = dispatcher.address("web");
        let fds = dispatcher.fds();
        let mut expected_reads = 0;
        for (header, client, tlvs) in headers() {
            // One byte at a time; the header alone; with the bytes after it; all but its last byte.
            let after: &[u8] = b"PROXY TCP4 bytes after the header\r\n";
            for pieces in [1, header.len(), header.len() + after.len(), header.len() - 1] {
                let mut stream = connect(to);
                stream.set_nodelay(true).unwrap();
                let own = stream.local_addr().unwrap();
                for piece in [&header[..], after].concat().chunks(pieces) {
                    stream.write_all(piece).unwrap();
                }
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                let seen = told.recv_timeout(PATIENCE).unwrap();
                let expected = Seen {
                    client: client.map_or_else(|| own.to_string(), str::to_owned),
                    proxy: Some(own.into()),
                    local: client.is_none(),
                    tlvs: tlvs.clone(),
                    bytes: after.to_vec(),
                    is_tcp: true,
                };
                assert_eq!(seen, expected, "in pieces of {pieces}");
                expected_reads += 1;
            }
        }
        let status = dispatcher.status();
        let headers = status.listeners[0].proxy_headers.as_ref().unwrap();
        assert_eq!((headers.awaited, headers.read), (0, expected_reads));
        assert_eq!(dispatcher.metric("dispatcher_proxy_headers_total"), expected_reads as f64);
        assert_eq!(dispatcher.metric("dispatcher_awaited_proxy_headers"), 0.0);
        wait_until("all descriptors to be closed", || dispatcher.fds() <= fds);
    }
}

#[test]
fn a_client_without_a_proxy_is_served_as_itself() {
    let dispatcher = Dispatcher::start(&config("127.0.0.1:0", "proxy_timeout = '3s'", ""));
    let (_worker, told) = watching_worker(&dispatcher);
    let to = dispatcher.address("web");
    // At the first byte that no header has there, or when it has sent nothing for long.
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"PROXYING", b"\r\n\r\n", b""] {
        let stream = sent(stranger(to), bytes);
        let own = stream.local_addr().unwrap();
        if !bytes.is_empty() && bytes != b"\r\n\r\n" {
            // The worker has it before the client ends.
            dispatcher
                .wait_status("it to be at the worker", |s| pool(s, "web").workers[0].load == 1);
        } else {
            dispatcher.wait_status("its time to be over", |s| pool(s, "web").workers[0].load == 1);
        }
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let seen = told.recv_timeout(PATIENCE).unwrap();
        assert_eq!((seen.client, seen.proxy), (own.to_string(), None));
        assert_eq!(seen.bytes, bytes);
        dispatcher.wait_status("it to end", |s| pool(s, "web").workers[0].load == 0);
    }
    assert_eq!(dispatcher.status().listeners[0].proxy_headers.as_ref().unwrap().read, 0);
}

#[test]
fn proxies_connect_to_a_unix_listener() {
    let dispatcher = Dispatcher::start(&config("unix:DIR/web.sock", "", ""));
    let (_worker, told) = watching_worker(&dispatcher);
    let fds = dispatcher.fds();
    let path = dispatcher.dir.join("web.sock");
    for (header, client, tlvs) in headers() {
        let mut stream = UnixStream::connect(&path).unwrap();
        // Not single bytes: each write takes room for itself in the queue, until it is read.
        header.chunks(8).for_each(|piece| stream.write_all(piece).unwrap());
        stream.write_all(b"more").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let expected = Seen {
            client: client.unwrap_or("unix").to_owned(),
            proxy: Some(PeerAddr::Unix),
            local: client.is_none(),
            tlvs,
            bytes: b"more".to_vec(),
            is_tcp: false,
        };
        assert_eq!(told.recv_timeout(PATIENCE).unwrap(), expected);
    }
    // Descriptors that come with a header are closed on another thread, and the client with them.
    let (kept, passed) = UnixStream::pair().unwrap();
    let stream = UnixStream::connect(&path).unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let rights = [passed.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&rights)));
    let header = v1_of("192.0.2.1:50000");
    let parts = [std::io::IoSlice::new(&header)];
    rustix::net::sendmsg(&stream, &parts, &mut ancillary, SendFlags::empty()).unwrap();
    drop(passed);
    is_closed(&stream);
    is_closed(&kept);
    dispatcher.wait_status("it to be counted", |s| s.closed["proxy_malformed"] == 1);
    drop(stream);
    wait_until("all descriptors to be closed", || dispatcher.fds() <= fds);
}

#[test]
fn rules_are_about_the_real_client() {
    let rules = "allow = ['192.0.2.0/24', '127.0.0.9']\ndeny = ['192.0.2.66']\n\
                 rate_limit = '1/h'\nrate_burst = 2";
    let dispatcher = Dispatcher::start(&config("127.0.0.1:0", rules, ""));
    let _workers = dispatcher.workers("blocking", "web", 1);
    let to = dispatcher.address("web");
    let through = |client: &str| sent(connect(to), &v2_of(client, &[]));
    for client in ["192.0.2.66:1", "198.51.100.1:1"] {
        is_closed(through(client));
    }
    dispatcher.wait_status("two to be denied", |s| s.closed["denied"] == 2);
    wait_for_log(&dispatcher, "peer=192.0.2.66:1 reason=denied");
    // One proxy brings many clients, each with a rate of its own.
    for n in 1..=20 {
        let client = Client::greeted(through(&format!("192.0.2.{n}:7000"))).unwrap();
        assert_eq!(client.peer, format!("192.0.2.{n}:7000"));
    }
    Client::greeted(through("192.0.2.1:7001")).unwrap();
    is_closed(through("192.0.2.1:7002"));
    // Checks of the proxy itself are not limited.
    for _ in 0..5 {
        Client::greeted(sent(connect(to), &v2(0x20, 0, &[]))).unwrap();
    }
    // A client without a proxy is a client like others.
    for _ in 0..2 {
        Client::greeted(sent(stranger(to), b"x\n")).unwrap();
    }
    is_closed(stranger(to));
    dispatcher.wait_status("all to be counted", |s| s.closed["rate_limited"] == 2);
}

#[test]
fn keys_come_from_the_client_and_from_the_bytes_after_the_header() {
    let by_address = "affinity.key = \"client-ip\"";
    let by_cookie = "affinity.key = \"cookie:ID\"";
    for keys in [by_address, "policy = \"hash\"", by_cookie] {
        let dispatcher = Dispatcher::start(&config("127.0.0.1:0", "", keys));
        let _workers = dispatcher.workers("blocking", "web", 3);
        let to = dispatcher.address("web");
        dispatcher.wait_status("workers to be proven by clients", |status| {
            let client = format!("203.0.113.{}:1", status.accepted % 250);
            let stream = sent(connect(to), &v1_of(&client));
            Client::greeted(sent(stream, b"GET / HTTP/1.1\r\n\r\n")).unwrap().finish();
            pool(status, "web").workers.iter().all(|worker| worker.proven)
        });
        let mut of_clients = std::collections::BTreeMap::new();
        for round in 1..=3 {
            for n in 1..=20 {
                let (client, id) = match keys == by_cookie {
                    // Another address in each round: only the cookie tells.
                    true => (format!("192.0.{round}.{n}:{round}"), n),
                    false => (format!("192.0.2.{n}:{round}"), 100 * round + n),
                };
                let request = format!("GET / HTTP/1.1\r\nCookie: ID={id}\r\n\r\n");
                let mut bytes = v2_of(&client, AUTHORITY);
                bytes.extend_from_slice(request.as_bytes());
                let mut served = Client::greeted(sent(connect(to), &bytes)).unwrap();
                assert_eq!(served.peer, client);
                let mut echo = vec![0; request.len()];
                served.stream.read_exact(&mut echo).unwrap();
                assert_eq!(echo, request.as_bytes(), "every byte, and no other");
                let before = of_clients.entry(n).or_insert_with(|| served.served_by.clone());
                assert_eq!(*before, served.served_by, "{keys}, round {round}");
            }
        }
        let workers: std::collections::BTreeSet<_> = of_clients.values().collect();
        assert!(workers.len() > 1, "{keys}: clients of one proxy are spread: {of_clients:?}");
    }
}

#[test]
fn what_the_proxy_said_comes_along_when_a_connection_moves() {
    let dispatcher = Dispatcher::start(&config("127.0.0.1:0", "", ""));
    let mut hoarder =
        dispatcher.worker_with("blocking", "web", "hoarder", &[("TEST_WORKER", "never-take")]);
    dispatcher.wait_joined("web", 1);
    let to = dispatcher.address("web");
    // More than one record has room for, with and without TLVs.
    let full = [&[0xe0, 0x01, 0xf6][..], &vec![b'x'; 502]].concat();
    let streams: Vec<TcpStream> = (0..40)
        .map(|n| {
            let tlvs = if n % 2 == 0 { &full[..] } else { &[] };
            sent(connect(to), &v2_of(&format!("192.0.2.{n}:7000"), tlvs))
        })
        .collect();
    dispatcher.wait_status("all at the worker", |status| status.in_flight == 40);
    hoarder.kill();
    dispatcher.wait_status("all without a worker", |status| status.queued == 40);
    let (_worker, told) = watching_worker(&dispatcher);
    let mut clients = std::collections::BTreeMap::new();
    for stream in &streams {
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    }
    for _ in &streams {
        let seen = told.recv_timeout(PATIENCE).unwrap();
        assert!(seen.proxy.is_some() && seen.bytes.is_empty());
        clients.insert(seen.client, seen.tlvs.len());
    }
    let expected = (0..40).map(|n| (format!("192.0.2.{n}:7000"), 1 - n % 2)).collect();
    assert_eq!(clients, expected);
}

#[test]
fn a_reload_begins_and_ends_the_reading_of_headers() {
    let plain = "[[listener]]\nname = \"web\"\naddress = \"ADDRESS\"\npool = \"web\"\n[pool.web]\n";
    let to = free_address();
    let dispatcher = Dispatcher::start(&plain.replace("ADDRESS", &to.to_string()));
    let _workers = dispatcher.workers("blocking", "web", 1);
    let mut early = sent(connect(to), b"PROXY TCP4 no header yet\n");
    let mut client = Client::greeted(early.try_clone().unwrap()).unwrap();
    assert_eq!(client.peer, early.local_addr().unwrap().to_string());
    let changes = reload(&dispatcher, &config(&to.to_string(), "", ""));
    assert!(names(&changes["changed"]).contains(&"listener web"), "{changes}");
    let header = v1_of("192.0.2.1:7000");
    let half = sent(connect(to), &header[..10]);
    assert_eq!(Client::greeted(sent(connect(to), &header)).unwrap().peer, "192.0.2.1:7000");
    dispatcher.wait_status("half a header", |s| s.queued == 1);
    reload(&dispatcher, &plain.replace("ADDRESS", &to.to_string()));
    assert_eq!(Client::greeted(sent(half, &header[10..])).unwrap().peer, "192.0.2.1:7000");
    let own = connect(to);
    let name = own.local_addr().unwrap().to_string();
    assert_eq!(Client::greeted(own).unwrap().peer, name, "no header any more");
    early.write_all(b"still served\n").unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut client.stream, &mut line).unwrap();
}
