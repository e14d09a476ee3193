//! Addresses from an advice interface: a small server that answers in the agreed format, and others
//! that do not.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use worker_sdk::connector::{Addresses, ConnectorConfig, Error, Selection};

use crate::support::*;

/// How an advice server answers.
#[derive(Clone, Debug)]
enum Behaviour {
    /// These addresses, best first; `best` names each in turn.
    Advises(Vec<SocketAddr>),
    NoneUsable,
    Garbage,
    /// A byte now and then.
    Slow,
    Endless,
    Huge,
    Silent,
}

/// A small advice server. It counts the requests by path.
struct Host {
    address: SocketAddr,
    behaviour: Arc<Mutex<Behaviour>>,
    requests: Arc<Mutex<BTreeMap<String, usize>>>,
    stop: Arc<AtomicBool>,
}

impl Host {
    fn start(behaviour: Behaviour) -> Host {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = Host {
            address: listener.local_addr().unwrap(),
            behaviour: Arc::new(Mutex::new(behaviour)),
            requests: Arc::default(),
            stop: Arc::default(),
        };
        let (behaviour, requests) = (Arc::clone(&host.behaviour), Arc::clone(&host.requests));
        let stop = Arc::clone(&host.stop);
        thread::spawn(move || {
            for stream in listener.incoming().map(Result::unwrap) {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let behaviour = behaviour.lock().unwrap().clone();
                let (requests, stop) = (Arc::clone(&requests), Arc::clone(&stop));
                thread::spawn(move || serve(&stream, &behaviour, &requests, &stop));
            }
        });
        host
    }

