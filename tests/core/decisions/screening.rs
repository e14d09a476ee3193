//! Access rules: what follows for the connections.

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

fn rules() -> Screening {
    Screening { max_clients: 100, ..Screening::default() }
}

fn knock(desk: &mut Desk, who: &str) -> ConnId {
    let conn = desk.accept_only_from(WEB, of(who));
    desk.pump();
    conn
}

#[test]
fn refused_connections_are_closed_and_counted() {
    let mut desk = desk();
    let rules = Screening { deny: nets(&["10.0.0.0/8"]), ..rules() };
    desk.core.set_screen(WEB, Screen::new(rules, 3));
    let worker = desk.worker();
    let bad = knock(&mut desk, "10.1.1.1");
    assert_eq!(desk.closed(bad), Some(CloseReason::Denied));
    knock(&mut desk, "192.0.2.1");
    assert_eq!(desk.core.untaken(worker), 1);
    let status = desk.core.snapshot();
    assert_eq!((status.totals.accepted, status.totals.custody), (2, 1));
    assert_eq!(status.listeners[0].closed[CloseReason::Denied as usize], 1);
    assert!(desk.core.totals().is_conserved());
}

#[test]
fn a_connection_counts_as_queued_until_it_is_taken_wherever_it_waits() {
    let mut desk = desk();
    desk.core
        .set_screen(WEB, Screen::new(Screening { max_queued_per_client: Some(3), ..rules() }, 3));
    let first = desk.worker();
    for _ in 0..3 {
        knock(&mut desk, "192.0.2.1");
    }
    let fourth = knock(&mut desk, "192.0.2.1");
    assert_eq!(desk.closed(fourth), Some(CloseReason::TooManyQueued));
    let other = knock(&mut desk, "192.0.2.2");
    assert_eq!(desk.closed(other), None, "another client");
    assert_eq!(desk.core.snapshot().listeners[0].tracked_clients, 2);

    // Their worker dies: they are held, and still count.
    desk.leave(first, Departure::Died);
    assert_eq!(desk.core.totals().held, 4);
    let fifth = knock(&mut desk, "192.0.2.1");
    assert_eq!(desk.closed(fifth), Some(CloseReason::TooManyQueued));

    // The next one takes them all: there is room again.
    let second = desk.worker();
    assert_eq!(desk.take_all(second), 4);
    let sixth = knock(&mut desk, "192.0.2.1");
    assert_eq!(desk.closed(sixth), None);

    // New rules start afresh, and the old table is dropped by somebody else.
    assert!(desk.core.discarded().is_none());
    desk.core
        .set_screen(WEB, Screen::new(Screening { max_queued_per_client: Some(1), ..rules() }, 4));
    assert_eq!(desk.core.discarded().map(|old| old.len()), Some(1));
    assert_eq!(desk.core.snapshot().listeners[0].tracked_clients, 0);
    let seventh = knock(&mut desk, "192.0.2.1");
    assert_eq!(desk.closed(seventh), None);
    desk.core.set_screen(WEB, Screen::new(Screening::default(), 4));
    assert_eq!(desk.take_all(second), 2);
    assert!(desk.core.totals().is_conserved());
}
