use std::path::Path;

use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    recv, socket_with,
};

use super::*;

fn listener(path: &Path) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 16).unwrap();
    socket
}

/// Accepts every control connection; returns the last hellos.
fn hellos(listener: &OwnedFd) -> Vec<(OwnedFd, usize)> {
    let mut found = Vec::new();
    while let Ok(control) = accept_with(listener, SocketFlags::CLOEXEC) {
        let (_, size) = recv(&control, &mut [0; 4096][..], RecvFlags::DONTWAIT).unwrap_or_default();
        found.push((control, size));
    }
    found
}

/// The time for the answer is over now.
fn let_time_pass(core: &Arc<WorkerCore>) {
    if let Link::Greeting { until, .. } = &mut core.lock().link {
        *until = Instant::now();
    }
    assert!(!core.try_join().unwrap());
}

fn greets(core: &Arc<WorkerCore>) -> bool {
    matches!(core.lock().link, Link::Greeting { .. })
}

/// Waits for the next attempt.
fn greet_again(core: &Arc<WorkerCore>) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !greets(core) {
        assert!(Instant::now() < deadline, "no attempt");
        core.wait(Some(deadline)).unwrap();
        assert!(!core.try_join().unwrap());
    }
}

/// A service manager holds the socket open while there is no dispatcher.
#[test]
fn a_hello_waits_in_the_queue_of_the_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dispatch.sock");
    let socket = listener(&path);
    let core = WorkerCore::new(&WorkerConfig::new().dispatch_socket(&path)).unwrap();
    assert!(!core.try_join().unwrap());
    for _ in 0..10 {
        let_time_pass(&core);
        assert!(greets(&core));
    }
    let waiting = hellos(&socket);
    assert_eq!(waiting.len(), 1, "one attempt, however long it takes");
    assert!(waiting[0].1 > 0);
    // This dispatcher has read the hello and does not answer: the worker tries again.
    let_time_pass(&core);
    assert!(!greets(&core));
    greet_again(&core);

    // Another socket takes the path. The old one is still open somewhere.
    std::fs::remove_file(&path).unwrap();
    let next = listener(&path);
    let_time_pass(&core);
    assert!(!greets(&core));
    greet_again(&core);
    assert_eq!(hellos(&next).len(), 1);
}

/// It does not wait at the first socket when the second may lead to a dispatcher.
#[test]
fn with_two_sockets_a_hello_without_an_answer_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let paths = ["a.sock", "b.sock"].map(|name| directory.path().join(name));
    let held = listener(&paths[0]);
    let setting = format!("{}:{}", paths[0].display(), paths[1].display());
    let core = WorkerCore::new(&WorkerConfig::new().dispatch_socket(setting)).unwrap();
    assert!(!core.try_join().unwrap());
    assert!(greets(&core));
    let second = listener(&paths[1]);
    let_time_pass(&core);
    assert!(greets(&core), "the second, at once");
    assert_eq!((hellos(&held).len(), hellos(&second).len()), (1, 1));
}
