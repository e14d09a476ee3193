//! Affinity: where identified clients go, bindings, and awaited first bytes.

use std::collections::HashMap;

use dispatch_protocol::ClientAddr;

use super::*;
use dispatcher_core::{ClientIdentity, KeySource};

const OTHER: Duration = Duration::from_secs(60);

fn affinity(key: KeySource) -> Affinity {
    Affinity { key, ttl: OTHER, max_entries: 100 }
}

/// A driver whose pool identifies clients by a cookie.
fn cookie_driver(change: impl FnOnce(&mut PoolSettings)) -> Driver {
    driver_with(|pool| {
        pool.affinity = Some(affinity(KeySource::Cookie("ID".to_owned())));
        pool.peek = Peek { timeout: ms(500), max_bytes: 1024, max_awaiting: 8 };
        change(pool);
    })
}

pub(super) fn known(id: &str) -> Option<ClientIdentity> {
    KeySource::Cookie(String::new()).of_value(id.as_bytes())
}

/// Short forms for these tests.
pub(super) trait AffinitySteps {
    fn called(&mut self, name: &str) -> WorkerId;
    fn client(&mut self, id: &str) -> WorkerId;
    fn say(&mut self, conn: ConnId, known: Option<ClientIdentity>);
    fn remembered(&self) -> AffinitySnapshot;
}

impl AffinitySteps for Driver {
    fn called(&mut self, name: &str) -> WorkerId {
        self.trusted(Hello { name: name.to_owned(), ..hello() })
    }

    /// Accepts a client with this id; returns its worker.
    fn client(&mut self, id: &str) -> WorkerId {
        self.sends();
        let conn = self.accept(WEB);
        assert!(self.core.awaits_bytes(conn));
        self.say(conn, known(id));
        let sends = self.sends();
        assert_eq!(sends.len(), 1);
        let (worker, _) = sends[0];
        self.take_all(worker);
        worker
    }

    fn say(&mut self, conn: ConnId, known: Option<ClientIdentity>) {
        self.core.first_bytes(self.now, conn, known);
        self.pump();
    }

    fn remembered(&self) -> AffinitySnapshot {
        self.core.snapshot().pools[0].affinity.clone().unwrap()
    }
}

#[test]
fn an_identified_client_returns_to_its_worker_in_every_policy() {
    for policy in Policy::ALL {
        let mut driver = cookie_driver(|pool| pool.policy = policy);
        let workers: Vec<_> = (0..4).map(|n| driver.called(&format!("w{n}"))).collect();
        let first = driver.client("one");
        for n in 0..100 {
            driver.client(&format!("other-{n}"));
            assert_eq!(driver.client("one"), first, "{policy:?}: although it has the most by now");
        }
        let loads = driver.loads(&workers);
        assert!(
            loads.iter().all(|&load| load > 10),
            "{policy:?}: the others are spread: {loads:?}"
        );
        let status = driver.remembered();
        assert_eq!((status.hits, status.misses, status.moved), (100, 101, 0), "{policy:?}");
        assert_eq!((status.entries, status.evicted), (100, 1), "at most 100, and 101 clients");
        assert_eq!(status.key.to_string(), "cookie:ID");
    }
}

