//! Closes of connections that another process or library serves, and the waits of blocking workers.
//! Against a dispatcher made of the same protocol.
#![allow(unsafe_code, reason = "fork is unsafe")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod blocking;
mod surprises;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use test_support::fake_dispatcher::{
    FakeDispatcher, Peer, accept, eventually, is_open, join, read_to_end, wait_readable,
};
use worker_sdk::{Connection, Worker, WorkerConfig};

/// Takes a duplicate of the connection's socket in one of the possible ways, and drops the SDK's
/// handle.
type Expose = fn(Connection) -> OwnedFd;

const EXPOSED: [(&str, Expose); 6] = [
    ("as_fd", |connection| connection.as_fd().try_clone_to_owned().unwrap()),
    ("as_raw_fd", |connection| {
        // The number suffices to find the socket again.
        let path = format!("/proc/self/fd/{}", connection.as_raw_fd());
        assert!(std::fs::read_link(path).unwrap().to_string_lossy().starts_with("socket:"));
        connection.as_fd().try_clone_to_owned().unwrap()
    }),
    ("as_tcp", |connection| connection.as_tcp().unwrap().try_clone().unwrap().into()),
    ("into_parts", |connection| {
        let (stream, guard) = connection.into_parts().unwrap();
        drop(guard);
        stream.into()
    }),
    ("into_fd", |connection| {
        let (fd, guard) = connection.into_fd().unwrap();
        drop(guard);
        fd
    }),
    ("a clone's as_fd", |connection| {
        let clone = connection.clone();
        let fd = clone.as_fd().try_clone_to_owned().unwrap();
        drop(clone);
        drop(connection);
        fd
    }),
];

#[test]
fn duplicates_are_served_and_the_dispatcher_closes_its_copy() {
    for (how, expose) in EXPOSED {
        let fake = FakeDispatcher::new();
        let (worker, mut peer) = join(&fake);
        let (mut client, ours) = fake.client();
        let entry = peer.send_one(&ours);
        let copy = expose(accept(&worker));
        peer.wait_finished(1);
        assert!(is_open(&client), "{how}: the duplicate is still served");
        // The doorbell rings although no bit of `want` is set.
        wait_readable(peer.doorbell.as_fd(), how);
        peer.release(&entry);
        drop(ours);
        let mut copy = TcpStream::from(copy);
        copy.write_all(b"served").unwrap();
        drop(copy);
        assert_eq!(read_to_end(&mut client), b"served", "{how}");
    }
}

#[test]
fn after_the_release_the_doorbell_stays_silent() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (client, ours) = fake.client();
    let entry = peer.send_one(&ours);
    let connection = accept(&worker);
    peer.release(&entry);
    let copy = connection.as_fd().try_clone_to_owned().unwrap();
    drop(connection);
    peer.wait_finished(1);
    assert!(is_open(&client));
    let mut count = [0; 8];
    assert_eq!(rustix::io::read(&peer.doorbell, &mut count), Err(rustix::io::Errno::AGAIN));
    drop(copy);
}

#[test]
fn operations_of_the_sdk_keep_the_descriptor_inside() {
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (mut client, ours) = fake.client();
    peer.send_one(&ours);
    let mut connection = accept(&worker);
    connection.set_nodelay(true).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    connection.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    connection.set_nonblocking(false).unwrap();
    assert_eq!(connection.local_addr().unwrap(), ours.local_addr().unwrap().into());
    client.write_all(b"ping").unwrap();
    let mut bytes = [0; 4];
    assert_eq!(connection.peek(&mut bytes).unwrap(), 4);
    connection.read_exact(&mut bytes).unwrap();
    connection.write_all(&bytes).unwrap();
    let text = format!("{connection:?}");
    assert!(text.contains("peer"), "{text}");
    let mut poll = mio::Poll::new().unwrap();
    poll.registry().register(&mut connection, mio::Token(0), mio::Interest::READABLE).unwrap();
    poll.poll(&mut mio::Events::with_capacity(1), Some(Duration::ZERO)).unwrap();
    poll.registry().deregister(&mut connection).unwrap();
    drop(connection);
    // `ours`, the dispatcher's copy, is still open: only a shutdown ends the connection for the
    // client.
    assert_eq!(read_to_end(&mut client), b"ping");
    drop(ours);
}

