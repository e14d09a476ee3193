//! Workers join, leave, hang, die and return; a dispatcher dies and returns. No untaken connection
//! is lost.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod outages;
mod stopping;

use std::io::Read;
use std::net::TcpStream;

use nix::sys::signal::Signal;
use test_support::*;

const PATIENT: &str = r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
handoff_timeout = "10m"
"#;

const QUICK: &str = r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
handoff_timeout = "100ms"
"#;

fn greeted(streams: Vec<TcpStream>) -> Vec<Client> {
    streams.into_iter().map(|stream| Client::greeted(stream).unwrap()).collect()
}

#[test]
fn a_worker_joins_and_leaves() {
    // A connection that moves because the machine is busy would change its worker.
    let dispatcher = Dispatcher::start(&one_pool("handoff_timeout = \"30s\"\n"));
    let address = dispatcher.address("web");
    let _first = dispatcher.worker("blocking", "web", "first");
    dispatcher.wait_joined("web", 1);
    let clients: Vec<Client> = (0..10).map(|_| Client::connect(address).unwrap()).collect();
    assert_eq!(tally(&clients)["first"], 10);

    // A new worker gets every connection until the loads are equal.
    let mut second = dispatcher.worker("blocking", "web", "second");
    dispatcher.wait_joined("web", 2);
    let mut more = vec![Client::connect(address).unwrap()];
    // It is trusted when the dispatcher has seen its first take, which is after the client has.
    dispatcher.wait_status("its first take", |status| {
        worker(status, "second").is_some_and(|w| w.taken == 1)
    });
    more.extend((0..9).map(|_| Client::connect(address).unwrap()));
    assert_eq!(tally(&more)["second"], 10);

    // It says goodbye: its connections stay, and new ones go to the other worker.
    second.signal(Signal::SIGTERM);
    dispatcher.wait_status("the second to drain", |status| {
        worker(status, "second").is_some_and(|w| w.state == "draining")
    });
    let mut rest: Vec<Client> = (0..5).map(|_| Client::connect(address).unwrap()).collect();
    assert_eq!(tally(&rest)["first"], 5);
    rest.extend(more);
    for client in &mut rest {
        client.echo("still here");
    }
    drop(rest);
    assert!(second.wait().success());
    dispatcher.wait_status("the second to be gone", |status| worker(status, "second").is_none());
    wait_for_log(&dispatcher, "event=worker_goodbye");
    wait_for_log(&dispatcher, "event=worker_gone");
}

#[test]
fn live_connections_are_counted_after_a_restart() {
    for flavour in ["blocking", "tokio", "mio"] {
        let temp = configure(PATIENT);
        let mut dispatcher = Dispatcher::start_in(temp.path());
        let _workers = dispatcher.workers(flavour, "web", 2);
        let address = dispatcher.address("web");
        let mut clients: Vec<Client> = (0..10).map(|_| Client::connect(address).unwrap()).collect();
        assert_eq!(tally(&clients)["w0"], 5);
        // Three connections of the first worker end before the dispatcher does, two while it is
        // away.
        let (mut of_first, mut others): (Vec<_>, Vec<_>) =
            clients.drain(..).partition(|client| client.served_by == "w0");
        of_first.drain(..3).for_each(Client::finish);
        dispatcher.process.kill();
        for client in of_first.iter_mut().chain(&mut others) {
            client.echo("without a dispatcher");
        }
        of_first.pop().unwrap().finish();
        others.pop().unwrap().finish();

        let again = Dispatcher::start_in(temp.path());
        again.wait_joined("web", 2);
        let status = again.status();
        let seen = |name| {
            let w = worker(&status, name).unwrap();
            (w.base, w.finished, w.load)
        };
        assert_eq!((seen("w0"), seen("w1")), ((5, 4, 1), (5, 1, 4)), "{flavour}");
        // From the first decision on: three to the worker with fewer connections, then in turn.
        let address = again.address("web");
        let new: Vec<Client> = (0..3).map(|_| Client::connect(address).unwrap()).collect();
        assert_eq!(tally(&new)["w0"], 3, "{flavour}");
        let pair: Vec<Client> = (0..2).map(|_| Client::connect(address).unwrap()).collect();
        assert_eq!(tally(&pair).len(), 2, "{flavour}");
    }
}

