//! When untaken connections move: patience, trials, idle threads, pools that are not served.

use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::slot::{SlotState, want};

use super::policies::client;
use super::*;

const T: Duration = Duration::from_millis(200);

fn desk_of(policy: Policy) -> Desk {
    desk_with(|pool| {
        pool.policy = policy;
        pool.handoff_timeout = T;
        pool.wait_for_worker = ms(10_000);
    })
}

/// Short forms for what these tests do.
pub(super) trait HandoffSteps {
    fn threads(&mut self, worker: WorkerId, idle: u32);
    fn custody(&self, worker: WorkerId) -> u64;
}

impl HandoffSteps for Desk {
    /// The worker says how many of its threads wait in `accept`.
    fn threads(&mut self, worker: WorkerId, idle: u32) {
        let threads = Threads { idle, turnaround: Some(ms(300)) };
        self.core.threads(self.now, worker, Some(threads));
        self.pump();
    }

    fn custody(&self, worker: WorkerId) -> u64 {
        self.core.untaken(worker)
    }
}

#[test]
fn a_slow_loop_keeps_what_it_usually_takes() {
    let mut desk = desk_of(Policy::LeastConnections);
    let (slow, other) = (desk.join(hello()).unwrap(), desk.join(hello()).unwrap());
    for round in 0..6 {
        let conns = [desk.accept(WEB), desk.accept(WEB)];
        // Rounds of 320 ms, longer than the timeout. Only the first one is a surprise.
        desk.wait(ms(320));
        desk.take_all(slow);
        desk.take_all(other);
        assert!(conns.iter().all(|&conn| desk.is_served(conn)), "round {round}");
    }
    assert_eq!(desk.core.snapshot().pools[0].revoked, 0);
    assert_eq!((desk.state(slow), desk.state(other)), (State::Active, State::Active));
    assert_eq!(desk.core.snapshot().pools[0].workers[0].longest_take, ms(320));
}

#[test]
fn a_connection_leaves_a_stopped_loop_for_a_quick_one_after_its_patience() {
    let mut desk = desk_of(Policy::LeastConnections);
    let (stopped, quick) = (desk.worker(), desk.worker());
    let conns = [desk.accept(WEB), desk.accept(WEB)];
    desk.take_all(quick);
    desk.wait(T - ms(1));
    assert_eq!((desk.state(stopped), desk.custody(stopped)), (State::Active, 1));
    desk.wait(ms(1));
    assert_eq!((desk.state(stopped), desk.custody(stopped)), (State::Suspect, 0));
    desk.take_all(quick);
    assert!(conns.iter().all(|&conn| desk.is_served(conn)));
}

#[test]
fn a_worker_that_only_answers_is_tested_for_milliseconds_and_ever_more_rarely() {
    let mut desk = desk_of(Policy::LeastConnections);
    let good = desk.worker();
    let stuck = desk.join(hello()).unwrap();
    let mut tests: Vec<u64> = Vec::new();
    for step in 0..40_000_u64 {
        desk.answer(stuck);
        desk.wait(ms(1));
        if step % 10 == 0 {
            desk.accept(WEB);
            let again = tests.last().is_none_or(|&last| step - last > 100);
            if desk.custody(stuck) == 1 && again {
                tests.push(step);
            }
        }
        desk.take_all(good);
    }
    assert_eq!(desk.core.totals().custody, 0);
    // After 1, 2, 4, 8 and 16 s.
    assert_eq!(tests.len(), 6, "{tests:?}");
    let pauses: Vec<u64> = tests.windows(2).map(|pair| (pair[1] - pair[0]) / 1_000).collect();
    assert_eq!(pauses, [1, 2, 4, 8, 16]);
    assert_eq!(desk.state(stuck), State::Suspect);
}

#[test]
fn a_busy_worker_leaves_its_connection_to_the_first_idle_thread() {
    let mut desk = desk_of(Policy::LeastConnections);
    let (one, two) = (desk.worker(), desk.worker());
    desk.threads(one, 1);
    desk.threads(two, 1);
    desk.accept(WEB);
    desk.accept(WEB);
    for worker in [one, two] {
        desk.threads(worker, 0);
        assert_eq!(desk.take_all(worker), 1);
    }
    // Nothing is sent ahead: their threads are away for 300 ms.
    let waiting = desk.accept(WEB);
    assert_eq!(desk.core.totals().held, 1);
    assert_eq!(desk.core.accepting(WEB), Accepting::Pause, "the others wait in the kernel's queue");
    assert_eq!(desk.core.wants(two) & want::IDLE, want::IDLE);
    desk.threads(two, 1);
    assert_eq!(desk.custody(two), 1, "at once");
    desk.threads(two, 0);
    desk.take_all(two);
    assert!(desk.is_served(waiting));
    desk.wait(ms(5_000));
    assert_eq!((desk.state(one), desk.state(two)), (State::Active, State::Active), "only busy");
}

#[test]
fn what_was_sent_to_a_busy_worker_moves_to_a_thread_that_waits() {
    let mut desk = desk_of(Policy::LeastConnections);
    let (busy, idle) = (desk.worker(), desk.worker());
    let conn = desk.accept(WEB);
    assert_eq!(desk.custody(busy), 1);
    desk.threads(busy, 0);
    desk.threads(idle, 1);
    assert_eq!(desk.custody(busy), 1, "it may just be on its way");
    assert_eq!(desk.core.deadline(), Some(desk.now + Duration::from_micros(100)));
    desk.wait(Duration::from_micros(100));
    assert_eq!((desk.custody(busy), desk.custody(idle)), (0, 1));
    desk.take_all(idle);
    assert!(desk.is_served(conn));
    assert_eq!(desk.state(busy), State::Active);
}

