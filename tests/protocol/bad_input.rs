//! Peers that send false, malformed or incomplete input: each loses its own connection, with a
//! reason in the log, and no other peer is affected.
#![allow(unsafe_code, reason = "the test wraps system calls")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use dispatch_protocol::wire::{Channel, Control, Goodbye, Hello, RefusedCode};
use rustix::io::Errno;
use test_support::peer::{Peer, encode, hello, receive};
use test_support::*;

const CONFIG: &str = r#"
hello_timeout = "200ms"
max_pending_hellos = 8
join_burst = 100000
connect_rate = 100000

[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
"#;

/// Runs `misbehave` against a dispatcher that serves at the same time; afterwards the dispatcher
/// still serves and has no more descriptors.
fn without_effect_on_others(misbehave: impl FnOnce(&Dispatcher)) -> Dispatcher {
    let dispatcher = Dispatcher::start(CONFIG);
    let _worker = dispatcher.worker("blocking", "web", "honest");
    dispatcher.wait_joined("web", 1);
    let address = dispatcher.address("web");
    let mut client = Client::connect(address).unwrap();
    Client::connect(address).unwrap().finish();
    dispatcher.wait_status("one connection", |status| loads(status, "web").0 == [1]);
    let before = dispatcher.fds();
    misbehave(&dispatcher);
    client.echo("as if nothing had happened");
    Client::connect(address).unwrap().finish();
    dispatcher.wait_status("only the honest worker to be left", |status| {
        pool(status, "web").workers.len() == 1
    });
    wait_until("the descriptors to be closed", || dispatcher.fds() <= before);
    assert_eq!(worker(&dispatcher.status(), "honest").unwrap().state, "active");
    drop(client);
    dispatcher
}

#[track_caller]
fn logged(dispatcher: &Dispatcher, text: &str) {
    wait_until(&format!("the log to say {text:?}"), || dispatcher.log().contains(text));
}

#[test]
fn a_hello_of_another_version() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        let peer = Peer::connect(&dispatcher.dispatch());
        peer.send(&encode(&Hello { version: 99, ..hello() }), &[]).unwrap();
        let refused = peer.refusal();
        assert_eq!(refused.code, RefusedCode::Version);
        assert!(refused.reason.contains("99"), "{}", refused.reason);
    });
    logged(&dispatcher, "version 99");
}

#[test]
fn a_hello_for_a_pool_that_does_not_exist() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        let peer = Peer::connect(&dispatcher.dispatch());
        peer.send(&encode(&Hello { pool: "wbe".to_owned(), ..hello() }), &[]).unwrap();
        let refused = peer.refusal();
        assert_eq!(refused.code, RefusedCode::UnknownPool);
        assert!(refused.reason.contains("wbe") && refused.reason.contains("web"));
    });
    logged(&dispatcher, "event=worker_refused");
}

#[test]
fn a_hello_with_a_name_that_cannot_be_seen() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        // A zero-width space, a right-to-left override, a Hangul filler, a line separator, a
        // byte-order mark.
        for hidden in ["\u{200b}", "\u{202e}", "\u{3164}", "\u{2028}", "\u{feff}"] {
            for hello in [
                Hello { name: format!("web{hidden}"), ..hello() },
                Hello { pool: format!("web{hidden}"), ..hello() },
            ] {
                let peer = Peer::connect(&dispatcher.dispatch());
                let mut record = Vec::new();
                hello.encode(&mut record);
                peer.send(&record, &[]).unwrap();
                assert_eq!(
                    peer.refusal().code,
                    RefusedCode::Malformed,
                    "{}",
                    hidden.escape_unicode()
                );
            }
        }
    });
    logged(&dispatcher, "event=worker_refused");
}

#[test]
fn a_hello_that_is_too_short() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        let whole = encode(&hello());
        for len in 1..whole.len() {
            let peer = Peer::connect(&dispatcher.dispatch());
            peer.send(&whole[..len], &[]).unwrap();
            assert_eq!(peer.refusal().code, RefusedCode::Malformed, "at {len} bytes");
        }
    });
    logged(&dispatcher, "reason=\"not a hello: record ends before");
}