#[test]
fn a_killed_worker_loses_nothing_it_had_not_taken() {
    for flavour in ["blocking", "tokio", "mio"] {
        let dispatcher = Dispatcher::start(PATIENT);
        let mut workers = dispatcher.workers(flavour, "web", 2);
        let address = dispatcher.address("web");
        dispatcher.prove_all(address);
        let before = dispatcher.status().taken;
        workers[0].signal(Signal::SIGSTOP);
        let streams: Vec<TcpStream> = (0..400).map(|_| connect(address)).collect();
        // An event loop has half of them. A worker that reports one waiting thread has one.
        let least = if flavour == "blocking" { 1 } else { 200 };
        let status = dispatcher.wait_status("all are sent", |status| {
            let (stopped, other) = (worker(status, "w0").unwrap(), worker(status, "w1").unwrap());
            stopped.in_flight >= least
                && other.in_flight == 0
                && status.taken + stopped.in_flight == before + 400
        });
        let untaken = worker(&status, "w0").unwrap().in_flight;
        workers[0].kill();
        let mut clients = greeted(streams);
        assert_eq!(tally(&clients)["w1"], 400, "{flavour}");
        clients.iter_mut().for_each(|client| client.echo("intact"));
        // The FIN arrives too: no copy is left open.
        clients.into_iter().for_each(Client::finish);
        wait_for_log(&dispatcher, &format!("resent={untaken} live=0"));
        let status = dispatcher.status();
        assert_eq!((status.taken, status.in_flight, status.queued), (before + 400, 0, 0));
    }
}

#[test]
fn a_hung_worker_costs_nobody_more_than_the_timeout() {
    for flavour in ["blocking", "tokio", "mio"] {
        let dispatcher = Dispatcher::start(QUICK);
        let workers = dispatcher.workers(flavour, "web", 4);
        let address = dispatcher.address("web");
        dispatcher.prove_all(address);
        let before = dispatcher.status().taken;
        workers[2].signal(Signal::SIGSTOP);
        // All are served while the worker is still stopped.
        let start = std::time::Instant::now();
        let streams: Vec<TcpStream> = (0..100).map(|_| connect(address)).collect();
        let clients = greeted(streams);
        // For information only: no check depends on the time.
        println!("{flavour}: the last of 100 was served after {:?}", start.elapsed());
        assert!(!tally(&clients).contains_key("w2"), "{flavour}");
        let status = dispatcher.status();
        let hung = worker(&status, "w2").unwrap();
        assert_eq!((hung.state.as_str(), hung.in_flight, hung.load), ("suspect", 0, 0));
        assert!(hung.revoked > 0);
        clients.into_iter().for_each(Client::finish);

        workers[2].signal(Signal::SIGCONT);
        // Trust returns with the connections it takes.
        let mut again = Vec::new();
        dispatcher.wait_status("it to be trusted again", |status| {
            again.push(Client::connect(address).unwrap());
            worker(status, "w2").unwrap().state == "active"
        });
        assert!(tally(&again)["w2"] > 0, "{flavour}");
        wait_for_log(&dispatcher, "event=worker_suspect");
        wait_for_log(&dispatcher, "event=worker_trusted");
        let status = dispatcher.status();
        assert_eq!(status.taken, before + 100 + again.len() as u64, "each exactly once");
    }
}

#[test]
fn goodbye_gives_back_what_is_untaken() {
    let dispatcher = Dispatcher::start(PATIENT);
    // It joins and never takes a connection.
    let lazy = dispatcher.worker_with("blocking", "web", "lazy", &[("TEST_WORKER", "never-take")]);
    dispatcher.wait_joined("web", 1);
    let address = dispatcher.address("web");
    let streams: Vec<TcpStream> = (0..50).map(|_| connect(address)).collect();
    dispatcher.wait_status("50 in flight", |status| status.in_flight == 50);
    let _other = dispatcher.worker("blocking", "web", "other");
    dispatcher.wait_joined("web", 2);
    lazy.signal(Signal::SIGTERM);
    let clients = greeted(streams);
    assert_eq!(tally(&clients)["other"], 50);
    clients.into_iter().for_each(Client::finish);
}

#[test]
fn with_nobody_there_clients_wait_and_are_served() {
    let dispatcher = Dispatcher::start(PATIENT);
    let address = dispatcher.address("web");
    let streams: Vec<TcpStream> = (0..20).map(|_| connect(address)).collect();
    assert_eq!(dispatcher.status().accepted, 0, "they wait in the kernel's queue");
    let _worker = dispatcher.worker("tokio", "web", "late");
    assert_eq!(tally(&greeted(streams))["late"], 20);
}

#[test]
fn with_nobody_there_for_too_long_clients_are_told() {
    let temp = configure(
        r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
wait_for_worker = "50ms"
unavailable_response = "DIR/busy.txt"
"#,
    );
    std::fs::write(temp.path().join("busy.txt"), "come back later\n").unwrap();
    let dispatcher = Dispatcher::start_in(temp.path());
    let address = dispatcher.address("web");
    let mut text = String::new();
    connect(address).read_to_string(&mut text).unwrap();
    assert_eq!(text, "come back later\n");
    let status = dispatcher.status();
    assert_eq!((status.closed["no_worker"], status.pools[0].state.as_str()), (1, "refusing"));
    // One worker is enough to accept again.
    let _worker = dispatcher.worker("blocking", "web", "saviour");
    dispatcher.wait_joined("web", 1);
    assert_eq!(Client::connect(address).unwrap().served_by, "saviour");
}

