//! Draining and resuming by an operator.

use super::*;
use dispatch_protocol::wire::Features;

/// Short forms for these tests.
pub(super) trait DrainSteps {
    fn drain(&mut self, worker: WorkerId) -> bool;
    fn resume(&mut self, worker: WorkerId) -> Result<bool, CannotResume>;
}

impl DrainSteps for Driver {
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
    let mut driver = driver();
    let (drained, other) = (driver.worker(), driver.worker());
    for _ in 0..4 {
        driver.accept(WEB);
    }
    driver.events();
    assert!(driver.drain(drained));
    assert!(driver.drain(drained), "a second drain changes nothing");
    let draining = Event::Draining { worker: drained, live: 2, deadline: None };
    assert_eq!(driver.events(), [draining]);
    assert_eq!(driver.state(drained), State::Draining);
    for _ in 0..4 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[drained, other]), [2, 6]);
    assert_eq!(driver.take_all(drained), 2, "it may still take its connections in flight");
    assert_eq!(driver.resume(drained), Ok(true));
    assert_eq!(driver.resume(drained), Ok(false), "it is active already");
    assert_eq!(driver.events(), [Event::Resumed { worker: drained }]);
    for _ in 0..4 {
        driver.accept(WEB);
    }
    assert_eq!(driver.loads(&[drained, other]), [6, 6]);
}

#[test]
fn untaken_connections_of_a_drained_worker_move() {
    let mut driver = driver();
    let (hung, other) = (driver.worker(), driver.worker());
    for _ in 0..4 {
        driver.accept(WEB);
    }
    driver.take_all(other);
    driver.drain(hung);
    driver.wait(ms(1_000));
    assert_eq!(driver.state(hung), State::Draining);
    assert_eq!(driver.loads(&[hung, other]), [0, 4]);
    driver.take_all(other);
    assert_eq!(driver.resume(hung), Ok(true));
    assert_eq!(driver.state(hung), State::Suspect, "it is only tested until it takes something");
    assert!(driver.answer(hung), "only the probe was in its channel");
    driver.turn();
    driver.accept(WEB);
    assert_eq!(driver.take_all(hung), 1, "it has the fewest");
    assert_eq!(driver.state(hung), State::Active);
}

#[test]
fn a_suspect_that_is_drained_stays_unproven() {
    let mut driver = driver();
    let hung = driver.worker();
    driver.accept(WEB);
    driver.wait(ms(1_000));
    assert_eq!(driver.state(hung), State::Suspect);
    driver.drain(hung);
    assert_eq!(driver.resume(hung), Ok(true));
    assert_eq!(driver.state(hung), State::Suspect);
    // Drained again, it takes its connections and is trusted.
    driver.drain(hung);
    assert_eq!(driver.take_all(hung), 1);
    assert_eq!(driver.resume(hung), Ok(true));
    assert_eq!(driver.state(hung), State::Active);
}

#[test]
fn all_draining_is_no_worker_not_back_pressure() {
    let mut driver = driver();
    let worker = driver.worker();
    driver.drain(worker);
    assert_eq!(driver.core.accepting(WEB), Accepting::Pause);
    driver.wait(ms(4_999));
    assert_eq!(driver.core.accepting(WEB), Accepting::Pause);
    driver.wait(ms(1));
    assert_eq!(driver.core.accepting(WEB), Accepting::Refuse);
    assert_eq!(driver.resume(worker), Ok(true));
    assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn a_worker_that_leaves_is_not_resumed() {
    let mut driver = driver();
    let (leaving, closed, gone) = (driver.worker(), driver.worker(), driver.worker());
    driver.goodbye(leaving);
    assert_eq!(driver.resume(leaving), Err(CannotResume::Leaving));
    driver.leave(gone, Departure::Died);
    assert_eq!(driver.resume(gone), Err(CannotResume::Leaving));
    assert!(!driver.drain(gone));
    driver.link(closed).closed = true;
    driver.accept(WEB);
    assert_eq!(driver.state(closed), State::Draining);
    assert_eq!(driver.resume(closed), Err(CannotResume::Leaving));
}

fn with_notices(driver: &mut Driver) -> WorkerId {
    driver.trusted(Hello { features: Features::DRAIN, ..hello() })
}

#[test]
fn a_lost_drain_record_is_sent_again() {
    let mut driver = driver();
    let (worker, silent) = (with_notices(&mut driver), driver.worker());
    for _ in 0..4 {
        driver.accept(WEB);
    }
    driver.drain(worker);
    driver.drain(silent);
    let drain = Notice::Drain { deadline: None };
    assert_eq!(driver.link(worker).notices, [drain]);
    assert_eq!(driver.link(silent).notices, []);
    // It takes nothing: the purge removes the notice with the revoked connections.
    driver.wait(ms(1_000));
    assert_eq!(driver.link(worker).notices, [drain], "once more");
    driver.link(worker).notices.clear();
    driver.link(worker).capacity = 0;
    driver.resume(worker).unwrap();
    assert_eq!(driver.link(worker).notices, [], "its channel is full");
    driver.link(worker).capacity = 278;
    driver.wait(ms(1_000));
    assert_eq!(driver.link(worker).notices, [Notice::Resume]);
}

#[test]
fn untaken_connections_move_at_the_drain_deadline() {
    let mut driver = driver();
    let (worker, silent) = (with_notices(&mut driver), driver.worker());
    for _ in 0..6 {
        driver.accept(WEB);
    }
    assert!(driver.take(worker).is_some() && driver.take(silent).is_some());
    driver.turn();
    let other = driver.worker();
    let deadline = Some(driver.now + ms(500));
    for worker in [worker, silent] {
        driver.core.drain_worker(driver.now, worker, deadline);
    }
    driver.pump();
    let notified = deadline.map(|deadline| deadline + COUNT_FIRST);
    assert_eq!(driver.link(worker).notices, [Notice::Drain { deadline: notified }]);
    assert_eq!(driver.core.deadline(), deadline, "what is ended must have been counted");
    driver.events();
    driver.wait(ms(500));
    let over = |worker, notified| Event::DrainOver { worker, resent: 2, live: 1, notified };
    assert_eq!(driver.events(), [over(worker, true), over(silent, false)]);
    assert_eq!(driver.loads(&[worker, silent, other]), [1, 1, 4]);
    let status = driver.core.snapshot();
    assert_eq!(status.ended_at_deadline, 1, "the other supports no notices");
    assert_eq!(driver.state(worker), State::Draining);
    // A resume cancels the deadline.
    let (now, later) = (driver.now, driver.now + ms(500));
    driver.core.resume_worker(now, worker).unwrap();
    driver.core.drain_worker(now, worker, Some(later));
    driver.core.resume_worker(now, worker).unwrap();
    driver.pump();
    driver.events();
    driver.wait(ms(600));
    assert_eq!(driver.events(), []);
}
