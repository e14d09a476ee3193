//! Attempts: their number, order, limits and handlers.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use worker_sdk::connector::{ConnectionLost, Decision, Error, Selection};

use crate::support::*;

fn lost(result: Result<Connection, Error>) -> ConnectionLost {
    match result {
        Err(Error::ConnectionLost(lost)) => lost,
        Err(error) => panic!("{error}"),
        Ok(connection) => panic!("connected to {}", connection.address()),
    }
}

#[test]
fn three_and_two_are_five_attempts_with_their_events_and_outcomes() {
    for flavour in BOTH {
        let servers = [refusing(), refusing(), refusing()];
        let events = Events::default();
        let config = config(list(&servers.each_ref().map(|server| server.address)))
            .max_retries(3)
            .max_retries_alternative(2)
            .on_attempt(events.handler());
        let lost = lost(Client::new(flavour, config).unwrap().connect());
        let events = events.take();
        let expected = [(false, 2), (false, 1), (false, 0), (true, 1), (true, 0)];
        assert_eq!(kinds(&events), expected, "{flavour:?}");
        let tried: Vec<_> = events.iter().map(|event| event.address.clone()).collect();
        assert!(tried[0] == tried[1] && tried[1] == tried[2]);
        assert!(tried[3] != tried[0] && tried[4] != tried[0] && tried[3] != tried[4]);
        assert_eq!(lost.attempts.len(), 5);
        for (outcome, event) in lost.attempts.iter().zip(&events) {
            assert_eq!(outcome.address, event.address);
            assert_eq!(
                (outcome.alternative, outcome.retries_left),
                (event.alternative, event.retries_left)
            );
            assert_eq!(outcome.kind, ErrorKind::ConnectionRefused);
        }
        assert!(!lost.timed_out);
        let text = lost.to_string();
        assert!(text.contains("5 attempts failed") && text.contains("refused"), "{text}");
    }
}

#[test]
fn a_silent_server_costs_the_limit_of_an_attempt_and_then_another_serves() {
    for flavour in BOTH {
        let silent = silent(([127, 0, 0, 1], 0).into());
        let server = Server::start(b'a');
        let limit = Duration::from_millis(100);
        let events = Events::default();
        let config = config(list(&[silent.address, server.address]))
            .selection(Selection::InOrder)
            .max_retries(1)
            .attempt_timeout(limit)
            .on_attempt(events.handler());
        let client = Client::new(flavour, config).unwrap();
        let began = Instant::now();
        let connection = client.connect().unwrap();
        assert!(began.elapsed() >= limit);
        assert_eq!(connection.peer(), server.address, "{flavour:?}");
        assert_eq!(kinds(&events.take()), [(false, 0), (true, 1)]);
        // The silent one is set aside, so the next connect does not try it.
        client.connect().unwrap();
        let events = events.take();
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].address.socket_addr(), Some(server.address));
    }
}

#[test]
fn the_total_limit_ends_the_attempts() {
    for flavour in BOTH {
        let silent = silent(([127, 0, 0, 1], 0).into());
        let config = config(list(&[silent.address]))
            .max_retries(1_000)
            .attempt_timeout(Duration::from_millis(40))
            .total_timeout(Duration::from_millis(200));
        let began = Instant::now();
        let lost = lost(Client::new(flavour, config).unwrap().connect());
        assert!(lost.timed_out && lost.attempts.len() < 10, "{lost}");
        assert!(lost.attempts.iter().all(|outcome| outcome.kind == ErrorKind::TimedOut), "{lost}");
        assert!(began.elapsed() < PATIENCE);
    }
}

#[test]
fn a_handler_may_replace_the_address() {
    for flavour in BOTH {
        let (refuses, server) = (refusing(), Server::start(b'a'));
        let there = server.address;
        let config = config(list(&[refuses.address])).on_attempt(move |attempt| {
            if attempt.alternative {
                attempt.address = there.into();
            }
        });
        let connection = Client::new(flavour, config).unwrap().connect().unwrap();
        assert_eq!(connection.address(), there.to_string(), "{flavour:?}");
    }
}

#[test]
fn the_application_decides_whether_to_try_again() {
    for flavour in BOTH {
        let server: Arc<Mutex<Option<Server>>> = Arc::default();
        let (started, asked) = (Arc::clone(&server), Arc::new(AtomicU32::new(0)));
        let times = Arc::clone(&asked);
        let refuses = refusing();
        let address = refuses.address;
        let place = Mutex::new(Some(refuses));
        let config = config(list(&[address])).on_connection_lost(move |lost| {
            assert_eq!(lost.attempts.len(), 5);
            if times.fetch_add(1, Ordering::SeqCst) == 2 {
                drop(place.lock().unwrap().take());
                *started.lock().unwrap() = Some(Server::start_at(address, b'a'));
            }
            Decision::TryAgain
        });
        Client::new(flavour, config).unwrap().connect().unwrap();
        assert_eq!(asked.load(Ordering::SeqCst), 3, "{flavour:?}");
    }
}