#[test]
fn a_hello_that_is_too_long() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        let mut record = encode(&hello());
        // A well-formed but too long TLV of an unknown type.
        record.extend_from_slice(&[0xff, 0x7f, 0x00, 0x20]);
        record.resize(record.len() + 0x2000, b'x');
        let peer = Peer::connect(&dispatcher.dispatch());
        peer.send(&record, &[]).unwrap();
        assert_eq!(peer.refusal().code, RefusedCode::Malformed);
    });
    logged(&dispatcher, "record longer than 4096 bytes");
}

#[test]
fn a_hello_with_descriptors() {
    let mut refused_by_the_kernel = false;
    let dispatcher = without_effect_on_others(|dispatcher| {
        for count in [1, 2, 253] {
            let file = std::fs::File::open("/dev/null").unwrap();
            let fds = vec![file.as_fd(); count];
            let peer = Peer::connect(&dispatcher.dispatch());
            match peer.send(&encode(&hello()), &fds) {
                Ok(_) => assert_eq!(peer.refusal().code, RefusedCode::Malformed, "{count} of them"),
                // Linux 6.16 and later refuse them at the sender.
                Err(errno) => assert_eq!(errno, Errno::PERM),
            }
            refused_by_the_kernel |= peer.send(&encode(&hello()), &fds) == Err(Errno::PERM);
        }
    });
    if !refused_by_the_kernel {
        logged(&dispatcher, "record carries file descriptors where none belong");
    }
}

#[test]
fn anything_but_hello_first() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        let mut goodbye = Vec::new();
        Goodbye.encode(&mut goodbye);
        let peer = Peer::connect(&dispatcher.dispatch());
        peer.send(&goodbye, &[]).unwrap();
        assert_eq!(peer.refusal().code, RefusedCode::Malformed);
    });
    logged(&dispatcher, "unexpected second goodbye");
}

#[test]
fn a_second_hello_and_descriptors_after_the_first() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        let peer = Peer::connect(&dispatcher.dispatch());
        let _lane = peer.join(&hello());
        peer.send(&encode(&hello()), &[]).unwrap();
        assert!(peer.ended());

        let peer = Peer::connect(&dispatcher.dispatch());
        let _lane = peer.join(&hello());
        let file = std::fs::File::open("/dev/null").unwrap();
        let mut goodbye = Vec::new();
        Goodbye.encode(&mut goodbye);
        match peer.send(&goodbye, &[file.as_fd()]) {
            Ok(_) => assert!(peer.ended()),
            Err(errno) => assert_eq!(errno, Errno::PERM),
        }
    });
    logged(&dispatcher, "event=worker_expelled");
    logged(&dispatcher, "unexpected hello");
}

#[test]
fn the_channel_carries_nothing_towards_the_dispatcher() {
    without_effect_on_others(|dispatcher| {
        let peer = Peer::connect(&dispatcher.dispatch());
        let (_, lane) = peer.join(&hello());
        let on_channel = Peer { socket: lane[0].try_clone().unwrap() };
        assert_eq!(on_channel.send(b"hello?", &[]), Err(Errno::PIPE));
    });
}

#[test]
fn silence_and_crowds_before_hello() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        let crowd: Vec<Peer> = (0..20).map(|_| Peer::connect(&dispatcher.dispatch())).collect();
        let refused: Vec<_> = crowd.iter().filter_map(Peer::receive).collect();
        assert_eq!(refused.len(), 12, "eight may be silent for a while");
        for (record, _) in refused {
            let Control::Refused(refused) = Control::decode(&record).unwrap() else {
                panic!("not a refusal")
            };
            assert_eq!(refused.key.as_deref(), Some("max_pending_hellos"));
        }
    });
    logged(&dispatcher, "no hello in time");
}

/// The hello of a worker that is trusted from the start and would get every client by its weight.
fn served_before() -> Hello {
    Hello { weight: 10_000, base: 1, finished: 1, ..hello() }
}

