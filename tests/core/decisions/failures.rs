//! Hangs, lost descriptors, full channels, shortages, hostile slots.

use super::*;
use dispatch_protocol::scoreboard::slot::{self, Revoke, SlotState};

#[test]
fn untaken_connections_of_a_hung_worker_move() {
    let mut driver = driver();
    let (hung, other) = (driver.worker(), driver.worker());
    for _ in 0..10 {
        driver.accept(WEB);
    }
    driver.take_all(other);
    driver.wait(ms(999));
    assert_eq!(driver.state(hung), State::Active);
    assert_eq!(driver.core.deadline(), Some(driver.now + ms(1)));
    driver.log.clear();
    driver.wait(ms(1));
    assert_eq!(driver.state(hung), State::Suspect);
    assert_eq!(driver.loads(&[hung, other]), [0, 10]);
    let log = driver.log.clone();
    let revokes = log.iter().take_while(|effect| matches!(effect, Effect::Revoke { .. })).count();
    assert_eq!(revokes, 5);
    assert!(log.contains(&Effect::Purge { worker: hung }), "nothing is left for it to take");
    assert!(log.contains(&Effect::Event(Event::Suspect {
        worker: hung,
        revoked: 5,
        waited: ms(1_000)
    })));
    assert!(driver.sends().iter().all(|&send| send == (other, true)));
}

#[test]
fn the_only_worker_keeps_its_connections_when_suspect() {
    let mut driver = driver();
    let slow = driver.worker();
    let conns: Vec<_> = (0..3).map(|_| driver.accept(WEB)).collect();
    driver.wait(ms(1_000));
    assert_eq!(driver.state(slow), State::Suspect);
    assert_eq!(driver.core.totals().in_flight, 3, "there is no better place");
    let late = driver.accept(WEB);
    assert_eq!(
        driver.core.totals().in_flight,
        4,
        "suspects are used when no trusted worker has room"
    );
    driver.events();
    assert_eq!(driver.take_all(slow), 4);
    assert_eq!(driver.events(), [Event::Trusted { worker: slow, after: ms(0) }]);
    assert!(conns.iter().chain([&late]).all(|&conn| driver.is_served(conn)));
    assert_eq!(driver.core.snapshot().pools[0].revoked, 0);
}

#[test]
fn a_take_that_wins_the_race_with_the_revocation_stands() {
    let mut driver = driver();
    let (slow, other) = (driver.worker(), driver.worker());
    let conn = driver.accept(WEB);
    let ticket = driver.core.tickets(slow).next().unwrap();
    driver.now = driver.now + ms(1_000);
    driver.core.tick(driver.now);
    // Between the decision and its execution:
    assert_eq!(driver.take(slow), Some(conn));
    driver.pump();
    assert_eq!(driver.loads(&[slow, other]), [1, 0]);
    assert_eq!(driver.core.totals().taken, 1);
    assert!(driver.log.contains(&Effect::Release { worker: slow, conn, ticket }));
    assert_eq!(driver.state(slow), State::Active, "it has taken one");
}

#[test]
fn a_probe_that_cannot_be_sent_is_tried_again() {
    let mut driver = driver();
    let (hung, other) = (driver.worker(), driver.worker());
    driver.accept(WEB);
    driver.link(hung).capacity = 0;
    driver.wait(ms(1_000));
    assert_eq!(driver.take_all(other), 1);
    assert_eq!(driver.core.deadline(), Some(driver.now + ms(1_000)));
    driver.link(hung).capacity = 8;
    driver.wait(ms(1_000));
    assert!(driver.answer(hung));
}

#[test]
fn a_lost_connection_moves_and_its_worker_gets_a_pause() {
    let mut driver = driver();
    let (short, other) = (driver.worker(), driver.worker());
    driver.accept(WEB);
    assert!(driver.lose(short));
    driver.log.clear();
    driver.turn();
    assert!(driver.log.contains(&Effect::Event(Event::Lost { worker: short })));
    assert_eq!(driver.sends(), [(other, true)]);
    for _ in 0..5 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[short, other]), [0, 6]);
    driver.take_all(other);
    driver.wait(LOST_PAUSE);
    for _ in 0..5 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[short, other]), [1, 10], "one at a time at first");
}

#[test]
fn a_starved_worker_is_tried_again_when_it_closes_something() {
    let mut driver = driver();
    let short = driver.worker();
    driver.accept(WEB);
    driver.take_all(short);
    driver.accept(WEB);
    driver.lose(short);
    driver.turn();
    assert_eq!(driver.core.totals().queued, 1);
    driver.finish(short, 1);
    assert_eq!(driver.core.totals().in_flight, 1);
}

#[test]
fn an_impossible_slot_expels_and_the_connection_survives() {
    let mut driver = driver();
    let (broken, other) = (driver.worker(), driver.worker());
    let conns: Vec<_> = (0..4).map(|_| driver.accept(WEB)).collect();
    driver.scribble(broken);
    driver.log.clear();
    driver.turn();
    let why = Departure::Expelled("wrote an impossible slot state");
    assert!(matches!(driver.log[0], Effect::Disconnect { worker, .. } if worker == broken));
    assert!(driver.log.contains(&Effect::Event(Event::Gone {
        worker: broken,
        why,
        resent: 2,
        live: 0
    })));
    assert_eq!(driver.take_all(other), 4);
    assert!(conns.iter().all(|&conn| driver.is_served(conn)));
}

