//! PROXY headers: whose header counts, whose rules apply, what is awaited for how long, and how
//! many are awaited.

use dispatch_protocol::ClientAddr;
use ipnet::IpNet;
use proptest::prelude::ProptestConfig;

use super::affinity::known;
use super::*;
use dispatcher_core::KeySource;

const PROXY: &str = "10.0.0.5:40000";
const STRANGER: &str = "203.0.113.9:40000";
const CLIENT: &str = "192.0.2.1:50000";

fn at(text: &str) -> ClientAddr {
    ClientAddr::Inet(text.parse().unwrap())
}

fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|text| text.parse().unwrap()).collect()
}

fn control(timeout: u64) -> Option<Box<ProxyControl>> {
    let from = nets(&["10.0.0.0/24"]);
    Some(ProxyControl::new(ProxyRules { from, timeout: ms(timeout), max_header: 536 }))
}

/// A driver whose listener trusts 10.0.0.0/24, with a worker.
fn driver_behind(change: impl FnOnce(&mut PoolSettings)) -> (Driver, WorkerId) {
    let mut driver = driver_with(|pool| {
        pool.peek.max_awaiting = 8;
        change(pool);
    });
    driver.core.set_proxy_control(WEB, control(500));
    let worker = driver.worker();
    driver.sends();
    (driver, worker)
}

trait ProxySteps {
    fn from(&mut self, source: &str) -> ConnId;
    fn sees(&mut self, conn: ConnId, seen: HeaderSeen);
    fn headers(&self) -> (u64, u64);
}

impl ProxySteps for Driver {
    fn from(&mut self, source: &str) -> ConnId {
        let conn = self.accept_only_from(WEB, at(source));
        self.pump();
        conn
    }

    fn sees(&mut self, conn: ConnId, seen: HeaderSeen) {
        self.core.header(self.now, conn, seen);
        self.pump();
    }

    /// Awaited and read.
    fn headers(&self) -> (u64, u64) {
        let headers = self.core.snapshot().listeners[0].headers.unwrap();
        (headers.awaited, headers.read)
    }
}

fn named(client: &str) -> HeaderSeen {
    HeaderSeen::Whole(Some(at(client)))
}

#[test]
fn a_connection_goes_on_once_its_header_is_read() {
    let (mut driver, worker) = driver_behind(|_| {});
    let conn = driver.from(PROXY);
    assert!(driver.core.awaits_header(conn) && !driver.core.awaits_bytes(conn));
    assert_eq!((driver.core.totals().queued, driver.headers()), (1, (1, 0)));
    driver.sees(conn, HeaderSeen::Begun);
    assert!(driver.core.awaits_header(conn), "the rest is awaited");
    driver.sees(conn, named(CLIENT));
    assert_eq!((driver.core.untaken(worker), driver.headers()), (1, (0, 1)));
    // A second report comes too late.
    driver.sees(conn, HeaderSeen::Malformed);
    assert_eq!(driver.closed(conn), None);
    // LOCAL, UNKNOWN: the connection goes on as that of the proxy.
    let check = driver.from(PROXY);
    driver.sees(check, HeaderSeen::Whole(None));
    assert_eq!((driver.core.untaken(worker), driver.headers()), (2, (0, 2)));
}

#[test]
fn each_failure_has_its_reason() {
    let (mut driver, worker) = driver_behind(|_| {});
    let cases = [
        (PROXY, HeaderSeen::Nothing, Some(CloseReason::ProxyMissing)),
        (PROXY, HeaderSeen::Malformed, Some(CloseReason::ProxyMalformed)),
        (PROXY, HeaderSeen::TooLong, Some(CloseReason::ProxyTooLong)),
        (STRANGER, HeaderSeen::Nothing, None),
        (STRANGER, HeaderSeen::Begun, Some(CloseReason::ProxyUntrusted)),
        (STRANGER, HeaderSeen::Malformed, Some(CloseReason::ProxyUntrusted)),
        (STRANGER, HeaderSeen::TooLong, Some(CloseReason::ProxyUntrusted)),
        (STRANGER, HeaderSeen::Whole(None), Some(CloseReason::ProxyUntrusted)),
        (STRANGER, named(CLIENT), Some(CloseReason::ProxyUntrusted)),
    ];
    for (source, seen, reason) in cases {
        let conn = driver.from(source);
        driver.sees(conn, seen);
        assert_eq!(driver.closed(conn), reason, "{source} {seen:?}");
    }
    assert_eq!(driver.core.untaken(worker), 1);
    assert!(driver.core.totals().is_conserved());
    // The client resets the connection.
    let gone = driver.from(PROXY);
    driver.core.client_gone(driver.now, gone);
    driver.pump();
    assert_eq!(driver.closed(gone), Some(CloseReason::ClientGone));
}

