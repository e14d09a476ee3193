//! Goodbyes, deaths, stops.

use super::*;
use dispatch_protocol::scoreboard::slot::want;

#[test]
fn a_goodbye_takes_back_what_is_untaken_and_keeps_the_rest() {
    let mut driver = driver();
    let (leaving, other) = (driver.worker(), driver.worker());
    for _ in 0..4 {
        driver.accept(WEB);
    }
    assert!(driver.take(leaving).is_some());
    driver.turn();
    driver.events();
    driver.goodbye(leaving);
    driver.goodbye(leaving);
    assert_eq!(driver.events(), [Event::Goodbye { worker: leaving, resent: 1, live: 1 }]);
    assert_eq!(driver.state(leaving), State::Draining);
    assert_eq!(driver.loads(&[leaving, other]), [1, 3]);
    driver.accept(WEB);
    assert_eq!(driver.loads(&[leaving, other]), [1, 4]);
    driver.finish(leaving, 1);
    assert_eq!(driver.core.load(leaving), Some(0));
    driver.leave(leaving, Departure::Disconnected);
    assert!(driver.link(leaving).forgotten);
}

#[test]
fn a_death_loses_nothing_untaken() {
    let mut driver = driver();
    let (dead, other) = (driver.worker(), driver.worker());
    let conns: Vec<_> = (0..200).map(|_| driver.accept(WEB)).collect();
    let served = driver.take(dead).unwrap();
    driver.events();
    driver.leave(dead, Departure::Died);
    assert_eq!(
        driver.events(),
        [Event::Gone { worker: dead, why: Departure::Died, resent: 99, live: 1 }]
    );
    assert_eq!(driver.take_all(other), 199);
    assert!(driver.is_served(served) && conns.iter().all(|&conn| driver.is_served(conn)));
    driver.leave(dead, Departure::Died);
}

#[test]
fn a_death_during_a_goodbye_or_a_suspicion_is_one_departure() {
    for suspect in [false, true] {
        let mut driver = driver();
        let (dead, other) = (driver.worker(), driver.worker());
        for _ in 0..6 {
            driver.accept(WEB);
        }
        driver.take_all(other);
        if suspect {
            driver.now = driver.now + ms(1_000);
            driver.core.tick(driver.now);
        } else {
            driver.core.goodbye(driver.now, dead);
        }
        // No outcome is known yet.
        driver.core.leave(driver.now, dead, Departure::Died);
        driver.pump();
        assert_eq!(driver.core.load(other), Some(6));
        assert!(driver.link(dead).forgotten);
    }
}

#[test]
fn a_goodbye_of_a_suspect_takes_the_probe_back() {
    let mut driver = driver();
    let hung = driver.worker();
    driver.accept(WEB);
    driver.wait(ms(1_000));
    assert_eq!(driver.core.wants(hung) & want::TAKEN, want::TAKEN);
    driver.goodbye(hung);
    assert_eq!(driver.core.tickets(hung).count(), 0);
    assert_eq!(driver.core.wants(hung), 0);
    assert_eq!(driver.core.totals().queued, 1);
}

#[test]
fn want_bits_follow_in_flight_and_room() {
    let mut driver = driver_with(|pool| pool.max_connections_per_worker = 1);
    let worker = driver.worker();
    assert_eq!(driver.core.wants(worker), 0);
    driver.accept(WEB);
    assert_eq!(driver.core.wants(worker), want::TAKEN | want::ROOM);
    driver.take_all(worker);
    assert_eq!(driver.core.wants(worker), want::ROOM);
    driver.finish(worker, 1);
    assert_eq!(driver.core.wants(worker), 0);
}

#[test]
fn a_stop_is_complete_once_nothing_is_queued_or_in_flight() {
    let mut driver = driver_with(|pool| pool.max_connections_per_worker = 2);
    let worker = driver.worker();
    for _ in 0..3 {
        driver.accept(WEB);
    }
    assert!(!driver.core.stopped());
    driver.core.stop(driver.now, driver.now + ms(500));
    assert_eq!(driver.core.accepting(WEB), Accepting::Finish);
    assert!(!driver.core.stopped());
    driver.take_all(worker);
    assert!(!driver.core.stopped());
    driver.finish(worker, 1);
    assert_eq!(driver.core.totals().queued, 0, "placed as room appeared");
    driver.take_all(worker);
    assert!(driver.core.stopped());
}

