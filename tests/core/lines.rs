//! Workers of the line protocol in the simulator; single decisions about them.

use std::time::Duration;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::line::Report;
use dispatcher_core::*;
use simulator::lines;

/// Each seed is a run of its own; a failure names it.
#[test]
fn loads_are_exact_and_nothing_is_lost_or_served_twice() {
    let (mut accepted, mut used, mut returned, mut unread) = (0, 0, 0, 0);
    for seed in 1..=400 {
        let run = std::panic::catch_unwind(|| lines::run(seed, 400));
        let outcome = run.unwrap_or_else(|_| panic!("seed {seed}"));
        assert!(outcome.totals.is_conserved(), "seed {seed}");
        accepted += outcome.totals.accepted;
        used += outcome.used;
        returned += outcome.totals.returned;
        unread += outcome.totals.closed[CloseReason::Unread as usize];
    }
    // The runs have covered what they are for.
    assert!(accepted > 10_000 && returned > 100 && unread > 10, "{accepted} {returned} {unread}");
    assert!(used > accepted / 2, "{used} of {accepted}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    assert_eq!(lines::run(7, 500), lines::run(7, 500));
}

const NOW: Time = Time(1_000_000_000);

fn core() -> Core {
    let pool = PoolSettings {
        name: "web".to_owned(),
        access: AllowedAccounts { users: vec![0], groups: vec![] },
        ..PoolSettings::default()
    };
    let listener =
        ListenerSettings { name: "http".to_owned(), address: String::new(), pool: PoolId(0) };
    Core::new(vec![pool], vec![listener], NOW)
}

fn join(core: &mut Core, kind: &str, count: u64) -> Result<WorkerId, Refusal> {
    let report = Report { count, kind: kind.to_owned(), ..Report::default() };
    let join = LineJoin { pid: 5, uid: 0, gids: vec![0], pool: "web".to_owned(), report };
    core.join_line(NOW, &join)
}

fn name(core: &Core, worker: WorkerId) -> String {
    core.worker_name(worker).to_owned()
}

/// Accepts a client; returns the worker it goes to, and sends it there.
fn accept(core: &mut Core, cookie: u64) -> Option<(WorkerId, ConnId)> {
    core.accepted(NOW, Client::new(ListenerId(0), ClientAddr::Unix));
    let mut sent = None;
    while let Some(effect) = core.effect() {
        if let Effect::Send { worker, conn, ticket, .. } = effect {
            core.line_sent(NOW, worker, ticket, Some(cookie));
            sent = Some((worker, conn));
        }
    }
    sent
}

#[test]
fn names_have_the_type_and_the_smallest_free_number() {
    let mut core = core();
    let one = join(&mut core, "chat room/x", 0).unwrap();
    let two = join(&mut core, "chat room/x", 0).unwrap();
    let other = join(&mut core, "", 0).unwrap();
    assert_eq!(name(&core, one), "chat_room_x-1");
    assert_eq!(name(&core, two), "chat_room_x-2");
    assert_eq!(name(&core, other), "line-1");
    core.leave(NOW, one, Departure::Died);
    while core.effect().is_some() {}
    let again = join(&mut core, "chat room/x", 0).unwrap();
    assert_eq!(name(&core, again), "chat_room_x-1", "its successor has its name");
    let long = join(&mut core, &"ä".repeat(32), 0).unwrap();
    assert!(name(&core, long).len() <= 64);
}

#[test]
fn the_rules_for_joining_are_those_of_all_workers() {
    let mut core = core();
    let report = Report { count: 0, ..Report::default() };
    let mut request = LineJoin { pid: 5, uid: 7, gids: vec![7], pool: "web".to_owned(), report };
    let refusal = core.join_line(NOW, &request).unwrap_err();
    assert_eq!(refusal.key.as_deref(), Some("pool.web.allow_users"));
    request.pool = "none".to_owned();
    assert!(core.join_line(NOW, &request).unwrap_err().reason.contains("no pool `none`"));
}

#[test]
fn an_impossible_count_is_clamped_and_told_once() {
    let mut core = core();
    let worker = join(&mut core, "", u64::MAX).unwrap();
    assert_eq!(core.load(worker), Some(10_000_000));
    let report = Report { count: u64::MAX, ..Report::default() };
    core.line_report(NOW, worker, report);
    let mut told = 0;
    while let Some(effect) = core.effect() {
        told += u32::from(matches!(effect, Effect::Event(Event::Clamped { what: "count", .. })));
    }
    assert_eq!(told, 1);
}

#[test]
fn a_worker_at_its_maximum_gets_nothing_until_one_has_ended() {
    let mut core = core();
    let settings = PoolSettings {
        max_connections_per_worker: 2,
        ..core.pool_settings(PoolId(0)).unwrap().clone()
    };
    core.change_pool(NOW, PoolId(0), settings, 1);
    join(&mut core, "", 1).unwrap();
    assert!(accept(&mut core, 10).is_some());
    assert!(accept(&mut core, 11).is_none(), "two with the foreign one");
    core.sockets_ended(NOW, &[99]);
    assert_eq!(core.totals().queued, 1, "another socket has ended");
    core.sockets_ended(NOW, &[10]);
    assert_eq!((core.totals().queued, core.totals().in_flight), (0, 1), "the next one goes");
}

#[test]
fn unread_connections_bound_what_a_worker_gets() {
    let mut core = core();
    let settings =
        PoolSettings { max_untaken: 2, ..core.pool_settings(PoolId(0)).unwrap().clone() };
    core.change_pool(NOW, PoolId(0), settings, 1);
    let worker = join(&mut core, "", 0).unwrap();
    let (_, first) = accept(&mut core, 1).unwrap();
    accept(&mut core, 2).unwrap();
    assert!(accept(&mut core, 3).is_none(), "it has read none of two");
    core.line_read(NOW, worker, first);
    assert_eq!(core.totals().in_flight, 1, "room for the one that waits");
    core.line_read(NOW, worker, first);
    core.check();
}

#[test]
fn what_a_lost_worker_had_not_read_waits_for_the_next_one() {
    let mut core = core();
    let worker = join(&mut core, "a", 0).unwrap();
    let (_, untouched) = accept(&mut core, 1).unwrap();
    let (_, unknown) = accept(&mut core, 2).unwrap();
    let (_, read) = accept(&mut core, 3).unwrap();
    core.leave(NOW, worker, Departure::Died);
    assert_eq!(core.line_departure(worker), Some(Departure::Died));
    core.recovered(NOW, worker, untouched, Recovery::Untouched);
    core.recovered(NOW, worker, unknown, Recovery::Unknown);
    core.recovered(NOW, worker, read, Recovery::Read);
    // A second answer changes nothing.
    core.recovered(NOW, worker, unknown, Recovery::Untouched);
    let totals = core.totals();
    assert_eq!((totals.taken, totals.returned, totals.queued), (3, 2, 1));
    assert_eq!(totals.closed[CloseReason::Unread as usize], 1);
    while core.effect().is_some() {}
    let next = join(&mut core, "b", 0).unwrap();
    let sent = std::iter::from_fn(|| core.effect()).find_map(|effect| match effect {
        Effect::Send { worker, conn, .. } => Some((worker, conn)),
        _ => None,
    });
    assert_eq!(sent, Some((next, untouched)));
    // The end of its socket is told for the new worker, although the old one had it first.
    core.check();
}

#[test]
fn a_stop_waits_for_what_may_come_back_from_a_worker_that_has_left() {
    let mut core = core();
    let worker = join(&mut core, "a", 0).unwrap();
    let (_, first) = accept(&mut core, 1).unwrap();
    let (_, second) = accept(&mut core, 2).unwrap();
    core.leave(NOW, worker, Departure::Died);
    core.stop(NOW, NOW + Duration::from_secs(10));
    core.listener_closed(NOW, ListenerId(0));
    core.tick(NOW);
    assert!(!core.stopped());
    core.recovered(NOW, worker, first, Recovery::Read);
    core.tick(NOW);
    assert!(!core.stopped(), "the second one may come back");
    core.recovered(NOW, worker, second, Recovery::Untouched);
    while core.effect().is_some() {}
    assert!(!core.stopped(), "it has come back");
    let next = join(&mut core, "b", 0).expect("a pool with clients is not released");
    while let Some(effect) = core.effect() {
        if let Effect::Send { worker, ticket, .. } = effect {
            core.line_sent(NOW, worker, ticket, Some(3));
        }
    }
    // What is in the socket of a worker that stays is read by that worker.
    assert!(core.stopped());
    core.tick(NOW);
    assert_eq!(core.line_departure(next), Some(Departure::Released));
    core.recovered(NOW, next, second, Recovery::Read);
    assert!(core.stopped());
    core.check();
}

#[test]
fn a_stop_ends_at_its_deadline_without_a_word_about_a_worker_that_has_left() {
    let mut core = core();
    let worker = join(&mut core, "a", 0).unwrap();
    accept(&mut core, 1).unwrap();
    core.leave(NOW, worker, Departure::Died);
    let deadline = NOW + Duration::from_secs(10);
    core.stop(NOW, deadline);
    assert!(!core.stopped());
    core.tick(deadline);
    assert!(core.stopped());
}

#[test]
fn a_list_of_open_sockets_ends_those_that_are_missing() {
    let mut core = core();
    let worker = join(&mut core, "", 0).unwrap();
    for cookie in 1..=3 {
        let (_, conn) = accept(&mut core, cookie).unwrap();
        core.line_read(NOW, worker, conn);
    }
    let later = NOW + Duration::from_secs(1);
    core.sockets_alive(later, later, &[2].into());
    assert_eq!((core.load(worker), core.tracked_sockets()), (Some(1), 1));
    // A list that began before the connection was sent says nothing about it.
    core.sockets_alive(later, NOW, &[].into());
    assert_eq!(core.load(worker), Some(1));
}

#[test]
fn a_worker_that_left_before_a_send_was_carried_out_is_forgotten() {
    let mut core = core();
    let worker = join(&mut core, "a", 0).unwrap();
    core.accepted(NOW, Client::new(ListenerId(0), ClientAddr::Unix));
    core.leave(NOW, worker, Departure::Expelled("it broke the protocol"));
    let (mut sent, mut forgotten) = (None, false);
    while let Some(effect) = core.effect() {
        match effect {
            // The stream was still open.
            Effect::Send { worker, conn, ticket, .. } => {
                core.line_sent(NOW, worker, ticket, Some(1));
                sent = Some(conn);
            }
            Effect::Forget { worker: gone } => forgotten = gone == worker,
            _ => {}
        }
    }
    assert!(forgotten, "what was in its stream is looked at");
    core.recovered(NOW, worker, sent.unwrap(), Recovery::Untouched);
    assert_eq!(core.totals().queued, 1);
    core.check();
}

#[test]
fn a_worker_that_joins_a_draining_host_gets_no_clients() {
    let mut core = core();
    join(&mut core, "a", 0).unwrap();
    core.drain_host(NOW, Duration::ZERO, None);
    while core.effect().is_some() {}
    join(&mut core, "b", 0).unwrap();
    assert_eq!(accept(&mut core, 1), None);
    core.check();
}

#[test]
fn a_burst_between_two_reports_does_not_change_the_number_of_other_connections() {
    let mut core = core();
    let worker = join(&mut core, "a", 1000).unwrap();
    for cookie in 0..100 {
        let (_, conn) = accept(&mut core, cookie).unwrap();
        core.line_read(NOW, worker, conn);
        core.sockets_ended(NOW, &[cookie]);
        while core.effect().is_some() {}
    }
    let load = |core: &Core| core.load(worker).unwrap();
    for count in [1000, 1000] {
        core.line_report(NOW, worker, Report { count, ..Report::default() });
        assert_eq!(load(&core), 1000);
    }
    // Some of the others have ended, and later some more have come.
    for count in [900, 950] {
        core.line_report(NOW, worker, Report { count, ..Report::default() });
        assert_eq!(load(&core), count);
    }
    core.check();
}

#[test]
fn a_worker_of_a_removed_pool_is_cut_once_it_has_read_everything() {
    let mut core = core();
    let worker = join(&mut core, "a", 0).unwrap();
    let (_, conn) = accept(&mut core, 1).unwrap();
    core.retire_listener(ListenerId(0));
    core.retire_pool(NOW, PoolId(0));
    core.listener_closed(NOW, ListenerId(0));
    let cut = |core: &mut Core| {
        let effects: Vec<Effect> = std::iter::from_fn(|| core.effect()).collect();
        effects.iter().any(|effect| matches!(effect, Effect::Disconnect { .. }))
    };
    assert!(!cut(&mut core), "it has not read its connection");
    core.line_read(NOW, worker, conn);
    core.tick(NOW);
    assert!(cut(&mut core));
    core.check();
}