#[test]
fn with_hash_a_client_waits_for_its_worker_while_others_are_idle() {
    let mut desk = desk_of(Policy::Hash);
    let workers = desk.weighted(&[1, 1]);
    let owner = desk.next_from(client(1));
    let other = workers[usize::from(workers[0] == owner)];
    desk.threads(owner, 0);
    desk.threads(other, 1);
    desk.accept_only_from(WEB, client(1));
    desk.pump();
    for _ in 0..20 {
        desk.wait(ms(100));
        assert_eq!((desk.custody(owner), desk.custody(other)), (1, 0));
    }
    // An event loop of its own that stops is suspect, and its client goes to the other one.
    desk.core.threads(desk.now, owner, None);
    desk.core.threads(desk.now, other, None);
    desk.wait(ms(2_000));
    assert_eq!(desk.state(owner), State::Suspect);
    assert_eq!((desk.custody(owner), desk.custody(other)), (0, 1));
}

#[test]
fn with_failover_a_primary_that_hangs_comes_back_by_a_test() {
    let mut desk = desk_of(Policy::Failover);
    let (primary, standby) = (desk.with_priority(1), desk.with_priority(0));
    desk.accept(WEB);
    desk.wait(T);
    assert_eq!((desk.state(primary), desk.custody(standby)), (State::Suspect, 1));
    desk.take_all(standby);
    assert_eq!(desk.next_from(ClientAddr::Unix), standby);
    assert!(desk.answer(primary));
    desk.turn();
    // Only one client goes to it; while it is tested the others go to the standby.
    desk.accept(WEB);
    assert_eq!(desk.custody(primary), 1);
    desk.wait(ms(10));
    desk.take_all(primary);
    assert_eq!(desk.next_from(ClientAddr::Unix), primary);
}

#[test]
fn suspects_are_used_when_no_other_worker_has_room() {
    for policy in [Policy::LeastConnections, Policy::RoundRobin, Policy::Random, Policy::TwoChoices]
    {
        let mut desk = desk_of(policy);
        let slow = [desk.worker(), desk.worker()];
        for _ in 0..20 {
            desk.accept(WEB);
            desk.wait(ms(50));
        }
        assert_eq!(slow.map(|worker| desk.state(worker)), [State::Suspect; 2], "{policy:?}");
        let totals = desk.core.totals();
        assert_eq!((totals.custody, totals.held), (20, 0), "{policy:?}");
        assert_eq!(desk.take_all(slow[0]) + desk.take_all(slow[1]), 20);
        assert_eq!(slow.map(|worker| desk.state(worker)), [State::Active; 2], "{policy:?}");
    }
}

#[test]
fn a_pool_whose_workers_take_nothing_refuses_until_one_takes() {
    let mut desk = desk_of(Policy::LeastConnections);
    let stuck = desk.worker();
    let conn = desk.accept(WEB);
    desk.events();
    desk.wait(ms(9_999));
    assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
    desk.wait(ms(1));
    assert_eq!(desk.core.accepting(WEB), Accepting::Refuse);
    assert_eq!(desk.closed(conn), Some(CloseReason::NoWorker), "what it left is closed too");
    let pool = PoolId(0);
    let events = desk.events();
    assert!(events.contains(&Event::Refusing { pool, closed: 1, unserved: true }), "{events:?}");
    assert_eq!(desk.core.snapshot().pools[0].state, PoolState::Refusing);
    let refused = desk.accept(WEB);
    assert_eq!(desk.closed(refused), Some(CloseReason::NoWorker));
    // It answers, so it is tested with one client; the others are refused.
    assert!(desk.answer(stuck));
    desk.turn();
    let tested = desk.accept(WEB);
    let other = desk.accept(WEB);
    assert_eq!((desk.closed(tested), desk.closed(other)), (None, Some(CloseReason::NoWorker)));
    desk.take_all(stuck);
    assert!(desk.is_served(tested));
    assert!(desk.events().contains(&Event::Served { pool }));
    assert_eq!(desk.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn slow_is_not_unserved() {
    let mut desk = desk_with(|pool| {
        pool.handoff_timeout = T;
        pool.wait_for_worker = ms(500);
    });
    let slow = desk.worker();
    for _ in 0..10 {
        let conn = desk.accept(WEB);
        // Its rounds are longer than clients would wait without a worker.
        desk.wait(ms(450));
        desk.take_all(slow);
        assert!(desk.is_served(conn));
    }
    let conn = desk.accept(WEB);
    desk.wait(ms(1_200));
    assert_eq!(desk.closed(conn), None, "within three times what it usually needs");
    desk.wait(ms(200));
    assert_eq!(desk.closed(conn), Some(CloseReason::NoWorker));
}

#[test]
fn a_take_counts_from_when_the_worker_says_it_was() {
    let mut desk = desk_of(Policy::LeastConnections);
    let worker = desk.worker();
    let conn = desk.accept(WEB);
    let ticket = desk.core.tickets(worker).next().unwrap();
    assert_eq!(desk.take(worker), Some(conn));
    let sent = desk.now;
    // It is noticed 90 ms late; a time before the handoff or to come is clamped.
    desk.now = sent + ms(90);
    desk.core.slot(desk.now, worker, ticket, SlotState::Taken, sent + ms(3));
    desk.pump();
    let handoff = &desk.core.snapshot().pools[0].handoff;
    assert_eq!((handoff.counts().iter().sum::<u64>(), handoff.sum()), (1, 3_000_000));
}