#[test]
fn with_tokio_it_is_the_same() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let fake = FakeDispatcher::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = fake.config();
        let (listener, (mut peer, fake)) = tokio::join!(
            async { worker_sdk::tokio::Listener::connect(config).await.unwrap() },
            async { tokio::task::spawn_blocking(move || (fake.welcome(), fake)).await.unwrap() },
        );
        // Reads, writes and waits: the drop ends the connection.
        let (mut client, ours) = fake.client();
        peer.send_one(&ours);
        let mut connection = listener.accept().await.unwrap();
        let asking = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            client.write_all(b"ping").unwrap();
            read_to_end(&mut client)
        });
        let mut bytes = [0; 4];
        connection.read_exact(&mut bytes).await.unwrap();
        connection.write_all(&bytes).await.unwrap();
        drop(connection);
        let answer = tokio::task::spawn_blocking(move || asking.join().unwrap()).await.unwrap();
        assert_eq!(answer, b"ping");
        // Duplicated: still served.
        let (client, ours) = fake.client();
        peer.send_one(&ours);
        let connection = listener.accept().await.unwrap();
        let copy = connection.as_fd().try_clone_to_owned().unwrap();
        drop(connection);
        peer.wait_finished(2);
        assert!(is_open(&client));
        wait_readable(peer.doorbell.as_fd(), "the dispatcher is notified");
        drop(copy);
    });
}

#[test]
fn a_forked_child_serves_after_its_parents_drop() {
    // In a separate process, because a fork concerns every connection of the process.
    in_child("close::fork_child");
}

#[test]
fn fork_child() {
    if !is_child("close::fork_child") {
        return;
    }
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (mut client, ours) = fake.client();
    let entry = peer.send_one(&ours);
    let connection = accept(&worker);
    // Received before the fork, with the record of another, and taken after it: the child has a
    // copy and never serves it.
    let pairs = [fake.client(), fake.client()];
    let both = peer.send(&[&pairs[0].1, &pairs[1].1]);
    let before = accept(&worker);
    let (go, mut wait) = std::io::pipe().map(|(read, write)| (write, read)).unwrap();
    // SAFETY: the child makes only system calls, and leaves by _exit.
    let child = match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let _ = rustix::io::read(&wait, &mut [0; 1]);
            // The parent has dropped its handle by now; the child serves with its copy alone.
            let _ = rustix::io::write(&connection, b"served by the child");
            let _ = rustix::io::read(&wait, &mut [0; 1]);
            // SAFETY: ends the child without running anything of the test program.
            unsafe { libc::_exit(0) }
        }
        nix::unistd::ForkResult::Parent { child } => child,
    };
    drop(connection);
    peer.wait_finished(1);
    assert!(is_open(&client), "the parent's drop shut nothing down");
    wait_readable(peer.doorbell.as_fd(), "the dispatcher is notified");
    peer.release(&entry);
    drop(ours);
    (&go).write_all(b"1").unwrap();
    let mut text = [0; 19];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"served by the child");

    let mut after = accept(&worker);
    after.write_all(b"taken after").unwrap();
    peer.release(&both[1]);
    drop(after);
    let [first, second] = pairs;
    drop(second.1);
    let mut second = second.0;
    assert_eq!(read_to_end(&mut second), b"taken after", "although the child has a copy");
    // A connection that came after the fork ends as usual, while the dispatcher still has its copy.
    let (mut client, ours) = fake.client();
    peer.send_one(&ours);
    drop(accept(&worker));
    assert_eq!(read_to_end(&mut client), b"");
    drop((ours, before, first));

    (&go).write_all(b"2").unwrap();
    nix::sys::wait::waitpid(child, None).unwrap();
    let _ = wait.read(&mut []);
}