#[test]
fn a_decision_says_by_which_key_and_why_whatever_the_policy() {
    for (policy, first, again) in [
        (Policy::LeastConnections, ["chosen", "tie", "tie"], "other-key"),
        (Policy::RoundRobin, ["chosen", "tie", "tie"], "other-key"),
        (Policy::Random, ["chosen", "not-drawn", "not-drawn"], "other-key"),
        (Policy::TwoChoices, ["chosen", "not-drawn", "tie"], "other-key"),
        (Policy::Hash, ["chosen", "other-key", "other-key"], "other-key"),
        (Policy::Failover, ["chosen", "stands-by", "tie"], "stands-by"),
        (Policy::LeastScore, ["chosen", "tie", "tie"], "other-key"),
    ] {
        let mut driver = cookie_driver(|pool| {
            pool.policy = policy;
            pool.history = 10;
        });
        for (name, priority) in [("a", 1), ("b", 1), ("c", 0)] {
            driver.trusted(Hello { name: name.to_owned(), priority, ..hello() });
        }
        let one = driver.client("one");
        assert_eq!(driver.client("one"), one);
        let unknown = driver.accept(WEB);
        driver.say(unknown, None);
        let decisions = driver.core.history(PoolId(0), 0);
        let whys = |decision: &Decision| -> Vec<&str> {
            let mut whys: Vec<_> = decision.candidates.iter().map(|c| c.why.name()).collect();
            whys.sort_unstable();
            whys
        };
        let key = known("one").map(|known| known.key);
        let keys: Vec<_> = decisions.iter().map(|decision| decision.key).collect();
        assert_eq!(keys, [key, key, None], "{policy:?}");
        assert_eq!(whys(&decisions[0]), first, "{policy:?}");
        let mut expected = ["other-key", "remembered", again];
        expected.sort_unstable();
        assert_eq!(whys(&decisions[1]), expected, "{policy:?}");
        assert_eq!(decisions[1].candidates[0].why, Why::Remembered);
        assert_eq!(decisions[1].chosen, Some(one.serial));
        if policy == Policy::RoundRobin {
            let had_its_turn = ["chosen", "later-turn", "tie"];
            assert_eq!(whys(&decisions[2]), had_its_turn, "a bound client takes no turn");
        }
    }
}

#[test]
fn a_client_without_a_key_is_placed_by_the_policy() {
    let mut driver = cookie_driver(|_| {});
    let workers = [driver.called("a"), driver.called("b")];
    for _ in 0..10 {
        let conn = driver.accept(WEB);
        driver.say(conn, None);
    }
    assert_eq!(driver.loads(&workers), [5, 5]);
    let status = driver.remembered();
    assert_eq!((status.unknown, status.entries, status.misses), (10, 0, 0));
}

#[test]
fn a_worker_that_cannot_take_it_loses_it_to_another() {
    let mut driver = cookie_driver(|pool| pool.max_connections_per_worker = 2);
    let first = driver.called("a");
    assert_eq!(driver.client("one"), first);
    let second = driver.called("b");
    // The client stays with the other worker, even when the first has room again.
    let fill = driver.client("one");
    assert_eq!(fill, first);
    assert_eq!(driver.client("one"), second, "full");
    driver.finish(first, 2);
    assert_eq!(driver.client("one"), second);
    driver.finish(second, 2);
    // Draining.
    driver.goodbye(second);
    assert_eq!(driver.client("one"), first);
    let status = driver.remembered();
    assert_eq!((status.hits, status.misses, status.moved), (2, 1, 2));
    // Suspect: it left a connection untaken.
    driver.finish(first, 1);
    let third = driver.called("c");
    let conn = driver.accept(WEB);
    driver.say(conn, known("one"));
    driver.sends();
    driver.wait(ms(1_001));
    assert_eq!(driver.state(first), State::Suspect);
    assert_eq!(driver.sends(), [(third, true)], "its untaken connection moves too");
    driver.take_all(third);
    assert_eq!(driver.client("one"), third);
    // Gone.
    driver.leave(third, Departure::Died);
    driver.take_all(first);
    let back = driver.client("one");
    assert_eq!(back, first);
}

#[test]
fn a_session_id_may_name_its_worker() {
    let mut driver = cookie_driver(|pool| pool.max_connections_per_worker = 100);
    let (a, b) = (driver.called("a"), driver.called("b"));
    for _ in 0..5 {
        assert_eq!(driver.client("x.b"), b);
        assert_eq!(driver.client("y.a"), a);
    }
    let status = driver.remembered();
    assert_eq!(
        (status.routed, status.entries),
        (10, 0),
        "its id names the worker, so no entry is made"
    );
    // While the named worker is away, the client stays with the one that took over.
    driver.goodbye(b);
    let c = driver.called("c");
    assert_eq!(driver.client("x.b"), c);
    for _ in 0..3 {
        driver.client("z");
        assert_eq!(driver.client("x.b"), c);
    }
    let back = driver.called("b");
    assert_eq!(driver.client("x.b"), back);
    // A suffix that names no worker is an ordinary part of the id.
    let chosen = driver.client("x.nobody");
    driver.client("z");
    assert_eq!(driver.client("x.nobody"), chosen);
}

