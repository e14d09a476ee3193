//! Clients that are known: where they go, what is remembered, and those whose first bytes are awaited.

use std::collections::HashMap;

use dispatch_protocol::ClientAddr;

use super::*;
use dispatcher_core::{KeySource, Known};

const OTHER: Duration = Duration::from_secs(60);

fn affinity(key: KeySource) -> Affinity {
    Affinity { key, ttl: OTHER, max_entries: 100 }
}

/// A machine whose clients are known by a cookie.
fn cookie_desk(change: impl FnOnce(&mut PoolSettings)) -> Desk {
    desk_with(|pool| {
        pool.affinity = Some(affinity(KeySource::Cookie("ID".to_owned())));
        pool.peek = Peek { timeout: ms(500), max_bytes: 1024, max_awaiting: 8 };
        change(pool);
    })
}

pub(super) fn known(id: &str) -> Option<Known> {
    KeySource::Cookie(String::new()).of_value(id.as_bytes())
}

/// Short forms for what these tests do.
pub(super) trait AffinitySteps {
    fn called(&mut self, name: &str) -> WorkerId;
    fn client(&mut self, id: &str) -> WorkerId;
    fn say(&mut self, conn: ConnId, known: Option<Known>);
    fn remembered(&self) -> AffinitySnapshot;
}

impl AffinitySteps for Desk {
    fn called(&mut self, name: &str) -> WorkerId {
        self.trusted(Hello { name: name.to_owned(), ..hello() })
    }

    /// A client with this id; who gets it.
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

    fn say(&mut self, conn: ConnId, known: Option<Known>) {
        self.core.first_bytes(self.now, conn, known);
        self.pump();
    }

    fn remembered(&self) -> AffinitySnapshot {
        self.core.snapshot().pools[0].affinity.clone().unwrap()
    }
}

#[test]
fn a_known_client_goes_where_it_was_whatever_the_policy() {
    for policy in Policy::ALL {
        let mut desk = cookie_desk(|pool| pool.policy = policy);
        let workers: Vec<_> = (0..4).map(|n| desk.called(&format!("w{n}"))).collect();
        let first = desk.client("one");
        for n in 0..100 {
            desk.client(&format!("other-{n}"));
            assert_eq!(desk.client("one"), first, "{policy:?}: although it has the most by now");
        }
        let loads = desk.loads(&workers);
        assert!(
            loads.iter().all(|&load| load > 10),
            "{policy:?}: the others are spread: {loads:?}"
        );
        let status = desk.remembered();
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
        let mut desk = cookie_desk(|pool| {
            pool.policy = policy;
            pool.history = 10;
        });
        for (name, priority) in [("a", 1), ("b", 1), ("c", 0)] {
            desk.trusted(Hello { name: name.to_owned(), priority, ..hello() });
        }
        let one = desk.client("one");
        assert_eq!(desk.client("one"), one);
        let nobody = desk.accept(WEB);
        desk.say(nobody, None);
        let decisions = desk.core.history(PoolId(0), 0);
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
            assert_eq!(whys(&decisions[2]), had_its_turn, "what is remembered is no turn");
        }
    }
}

#[test]
fn who_has_no_key_goes_by_the_policy() {
    let mut desk = cookie_desk(|_| {});
    let workers = [desk.called("a"), desk.called("b")];
    for _ in 0..10 {
        let conn = desk.accept(WEB);
        desk.say(conn, None);
    }
    assert_eq!(desk.loads(&workers), [5, 5]);
    let status = desk.remembered();
    assert_eq!((status.unknown, status.entries, status.misses), (10, 0, 0));
}

#[test]
fn a_worker_that_cannot_take_it_loses_it_to_another() {
    let mut desk = cookie_desk(|pool| pool.max_connections_per_worker = 2);
    let first = desk.called("a");
    assert_eq!(desk.client("one"), first);
    let second = desk.called("b");
    // It goes on in the other, even when the first has room again.
    let fill = desk.client("one");
    assert_eq!(fill, first);
    assert_eq!(desk.client("one"), second, "full");
    desk.finish(first, 2);
    assert_eq!(desk.client("one"), second);
    desk.finish(second, 2);
    // Draining.
    desk.goodbye(second);
    assert_eq!(desk.client("one"), first);
    let status = desk.remembered();
    assert_eq!((status.hits, status.misses, status.moved), (2, 1, 2));
    // Suspect: it left something untaken.
    desk.finish(first, 1);
    let third = desk.called("c");
    let conn = desk.accept(WEB);
    desk.say(conn, known("one"));
    desk.sends();
    desk.wait(ms(1_001));
    assert_eq!(desk.state(first), State::Suspect);
    assert_eq!(desk.sends(), [(third, true)], "what it had goes elsewhere too");
    desk.take_all(third);
    assert_eq!(desk.client("one"), third);
    // Gone.
    desk.leave(third, Departure::Died);
    desk.take_all(first);
    let back = desk.client("one");
    assert_eq!(back, first);
}