#[test]
fn a_header_is_awaited_for_so_long() {
    let (mut driver, worker) = driver_behind(|_| {});
    let (slow, silent) = (driver.from(PROXY), driver.from(STRANGER));
    driver.sees(slow, HeaderSeen::Begun);
    assert_eq!(driver.core.deadline(), Some(driver.now + ms(500)));
    driver.wait(ms(499));
    assert!(driver.core.awaits_header(slow) && driver.core.awaits_header(silent));
    driver.wait(ms(1));
    assert_eq!(driver.closed(slow), Some(CloseReason::ProxyTimeout));
    assert_eq!(driver.closed(silent), None, "it sent no header, as it must not");
    assert_eq!(driver.core.untaken(worker), 1);
}

#[test]
fn rules_apply_to_the_source_and_then_to_the_client() {
    let (mut driver, worker) = driver_behind(|_| {});
    let rules = AccessRules {
        allow: nets(&["192.0.2.0/24", "203.0.113.0/24"]),
        deny: nets(&["10.0.0.66/32", "192.0.2.66/32"]),
        max_queued_per_client: Some(2),
        max_clients: 100,
        ..AccessRules::default()
    };
    driver.core.set_access_control(WEB, AccessControl::new(rules, 3));
    // The source, at accept.
    let denied = driver.from("10.0.0.66:1");
    assert_eq!(driver.closed(denied), Some(CloseReason::Denied));
    let not_allowed = driver.from("198.51.100.1:1");
    assert_eq!(driver.closed(not_allowed), Some(CloseReason::Denied));
    // The client, after the header.
    for client in ["192.0.2.66:1", "198.51.100.1:1"] {
        let conn = driver.from(PROXY);
        assert_eq!(driver.closed(conn), None, "a trusted proxy is allowed");
        driver.sees(conn, named(client));
        assert_eq!(driver.closed(conn), Some(CloseReason::Denied), "{client}");
    }
    // Many clients of one proxy: each is counted for itself.
    for n in 1..=5 {
        let conn = driver.from(PROXY);
        driver.sees(conn, named(&format!("192.0.2.{n}:1")));
        assert_eq!(driver.closed(conn), None);
    }
    for expected in [None, Some(CloseReason::TooManyQueued)] {
        let conn = driver.from(PROXY);
        driver.sees(conn, named("192.0.2.1:2"));
        assert_eq!(driver.closed(conn), expected);
    }
    // A health check of the proxy is no client.
    let check = driver.from(PROXY);
    driver.sees(check, HeaderSeen::Whole(None));
    assert_eq!(driver.closed(check), None);
    // An untrusted source is the client itself, and counted from accept on.
    let waiting: Vec<ConnId> = (0..2).map(|_| driver.from(STRANGER)).collect();
    let third = driver.from(STRANGER);
    assert_eq!(driver.closed(third), Some(CloseReason::TooManyQueued));
    waiting.into_iter().for_each(|conn| driver.sees(conn, HeaderSeen::Nothing));
    assert_eq!(driver.take_all(worker), 9);
    assert!(driver.core.totals().is_conserved());
}

#[test]
fn keys_are_those_of_the_client() {
    for by_policy in [true, false] {
        let (mut driver, first) = driver_behind(|pool| match by_policy {
            true => pool.policy = Policy::Hash,
            false => {
                let key = KeySource::ClientIp { ipv4_prefix: 32, ipv6_prefix: 128 };
                pool.affinity = Some(Affinity { key, ttl: ms(60_000), max_entries: 100 });
            }
        });
        let workers = [first, driver.worker(), driver.worker()];
        let mut of_clients = std::collections::HashMap::new();
        for round in 0..3 {
            for n in 1..=20 {
                driver.sends();
                let conn = driver.from(PROXY);
                driver.sees(conn, named(&format!("192.0.2.{n}:{round}")));
                let (worker, _) = driver.sends()[0];
                assert_eq!(*of_clients.entry(n).or_insert(worker), worker, "round {round}");
            }
        }
        assert!(workers.iter().all(|worker| of_clients.values().any(|of| of == worker)));
    }
}

