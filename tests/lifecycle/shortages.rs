//! Shortages of descriptors, channel space, send queues and log readers. Clients wait or go to
//! another worker, no client is lost, and the dispatcher neither spins nor blocks.
#![allow(unsafe_code, reason = "the user of one thread has no safe setter")]
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use rustix::net::SocketType;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use test_support::*;
use worker_sdk::Worker;

const PATIENT: &str = "handoff_timeout = \"10m\"";

/// Makes the channels of a dispatcher small; their default size depends on the machine.
fn narrow_channels(dispatcher: &Dispatcher) {
    use rustix::net::sockopt::{set_socket_send_buffer_size, socket_send_buffer_size, socket_type};
    let pid = dispatcher.process.pid();
    let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    let mut narrowed = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let number = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        // The process is a child, so its descriptors can be duplicated; some are closed by now.
        let Ok(fd) = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) else { continue };
        if socket_type(&fd) == Ok(SocketType::SEQPACKET)
            && socket_send_buffer_size(&fd).is_ok_and(|size| size > 400_000)
        {
            set_socket_send_buffer_size(&fd, 64 * 1024).unwrap();
            narrowed += 1;
        }
    }
    assert_eq!(narrowed, 1, "the sending end of one channel");
}

#[test]
fn a_full_channel_sends_clients_to_the_next_worker() {
    if !descriptors(8_000) {
        return;
    }
    let (dispatcher, address) = start_one_pool(&format!("{PATIENT}\nmax_untaken = 4096"));
    let environment = [("DISPATCH_WEIGHT", "10000"), ("DISPATCH_MAX_CONNECTIONS", "100000")];
    let mut lazy = dispatcher.worker_with("mio", "web", "lazy", &environment);
    dispatcher.wait_joined("web", 1);
    dispatcher.prove_all(address);
    let before = dispatcher.status().accepted;
    lazy.signal(Signal::SIGSTOP);
    narrow_channels(&dispatcher);
    let _other = dispatcher.worker("mio", "web", "other");
    dispatcher.wait_joined("web", 2);
    // By weight it would get all of them.
    let mut streams = Vec::new();
    while !dispatcher.log().contains("event=channel_full") {
        assert!(streams.len() < 4_000, "its channel has no end");
        streams.extend((0..20).map(|_| connect(address)));
        dispatcher.wait_status("all to be placed", |status| {
            status.accepted == before + streams.len() as u64
        });
    }
    let status = dispatcher.status();
    let full = worker(&status, "lazy").unwrap();
    assert_eq!((full.state.as_str(), status.queued), ("active", 0));
    assert!(full.in_flight > 100 && full.channel_full > 0, "{full:?}");
    for name in ["dispatcher_channel_full_total", "dispatcher_worker_channel_full_total"] {
        assert_eq!(dispatcher.metric(name), full.channel_full as f64);
    }
    assert_eq!(Client::connect(address).unwrap().served_by, "other");
    // It ends without having taken any connection: the other worker serves them all.
    lazy.kill();
    let clients = all_greeted(streams);
    assert_eq!(tally(&clients)["other"], clients.len());
}

#[test]
fn a_worker_at_its_descriptor_limit_loses_nothing() {
    for flavour in ["blocking", "tokio", "mio"] {
        let (dispatcher, address) = start_one_pool(PATIENT);
        let workers = dispatcher.workers(flavour, "web", 2);
        let warm: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
        assert_eq!(tally(&warm)["w0"], 2);
        workers[0].limit_descriptors(Some(3));
        // Three descriptors of this record arrive, the others do not.
        let streams = connect_at_once(&dispatcher, address, 40);
        let clients = all_greeted(streams);
        assert_eq!(tally(&clients).get("w0"), Some(&3), "{flavour}");
        wait_for_log(&dispatcher, "event=connection_lost_by_worker");
        let status = dispatcher.status();
        let lost = pool(&status, "web").lost;
        assert_eq!((status.taken, lost > 0), (44, true), "{flavour}");
        assert_eq!(dispatcher.metric("dispatcher_lost_connections_total"), lost as f64);
        workers[0].limit_descriptors(None);
        // It gets a trial, and has the smaller load.
        wait_until("it to be given connections again", || {
            Client::connect(address).unwrap().served_by == "w0"
        });
    }
}

