//! A worker of the line protocol by hand: it does only what a test tells it.

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use test_support::*;

/// A pool `web` with a line socket; `keys` are the pool's.
pub fn start(keys: &str) -> (Dispatcher, std::net::SocketAddr) {
    start_one_pool(&format!("line_socket = \"DIR/line.sock\"\n{keys}"))
}

/// The client's end and the worker's end of a connection.
pub struct LineWorker {
    pub stream: UnixStream,
}

impl LineWorker {
    /// Connects without a report.
    pub fn connect(dispatcher: &Dispatcher) -> LineWorker {
        LineWorker::connect_to(&dispatcher.dir.join("line.sock"))
    }

    pub fn connect_to(path: &Path) -> LineWorker {
        LineWorker { stream: UnixStream::connect(path).unwrap() }
    }

    /// Connects and reports `count`; returns once the dispatcher has it as worker `name`.
    pub fn join(dispatcher: &Dispatcher, count: u64, kind: &str, name: &str) -> LineWorker {
        let worker = LineWorker::connect(dispatcher);
        worker.write(&format!("count={count}&used=0&pid=1&type={kind}\r\n"));
        dispatcher.wait_status("it joins", |status| test_support::worker(status, name).is_some());
        worker
    }

    pub fn write(&self, text: &str) {
        (&self.stream).write_all(text.as_bytes()).unwrap();
    }

    /// Reports a count, and waits until the dispatcher has read it.
    pub fn report(&self, dispatcher: &Dispatcher, count: u64) {
        let before = reports(dispatcher);
        self.write(&format!("count={count}\r\n"));
        dispatcher.wait_status("the report is read", |status| {
            status.line.as_ref().is_some_and(|line| line.reports > before)
        });
    }

    /// Receives one message: the client's address and the connection.
    pub fn take(&self) -> (String, OwnedFd) {
        let (text, mut fds) = self.receive().expect("the stream is open");
        assert_eq!(fds.len(), 1, "one descriptor in each message");
        (text, fds.remove(0))
    }

    /// The same, as a stream.
    pub fn serve(&self) -> TcpStream {
        TcpStream::from(self.take().1)
    }

    /// Receives one message; `None` at the end.
    pub fn receive(&self) -> Option<(String, Vec<OwnedFd>)> {
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = [0; 255];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(self.stream.as_fd(), &mut parts, &mut ancillary, flags);
        // The dispatcher closes a stream with bytes that it does not read.
        if received.as_ref().is_err_and(|error| *error == rustix::io::Errno::CONNRESET) {
            return None;
        }
        let message = received.unwrap();
        let fds = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        });
        let fds: Vec<OwnedFd> = fds.collect();
        let text = String::from_utf8(bytes[..message.bytes].to_vec()).unwrap();
        (!text.is_empty()).then_some((text, fds))
    }
}

/// The reports that the dispatcher has read.
pub fn reports(dispatcher: &Dispatcher) -> u64 {
    dispatcher.status().line.expect("there is a line socket").reports
}

/// The load of a worker.
pub fn load(dispatcher: &Dispatcher, name: &str) -> Option<u64> {
    worker(&dispatcher.status(), name).map(|worker| worker.load)
}

/// Waits until a worker has this load.
#[track_caller]
pub fn wait_load(dispatcher: &Dispatcher, name: &str, wanted: u64) {
    dispatcher.wait_status(&format!("{name} has {wanted}"), |status| {
        worker(status, name).is_some_and(|worker| worker.load == wanted)
    });
}

/// Whether loads are exact on this machine.
pub fn exact(dispatcher: &Dispatcher) -> bool {
    let exact = dispatcher.status().line.expect("there is a line socket").exact;
    if !exact {
        skip("the kernel does not tell the ends of TCP sockets here");
    }
    exact
}

/// Compiles and starts the worker in C as a process of its own.
pub fn c_worker(dispatcher: &Dispatcher, kind: &str) -> Process {
    let binary = dispatcher.dir.join("worker");
    if !binary.exists() {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/line/worker.c");
        let mut cc = Command::new("cc");
        cc.args(["-Wall", "-Wextra", "-Werror", "-O1", "-o"]).arg(&binary).arg(source);
        assert!(cc.status().expect("Rust links with cc").success());
    }
    let mut command = Command::new(&binary);
    command.arg(dispatcher.dir.join("line.sock")).arg(kind).stdin(Stdio::null());
    Process::start(&format!("worker {kind}"), &mut command)
}

/// The only worker.
pub fn worker_of(
    status: &dispatcher::api::status::Status,
) -> &dispatcher::api::status::WorkerStatus {
    let mut workers = status.pools.iter().flat_map(|pool| &pool.workers);
    let only = workers.next().expect("a worker");
    assert!(workers.next().is_none(), "only one");
    only
}