#[test]
fn first_bytes_are_awaited_after_the_header() {
    let (mut driver, worker) = driver_behind(|pool| {
        let key = KeySource::Cookie("ID".to_owned());
        pool.affinity = Some(Affinity { key, ttl: ms(60_000), max_entries: 100 });
        pool.peek.timeout = ms(300);
    });
    let conn = driver.from(PROXY);
    driver.sees(conn, named(CLIENT));
    assert!(driver.core.awaits_bytes(conn) && !driver.core.awaits_header(conn));
    driver.core.first_bytes(driver.now, conn, known("x"));
    driver.pump();
    assert_eq!(driver.core.untaken(worker), 1);
    // Each wait has its own time.
    let slow = driver.from(PROXY);
    driver.wait(ms(400));
    driver.sees(slow, named(CLIENT));
    driver.wait(ms(299));
    assert!(driver.core.awaits_bytes(slow));
    driver.wait(ms(1));
    assert_eq!(driver.core.untaken(worker), 2);
}

#[test]
fn only_so_many_are_awaited_and_the_oldest_give_way() {
    let (mut driver, worker) = driver_behind(|_| {});
    let old: Vec<ConnId> = (0..8)
        .map(|n| {
            driver.wait(ms(1));
            driver.from(if n < 4 { PROXY } else { STRANGER })
        })
        .collect();
    assert_eq!(driver.headers(), (8, 0));
    let new: Vec<ConnId> = (0..6).map(|_| driver.from(PROXY)).collect();
    assert_eq!(driver.headers(), (8, 0), "never more than max_awaiting");
    for (n, &conn) in old.iter().enumerate() {
        assert_eq!(driver.closed(conn), (n < 4).then_some(CloseReason::ProxyTimeout));
    }
    assert_eq!(driver.core.untaken(worker), 2, "the oldest strangers are served");
    for conn in new {
        driver.sees(conn, named(CLIENT));
    }
    assert_eq!((driver.core.untaken(worker), driver.headers()), (8, (2, 6)));
    // First bytes and headers share the bound, and a reload can lower it.
    let mut pool = settings();
    pool.peek.max_awaiting = 1;
    driver.core.change_pool(driver.now, PoolId(0), pool, 1);
    driver.pump();
    assert_eq!(driver.headers().0, 1);
}

#[test]
fn headers_and_first_bytes_share_the_bound() {
    let (mut driver, _) = driver_behind(|pool| {
        let key = KeySource::Cookie("ID".to_owned());
        pool.affinity = Some(Affinity { key, ttl: ms(60_000), max_entries: 100 });
    });
    let awaiting: Vec<ConnId> = (0..8)
        .map(|_| {
            let conn = driver.from(PROXY);
            driver.sees(conn, named(CLIENT));
            conn
        })
        .collect();
    assert!(awaiting.iter().all(|&conn| driver.core.awaits_bytes(conn)));
    let unread: Vec<ConnId> = (0..8).map(|_| driver.from(PROXY)).collect();
    assert!(awaiting.iter().all(|&conn| !driver.core.awaits_bytes(conn)), "placed without a key");
    assert_eq!(driver.headers().0, 8);
    // All headers come; nothing is left that gives way, and nothing is lost.
    unread.iter().for_each(|&conn| driver.sees(conn, named(CLIENT)));
    assert!(unread.iter().all(|&conn| driver.core.awaits_bytes(conn)));
    assert_eq!(driver.headers(), (0, 16));
}

#[test]
fn without_a_worker_unread_connections_are_refused_with_the_others() {
    let (mut driver, worker) = driver_behind(|pool| pool.wait_for_worker = ms(100));
    let unread = driver.from(PROXY);
    driver.leave(worker, Departure::Died);
    driver.wait(ms(100));
    assert_eq!(driver.closed(unread), Some(CloseReason::NoWorker));
    let late = driver.from(PROXY);
    assert_eq!(driver.closed(late), Some(CloseReason::NoWorker), "at once, whatever it sends");
    driver.worker();
    let conn = driver.from(PROXY);
    assert!(driver.core.awaits_header(conn));
}

