//! Limits of time, and shortages of the client's own machine.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use worker_sdk::connector::{Addresses, Connector, Error, Selection, tokio as for_tokio};

use crate::support::*;

/// A server that keeps each connection open, and sends a byte at each of these intervals, or none.
struct Dripping {
    address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Dripping {
    fn start(interval: Option<Duration>) -> Dripping {
        Dripping::on(TcpListener::bind("127.0.0.1:0").unwrap(), interval)
    }

    fn on(listener: TcpListener, interval: Option<Duration>) -> Dripping {
        let address = listener.local_addr().unwrap();
        let (accepted, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, stopped) = (Arc::clone(&accepted), Arc::clone(&stop));
        thread::spawn(move || {
            for mut stream in listener.incoming().map(Result::unwrap) {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                count.fetch_add(1, Ordering::SeqCst);
                thread::spawn(move || match interval {
                    Some(interval) => {
                        while stream.write_all(b"x").is_ok() {
                            thread::sleep(interval);
                        }
                    }
                    // Until the client has gone.
                    None => drop(std::io::copy(&mut stream, &mut std::io::sink())),
                });
            }
        });
        Dripping { address, accepted, stop }
    }
}

impl Drop for Dripping {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

/// Every read of these handlers is answered in time, or has no limit: only the end of the attempt
/// ends them.
#[test]
fn a_handler_that_blocks_ends_with_the_attempt() {
    type Handler = fn(&mut TcpStream) -> std::io::Result<()>;
    let byte_by_byte: Handler = |stream| {
        let mut byte = [0];
        while byte != *b"a" {
            stream.read_exact(&mut byte)?;
        }
        Ok(())
    };
    let without_limit: Handler = |stream| {
        stream.set_read_timeout(None)?;
        stream.read_exact(&mut [0])
    };
    let without_error: Handler = |stream| {
        stream.set_read_timeout(None)?;
        let _ = stream.read(&mut [0]);
        Ok(())
    };
    let on_a_copy: Handler = |stream| {
        let mut copy = stream.try_clone()?;
        copy.set_read_timeout(None)?;
        copy.read_exact(&mut [0])
    };
    let drips = Some(Duration::from_millis(10));
    let cases =
        [(byte_by_byte, drips), (without_limit, None), (without_error, None), (on_a_copy, None)];
    for (handler, interval) in cases {
        for reconnects in [false, true] {
            let (hangs, serves) = (Dripping::start(interval), Server::start(b'a'));
            let limit = Duration::from_millis(300);
            let outcomes = Arc::new(Mutex::new(Vec::new()));
            let noted = Arc::clone(&outcomes);
            let config = config(list(&[hangs.address, serves.address]))
                .selection(Selection::InOrder)
                .max_retries(1)
                .max_retries_alternative(0)
                .attempt_timeout(limit)
                .set_aside(PATIENCE, PATIENCE)
                .on_connection_lost(move |lost| {
                    noted.lock().unwrap().extend(lost.attempts.clone());
                    worker_sdk::connector::Decision::TryAgain
                });
            let connector = Connector::new(config).unwrap();
            let began = Instant::now();
            let connection = if reconnects {
                let connector = connector.on_reconnect(handler);
                connector.reconnect(&hangs.address.into(), hangs.address).unwrap()
            } else {
                connector.on_connect(handler).connect().unwrap()
            };
            assert!(began.elapsed() >= limit);
            assert_eq!(connection.peer(), serves.address);
            let outcomes = outcomes.lock().unwrap();
            assert_eq!(outcomes.len(), 1, "{outcomes:?}");
            assert_eq!(outcomes[0].kind, ErrorKind::TimedOut, "{outcomes:?}");
            assert_eq!(outcomes[0].address, hangs.address.into());
            // The limits of the attempt do not stay.
            assert_eq!(connection.stream().read_timeout().unwrap(), None);
        }
    }
}

/// Waits until `condition` holds for the number.
fn wait_for(
    (number, changed): &(Mutex<usize>, Condvar),
    condition: impl Fn(usize) -> bool,
) -> usize {
    let number = number.lock().unwrap();
    let (number, waited) =
        changed.wait_timeout_while(number, PATIENCE, |number| !condition(*number)).unwrap();
    assert!(!waited.timed_out(), "{number}");
    *number
}

fn add((number, changed): &(Mutex<usize>, Condvar)) {
    *number.lock().unwrap() += 1;
    changed.notify_all();
}

#[test]
fn more_look_ups_than_may_be_under_way_wait_for_each_other() {
    const CONNECTS: usize = 200;
    for flavour in BOTH {
        let server = Server::start(b'a');
        let there = server.address;
        let begun: Arc<(Mutex<usize>, Condvar)> = Arc::default();
        let (announced, waited) = (Arc::clone(&begun), Arc::clone(&begun));
        let config = config(Addresses::list(["service.example:80"]).unwrap())
            .max_retries(1)
            .max_retries_alternative(0)
            .set_aside(PATIENCE, PATIENCE)
            .on_attempt(move |_| add(&announced))
            .resolver(move |_, _| {
                // No look-up ends before all connects have begun.
                wait_for(&waited, |number| number >= CONNECTS);
                Ok(vec![there])
            });
        match flavour {
            Flavour::Blocking => {
                let connector = Connector::new(config).unwrap();
                let connect = || connector.connect().unwrap().peer();
                thread::scope(|scope| {
                    let all: Vec<_> = (0..CONNECTS).map(|_| scope.spawn(connect)).collect();
                    all.into_iter().for_each(|one| assert_eq!(one.join().unwrap(), there));
                });
            }
            Flavour::Tokio => {
                let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
                runtime.unwrap().block_on(async {
                    let connector = for_tokio::Connector::new(config).unwrap();
                    let mut tasks = tokio::task::JoinSet::new();
                    for _ in 0..CONNECTS {
                        let connector = connector.clone();
                        tasks.spawn(async move { connector.connect().await.unwrap().peer() });
                    }
                    while let Some(peer) = tasks.join_next().await {
                        assert_eq!(peer.unwrap(), there);
                    }
                });
            }
        }
    }
}

/// One server of two behind a name accepts again, and does not serve yet.
#[test]
fn one_attempt_at_a_time_probes_a_server_behind_a_name() {
    const CONNECTS: usize = 20;
    let (down, serves) = (refusing(), Server::start(b'a'));
    let addresses = vec![down.address, serves.address];
    let config = config(Addresses::list(["service.example:80"]).unwrap())
        .set_aside(Duration::from_nanos(1), Duration::from_nanos(1))
        .resolver(move |_, _| Ok(addresses.clone()));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        use tokio::io::AsyncReadExt;
        let connector = for_tokio::Connector::new(config).unwrap();
        let connector = connector.on_connect(|mut stream| async move {
            stream.read_u8().await?;
            Ok(stream)
        });
        // Each connect begins with another one of them.
        for _ in 0..10 {
            assert_eq!(connector.connect().await.unwrap().peer(), serves.address);
        }
        let hangs = Dripping::on(down.listen(), None);
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..CONNECTS {
            let connector = connector.clone();
            tasks.spawn(async move { connector.connect().await.unwrap().peer() });
        }
        for _ in 0..CONNECTS - 1 {
            let joined = tokio::time::timeout(PATIENCE / 2, tasks.join_next()).await;
            assert_eq!(joined.expect("a connect").unwrap().unwrap(), serves.address);
        }
        assert!(hangs.accepted.load(Ordering::SeqCst) <= 1, "several probes at the same time");
        // A connect that is given up leaves the probe to another one.
        tasks.shutdown().await;
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..CONNECTS {
            let connector = connector.clone();
            tasks.spawn(async move { connector.connect().await.unwrap().peer() });
        }
        for _ in 0..CONNECTS - 1 {
            let joined = tokio::time::timeout(PATIENCE / 2, tasks.join_next()).await;
            assert_eq!(joined.expect("a connect").unwrap().unwrap(), serves.address);
        }
        let limit = Instant::now() + PATIENCE;
        while hangs.accepted.load(Ordering::SeqCst) < 2 {
            assert!(Instant::now() < limit, "it is not probed again");
            tokio::task::yield_now().await;
        }
        assert_eq!(hangs.accepted.load(Ordering::SeqCst), 2);
    });
}

