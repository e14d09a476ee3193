//! Reconnects, handlers of new connections, and recovered servers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use worker_sdk::connector::{ConnectorConfig, Selection};

use crate::support::*;

#[test]
fn a_lost_connection_is_replaced_through_the_same_events_and_nothing_is_sent_again() {
    for flavour in BOTH {
        let (first, second) = (Server::start(b'a'), Server::start(b'b'));
        let events = Events::default();
        let config = config(list(&[first.address, second.address]))
            .selection(Selection::InOrder)
            .on_attempt(events.handler());
        let client = Client::new(flavour, config).unwrap().restored_with("session 7\n");
        let mut connection = client.connect().unwrap();
        assert_eq!(client.read(&mut connection, 1).unwrap(), "a");
        client.write(&mut connection, "first words\n").unwrap();
        events.take();

        // The server drops the connection, and is there: the same server again.
        first.disconnect();
        client.read(&mut connection, 1).unwrap_err();
        assert_eq!(first.received.recv_timeout(PATIENCE).unwrap(), "first words\n");
        client.reconnect(&mut connection).unwrap();
        assert_eq!((connection.peer(), kinds(&events.take())), (first.address, vec![(false, 2)]));
        assert_eq!(client.read(&mut connection, 1).unwrap(), "a");

        // The server is gone: three attempts on it, then the other.
        first.stop();
        assert_eq!(first.received.recv_timeout(PATIENCE).unwrap(), "session 7\n");
        client.read(&mut connection, 1).unwrap_err();
        client.reconnect(&mut connection).unwrap();
        assert_eq!(connection.peer(), second.address, "{flavour:?}");
        assert_eq!(
            kinds(&events.take()),
            [(false, 2), (false, 1), (false, 0), (true, 1)],
            "{flavour:?}"
        );
        client.write(&mut connection, "more\n").unwrap();
        drop(connection);
        assert_eq!(second.received.recv_timeout(PATIENCE).unwrap(), "session 7\nmore\n");
    }
}

#[test]
fn a_server_that_accepts_and_does_not_serve_is_a_failed_attempt() {
    for flavour in BOTH {
        // Its kernel accepts; nothing answers.
        let hangs = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let wrong = Server::start(b'x');
        let serves = Server::start(b'a');
        let addresses = [hangs.local_addr().unwrap(), wrong.address, serves.address];
        let config = config(list(&addresses))
            .selection(Selection::InOrder)
            .max_retries(1)
            .attempt_timeout(Duration::from_millis(200));
        let client = Client::new(flavour, config).unwrap().greeted_with(b'a');
        assert_eq!(client.connect().unwrap().peer(), serves.address, "{flavour:?}");
    }
}

#[test]
fn the_time_limit_of_the_handlers_does_not_stay_on_the_connection() {
    let server = Server::start(b'a');
    let config = config(list(&[server.address])).attempt_timeout(Duration::from_secs(30));
    let Client::Blocking(connector) =
        Client::new(Flavour::Blocking, config).unwrap().greeted_with(b'a')
    else {
        unreachable!()
    };
    let connection = connector.connect().unwrap();
    assert_eq!(connection.stream().read_timeout().unwrap(), None);
    assert_eq!(connection.stream().write_timeout().unwrap(), None);
    assert!(!nonblocking(connection.stream()), "reads and writes block");
}

fn nonblocking(stream: &std::net::TcpStream) -> bool {
    rustix::fs::fcntl_getfl(stream).unwrap().contains(rustix::fs::OFlags::NONBLOCK)
}

fn shares(client: &Client, count: usize) -> BTreeMap<SocketAddr, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..count {
        *shares.entry(client.connect().unwrap().peer()).or_default() += 1;
    }
    shares
}

fn quick(config: ConnectorConfig) -> ConnectorConfig {
    config.set_aside(Duration::from_millis(20), Duration::from_millis(80))
}

#[test]
fn a_recovered_server_has_its_share_again() {
    for flavour in BOTH {
        let servers = [(); 3].map(|()| Server::start(b'a'));
        let addresses = servers.each_ref().map(|server| server.address);
        let client = Client::new(flavour, quick(config(list(&addresses)))).unwrap();
        assert_eq!(shares(&client, 30), BTreeMap::from(addresses.map(|address| (address, 10))));

        servers[0].stop();
        let without = shares(&client, 30);
        assert_eq!(without.get(&addresses[0]), None, "{without:?}");
        assert!(without.values().all(|&share| share >= 10));

        let _again = Server::start_at(addresses[0], b'a');
        // It is probed when its pause is over, whatever the machine does meanwhile.
        test_support::wait_until("the probe", || shares(&client, 3).contains_key(&addresses[0]));
        assert_eq!(shares(&client, 30), BTreeMap::from(addresses.map(|address| (address, 10))));
    }
}

#[test]
fn sticky_connections_go_to_one_server_while_it_is_up() {
    for flavour in BOTH {
        let servers = [(); 4].map(|()| Server::start(b'a'));
        let addresses = servers.each_ref().map(|server| server.address);
        let config = quick(config(list(&addresses))).selection(Selection::Random).sticky(true);
        let client = Client::new(flavour, config).unwrap();
        let first = client.connect().unwrap().peer();
        assert_eq!(shares(&client, 20), BTreeMap::from([(first, 20)]));
        servers.iter().find(|server| server.address == first).unwrap().stop();
        let second = client.connect().unwrap().peer();
        assert_ne!(second, first, "{flavour:?}");
        assert_eq!(shares(&client, 20), BTreeMap::from([(second, 20)]));
    }
}

#[test]
fn clients_start_at_random_places() {
    let servers = [(); 2].map(|()| Server::start(b'a'));
    let addresses = servers.each_ref().map(|server| server.address);
    let mut firsts: BTreeMap<SocketAddr, u32> = BTreeMap::new();
    for _ in 0..100 {
        let client = Client::new(Flavour::Blocking, config(list(&addresses))).unwrap();
        *firsts.entry(client.connect().unwrap().peer()).or_default() += 1;
    }
    // Fewer than 20 of 100 happen once in 10^9 runs.
    assert!(firsts.values().all(|&count| count >= 20) && firsts.len() == 2, "{firsts:?}");
}
