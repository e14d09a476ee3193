//! Shared ports: connections of the dispatcher to one worker, and queues that are moved.

use std::net::{Ipv6Addr, SocketAddr, TcpStream};

use aya::maps::{HashMap, Map, MapData};
use dispatch_steer::{Direct, Error, Probed, Steering, WorkerSettings};
use nix::sys::signal::Signal;
use test_support::{wait_for, wait_until};

use crate::lab::*;
use crate::shared_lab::*;

#[test]
fn a_probe_is_for_its_worker_and_tells_when_it_accepts() {
    let Some(mut lab) = Lab::sharing(3) else { return };
    // The policy would choose another one: it is loaded, and gets no new connections.
    let draining = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
    let held: Vec<TcpStream> = (0..6).map(|_| connect(V4)).collect();
    lab.steering().set_worker(1, draining).unwrap();
    lab.signal(1, Signal::SIGSTOP);
    let probe = lab.steering().probe(1).unwrap();
    wait_until("it to wait in the queue", || lab.steering().queue_len(1).unwrap() == 1);
    assert_eq!(lab.steering().probed(&probe).unwrap(), Probed::Waits);
    assert_eq!(lab.live(), [2, 3, 2]);
    lab.signal(1, Signal::SIGCONT);
    wait_until("it to be accepted", || lab.steering().probed(&probe).unwrap() == Probed::Accepted);
    lab.steering().end_probe(probe).unwrap();
    eventually("the worker to close it", vec![2; 3], || lab.live());
    lab.settled();

    let refused = lab.steering().probe(7).unwrap_err();
    assert!(matches!(refused, Error::Invalid(_)), "{refused}");
    drop(held);
    lab.empty();
}

/// Also while the policy gives the worker nothing. A full queue is an error; what is in it goes to no
/// other worker.
#[test]
fn a_connection_past_the_policy_is_for_its_worker() {
    let Some(mut lab) = Lab::without_heirs(std::time::Duration::ZERO) else { return };
    std::fs::write("/proc/sys/net/core/somaxconn", "64").unwrap();
    for _ in 0..2 {
        let worker = lab.enlist();
        lab.inherit(worker, HEIR, &[V4]);
    }
    let draining = WorkerSettings { draining: 1, ..WorkerSettings::new(1) };
    lab.steering().set_worker(1, draining).unwrap();
    let mut made: Vec<(TcpStream, Direct)> = Vec::new();
    for _ in 0..5 {
        // A busy machine may need more time than one attempt waits.
        let (fd, direct) = wait_for("a connection", || lab.steering().connect_to(1).ok());
        let mut stream = answering(fd);
        read_hello(&mut stream);
        made.push((stream, direct));
    }
    assert_eq!(lab.live(), [0, 5]);
    let held: Vec<TcpStream> = (0..5).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [5, 5]);
    assert!(matches!(lab.steering().connect_to(7), Err(Error::Invalid(_))));

    lab.signal(1, Signal::SIGSTOP);
    let mut queued = Vec::new();
    let full = wait_for("a full queue", || match lab.steering().connect_to(1) {
        Ok(connection) => {
            queued.push(connection);
            None
        }
        Err(error) => (queued.len() > 60).then(|| error.to_string()),
    });
    assert!(full.contains("connect to the worker"), "{full}");
    let of_one = |lab: &mut Lab| lab.steering().counts(1).unwrap();
    let accepted = |lab: &mut Lab| {
        let counts = of_one(lab);
        counts.total - counts.moved_out - lab.steering().queue_len(1).unwrap() as u64
    };
    assert_eq!(accepted(&mut lab), 5);

    // No other worker gets them, unless it does not matter any more.
    let waiting = queued.len();
    let (other, over) = queued.pop().unwrap();
    lab.steering().end_direct(over).unwrap();
    lab.steering().move_queue(1).unwrap();
    let mut other = answering(other);
    read_hello(&mut other);
    // What was reset was not accepted.
    assert_eq!((accepted(&mut lab), of_one(&mut lab).moved_in), (5, 0));
    assert_eq!(lab.live(), [6, 5], "{waiting} have waited");
    for (fd, _) in &queued {
        let end = rustix::net::recv(fd, &mut [0; 1], rustix::net::RecvFlags::DONTWAIT);
        assert_eq!(end.unwrap_err(), rustix::io::Errno::CONNRESET);
    }
    lab.signal(1, Signal::SIGCONT);
    drop((held, other));
    let made = made.into_iter().map(|(stream, direct)| (stream.into(), direct));
    for (_, direct) in made.chain(queued) {
        lab.steering().end_direct(direct).unwrap();
    }
    lab.empty();
}

