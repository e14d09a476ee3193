//! Tests that closes that block delay nothing else. Sockets with linger are real; a drop that waits
//! stands for a call that no signal ends.

use std::io::{IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use dispatch_protocol::scoreboard::slot;
use rustix::net::sockopt::set_socket_linger;

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

fn started(threads: u32, waiting: u32) -> (Closers, Receiver<WorkerId>) {
    let (sender, purged) = channel();
    let closers = Closers::start(Bounds { threads, waiting }, sender, Arc::new(|| {}));
    (closers.expect("threads"), purged)
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn hand_over(closers: &mut Closers) {
    wait_until("the queue to be free", || closers.hand_over());
}

/// Both ends of a connection.
fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let theirs = TcpStream::connect(listener.local_addr().expect("its address")).expect("room");
    (listener.accept().expect("a client").0, theirs)
}

/// A socket whose close takes an hour unless it is interrupted, and its other end, which never
/// reads.
fn trap() -> (OwnedFd, TcpStream) {
    let (mut ours, theirs) = connection();
    ours.set_nonblocking(true).expect("an option");
    set_socket_linger(&ours, Some(Duration::from_secs(3600))).expect("an option");
    while ours.write(&[0; 65_536]).is_ok() {}
    (ours.into(), theirs)
}

fn worker(serial: u64) -> WorkerId {
    WorkerId { index: serial as u32, serial }
}

#[test]
fn a_copy_is_closed_before_its_slot_reads_released() {
    let (mut closers, _purged) = started(4, 64);
    let board = Arc::new(Scoreboard::create(64, 0).expect("memory").0);
    for round in 1..200 {
        let mut ends = Vec::new();
        for slot in 0..10 {
            let (ours, theirs) = UnixStream::pair().expect("a pair");
            theirs.set_nonblocking(true).expect("an option");
            let word = board.slot(slot).expect("a slot");
            slot::offer(word, round);
            assert!(slot::take(word, round));
            closers.release(ours.into(), &board, (slot, round), worker(1));
            ends.push((slot, theirs));
        }
        hand_over(&mut closers);
        for (slot, mut theirs) in ends {
            let word = board.slot(slot).expect("a slot");
            wait_until("RELEASED", || !slot::dispatcher_has_copy(word, round));
            // The close came before the wait.
            assert_eq!(theirs.read(&mut [0]).expect("the end"), 0);
        }
    }
    wait_until("all to be counted", || closers.closing().waiting == 0);
}

#[test]
fn a_slot_that_was_used_again_is_left_alone() {
    let (mut closers, _purged) = started(4, 64);
    let board = Arc::new(Scoreboard::create(1, 0).expect("memory").0);
    let word = board.slot(0).expect("a slot");
    slot::offer(word, 7);
    assert!(slot::take(word, 7));
    slot::offer(word, 8);
    assert!(slot::take(word, 8));
    let (ours, _theirs) = UnixStream::pair().expect("a pair");
    closers.release(ours.into(), &board, (0, 7), worker(1));
    hand_over(&mut closers);
    wait_until("the close", || closers.closing().waiting == 0);
    assert!(slot::dispatcher_has_copy(word, 8));
}

#[test]
fn lingering_closes_delay_no_other_close_and_are_interrupted() {
    let (mut closers, _purged) = started(4, 1_000);
    let board = Arc::new(Scoreboard::create(64, 0).expect("memory").0);
    let mut peers = Vec::new();
    for seq in 1..30 {
        let (fd, theirs) = trap();
        let word = board.slot(seq as u32).expect("a slot");
        slot::offer(word, seq);
        assert!(slot::take(word, seq));
        closers.release(fd, &board, (seq as u32, seq), worker(1));
        peers.push(theirs);
    }
    let (mut end, ours) = connection();
    closers.task(Task::Close(ours.into()));
    let begun = Instant::now();
    hand_over(&mut closers);
    assert_eq!(end.read(&mut [0]).expect("the end"), 0);
    assert!(begun.elapsed() < Duration::from_secs(20), "an hour each");
    wait_until("all to be closed", || closers.closing().waiting == 0);
    assert!(closers.closing().interrupted > 0);
    assert!(
        (1..30).all(|seq| !slot::dispatcher_has_copy(board.slot(seq as u32).expect("a slot"), seq))
    );
}

#[test]
fn beyond_the_bound_linger_is_cleared_first() {
    let (mut closers, _purged) = started(2, 16);
    let mut peers = Vec::new();
    for _ in 0..100 {
        let (fd, theirs) = trap();
        closers.task(Task::Drop(Owner::Worker(1), Box::new(())));
        closers.task(Task::End { fd, response: None, owner: Some(Owner::Worker(1)) });
        peers.push(theirs);
    }
    assert!(!closers.is_full(), "not handed over yet");
    hand_over(&mut closers);
    wait_until("all to be closed", || closers.closing().waiting == 0);
    // Some of the last closes, when no more than 16 were left.
    assert!(closers.closing().interrupted < 100, "{:?}", closers.closing());
}

/// Its drop blocks until it is released, and no signal ends it.
#[derive(Debug)]
struct Stuck(Receiver<()>);

impl Drop for Stuck {
    fn drop(&mut self) {
        let _ = self.0.recv();
    }
}

fn channel_with(fds: &[OwnedFd]) -> (OwnedFd, Arc<OwnedFd>) {
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .expect("a pair");
    for fd in fds {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
        let fds = [fd.as_fd()];
        assert!(ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
        let parts = [IoSlice::new(b"record")];
        let flags = rustix::net::SendFlags::empty();
        rustix::net::sendmsg(&ours, &parts, &mut ancillary, flags).expect("room");
    }
    (ours, Arc::new(theirs))
}

#[test]
fn a_purge_closes_the_queue_and_blocks_only_its_owner() {
    let (mut closers, purged) = started(2, 64);
    let (go, stuck) = channel();
    closers.task(Task::Drop(Owner::Worker(1), Box::new(Stuck(stuck))));
    let (trap, _reads_nothing) = trap();
    let (plain, mut end) = UnixStream::pair().expect("a pair");
    let (_ours, retained) = channel_with(&[trap, plain.into()]);
    let purge = |serial, retained: &Arc<OwnedFd>| Task::Purge {
        worker: worker(serial),
        retained: Arc::clone(retained),
        most: 64,
    };
    closers.task(purge(1, &retained));
    closers.task(purge(2, &retained));
    hand_over(&mut closers);
    assert_eq!(purged.recv_timeout(PATIENCE).expect("a report"), worker(2));
    assert_eq!(end.read(&mut [0]).expect("the end"), 0);
    assert!(purged.try_recv().is_err(), "the first one's owner is still at something else");
    go.send(()).expect("it waits");
    assert_eq!(purged.recv_timeout(PATIENCE).expect("a report"), worker(1));
    wait_until("all to be closed", || closers.closing().waiting == 0);
}

#[test]
fn while_all_threads_are_held_up_only_closes_go_on() {
    let (mut closers, purged) = started(2, 64);
    let goes: Vec<_> = (1..=2)
        .map(|serial| {
            let (go, stuck) = channel();
            closers.task(Task::Drop(Owner::Worker(serial), Box::new(Stuck(stuck))));
            go
        })
        .collect();
    let mut ends = Vec::new();
    let mut peers = Vec::new();
    for serial in 3..10 {
        let (client, end) = connection();
        let response = Some(Arc::from(&b"sorry"[..]));
        let owner = Some(Owner::Worker(serial));
        closers.task(Task::End { fd: client.into(), response, owner });
        ends.push(end);
        let (fd, peer) = trap();
        closers.task(Task::Close(fd));
        peers.push(peer);
        let (_ours, retained) = channel_with(&[]);
        closers.task(Task::Purge { worker: worker(serial), retained, most: 64 });
    }
    hand_over(&mut closers);
    for mut end in ends {
        assert_eq!(end.read(&mut [0; 16]).expect("the end"), 0, "closed without a response");
    }
    let mut reported: Vec<u64> =
        (3..10).map(|_| purged.recv_timeout(PATIENCE).expect("a report").serial).collect();
    reported.sort_unstable();
    assert_eq!(reported, (3..10).collect::<Vec<_>>());
    assert_eq!(closers.closing().left_out, 14);
    drop(goes);
    wait_until("all to be closed", || closers.closing().waiting == 0);
}

#[test]
fn a_client_that_is_turned_away_reads_the_response() {
    let (mut closers, _purged) = started(2, 64);
    let sorry: Arc<[u8]> = Arc::from(&b"sorry"[..]);
    for owner in [None, Some(Owner::Other), Some(Owner::Worker(1))] {
        let (ours, mut client) = connection();
        client.write_all(b"GET / HTTP/1.1").expect("room");
        // A stopped worker has such a copy.
        let copy = ours.try_clone().expect("a descriptor");
        let response = Some(Arc::clone(&sorry));
        closers.task(Task::End { fd: ours.into(), response, owner });
        hand_over(&mut closers);
        let mut text = String::new();
        client.read_to_string(&mut text).expect("the end, and no reset");
        assert_eq!(text, "sorry");
        drop(copy);
    }
}

/// Panics when it is dropped.
#[derive(Debug)]
struct Defect;

impl Drop for Defect {
    fn drop(&mut self) {
        panic!("on purpose");
    }
}

#[test]
fn a_panic_ends_no_thread_and_loses_nothing_that_waits() {
    let (mut closers, purged) = started(2, 64);
    for round in 0..3 {
        let (lingers, _reads_nothing) = trap();
        let (one, mut first) = connection();
        let (other, mut second) = connection();
        closers.task(Task::Close(one.into()));
        closers.task(Task::Panic);
        closers.task(Task::Drop(Owner::Worker(1), Box::new(Defect)));
        closers.task(Task::Drop(Owner::Other, Box::new(Defect)));
        closers.task(Task::Close(lingers));
        let (_ours, retained) = channel_with(&[]);
        // A task of the same owner after one that panics.
        closers.task(Task::Purge { worker: worker(1), retained, most: 64 });
        closers.task(Task::Close(other.into()));
        hand_over(&mut closers);
        for end in [&mut first, &mut second] {
            assert_eq!(end.read(&mut [0]).expect("the end"), 0, "in round {round}");
        }
        assert_eq!(purged.recv_timeout(PATIENCE).expect("a report"), worker(1));
        wait_until("all to be counted", || closers.closing().waiting == 0);
    }
}

#[test]
fn the_watchdog_goes_on_after_a_panic() {
    let (sender, _purged) = channel();
    let panics = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let wake = Arc::clone(&panics);
    let closers = Closers::start(
        Bounds { threads: 1, waiting: 64 },
        sender,
        // The closer calls this when it drops a purge.
        Arc::new(move || assert!(!wake.swap(false, Ordering::SeqCst), "on purpose")),
    );
    let mut closers = closers.expect("threads");
    let (go, stuck) = channel();
    closers.task(Task::Drop(Owner::Worker(1), Box::new(Stuck(stuck))));
    let (_ours, retained) = channel_with(&[]);
    closers.task(Task::Purge { worker: worker(2), retained, most: 64 });
    hand_over(&mut closers);
    wait_until("the panic", || !panics.load(Ordering::SeqCst));
    // Only the watchdog can have this closed while the slow lane is blocked.
    let (fd, _reads_nothing) = trap();
    closers.task(Task::Close(fd));
    let waiting = closers.closing().waiting;
    hand_over(&mut closers);
    wait_until("the trap to be closed", || closers.closing().waiting <= waiting);
    drop(go);
}