    fn change(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    fn count(&self, path: &str) -> usize {
        self.requests.lock().unwrap().get(path).copied().unwrap_or(0)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(
    mut stream: &TcpStream,
    behaviour: &Behaviour,
    requests: &Mutex<BTreeMap<String, usize>>,
    stop: &AtomicBool,
) {
    let mut lines = BufReader::new(stream).lines();
    let Some(Ok(request)) = lines.next() else { return };
    lines.by_ref().map_while(Result::ok).find(String::is_empty);
    let path = request.split(' ').nth(1).unwrap().to_owned();
    let turn = {
        let mut requests = requests.lock().unwrap();
        let count = requests.entry(path.clone()).or_default();
        *count += 1;
        *count - 1
    };
    let mut json = |status: u16, body: &str| {
        let length = body.len();
        // Fails if the client has gone.
        let _ = write!(
            stream,
            "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
    };
    let listed = |addresses: &[String]| {
        let all: Vec<String> = addresses
            .iter()
            .map(|address| {
                format!(
                    r#"{{"address":"{address}","load":1,"capacity":null,"score":0.5,"weight":100,"state":"ok","age_ms":0}}"#
                )
            })
            .collect();
        format!(r#"{{"pool":"web","valid_for_ms":60000,"addresses":[{}]}}"#, all.join(","))
    };
    match behaviour {
        Behaviour::Advises(addresses) if path == "/v1/pools/web/best" => {
            let address = addresses[turn % addresses.len()];
            json(200, &format!(r#"{{"address":"{address}","score":0.25,"valid_for_ms":1000}}"#));
        }
        Behaviour::Advises(addresses) if path == "/v1/pools/web/addresses" => {
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            json(200, &listed(&addresses));
        }
        Behaviour::Advises(_) => json(404, r#"{"error":"no such pool"}"#),
        Behaviour::NoneUsable => json(503, r#"{"error":"no address of the pool is usable"}"#),
        Behaviour::Garbage => drop(stream.write_all(b"\x00\xffnonsense\r\n\r\n")),
        Behaviour::Huge => {
            let many: Vec<String> = (0..2_000).map(|n| format!("h{n}:1")).collect();
            json(200, &listed(&many));
        }
        Behaviour::Endless => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            while stream.write_all(&[b' '; 4096]).is_ok() {}
        }
        Behaviour::Slow => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            while stream.write_all(b" ").is_ok() && !stop.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(5));
            }
        }
        Behaviour::Silent => {
            // Until the client gives up.
            let _ = lines.next();
        }
    }
}

fn advised(hosts: &[&Host]) -> ConnectorConfig {
    let hosts = hosts.iter().map(|host| host.address.to_string());
    config(Addresses::advice(hosts, "web").unwrap())
}

fn bad() -> Vec<(Behaviour, &'static str)> {
    vec![
        (Behaviour::Garbage, "does not speak HTTP"),
        (Behaviour::Slow, "in time"),
        (Behaviour::Endless, "longer than"),
        (Behaviour::Huge, "more than"),
        (Behaviour::Silent, "in time"),
        (Behaviour::NoneUsable, "503: no address of the pool is usable"),
    ]
}

#[test]
fn the_list_comes_from_a_host_and_is_kept_while_it_is_valid() {
    for flavour in BOTH {
        let servers = [(); 2].map(|()| Server::start(b'a'));
        let addresses = servers.each_ref().map(|server| server.address);
        let host = Host::start(Behaviour::Advises(addresses.to_vec()));
        let client = Client::new(flavour, advised(&[&host])).unwrap();
        let mut shares: BTreeMap<SocketAddr, u32> = BTreeMap::new();
        for _ in 0..10 {
            *shares.entry(client.connect().unwrap().peer()).or_default() += 1;
        }
        assert_eq!(shares, BTreeMap::from(addresses.map(|address| (address, 5))), "{flavour:?}");
        assert_eq!(host.count("/v1/pools/web/addresses"), 1);
        assert_eq!(host.count("/v1/pools/web/best"), 0);
    }
}

#[test]
fn the_list_is_refreshed_when_it_is_out_of_date() {
    for flavour in BOTH {
        let (first, second) = (Server::start(b'a'), Server::start(b'b'));
        let host = Host::start(Behaviour::Advises(vec![first.address]));
        // The initial list is out of date at once.
        let hosts = [host.address.to_string()];
        let addresses = Addresses::advice(hosts, "web").unwrap();
        let addresses = addresses.or_list([second.address.to_string()]).unwrap();
        let client = Client::new(flavour, config(addresses)).unwrap();
        assert_eq!(client.connect().unwrap().peer(), first.address, "{flavour:?}");
    }
}

#[test]
fn the_best_is_asked_for_before_each_connect() {
    for flavour in BOTH {
        let servers = [(); 2].map(|()| Server::start(b'a'));
        let addresses = servers.each_ref().map(|server| server.address);
        let host = Host::start(Behaviour::Advises(addresses.to_vec()));
        let config = advised(&[&host]).selection(Selection::Best);
        let client = Client::new(flavour, config).unwrap();
        for turn in 0..6 {
            let connection = client.connect().unwrap();
            assert_eq!(connection.peer(), addresses[turn % 2], "{flavour:?} {turn}");
        }
        assert_eq!(host.count("/v1/pools/web/best"), 6);
        assert_eq!(host.count("/v1/pools/web/addresses"), 1);
    }
}

#[test]
fn the_best_that_is_down_is_followed_by_another() {
    for flavour in BOTH {
        let (refuses, server) = (refusing(), Server::start(b'a'));
        let host = Host::start(Behaviour::Advises(vec![refuses.address, server.address]));
        let config = advised(&[&host]).selection(Selection::Best);
        let client = Client::new(flavour, config).unwrap();
        for _ in 0..4 {
            assert_eq!(client.connect().unwrap().peer(), server.address, "{flavour:?}");
        }
    }
}

#[test]
fn a_host_with_a_bad_answer_is_left_out_and_another_one_is_asked() {
    for flavour in BOTH {
        for (behaviour, _) in bad() {
            if matches!(behaviour, Behaviour::NoneUsable) {
                // An answer in order: that host is not set aside.
                continue;
            }
            let server = Server::start(b'a');
            let bad = Host::start(behaviour.clone());
            let good = Host::start(Behaviour::Advises(vec![server.address]));
            let path = "/v1/pools/web/best";
            let config = advised(&[&bad, &good])
                .selection(Selection::Best)
                .advice_timeout(Duration::from_secs(1))
                .set_aside(PATIENCE, PATIENCE);
            let client = Client::new(flavour, config).unwrap();
            for _ in 0..5 {
                let connection = client.connect().unwrap();
                assert_eq!(connection.peer(), server.address, "{flavour:?} {behaviour:?}");
            }
            // It is asked once at most: then it is set aside.
            let asked = bad.count(path) + bad.count("/v1/pools/web/addresses");
            assert!(asked <= 1, "{behaviour:?}: {asked}");
            assert_eq!(good.count(path), 5);
        }
    }
}

#[test]
fn another_host_may_know_a_usable_address() {
    for flavour in BOTH {
        let server = Server::start(b'a');
        let none = Host::start(Behaviour::NoneUsable);
        let good = Host::start(Behaviour::Advises(vec![server.address]));
        let config = advised(&[&none, &good]).selection(Selection::Best);
        let client = Client::new(flavour, config).unwrap();
        for _ in 0..5 {
            assert_eq!(client.connect().unwrap().peer(), server.address, "{flavour:?}");
        }
    }
}

#[test]
fn without_any_answer_the_problem_is_named_and_a_list_for_that_case_is_used() {
    for flavour in BOTH {
        for (behaviour, problem) in bad() {
            let host = Host::start(behaviour.clone());
            let short = |config: ConnectorConfig| config.advice_timeout(Duration::from_millis(500));
            let client = Client::new(flavour, short(advised(&[&host]))).unwrap();
            let Err(Error::ConnectionLost(lost)) = client.connect() else { panic!("connected") };
            let named = lost.addresses.clone().unwrap();
            assert!(named.contains(problem), "{behaviour:?}: {named}");
            assert!(named.contains(&host.address.to_string()), "{named}");
            assert!(lost.attempts.is_empty());

            let server = Server::start(b'a');
            let addresses = Addresses::advice([host.address.to_string()], "web").unwrap();
            let addresses = addresses.or_list([server.address.to_string()]).unwrap();
            let client = Client::new(flavour, short(config(addresses))).unwrap();
            assert_eq!(client.connect().unwrap().peer(), server.address, "{flavour:?}");
        }
    }
}

#[test]
fn the_last_list_serves_while_no_host_answers() {
    for flavour in BOTH {
        let server = Server::start(b'a');
        let host = Host::start(Behaviour::Advises(vec![server.address]));
        let config =
            advised(&[&host]).selection(Selection::Best).advice_timeout(Duration::from_millis(500));
        let client = Client::new(flavour, config).unwrap();
        client.connect().unwrap();
        for behaviour in [Behaviour::Silent, Behaviour::NoneUsable, Behaviour::Garbage] {
            host.change(behaviour);
            assert_eq!(client.connect().unwrap().peer(), server.address, "{flavour:?}");
        }
    }
}

#[test]
fn an_unknown_pool_is_named() {
    for flavour in BOTH {
        let host = Host::start(Behaviour::Advises(Vec::new()));
        let addresses = Addresses::advice([host.address.to_string()], "a/b").unwrap();
        let client = Client::new(flavour, config(addresses)).unwrap();
        let Err(Error::ConnectionLost(lost)) = client.connect() else { panic!("connected") };
        assert!(lost.to_string().contains("404: no such pool"), "{lost}");
        assert!(host.count("/v1/pools/a%2Fb/addresses") > 0);
    }
}
