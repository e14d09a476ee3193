//! Single turns of the event loop, over real sockets.
#![allow(clippy::unwrap_used)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc;
use std::time::Instant;

use dispatch_protocol::wire::{Claim, Features, Hello, VERSION};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use tokio::sync::oneshot;

use super::*;
use crate::mailbox::Request;

const PATIENCE: Duration = Duration::from_secs(20);

fn started(dir: &Path, pool: &str) -> EventLoop {
    let dir = dir.display();
    let text = format!(
        "dispatch_socket = \"{dir}/dispatch.sock\"\nadmin_socket = \"{dir}/admin.sock\"\n\
         [[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n[pool.web]\n{pool}\n"
    );
    EventLoop::start(Config::parse(&text, "test").unwrap(), crate::admin::start).unwrap()
}

/// One turn, without clients.
fn turn(event_loop: &mut EventLoop, events: &mut Events) {
    let timeout = event_loop.before_sleep().unwrap_or(PATIENCE);
    event_loop.wakeup.poll_events(events, Some(timeout.min(Duration::from_millis(10)))).unwrap();
    event_loop.now = clock();
    event_loop.handle_all(events);
    event_loop.core.tick(event_loop.now);
    event_loop.perform();
}

fn connected(dir: &Path) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let address = SocketAddrUnix::new(dir.join("dispatch.sock")).unwrap();
    rustix::net::connect(&socket, &address).unwrap();
    socket
}

fn claim(socket: &OwnedFd, number: u64) -> bool {
    let mut record = Vec::new();
    Claim::new(format!("client-{number}").as_bytes()).unwrap().encode(&mut record);
    rustix::net::send(socket, &record, SendFlags::NOSIGNAL).is_ok()
}

fn claimed(event_loop: &EventLoop) -> u64 {
    let status = event_loop.core.snapshot();
    status.pools[0].affinity.as_ref().unwrap().claimed
}

#[test]
fn a_flood_on_a_control_connection_gets_a_share_of_a_turn() {
    let dir = tempfile::tempdir().unwrap();
    let mut event_loop = started(dir.path(), "affinity.key = \"cookie:ID\"");
    let mut events = Events::with_capacity(64);
    let worker = connected(dir.path());
    let mut hello = Vec::new();
    Hello {
        version: VERSION,
        features: Features::CLAIM,
        pool: "web".to_owned(),
        name: "w".to_owned(),
        weight: 1,
        max_connections: 1,
        ..Hello::default()
    }
    .encode(&mut hello);
    rustix::net::send(&worker, &hello, SendFlags::NOSIGNAL).unwrap();
    let end = Instant::now() + PATIENCE;
    while !event_loop.workers.table.iter().any(Option::is_some) {
        assert!(Instant::now() < end, "it joins");
        turn(&mut event_loop, &mut events);
    }

    // The worker sends as fast as it can; the handshake thread passes on a limited number in 100
    // ms.
    let (begun, mut sent) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_millis(500) {
        for _ in 0..150 {
            sent += u64::from(claim(&worker, sent));
        }
        turn(&mut event_loop, &mut events);
    }
    let most = 200 * (begun.elapsed().as_millis() as u64 / 100 + 2);
    assert!(claimed(&event_loop) <= most, "{} claims", claimed(&event_loop));
    assert!(sent > 2 * 150, "the rest waits in its socket");
    // Every claim is read once the worker has stopped.
    while claimed(&event_loop) < sent {
        assert!(Instant::now() < end, "all are read");
        turn(&mut event_loop, &mut events);
    }
    event_loop.finish();
}

/// The side thread plans each reload from its own copy of the running configuration, which the
/// reload before has updated.
#[test]
fn a_reload_is_one_request_and_one_answer() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dispatcher.toml");
    let write = |history: u32| {
        let dir = dir.path().display();
        let text = format!(
            "dispatch_socket = \"{dir}/dispatch.sock\"\nadmin_socket = \"{dir}/admin.sock\"\n\
             [[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n\
             [pool.web]\nhistory = {history}\n"
        );
        std::fs::write(&file, text).unwrap();
    };
    write(1);
    let mut event_loop =
        EventLoop::start(Config::load(&file).unwrap(), crate::admin::start).unwrap();
    for history in [2, 3] {
        write(history);
        event_loop.side.reload.notify_one();
        let request = event_loop.side.requests.recv_timeout(PATIENCE).unwrap();
        let Request::Reload { plan, answer } = request else { panic!("{request:?}") };
        let reloaded = event_loop.reload(*plan);
        assert_eq!(reloaded.as_ref().unwrap().changed, ["pool web"]);
        assert_eq!(
            event_loop.core.pool_settings(dispatcher_core::PoolId(0)).unwrap().history,
            history
        );
        answer.send(reloaded).unwrap();
    }
    assert_eq!(event_loop.run.generation, 2);
    event_loop.finish();
}

