//! Moves of untaken connections: patience, trials, idle threads, pools that are not served.

use dispatch_protocol::ClientAddr;
use dispatch_protocol::scoreboard::slot::{SlotState, want};

use super::policies::client;
use super::*;

const T: Duration = Duration::from_millis(200);

fn driver_of(policy: Policy) -> Driver {
    driver_with(|pool| {
        pool.policy = policy;
        pool.handoff_timeout = T;
        pool.wait_for_worker = ms(10_000);
    })
}

/// Short forms for these tests.
pub(super) trait HandoffSteps {
    fn threads(&mut self, worker: WorkerId, idle: u32);
    fn in_flight(&self, worker: WorkerId) -> u64;
}

impl HandoffSteps for Driver {
    /// The worker reports how many of its threads wait in `accept`.
    fn threads(&mut self, worker: WorkerId, idle: u32) {
        let threads = Threads { idle, turnaround: Some(ms(300)) };
        self.core.threads(self.now, worker, Some(threads));
        self.pump();
    }

    fn in_flight(&self, worker: WorkerId) -> u64 {
        self.core.untaken(worker)
    }
}

#[test]
fn a_slow_loop_keeps_what_it_usually_takes() {
    let mut driver = driver_of(Policy::LeastConnections);
    let (slow, other) = (driver.join(hello()).unwrap(), driver.join(hello()).unwrap());
    for round in 0..6 {
        let conns = [driver.accept(WEB), driver.accept(WEB)];
        // Rounds of 320 ms, longer than the timeout. Only the first one makes the worker suspect.
        driver.wait(ms(320));
        driver.take_all(slow);
        driver.take_all(other);
        assert!(conns.iter().all(|&conn| driver.is_served(conn)), "round {round}");
    }
    assert_eq!(driver.core.snapshot().pools[0].revoked, 0);
    assert_eq!((driver.state(slow), driver.state(other)), (State::Active, State::Active));
    assert_eq!(driver.core.snapshot().pools[0].workers[0].longest_take, ms(320));
}

#[test]
fn a_connection_leaves_a_stopped_loop_after_its_patience() {
    let mut driver = driver_of(Policy::LeastConnections);
    let (stopped, quick) = (driver.worker(), driver.worker());
    let conns = [driver.accept(WEB), driver.accept(WEB)];
    driver.take_all(quick);
    driver.wait(T - ms(1));
    assert_eq!((driver.state(stopped), driver.in_flight(stopped)), (State::Active, 1));
    driver.wait(ms(1));
    assert_eq!((driver.state(stopped), driver.in_flight(stopped)), (State::Suspect, 0));
    driver.take_all(quick);
    assert!(conns.iter().all(|&conn| driver.is_served(conn)));
}

#[test]
fn a_long_silent_worker_comes_last_where_none_is_trusted() {
    let mut driver = driver_of(Policy::LeastConnections);
    let (stopped, slow) = (driver.worker(), driver.worker());
    for _ in 0..2 {
        driver.accept(WEB);
    }
    driver.take_all(stopped);
    driver.take_all(slow);
    // The first worker stops; its untaken connections go to the other, which has more load from
    // then on.
    while driver.state(stopped) == State::Active {
        driver.accept(WEB);
        driver.wait(T / 4);
        driver.take_all(slow);
    }
    driver.wait(10 * T);
    driver.accept(WEB);
    driver.take_all(slow);
    assert!(driver.core.load(stopped) < driver.core.load(slow));
    // Now the other worker does not take either, but it did a moment ago.
    driver.accept(WEB);
    driver.wait(T);
    assert_eq!((driver.state(stopped), driver.state(slow)), (State::Suspect, State::Suspect));
    driver.accept(WEB);
    assert_eq!((driver.in_flight(stopped), driver.in_flight(slow)), (0, 2));
}

