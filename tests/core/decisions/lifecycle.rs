//! Goodbyes, deaths, stops.

use super::*;
use dispatch_protocol::scoreboard::slot::want;

#[test]
fn a_goodbye_takes_back_what_is_untaken_and_keeps_the_rest() {
    let mut desk = desk();
    let (leaving, other) = (desk.worker(), desk.worker());
    for _ in 0..4 {
        desk.accept(WEB);
    }
    assert!(desk.take(leaving).is_some());
    desk.turn();
    desk.events();
    desk.goodbye(leaving);
    desk.goodbye(leaving);
    assert_eq!(desk.events(), [Event::Goodbye { worker: leaving, resent: 1, live: 1 }]);
    assert_eq!(desk.state(leaving), State::Draining);
    assert_eq!(desk.loads(&[leaving, other]), [1, 3]);
    desk.accept(WEB);
    assert_eq!(desk.loads(&[leaving, other]), [1, 4]);
    desk.finish(leaving, 1);
    assert_eq!(desk.core.load(leaving), Some(0));
    desk.leave(leaving, Departure::Disconnected);
    assert!(desk.link(leaving).forgotten);
}

#[test]
fn a_death_loses_nothing_untaken() {
    let mut desk = desk();
    let (dead, other) = (desk.worker(), desk.worker());
    let conns: Vec<_> = (0..200).map(|_| desk.accept(WEB)).collect();
    let served = desk.take(dead).unwrap();
    desk.events();
    desk.leave(dead, Departure::Died);
    assert_eq!(
        desk.events(),
        [Event::Gone { worker: dead, why: Departure::Died, resent: 99, live: 1 }]
    );
    assert_eq!(desk.take_all(other), 199);
    assert!(desk.is_served(served) && conns.iter().all(|&conn| desk.is_served(conn)));
    desk.leave(dead, Departure::Died);
}

#[test]
fn a_death_during_a_goodbye_or_a_suspicion_is_one_departure() {
    for suspect in [false, true] {
        let mut desk = desk();
        let (dead, other) = (desk.worker(), desk.worker());
        for _ in 0..6 {
            desk.accept(WEB);
        }
        desk.take_all(other);
        if suspect {
            desk.now = desk.now + ms(1_000);
            desk.core.tick(desk.now);
        } else {
            desk.core.goodbye(desk.now, dead);
        }
        // No outcome is known yet.
        desk.core.leave(desk.now, dead, Departure::Died);
        desk.pump();
        assert_eq!(desk.core.load(other), Some(6));
        assert!(desk.link(dead).forgotten);
    }
}

#[test]
fn a_goodbye_of_a_suspect_takes_the_probe_back() {
    let mut desk = desk();
    let hung = desk.worker();
    desk.accept(WEB);
    desk.wait(ms(1_000));
    assert_eq!(desk.core.wants(hung) & want::TAKEN, want::TAKEN);
    desk.goodbye(hung);
    assert_eq!(desk.core.tickets(hung).count(), 0);
    assert_eq!(desk.core.wants(hung), 0);
    assert_eq!(desk.core.totals().held, 1);
}

#[test]
fn want_bits_follow_custody_and_room() {
    let mut desk = desk_with(|pool| pool.max_connections_per_worker = 1);
    let worker = desk.worker();
    assert_eq!(desk.core.wants(worker), 0);
    desk.accept(WEB);
    assert_eq!(desk.core.wants(worker), want::TAKEN | want::ROOM);
    desk.take_all(worker);
    assert_eq!(desk.core.wants(worker), want::ROOM);
    desk.finish(worker, 1);
    assert_eq!(desk.core.wants(worker), 0);
}

#[test]
fn a_stop_is_complete_once_nothing_is_held_or_in_custody() {
    let mut desk = desk_with(|pool| pool.max_connections_per_worker = 2);
    let worker = desk.worker();
    for _ in 0..3 {
        desk.accept(WEB);
    }
    assert!(!desk.core.stopped());
    desk.core.stop(desk.now, desk.now + ms(500));
    assert_eq!(desk.core.accepting(WEB), Accepting::Finish);
    assert!(!desk.core.stopped());
    desk.take_all(worker);
    assert!(!desk.core.stopped());
    desk.finish(worker, 1);
    assert_eq!(desk.core.totals().held, 0, "placed as room appeared");
    desk.take_all(worker);
    assert!(desk.core.stopped());
}