#[test]
fn the_question_for_advice_leaves_time_for_attempts() {
    for flavour in BOTH {
        // Each takes its time limit, which is longer than that of all attempts together.
        let hosts = [(); 3].map(|()| Dripping::start(None));
        let server = Server::start(b'a');
        let addresses =
            Addresses::advice(hosts.each_ref().map(|host| host.address.to_string()), "web");
        let addresses = addresses.unwrap().or_list([server.address.to_string()]).unwrap();
        for selection in [Selection::RoundRobin, Selection::Best] {
            let config = config(addresses.clone())
                .selection(selection)
                .advice_timeout(PATIENCE)
                .total_timeout(Duration::from_secs(4));
            let client = Client::new(flavour, config).unwrap();
            let connected = client.connect().map(|connection| connection.peer());
            assert_eq!(connected, Ok(server.address), "{flavour:?} {selection:?}");
        }
    }
}

/// The handler of an event may take longer than all attempts may: the address has not failed.
#[test]
fn an_attempt_without_time_is_not_made() {
    for flavour in BOTH {
        let server = Server::start(b'a');
        let limit = Duration::from_millis(100);
        let config = config(list(&[server.address])).total_timeout(limit).on_attempt(move |_| {
            let began = Instant::now();
            while began.elapsed() <= limit {
                thread::sleep(limit);
            }
        });
        let client = Client::new(flavour, config).unwrap();
        let Err(Error::ConnectionLost(lost)) = client.connect() else { panic!("connected") };
        assert!(lost.timed_out && lost.attempts.is_empty(), "{flavour:?}: {lost:?}");
    }
}