#[test]
fn a_worker_that_comes_back_finds_its_clients() {
    let mut driver = cookie_driver(|_| {});
    let (a, b) = (driver.called("a"), driver.called("b"));
    let ids: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    let before: Vec<_> = ids.iter().map(|id| driver.client(id)).collect();
    driver.leave(a, Departure::Disconnected);
    let a2 = driver.called("a");
    for (id, before) in ids.iter().zip(before) {
        assert_eq!(driver.client(id), if before == a { a2 } else { b });
    }
    // A worker of the same name takes the clients over if the first one drains; it gets none of
    // them if the first one is active.
    driver.goodbye(a2);
    let a3 = driver.called("a");
    let namesake = driver.called("a");
    for id in &ids {
        assert_ne!(driver.client(id), namesake);
    }
    driver.leave(a2, Departure::Died);
    for id in &ids {
        assert_ne!(driver.client(id), namesake);
    }
    assert_eq!(driver.client("x.a"), a3, "nor does its name mean it");
    assert_eq!(driver.remembered().moved, 0);
}

#[test]
fn a_worker_that_is_resumed_has_a_binding_of_its_own() {
    // A worker of its name joined meanwhile: its clients stay with that worker.
    let mut driver = cookie_driver(|_| {});
    let old = driver.called("w");
    assert_eq!(driver.client("one"), old);
    driver.drain(old);
    let new = driver.called("w");
    assert_eq!(driver.client("one"), new);
    driver.resume(old).unwrap();
    assert_eq!(driver.client("one"), new);
    assert_eq!(driver.core.claim(driver.now, old, b"mine"), ClaimOutcome::Noted);
    for _ in 0..3 {
        assert_eq!(driver.client("mine"), old);
        assert_eq!(driver.client("one"), new);
    }

    // It left again, and its binding is gone.
    let mut driver = cookie_driver(|_| {});
    let old = driver.called("w");
    driver.drain(old);
    let new = driver.called("w");
    driver.leave(new, Departure::Disconnected);
    driver.resume(old).unwrap();
    assert_eq!(driver.client("one"), old);
    let third = driver.called("third");
    assert_eq!(driver.client("two"), third);
    assert_eq!((driver.client("one"), driver.client("two")), (old, third));
    driver.leave(old, Departure::Died);
    driver.leave(third, Departure::Died);

    // It left again, and its clients return to its predecessor.
    let mut driver = cookie_driver(|_| {});
    let old = driver.called("w");
    driver.drain(old);
    let new = driver.called("w");
    assert_eq!(driver.client("one"), new);
    driver.leave(new, Departure::Disconnected);
    driver.resume(old).unwrap();
    for _ in 0..3 {
        assert_eq!(driver.client("one"), old);
    }
    let status = driver.remembered();
    assert_eq!((status.hits, status.misses, status.moved), (3, 1, 0));
}

#[test]
fn a_worker_may_claim_a_key() {
    let mut driver = cookie_driver(|_| {});
    let (a, b) = (driver.called("a"), driver.called("b"));
    assert_eq!(driver.core.claim(driver.now, b, b"mine"), ClaimOutcome::Noted);
    for _ in 0..3 {
        assert_eq!(driver.client("mine"), b);
    }
    assert_eq!(
        driver.core.claim(driver.now, a, b"mine"),
        ClaimOutcome::Noted,
        "the later one wins"
    );
    assert_eq!(driver.client("mine"), a);
    assert_eq!(driver.core.claim(driver.now, a, b""), ClaimOutcome::NotAKey);
    driver.goodbye(b);
    assert_eq!(driver.core.claim(driver.now, b, b"mine"), ClaimOutcome::Leaving);
    assert_eq!(driver.client("mine"), a);
    let status = driver.remembered();
    assert_eq!((status.claimed, status.hits, status.misses), (2, 5, 0));

    let mut plain = driver_with(|_| {});
    let worker = plain.worker();
    assert_eq!(plain.core.claim(plain.now, worker, b"mine"), ClaimOutcome::NoAffinity);
}

