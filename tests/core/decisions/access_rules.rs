//! Access rules and their effects on connections.

use core::net::{IpAddr, SocketAddr};
use dispatch_protocol::ClientAddr;
use ipnet::IpNet;

use super::*;

fn peer(ip: IpAddr) -> ClientAddr {
    ClientAddr::Inet(SocketAddr::new(ip, 1234))
}

fn of(text: &str) -> ClientAddr {
    peer(text.parse().unwrap())
}

fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|text| text.parse().unwrap()).collect()
}

fn rules() -> AccessRules {
    AccessRules { max_clients: 100, ..AccessRules::default() }
}

fn connect(driver: &mut Driver, address: &str) -> ConnId {
    let conn = driver.accept_only_from(WEB, of(address));
    driver.pump();
    conn
}

#[test]
fn refused_connections_are_closed_and_counted() {
    let mut driver = driver();
    let rules = AccessRules { deny: nets(&["10.0.0.0/8"]), ..rules() };
    driver.core.set_access_control(WEB, AccessControl::new(rules, 3));
    let worker = driver.worker();
    let bad = connect(&mut driver, "10.1.1.1");
    assert_eq!(driver.closed(bad), Some(CloseReason::Denied));
    connect(&mut driver, "192.0.2.1");
    assert_eq!(driver.core.untaken(worker), 1);
    let status = driver.core.snapshot();
    assert_eq!((status.totals.accepted, status.totals.in_flight), (2, 1));
    assert_eq!(status.listeners[0].closed[CloseReason::Denied as usize], 1);
    assert!(driver.core.totals().is_conserved());
}

#[test]
fn a_connection_counts_as_queued_until_it_is_taken() {
    let mut driver = driver();
    driver.core.set_access_control(
        WEB,
        AccessControl::new(AccessRules { max_queued_per_client: Some(3), ..rules() }, 3),
    );
    let first = driver.worker();
    for _ in 0..3 {
        connect(&mut driver, "192.0.2.1");
    }
    let fourth = connect(&mut driver, "192.0.2.1");
    assert_eq!(driver.closed(fourth), Some(CloseReason::TooManyQueued));
    let other = connect(&mut driver, "192.0.2.2");
    assert_eq!(driver.closed(other), None, "another client");
    assert_eq!(driver.core.snapshot().listeners[0].tracked_clients, 2);

    // Their worker dies: they are queued and still count.
    driver.leave(first, Departure::Died);
    assert_eq!(driver.core.totals().queued, 4);
    let fifth = connect(&mut driver, "192.0.2.1");
    assert_eq!(driver.closed(fifth), Some(CloseReason::TooManyQueued));

    // The next one takes them all: there is room again.
    let second = driver.worker();
    assert_eq!(driver.take_all(second), 4);
    let sixth = connect(&mut driver, "192.0.2.1");
    assert_eq!(driver.closed(sixth), None);

    // New rules start with an empty table; the event loop drops the old one on another thread.
    assert!(driver.core.discarded().is_none());
    driver.core.set_access_control(
        WEB,
        AccessControl::new(AccessRules { max_queued_per_client: Some(1), ..rules() }, 4),
    );
    assert_eq!(driver.core.discarded().map(|old| old.len()), Some(1));
    assert_eq!(driver.core.snapshot().listeners[0].tracked_clients, 0);
    let seventh = connect(&mut driver, "192.0.2.1");
    assert_eq!(driver.closed(seventh), None);
    driver.core.set_access_control(WEB, AccessControl::new(AccessRules::default(), 4));
    assert_eq!(driver.take_all(second), 2);
    assert!(driver.core.totals().is_conserved());
}
