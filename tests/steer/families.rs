//! IPv4, IPv6, and sockets that cannot be steered.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::Duration;

use test_support::wait_until;

use crate::lab::*;

#[test]
fn ipv6_clients_are_shared_exactly() {
    let Some(mut lab) = Lab::new() else { return };
    for _ in 0..4 {
        lab.keeper("::1");
    }
    let held: Vec<TcpStream> = (0..200).map(|_| connect(V6)).collect();
    assert_eq!(lab.live(), [50; 4]);
    lab.settled();
    drop(held);
    lab.empty();
}

#[test]
fn dual_stack_workers_take_clients_of_both_families() {
    let Some(mut lab) = Lab::new() else { return };
    for _ in 0..2 {
        lab.start(&["python3", "-c", KEEPER, "::", "PORT", "0"]);
    }
    let held: Vec<TcpStream> =
        (0..100).map(|n| connect(if n % 3 == 0 { V6 } else { V4 })).collect();
    assert_eq!(lab.live(), [50, 50]);
    assert_eq!(lab.steering().handshakes().unwrap(), 0);
    assert_eq!(lab.pending(), 0, "the request of an IPv4 client at an IPv6 listener is known");
    lab.settled();
    drop(held);
    lab.empty();
}

#[test]
fn an_ipv6_client_gets_no_ipv4_worker() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    lab.keeper("::1");
    let held: Vec<TcpStream> = (0..4).map(|_| connect(V6)).collect();
    assert_eq!(lab.live(), [0, 0, 4]);
    let four: Vec<TcpStream> = (0..8).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [4, 4, 4]);
    lab.kill(2);
    let refused = TcpStream::connect_timeout(&V6, Duration::from_secs(10)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    drop((held, four));
    eventually("no connection to count", vec![0, 0, 0], || lab.live());
}

#[test]
fn a_worker_that_serves_ipv6_only_is_found_out_and_left_out_for_ipv4() {
    let Some(mut lab) = Lab::keepers(1) else { return };
    let only = lab.start(&["python3", "-c", KEEPER, "::", "PORT", "1"]);
    let held: Vec<TcpStream> = (0..10).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [10, 0]);
    let counts = lab.steering().counts(only).unwrap();
    assert!(!counts.serves_v4());
    let totals = lab.steering().totals().unwrap();
    assert_eq!(totals.failed, 1, "tried once, then known");
    drop(held);
    lab.empty();
}

#[test]
fn an_mptcp_listener_is_named_and_not_steered() {
    let Some(mut lab) = Lab::keepers(1) else { return };
    let code = "import socket,sys,time\n\
                s=socket.socket(socket.AF_INET,socket.SOCK_STREAM,262)\n\
                s.bind(('127.0.0.1',int(sys.argv[1])))\ns.listen(64)\ntime.sleep(600)\n";
    let worker = lab.announce();
    lab.spawn(worker, &["python3", "-c", code, "PORT"]);
    wait_until("the listener to be refused", || {
        lab.steering().counts(worker).unwrap().problem().is_some()
    });
    let problem = lab.steering().counts(worker).unwrap().problem().unwrap();
    assert!(problem.contains("MPTCP") && problem.contains("GODEBUG=multipathtcp=0"), "{problem}");
    let held: Vec<TcpStream> = (0..5).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [5, 0]);
    drop(held);
    lab.empty();
}

#[test]
fn a_listener_that_hides_another_one_is_named_when_it_closes() {
    let Some(mut lab) = Lab::keepers(1) else { return };
    let code = r#"
import socket, sys, time
def listen():
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind(("127.0.0.1", int(sys.argv[1]))); s.listen(64); return s
first = listen(); second = listen(); second.close()
time.sleep(600)
"#;
    let worker = lab.announce();
    lab.spawn(worker, &["python3", "-c", code, "PORT"]);
    wait_until("both to have listened", || {
        let log = std::fs::read_to_string(lab.log_of(worker)).unwrap();
        assert_eq!(log, "");
        lab.steering().counts(worker).unwrap().listens == 2
    });
    // What comes before would be reset with the queue of the closed one.
    wait_until("one to be closed", || lab.steering().counts(worker).unwrap().listeners == [1, 0]);
    let held: Vec<TcpStream> = (0..4).map(|_| connect(V4)).collect();
    assert!(lab.live()[0] >= 3, "{:?}", lab.live());
    drop(held);
    eventually("a choice to find out", true, || {
        drop(connect(V4));
        lab.steering().counts(worker).unwrap().problem().is_some_and(|p| p.contains("closed"))
    });
}
