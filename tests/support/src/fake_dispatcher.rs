//! The dispatcher's side of the protocol in its simplest form, for tests of workers over real
//! sockets.

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dispatch_protocol::scoreboard::{Scoreboard, slot};
use dispatch_protocol::wire::{
    Channel, Control, Entry, EntryFlags, Features, Handoff, Hello, Probe, Refused, RefusedCode,
    VERSION, Welcome, WelcomeListener,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, recv,
    recvmsg, sendmsg, shutdown, socket_with, socketpair,
};
use worker_sdk::{Connection, Worker, WorkerConfig};

/// The deadline of every wait.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `condition` holds; panics with `what` when it never does.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn wait_readable(fd: BorrowedFd<'_>, what: &str) {
    let timeout = Timespec::try_from(DEADLINE).unwrap();
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap();
    assert!(ready > 0, "never came: {what}");
}

pub struct FakeDispatcher {
    _dir: tempfile::TempDir,
    path: PathBuf,
    listener: Option<OwnedFd>,
    tcp: TcpListener,
}

/// A worker in this process, and its dispatcher's view of it.
pub fn join(fake: &FakeDispatcher) -> (Worker, Peer) {
    join_with(fake, fake.config())
}

/// The same with another configuration.
pub fn join_with(fake: &FakeDispatcher, config: WorkerConfig) -> (Worker, Peer) {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| Worker::connect(config).unwrap());
        let peer = fake.welcome();
        (worker.join().unwrap(), peer)
    })
}

/// The next connection of a worker that is not closed.
pub fn accept(worker: &Worker) -> Connection {
    worker.accept().unwrap().expect("not closed")
}

impl Default for FakeDispatcher {
    fn default() -> FakeDispatcher {
        FakeDispatcher::new()
    }
}

impl FakeDispatcher {
    /// A dispatcher that listens.
    pub fn new() -> FakeDispatcher {
        let mut fake = FakeDispatcher::absent();
        fake.start();
        fake
    }

    /// A dispatcher whose socket does not exist yet.
    pub fn absent() -> FakeDispatcher {
        let dir = tempfile::tempdir().unwrap();
        FakeDispatcher {
            path: dir.path().join("dispatch.sock"),
            _dir: dir,
            listener: None,
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
        }
    }

    pub fn start(&mut self) {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
        listen(&socket, 64).unwrap();
        self.listener = Some(socket);
    }