/// Processor time of a process, in clock ticks of ten milliseconds.
fn ticks(process: &Process) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<&str> = rest.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_dispatcher_at_its_descriptor_limit_waits_quietly() {
    let (dispatcher, address) = start_one_pool(PATIENT);
    let _worker = dispatcher.worker("tokio", "web", "first");
    dispatcher.wait_joined("web", 1);
    Client::connect(address).unwrap().finish();
    dispatcher.wait_status("idleness", |status| loads(status, "web").0 == [0]);
    wait_until("all that was opened for our questions to be closed", || {
        let before = dispatcher.fds();
        std::thread::sleep(Duration::from_millis(50));
        dispatcher.fds() == before
    });
    dispatcher.process.limit_descriptors(Some(0));
    let streams: Vec<TcpStream> = (0..50).map(|_| connect(address)).collect();
    let late = dispatcher.worker("blocking", "web", "late");
    wait_for_log(&dispatcher, "event=accept_paused");
    // The worker's connection waits in its queue, too.
    wait_for_log(&dispatcher, "event=worker_not_accepted");
    let before = ticks(&dispatcher.process);
    std::thread::sleep(Duration::from_secs(2));
    let spent = ticks(&dispatcher.process) - before;
    assert!(spent <= 10, "{spent} ticks of 200: more than 5 %");
    dispatcher.process.limit_descriptors(None);
    assert_eq!(all_greeted(streams).len(), 50);
    dispatcher.wait_joined("web", 2);
    let status = dispatcher.status();
    assert_eq!((status.accepted, status.taken), (51, 51));
    assert!(dispatcher.metric("dispatcher_accept_pauses_total") >= 1.0);
    drop(late);
}

/// Puts 506 descriptors in flight for this user; dropping the sockets takes them back.
fn descriptors_in_flight(user: u32) -> Vec<OwnedFd> {
    use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let hog = move || {
        // The bare system call changes only this thread.
        // SAFETY: it takes plain numbers and touches no memory.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) }, 0);
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = vec![std::os::fd::AsFd::as_fd(&file); 253];
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .unwrap();
        for _ in 0..2 {
            let mut space =
                vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
            let record = [std::io::IoSlice::new(b"x")];
            rustix::net::sendmsg(&ours, &record, &mut ancillary, SendFlags::empty()).unwrap();
        }
        vec![ours, theirs]
    };
    std::thread::spawn(hog).join().unwrap()
}

