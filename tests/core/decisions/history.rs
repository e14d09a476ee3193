//! Recorded decisions, and the explanation of the next one.

use std::sync::Arc;

use dispatch_protocol::ClientAddr;
use proptest::prelude::*;

use super::policies::{client, driver_of};
use super::*;

fn driver_with_history(size: u32, candidates: u32) -> Driver {
    driver_with(|pool| {
        pool.history = size;
        pool.history_candidates = candidates;
    })
}

#[test]
fn nothing_is_recorded_by_default() {
    let mut driver = driver();
    driver.worker();
    driver.next_from(ClientAddr::Unix);
    assert_eq!(driver.core.history(PoolId(0), 0), []);
    assert_eq!(driver.core.history(PoolId(7), 0), []);
}

#[test]
fn a_decision_has_time_client_workers_and_reasons() {
    let mut driver = driver_with_history(10, 16);
    let small = driver.trusted(Hello { name: "small".to_owned(), max_connections: 1, ..hello() });
    let large = driver.trusted(Hello { name: "large".to_owned(), weight: 2, ..hello() });
    let lazy = driver.trusted(Hello { name: "lazy".to_owned(), base: 3, ..hello() });
    for n in 0..4 {
        driver.next_from(client(n));
    }
    driver.goodbye(lazy);
    driver.next_from(client(4));
    let decisions = driver.core.history(PoolId(0), 0);
    assert_eq!(decisions.len(), 5);
    let first = &decisions[0];
    assert_eq!((first.number, first.conn, first.at), (1, Some(1), driver.now));
    assert_eq!((first.listener, first.peer, first.key), (Some(WEB), client(0), None));
    assert_eq!((first.chosen, first.resent, first.left_out), (Some(large.serial), false, 0));
    let seen = |decision: &Decision| -> Vec<(u64, u64, Option<f64>, Why)> {
        decision.candidates.iter().map(|c| (c.worker, c.load, c.score, c.why)).collect()
    };
    let (small, large, lazy) = (small.serial, large.serial, lazy.serial);
    assert_eq!(
        seen(first),
        [
            (large, 0, Some(0.5), Why::Chosen),
            (small, 0, Some(1.0), Why::MoreLoaded),
            (lazy, 3, Some(4.0), Why::MoreLoaded)
        ]
    );
    // In the second decision the first two are tied.
    assert_eq!(seen(&decisions[1])[0].3, Why::Chosen);
    assert_eq!(seen(&decisions[1])[1].3, Why::Tie);
    assert_eq!(
        seen(&decisions[4]),
        [
            (large, 3, Some(2.0), Why::Chosen),
            (small, 1, None, Why::Full),
            (lazy, 3, None, Why::Draining)
        ]
    );
    assert_eq!(&*decisions[0].candidates[0].name, "large");
    assert_eq!(decisions[0].candidates[0].weight, 2.0);
}

#[test]
fn a_decision_says_why_a_worker_was_ineligible() {
    let mut driver = driver_with(|pool| {
        pool.history = 10;
        pool.max_untaken = 1;
    });
    let [idle, suspect, blocked, starved] = [(); 4].map(|()| driver.worker());
    driver.link(blocked).capacity = 0;
    for _ in 0..4 {
        driver.accept(WEB);
    }
    // The connection that could not be sent to the blocked worker waits for a slot.
    driver.lose(starved);
    driver.take_all(idle);
    driver.take_all(idle);
    driver.accept(WEB);
    let why = |driver: &Driver| -> Vec<(u64, Why)> {
        let explained = driver.core.explain(driver.now, PoolId(0), ClientAddr::Unix).unwrap();
        let mut list: Vec<_> =
            explained.decision.candidates.iter().map(|c| (c.worker, c.why)).collect();
        list.sort_by_key(|(worker, _)| *worker);
        list
    };
    assert_eq!(
        why(&driver),
        [
            (idle.serial, Why::NoSlot),
            (suspect.serial, Why::NoSlot),
            (blocked.serial, Why::ChannelFull),
            (starved.serial, Why::LostOne)
        ]
    );
    driver.take_all(idle);
    driver.wait(ms(999));
    driver.take_all(idle);
    driver.wait(ms(1));
    assert_eq!(why(&driver)[1], (suspect.serial, Why::Suspect));
}

/// docs/LOAD_BALANCING.md says 128 bytes.
#[test]
fn a_worker_in_a_decision_takes_128_bytes() {
    assert_eq!(size_of::<CandidateSnapshot>(), 128);
}

#[test]
fn a_decision_marks_a_worker_without_trust() {
    let mut driver = driver();
    let new = driver.join(hello()).unwrap();
    let other = driver.trusted(Hello { base: 5, ..hello() });
    let explained = driver.core.explain(driver.now, PoolId(0), ClientAddr::Unix).unwrap();
    let why = |worker: WorkerId| {
        let mut candidates = explained.decision.candidates.iter();
        candidates.find(|c| c.worker == worker.serial).map(|c| c.why.name())
    };
    assert_eq!((why(new), why(other)), (Some("unproven"), Some("chosen")));
}