/// A worker that has shut its listener down gets none, and no other one gets it instead.
#[test]
fn a_connection_for_a_worker_that_does_not_listen_is_refused() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    // It runs now.
    let (fd, direct) = wait_for("a connection", || lab.steering().connect_to(1).ok());
    read_hello(&mut answering(fd));
    lab.steering().end_direct(direct).unwrap();
    let pid = lab.servers[1].child.id().cast_signed();
    let pidfd = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::PidfdFlags::empty(),
    );
    let flags = rustix::process::PidfdGetfdFlags::empty();
    let listener = rustix::process::pidfd_getfd(pidfd.unwrap(), 3, flags).unwrap();
    rustix::net::shutdown(&listener, rustix::net::Shutdown::Read).unwrap();
    let refused = lab.steering().connect_to(1).unwrap_err();
    assert!(matches!(refused, Error::System { .. }), "{refused}");
    assert_eq!(lab.total(), [0, 1]);
    drop(connect(V4));
    assert_eq!(lab.total(), [1, 1]);
}

fn answering(fd: std::os::fd::OwnedFd) -> TcpStream {
    let stream = TcpStream::from(fd);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(test_support::PATIENCE)).unwrap();
    stream
}

#[test]
fn a_worker_with_two_addresses_of_both_families_is_probed() {
    let Some(mut lab) = Lab::without_heirs(std::time::Duration::ZERO) else { return };
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PUBLIC);
    for public in [any, V6] {
        let worker = lab.enlist();
        lab.inherit(worker, HEIR, &[public]);
        let probe = lab.steering().probe(worker).unwrap();
        wait_until("it to be accepted", || {
            lab.steering().probed(&probe).unwrap() == Probed::Accepted
        });
        lab.steering().end_probe(probe).unwrap();
    }
    assert_eq!(lab.total(), [1, 1]);
    lab.empty();
}

#[test]
fn a_queue_is_moved_while_its_process_keeps_its_listener() {
    let Some(mut lab) = Lab::sharing(3) else { return };
    lab.signal(1, Signal::SIGSTOP);
    let mut clients: Vec<TcpStream> = (0..60).map(|_| dial(V4)).collect();
    eventually("all to be connected", vec![20; 3], || lab.live());
    lab.steering().move_queue(1).unwrap();
    clients.iter_mut().for_each(read_hello);
    assert_eq!(lab.live(), [30, 0, 30]);
    let counts: Vec<_> = (0..3).map(|n| lab.steering().counts(n).unwrap()).collect();
    assert_eq!(counts.iter().map(|it| it.moved_in).collect::<Vec<_>>(), [10, 0, 10]);
    assert_eq!(counts.iter().map(|it| it.moved_out).collect::<Vec<_>>(), [0, 20, 0]);
    // The process has noticed nothing.
    lab.signal(1, Signal::SIGCONT);
    clients.extend((0..30).map(|_| connect(V4)));
    assert_eq!(lab.live(), [30; 3]);
    lab.settled();
    drop(clients);
    lab.empty();
}

/// A dispatcher that was killed while it probed leaves an entry, which the next one removes.
#[test]
fn probes_of_a_dispatcher_that_was_killed_are_forgotten() {
    let Some(mut lab) = Lab::sharing(2) else { return };
    let (_mounted, pins) = lab.pin();
    let entries = || {
        let map = Map::from_map_data(MapData::from_pin(pins.join("directed")).unwrap()).unwrap();
        HashMap::<_, [u8; 20], u32>::try_from(&map).unwrap().keys().count()
    };
    let probe = lab.steering().probe(0).unwrap();
    assert_eq!(entries(), 1);
    lab.steering = None;
    drop(probe);
    assert_eq!(entries(), 1);
    lab.steering = Some(Steering::adopt(&pins).unwrap());
    assert_eq!(entries(), 0);
    lab.steering.take().unwrap().detach().unwrap();
}