#[test]
fn a_session_id_may_name_its_worker() {
    let mut desk = cookie_desk(|pool| pool.max_connections_per_worker = 100);
    let (a, b) = (desk.called("a"), desk.called("b"));
    for _ in 0..5 {
        assert_eq!(desk.client("x.b"), b);
        assert_eq!(desk.client("y.a"), a);
    }
    let status = desk.remembered();
    assert_eq!((status.routed, status.entries), (10, 0), "its id says it, nothing to remember");
    // Away: it stays with whoever took over, until the one it names is back.
    desk.goodbye(b);
    let c = desk.called("c");
    assert_eq!(desk.client("x.b"), c);
    for _ in 0..3 {
        desk.client("z");
        assert_eq!(desk.client("x.b"), c);
    }
    let back = desk.called("b");
    assert_eq!(desk.client("x.b"), back);
    // A name nobody has is just a part of the id.
    let somebody = desk.client("x.nobody");
    desk.client("z");
    assert_eq!(desk.client("x.nobody"), somebody);
}

#[test]
fn a_worker_that_comes_back_finds_its_clients() {
    let mut desk = cookie_desk(|_| {});
    let (a, b) = (desk.called("a"), desk.called("b"));
    let ids: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    let before: Vec<_> = ids.iter().map(|id| desk.client(id)).collect();
    desk.leave(a, Departure::Disconnected);
    let a2 = desk.called("a");
    for (id, before) in ids.iter().zip(before) {
        assert_eq!(desk.client(id), if before == a { a2 } else { b });
    }
    // A successor beside the one that drains has them too; a namesake beside one that does not has none of them.
    desk.goodbye(a2);
    let a3 = desk.called("a");
    let namesake = desk.called("a");
    for id in &ids {
        assert_ne!(desk.client(id), namesake);
    }
    desk.leave(a2, Departure::Died);
    for id in &ids {
        assert_ne!(desk.client(id), namesake);
    }
    assert_eq!(desk.client("x.a"), a3, "nor does its name mean it");
    assert_eq!(desk.remembered().moved, 0);
}

#[test]
fn a_worker_that_is_resumed_has_a_home_of_its_own() {
    // Somebody with its name came meanwhile: who was there before stays there.
    let mut desk = cookie_desk(|_| {});
    let old = desk.called("w");
    assert_eq!(desk.client("one"), old);
    desk.drain(old);
    let new = desk.called("w");
    assert_eq!(desk.client("one"), new);
    desk.resume(old).unwrap();
    assert_eq!(desk.client("one"), new);
    assert_eq!(desk.core.claim(desk.now, old, b"mine"), ClaimOutcome::Noted);
    for _ in 0..3 {
        assert_eq!(desk.client("mine"), old);
        assert_eq!(desk.client("one"), new);
    }

    // It left again, and nothing is remembered of it.
    let mut desk = cookie_desk(|_| {});
    let old = desk.called("w");
    desk.drain(old);
    let new = desk.called("w");
    desk.leave(new, Departure::Disconnected);
    desk.resume(old).unwrap();
    assert_eq!(desk.client("one"), old);
    let third = desk.called("third");
    assert_eq!(desk.client("two"), third);
    assert_eq!((desk.client("one"), desk.client("two")), (old, third));
    desk.leave(old, Departure::Died);
    desk.leave(third, Departure::Died);

    // It left again, and its clients are its predecessor's.
    let mut desk = cookie_desk(|_| {});
    let old = desk.called("w");
    desk.drain(old);
    let new = desk.called("w");
    assert_eq!(desk.client("one"), new);
    desk.leave(new, Departure::Disconnected);
    desk.resume(old).unwrap();
    for _ in 0..3 {
        assert_eq!(desk.client("one"), old);
    }
    let status = desk.remembered();
    assert_eq!((status.hits, status.misses, status.moved), (3, 1, 0));
}

