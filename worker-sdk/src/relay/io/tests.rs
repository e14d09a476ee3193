//! The thread sleeps no longer than until something is due.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use rustix::net::{RecvFlags, accept, bind, listen, recv};

use super::*;
use crate::relay::RelayConfig;

const PATIENCE: Duration = Duration::from_secs(60);

/// A directory that lets every member in and says nothing more.
fn admit(listener: &OwnedFd) -> OwnedFd {
    let mut polled = [rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN)];
    let limit = rustix::time::Timespec::try_from(PATIENCE).unwrap();
    let ready = rustix::event::poll(&mut polled, Some(&limit)).unwrap();
    assert_eq!(ready, 1, "the member did not connect");
    let fd = accept(listener).unwrap();
    recv(&fd, &mut [0; 1024][..], RecvFlags::empty()).unwrap();
    let mut record = Vec::new();
    FromDirectory::Welcome { version: VERSION, host: 1, max_message: 1000, gateway: false }
        .encode(&mut record);
    send(&fd, &record, SendFlags::NOSIGNAL).unwrap();
    fd
}

#[test]
fn a_call_that_loses_the_directory_wakes_the_thread_to_connect_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("relay.sock");
    let listener =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 8).unwrap();
    let (slot, joined) = Slot::new();
    let shared = start(RelayConfig::new().socket(&path).check().unwrap(), slot).unwrap();
    let mut connection = admit(&listener);
    joined.wait().unwrap();
    for _ in 0..3 {
        // The thread has nothing to wait for but its descriptors.
        let started = Instant::now();
        loop {
            let mut inner = shared.lock();
            if matches!(inner.sleep, Sleep::Forever) {
                // As a call does whose send fails. The closed descriptor reports nothing.
                let now = shared.now();
                inner.lose_control(now, RETRY);
                break;
            }
            drop(inner);
            assert!(started.elapsed() < PATIENCE, "it does not sleep");
            std::thread::sleep(Duration::from_millis(1));
        }
        shared.with(|_, _| ()).unwrap();
        connection = admit(&listener);
    }
    drop(connection);
    shared.close();
}