    pub fn stop(&mut self) {
        self.listener = None;
        std::fs::remove_file(&self.path).unwrap();
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn config(&self) -> WorkerConfig {
        let (min, max) = (Duration::from_millis(5), Duration::from_millis(50));
        WorkerConfig::new()
            .dispatch_socket(&self.path)
            .name("tested")
            .max_connections(1000)
            .reconnect(min, max)
    }

    /// Whether a worker waits to be accepted.
    pub fn has_worker(&self) -> bool {
        let listener = self.listener.as_ref().unwrap();
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        poll(&mut fds, Some(&none)).unwrap() > 0
    }

    /// The next worker's hello, and its control connection.
    pub fn hello(&self) -> (Hello, OwnedFd) {
        let listener = self.listener.as_ref().unwrap();
        wait_readable(listener.as_fd(), "a worker");
        let control = accept_with(listener, SocketFlags::CLOEXEC).unwrap();
        match control_record(&control) {
            Some(Control::Hello(hello)) => (hello, control),
            other => panic!("expected a hello, got {other:?}"),
        }
    }

    pub fn refuse(&self, code: RefusedCode, reason: &str, key: Option<&str>) -> Hello {
        let (hello, control) = self.hello();
        let mut record = Vec::new();
        let refused = Refused { code, reason: reason.to_owned(), key: key.map(str::to_owned) };
        refused.encode(&mut record);
        send(control.as_fd(), &record, &[]).unwrap();
        hello
    }

    /// Accepts the next worker.
    pub fn welcome(&self) -> Peer {
        self.welcome_with(256)
    }

    pub fn welcome_with(&self, slots: u32) -> Peer {
        self.welcome_scoring(slots, &[])
    }

    /// Accepts the next worker into a pool that scores by these gauges.
    pub fn welcome_scoring(&self, slots: u32, gauges: &[&str]) -> Peer {
        let gauges = gauges.iter().map(|name| name.parse().unwrap()).collect();
        self.welcome_as(slots, |welcome| welcome.gauges = gauges)
    }

    /// Accepts the next worker into a pool with keys.
    pub fn welcome_with_affinity(&self) -> Peer {
        self.welcome_as(256, |welcome| welcome.features = Features::CLAIM)
    }

    /// Accepts the next worker with the feature of updates.
    pub fn welcome_with_updates(&self) -> Peer {
        self.welcome_as(256, |welcome| welcome.features = Features::UPDATE)
    }

    /// Accepts the next worker into a pool with keys, with the feature of updates.
    pub fn welcome_with_affinity_and_updates(&self) -> Peer {
        let both = Features(Features::CLAIM.0 | Features::UPDATE.0);
        self.welcome_as(256, |welcome| welcome.features = both)
    }

    fn welcome_as(&self, slots: u32, change: impl FnOnce(&mut Welcome)) -> Peer {
        let (hello, control) = self.hello();
        let peer = Peer::new(hello, control, slots);
        let mut record = Vec::new();
        let mut welcome = peer.welcome_record(slots);
        change(&mut welcome);
        welcome.encode(&mut record);
        let (board, retained, doorbell) = (&peer.board_fd, &peer.retained, &peer.doorbell);
        send(peer.control.as_fd(), &record, &[retained.as_fd(), board.as_fd(), doorbell.as_fd()])
            .unwrap();
        peer
    }

    /// A client, and the dispatcher's copy of its connection.
    pub fn client(&self) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(self.tcp.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        let address = client.local_addr().unwrap();
        loop {
            let (accepted, peer) = self.tcp.accept().unwrap();
            // Tests share nothing, so the connection belongs to this test; check it anyway.
            if peer == address {
                return (client, accepted);
            }
        }
    }
}

pub fn control_record(control: &OwnedFd) -> Option<Control> {
    wait_readable(control.as_fd(), "a control record");
    let mut buffer = [0; 8192];
    let (n, _) = recv(control, &mut buffer[..], RecvFlags::empty()).unwrap();
    (n > 0).then(|| Control::decode(&buffer[..n]).unwrap())
}

pub fn send(fd: BorrowedFd<'_>, record: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(fd, &[IoSlice::new(record)], &mut ancillary, flags).map(drop)
}

/// The time of accept that the records of a [`Peer`] state.
fn a_second_ago() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from((now - Duration::from_secs(1)).as_nanos()).unwrap()
}

/// One joined worker, from the dispatcher's side.
pub struct Peer {
    pub hello: Hello,
    pub control: OwnedFd,
    /// The dispatcher's end of the channel.
    pub channel: Option<OwnedFd>,
    /// The dispatcher's copy of the worker's end.
    pub retained: OwnedFd,
    pub board: Scoreboard,
    pub board_fd: OwnedFd,
    pub doorbell: OwnedFd,
    next: u64,
    slots: u32,
}

impl Peer {
    fn new(hello: Hello, control: OwnedFd, slots: u32) -> Peer {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        shutdown(&ours, Shutdown::Read).unwrap();
        let (board, board_fd) = Scoreboard::create(slots, hello.finished).unwrap();
        Peer {
            hello,
            control,
            channel: Some(ours),
            retained: theirs,
            board,
            board_fd,
            doorbell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
            next: 1,
            slots,
        }
    }

    pub fn welcome_record(&self, slots: u32) -> Welcome {
        Welcome {
            version: VERSION,
            slots,
            worker_id: 42,
            features: Features::NONE,
            max_connections: self.hello.max_connections,
            handoff_timeout_ms: 5000,
            listeners: vec![WelcomeListener { index: 3, name: "http".to_owned() }],
            gauges: Vec::new(),
            relay_ticket: Vec::new(),
        }
    }

