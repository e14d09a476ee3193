//! When a connection counts.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use test_support::wait_until;

use crate::lab::*;

#[test]
fn a_connection_that_the_client_half_closed_counts_until_the_server_ends_it() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    let mut halves: Vec<TcpStream> = (0..20).map(|_| connect(V4)).collect();
    for client in &mut halves {
        client.write_all(b"stay\n").unwrap();
    }
    // The servers must have read it before they see the end.
    wait_until("the servers to read", || {
        run("ss -tnH state established")
            .lines()
            .all(|line| line.split_whitespace().next() == Some("0"))
    });
    for client in &halves {
        client.shutdown(Shutdown::Write).unwrap();
    }
    wait_until("the server's side to be half-closed", || {
        run("ss -tnH state close-wait").lines().count() == 20
    });
    assert_eq!(lab.live(), [10, 10], "the servers still have them");
    lab.settled();
    // A reset ends them, from CLOSE_WAIT.
    for client in halves {
        rustix::net::sockopt::set_socket_linger(&client, Some(std::time::Duration::ZERO)).unwrap();
    }
    lab.settled();
    lab.kill(0);
    lab.kill(1);
    eventually("the killed servers' connections to end", vec![0, 0], || lab.live());
}

#[test]
fn connections_that_nothing_accepts_count_and_end_with_a_reset() {
    let Some(mut lab) = Lab::new() else { return };
    for _ in 0..2 {
        lab.start(&["python3", "-c", DEAF, "127.0.0.1", "PORT", "512"]);
    }
    let waiting: Vec<TcpStream> = (0..100).map(|_| dial(V4)).collect();
    eventually("all to be connected", vec![50, 50], || lab.live());
    assert_eq!(sockets_by_process().get(&0), Some(&100), "no process has them");
    for client in waiting {
        rustix::net::sockopt::set_socket_linger(&client, Some(std::time::Duration::ZERO)).unwrap();
    }
    lab.empty();
    assert_eq!(lab.total(), [50, 50]);
}

#[test]
fn a_full_backlog_leaves_nothing_behind() {
    let Some(mut lab) = Lab::new() else { return };
    fs::write("/proc/sys/net/ipv4/tcp_syncookies", "0").unwrap();
    // Room for two connections each, so most SYNs are dropped again and again.
    for _ in 0..2 {
        lab.start(&["python3", "-c", DEAF, "127.0.0.1", "PORT", "1"]);
    }
    let clients: Vec<TcpStream> = (0..40).map(|_| begin()).collect();
    wait_until("both backlogs to be full", || lab.live().iter().all(|&live| live == 2));
    wait_until("SYNs to be tried again", || lab.steering().totals().unwrap().chosen > 50);
    drop(clients);
    // What was refused stays remembered until its room is needed, but counts for seconds only.
    eventually("no handshake to count", 0, || lab.pending());
    lab.kill(0);
    lab.kill(1);
    eventually("no connection to count", vec![0, 0], || lab.live());
}

/// Begins to connect and does not wait.
pub fn begin() -> TcpStream {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    let answer = connect(&socket, &V4);
    assert!(matches!(answer, Ok(()) | Err(rustix::io::Errno::INPROGRESS)), "{answer:?}");
    TcpStream::from(socket)
}

#[test]
fn handshakes_with_syn_cookies_are_shared_and_leave_nothing_pending() {
    let Some(mut lab) = Lab::keepers(4) else { return };
    // Every SYN is answered with a cookie, so no handshake is remembered.
    fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap();
    let held: Vec<TcpStream> = (0..400).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [100; 4]);
    assert_eq!(lab.pending(), 0);
    lab.settled();
    assert!(lab.steering().totals().unwrap().repeated >= 400, "ACKs go where their SYN went");
    drop(held);
    lab.empty();
}

#[test]
fn fast_open_counts_like_others() {
    let Some(mut lab) = Lab::new() else { return };
    // Bit 0: clients; bit 1: servers; bit 2: without a cookie; 0x200, 0x400: all listeners.
    fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1543").unwrap();
    for _ in 0..2 {
        lab.keeper("127.0.0.1");
    }
    let code = r#"
import socket, sys
held = []
for _ in range(40):
    client = socket.socket()
    client.sendto(b"half\n", socket.MSG_FASTOPEN, ("127.0.0.1", 8000))
    assert client.recv(6) == b"hello\n"
    held.append(client)
print("held", flush=True)
sys.stdin.read()
"#;
    let mut client = std::process::Command::new("python3")
        .args(["-c", code])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 5];
    client.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(lab.live(), [20, 20]);
    let opened = run("nstat -az TcpExtTCPFastOpenPassive");
    assert!(opened.contains(" 40 "), "data came with the SYN: {opened}");
    lab.settled();
    drop(client.stdin.take());
    client.wait().unwrap();
    lab.empty();
}
