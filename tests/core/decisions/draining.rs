//! Draining and resuming by an operator.

use super::*;
use dispatch_protocol::wire::Features;

/// Short forms for what these tests do.
pub(super) trait DrainSteps {
    fn drain(&mut self, worker: WorkerId) -> bool;
    fn resume(&mut self, worker: WorkerId) -> Result<bool, CannotResume>;
}

impl DrainSteps for Desk {
    fn drain(&mut self, worker: WorkerId) -> bool {
        let drained = self.core.drain_worker(self.now, worker, None);
        self.pump();
        drained
    }

    fn resume(&mut self, worker: WorkerId) -> Result<bool, CannotResume> {
        let resumed = self.core.resume_worker(self.now, worker);
        self.pump();
        resumed
    }
}

#[test]
fn a_drained_worker_gets_nothing_new_and_keeps_what_it_has() {
    let mut desk = desk();
    let (drained, other) = (desk.worker(), desk.worker());
    for _ in 0..4 {
        desk.accept(WEB);
    }
    desk.events();
    assert!(desk.drain(drained));
    assert!(desk.drain(drained), "said again, nothing changes");
    let draining = Event::Draining { worker: drained, live: 2, deadline: None };
    assert_eq!(desk.events(), [draining]);
    assert_eq!(desk.state(drained), State::Draining);
    for _ in 0..4 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[drained, other]), [2, 6]);
    assert_eq!(desk.take_all(drained), 2, "what it was sent is still its to take");
    assert_eq!(desk.resume(drained), Ok(true));
    assert_eq!(desk.resume(drained), Ok(false), "it is active already");
    assert_eq!(desk.events(), [Event::Resumed { worker: drained }]);
    for _ in 0..4 {
        desk.accept(WEB);
    }
    assert_eq!(desk.loads(&[drained, other]), [6, 6]);
}

#[test]
fn what_a_drained_worker_leaves_untaken_goes_elsewhere_and_it_must_show_it_is_alive() {
    let mut desk = desk();
    let (hung, other) = (desk.worker(), desk.worker());
    for _ in 0..4 {
        desk.accept(WEB);
    }
    desk.take_all(other);
    desk.drain(hung);
    desk.wait(ms(1_000));
    assert_eq!(desk.state(hung), State::Draining);
    assert_eq!(desk.loads(&[hung, other]), [0, 4]);
    desk.take_all(other);
    assert_eq!(desk.resume(hung), Ok(true));
    assert_eq!(desk.state(hung), State::Suspect, "it is only tested until it takes something");
    assert!(desk.answer(hung), "only the probe was in its channel");
    desk.turn();
    desk.accept(WEB);
    assert_eq!(desk.take_all(hung), 1, "it has the fewest");
    assert_eq!(desk.state(hung), State::Active);
}

#[test]
fn a_suspect_that_is_drained_stays_unproven() {
    let mut desk = desk();
    let hung = desk.worker();
    desk.accept(WEB);
    desk.wait(ms(1_000));
    assert_eq!(desk.state(hung), State::Suspect);
    desk.drain(hung);
    assert_eq!(desk.resume(hung), Ok(true));
    assert_eq!(desk.state(hung), State::Suspect);
    // Drained again, it takes what it has: there is no doubt any more.
    desk.drain(hung);
    assert_eq!(desk.take_all(hung), 1);
    assert_eq!(desk.resume(hung), Ok(true));
    assert_eq!(desk.state(hung), State::Active);
}

#[test]
fn all_draining_is_no_worker_not_back_pressure() {
    let mut desk = desk();
    let worker = desk.worker();
    desk.drain(worker);
    assert_eq!(desk.core.accepting(WEB), Accepting::Pause);
    desk.wait(ms(4_999));
    assert_eq!(desk.core.accepting(WEB), Accepting::Pause);
    desk.wait(ms(1));
    assert_eq!(desk.core.accepting(WEB), Accepting::Refuse);
    assert_eq!(desk.resume(worker), Ok(true));
    assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn a_worker_that_leaves_is_not_resumed() {
    let mut desk = desk();
    let (leaving, closed, gone) = (desk.worker(), desk.worker(), desk.worker());
    desk.goodbye(leaving);
    assert_eq!(desk.resume(leaving), Err(CannotResume::Leaving));
    desk.leave(gone, Departure::Died);
    assert_eq!(desk.resume(gone), Err(CannotResume::Leaving));
    assert!(!desk.drain(gone));
    desk.link(closed).closed = true;
    desk.accept(WEB);
    assert_eq!(desk.state(closed), State::Draining);
    assert_eq!(desk.resume(closed), Err(CannotResume::Leaving));
}

fn hearing(desk: &mut Desk) -> WorkerId {
    desk.trusted(Hello { features: Features::DRAIN, ..hello() })
}

#[test]
fn a_worker_that_listens_is_told_and_told_again_when_the_record_is_lost() {
    let mut desk = desk();
    let (worker, deaf) = (hearing(&mut desk), desk.worker());
    for _ in 0..4 {
        desk.accept(WEB);
    }
    desk.drain(worker);
    desk.drain(deaf);
    let drain = Notice::Drain { deadline: None };
    assert_eq!(desk.link(worker).notices, [drain]);
    assert_eq!(desk.link(deaf).notices, []);
    // It takes nothing: the record is purged with what goes elsewhere.
    desk.wait(ms(1_000));
    assert_eq!(desk.link(worker).notices, [drain], "once more");
    desk.link(worker).notices.clear();
    desk.link(worker).capacity = 0;
    desk.resume(worker).unwrap();
    assert_eq!(desk.link(worker).notices, [], "its channel is full");
    desk.link(worker).capacity = 278;
    desk.wait(ms(1_000));
    assert_eq!(desk.link(worker).notices, [Notice::Resume]);
}

#[test]
fn at_the_deadline_what_is_untaken_goes_elsewhere_and_what_is_left_is_counted() {
    let mut desk = desk();
    let (worker, deaf) = (hearing(&mut desk), desk.worker());
    for _ in 0..6 {
        desk.accept(WEB);
    }
    assert!(desk.take(worker).is_some() && desk.take(deaf).is_some());
    desk.turn();
    let other = desk.worker();
    let deadline = Some(desk.now + ms(500));
    for worker in [worker, deaf] {
        desk.core.drain_worker(desk.now, worker, deadline);
    }
    desk.pump();
    let told = deadline.map(|deadline| deadline + COUNT_FIRST);
    assert_eq!(desk.link(worker).notices, [Notice::Drain { deadline: told }]);
    assert_eq!(desk.core.deadline(), deadline, "what is ended must have been counted");
    desk.events();
    desk.wait(ms(500));
    let over = |worker, told| Event::DrainOver { worker, resent: 2, live: 1, told };
    assert_eq!(desk.events(), [over(worker, true), over(deaf, false)]);
    assert_eq!(desk.loads(&[worker, deaf, other]), [1, 1, 4]);
    let status = desk.core.snapshot();
    assert_eq!(status.ended_at_deadline, 1, "nobody could tell the other");
    assert_eq!(desk.state(worker), State::Draining);
    // Made active again before it comes, a deadline counts no more.
    let (now, later) = (desk.now, desk.now + ms(500));
    desk.core.resume_worker(now, worker).unwrap();
    desk.core.drain_worker(now, worker, Some(later));
    desk.core.resume_worker(now, worker).unwrap();
    desk.pump();
    desk.events();
    desk.wait(ms(600));
    assert_eq!(desk.events(), []);
}