#[test]
fn too_many_descriptors_in_flight_make_clients_wait() {
    use std::os::unix::process::CommandExt;
    if !rustix::process::geteuid().is_root() {
        return skip("only root can start a dispatcher as another user");
    }
    let user = 65_534;
    let temp = configure(&one_pool(&format!("{PATIENT}\nallow_users = [0]")));
    std::os::unix::fs::chown(temp.path(), Some(user), Some(user)).unwrap();
    // Where it was built, another user may have no access. Not copied by ourselves: what other
    // tests start meanwhile would have the copy open for writing, and such a file cannot be run.
    let program = temp.path().join("dispatcher");
    let copied = Command::new("cp").arg(dispatcher_bin()).arg(&program).status().unwrap();
    assert!(copied.success());
    let log = std::fs::File::create(temp.path().join("log")).unwrap();
    // With a low limit of descriptors in flight, and without the right to exceed it.
    let mut command = Command::new("sh");
    command.args(["-c", r#"ulimit -n 200 && exec "$0" run --config "$1""#]);
    command.arg(program).arg(temp.path().join("dispatcher.toml")).uid(user).gid(user).stderr(log);
    let dispatcher = Dispatcher::start_by(temp.path(), &mut command);
    let address = dispatcher.address("web");
    let _worker = dispatcher.worker("tokio", "web", "only");
    dispatcher.wait_joined("web", 1);
    Client::connect(address).unwrap().finish();

    let in_flight = descriptors_in_flight(user);
    let streams: Vec<TcpStream> = (0..20).map(|_| connect(address)).collect();
    wait_for_log(&dispatcher, "event=out_of_resources");
    let status = dispatcher.status();
    assert_eq!((status.taken, status.closed.values().sum()), (1, 0));
    let before = ticks(&dispatcher.process);
    std::thread::sleep(Duration::from_secs(2));
    let spent = ticks(&dispatcher.process) - before;
    assert!(spent <= 10, "{spent} ticks of 200: more than 5 %");
    drop(in_flight);
    assert_eq!(tally(&all_greeted(streams))["only"], 20);
}

#[test]
fn a_thousand_workers_come_and_go_at_once() {
    if !descriptors(16_000) {
        return;
    }
    let body = one_pool(&format!("{PATIENT}\nmax_workers = 2000"));
    let dispatcher = Dispatcher::start(&format!("max_pending_hellos = 2000\n\n{body}"));
    let address = dispatcher.address("web");
    let crowd: Vec<Worker> = std::thread::scope(|scope| {
        let joining: Vec<_> = (0..20)
            .map(|part| {
                let dispatcher = &dispatcher;
                scope.spawn(move || {
                    let name = |number| format!("crowd-{part}-{number}");
                    (0..50).map(|n| own_worker(dispatcher, &name(n))).collect::<Vec<_>>()
                })
            })
            .collect();
        joining.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    dispatcher.wait_joined("web", 1000);
    let streams: Vec<TcpStream> = (0..2_500).map(|_| connect(address)).collect();
    let status =
        dispatcher.wait_status("all to be sent", |status| status.in_flight + status.taken == 2_500);
    let (loads, spread) = loads(&status, "web");
    assert_eq!((loads.len(), loads.iter().sum::<u64>(), spread), (1000, 2_500, 1));
    // These workers leave without having taken any connection; one that comes later serves all.
    let _last = dispatcher.worker_with(
        "mio",
        "web",
        "last",
        &[("DISPATCH_MAX_CONNECTIONS", "100000"), ("DISPATCH_WEIGHT", "1")],
    );
    dispatcher.wait_joined("web", 1001);
    drop(crowd);
    let clients = all_greeted(streams);
    assert_eq!(tally(&clients)["last"], 2_500);
    dispatcher.wait_status("the crowd to be gone", |status| pool(status, "web").workers.len() == 1);
}

#[test]
fn a_close_that_lingers_does_not_hold_up_the_dispatcher() {
    let (dispatcher, address) = start_one_pool(PATIENT);
    let lingering = own_worker(&dispatcher, "lingering");
    dispatcher.wait_joined("web", 1);
    let unread = connect(address);
    dispatcher.wait_status("one in flight", |status| status.in_flight == 1);
    // While the dispatcher is stopped, the worker takes the connection, fills its send queue,
    // requests a lingering close and closes its copy: the dispatcher's copy is the last.
    dispatcher.process.signal(Signal::SIGSTOP);
    let (mut stream, guard) = lingering.accept().unwrap().unwrap().into_parts().unwrap();
    stream.set_nonblocking(true).unwrap();
    let block = vec![0; 1 << 20];
    while stream.write(&block).is_ok() {}
    let longer_than_any_patience = Some(Duration::from_secs(3_000));
    rustix::net::sockopt::set_socket_linger(&stream, longer_than_any_patience).unwrap();
    drop(stream);
    drop(guard);
    dispatcher.process.signal(Signal::SIGCONT);
    dispatcher.wait_status("its end to be seen", |status| loads(status, "web").0 == [0]);
    lingering.close();
    let _other = dispatcher.worker("blocking", "web", "other");
    assert_eq!(Client::connect(address).unwrap().served_by, "other");
    // No turn waited for the close. (Half the linger time is far above the noise of the machine.)
    let longest = Duration::from_micros(dispatcher.status().longest_turn_microseconds);
    assert!(longest < Duration::from_secs(1_500), "{longest:?}");
    drop(unread);
}

#[test]
fn a_full_disk_under_the_log_holds_up_nobody() {
    let temp = configure(&one_pool(""));
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let dispatcher = Dispatcher::start_logging_to(temp.path(), full.into());
    let _worker = dispatcher.worker("tokio", "web", "unimpressed");
    dispatcher.wait_joined("web", 1);
    assert_eq!(Client::connect(dispatcher.address("web")).unwrap().served_by, "unimpressed");
    dispatcher.wait_status("the missing lines to be counted", |s| s.meters.log_lines_dropped >= 3);
    assert!(dispatcher.metric("dispatcher_log_lines_dropped_total") >= 3.0);
}

/// The kernel is out of a resource at `accept`: strace injects the error more often than the
/// dispatcher waits for its own closes before it reports a shortage.
#[test]
fn accept_fails_for_a_while_and_then_serves() {
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("needs strace");
    }
    let temp = configure(&one_pool("wait_for_worker = \"10m\""));
    for error in ["ENFILE", "ENOMEM", "ENOBUFS", "EMFILE"] {
        let log = std::fs::File::create(temp.path().join("log")).unwrap();
        let mut command = Command::new("strace");
        // Only the hot thread: strace follows no other. The first accept is for the worker.
        command.args(["-o", "/dev/null", "-e", "trace=accept4", "-e"]);
        command.arg(format!("inject=accept4:error={error}:when=4..28"));
        command.arg(dispatcher_bin()).args(["run", "--config"]);
        command.arg(temp.path().join("dispatcher.toml")).stderr(log);
        let dispatcher = Dispatcher::start_by(temp.path(), &mut command);
        let address = dispatcher.address("web");
        let _worker = dispatcher.worker("blocking", "web", "patient");
        dispatcher.wait_joined("web", 1);
        let clients: Vec<Client> = (0..8).map(|_| Client::connect(address).unwrap()).collect();
        assert_eq!(tally(&clients)["patient"], 8, "{error}");
        wait_until(&format!("{error} to be in the log"), || {
            dispatcher.log().contains("event=accept_paused")
                || dispatcher.log().contains("event=worker_not_accepted")
        });
        // Ends the dispatcher; strace then ends by itself.
        let pid = i32::try_from(dispatcher.status().pid).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).unwrap();
        let mut dispatcher = dispatcher;
        dispatcher.process.wait();
    }
}

#[test]
fn a_log_that_nobody_reads_holds_up_nobody() {
    if !descriptors(4_000) {
        return;
    }
    let temp = configure(&one_pool("wait_for_worker = \"0s\""));
    let (reader, writer) = std::io::pipe().unwrap();
    let dispatcher = Dispatcher::start_logging_to(temp.path(), writer.into());
    let address = dispatcher.address("web");
    // Each is refused with one line: more lines than the pipe and the queue hold.
    let dropped = wait_for("the log to fall behind", || {
        for _ in 0..200 {
            let mut rest = Vec::new();
            let _ = connect(address).read_to_end(&mut rest);
        }
        Some(dispatcher.status().meters.log_lines_dropped).filter(|&dropped| dropped > 100)
    });
    let _worker = dispatcher.worker("mio", "web", "unimpressed");
    dispatcher.wait_joined("web", 1);
    assert_eq!(Client::connect(address).unwrap().served_by, "unimpressed");
    // As soon as the pipe is read, the log reports the number of missing lines.
    let mut text = String::new();
    let mut reader = reader;
    wait_until("the log to say so", || {
        let mut block = vec![0; 1 << 16];
        let count = reader.read(&mut block).unwrap();
        text.push_str(&String::from_utf8_lossy(&block[..count]));
        text.contains("log_lines_dropped count=")
    });
    assert!(dispatcher.status().meters.log_lines_dropped >= dropped);
    drop(dispatcher);
}