#[test]
fn a_pool_that_is_not_served_recovers_through_a_proxy() {
    let (mut driver, worker) = driver_behind(|pool| {
        pool.wait_for_worker = ms(2_000);
        pool.handoff_timeout = ms(100);
        pool.max_handoff_timeout = ms(100);
    });
    let untaken = driver.from(PROXY);
    driver.sees(untaken, named(CLIENT));
    for _ in 0..60 {
        driver.wait(ms(100));
    }
    assert_eq!(driver.closed(untaken), Some(CloseReason::NoWorker));
    assert_eq!(driver.core.pool_state(PoolId(0)), Some(PoolState::Refusing));
    // It answers the probe, so it is tested with a connection, whose header is read first.
    assert!(driver.answer(worker));
    driver.turn();
    let test = driver.from(PROXY);
    assert!(driver.core.awaits_header(test));
    driver.sees(test, named(CLIENT));
    driver.take_all(worker);
    assert!(driver.is_served(test));
    assert_eq!(driver.core.pool_state(PoolId(0)), Some(PoolState::Ready));
}

#[test]
fn a_stop_waits_for_headers_until_its_deadline() {
    let (mut driver, worker) = driver_behind(|_| {});
    let (quick, silent) = (driver.from(PROXY), driver.from(PROXY));
    driver.core.stop(driver.now, driver.now + ms(300));
    driver.pump();
    assert!(!driver.core.stopped());
    driver.sees(quick, named(CLIENT));
    driver.take_all(worker);
    assert!(driver.is_served(quick));
    driver.wait(ms(300));
    assert_eq!(driver.closed(silent), Some(CloseReason::Shutdown));
    assert!(driver.core.stopped());
    let last = driver.from(PROXY);
    assert_eq!(driver.closed(last), Some(CloseReason::Shutdown));
}

#[test]
fn a_successor_awaits_only_headers_that_are_unread() {
    let (mut driver, worker) = driver_behind(|_| {});
    let (unread, taken_over) = (driver.from(PROXY), driver.from(PROXY));
    let waiting: Vec<ConnId> = driver.core.waiting().collect();
    assert_eq!(waiting, [unread, taken_over]);
    driver.core.handed_over(driver.now, taken_over);
    driver.pump();
    assert_eq!(driver.closed(taken_over), Some(CloseReason::HandedOver));
    let rules = AccessRules { allow: nets(&["192.0.2.0/24"]), ..AccessRules::default() };
    driver.core.set_access_control(WEB, AccessControl::new(rules, 3));
    for (peer, header, closed) in [
        (CLIENT, HeaderRead::Client, None),
        ("198.51.100.1:1", HeaderRead::Client, Some(CloseReason::Denied)),
        (PROXY, HeaderRead::Local, None),
        (PROXY, HeaderRead::Absent, Some(CloseReason::Denied)),
        (CLIENT, HeaderRead::Absent, None),
    ] {
        let before = driver.core.untaken(worker);
        let client = Client { header, ..Client::new(WEB, at(peer)) };
        let conn = driver.accept_client(client);
        driver.pump();
        assert!(!driver.core.awaits_header(conn));
        assert_eq!(driver.closed(conn), closed, "{peer}");
        assert_eq!(driver.core.untaken(worker) - before, u64::from(closed.is_none()));
    }
}

#[test]
fn a_reload_changes_the_rules_for_new_connections() {
    let (mut driver, worker) = driver_behind(|_| {});
    let unread = driver.from(PROXY);
    driver.core.set_proxy_control(WEB, None);
    assert_eq!(driver.core.discarded().map(|old| old.len()), Some(1));
    let plain = driver.from(PROXY);
    assert_eq!(driver.core.untaken(worker), 1, "it has no header any more");
    assert!(!driver.core.awaits_header(plain) && driver.core.awaits_header(unread));
    // The old one keeps what was promised to it.
    driver.sees(unread, named(CLIENT));
    assert_eq!(driver.core.untaken(worker), 2);
    let again = driver.from(PROXY);
    driver.core.set_proxy_control(WEB, control(100));
    let (first, second) = (driver.from(PROXY), driver.from(PROXY));
    assert_eq!(driver.closed(again), None);
    driver.wait(ms(100));
    for conn in [first, second] {
        assert_eq!(driver.closed(conn), Some(CloseReason::ProxyTimeout));
    }
    // A listener that is removed still reads what it has accepted.
    let rules = AccessRules { deny: nets(&["192.0.2.66/32"]), ..AccessRules::default() };
    driver.core.set_access_control(WEB, AccessControl::new(rules, 3));
    let (last, denied) = (driver.from(PROXY), driver.from(PROXY));
    driver.core.discarded();
    driver.core.retire_listener(WEB);
    driver.core.listener_closed(driver.now, WEB);
    driver.wait(ms(1));
    driver.sees(last, named(CLIENT));
    assert_eq!(driver.closed(last), None);
    driver.sees(denied, named("192.0.2.66:1"));
    assert_eq!(driver.closed(denied), Some(CloseReason::Denied), "by the rules it had");
    assert!(driver.core.discarded().is_none(), "they were needed until now");
    driver.wait(ms(1));
    assert_eq!(driver.core.discarded().map(|old| old.len()), Some(2));
}