#[test]
fn full_workers_make_clients_wait_and_one_close_lets_one_in() {
    let dispatcher = Dispatcher::start(
        r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
max_connections_per_worker = 2
wait_for_worker = "50ms"
"#,
    );
    let _workers = dispatcher.workers("blocking", "web", 2);
    let address = dispatcher.address("web");
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    let waiting = connect(address);
    let status =
        dispatcher.wait_status("back-pressure", |s| pool(s, "web").state == "back-pressure");
    // Back-pressure is not "no worker": the timeout does not run, and no client is refused.
    assert_eq!((status.closed["no_worker"], loads(&status, "web").0), (0, vec![2, 2]));
    let freed = clients.pop().unwrap();
    let name = freed.served_by.clone();
    freed.finish();
    assert_eq!(Client::greeted(waiting).unwrap().served_by, name);
}

#[test]
fn sigterm_ends_the_dispatcher_and_no_connection() {
    let mut dispatcher = Dispatcher::start(PATIENT);
    let _workers = dispatcher.workers("tokio", "web", 2);
    let address = dispatcher.address("web");
    let mut clients: Vec<Client> = (0..20).map(|_| Client::connect(address).unwrap()).collect();
    assert!(dispatcher.stop().success());
    clients.iter_mut().for_each(|client| client.echo("after the end"));
    assert!(!dispatcher.dispatch().exists() && !dispatcher.admin().exists());
    let log = dispatcher.log();
    assert!(log.contains("event=stopped accepted=20 taken=20 in_flight=0 queued=0"), "{log}");
}

#[test]
fn a_stop_serves_what_had_queued() {
    let temp = configure(PATIENT);
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let address = dispatcher.address("web");
    // They wait in the kernel's queue of a listener that ends with the dispatcher.
    let streams: Vec<TcpStream> = (0..30).map(|_| connect(address)).collect();
    let worker = dispatcher.worker("blocking", "web", "only");
    dispatcher.wait_joined("web", 1);
    worker.signal(Signal::SIGSTOP);
    let late: Vec<TcpStream> = (0..30).map(|_| connect(address)).collect();
    dispatcher.process.signal(Signal::SIGTERM);
    worker.signal(Signal::SIGCONT);
    let clients = greeted(streams.into_iter().chain(late).collect());
    assert_eq!(tally(&clients)["only"], 60);
    assert!(dispatcher.process.wait().success());
}

#[test]
fn nothing_is_left_open_afterwards() {
    let dispatcher = Dispatcher::start(QUICK);
    let address = dispatcher.address("web");
    // One round, so that every lazily opened descriptor is open.
    drop(dispatcher.workers("blocking", "web", 2));
    dispatcher.wait_status("both to be gone", |status| pool(status, "web").workers.is_empty());
    let before = dispatcher.fds();
    for flavour in ["blocking", "tokio", "mio"] {
        let workers = dispatcher.workers(flavour, "web", 4);
        let clients: Vec<Client> = (0..100).map(|_| Client::connect(address).unwrap()).collect();
        workers[0].signal(Signal::SIGSTOP);
        let more: Vec<TcpStream> = (0..50).map(|_| connect(address)).collect();
        drop(greeted(more));
        clients.into_iter().for_each(drop);
        drop(workers);
        dispatcher.wait_status("all to be gone", |status| pool(status, "web").workers.is_empty());
        wait_until("the descriptors to be closed", || dispatcher.fds() <= before);
    }
}

#[test]
fn a_queued_client_that_resets_is_dropped_and_counted() {
    let dispatcher = Dispatcher::start(PATIENT);
    let address = dispatcher.address("web");
    let mut lazy =
        dispatcher.worker_with("blocking", "web", "lazy", &[("TEST_WORKER", "never-take")]);
    dispatcher.wait_joined("web", 1);
    let mut streams: Vec<TcpStream> = (0..10).map(|_| connect(address)).collect();
    dispatcher.wait_status("10 in flight", |status| status.in_flight == 10);
    lazy.kill();
    dispatcher.wait_status("10 queued", |status| status.queued == 10);
    // Four clients reset, three only half-close: those still wait for an answer.
    for stream in streams.drain(..4) {
        nix::sys::socket::setsockopt(
            &stream,
            nix::sys::socket::sockopt::Linger,
            &libc::linger { l_onoff: 1, l_linger: 0 },
        )
        .unwrap();
    }
    for stream in &streams[..3] {
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    }
    let status = dispatcher.wait_status("four to be dropped", |status| status.queued == 6);
    assert_eq!(status.closed["client_gone"], 4);
    let _worker = dispatcher.worker("tokio", "web", "late");
    assert_eq!(tally(&greeted(streams))["late"], 6);
}