#[test]
fn workers_are_released_as_soon_as_their_own_pool_is_done() {
    let other = PoolSettings { name: "other".to_owned(), processes: 1, ..settings() };
    let second = ListenerSettings { name: "second".to_owned(), pool: PoolId(1), ..listener() };
    let mut driver = Driver::new(vec![settings(), other], vec![listener(), second]);
    let hung = driver.worker();
    let process = ProcessId { pool: PoolId(1), place: 0, start: 1 };
    driver.core.spawned(driver.now, process, true);
    let join = Hello { pool: "other".to_owned(), ..hello() };
    let quick = driver.join_as(join, Some(process)).unwrap();
    driver.accept(WEB);
    driver.accept(ListenerId(1));
    driver.core.stop(driver.now, driver.now + ms(60_000));
    for id in 0..2 {
        driver.core.listener_closed(driver.now, ListenerId(id));
    }
    driver.turn();
    assert_eq!(driver.state(quick), State::Active, "it has not taken what it was sent");
    driver.log.clear();
    driver.take_all(quick);
    assert!(driver.link(quick).forgotten, "released");
    assert!(driver.log.contains(&Effect::EndProcess { process, has_connections: true }));
    let gone = Event::Gone { worker: quick, why: Departure::Released, resent: 0, live: 1 };
    assert_eq!(driver.events(), [gone], "and nothing else follows");
    assert_eq!(driver.state(hung), State::Active);
    assert!(!driver.core.stopped());
    driver.take_all(hung);
    assert!(driver.core.stopped());
}

#[test]
fn at_the_deadline_queued_connections_go_to_free_slots() {
    let mut driver = driver_with(|pool| {
        pool.max_connections_per_worker = 1;
        pool.max_untaken = 2;
    });
    let worker = driver.worker();
    let conns: Vec<_> = (0..4).map(|_| driver.accept(WEB)).collect();
    assert_eq!(driver.core.totals().queued, 3);
    driver.core.stop(driver.now, driver.now + ms(500));
    assert_eq!(driver.core.deadline(), Some(driver.now + ms(500)));
    driver.wait(ms(500));
    assert!(driver.core.stopped());
    assert_eq!(driver.core.totals().in_flight, 2);
    assert_eq!(driver.closed(conns[2]), Some(CloseReason::Shutdown));
    assert_eq!(driver.closed(conns[3]), Some(CloseReason::Shutdown));
    assert_eq!(driver.core.deadline(), None, "nothing times out any more");
    // What fails to be sent now, or comes back, is not queued either.
    driver.leave(worker, Departure::Died);
    assert_eq!(driver.core.totals().queued, 0);
    assert_eq!(driver.closed(conns[0]), Some(CloseReason::Shutdown));
    assert_eq!(driver.open_copies(), 0);
}

#[test]
fn at_the_deadline_even_a_suspect_will_do() {
    let mut driver = driver();
    let hung = driver.worker();
    driver.accept(WEB);
    driver.wait(ms(1_000));
    driver.core.stop(driver.now, driver.now);
    driver.turn();
    assert_eq!(driver.core.totals().in_flight, 1);
    assert_eq!(driver.take_all(hung), 1);
}

#[test]
fn the_status_has_all_values() {
    let mut driver = driver();
    let first = driver.worker();
    let second = driver.worker();
    driver.accept(WEB);
    driver.take_all(first);
    driver.accept(WEB);
    let status = driver.core.snapshot();
    assert_eq!((status.totals.accepted, status.totals.taken, status.totals.in_flight), (2, 1, 1));
    assert!(status.totals.closed.iter().all(|&count| count == 0));
    assert_eq!(status.listeners[0].accepted, 2);
    assert_eq!(status.listeners[0].address, "0.0.0.0:80");
    let pool = &status.pools[0];
    assert_eq!((pool.state, pool.policy), (PoolState::Ready, Policy::LeastConnections));
    let ids: Vec<u64> = pool.workers.iter().map(|worker| worker.id.serial).collect();
    assert_eq!(ids, [first.serial, second.serial]);
    assert_eq!((pool.workers[0].taken, pool.workers[0].load), (1, 1));
    assert_eq!((pool.workers[1].sent, pool.workers[1].in_flight), (1, 1));
    driver.leave(first, Departure::Died);
    assert_eq!(driver.core.snapshot().pools[0].workers.len(), 1);
}
