//! The closing threads and their work.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use dispatch_protocol::scoreboard::{Scoreboard, slot};
use dispatch_protocol::wire::{MAX_CHANNEL_RECORD, MAX_FDS_PER_RECORD};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_linger, socket_linger};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, Shutdown};

use super::slow::{Job, Slot, Turn};
use super::watchdog::{HELD_UP, Member};
use super::{Copy, Owner, Shared, State, Task};
use crate::background::restart;
use dispatcher_core::WorkerId;

/// While the first closer naps it needs no wake-up, so the hot thread pays for none while there is
/// much to close.
const NAP: Duration = Duration::from_millis(1);

/// After so many naps without work the first closer sleeps.
const NAPS: u32 = 2;

/// A thread of the slow lane that was idle for this long ends.
const IDLE: Duration = Duration::from_secs(10);

/// The most descriptors that the kernel lets a message carry.
const MOST_FDS: usize = 253;

/// The work of one round of a closer. The buffers are reused, so that a warm closer allocates
/// nothing and a closer that has panicked continues where it was.
#[derive(Default)]
struct Round {
    /// In reverse order.
    copies: Vec<Copy>,
    /// In reverse order.
    tasks: Vec<Task>,
    /// The scoreboard of the copy before.
    board: Option<Arc<Scoreboard>>,
    slow: Vec<(Owner, Job)>,
    /// For the second closer: descriptors that it closes although the close may linger.
    last: VecDeque<(OwnedFd, Option<Slot>)>,
    /// Taken from the lists above and not yet counted as closed.
    closed: usize,
}

/// The first closer.
pub(super) fn first(shared: &Arc<Shared>) {
    let member = shared.enter();
    let mut round = Round {
        copies: Vec::with_capacity(super::ROOM),
        tasks: Vec::with_capacity(super::ROOM),
        ..Round::default()
    };
    restart::thread("closer-1", || {
        first_rounds(shared, &member, &mut round);
        Ok(())
    });
    shared.leave(&member);
}

fn first_rounds(shared: &Arc<Shared>, member: &Member, round: &mut Round) {
    loop {
        work(shared, member, round);
        let mut state = shared.lock();
        let mut naps = 0;
        while !state.has_work() {
            if state.over {
                return;
            }
            if naps < NAPS {
                naps += 1;
                state.napping = true;
                let waited = shared.first.wait_timeout(state, NAP);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                state.napping = false;
            } else {
                state.asleep = true;
                state = shared.first.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.asleep = false;
                naps = 0;
            }
        }
        shared.wake_watchdog(&mut state);
        take(&mut state, round);
    }
}

/// The second closer: works while the first makes no progress.
pub(super) fn second(shared: &Arc<Shared>) {
    let member = shared.enter();
    let mut round = Round::default();
    restart::thread("closer-2", || {
        second_rounds(shared, &member, &mut round);
        Ok(())
    });
    shared.leave(&member);
}