#[test]
fn an_impossible_slot_state_expels_the_worker_alone() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        let peer = Peer::connect(&dispatcher.dispatch());
        let (welcome, mut lane) = peer.join(&served_before());
        let board =
            dispatch_protocol::scoreboard::Scoreboard::open(lane.remove(1), welcome.slots).unwrap();
        // It has no connections, so it is next.
        let stream = connect(dispatcher.address("web"));
        let (record, fds) = receive(&lane[0]).expect("a handoff");
        let Channel::Handoff(handoff) = Channel::decode(&record).unwrap() else {
            panic!("not a handoff")
        };
        let entry = handoff.entries[0];
        // Only the dispatcher may write RELEASED.
        board.slot(entry.slot).unwrap().store(entry.seq << 3 | 3, Ordering::SeqCst);
        rustix::io::write(&lane[1], &1_u64.to_ne_bytes()).unwrap();
        assert!(peer.ended());
        drop(fds);
        let mut client = Client::greeted(stream).unwrap();
        assert_eq!(client.served_by, "honest");
        client.echo("served all the same");
        client.finish();
    });
    logged(&dispatcher, "impossible slot state");
}

#[test]
fn a_lying_counter_is_clamped_and_named() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        let peer = Peer::connect(&dispatcher.dispatch());
        let (welcome, mut lane) = peer.join(&hello());
        let board =
            dispatch_protocol::scoreboard::Scoreboard::open(lane.remove(1), welcome.slots).unwrap();
        board.raise_finished(u64::MAX);
        rustix::io::write(&lane[1], &1_u64.to_ne_bytes()).unwrap();
        logged(dispatcher, "event=counter_clamped");
        assert_eq!(worker(&dispatcher.status(), "bad").unwrap().load, 0);
    });
    logged(&dispatcher, "counter=\"finished\" said=18446744073709551615 used=0");
}

#[test]
fn counters_that_go_back_or_are_absurd_are_clamped_and_named() {
    let dispatcher = without_effect_on_others(|dispatcher| {
        // 2^63 live connections: it can join, and counts as full.
        let absurd = Peer::connect(&dispatcher.dispatch());
        let _lane = absurd.join(&Hello { base: u64::MAX / 2, ..hello() });
        let status = dispatcher.status();
        let seen = worker(&status, "bad").unwrap();
        assert_eq!((seen.base, seen.load), (100, 100));
        logged(dispatcher, "counter=\"base\" said=9223372036854775807 used=100");
        // Two such workers do not overflow the sums.
        let most = Peer::connect(&dispatcher.dispatch());
        let _most = most.join(&Hello { base: u64::MAX, name: "most".to_owned(), ..hello() });
        let both = Hello { base: u64::MAX, finished: u64::MAX, name: "both".to_owned(), ..hello() };
        let peer = Peer::connect(&dispatcher.dispatch());
        let _both = peer.join(&both);
        let status = dispatcher.status();
        assert_eq!(worker(&status, "most").unwrap().load, 100);
        assert_eq!(worker(&status, "both").unwrap().load, 0);
        assert!(dispatcher.metric("dispatcher_worker_live_connections") < 1e6);
        Client::connect(dispatcher.address("web")).unwrap().finish();

        // More finished than opened connections make the hello invalid.
        let impossible = Peer::connect(&dispatcher.dispatch());
        impossible.send(&encode(&Hello { base: 1, finished: 2, ..hello() }), &[]).unwrap();
        assert_eq!(impossible.refusal().code, RefusedCode::Malformed);

        // A counter that decreases: five connections, all closed; then none.
        let back = Peer::connect(&dispatcher.dispatch());
        let named = Hello { name: "back".to_owned(), base: 5, finished: 5, ..hello() };
        let (_, lane) = back.join(&named);
        let finished = 128;
        rustix::io::pwrite(&lane[1], &0_u64.to_ne_bytes(), finished).unwrap();
        rustix::io::write(&lane[2], &1_u64.to_ne_bytes()).unwrap();
        logged(dispatcher, "finished went back");
        let status = dispatcher.status();
        let seen = worker(&status, "back").unwrap();
        assert_eq!((seen.finished, seen.load), (5, 0));
    });
    logged(&dispatcher, "event=counter_clamped");
}