#[test]
fn clients_of_a_unix_listener_are_trusted() {
    let (mut driver, worker) = driver_behind(|_| {});
    let conn = driver.accept(WEB);
    driver.sees(conn, named(CLIENT));
    let other = driver.accept(WEB);
    driver.sees(other, HeaderSeen::Nothing);
    assert_eq!(driver.closed(other), Some(CloseReason::ProxyMissing));
    // And a proxy may name a client of a Unix socket.
    let unix = driver.from(PROXY);
    driver.sees(unix, HeaderSeen::Whole(Some(ClientAddr::Unix)));
    assert_eq!(driver.core.untaken(worker), 2);
}

proptest::proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever arrives, in whatever order, every connection is in one place, and nothing is
    /// awaited beyond the bounds.
    #[test]
    fn any_history_keeps_the_books(
        steps in proptest::collection::vec((0..12u8, 0..40u8), 0..120),
        affinity in proptest::prelude::any::<bool>(),
    ) {
        let (mut driver, _) = driver_behind(|pool| {
            pool.peek.max_awaiting = 5;
            pool.wait_for_worker = ms(400);
            if affinity {
                let key = KeySource::Cookie("ID".to_owned());
                pool.affinity = Some(Affinity { key, ttl: ms(60_000), max_entries: 10 });
            }
        });
        let rules = AccessRules { max_queued_per_client: Some(3), max_clients: 4, ..AccessRules::default() };
        driver.core.set_access_control(WEB, AccessControl::new(rules, 3));
        let (mut conns, mut workers): (Vec<ConnId>, Vec<WorkerId>) = Default::default();
        for (step, n) in steps {
            let some = conns.get(usize::from(n) % conns.len().max(1)).copied();
            let client = at(&format!("192.0.2.{}:1", n % 6));
            match (step, some) {
                (0 | 1, _) => conns.push(driver.from(if n % 3 == 0 { STRANGER } else { PROXY })),
                (2 | 3, Some(conn)) => driver.sees(conn, HeaderSeen::Whole(Some(client))),
                (4, Some(conn)) => driver.sees(conn, [
                    HeaderSeen::Whole(None),
                    HeaderSeen::Begun,
                    HeaderSeen::Nothing,
                    HeaderSeen::Malformed,
                    HeaderSeen::TooLong,
                ][usize::from(n) % 5]),
                (5, Some(conn)) => {
                    driver.core.first_bytes(driver.now, conn, known("x"));
                    driver.pump();
                }
                (6, Some(conn)) => {
                    driver.core.client_gone(driver.now, conn);
                    driver.pump();
                }
                (7, _) => driver.wait(ms(u64::from(n) * 20)),
                (8, _) => {
                    // Refused at the end of a stop.
                    if let Ok(worker) = driver.join(hello()) {
                        driver.vouch(worker);
                        workers.push(worker);
                    }
                }
                (9, _) if !workers.is_empty() => {
                    let worker = workers.remove(usize::from(n) % workers.len());
                    driver.leave(worker, Departure::Died);
                }
                (10, _) => {
                    for &worker in &workers {
                        driver.take_all(worker);
                    }
                }
                (11, _) if n < 4 => {
                    driver.core.set_proxy_control(WEB, (n > 0).then(|| control(100)).flatten());
                }
                (11, _) if n == 39 => {
                    driver.core.stop(driver.now, driver.now + ms(100));
                    driver.pump();
                }
                _ => {}
            }
            driver.core.check();
            let totals = driver.core.totals();
            proptest::prop_assert!(totals.is_conserved());
            let held = driver.core.waiting().count() as u64;
            proptest::prop_assert_eq!(held, totals.queued);
        }
    }
}
