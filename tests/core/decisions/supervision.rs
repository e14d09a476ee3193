//! Processes that the dispatcher keeps running.

use super::*;

const FIRST: ProcessId = ProcessId { pool: PoolId(0), number: 0 };

fn spawns(driver: &mut Driver) -> Vec<u32> {
    driver
        .log
        .drain(..)
        .filter_map(|effect| match effect {
            Effect::Spawn { process } => Some(process.number),
            _ => None,
        })
        .collect()
}

#[test]
fn all_processes_are_started_before_anything_else() {
    let mut driver = driver_with(|pool| pool.processes = 3);
    assert_eq!(spawns(&mut driver), [0, 1, 2]);
}

#[test]
fn restarts_back_off_to_a_bound_and_recover() {
    let mut driver = driver_with(|pool| {
        pool.processes = 1;
        pool.wait_for_worker = ms(1_000_000_000);
    });
    let mut delays = Vec::new();
    for _ in 0..11 {
        spawns(&mut driver);
        driver.core.spawned(driver.now, FIRST, false);
        driver.pump();
        let delay = driver.core.deadline().unwrap() - driver.now;
        driver.wait(delay - ms(1));
        assert!(spawns(&mut driver).is_empty());
        driver.wait(ms(1));
        assert_eq!(spawns(&mut driver), [0]);
        delays.push(delay.as_millis());
    }
    assert_eq!(delays, [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000]);
    driver.core.spawned(driver.now, FIRST, true);
    driver.wait(RESTART_RESET);
    driver.core.exited(driver.now, FIRST);
    driver.pump();
    assert_eq!(
        driver.events().last(),
        Some(&Event::Restarting { process: FIRST, delay: RESTART_MIN })
    );
}

#[test]
fn no_restarts_while_stopping() {
    let mut driver = driver_with(|pool| pool.processes = 2);
    let second = ProcessId { number: 1, ..FIRST };
    driver.core.spawned(driver.now, FIRST, true);
    driver.core.spawned(driver.now, second, true);
    driver.core.exited(driver.now, FIRST);
    driver.core.stop(driver.now, driver.now + ms(60_000));
    driver.core.exited(driver.now, second);
    spawns(&mut driver);
    driver.wait(ms(50_000));
    assert!(spawns(&mut driver).is_empty());
}

#[test]
fn a_stopping_pool_restarts_a_process_for_waiting_clients() {
    let mut driver = driver_with(|pool| pool.processes = 1);
    driver.core.spawned(driver.now, FIRST, true);
    driver.accept(WEB);
    driver.core.stop(driver.now, driver.now + ms(60_000));
    driver.core.listener_closed(driver.now, WEB);
    spawns(&mut driver);
    driver.core.exited(driver.now, FIRST);
    driver.wait(RESTART_MIN);
    assert_eq!(spawns(&mut driver), [0]);
    driver.core.spawned(driver.now, FIRST, true);
    let worker = driver.join_as(hello(), Some(FIRST)).unwrap();
    driver.take_all(worker);
    driver.turn();
    // Now no client waits for the process.
    driver.core.exited(driver.now, FIRST);
    driver.wait(RESTART_MAX);
    assert!(spawns(&mut driver).is_empty());
}

#[test]
fn changed_settings_restart_waiting_processes_at_once() {
    let mut driver = driver_with(|pool| pool.processes = 2);
    let second = ProcessId { number: 1, ..FIRST };
    driver.core.spawned(driver.now, second, true);
    for _ in 0..8 {
        driver.core.spawned(driver.now, FIRST, false);
        driver.pump();
        driver.wait(driver.core.deadline().unwrap() - driver.now);
    }
    driver.core.spawned(driver.now, FIRST, false);
    driver.wait(RESTART_MIN * 2);
    spawns(&mut driver);
    driver.core.retry_processes(driver.now, PoolId(0));
    driver.pump();
    assert_eq!(spawns(&mut driver), [0], "at once; the one that runs goes on");
    // The running process may have been started from the old settings: its restart is not delayed
    // either.
    driver.core.spawned(driver.now, FIRST, false);
    driver.wait(RESTART_MIN);
    assert_eq!(spawns(&mut driver), [0]);
    // Surplus processes are not started.
    driver.core.scale(driver.now, PoolId(0), 1);
    driver.core.exited(driver.now, second);
    driver.core.retry_processes(driver.now, PoolId(0));
    driver.pump();
    assert!(spawns(&mut driver).is_empty());
}

#[test]
fn processes_that_do_not_exist_are_ignored() {
    let mut driver = driver();
    let unknown = ProcessId { pool: PoolId(7), number: 7 };
    driver.core.spawned(driver.now, unknown, true);
    driver.core.exited(driver.now, unknown);
    driver.core.exited(driver.now, FIRST);
}