#[test]
fn giving_up_is_an_answer_too() {
    for flavour in BOTH {
        let refuses = refusing();
        let asked = Arc::new(AtomicU32::new(0));
        let times = Arc::clone(&asked);
        let config = config(list(&[refuses.address])).on_connection_lost(move |_| {
            match times.fetch_add(1, Ordering::SeqCst) {
                0 => Decision::TryAgain,
                _ => Decision::GiveUp,
            }
        });
        assert_eq!(lost(Client::new(flavour, config).unwrap().connect()).attempts.len(), 5);
        assert_eq!(asked.load(Ordering::SeqCst), 2, "{flavour:?}");
    }
}

#[test]
fn trying_for_ever_is_an_option() {
    for flavour in BOTH {
        let server: Arc<Mutex<Option<Server>>> = Arc::default();
        let (started, count) = (Arc::clone(&server), AtomicU32::new(0));
        let refuses = refusing();
        let address = refuses.address;
        let place = Mutex::new(Some(refuses));
        let config = config(list(&[address]))
            .retry_forever(true)
            .on_connection_lost(|_| panic!("asked"))
            .on_attempt(move |_| {
                if count.fetch_add(1, Ordering::SeqCst) == 23 {
                    drop(place.lock().unwrap().take());
                    *started.lock().unwrap() = Some(Server::start_at(address, b'a'));
                }
            });
        Client::new(flavour, config).unwrap().connect().unwrap();
    }
}

#[test]
fn a_panic_of_a_handler_leaves_the_connector_usable() {
    let (refuses, server) = (refusing(), Server::start(b'a'));
    let (panics, count) = (AtomicU32::new(0), Arc::new(AtomicU32::new(0)));
    let counted = Arc::clone(&count);
    let config = config(list(&[refuses.address, server.address]))
        .selection(Selection::InOrder)
        .set_aside(Duration::from_nanos(1), Duration::from_nanos(1))
        .on_attempt(move |attempt| {
            counted.fetch_add(1, Ordering::SeqCst);
            // The first attempt after the failure probes.
            if !attempt.alternative && panics.fetch_add(1, Ordering::SeqCst) == 3 {
                panic!("a mistake of the application");
            }
        });
    let client = worker_sdk::connector::Connector::new(config).unwrap();
    client.connect().unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| client.connect()));
    assert!(panicked.is_err());
    let before = count.load(Ordering::SeqCst);
    assert_eq!(client.connect().unwrap().peer(), server.address);
    // The probe that was given up is made now: it fails, and the other server follows.
    assert_eq!(count.load(Ordering::SeqCst) - before, 2);
}

#[test]
fn a_connect_that_is_dropped_is_given_up() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (silent, server) = (silent(([127, 0, 0, 1], 0).into()), Server::start(b'a'));
        let events = Events::default();
        let config = config(list(&[silent.address, server.address]))
            .selection(Selection::InOrder)
            .max_retries(1)
            .attempt_timeout(Duration::from_millis(300))
            .set_aside(Duration::from_nanos(1), Duration::from_nanos(1))
            .on_attempt(events.handler());
        let connector = worker_sdk::connector::tokio::Connector::new(config).unwrap();
        connector.connect().await.unwrap();
        // Its pause is over, so this connect probes the first server. It is dropped in the middle.
        let dropped = tokio::time::timeout(Duration::from_millis(1), connector.connect()).await;
        assert!(dropped.is_err());
        events.take();
        connector.connect().await.unwrap();
        let first = &events.take()[0];
        assert_eq!(first.address.socket_addr(), Some(silent.address), "it is probed again");
    });
}

#[test]
fn threads_and_tasks_share_a_connector() {
    fn shared<T: Send + Sync + Clone + 'static>(value: T) -> T {
        value
    }
    let (refuses, server) = (refusing(), Server::start(b'a'));
    let addresses = [refuses.address, server.address];
    let connector = worker_sdk::connector::Connector::new(config(list(&addresses))).unwrap();
    let connector = shared(connector);
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert_eq!(connector.connect().unwrap().peer(), server.address);
                }
            });
        }
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = config(list(&addresses));
        let connector = shared(worker_sdk::connector::tokio::Connector::new(config).unwrap());
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let connector = connector.clone();
            tasks.spawn(async move { connector.connect().await.unwrap().peer() });
        }
        while let Some(peer) = tasks.join_next().await {
            assert_eq!(peer.unwrap(), server.address);
        }
    });
}