#[test]
fn a_worker_may_claim_a_key() {
    let mut desk = cookie_desk(|_| {});
    let (a, b) = (desk.called("a"), desk.called("b"));
    assert_eq!(desk.core.claim(desk.now, b, b"mine"), ClaimOutcome::Noted);
    for _ in 0..3 {
        assert_eq!(desk.client("mine"), b);
    }
    assert_eq!(desk.core.claim(desk.now, a, b"mine"), ClaimOutcome::Noted, "the later one wins");
    assert_eq!(desk.client("mine"), a);
    assert_eq!(desk.core.claim(desk.now, a, b""), ClaimOutcome::NotAKey);
    desk.goodbye(b);
    assert_eq!(desk.core.claim(desk.now, b, b"mine"), ClaimOutcome::Leaving);
    assert_eq!(desk.client("mine"), a);
    let status = desk.remembered();
    assert_eq!((status.claimed, status.hits, status.misses), (2, 5, 0));

    let mut plain = desk_with(|_| {});
    let worker = plain.worker();
    assert_eq!(plain.core.claim(plain.now, worker, b"mine"), ClaimOutcome::NoAffinity);
}

#[test]
fn a_claim_is_forgotten_like_any_other() {
    let mut desk = cookie_desk(|_| {});
    let (a, b) = (desk.called("a"), desk.called("b"));
    desk.core.claim(desk.now, b, b"mine");
    desk.wait(OTHER - ms(1));
    assert_eq!(desk.client("mine"), b);
    desk.wait(OTHER - ms(1));
    assert_eq!(desk.client("mine"), b, "from its last use");
    desk.wait(OTHER);
    assert_eq!(desk.client("mine"), a, "the one with fewer");
    // And what is too old goes as others come.
    for n in 0..50 {
        desk.client(&n.to_string());
    }
    desk.wait(OTHER);
    assert_eq!(desk.remembered().entries, 51);
    for n in 100..120 {
        desk.client(&n.to_string());
    }
    assert!(desk.remembered().entries < 35, "{:?}", desk.remembered());
    assert_eq!(desk.remembered().evicted, 0);
}

#[test]
fn addresses_need_no_waiting() {
    let key = KeySource::ClientIp { ipv4_prefix: 24, ipv6_prefix: 64 };
    let mut desk = desk_with(|pool| pool.affinity = Some(affinity(key)));
    let workers = [desk.called("a"), desk.called("b"), desk.called("c")];
    let mut seen = HashMap::new();
    for n in 0..60u8 {
        let peer = ClientAddr::Inet(([10, 0, n % 6, n], 5).into());
        let conn = desk.core.accepted(desk.now, Client::new(WEB, peer));
        assert!(!desk.core.awaits_bytes(conn));
        let mut sent = None;
        while let Some(effect) = desk.core.effect() {
            if let Effect::Send { worker, .. } = effect {
                sent = Some(worker);
            }
        }
        assert_eq!(*seen.entry(n % 6).or_insert(sent), sent);
    }
    assert_eq!(desk.loads(&workers), [20, 20, 20]);
    // Clients of a Unix listener have no address.
    desk.core.accepted(desk.now, Client::new(WEB, ClientAddr::Unix));
    assert_eq!(desk.remembered().unknown, 1);
}

#[test]
fn awaiting_counts_as_held_and_ends_in_time() {
    let mut desk = cookie_desk(|_| {});
    let worker = desk.called("a");
    let first = desk.accept(WEB);
    desk.wait(ms(200));
    let second = desk.accept(WEB);
    assert_eq!((desk.core.totals().held, desk.remembered().awaiting), (2, 2));
    assert_eq!(desk.core.snapshot().pools[0].held, 2);
    assert_eq!(desk.core.deadline(), Some(desk.now + ms(300)));
    desk.wait(ms(299));
    assert_eq!(desk.core.totals().held, 2);
    desk.wait(ms(1));
    assert!(!desk.core.awaits_bytes(first) && desk.core.awaits_bytes(second));
    assert_eq!(desk.core.untaken(worker), 1);
    // Too late, and of nobody: ignored.
    desk.say(first, known("late"));
    desk.say(second, known("x"));
    desk.say(second, known("x"));
    assert_eq!(desk.core.untaken(worker), 2);
    let status = desk.remembered();
    assert_eq!((status.timed_out, status.unknown, status.misses, status.awaiting), (1, 1, 1, 0));
}

#[test]
fn only_so_many_are_awaited() {
    let mut desk = cookie_desk(|_| {});
    desk.called("a");
    let conns: Vec<_> = (0..10).map(|_| desk.accept(WEB)).collect();
    let awaited = conns.iter().filter(|&&conn| desk.core.awaits_bytes(conn)).count();
    assert_eq!((awaited, desk.remembered().not_awaited), (8, 2));
    // A client that goes away makes room.
    desk.core.client_gone(desk.now, conns[3]);
    desk.pump();
    assert_eq!(desk.closed(conns[3]), Some(CloseReason::ClientGone));
    let next = desk.accept(WEB);
    assert!(desk.core.awaits_bytes(next));
}

