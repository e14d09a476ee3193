//! `worker_sdk::prefork` with a dispatcher in its simplest form: the records, the gate, and the
//! ends of either side.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use dispatch_protocol::Token;
use dispatch_protocol::wire::{self, Fork, Forked, NotForked, Prefork};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair, sockopt,
};
use rustix::pipe::{PipeFlags, pipe_with};

use super::*;

/// A parent, and its channel. The parent finds the channel on its standard input.
struct Parent {
    process: Process,
    channel: OwnedFd,
    log: std::path::PathBuf,
    _temp: TempDir,
}

impl Parent {
    fn start(mode: &str) -> Parent {
        let (channel, its) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        sockopt::set_socket_timeout(
            &channel,
            sockopt::Timeout::Recv,
            Some(std::time::Duration::from_secs(20)),
        )
        .unwrap();
        let temp = tempfile::tempdir().unwrap();
        let log = temp.path().join("log");
        let file = std::fs::File::create(&log).unwrap();
        let mut command = Command::new(example("test-worker"));
        command.args(["prefork", "blocking"]).stdin(its).stdout(file.try_clone().unwrap());
        command.stderr(file).env("DISPATCH_PREFORK_FD", "0").env("TEST_PREFORK", mode);
        command.env("RUST_LOG", "error").env("DISPATCH_SOCKET", "/nonexistent/dispatch.sock");
        Parent { process: Process::start("parent", &mut command), channel, log, _temp: temp }
    }

    /// Orders a worker; returns its gate.
    fn order(&self, id: u64, variables: &[(&str, &str)]) -> OwnedFd {
        let (its, gate) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let variables =
            variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        let fork = Fork { id, name: format!("web-{id}"), token: Token([7; 16]), variables };
        let mut bytes = Vec::new();
        fork.encode(&mut bytes);
        self.send(&bytes, &[its.as_fd()]);
        gate
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::NOSIGNAL;
        sendmsg(&self.channel, &[IoSlice::new(bytes)], &mut ancillary, flags).unwrap();
    }

    /// The next answer; `None` at the end of the parent.
    fn answer(&self) -> Option<Prefork> {
        let mut buffer = [0; 4096];
        let mut ancillary = RecvAncillaryBuffer::default();
        let flags = RecvFlags::empty();
        match recvmsg(&self.channel, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, flags) {
            Ok(message) if message.bytes == 0 => None,
            Ok(message) => Some(Prefork::decode(&buffer[..message.bytes]).unwrap()),
            // It had not read everything.
            Err(rustix::io::Errno::CONNRESET) => None,
            Err(error) => panic!("no answer: {error}"),
        }
    }

    fn forked(&self, id: u64) -> i32 {
        match self.answer() {
            Some(Prefork::Forked(Forked { id: of, pid })) if of == id => pid as i32,
            other => panic!("{other:?}"),
        }
    }

