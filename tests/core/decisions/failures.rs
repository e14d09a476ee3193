//! Hangs, lost descriptors, full channels, scarcity, hostile slots.

use super::*;
use dispatch_protocol::scoreboard::slot::{self, Revoke, SlotState};

#[test]
fn a_worker_that_hangs_loses_what_it_left_untaken_to_others() {
    let mut desk = desk();
    let (hung, other) = (desk.worker(), desk.worker());
    for _ in 0..10 {
        desk.accept(WEB);
    }
    desk.take_all(other);
    desk.wait(ms(999));
    assert_eq!(desk.state(hung), State::Active);
    assert_eq!(desk.core.deadline(), Some(desk.now + ms(1)));
    desk.log.clear();
    desk.wait(ms(1));
    assert_eq!(desk.state(hung), State::Suspect);
    assert_eq!(desk.loads(&[hung, other]), [0, 10]);
    let log = desk.log.clone();
    let revokes = log.iter().take_while(|effect| matches!(effect, Effect::Revoke { .. })).count();
    assert_eq!(revokes, 5);
    assert!(log.contains(&Effect::Purge { worker: hung }), "nothing is left for it to take");
    assert!(log.contains(&Effect::Event(Event::Suspect {
        worker: hung,
        revoked: 5,
        waited: ms(1_000)
    })));
    assert!(desk.sends().iter().all(|&send| send == (other, true)));
}

#[test]
fn where_there_is_no_other_worker_the_suspect_keeps_its_connections() {
    let mut desk = desk();
    let slow = desk.worker();
    let conns: Vec<_> = (0..3).map(|_| desk.accept(WEB)).collect();
    desk.wait(ms(1_000));
    assert_eq!(desk.state(slow), State::Suspect);
    assert_eq!(desk.core.totals().custody, 3, "there is no better place");
    let late = desk.accept(WEB);
    assert_eq!(desk.core.totals().custody, 4, "suspects are used when no trusted worker has room");
    desk.events();
    assert_eq!(desk.take_all(slow), 4);
    assert_eq!(desk.events(), [Event::Trusted { worker: slow, after: ms(0) }]);
    assert!(conns.iter().chain([&late]).all(|&conn| desk.is_served(conn)));
    assert_eq!(desk.core.snapshot().pools[0].revoked, 0);
}

#[test]
fn a_take_that_wins_the_race_with_the_revocation_stands() {
    let mut desk = desk();
    let (slow, other) = (desk.worker(), desk.worker());
    let conn = desk.accept(WEB);
    let ticket = desk.core.tickets(slow).next().unwrap();
    desk.now = desk.now + ms(1_000);
    desk.core.tick(desk.now);
    // Between the decision and its execution:
    assert_eq!(desk.take(slow), Some(conn));
    desk.pump();
    assert_eq!(desk.loads(&[slow, other]), [1, 0]);
    assert_eq!(desk.core.totals().taken, 1);
    assert!(desk.log.contains(&Effect::Release { worker: slow, conn, ticket }));
    assert_eq!(desk.state(slow), State::Active, "it has taken one");
}

#[test]
fn a_probe_that_cannot_be_sent_is_tried_again() {
    let mut desk = desk();
    let (hung, other) = (desk.worker(), desk.worker());
    desk.accept(WEB);
    desk.link(hung).capacity = 0;
    desk.wait(ms(1_000));
    assert_eq!(desk.take_all(other), 1);
    assert_eq!(desk.core.deadline(), Some(desk.now + ms(1_000)));
    desk.link(hung).capacity = 8;
    desk.wait(ms(1_000));
    assert!(desk.answer(hung));
}

#[test]
fn a_lost_connection_goes_elsewhere_and_the_worker_rests() {
    let mut desk = desk();
    let (short, other) = (desk.worker(), desk.worker());
    desk.accept(WEB);
    assert!(desk.lose(short));
    desk.log.clear();
    desk.turn();
    assert!(desk.log.contains(&Effect::Event(Event::Lost { worker: short })));
    assert_eq!(desk.sends(), [(other, true)]);
    for _ in 0..5 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[short, other]), [0, 6]);
    desk.take_all(other);
    desk.wait(LOST_PAUSE);
    for _ in 0..5 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[short, other]), [1, 10], "one at a time at first");
}

#[test]
fn a_starved_worker_is_tried_again_when_it_closes_something() {
    let mut desk = desk();
    let short = desk.worker();
    desk.accept(WEB);
    desk.take_all(short);
    desk.accept(WEB);
    desk.lose(short);
    desk.turn();
    assert_eq!(desk.core.totals().held, 1);
    desk.finish(short, 1);
    assert_eq!(desk.core.totals().custody, 1);
}

#[test]
fn an_impossible_slot_expels_and_the_connection_survives() {
    let mut desk = desk();
    let (broken, other) = (desk.worker(), desk.worker());
    let conns: Vec<_> = (0..4).map(|_| desk.accept(WEB)).collect();
    desk.scribble(broken);
    desk.log.clear();
    desk.turn();
    let why = Departure::Expelled("wrote an impossible slot state");
    assert!(matches!(desk.log[0], Effect::Disconnect { worker, .. } if worker == broken));
    assert!(desk.log.contains(&Effect::Event(Event::Gone {
        worker: broken,
        why,
        resent: 2,
        live: 0
    })));
    assert_eq!(desk.take_all(other), 4);
    assert!(conns.iter().all(|&conn| desk.is_served(conn)));
}