#[test]
fn garbage_in_a_scoreboard_expels_only_its_worker() {
    without_effect_on_others(|dispatcher| {
        let address = dispatcher.address("web");
        for round in 0_u8..20 {
            let peer = Peer::connect(&dispatcher.dispatch());
            let (welcome, lane) = peer.join(&served_before());
            let size = 256 + 16 * u64::from(welcome.slots);
            // The seals hold: it can be neither resized nor sealed against writing.
            assert!(rustix::fs::ftruncate(&lane[1], 0).is_err());
            assert!(rustix::fs::ftruncate(&lane[1], 2 * size).is_err());
            assert!(rustix::fs::fcntl_add_seals(&lane[1], rustix::fs::SealFlags::WRITE).is_err());
            let streams: Vec<_> = (0..8).map(|_| connect(address)).collect();
            dispatcher.wait_status("some to be sent to it", |status| {
                worker(status, "bad").is_none_or(|w| w.in_flight > 0)
            });
            // Zeros, then garbage, over everything: magic, wishes, counters, slots, gauges.
            let size = rustix::fs::fstat(&lane[1]).unwrap().st_size as u64;
            let hole =
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&lane[1], hole, 0, size).unwrap();
            rustix::io::write(&lane[2], &1_u64.to_ne_bytes()).unwrap();
            let garbage: Vec<u8> =
                (0..size).map(|at| (at as u8).wrapping_mul(31) ^ round).collect();
            rustix::io::pwrite(&lane[1], &garbage, 0).unwrap();
            rustix::io::write(&lane[2], &1_u64.to_ne_bytes()).unwrap();
            assert!(peer.ended());
            for stream in streams {
                let mut client = Client::greeted(stream).unwrap();
                assert_eq!(client.served_by, "honest");
                client.echo("not a scribble");
                client.finish();
            }
        }
    });
}

#[test]
fn ten_thousand_random_records() {
    without_effect_on_others(|dispatcher| {
        // xorshift: the same garbage in every run.
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let valid = encode(&hello());
        for round in 0..10_000 {
            let mut record: Vec<u8> = match round % 3 {
                0 => (0..next() % 200).map(|_| next() as u8).collect(),
                // A valid type, then garbage.
                1 => {
                    [1, 0, 0, 0].into_iter().chain((0..next() % 80).map(|_| next() as u8)).collect()
                }
                // A valid record with one byte changed in its fixed part.
                _ => {
                    let mut record = valid.clone();
                    record[(next() % 44) as usize] ^= (next() % 255) as u8 + 1;
                    record
                }
            };
            if record.is_empty() {
                record.push(0);
            }
            let peer = Peer::connect(&dispatcher.dispatch());
            peer.send(&record, &[]).unwrap();
            // Welcome (a changed counter may still be a valid hello) or refused, but always an
            // answer.
            let (answer, _fds) = peer.receive().expect("an answer");
            assert!(Control::decode(&answer).is_ok());
        }
    });
}

#[test]
fn the_wrong_user() {
    if !rustix::process::geteuid().is_root() {
        return skip("only root can connect as another user");
    }
    let dispatcher = without_effect_on_others(|dispatcher| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&dispatcher.dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = dispatcher.dispatch();
        let refused = std::thread::spawn(move || {
            // The system calls change only this thread, and the kernel reports a thread's own user.
            // SAFETY: they take plain numbers and touch no memory.
            let changed = unsafe {
                libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) == 0
                    && libc::syscall(libc::SYS_setresgid, 65_534, 65_534, 65_534) == 0
                    && libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) == 0
            };
            assert!(changed);
            let peer = Peer::connect(&path);
            peer.send(&encode(&hello()), &[]).unwrap();
            peer.refusal()
        });
        let refused = refused.join().unwrap();
        assert_eq!(refused.code, RefusedCode::NotAllowed);
        assert_eq!(refused.key.as_deref(), Some("pool.web.allow_users"));
    });
    logged(&dispatcher, "uid=65534 gid=65534");
}
