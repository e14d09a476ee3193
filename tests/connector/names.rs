//! Host names: look-ups, both families, and several servers behind one name.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use worker_sdk::connector::{Addresses, ConnectorConfig, Error};

use crate::support::*;

/// Whether this machine has an IPv6 loopback address.
fn has_ipv6() -> bool {
    let there = std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    if !there {
        test_support::skip("needs IPv6 on the loopback interface");
    }
    there
}

fn named(addresses: Vec<SocketAddr>) -> (ConnectorConfig, Arc<AtomicU32>) {
    let look_ups = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&look_ups);
    let config = config(Addresses::list(["service.example:80"]).unwrap());
    let config = config.resolver(move |host, port| {
        assert_eq!((host, port), ("service.example", 80));
        counted.fetch_add(1, Ordering::SeqCst);
        Ok(addresses.clone())
    });
    (config, look_ups)
}

#[test]
fn a_name_is_resolved_again_for_each_attempt_and_has_all_its_addresses() {
    for flavour in BOTH {
        let refuses = [refusing(), refusing()];
        let (config, look_ups) = named(refuses.each_ref().map(|r| r.address).to_vec());
        let Err(Error::ConnectionLost(lost)) = Client::new(flavour, config).unwrap().connect()
        else {
            panic!("connected");
        };
        assert_eq!((lost.attempts.len(), look_ups.load(Ordering::SeqCst)), (5, 5), "{flavour:?}");
        assert_eq!(lost.attempts[0].address.to_string(), "service.example:80");

        let server = Server::start(b'a');
        let (config, look_ups) = named(vec![refuses[0].address, server.address]);
        let client = Client::new(flavour, config).unwrap();
        for _ in 0..5 {
            let connection = client.connect().unwrap();
            assert_eq!(connection.peer(), server.address);
            assert_eq!(connection.address(), "service.example:80");
        }
        assert_eq!(look_ups.load(Ordering::SeqCst), 5, "one attempt each");
    }
}

#[test]
fn both_families_are_raced() {
    if !has_ipv6() {
        return;
    }
    for flavour in BOTH {
        let four = Server::start(b'4');
        let silent = silent((Ipv6Addr::LOCALHOST, 0).into());
        // The silent IPv6 address has a head start; IPv4 wins long before the limit.
        let (config, _) = named(vec![silent.address, four.address]);
        let client = Client::new(flavour, config.set_aside(PATIENCE, PATIENCE)).unwrap();
        let connection = client.connect().unwrap();
        assert_eq!(connection.peer(), four.address, "{flavour:?}");
        // It comes last from now on, so IPv4 is chosen although IPv6 would answer.
        let there = silent.address;
        drop(silent);
        let answers = Server::start_at(there, b'6');
        assert_eq!(client.connect().unwrap().peer(), four.address, "{flavour:?}");
        drop(answers);

        let six = Server::start_at((Ipv6Addr::LOCALHOST, 0).into(), b'6');
        let (config, _) = named(vec![six.address, four.address]);
        let connection = Client::new(flavour, config).unwrap().connect().unwrap();
        assert_eq!(connection.peer(), six.address, "the first of the resolver: {flavour:?}");
    }
}

#[test]
fn the_system_resolves_localhost() {
    for flavour in BOTH {
        let server = Server::start(b'a');
        let address = format!("localhost:{}", server.address.port());
        let config = config(Addresses::list([address]).unwrap());
        let connection = Client::new(flavour, config).unwrap().connect().unwrap();
        // ::1 refuses, where it exists.
        assert_eq!(connection.peer().ip(), Ipv4Addr::LOCALHOST, "{flavour:?}");
    }
}

#[test]
fn several_servers_behind_one_name_share_the_connections() {
    for flavour in BOTH {
        let servers = [(); 3].map(|()| Server::start(b'a'));
        let addresses = servers.each_ref().map(|server| server.address);
        let (config, _) = named(addresses.to_vec());
        let client = Client::new(flavour, config).unwrap();
        let mut shares: BTreeMap<SocketAddr, u32> = BTreeMap::new();
        for _ in 0..30 {
            *shares.entry(client.connect().unwrap().peer()).or_default() += 1;
        }
        assert_eq!(shares, BTreeMap::from(addresses.map(|address| (address, 10))), "{flavour:?}");
        // A reconnect goes to the same one.
        let mut connection = client.connect().unwrap();
        let peer = connection.peer();
        for _ in 0..3 {
            client.reconnect(&mut connection).unwrap();
            assert_eq!(connection.peer(), peer);
        }
    }
}

#[test]
fn a_resolver_without_an_answer_costs_the_limit_of_an_attempt() {
    for flavour in BOTH {
        let server = Server::start(b'a');
        let hangs = |_: &str, _| {
            std::thread::park_timeout(PATIENCE);
            Ok(Vec::new())
        };
        let addresses = ["hangs.example:80".to_owned(), server.address.to_string()];
        let config = config(Addresses::list(addresses).unwrap())
            .selection(worker_sdk::connector::Selection::InOrder)
            .max_retries(1)
            .attempt_timeout(Duration::from_millis(100))
            .resolver(hangs);
        let client = Client::new(flavour, config).unwrap();
        assert_eq!(client.connect().unwrap().peer(), server.address, "{flavour:?}");
    }
}

#[test]
fn a_name_that_does_not_exist_is_named_in_the_outcome() {
    for flavour in BOTH {
        let config = config(Addresses::list(["nowhere.example:80"]).unwrap())
            .resolver(|_, _| Err(ErrorKind::NotFound.into()));
        let Err(Error::ConnectionLost(lost)) = Client::new(flavour, config).unwrap().connect()
        else {
            panic!("connected");
        };
        let outcome = &lost.attempts[0];
        assert_eq!(outcome.kind, ErrorKind::NotFound);
        assert!(outcome.problem.contains("nowhere.example"), "{lost}");
    }
}