#[test]
fn losing_a_probe_or_an_impossible_outcome_expels() {
    let mut desk = desk();
    let (hung, other) = (desk.worker(), desk.worker());
    desk.accept(WEB);
    desk.wait(ms(1_000));
    assert_eq!(desk.take_all(other), 1);
    let probe = desk.core.tickets(hung).next().unwrap();
    let slot = &desk.link(hung).board[probe.slot as usize];
    assert!(slot::decline(slot, probe.seq));
    desk.turn();
    assert!(desk.link(hung).cut && desk.link(hung).forgotten);
}

#[test]
fn an_impossible_outcome_of_a_revocation_expels() {
    let mut desk = desk();
    let (worker, other) = (desk.worker(), desk.worker());
    desk.accept(WEB);
    desk.scribble(worker);
    desk.now = desk.now + ms(1_000);
    desk.core.tick(desk.now);
    desk.pump();
    assert!(desk.link(worker).cut && desk.link(worker).forgotten);
    assert_eq!(desk.take_all(other), 1);
}

#[test]
fn a_full_channel_means_another_worker() {
    let mut desk = desk();
    let (full, other) = (desk.worker(), desk.worker());
    desk.link(full).capacity = 1;
    for _ in 0..6 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[full, other]), [1, 5]);
    let events = desk.events();
    let told = Event::ChannelFull { worker: full };
    assert_eq!(events.iter().filter(|&event| *event == told).count(), 1);
    assert!(desk.sends().iter().all(|&(_, resent)| !resent));
    desk.take_all(full);
    desk.accept(WEB);
    assert_eq!(desk.loads(&[full, other]), [2, 5]);
}

#[test]
fn a_full_channel_with_nothing_of_ours_is_tried_again_in_time() {
    let mut desk = desk();
    let full = desk.worker();
    desk.link(full).capacity = 0;
    desk.accept(WEB);
    assert_eq!(desk.core.totals().held, 1);
    desk.link(full).capacity = 9;
    desk.wait(ms(999));
    assert_eq!(desk.core.totals().held, 1);
    desk.wait(ms(1));
    assert_eq!(desk.core.totals().custody, 1);
}

#[test]
fn a_closed_channel_means_the_worker_is_leaving() {
    let mut desk = desk();
    let (leaving, other) = (desk.worker(), desk.worker());
    desk.accept(WEB);
    desk.accept(WEB);
    desk.link(leaving).closed = true;
    desk.accept(WEB);
    assert_eq!(desk.state(leaving), State::Draining);
    assert_eq!(desk.loads(&[leaving, other]), [1, 2]);
    desk.take_all(other);
    desk.wait(ms(1_000));
    assert_eq!(desk.loads(&[leaving, other]), [0, 3]);
    assert_eq!(desk.state(leaving), State::Draining);
    desk.leave(leaving, Departure::Disconnected);
    assert!(desk.link(leaving).forgotten);
}

#[test]
fn scarcity_rests_everything_and_keeps_the_order() {
    let mut desk = desk();
    let worker = desk.worker();
    desk.scarcity = 2;
    let conns: Vec<_> = (0..4).map(|_| desk.accept_only(WEB)).collect();
    desk.pump();
    let mut events = desk.events();
    events.retain(|event| matches!(event, Event::Choked { .. }));
    assert_eq!(events, [Event::Choked { pause: ms(100) }]);
    assert_eq!(desk.core.totals().held, 2);
    assert_eq!(desk.core.accepting(WEB), Accepting::Pause);
    assert_eq!(desk.core.deadline(), Some(desk.now + ms(100)));
    desk.wait(ms(100));
    assert_eq!(desk.core.totals().held, 0);
    assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
    let order: Vec<_> = std::iter::from_fn(|| desk.take(worker)).collect();
    assert_eq!(order, [conns[2], conns[3], conns[0], conns[1]]);
}

/// A slot of a ticket that the event loop has not been told of yet still has the word of an earlier one.
#[test]
fn tickets_are_read_only_once_they_are_offered() {
    let mut desk = desk();
    let worker = desk.worker();
    desk.accept_only(WEB);
    assert_eq!(desk.core.tickets(worker).count(), 0);
    desk.pump();
    assert_eq!(desk.core.tickets(worker).count(), 1);
}

#[test]
fn stale_reports_are_ignored() {
    let mut desk = desk();
    let worker = desk.worker();
    desk.accept(WEB);
    let ticket = desk.core.tickets(worker).next().unwrap();
    desk.take_all(worker);
    let before = desk.core.totals();
    let now = desk.now;
    desk.core.slot(now, worker, ticket, SlotState::Taken, now);
    desk.core.slot(now, worker, ticket, SlotState::Invalid, now);
    desk.core.revoked(now, worker, ticket, Revoke::Revoked);
    desk.core.send_failed(now, worker, ticket, SendFailure::Closed);
    desk.core.probe_failed(now, worker, ticket, SendFailure::Closed);
    let far = Ticket { slot: u32::MAX, seq: 1 };
    desk.core.slot(now, worker, far, SlotState::Taken, now);
    assert_eq!(desk.core.effect(), None);
    assert_eq!(desk.core.totals(), before);
    assert_eq!(desk.state(worker), State::Active);
}
