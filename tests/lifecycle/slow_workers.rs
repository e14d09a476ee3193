//! Correct but slow workers beside blocked ones: every client is served, few connections move, and
//! trust is stable.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use test_support::*;

/// Slow workers and their clients.
#[derive(Clone, Copy)]
struct Case {
    /// The kind of worker. All threads of `serial` and `blocking` can be busy; an event loop always
    /// continues.
    flavour: &'static str,
    count: usize,
    /// The duration of a round, of the service of one client, or of the pause after an accept, in
    /// milliseconds.
    pause: u64,
    clients: u64,
    /// The time between two clients.
    every: Duration,
    /// Whether workers that never take a connection are present.
    stuck: bool,
}

/// 2 and 8 workers of 50 and 320 ms, with as many clients as they can serve.
fn cases(flavour: &'static str) -> [Case; 4] {
    [(2, 50), (2, 320), (8, 50), (8, 320)].map(|(count, pause)| {
        let one_by_one = matches!(flavour, "serial" | "blocking");
        let (clients, every) = match one_by_one && pause * 20 > 1_000 * count as u64 {
            true => (20, 250),
            false => (60, 50),
        };
        let every = Duration::from_millis(every);
        Case { flavour, count, pause, clients, every, stuck: false }
    })
}

/// All cases at the same time: they wait more than they work.
fn all_are_served(cases: &[Case]) {
    thread::scope(|scope| {
        cases.iter().for_each(|case| drop(scope.spawn(|| case.are_served())));
    });
}

impl Case {
    /// Serves each client to its end; returns how long each waited for its greeting.
    fn waits(self, address: SocketAddr) -> Vec<Duration> {
        let visits: Vec<_> = (0..self.clients)
            .map(|_| {
                thread::sleep(self.every);
                thread::spawn(move || {
                    let began = Instant::now();
                    let client = Client::connect(address).expect("every client is served");
                    let waited = began.elapsed();
                    client.finish();
                    waited
                })
            })
            .collect();
        visits.into_iter().map(|visit| visit.join().unwrap()).collect()
    }

    fn are_served(self) {
        let Case { flavour, count, pause, clients, stuck, .. } = self;
        let dispatcher = Dispatcher::start(&one_pool(""));
        let mut workers = if stuck { self::stuck(&dispatcher) } else { Vec::new() };
        let milliseconds = pause.to_string();
        let environment = [("TEST_WORKER_PAUSE", milliseconds.as_str())];
        workers
            .extend((0..count).map(|n| {
                dispatcher.worker_with(flavour, "web", &format!("slow{n}"), &environment)
            }));
        dispatcher.wait_joined("web", workers.len());
        let mut waits = self.waits(dispatcher.address("web"));
        waits.sort();
        // For information only: no check depends on the time.
        let (median, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
        let what = format!("{flavour}, {count} of {pause} ms, stuck ones beside them: {stuck}");
        println!("{what}: half waited {median:?}, the longest {longest:?}");
        let status = dispatcher.wait_status("all to be taken", |status| status.taken == clients);
        let shown = pool(&status, "web");
        // An idle thread of another worker is reason enough to move a connection; for event loops
        // only a stop is. A worker that takes nothing gets a trial once in a second.
        let moves = match flavour {
            "serial" | "blocking" => clients,
            _ => clients / 3,
        };
        let tests = if stuck { clients } else { 0 };
        assert!(shown.revoked <= moves + tests, "{what}: {} moves", shown.revoked);
        // On a busy machine a worker may really stop for a moment; its trust must not alternate.
        let most = 2 * count as u64 + 30 * u64::from(stuck);
        assert!(shown.suspects <= most, "{what}: suspect {} times", shown.suspects);
        for name in ["silent", "stuck0", "stuck1", "stuck2"] {
            let Some(stuck) = worker(&status, name) else { continue };
            assert_eq!((stuck.taken, stuck.load, stuck.proven), (0, 0, false), "{what}: {name}");
        }
    }
}

/// One worker that answers nothing, and three that answer probes and take nothing.
fn stuck(dispatcher: &Dispatcher) -> Vec<Process> {
    let never = [("TEST_WORKER", "never-take")];
    let answers = [("TEST_WORKER", "only-answer")];
    let mut all = vec![dispatcher.worker_with("blocking", "web", "silent", &never)];
    all.extend(
        (0..3).map(|n| dispatcher.worker_with("mio", "web", &format!("stuck{n}"), &answers)),
    );
    all
}

#[test]
fn slow_mio_loops() {
    all_are_served(&cases("mio"));
}

#[test]
fn slow_tokio_loops() {
    all_are_served(&cases("tokio"));
}

#[test]
fn slow_serial_workers() {
    all_are_served(&cases("serial"));
}

#[test]
fn slow_blocking_acceptors() {
    all_are_served(&cases("blocking"));
}

#[test]
fn stuck_workers_beside_slow_ones() {
    let each = ["mio", "tokio", "serial", "blocking"];
    let chosen = |(n, flavour): (usize, &'static str)| Case { stuck: true, ..cases(flavour)[n] };
    let beside: Vec<Case> = each.into_iter().enumerate().map(chosen).collect();
    all_are_served(&beside);
}

#[test]
fn a_pool_that_is_not_served_refuses_until_it_is() {
    let dispatcher = Dispatcher::start(&one_pool("wait_for_worker = \"1s\""));
    let address = dispatcher.address("web");
    let answers = [("TEST_WORKER", "only-answer")];
    let _stuck = dispatcher.worker_with("mio", "web", "stuck", &answers);
    dispatcher.wait_joined("web", 1);
    // The client waits, and is turned away with all later clients.
    assert!(Client::connect(address).is_err());
    dispatcher.wait_status("refusal", |status| pool(status, "web").state == "refusing");
    let (code, _) = http_get(&dispatcher.dir.join("admin.sock"), "/readyz").unwrap();
    assert_eq!(code, 503);
    wait_for_log(&dispatcher, "event=refusing pool=web");
    let _good = dispatcher.worker("tokio", "web", "good");
    dispatcher.wait_status("service", |_| Client::connect(address).is_ok());
    dispatcher.wait_status("readiness", |_| {
        http_get(&dispatcher.dir.join("admin.sock"), "/readyz").is_ok_and(|(code, _)| code == 200)
    });
}