#[test]
fn losing_a_probe_or_an_impossible_outcome_expels() {
    let mut driver = driver();
    let (hung, other) = (driver.worker(), driver.worker());
    driver.accept(WEB);
    driver.wait(ms(1_000));
    assert_eq!(driver.take_all(other), 1);
    let probe = driver.core.tickets(hung).next().unwrap();
    let slot = &driver.link(hung).board[probe.slot as usize];
    assert!(slot::decline(slot, probe.seq));
    driver.turn();
    assert!(driver.link(hung).cut && driver.link(hung).forgotten);
}

#[test]
fn an_impossible_outcome_of_a_revocation_expels() {
    let mut driver = driver();
    let (worker, other) = (driver.worker(), driver.worker());
    driver.accept(WEB);
    driver.scribble(worker);
    driver.now = driver.now + ms(1_000);
    driver.core.tick(driver.now);
    driver.pump();
    assert!(driver.link(worker).cut && driver.link(worker).forgotten);
    assert_eq!(driver.take_all(other), 1);
}

#[test]
fn a_full_channel_means_another_worker() {
    let mut driver = driver();
    let (full, other) = (driver.worker(), driver.worker());
    driver.link(full).capacity = 1;
    for _ in 0..6 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[full, other]), [1, 5]);
    let events = driver.events();
    let told = Event::ChannelFull { worker: full };
    assert_eq!(events.iter().filter(|&event| *event == told).count(), 1);
    assert!(driver.sends().iter().all(|&(_, resent)| !resent));
    driver.take_all(full);
    driver.accept(WEB);
    assert_eq!(driver.loads(&[full, other]), [2, 5]);
}

#[test]
fn a_full_channel_with_nothing_of_ours_is_tried_again_in_time() {
    let mut driver = driver();
    let full = driver.worker();
    driver.link(full).capacity = 0;
    driver.accept(WEB);
    assert_eq!(driver.core.totals().queued, 1);
    driver.link(full).capacity = 9;
    driver.wait(ms(999));
    assert_eq!(driver.core.totals().queued, 1);
    driver.wait(ms(1));
    assert_eq!(driver.core.totals().in_flight, 1);
}

#[test]
fn a_closed_channel_means_the_worker_is_leaving() {
    let mut driver = driver();
    let (leaving, other) = (driver.worker(), driver.worker());
    driver.accept(WEB);
    driver.accept(WEB);
    driver.link(leaving).closed = true;
    driver.accept(WEB);
    assert_eq!(driver.state(leaving), State::Draining);
    assert_eq!(driver.loads(&[leaving, other]), [1, 2]);
    driver.take_all(other);
    driver.wait(ms(1_000));
    assert_eq!(driver.loads(&[leaving, other]), [0, 3]);
    assert_eq!(driver.state(leaving), State::Draining);
    driver.leave(leaving, Departure::Disconnected);
    assert!(driver.link(leaving).forgotten);
}

#[test]
fn a_shortage_pauses_everything_and_keeps_the_order() {
    let mut driver = driver();
    let worker = driver.worker();
    driver.scarcity = 2;
    let conns: Vec<_> = (0..4).map(|_| driver.accept_only(WEB)).collect();
    driver.pump();
    let mut events = driver.events();
    events.retain(|event| matches!(event, Event::OutOfResources { .. }));
    assert_eq!(events, [Event::OutOfResources { pause: ms(100) }]);
    assert_eq!(driver.core.totals().queued, 2);
    assert_eq!(driver.core.accepting(WEB), Accepting::Pause);
    assert_eq!(driver.core.deadline(), Some(driver.now + ms(100)));
    driver.wait(ms(100));
    assert_eq!(driver.core.totals().queued, 0);
    assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
    let order: Vec<_> = std::iter::from_fn(|| driver.take(worker)).collect();
    assert_eq!(order, [conns[2], conns[3], conns[0], conns[1]]);
}

/// If the event loop has not seen a ticket, the slot still has the word of an earlier ticket.
#[test]
fn tickets_are_read_only_once_they_are_offered() {
    let mut driver = driver();
    let worker = driver.worker();
    driver.accept_only(WEB);
    assert_eq!(driver.core.tickets(worker).count(), 0);
    driver.pump();
    assert_eq!(driver.core.tickets(worker).count(), 1);
}

#[test]
fn stale_reports_are_ignored() {
    let mut driver = driver();
    let worker = driver.worker();
    driver.accept(WEB);
    let ticket = driver.core.tickets(worker).next().unwrap();
    driver.take_all(worker);
    let before = driver.core.totals();
    let now = driver.now;
    driver.core.slot(now, worker, ticket, SlotState::Taken, now);
    driver.core.slot(now, worker, ticket, SlotState::Invalid, now);
    driver.core.revoked(now, worker, ticket, Revoke::Revoked);
    driver.core.send_failed(now, worker, ticket, SendFailure::Closed);
    driver.core.probe_failed(now, worker, ticket, SendFailure::Closed);
    let far = Ticket { slot: u32::MAX, seq: 1 };
    driver.core.slot(now, worker, far, SlotState::Taken, now);
    assert_eq!(driver.core.effect(), None);
    assert_eq!(driver.core.totals(), before);
    assert_eq!(driver.state(worker), State::Active);
}