#[test]
fn a_worker_that_only_answers_is_tested_ever_more_rarely() {
    let mut driver = driver_of(Policy::LeastConnections);
    let good = driver.worker();
    let stuck = driver.join(hello()).unwrap();
    let mut tests: Vec<u64> = Vec::new();
    for step in 0..40_000_u64 {
        driver.answer(stuck);
        driver.wait(ms(1));
        if step % 10 == 0 {
            driver.accept(WEB);
            let again = tests.last().is_none_or(|&last| step - last > 100);
            if driver.in_flight(stuck) == 1 && again {
                tests.push(step);
            }
        }
        driver.take_all(good);
    }
    assert_eq!(driver.core.totals().in_flight, 0);
    // After 1, 2, 4, 8 and 16 s.
    assert_eq!(tests.len(), 6, "{tests:?}");
    let pauses: Vec<u64> = tests.windows(2).map(|pair| (pair[1] - pair[0]) / 1_000).collect();
    assert_eq!(pauses, [1, 2, 4, 8, 16]);
    assert_eq!(driver.state(stuck), State::Suspect);
}

#[test]
fn a_busy_worker_leaves_its_connection_to_the_first_idle_thread() {
    let mut driver = driver_of(Policy::LeastConnections);
    let (one, two) = (driver.worker(), driver.worker());
    driver.threads(one, 1);
    driver.threads(two, 1);
    driver.accept(WEB);
    driver.accept(WEB);
    for worker in [one, two] {
        driver.threads(worker, 0);
        assert_eq!(driver.take_all(worker), 1);
    }
    // Nothing is sent ahead, because their threads are away for 300 ms.
    let waiting = driver.accept(WEB);
    assert_eq!(driver.core.totals().queued, 1);
    assert_eq!(
        driver.core.accepting(WEB),
        Accepting::Pause,
        "the others wait in the kernel's queue"
    );
    assert_eq!(driver.core.wants(two) & want::IDLE, want::IDLE);
    driver.threads(two, 1);
    assert_eq!(driver.in_flight(two), 1, "at once");
    driver.threads(two, 0);
    driver.take_all(two);
    assert!(driver.is_served(waiting));
    driver.wait(ms(5_000));
    assert_eq!((driver.state(one), driver.state(two)), (State::Active, State::Active), "only busy");
}

#[test]
fn a_connection_of_a_busy_worker_moves_to_an_idle_thread() {
    let mut driver = driver_of(Policy::LeastConnections);
    let (busy, idle) = (driver.worker(), driver.worker());
    let conn = driver.accept(WEB);
    assert_eq!(driver.in_flight(busy), 1);
    driver.threads(busy, 0);
    driver.threads(idle, 1);
    assert_eq!(driver.in_flight(busy), 1, "it may just be on its way");
    assert_eq!(driver.core.deadline(), Some(driver.now + Duration::from_micros(100)));
    driver.wait(Duration::from_micros(100));
    assert_eq!((driver.in_flight(busy), driver.in_flight(idle)), (0, 1));
    driver.take_all(idle);
    assert!(driver.is_served(conn));
    assert_eq!(driver.state(busy), State::Active);
}

#[test]
fn hash_clients_wait_for_their_worker_beside_idle_ones() {
    let mut driver = driver_of(Policy::Hash);
    let workers = driver.weighted(&[1, 1]);
    let owner = driver.next_from(client(1));
    let other = workers[usize::from(workers[0] == owner)];
    driver.threads(owner, 0);
    driver.threads(other, 1);
    driver.accept_only_from(WEB, client(1));
    driver.pump();
    for _ in 0..20 {
        driver.wait(ms(100));
        assert_eq!((driver.in_flight(owner), driver.in_flight(other)), (1, 0));
    }
    // An event loop that stops becomes suspect, and its client goes to the other worker.
    driver.core.threads(driver.now, owner, None);
    driver.core.threads(driver.now, other, None);
    driver.wait(ms(2_000));
    assert_eq!(driver.state(owner), State::Suspect);
    assert_eq!((driver.in_flight(owner), driver.in_flight(other)), (0, 1));
}

#[test]
fn with_failover_a_primary_that_hangs_comes_back_by_a_test() {
    let mut driver = driver_of(Policy::Failover);
    let (primary, standby) = (driver.with_priority(1), driver.with_priority(0));
    driver.accept(WEB);
    driver.wait(T);
    assert_eq!((driver.state(primary), driver.in_flight(standby)), (State::Suspect, 1));
    driver.take_all(standby);
    assert_eq!(driver.next_from(ClientAddr::Unix), standby);
    assert!(driver.answer(primary));
    driver.turn();
    // One client is its trial; meanwhile the others go to the standby.
    driver.accept(WEB);
    assert_eq!(driver.in_flight(primary), 1);
    driver.wait(ms(10));
    driver.take_all(primary);
    assert_eq!(driver.next_from(ClientAddr::Unix), primary);
}