#[test]
fn workers_are_released_as_soon_as_their_own_pool_is_done() {
    let other = PoolSettings { name: "other".to_owned(), processes: 1, ..settings() };
    let second = ListenerSettings { name: "second".to_owned(), pool: PoolId(1), ..listener() };
    let mut desk = Desk::new(vec![settings(), other], vec![listener(), second]);
    let hung = desk.worker();
    let process = ProcessId { pool: PoolId(1), number: 0 };
    desk.core.spawned(desk.now, process, true);
    let join = Hello { pool: "other".to_owned(), ..hello() };
    let quick = desk.join_as(join, Some(process)).unwrap();
    desk.accept(WEB);
    desk.accept(ListenerId(1));
    desk.core.stop(desk.now, desk.now + ms(60_000));
    for id in 0..2 {
        desk.core.listener_closed(desk.now, ListenerId(id));
    }
    desk.turn();
    assert_eq!(desk.state(quick), State::Active, "it has not taken what it was sent");
    desk.log.clear();
    desk.take_all(quick);
    assert!(desk.link(quick).forgotten, "released");
    assert!(desk.log.contains(&Effect::StopProcesses { pool: PoolId(1) }));
    let gone = Event::Gone { worker: quick, why: Departure::Released, resent: 0, live: 1 };
    assert_eq!(desk.events(), [gone], "and nobody misses it");
    assert_eq!(desk.state(hung), State::Active);
    assert!(!desk.core.stopped());
    desk.take_all(hung);
    assert!(desk.core.stopped());
}

#[test]
fn at_the_deadline_what_is_held_goes_wherever_a_slot_is_free() {
    let mut desk = desk_with(|pool| {
        pool.max_connections_per_worker = 1;
        pool.max_untaken = 2;
    });
    let worker = desk.worker();
    let conns: Vec<_> = (0..4).map(|_| desk.accept(WEB)).collect();
    assert_eq!(desk.core.totals().held, 3);
    desk.core.stop(desk.now, desk.now + ms(500));
    assert_eq!(desk.core.deadline(), Some(desk.now + ms(500)));
    desk.wait(ms(500));
    assert!(desk.core.stopped());
    assert_eq!(desk.core.totals().custody, 2);
    assert_eq!(desk.closed(conns[2]), Some(CloseReason::Shutdown));
    assert_eq!(desk.closed(conns[3]), Some(CloseReason::Shutdown));
    assert_eq!(desk.core.deadline(), None, "nothing times out any more");
    // What fails to be sent now, or comes back, is not held either.
    desk.leave(worker, Departure::Died);
    assert_eq!(desk.core.totals().held, 0);
    assert_eq!(desk.closed(conns[0]), Some(CloseReason::Shutdown));
    assert_eq!(desk.open_copies(), 0);
}

#[test]
fn at_the_deadline_even_a_suspect_will_do() {
    let mut desk = desk();
    let hung = desk.worker();
    desk.accept(WEB);
    desk.wait(ms(1_000));
    desk.core.stop(desk.now, desk.now);
    desk.turn();
    assert_eq!(desk.core.totals().custody, 1);
    assert_eq!(desk.take_all(hung), 1);
}

#[test]
fn the_status_tells_it_all() {
    let mut desk = desk();
    let first = desk.worker();
    let second = desk.worker();
    desk.accept(WEB);
    desk.take_all(first);
    desk.accept(WEB);
    let status = desk.core.snapshot();
    assert_eq!((status.totals.accepted, status.totals.taken, status.totals.custody), (2, 1, 1));
    assert!(status.totals.closed.iter().all(|&count| count == 0));
    assert_eq!(status.listeners[0].accepted, 2);
    assert_eq!(status.listeners[0].address, "0.0.0.0:80");
    let pool = &status.pools[0];
    assert_eq!((pool.state, pool.policy), (PoolState::Ready, Policy::LeastConnections));
    let ids: Vec<u64> = pool.workers.iter().map(|worker| worker.id.serial).collect();
    assert_eq!(ids, [first.serial, second.serial]);
    assert_eq!((pool.workers[0].taken, pool.workers[0].load), (1, 1));
    assert_eq!((pool.workers[1].sent, pool.workers[1].custody), (1, 1));
    desk.leave(first, Departure::Died);
    assert_eq!(desk.core.snapshot().pools[0].workers.len(), 1);
}