    fn ended(&self, pid: i32) -> u32 {
        match self.answer() {
            Some(Prefork::Ended(wire::Ended { pid: of, status })) if of as i32 == pid => status,
            other => panic!("{other:?}"),
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}

fn open(gate: OwnedFd) {
    assert_eq!(rustix::io::write(&gate, &[1]), Ok(1));
}

#[test]
fn a_worker_waits_at_its_gate() {
    let mut parent = Parent::start("fails");
    let (first, second) = (parent.order(1, &[]), parent.order(2, &[("OWN", "a=b"), ("SAME", "")]));
    let (one, two) = (parent.forked(1), parent.forked(2));
    for pid in [one, two] {
        assert_eq!(
            words(pid, "stat", "")[3..5],
            [parent.process.pid().to_string(), pid.to_string()]
        );
    }
    // Without the byte the application does not run. The other worker does not hold the gate.
    drop(first);
    assert_eq!(parent.ended(one), 0);
    assert!(!parent.log().contains("it was told to fail"));
    open(second);
    assert_eq!(parent.ended(two), 1 << 8, "exit status 1");
    assert!(parent.log().contains("Error: \"it was told to fail\""), "{}", parent.log());
    // The parent ends with the dispatcher, and returns from `prefork`.
    assert!(!parent.log().contains("not needed any more"));
    rustix::net::shutdown(&parent.channel, rustix::net::Shutdown::Write).unwrap();
    assert!(parent.process.wait().success());
    assert!(parent.log().contains("not needed any more"), "{}", parent.log());
    assert_eq!(parent.log().matches("loaded").count(), 1, "{}", parent.log());
}

/// It does not unwind into the caller of `prefork`, whose values belong to the parent.
#[test]
fn a_worker_that_panics_ends_like_a_program_that_does() {
    let parent = Parent::start("panics");
    let gate = parent.order(1, &[]);
    let pid = parent.forked(1);
    open(gate);
    assert_eq!(parent.ended(pid), 101 << 8);
    let log = parent.log();
    assert!(log.contains("it was told to panic") && !log.contains("not needed any more"), "{log}");
    let gate = parent.order(2, &[]);
    let pid = parent.forked(2);
    drop(gate);
    assert_eq!(parent.ended(pid), 0, "the parent continues");
}

#[test]
fn a_worker_runs_with_its_variables_and_without_the_channel() {
    let mut parent = Parent::start("");
    let gate = parent.order(3, &[("OWN", "a=b"), ("SAME", "c")]);
    let pid = parent.forked(3);
    let _ends = Ended(vec![pid]);
    open(gate);
    wait_until("the application to run", || parent.log().contains("forked a=b c"));
    // The channel is not among its descriptors, and no pidfd.
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
    let links: Vec<String> = links.map(|link| link.to_string_lossy().into_owned()).collect();
    let channel = format!("/proc/{}/fd/0", parent.process.pid());
    let channel = std::fs::read_link(channel).unwrap().to_string_lossy().into_owned();
    assert!(channel.starts_with("socket:"), "{channel}");
    assert!(!links.iter().any(|link| link.contains("pidfd") || *link == channel), "{links:?}");
    // It continues without its parent, which ends by SIGTERM.
    end(parent.process.pid(), Signal::SIGTERM);
    assert!(!parent.process.wait().success());
    assert_eq!(parent.answer(), None);
    assert!(lives(pid));
    end(pid, Signal::SIGKILL);
    wait_until("its end", || !lives(pid));
}

#[test]
fn a_waiting_worker_ends_with_its_dispatcher() {
    for parent_first in [false, true] {
        let mut parent = Parent::start("");
        let gate = parent.order(1, &[]);
        let pid = parent.forked(1);
        if parent_first {
            parent.process.kill();
            assert!(lives(pid), "it waits");
            drop(gate);
        } else {
            // All descriptors of a dispatcher are closed when it is killed.
            drop(gate);
            rustix::net::shutdown(&parent.channel, rustix::net::Shutdown::Both).unwrap();
            parent.process.wait();
        }
        wait_until("its end", || !lives(pid));
        assert!(!parent.log().contains("forked"), "{}", parent.log());
    }
}

#[test]
fn two_threads_are_refused_and_a_wrong_order_ends_the_parent() {
    let mut parent = Parent::start("thread");
    let gate = parent.order(9, &[]);
    match parent.answer() {
        Some(Prefork::NotForked(NotForked { id: 9, reason })) => {
            assert!(reason.starts_with("the parent has 2 threads; "), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    drop(gate);
    wait_until("its log", || parent.log().contains("worker web-9 is not forked: the parent has 2"));
    parent.send(&[1, 2, 3], &[]);
    assert_eq!(parent.answer(), None);
    assert!(!parent.process.wait().success());
    assert!(parent.log().contains("an order is not well-formed"), "{}", parent.log());

    // A fork without a gate.
    let mut parent = Parent::start("");
    let mut bytes = Vec::new();
    Fork { id: 1, name: "w".to_owned(), token: Token([0; 16]), variables: vec![] }
        .encode(&mut bytes);
    parent.send(&bytes, &[]);
    assert_eq!(parent.answer(), None);
    assert!(!parent.process.wait().success());
}

#[test]
fn a_number_that_is_no_channel_is_refused() {
    for (number, problem) in
        [("x", "is not a number"), ("77", "Bad file descriptor"), ("0", "socket")]
    {
        let mut command = Command::new(example("test-worker"));
        command.args(["prefork", "blocking"]).stdin(std::process::Stdio::null());
        let output = command.env("DISPATCH_PREFORK_FD", number).output().unwrap();
        assert!(!output.status.success());
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("DISPATCH_PREFORK_FD") && text.contains(problem), "{number}: {text}");
    }
}