#[test]
fn only_the_last_are_kept_and_only_some_workers_of_each() {
    let mut driver = driver_with_history(3, 2);
    for _ in 0..5 {
        driver.worker();
    }
    for n in 0..10 {
        driver.next_from(client(n));
    }
    let decisions = driver.core.history(PoolId(0), 0);
    assert_eq!(decisions.iter().map(|d| d.number).collect::<Vec<_>>(), [8, 9, 10]);
    for decision in &decisions {
        assert_eq!((decision.candidates.len(), decision.left_out), (2, 3));
        assert_eq!(decision.candidates[0].why, Why::Chosen);
        assert_eq!(Some(decision.candidates[0].worker), decision.chosen);
    }
    let later = driver.core.history(PoolId(0), 9);
    assert_eq!(later.iter().map(|d| d.number).collect::<Vec<_>>(), [10]);
    // A reader keeps the entries that it has read; the next decisions use other entries.
    let read = Arc::clone(&decisions[0]);
    for n in 0..10 {
        driver.next_from(client(n));
    }
    assert_eq!(read.number, 8);
    assert_eq!(driver.core.history(PoolId(0), 0)[0].number, 18);
}

#[test]
fn a_resent_connection_is_marked() {
    let mut driver = driver_with_history(10, 16);
    let first = driver.worker();
    driver.accept(WEB);
    let second = driver.worker();
    driver.leave(first, Departure::Died);
    let decisions = driver.core.history(PoolId(0), 0);
    assert_eq!(decisions.len(), 2);
    assert_eq!(decisions[0].conn, decisions[1].conn);
    assert_eq!((decisions[1].resent, decisions[1].chosen), (true, Some(second.serial)));
}

#[test]
fn an_explanation_names_the_obstacle() {
    let mut driver = driver();
    let obstacle = |driver: &Driver| {
        driver.core.explain(driver.now, PoolId(0), ClientAddr::Unix).unwrap().obstacle
    };
    assert_eq!(obstacle(&driver), Some(Obstacle::NoWorker));
    driver.wait(ms(5_000));
    assert_eq!(obstacle(&driver), Some(Obstacle::Refusing));
    let worker = driver.trusted(Hello { max_connections: 1, ..hello() });
    assert_eq!(obstacle(&driver), None);
    driver.accept(WEB);
    assert_eq!(obstacle(&driver), Some(Obstacle::BackPressure));
    driver.take_all(worker);
    driver.finish(worker, 1);
    driver.scarcity = 1;
    driver.accept(WEB);
    assert_eq!(obstacle(&driver), Some(Obstacle::Short));
    driver.core.stop(driver.now, driver.now + ms(1));
    assert_eq!(obstacle(&driver), Some(Obstacle::Stopping));
    assert_eq!(driver.core.explain(driver.now, PoolId(9), ClientAddr::Unix), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn explained_is_done(
        policy in prop::sample::select(&Policy::ALL[..]),
        seed in any::<u64>(),
        weights in prop::collection::vec((1u16..9, 0u16..3), 1..9),
        steps in prop::collection::vec((0u32..20, 0usize..9, 0u64..3), 1..60),
    ) {
        let mut driver = driver_of(policy);
        driver.core.set_seed(seed);
        for (n, &(weight, priority)) in weights.iter().enumerate() {
            let name = format!("w{n}");
            driver.trusted(Hello { weight, priority, name, max_connections: 12, ..hello() });
        }
        for (from, worker_at, ended) in steps {
            let ended = ended.min(driver.core.load(driver.links[worker_at % weights.len()].id).unwrap());
            let worker = driver.links[worker_at % weights.len()].id;
            driver.finish(worker, ended);
            let explained = driver.core.explain(driver.now, PoolId(0), client(from)).unwrap();
            let again = driver.core.explain(driver.now, PoolId(0), client(from)).unwrap();
            prop_assert_eq!(&explained, &again, "asking changes nothing");
            prop_assert_eq!(explained.decision.candidates.len(), weights.len());
            if driver.core.accepting(WEB) == Accepting::Pause {
                prop_assert_eq!(explained.obstacle, Some(Obstacle::BackPressure));
                prop_assert_eq!(explained.decision.chosen, None);
                continue;
            }
            prop_assert_eq!(explained.obstacle, None);
            let worker = driver.next_from(client(from));
            prop_assert_eq!(explained.decision.chosen, Some(worker.serial));
            let first = &explained.decision.candidates[0];
            prop_assert_eq!((first.worker, first.why), (worker.serial, Why::Chosen));
            let chosen = explained.decision.candidates.iter().filter(|c| c.why == Why::Chosen);
            prop_assert_eq!(chosen.count(), 1);
        }
    }
}
