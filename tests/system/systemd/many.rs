//! Many restarts and many crashes of the dispatcher under load. `RESTARTS=100` sets their number.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::atomic::AtomicU64;

use super::units::{WORKERS, lives, machine_with, pids, spawning};
use super::*;

/// Connections that stay for the whole test.
const HELD: usize = 12;

/// The number of restarts: few in a usual run.
fn restarts() -> u32 {
    std::env::var("RESTARTS").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

/// What short connections have met.
#[derive(Debug, Default)]
struct Tally {
    served: AtomicU64,
    refused: AtomicU64,
    reset: AtomicU64,
}

impl Tally {
    /// Connects, talks and ends, until `over`.
    fn load(&self, machine: &Machine, over: &AtomicBool) {
        while !over.load(Ordering::SeqCst) {
            let stream = match TcpStream::connect(machine.address) {
                Ok(stream) => stream,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
                    self.refused.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
            };
            match Client::greeted(stream) {
                Ok(mut client) => {
                    client.echo("short");
                    client.finish();
                    self.served.fetch_add(1, Ordering::SeqCst);
                }
                Err(error) => {
                    let closed = [ErrorKind::ConnectionReset, ErrorKind::UnexpectedEof];
                    assert!(closed.contains(&error.kind()), "{error}");
                    self.reset.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
    }

    fn counts(&self) -> (u64, u64, u64) {
        let value = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        (value(&self.served), value(&self.refused), value(&self.reset))
    }
}

/// Runs `disturb` again and again under load; returns what the short connections have met.
fn under_load(machine: &Machine, mut disturb: impl FnMut(&mut [Client])) -> (u64, u64, u64) {
    let mut held = clients(machine, HELD);
    let (over, tally) = (AtomicBool::new(false), Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| tally.load(machine, &over));
        }
        for round in 0..restarts() {
            let served = tally.counts().0;
            disturb(&mut held);
            held.iter_mut().for_each(|client| client.echo("still here"));
            wait_until(&format!("service after round {round}"), || tally.counts().0 > served);
        }
        over.store(true, Ordering::SeqCst);
    });
    held.into_iter().for_each(Client::finish);
    tally.counts()
}

#[test]
fn restarts_with_separate_units_lose_nothing() {
    let Some(machine) = serving() else { return };
    let (served, refused, reset) = under_load(&machine, |_| {
        machine.order(&["restart", SERVICE]);
        machine.wait_joined(2);
    });
    eprintln!("{} restarts: {served} served, {refused} refused, {reset} reset", restarts());
    assert_eq!((refused, reset), (0, 0));
    assert_eq!(machine.show("worker@w0.service", "NRestarts"), "0");
}

#[test]
fn restarts_with_workers_that_serve_on_lose_nothing() {
    let Some(machine) = machine_with(WORKERS, &spawning("serve")) else { return };
    machine.order(&["start", WORKERS]);
    let before: BTreeSet<i32> = pids(&machine).into_iter().collect();
    let (served, refused, reset) = under_load(&machine, |_| {
        machine.order(&["restart", WORKERS]);
        assert_eq!(pids(&machine).into_iter().collect::<BTreeSet<_>>(), before);
    });
    eprintln!("{} restarts: {served} served, {refused} refused, {reset} reset", restarts());
    assert_eq!((refused, reset), (0, 0));
    machine.order(&["stop", SOCKETS[0], SOCKETS[1], WORKERS]);
    assert!(!before.iter().any(|&pid| lives(&machine, pid)));
}

/// A killed dispatcher takes with it what it has accepted and not sent.
#[test]
fn crashes_under_load_cost_only_what_was_not_sent() {
    let Some(machine) = machine_with(WORKERS, &spawning("serve")) else { return };
    machine.order(&["start", WORKERS]);
    let before: BTreeSet<i32> = pids(&machine).into_iter().collect();
    let mut crashes = 0;
    let (served, refused, reset) = under_load(&machine, |_| {
        machine.order(&["kill", "--signal=KILL", "--kill-who=main", WORKERS]);
        crashes += 1;
        wait_until("it to be back", || {
            machine.show(WORKERS, "NRestarts") == crashes.to_string()
                && machine.state(WORKERS) == "active"
        });
        // Never more than the wanted ones, and always the same.
        assert_eq!(pids(&machine).into_iter().collect::<BTreeSet<_>>(), before);
        let status = machine.status().expect("it runs");
        let processes = pool(&status, "web").processes.as_ref().expect("it starts processes");
        assert_eq!((processes.wanted, processes.leaving), (2, 0));
    });
    eprintln!("{} crashes: {served} served, {refused} refused, {reset} reset", restarts());
    assert_eq!(refused, 0);
    // Each of the four clients has at most one connection.
    assert!(reset <= u64::from(4 * restarts()), "{reset}");
    assert!(served > u64::from(restarts()));
    machine.order(&["stop", SOCKETS[0], SOCKETS[1], WORKERS]);
    assert!(!before.iter().any(|&pid| lives(&machine, pid)));
}