#[test]
fn a_turn_answers_one_request_that_still_has_a_receiver() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dispatcher.toml");
    let text = |more: &str| {
        let dir = dir.path().display();
        format!(
            "dispatch_socket = \"{dir}/dispatch.sock\"\nadmin_socket = \"{dir}/admin.sock\"\n\
             [[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n[pool.web]\n{more}\n"
        )
    };
    std::fs::write(&file, text("")).unwrap();
    let mut event_loop =
        EventLoop::start(Config::load(&file).unwrap(), crate::admin::start).unwrap();
    let mut events = Events::with_capacity(64);
    turn(&mut event_loop, &mut events);
    let (ask, requests) = mpsc::sync_channel(16);
    event_loop.side.requests = requests;
    let explain = || {
        let (answer, wait) = oneshot::channel();
        let (pool, peer) = ("web".to_owned(), dispatch_protocol::ClientAddr::Unix);
        ask.try_send(Request::Explain { pool, peer, answer }).unwrap();
        wait
    };
    // Three requests with a receiver, and between them others whose receivers are gone; one of
    // those is a reload.
    (0..3).for_each(|_| drop(explain()));
    let mut waiting = vec![explain()];
    std::fs::write(&file, text("history = 7")).unwrap();
    let plan = Box::new(crate::reload::prepare(&event_loop.running()).unwrap());
    let (answer, late) = oneshot::channel();
    ask.try_send(Request::Reload { plan, answer }).unwrap();
    drop(late);
    waiting.extend([explain(), explain()]);
    (0..5).for_each(|_| drop(explain()));

    let answered = |waiting: &mut Vec<oneshot::Receiver<_>>| {
        waiting.iter_mut().position(|wait| wait.try_recv().is_ok())
    };
    event_loop.wakeup.side_ready = true;
    for _ in 0..3 {
        turn(&mut event_loop, &mut events);
        // Exactly the first of the remaining requests.
        assert_eq!(answered(&mut waiting), Some(0));
        waiting.remove(0);
        assert_eq!(answered(&mut waiting), None);
        assert!(event_loop.wakeup.side_ready, "the next turn looks again");
    }
    turn(&mut event_loop, &mut events);
    assert!(!event_loop.wakeup.side_ready, "no request is left");
    assert_eq!(event_loop.run.generation, 0, "a request without a receiver is not carried out");
    event_loop.finish();
}

/// A worker that has joined: its control connection and its channel.
fn joined(event_loop: &mut EventLoop, events: &mut Events, dir: &Path) -> (OwnedFd, OwnedFd) {
    let worker = connected(dir);
    let mut hello = Vec::new();
    Hello {
        pool: "web".to_owned(),
        name: "w".to_owned(),
        max_connections: 100,
        ..Hello::default()
    }
    .encode(&mut hello);
    rustix::net::send(&worker, &hello, SendFlags::NOSIGNAL).unwrap();
    let end = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < end, "it joins");
        turn(event_loop, events);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut record = [0; 4096];
        let mut parts = [io::IoSliceMut::new(&mut record)];
        let flags = rustix::net::RecvFlags::DONTWAIT;
        if rustix::net::recvmsg(&worker, &mut parts, &mut ancillary, flags).is_ok() {
            let fds = ancillary.drain().filter_map(|message| match message {
                rustix::net::RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            });
            return (worker, fds.flatten().next().unwrap());
        }
    }
}

#[test]
fn a_client_that_cannot_be_passed_is_dropped_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut event_loop = started(dir.path(), "");
    let mut events = Events::with_capacity(64);
    let (_control, _channel) = joined(&mut event_loop, &mut events, dir.path());
    let address = event_loop.addresses()[0].clone();
    let _clients: Vec<_> =
        (0..5).map(|_| std::net::TcpStream::connect(&address).unwrap()).collect();
    let end = Instant::now() + PATIENCE;
    while event_loop.core.totals().accepted < 5 {
        assert!(Instant::now() < end, "they are accepted");
        // All of them in one record.
        event_loop.listeners.sockets[0].edge();
        event_loop.accept_from(0);
    }
    let raw = |nth: usize| event_loop.connections.table[nth].as_ref().unwrap().fd.as_raw_fd();
    worker_io::refusing::refuse(vec![raw(1), raw(3)]);
    event_loop.perform();
    worker_io::refusing::refuse(Vec::new());
    let totals = event_loop.core.totals();
    let unsendable = totals.closed[dispatcher_core::CloseReason::Unsendable as usize];
    assert_eq!((totals.in_flight, unsendable, totals.queued), (3, 2, 0));
    event_loop.finish();
}
