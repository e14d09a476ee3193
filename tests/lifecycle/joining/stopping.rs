//! The end of a dispatcher: clients that wait for a worker, workers that other pools have to wait
//! for, and clients that are turned away while a stopped worker has a copy of their socket.

use std::time::{Duration, Instant};

use super::*;

const TWO_POOLS: &str = r#"
stop_timeout = "1m"

[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[[listener]]
name = "other"
address = "127.0.0.1:0"
pool = "other"

[pool.web]
handoff_timeout = "10m"

[pool.other.spawn]
command = ["WORKER", "blocking"]
"#;

#[test]
fn workers_that_its_clients_wait_for_may_still_join() {
    let temp = configure(PATIENT);
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let address = dispatcher.address("web");
    let streams: Vec<TcpStream> = (0..20).map(|_| connect(address)).collect();
    dispatcher.process.signal(Signal::SIGTERM);
    wait_for_log(&dispatcher, "event=stopping");
    dispatcher.wait_status("all to be queued", |status| status.queued == 20);
    let _worker = dispatcher.worker("blocking", "web", "late");
    assert_eq!(tally(&greeted(streams))["late"], 20);
    assert!(dispatcher.process.wait().success());
    assert!(dispatcher.log().contains("event=stopped accepted=20 taken=20 in_flight=0 queued=0"));
}

#[test]
fn the_workers_of_one_pool_do_not_wait_for_those_of_another() {
    let worker = example("test-worker");
    let temp = configure(&TWO_POOLS.replace("WORKER", worker.to_str().unwrap()));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    dispatcher.wait_joined("other", 1);
    let served = Client::connect(dispatcher.address("other")).unwrap();
    let hung = dispatcher.worker("blocking", "web", "hung");
    dispatcher.wait_joined("web", 1);
    hung.signal(Signal::SIGSTOP);
    let waiting = connect(dispatcher.address("web"));
    dispatcher.wait_status("one in flight", |status| status.in_flight == 1);
    dispatcher.process.signal(Signal::SIGTERM);
    // It is released and told to end, and ends with its last client.
    wait_for_log(&dispatcher, "name=other-1");
    wait_until("its release", || {
        let log = dispatcher.log();
        log.lines().any(|line| line.contains("event=worker_gone") && line.contains("why=released"))
    });
    served.finish();
    wait_for_log(&dispatcher, "event=process_ended pool=other");
    assert!(dispatcher.process.running(), "the other pool has a client yet");
    hung.signal(Signal::SIGCONT);
    assert_eq!(Client::greeted(waiting).unwrap().served_by, "hung");
    assert!(dispatcher.process.wait().success());
}

/// Ten clients of which a stopped worker has copies, and that no worker has taken.
fn copied(keys: &str) -> (Dispatcher, Process, Vec<TcpStream>) {
    let dispatcher = Dispatcher::start(&format!("{keys}\n{PATIENT}wait_for_worker = \"300ms\"\n"));
    let worker = dispatcher.worker("blocking", "web", "stopped");
    dispatcher.wait_joined("web", 1);
    worker.signal(Signal::SIGSTOP);
    let address = dispatcher.address("web");
    let streams: Vec<TcpStream> = (0..10).map(|_| connect(address)).collect();
    dispatcher.wait_status("one in flight", |status| status.in_flight == 10);
    (dispatcher, worker, streams)
}

/// All clients see their end, although the worker with the copies does nothing.
fn all_notice(streams: Vec<TcpStream>) {
    let began = Instant::now();
    for mut stream in streams {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let end = stream.read(&mut [0; 16]);
        assert!(matches!(&end, Ok(0)) || is_reset(&end), "{end:?}");
    }
    let took = began.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
}

fn is_reset(end: &std::io::Result<usize>) -> bool {
    end.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

#[test]
fn a_client_is_turned_away_although_a_stopped_worker_has_a_copy() {
    let (dispatcher, worker, streams) = copied("");
    let body = "{\"action\": \"drain\", \"deadline\": \"50ms\"}";
    let request = format!(
        "POST /v1/workers HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let mut admin = std::os::unix::net::UnixStream::connect(dispatcher.admin()).unwrap();
    std::io::Write::write_all(&mut admin, request.as_bytes()).unwrap();
    let status = dispatcher.wait_status("them to be turned away", |s| s.closed["no_worker"] == 10);
    assert_eq!((status.queued, status.in_flight), (0, 0));
    all_notice(streams);
    worker.signal(Signal::SIGCONT);
}

#[test]
fn at_the_end_too() {
    let (mut dispatcher, worker, streams) = copied("stop_timeout = \"200ms\"");
    // No connection is sent again once its channel is full: all are closed, most by the workers'
    // end.
    dispatcher.process.signal(Signal::SIGTERM);
    assert!(dispatcher.process.wait().success());
    drop(worker);
    all_notice(streams);
}