#[test]
fn a_claim_is_forgotten_like_any_other() {
    let mut driver = cookie_driver(|_| {});
    let (a, b) = (driver.called("a"), driver.called("b"));
    driver.core.claim(driver.now, b, b"mine");
    driver.wait(OTHER - ms(1));
    assert_eq!(driver.client("mine"), b);
    driver.wait(OTHER - ms(1));
    assert_eq!(driver.client("mine"), b, "from its last use");
    driver.wait(OTHER);
    assert_eq!(driver.client("mine"), a, "the one with fewer");
    // New entries remove expired ones.
    for n in 0..50 {
        driver.client(&n.to_string());
    }
    driver.wait(OTHER);
    assert_eq!(driver.remembered().entries, 51);
    for n in 100..120 {
        driver.client(&n.to_string());
    }
    assert!(driver.remembered().entries < 35, "{:?}", driver.remembered());
    assert_eq!(driver.remembered().evicted, 0);
}

#[test]
fn addresses_need_no_waiting() {
    let key = KeySource::ClientIp { ipv4_prefix: 24, ipv6_prefix: 64 };
    let mut driver = driver_with(|pool| pool.affinity = Some(affinity(key)));
    let workers = [driver.called("a"), driver.called("b"), driver.called("c")];
    let mut seen = HashMap::new();
    for n in 0..60u8 {
        let peer = ClientAddr::Inet(([10, 0, n % 6, n], 5).into());
        let conn = driver.core.accepted(driver.now, Client::new(WEB, peer));
        assert!(!driver.core.awaits_bytes(conn));
        let mut sent = None;
        while let Some(effect) = driver.core.effect() {
            if let Effect::Send { worker, .. } = effect {
                sent = Some(worker);
            }
        }
        assert_eq!(*seen.entry(n % 6).or_insert(sent), sent);
    }
    assert_eq!(driver.loads(&workers), [20, 20, 20]);
    // Clients of a Unix listener have no address.
    driver.core.accepted(driver.now, Client::new(WEB, ClientAddr::Unix));
    assert_eq!(driver.remembered().unknown, 1);
}

#[test]
fn awaiting_counts_as_queued_and_ends_in_time() {
    let mut driver = cookie_driver(|_| {});
    let worker = driver.called("a");
    let first = driver.accept(WEB);
    driver.wait(ms(200));
    let second = driver.accept(WEB);
    assert_eq!((driver.core.totals().queued, driver.remembered().awaiting), (2, 2));
    assert_eq!(driver.core.snapshot().pools[0].queued, 2);
    assert_eq!(driver.core.deadline(), Some(driver.now + ms(300)));
    driver.wait(ms(299));
    assert_eq!(driver.core.totals().queued, 2);
    driver.wait(ms(1));
    assert!(!driver.core.awaits_bytes(first) && driver.core.awaits_bytes(second));
    assert_eq!(driver.core.untaken(worker), 1);
    // Late bytes, and bytes of an unknown connection, are ignored.
    driver.say(first, known("late"));
    driver.say(second, known("x"));
    driver.say(second, known("x"));
    assert_eq!(driver.core.untaken(worker), 2);
    let status = driver.remembered();
    assert_eq!((status.timed_out, status.unknown, status.misses, status.awaiting), (1, 1, 1, 0));
}

#[test]
fn only_so_many_are_awaited() {
    let mut driver = cookie_driver(|_| {});
    driver.called("a");
    let conns: Vec<_> = (0..10).map(|_| driver.accept(WEB)).collect();
    let awaited = conns.iter().filter(|&&conn| driver.core.awaits_bytes(conn)).count();
    assert_eq!((awaited, driver.remembered().not_awaited), (8, 2));
    // A client that disconnects makes room.
    driver.core.client_gone(driver.now, conns[3]);
    driver.pump();
    assert_eq!(driver.closed(conns[3]), Some(CloseReason::ClientGone));
    let next = driver.accept(WEB);
    assert!(driver.core.awaits_bytes(next));
}

