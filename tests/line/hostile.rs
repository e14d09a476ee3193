//! Workers that write something else than reports, or too much of it.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use test_support::*;

use super::worker::*;

#[test]
fn lines_may_be_split_joined_and_without_cr() {
    let (dispatcher, _) = start("");
    let worker = LineWorker::connect(&dispatcher);
    for part in ["cou", "nt=", "4", "&type=a", "\r", "\ncount=5&x=y\ncount=6\n\r\n\ncount=", "7"] {
        worker.write(part);
        std::thread::yield_now();
    }
    wait_load(&dispatcher, "a-1", 6);
    worker.write("\n");
    wait_load(&dispatcher, "a-1", 7);
}

#[test]
fn bytes_that_are_no_report_end_the_stream() {
    let (dispatcher, address) = start("");
    let before = dispatcher.fds();
    let long = "x".repeat(5000);
    let bad = [
        "no count\r\n",
        "count=x\r\n",
        "count=1&type=%zz\n",
        "count=99999999999999999999\n",
        &long,
    ];
    for first in bad {
        // Before it has joined, and after.
        let new = LineWorker::connect(&dispatcher);
        new.write(first);
        assert!(new.receive().is_none(), "{first:.20}");
        let joined = LineWorker::join(&dispatcher, 0, "", "line-1");
        joined.write(first);
        assert!(joined.receive().is_none(), "{first:.20}");
        dispatcher.wait_status("it is gone", |status| status.pools[0].workers.is_empty());
    }
    let good = LineWorker::join(&dispatcher, 0, "", "line-1");
    let client = connect(address);
    assert_eq!(good.take().0, client.local_addr().unwrap().to_string());
    drop((good, client));
    dispatcher.wait_status("it is gone", |status| status.pools[0].workers.is_empty());
    wait_until("every descriptor is closed", || dispatcher.fds() <= before);
}

#[test]
fn an_impossible_count_is_clamped_and_named() {
    let (dispatcher, _) = start("");
    let _worker = LineWorker::join(&dispatcher, u64::MAX, "", "line-1");
    wait_load(&dispatcher, "line-1", 10_000_000);
    wait_for_log(&dispatcher, "event=counter_clamped");
    let status = dispatcher.status();
    assert!(status.faults.iter().any(|fault| fault.kind == "counter_clamped"), "{status:?}");
}

#[test]
fn descriptors_with_a_report_are_not_taken() {
    let (dispatcher, _) = start("");
    let before = dispatcher.fds();
    let worker = LineWorker::connect(&dispatcher);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [worker.stream.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let line = [IoSlice::new(b"count=0\r\n")];
    let sent =
        rustix::net::sendmsg(worker.stream.as_fd(), &line, &mut ancillary, SendFlags::NOSIGNAL);
    // Linux 6.16 refuses them at the sender; before that the stream ends.
    if sent.is_ok() {
        assert!(worker.receive().is_none());
    }
    drop(worker);
    wait_until("nothing stays open", || dispatcher.fds() <= before);
    assert!(dispatcher.status().pools[0].workers.is_empty());
}

#[test]
fn a_flood_of_reports_is_bounded_and_hinders_nothing() {
    let (dispatcher, address) = start("");
    let flood = LineWorker::join(&dispatcher, 1000, "flood", "flood-1");
    let quiet = LineWorker::join(&dispatcher, 0, "quiet", "quiet-1");
    let writer = flood.stream.try_clone().unwrap();
    writer.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let thread = {
        let over = std::sync::Arc::clone(&over);
        std::thread::spawn(move || {
            let line = "count=1000\r\n".repeat(300);
            let (mut written, mut at) = (0, 0);
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                // Whole lines, however much fits.
                if let Ok(count) = (&writer).write(&line.as_bytes()[at..]) {
                    written += count;
                    at = (at + count) % line.len();
                }
            }
            written
        })
    };
    let (began, before) = (Instant::now(), reports(&dispatcher));
    for _ in 0..200 {
        let mut client = connect(address);
        let mut served = quiet.serve();
        served.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
    }
    let read = reports(&dispatcher) - before;
    // One report of each stream in 10 ms.
    let most = began.elapsed().as_millis() as u64 / 10 + 10;
    assert!(read <= most, "{read} reports in {:?}", began.elapsed());
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    let written = thread.join().unwrap();
    assert!(written > 0);
    assert_eq!(load(&dispatcher, "flood-1"), Some(1000), "what it says is believed");
}

#[test]
fn streams_without_a_report_are_bounded_and_end() {
    let (dispatcher, _) = {
        let body = one_pool("line_socket = \"DIR/line.sock\"");
        let dispatcher = Dispatcher::start(&format!("max_pending_hellos = 3\n{body}"));
        let address = dispatcher.address("web");
        (dispatcher, address)
    };
    let before = dispatcher.fds();
    let silent: Vec<_> = (0..3).map(|_| LineWorker::connect(&dispatcher)).collect();
    let refused = LineWorker::connect(&dispatcher);
    assert!(refused.receive().is_none(), "the fourth is refused");
    for worker in &silent {
        assert!(worker.receive().is_none(), "no report in time");
    }
    drop((silent, refused));
    wait_until("nothing stays open", || dispatcher.fds() <= before);
    let _worker = LineWorker::join(&dispatcher, 0, "", "line-1");
}