    /// Offers the next slot.
    pub fn offer(&mut self, peer: &TcpStream) -> Entry {
        let seq = self.next;
        self.next += 1;
        let slot = u32::try_from(seq % u64::from(self.slots)).unwrap();
        slot::offer(self.board.slot(slot).unwrap(), seq);
        Entry {
            seq,
            slot,
            listener: 3,
            flags: EntryFlags::NONE,
            accepted_ns: a_second_ago(),
            peer: peer.peer_addr().unwrap().into(),
            number: 7_000 + seq,
        }
    }

    /// Offers and sends these connections in one record.
    pub fn send(&mut self, connections: &[&TcpStream]) -> Vec<Entry> {
        let entries: Vec<Entry> = connections.iter().map(|c| self.offer(c)).collect();
        let fds: Vec<_> = connections.iter().map(|c| c.as_fd()).collect();
        self.send_raw(&entries, &fds);
        entries
    }

    pub fn send_one(&mut self, connection: &TcpStream) -> Entry {
        self.send(&[connection])[0]
    }

    pub fn send_raw(&self, entries: &[Entry], fds: &[BorrowedFd<'_>]) {
        let mut record = Vec::new();
        Handoff::encode_entries(entries, &mut record);
        self.send_bytes(&record, fds);
    }

    pub fn send_bytes(&self, record: &[u8], fds: &[BorrowedFd<'_>]) {
        send(self.channel.as_ref().unwrap().as_fd(), record, fds).unwrap();
    }

    pub fn probe(&mut self) -> Probe {
        let seq = self.next;
        self.next += 1;
        let slot = u32::try_from(seq % u64::from(self.slots)).unwrap();
        slot::offer(self.board.slot(slot).unwrap(), seq);
        let probe = Probe { seq, slot };
        let mut record = Vec::new();
        Channel::Probe(probe).encode(&mut record);
        self.send_bytes(&record, &[]);
        probe
    }

    pub fn state(&self, entry: &Entry) -> slot::SlotState {
        slot::state(self.board.slot(entry.slot).unwrap(), entry.seq)
    }

    pub fn revoke(&self, entry: &Entry) -> slot::Revoke {
        slot::revoke(self.board.slot(entry.slot).unwrap(), entry.seq)
    }

    pub fn release(&self, entry: &Entry) {
        slot::release(self.board.slot(entry.slot).unwrap(), entry.seq);
    }

    pub fn taken(&self, entry: &Entry) -> bool {
        self.state(entry) == slot::SlotState::Taken
    }

    /// Waits until every entry is taken.
    pub fn wait_taken(&self, entries: &[Entry]) {
        eventually("the worker takes them", || entries.iter().all(|entry| self.taken(entry)));
    }

    pub fn wait_finished(&self, count: u64) {
        eventually("the worker counts its closes", || self.board.finished() == count);
    }

    /// Sleeps until a worker rings for one of `bits`, as a dispatcher does, unless `done` already
    /// holds.
    pub fn sleep_unless(&self, bits: u32, done: impl Fn(&Peer) -> bool) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.doorbell, &mut count);
        slot::arm(self.board.want(), bits);
        if !done(self) {
            wait_readable(self.doorbell.as_fd(), "the doorbell");
            assert!(done(self), "rung without a reason");
        }
        self.board.want().store(0, Ordering::SeqCst);
    }

    pub fn control_record(&self) -> Option<Control> {
        control_record(&self.control)
    }

    /// Takes back the records that the worker has not received; returns their number of
    /// descriptors.
    pub fn purge(&self) -> usize {
        let mut purged = 0;
        loop {
            let mut buffer = [0; 8192];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let mut slices = [IoSliceMut::new(&mut buffer)];
            match recvmsg(&self.retained, &mut slices, &mut ancillary, flags) {
                Ok(message) if message.bytes > 0 => purged += 1,
                _ => return purged,
            }
        }
    }

    /// Ends like a dispatcher that dies: closes everything without a goodbye.
    pub fn die(self) -> Scoreboard {
        self.board
    }
}

/// Reads to the end; the end must come before the deadline.
pub fn read_to_end(client: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Whether the client's connection is open: it accepts a write, and has nothing to read.
pub fn is_open(client: &TcpStream) -> bool {
    client.set_nonblocking(true).unwrap();
    let result = client.peek(&mut [0]);
    client.set_nonblocking(false).unwrap();
    matches!(result, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Open file descriptors of this process.
pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