#[test]
fn without_a_worker_awaited_clients_go_on_waiting() {
    let mut driver = cookie_driver(|pool| pool.wait_for_worker = ms(2_000));
    let worker = driver.called("a");
    let conn = driver.accept(WEB);
    let silent = driver.accept(WEB);
    driver.leave(worker, Departure::Died);
    driver.say(conn, known("x"));
    assert_eq!((driver.core.totals().queued, driver.remembered().awaiting), (2, 1));
    let next = driver.called("b");
    assert_eq!(driver.sends().last(), Some(&(next, false)));
    driver.leave(next, Departure::Died);
    driver.wait(ms(2_000));
    // Its wait for first bytes timed out long before, so it was queued; no worker joined.
    assert_eq!(driver.closed(silent), Some(CloseReason::NoWorker));
    assert_eq!(driver.closed(conn), Some(CloseReason::NoWorker));
    // A client that connects now is refused at once, whatever it sends.
    let late = driver.accept(WEB);
    assert_eq!(driver.closed(late), Some(CloseReason::NoWorker));
}

#[test]
fn awaited_clients_are_refused_with_the_others() {
    let mut driver = cookie_driver(|pool| {
        pool.wait_for_worker = ms(100);
        pool.peek.timeout = ms(10_000);
    });
    let worker = driver.called("a");
    let silent = driver.accept(WEB);
    driver.leave(worker, Departure::Died);
    driver.events();
    driver.wait(ms(100));
    assert_eq!(driver.closed(silent), Some(CloseReason::NoWorker));
    assert!(driver.events().contains(&Event::Refusing {
        pool: PoolId(0),
        closed: 1,
        unserved: false
    }));
}

#[test]
fn a_stop_waits_for_the_awaited_until_its_deadline() {
    let mut driver = cookie_driver(|pool| pool.peek.timeout = ms(10_000));
    let worker = driver.called("a");
    let (speaks, silent) = (driver.accept(WEB), driver.accept(WEB));
    let deadline = driver.now + ms(1_000);
    driver.core.stop(driver.now, deadline);
    assert!(!driver.core.stopped());
    driver.say(speaks, known("x"));
    driver.take_all(worker);
    assert!(!driver.core.stopped(), "one is awaited still");
    driver.wait(ms(1_000));
    assert!(driver.core.stopped());
    driver.take_all(worker);
    assert!(driver.is_served(silent), "by the worker that has room");
}

#[test]
fn a_seeded_life_is_as_it_is_remembered() {
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let max_entries = 1 + random.below(30) as u32;
        let mut driver = cookie_driver(|pool| {
            pool.max_connections_per_worker = 4;
            pool.affinity.as_mut().unwrap().max_entries = max_entries;
        });
        let mut workers: Vec<WorkerId> = (0..3).map(|n| driver.called(&format!("w{n}"))).collect();
        // By name, because bindings outlive workers.
        let mut last: HashMap<u64, usize> = HashMap::new();
        let mut away = 0;
        for _ in 0..400 {
            match random.below(10) {
                0 => {
                    let n = random.below(3) as usize;
                    driver.leave(workers[n], Departure::Died);
                    workers[n] = driver.called(&format!("w{n}"));
                }
                1 | 2 => {
                    let n = random.below(3) as usize;
                    if driver.core.load(workers[n]) > Some(0) {
                        driver.finish(workers[n], 1);
                    }
                }
                _ if driver.loads(&workers).iter().all(|&load| load == 4) => {}
                _ => {
                    let id = random.below(25);
                    let before = last.get(&id).copied();
                    let full = before.map(|n| driver.core.load(workers[n]) == Some(4));
                    let hits = driver.remembered().hits;
                    let got = driver.client(&id.to_string());
                    let n = workers.iter().position(|&worker| worker == got).unwrap();
                    if driver.remembered().hits > hits {
                        assert_eq!((before, full), (Some(n), Some(false)));
                    } else if full == Some(true) && max_entries > 25 {
                        away += 1;
                    } else if before.is_some() {
                        assert!(max_entries < 25, "forgotten for no reason");
                    }
                    last.insert(id, n);
                }
            }
            assert!(driver.remembered().entries <= u64::from(max_entries));
        }
        if max_entries > 25 {
            assert_eq!(driver.remembered().moved, away);
        }
        driver.core.check();
    }
}
