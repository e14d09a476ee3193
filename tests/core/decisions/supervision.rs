//! Processes the dispatcher keeps running.

use super::*;

const FIRST: ProcessId = ProcessId { pool: PoolId(0), number: 0 };

fn spawns(desk: &mut Desk) -> Vec<u32> {
    desk.log
        .drain(..)
        .filter_map(|effect| match effect {
            Effect::Spawn { process } => Some(process.number),
            _ => None,
        })
        .collect()
}

#[test]
fn all_processes_are_started_before_anything_else() {
    let mut desk = desk_with(|pool| pool.processes = 3);
    assert_eq!(spawns(&mut desk), [0, 1, 2]);
}

#[test]
fn restarts_back_off_to_a_bound_and_recover() {
    let mut desk = desk_with(|pool| {
        pool.processes = 1;
        pool.wait_for_worker = ms(1_000_000_000);
    });
    let mut delays = Vec::new();
    for _ in 0..11 {
        spawns(&mut desk);
        desk.core.spawned(desk.now, FIRST, false);
        desk.pump();
        let delay = desk.core.deadline().unwrap() - desk.now;
        desk.wait(delay - ms(1));
        assert!(spawns(&mut desk).is_empty());
        desk.wait(ms(1));
        assert_eq!(spawns(&mut desk), [0]);
        delays.push(delay.as_millis());
    }
    assert_eq!(delays, [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000]);
    desk.core.spawned(desk.now, FIRST, true);
    desk.wait(RESTART_RESET);
    desk.core.exited(desk.now, FIRST);
    desk.pump();
    assert_eq!(
        desk.events().last(),
        Some(&Event::Restarting { process: FIRST, delay: RESTART_MIN })
    );
}

#[test]
fn no_restarts_while_stopping() {
    let mut desk = desk_with(|pool| pool.processes = 2);
    let second = ProcessId { number: 1, ..FIRST };
    desk.core.spawned(desk.now, FIRST, true);
    desk.core.spawned(desk.now, second, true);
    desk.core.exited(desk.now, FIRST);
    desk.core.stop(desk.now, desk.now + ms(60_000));
    desk.core.exited(desk.now, second);
    spawns(&mut desk);
    desk.wait(ms(50_000));
    assert!(spawns(&mut desk).is_empty());
}

#[test]
fn while_stopping_a_process_is_started_again_for_clients_that_wait_for_it() {
    let mut desk = desk_with(|pool| pool.processes = 1);
    desk.core.spawned(desk.now, FIRST, true);
    desk.accept(WEB);
    desk.core.stop(desk.now, desk.now + ms(60_000));
    desk.core.listener_closed(desk.now, WEB);
    spawns(&mut desk);
    desk.core.exited(desk.now, FIRST);
    desk.wait(RESTART_MIN);
    assert_eq!(spawns(&mut desk), [0]);
    desk.core.spawned(desk.now, FIRST, true);
    let worker = desk.join_as(hello(), Some(FIRST)).unwrap();
    desk.take_all(worker);
    desk.turn();
    // Now nobody waits for it.
    desk.core.exited(desk.now, FIRST);
    desk.wait(RESTART_MAX);
    assert!(spawns(&mut desk).is_empty());
}

#[test]
fn what_they_start_from_has_changed_so_they_are_started_at_once() {
    let mut desk = desk_with(|pool| pool.processes = 2);
    let second = ProcessId { number: 1, ..FIRST };
    desk.core.spawned(desk.now, second, true);
    for _ in 0..8 {
        desk.core.spawned(desk.now, FIRST, false);
        desk.pump();
        desk.wait(desk.core.deadline().unwrap() - desk.now);
    }
    desk.core.spawned(desk.now, FIRST, false);
    desk.wait(RESTART_MIN * 2);
    spawns(&mut desk);
    desk.core.retry_processes(desk.now, PoolId(0));
    desk.pump();
    assert_eq!(spawns(&mut desk), [0], "at once; the one that runs goes on");
    // It may have been started from the old ones: then it does not wait long either.
    desk.core.spawned(desk.now, FIRST, false);
    desk.wait(RESTART_MIN);
    assert_eq!(spawns(&mut desk), [0]);
    // Those that are not wanted stay away.
    desk.core.scale(desk.now, PoolId(0), 1);
    desk.core.exited(desk.now, second);
    desk.core.retry_processes(desk.now, PoolId(0));
    desk.pump();
    assert!(spawns(&mut desk).is_empty());
}

#[test]
fn processes_that_do_not_exist_are_ignored() {
    let mut desk = desk();
    let nobody = ProcessId { pool: PoolId(7), number: 7 };
    desk.core.spawned(desk.now, nobody, true);
    desk.core.exited(desk.now, nobody);
    desk.core.exited(desk.now, FIRST);
}
