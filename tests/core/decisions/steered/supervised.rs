//! Processes of a steered pool: they know nothing of the dispatcher.

use super::*;

fn pool_of(processes: u32) -> Lab {
    lab_with(|pool| pool.processes = processes)
}

impl Lab {
    /// Every process that was to be started runs and listens.
    fn serve(&mut self) -> Vec<(ProcessId, WorkerId)> {
        let starts = std::mem::take(&mut self.starts);
        starts.into_iter().map(|process| (process, self.serves(process))).collect()
    }

    fn serves(&mut self, process: ProcessId) -> WorkerId {
        self.core.spawned(self.now, process, true);
        self.try_join(|join| {
            join.name = format!("web-{}", process.place + 1);
            join.process = Some(process);
        })
        .unwrap()
    }

    fn ends(&mut self, process: ProcessId, worker: Option<WorkerId>) {
        if let Some(worker) = worker {
            self.core.leave(self.now, worker, Departure::Died);
        }
        self.core.exited(self.now, process);
        self.pump();
    }
}

#[test]
fn a_process_that_dies_is_started_again() {
    let mut lab = pool_of(2);
    let served = lab.serve();
    assert_eq!(served.len(), 2);
    let (process, worker) = served[0];
    lab.counts(worker, counts(3, 3, 0));
    lab.ends(process, Some(worker));
    assert!(lab.events.iter().any(|event| {
        matches!(event, Event::Gone { why: Departure::Died, live: 3, resent: 0, .. })
    }));
    lab.wait(RESTART_MIN);
    let again = lab.serve();
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].0.place, process.place);
    assert_eq!(lab.core.worker_name(again[0].1), "web-1", "its successor has its name");
}

#[test]
fn a_process_that_closes_its_listener_is_replaced_and_drained() {
    let mut lab = pool_of(1);
    let (process, worker) = lab.serve()[0];
    lab.counts(worker, counts(1, 1, 0));
    lab.core.steer_closed(lab.now, worker);
    lab.wait(RESTART_MIN);
    assert!(lab.told(worker).draining);
    assert_eq!(lab.starts.len(), 1, "without waiting for its last connection");
    lab.serve();
    lab.idle(worker, ms(20_000));
    assert!(lab.stops.is_empty(), "it has a connection, and there is no drain_timeout");
    lab.counts(worker, counts(0, 1, 0));
    lab.idle(worker, ms(1_700));
    assert_eq!(lab.stops, [process]);
}

#[test]
fn a_surplus_process_without_connections_is_ended_after_a_second() {
    let mut lab = pool_of(2);
    let served = lab.serve();
    let (process, worker) = served[1];
    lab.counts(worker, counts(1, 1, 0));
    lab.core.scale(lab.now, PoolId(0), 1);
    lab.pump();
    assert!(lab.told(worker).draining && !lab.told(served[0].1).draining);
    lab.idle(worker, ms(30_000));
    assert!(lab.stops.is_empty(), "it has a connection");
    lab.counts(worker, counts(0, 1, 0));
    lab.idle(worker, ms(900));
    assert!(lab.stops.is_empty());
    lab.idle(worker, ms(800));
    assert_eq!(lab.stops, [process]);
}

#[test]
fn a_native_process_has_its_stop_timeout() {
    let mut lab = lab_with(|pool| (pool.processes, pool.steered) = (1, false));
    let process = lab.starts.remove(0);
    lab.core.spawned(lab.now, process, true);
    let join = Join { pid: 5, uid: 0, gids: vec![0], hello: hello(), spawned: Some(process) };
    lab.core.join(lab.now, &join).unwrap();
    lab.core.scale(lab.now, PoolId(0), 0);
    let mut stopped = None;
    for step in 0..200_u64 {
        lab.now = lab.now + ms(100);
        lab.core.tick(lab.now);
        while let Some(effect) = lab.core.effect() {
            if matches!(effect, Effect::StopProcess { .. }) {
                stopped.get_or_insert(step);
            }
        }
    }
    let timeout = settings().supervision.stop_timeout.as_millis() as u64 / 100;
    assert!(stopped.is_some_and(|step| step + 1 >= timeout), "{stopped:?}");
}

#[test]
fn a_drain_timeout_ends_a_process_that_keeps_its_connections() {
    let mut lab = lab_with(|pool| {
        pool.processes = 1;
        pool.supervision.drain_timeout = Some(ms(5_000));
    });
    let (process, worker) = lab.serve()[0];
    lab.counts(worker, counts(1, 1, 0));
    lab.core.steer_closed(lab.now, worker);
    lab.idle(worker, ms(5_800));
    assert!(lab.stops.is_empty());
    lab.idle(worker, ms(400));
    assert_eq!(lab.stops, [process]);
}

#[test]
fn a_surplus_process_that_listens_late_gets_nothing() {
    let mut lab = pool_of(1);
    let process = lab.starts.remove(0);
    lab.core.spawned(lab.now, process, true);
    lab.core.scale(lab.now, PoolId(0), 0);
    lab.pump();
    lab.steers.clear();
    let worker = lab.try_join(|join| join.process = Some(process)).unwrap();
    assert!(lab.steers.iter().all(|(of, it)| *of == worker && it.draining), "{:?}", lab.steers);
}

#[test]
fn a_process_that_is_checked_first_gets_nothing_before() {
    let mut lab = lab_with(|pool| {
        pool.processes = 1;
        pool.supervision.ready_check = true;
    });
    let (_, first) = lab.serve()[0];
    lab.core.roll(lab.now, PoolId(0), false).unwrap();
    lab.wait(ms(10));
    lab.steers.clear();
    let served = lab.serve();
    assert_eq!(served.len(), 1, "the one that replaces it");
    let (_, second) = served[0];
    assert_eq!(lab.steers.len(), 1);
    assert!(lab.told(second).draining, "its check is under way");
    assert!(!lab.told(first).draining);
}

#[test]
fn a_process_that_hangs_is_replaced() {
    let mut lab = lab_with(|pool| {
        pool.processes = 1;
        pool.supervision.kill_hung_after = Some(ms(2_000));
    });
    let (process, worker) = lab.serve()[0];
    lab.counts(worker, counts(1, 1, 1));
    lab.idle(worker, ms(3_000));
    assert_eq!(lab.state(worker), State::Suspect);
    lab.idle(worker, ms(400));
    assert_eq!(lab.stops, [process]);
    let hung =
        |event: &Event| matches!(event, Event::ProcessStopped { reason: EndReason::Hung, .. });
    assert!(lab.events.iter().any(hung));
}

#[test]
fn a_removed_pool_ends_its_processes() {
    let mut lab = pool_of(1);
    let (process, worker) = lab.serve()[0];
    lab.core.retire_listener(WEB);
    lab.core.retire_pool(lab.now, PoolId(0));
    lab.core.listener_closed(lab.now, WEB);
    lab.wait(ms(10));
    assert!(lab.told(worker).draining);
    lab.idle(worker, ms(1_700));
    assert_eq!(lab.stops, [process]);
    lab.ends(process, Some(worker));
    assert!(lab.starts.is_empty());
}
