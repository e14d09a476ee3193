//! Either dispatcher is killed at each step of a take-over.

use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use super::*;

/// A new dispatcher that the test plays. Its end looks like the end of a process.
pub(super) struct Peer(OwnedFd);

impl Peer {
    pub(super) fn connect(dir: &Path) -> Peer {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
        let path = dir.join("dispatch.sock.take-over");
        rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE)).unwrap();
        Peer(socket)
    }

    pub(super) fn send(&self, record: &str) {
        let _ = rustix::net::send(&self.0, record.as_bytes(), SendFlags::NOSIGNAL);
    }

    pub(super) fn hello(&self) {
        self.send(r#"{"record":"hello","version":1,"program":"test"}"#);
    }

    /// The next record; `None` at the end. Descriptors are closed.
    pub(super) fn receive(&self) -> Option<String> {
        let mut bytes = vec![0; 64 * 1024];
        match rustix::net::recv(&self.0, &mut bytes, RecvFlags::empty()) {
            Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => None,
            Ok((length, _)) => Some(String::from_utf8_lossy(&bytes[..length]).into_owned()),
            Err(error) => panic!("{error}"),
        }
    }

    /// Receives until a record of this kind.
    fn receive_to(&self, kind: &str) -> String {
        loop {
            let record = self.receive().expect("more records");
            if record.contains(&format!("\"record\":\"{kind}\"")) {
                return record;
            }
        }
    }
}

#[test]
fn a_new_dispatcher_that_fails_at_any_step_changes_nothing() {
    let address = free_address();
    let temp = configure(&one_listener(address, PATIENT));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let mut streams = clients_without_a_worker(&dispatcher, 10);
    let descriptors = dispatcher.fds();
    for step in 0..8 {
        let peer = Peer::connect(temp.path());
        if step > 0 {
            peer.hello();
        }
        if step > 1 {
            peer.receive_to("welcome");
        }
        if step > 2 {
            peer.receive_to("socket");
        }
        if step > 3 {
            peer.receive_to("end");
            peer.send(r#"{"record":"unused","socket":0}"#);
        }
        if step > 4 {
            peer.send(r#"{"record":"ready"}"#);
            assert!(peer.receive_to("clients").contains("\"resent\":true"));
        }
        if step > 5 {
            peer.send(r#"{"record":"received","clients":10}"#);
        }
        if step > 6 {
            peer.receive_to("commit");
        }
        drop(peer);
        let failures = step + 1;
        wait_until("the failure to be noticed", || {
            dispatcher.log().matches("event=take_over_failed").count() == failures
        });
        assert_eq!(dispatcher.status().queued, 10, "step {step}");
        streams.push(connect(address));
        wait_until("the copies to be closed", || dispatcher.fds() <= descriptors + 1);
    }
    assert!(dispatcher.process.running());
    // A whole take-over is still possible.
    replace(&mut dispatcher);
    let _worker = dispatcher.worker("blocking", "web", "late");
    let clients = all_greeted(streams);
    assert_eq!(tally(&clients)["late"], 18);
    clients.into_iter().for_each(Client::finish);
}

/// strace, which kills the process at the `when`th record that one of its threads sends.
fn killing(when: u32) -> Command {
    let mut command = Command::new("strace");
    command.args(["-q", "-o", "/dev/null", "-e", "trace=sendmsg", "-e"]);
    command.arg(format!("inject=sendmsg:signal=SIGKILL:when={when}"));
    command
}

fn has_strace() -> bool {
    let found = Command::new("strace").arg("-V").output().is_ok();
    if !found {
        skip("needs strace");
    }
    found
}

#[test]
fn a_new_dispatcher_that_is_killed_at_any_step_changes_nothing() {
    if !has_strace() {
        return;
    }
    let address = free_address();
    let temp = configure(&one_listener(address, PATIENT));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let mut streams = clients_without_a_worker(&dispatcher, 10);
    // hello, ready, received, committed
    for when in 1..=4 {
        let mut command = killing(when);
        command.arg(dispatcher_bin());
        let mut killed = Process::start("killed", &mut taking_over(temp.path(), command));
        assert!(!killed.wait().success());
        assert!(dispatcher.process.running());
        assert_eq!(dispatcher.status().queued, 10, "record {when}\n{}", dispatcher.log());
        streams.push(connect(address));
    }
    assert!(!dispatcher.log().contains("event=taken_over"), "{}", dispatcher.log());
    replace(&mut dispatcher);
    let _worker = dispatcher.worker("blocking", "web", "late");
    let clients = all_greeted(streams);
    assert_eq!(tally(&clients)["late"], 14);
    clients.into_iter().for_each(Client::finish);
}

/// Starts strace on a running dispatcher, on all its threads or on the first.
fn kill_later(dispatcher: &Dispatcher, when: u32, all: bool) -> Process {
    let mut command = killing(when);
    command.args(all.then_some("-f")).arg("-p").arg(dispatcher.process.pid().to_string());
    let tracer = Process::start("strace", command.stderr(Stdio::null()));
    let tasks = Path::new("/proc").join(dispatcher.process.pid().to_string()).join("task");
    wait_until("the threads to be traced", || {
        let traced = |task: &Path| {
            let status = std::fs::read_to_string(task.join("status")).unwrap_or_default();
            !status.contains("TracerPid:\t0\n")
        };
        match all {
            true => std::fs::read_dir(&tasks).unwrap().flatten().all(|task| traced(&task.path())),
            false => traced(&tasks.join(dispatcher.process.pid().to_string())),
        }
    });
    tracer
}

#[test]
fn a_running_dispatcher_that_is_killed_at_any_step_is_replaced() {
    if !has_strace() {
        return;
    }
    let address = free_address();
    let temp = configure(&one_listener(address, PATIENT));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    // welcome, four sockets, end; and the commit of the first thread
    let steps = [(1, true), (3, true), (5, true), (6, true), (1, false)];
    for (ends_seen, (when, all)) in (1..).zip(steps) {
        // No worker is there: these clients wait in the kernel's queue.
        let waiting: Vec<TcpStream> = (0..5).map(|_| connect(address)).collect();
        let mut tracer = kill_later(&dispatcher, when, all);
        let new = Dispatcher::start_by(
            temp.path(),
            &mut taking_over(temp.path(), Command::new(dispatcher_bin())),
        );
        assert!(!dispatcher.process.wait().success(), "it was killed");
        tracer.wait();
        dispatcher = new;
        wait_until("the end to be noticed", || {
            dispatcher.log().matches("event=take_over_after_end").count() == ends_seen
        });
        let mut worker = dispatcher.worker("blocking", "web", "late");
        dispatcher.wait_joined("web", 1);
        if when > 5 || !all {
            // The new dispatcher had the listener.
            let clients = all_greeted(waiting);
            clients.into_iter().for_each(Client::finish);
        }
        Client::connect(address).unwrap().finish();
        worker.kill();
        dispatcher.wait_joined("web", 0);
    }
    assert!(dispatcher.stop().success());
    assert!(!dispatcher.dispatch().exists());
}