fn second_rounds(shared: &Arc<Shared>, member: &Member, round: &mut Round) {
    loop {
        work(shared, member, round);
        while let Some((fd, slot)) = round.last.pop_front() {
            close(member, fd, slot.as_ref());
            shared.closed(1);
        }
        let mut state = shared.lock();
        while !state.called && !state.over {
            state = shared.second.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.over {
            return;
        }
        state.called = false;
        take(&mut state, round);
        std::mem::swap(&mut state.last, &mut round.last);
    }
}

fn take(state: &mut State, round: &mut Round) {
    std::mem::swap(&mut state.copies, &mut round.copies);
    std::mem::swap(&mut state.tasks, &mut round.tasks);
    // Each entry is taken out before it is closed, so an entry that causes a panic is not met
    // again.
    round.copies.reverse();
    round.tasks.reverse();
}

/// Closes what does not linger; passes the rest to the slow lane.
fn work(shared: &Arc<Shared>, member: &Member, round: &mut Round) {
    while let Some(Copy { fd, board: another, slot, seq, worker }) = round.copies.pop() {
        round.closed += 1;
        if another.is_some() {
            round.board = another;
        }
        let Some(board) = &round.board else { continue };
        if lingers(&fd) {
            let slot = Slot { board: Arc::clone(board), slot, seq };
            round.put_off(Owner::Worker(worker), Job::Close(fd, Some(slot)));
            continue;
        }
        member.next();
        drop(fd);
        // After the close: a worker that closes before this finds the slot not released and shuts
        // the connection down.
        if let Some(slot) = board.slot(slot) {
            slot::release(slot, seq);
        }
    }
    round.board = None;
    while let Some(task) = round.tasks.pop() {
        round.closed += 1;
        member.next();
        match task {
            Task::Close(fd) if lingers(&fd) => {
                round.put_off(Owner::Other, Job::Close(fd, None));
            }
            Task::Close(fd) => drop(fd),
            Task::End { fd, response, owner: None } => {
                end(&fd, response.as_deref());
                // A listener that a service manager passed can have linger set.
                match lingers(&fd) {
                    true => round.put_off(Owner::Other, Job::Close(fd, None)),
                    false => drop(fd),
                }
            }
            Task::End { fd, response, owner: Some(owner) } => {
                round.put_off(owner, Job::End(fd, response));
            }
            Task::Purge { worker, retained, most } => {
                let owner = Owner::Worker(worker.serial);
                round.put_off(owner, Job::Purge(worker, retained, most));
            }
            Task::Drop(owner, rubbish) => round.put_off(owner, Job::Drop(rubbish)),
            #[cfg(test)]
            Task::Panic => panic!("on purpose"),
        }
    }
    member.end();
    shared.closed(std::mem::take(&mut round.closed));
    if round.slow.is_empty() {
        return;
    }
    let mut state = shared.lock();
    for (owner, job) in round.slow.drain(..) {
        state.slow.push(owner, job);
    }
    call_slow(shared, &mut state);
}

impl Round {
    /// Passes a job to the slow lane, which counts it.
    fn put_off(&mut self, owner: Owner, job: Job) {
        self.slow.push((owner, job));
        self.closed -= 1;
    }
}

/// Whether a close would linger. Reading the option takes no lock; a descriptor that is no socket
/// has no linger.
fn lingers(fd: &OwnedFd) -> bool {
    matches!(socket_linger(fd), Ok(Some(linger)) if linger > Duration::ZERO)
}

/// Starts threads of the slow lane for the jobs that are ready. Returns how many threads it can
/// have: fewer than allowed if the system has none left.
fn call_slow(shared: &Arc<Shared>, state: &mut State) -> usize {
    let most = shared.most_threads.load(Ordering::Relaxed);
    if !state.slow.is_ready() {
        return most;
    }
    if state.slow.idle > 0 {
        shared.lane.notify_all();
        return most;
    }
    if state.slow.threads < most {
        let theirs = Arc::clone(shared);
        let thread = std::thread::Builder::new().name("closer-slow".to_owned());
        // If no thread can be made, the watchdog tries again at its next check.
        if thread.spawn(move || slow(&theirs)).is_err() {
            return state.slow.threads;
        }
        state.slow.threads += 1;
    }
    most
}

/// The watchdog's check of the slow lane: starts threads if needed, and handles the case that all
/// threads are blocked.
pub(super) fn look_after_slow(shared: &Arc<Shared>, state: &mut State) {
    if !state.slow.has_work() {
        return;
    }
    let most = call_slow(shared, state);
    let held_up = state.members.iter().filter(|member| member.looks() >= HELD_UP).count();
    if held_up < most {
        return;
    }
    // All threads are in calls that no signal ends. The second closer closes the waiting
    // descriptors; a lingering close is interrupted.
    for job in state.slow.take_all() {
        match job {
            Job::Close(fd, slot) => state.last.push_back((fd, slot)),
            Job::End(fd, _) => {
                shared.left_out.fetch_add(1, Ordering::Relaxed);
                state.last.push_back((fd, None));
            }
            Job::Purge(worker, retained, _) => {
                shared.left_out.fetch_add(1, Ordering::Relaxed);
                report(shared, worker);
                // Dropped when a thread is free; it may be the last reference to the channel.
                state.slow.push(Owner::Other, Job::Drop(Box::new(retained)));
            }
            Job::Drop(rubbish) => state.slow.push(Owner::Other, Job::Drop(rubbish)),
        }
    }
    state.called = !state.last.is_empty();
}

fn close(member: &Member, fd: OwnedFd, slot: Option<&Slot>) {
    member.next();
    drop(fd);
    member.end();
    // After the close: a worker that closes before this finds the slot not released and shuts the
    // connection down.
    if let Some(slot) = slot {
        slot.release();
    }
}

/// A thread of the slow lane.
pub(super) fn slow(shared: &Arc<Shared>) {
    let member = shared.enter();
    loop {
        let mut state = shared.lock();
        let (turn, job) = loop {
            if let Some(next) = state.slow.take() {
                break next;
            }
            if state.over {
                state.slow.threads -= 1;
                drop(state);
                return shared.leave(&member);
            }
            state.slow.idle += 1;
            let waited = shared.lane.wait_timeout(state, IDLE);
            let (back, time) = waited.unwrap_or_else(PoisonError::into_inner);
            state = back;
            state.slow.idle -= 1;
            if time.timed_out() && !state.slow.is_ready() && state.slow.threads > 1 {
                state.slow.threads -= 1;
                drop(state);
                return shared.leave(&member);
            }
        };
        call_slow(shared, &mut state);
        drop(state);
        carry_out(shared, &member, turn, job);
    }
}

fn carry_out(shared: &Arc<Shared>, member: &Member, turn: Turn, job: Job) {
    member.next();
    restart::piece("closer-slow", || carry_out_one(shared, member, job));
    member.end();
    shared.closed(1);
    shared.lock().slow.done(turn);
}

fn carry_out_one(shared: &Arc<Shared>, member: &Member, job: Job) {
    match job {
        Job::Close(fd, slot) => {
            unlinger_if_crowded(shared, &fd);
            close(member, fd, slot.as_ref());
        }
        Job::End(fd, response) => {
            end(&fd, response.as_deref());
            // A worker may have a copy.
            let _ = rustix::net::shutdown(&fd, Shutdown::Both);
            unlinger_if_crowded(shared, &fd);
            close(member, fd, None);
        }
        Job::Purge(worker, retained, most) => {
            let fds = purge(member, &retained, most);
            report(shared, worker);
            member.next();
            drop(retained);
            // Each descriptor goes to its lane.
            shared.put(fds.into_iter().map(Task::Close).collect());
        }
        Job::Drop(rubbish) => drop(rubbish),
    }
}

fn unlinger_if_crowded(shared: &Shared, fd: &OwnedFd) {
    if shared.is_crowded() {
        let _ = set_socket_linger(fd, None);
    }
}

/// Reports to the hot thread that a worker's channel is empty.
fn report(shared: &Shared, worker: WorkerId) {
    if shared.purged.sender.send(worker).is_ok() {
        (shared.purged.wake)();
    }
}

/// Receives everything in a worker's channel; bounded by the channel's capacity.
fn purge(member: &Member, retained: &OwnedFd, most: u32) -> Vec<OwnedFd> {
    let mut record = [0; MAX_CHANNEL_RECORD];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    const { assert!(MAX_FDS_PER_RECORD <= MOST_FDS) };
    let mut fds = Vec::new();
    for _ in 0..most {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            retained,
            &mut [IoSliceMut::new(&mut record)],
            &mut ancillary,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        );
        member.next();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        match received {
            Ok(message) if message.bytes > 0 => {}
            Err(Errno::INTR) => {}
            Ok(_) | Err(_) => break,
        }
    }
    fds
}

/// Sends the response to a client, without waiting, and ends the connection.
///
/// Bytes that the client has already sent are discarded: closing with unread bytes resets the
/// connection, and the reset can overtake the response.
fn end(fd: &OwnedFd, response: Option<&[u8]>) {
    if let Some(response) = response {
        let _ = rustix::net::send(fd, response, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
    let _ = rustix::net::shutdown(fd, Shutdown::Write);
    let mut scratch = [0; 16 * 1024];
    for _ in 0..4 {
        match rustix::net::recv(fd, &mut scratch[..], RecvFlags::DONTWAIT) {
            Ok((_, received)) if received > 0 => {}
            Ok(_) | Err(_) => break,
        }
    }
}