#[test]
fn suspects_are_used_when_no_other_worker_has_room() {
    for policy in [Policy::LeastConnections, Policy::RoundRobin, Policy::Random, Policy::TwoChoices]
    {
        let mut driver = driver_of(policy);
        let slow = [driver.worker(), driver.worker()];
        for _ in 0..20 {
            driver.accept(WEB);
            driver.wait(ms(50));
        }
        assert_eq!(slow.map(|worker| driver.state(worker)), [State::Suspect; 2], "{policy:?}");
        let totals = driver.core.totals();
        assert_eq!((totals.in_flight, totals.queued), (20, 0), "{policy:?}");
        assert_eq!(driver.take_all(slow[0]) + driver.take_all(slow[1]), 20);
        assert_eq!(slow.map(|worker| driver.state(worker)), [State::Active; 2], "{policy:?}");
    }
}

#[test]
fn a_pool_whose_workers_take_nothing_refuses_until_one_takes() {
    let mut driver = driver_of(Policy::LeastConnections);
    let stuck = driver.worker();
    let conn = driver.accept(WEB);
    driver.events();
    driver.wait(ms(9_999));
    assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
    driver.wait(ms(1));
    assert_eq!(driver.core.accepting(WEB), Accepting::Refuse);
    assert_eq!(driver.closed(conn), Some(CloseReason::NoWorker), "what it left is closed too");
    let pool = PoolId(0);
    let events = driver.events();
    assert!(events.contains(&Event::Refusing { pool, closed: 1, unserved: true }), "{events:?}");
    assert_eq!(driver.core.snapshot().pools[0].state, PoolState::Refusing);
    let refused = driver.accept(WEB);
    assert_eq!(driver.closed(refused), Some(CloseReason::NoWorker));
    // It answers the probe, so it gets one client as a trial; the others are refused.
    assert!(driver.answer(stuck));
    driver.turn();
    let tested = driver.accept(WEB);
    let other = driver.accept(WEB);
    assert_eq!((driver.closed(tested), driver.closed(other)), (None, Some(CloseReason::NoWorker)));
    driver.take_all(stuck);
    assert!(driver.is_served(tested));
    assert!(driver.events().contains(&Event::Served { pool }));
    assert_eq!(driver.core.accepting(WEB), Accepting::Yes);
}

#[test]
fn slow_is_not_unserved() {
    let mut driver = driver_with(|pool| {
        pool.handoff_timeout = T;
        pool.wait_for_worker = ms(500);
    });
    let slow = driver.worker();
    for _ in 0..10 {
        let conn = driver.accept(WEB);
        // Its rounds are longer than `wait_for_worker`.
        driver.wait(ms(450));
        driver.take_all(slow);
        assert!(driver.is_served(conn));
    }
    let conn = driver.accept(WEB);
    driver.wait(ms(1_200));
    assert_eq!(driver.closed(conn), None, "within three times what it usually needs");
    driver.wait(ms(200));
    assert_eq!(driver.closed(conn), Some(CloseReason::NoWorker));
}

#[test]
fn a_take_counts_from_when_the_worker_says_it_was() {
    let mut driver = driver_of(Policy::LeastConnections);
    let worker = driver.worker();
    let conn = driver.accept(WEB);
    let ticket = driver.core.tickets(worker).next().unwrap();
    assert_eq!(driver.take(worker), Some(conn));
    let sent = driver.now;
    // The take is noticed 90 ms late; a time before the handoff or in the future is clamped.
    driver.now = sent + ms(90);
    driver.core.slot(driver.now, worker, ticket, SlotState::Taken, sent + ms(3));
    driver.pump();
    let handoff = &driver.core.snapshot().pools[0].handoff;
    assert_eq!((handoff.counts().iter().sum::<u64>(), handoff.sum()), (1, 3_000_000));
}