#[test]
fn with_nobody_to_serve_them_the_awaited_wait_on() {
    let mut desk = cookie_desk(|pool| pool.wait_for_worker = ms(2_000));
    let worker = desk.called("a");
    let conn = desk.accept(WEB);
    let silent = desk.accept(WEB);
    desk.leave(worker, Departure::Died);
    desk.say(conn, known("x"));
    assert_eq!((desk.core.totals().held, desk.remembered().awaiting), (2, 1));
    let next = desk.called("b");
    assert_eq!(desk.sends().last(), Some(&(next, false)));
    desk.leave(next, Departure::Died);
    desk.wait(ms(2_000));
    // Its time ran out long before, so it was held; nobody came.
    assert_eq!(desk.closed(silent), Some(CloseReason::NoWorker));
    assert_eq!(desk.closed(conn), Some(CloseReason::NoWorker));
    // Whoever comes now is turned away at once, whatever it has to say.
    let late = desk.accept(WEB);
    assert_eq!(desk.closed(late), Some(CloseReason::NoWorker));
}

#[test]
fn the_awaited_are_turned_away_with_the_others() {
    let mut desk = cookie_desk(|pool| {
        pool.wait_for_worker = ms(100);
        pool.peek.timeout = ms(10_000);
    });
    let worker = desk.called("a");
    let silent = desk.accept(WEB);
    desk.leave(worker, Departure::Died);
    desk.events();
    desk.wait(ms(100));
    assert_eq!(desk.closed(silent), Some(CloseReason::NoWorker));
    assert!(desk.events().contains(&Event::Refusing {
        pool: PoolId(0),
        closed: 1,
        unserved: false
    }));
}

#[test]
fn a_stop_waits_for_the_awaited_until_its_deadline() {
    let mut desk = cookie_desk(|pool| pool.peek.timeout = ms(10_000));
    let worker = desk.called("a");
    let (speaks, silent) = (desk.accept(WEB), desk.accept(WEB));
    let deadline = desk.now + ms(1_000);
    desk.core.stop(desk.now, deadline);
    assert!(!desk.core.stopped());
    desk.say(speaks, known("x"));
    desk.take_all(worker);
    assert!(!desk.core.stopped(), "one is awaited still");
    desk.wait(ms(1_000));
    assert!(desk.core.stopped());
    desk.take_all(worker);
    assert!(desk.is_served(silent), "into the hands of whoever has room");
}

#[test]
fn a_seeded_life_is_as_it_is_remembered() {
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let max_entries = 1 + random.below(30) as u32;
        let mut desk = cookie_desk(|pool| {
            pool.max_connections_per_worker = 4;
            pool.affinity.as_mut().unwrap().max_entries = max_entries;
        });
        let mut workers: Vec<WorkerId> = (0..3).map(|n| desk.called(&format!("w{n}"))).collect();
        // By name, for that is what outlives a worker.
        let mut last: HashMap<u64, usize> = HashMap::new();
        let mut away = 0;
        for _ in 0..400 {
            match random.below(10) {
                0 => {
                    let n = random.below(3) as usize;
                    desk.leave(workers[n], Departure::Died);
                    workers[n] = desk.called(&format!("w{n}"));
                }
                1 | 2 => {
                    let n = random.below(3) as usize;
                    if desk.core.load(workers[n]) > Some(0) {
                        desk.finish(workers[n], 1);
                    }
                }
                _ if desk.loads(&workers).iter().all(|&load| load == 4) => {}
                _ => {
                    let id = random.below(25);
                    let before = last.get(&id).copied();
                    let full = before.map(|n| desk.core.load(workers[n]) == Some(4));
                    let hits = desk.remembered().hits;
                    let got = desk.client(&id.to_string());
                    let n = workers.iter().position(|&worker| worker == got).unwrap();
                    if desk.remembered().hits > hits {
                        assert_eq!((before, full), (Some(n), Some(false)));
                    } else if full == Some(true) && max_entries > 25 {
                        away += 1;
                    } else if before.is_some() {
                        assert!(max_entries < 25, "forgotten for no reason");
                    }
                    last.insert(id, n);
                }
            }
            assert!(desk.remembered().entries <= u64::from(max_entries));
        }
        if max_entries > 25 {
            assert_eq!(desk.remembered().moved, away);
        }
        desk.core.check();
    }
}