#[test]
fn a_forked_copy_counts_and_ends_nothing() {
    in_child("close::copy_child");
}

#[test]
fn copy_child() {
    if !is_child("close::copy_child") {
        return;
    }
    let fake = FakeDispatcher::new();
    let (worker, mut peer) = join(&fake);
    let (client, ours) = fake.client();
    peer.send_one(&ours);
    let connection = accept(&worker);
    let mut parts = Some((connection, worker));
    // SAFETY: the child only drops, which takes no lock of another thread, and leaves by _exit.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let forked = parts.as_ref().is_some_and(|(_, worker)| {
                matches!(worker.accept(), Err(worker_sdk::Error::Forked))
            });
            drop(parts.take());
            // SAFETY: ends the child without running anything of the test program.
            unsafe { libc::_exit(if forked { 0 } else { 1 }) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let status = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
    }
    let (mut connection, worker) = parts.unwrap();
    assert_eq!((worker.live(), peer.board.finished()), (1, 0));
    assert!(is_open(&client), "the child's drop shut nothing down");
    connection.write_all(b"x").unwrap();
    (&client).read_exact(&mut [0]).unwrap();
    let (_client, ours) = fake.client();
    peer.send_one(&ours);
    drop(accept(&worker));
    assert_eq!(peer.board.finished(), 1, "it said no goodbye either");
    drop(connection);
    assert_eq!((worker.live(), peer.board.finished()), (0, 2));
}

#[test]
fn a_worker_with_a_forked_child_says_goodbye() {
    in_child("close::goodbye_child");
}

#[test]
fn goodbye_child() {
    if !is_child("close::goodbye_child") {
        return;
    }
    let fake = FakeDispatcher::new();
    let (worker, peer) = join(&fake);
    let (go, wait) = std::io::pipe().map(|(read, write)| (write, read)).unwrap();
    // SAFETY: the child makes only system calls, and leaves by _exit.
    let child = match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            drop(go);
            let _ = rustix::io::read(&wait, &mut [0; 1]);
            // SAFETY: ends the child without running anything of the test program.
            unsafe { libc::_exit(0) }
        }
        nix::unistd::ForkResult::Parent { child } => child,
    };
    worker.close();
    assert!(matches!(peer.control_record(), Some(dispatch_protocol::wire::Control::Goodbye(_))));
    assert!(peer.control_record().is_none(), "the end, although the child has it all open");
    // The child is still running: the parent ended the connection.
    assert_eq!(
        nix::sys::wait::waitpid(child, Some(nix::sys::wait::WaitPidFlag::WNOHANG)).unwrap(),
        nix::sys::wait::WaitStatus::StillAlive
    );
    drop(go);
    nix::sys::wait::waitpid(child, None).unwrap();
}

/// Runs one test of this program again, alone in a process; returns its standard error.
pub(crate) fn in_child(name: &str) -> String {
    in_child_with(name, &[], &[])
}

/// As [`in_child`], started through the command `wrapper` and with more environment variables.
fn in_child_with(name: &str, wrapper: &[&str], environment: &[(&str, &Path)]) -> String {
    let program = std::env::current_exe().unwrap();
    let mut command = match wrapper {
        [] => Command::new(program),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(program);
            command
        }
    };
    let output = command
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("SDK_TEST_CHILD", name)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // A name without a test would be a success, too.
    let passed = output.status.success() && stdout.contains("1 passed");
    assert!(passed, "{stdout}{stderr}");
    stderr.into_owned()
}

pub(crate) fn is_child(name: &str) -> bool {
    std::env::var("SDK_TEST_CHILD").is_ok_and(|child| child == name)
}
