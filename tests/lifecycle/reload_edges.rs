//! Special cases of reloads: the real options of sockets afterwards, settings that need a restart,
//! connections under way, and concurrent reloads.
#![allow(unsafe_code, reason = "TCP_INFO has no safe wrapper")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod growth;
mod leaving;
mod processes;

use std::collections::BTreeSet;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::signal::Signal;
use rustix::net::sockopt;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use test_support::reloading::*;
use test_support::*;

/// A duplicate of the dispatcher's socket for this address.
fn listening_socket(dispatcher: &Dispatcher, address: SocketAddr) -> OwnedFd {
    let pid = dispatcher.process.pid();
    let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    let numbers = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut sockets = numbers.filter_map(|entry| {
        let number = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok()
    });
    let is_it = |fd: &OwnedFd| {
        sockopt::socket_acceptconn(fd) == Ok(true)
            && rustix::net::getsockname(fd)
                .is_ok_and(|own| SocketAddr::try_from(own) == Ok(address))
    };
    sockets.find(is_it).expect("a listening socket")
}

/// The length of its queue, as the kernel reports it.
fn backlog(socket: &OwnedFd) -> u32 {
    // SAFETY: all zeros is a valid value of this structure of numbers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap();
    // SAFETY: the kernel writes at most `length` bytes to `info`, which lives until then.
    let result = unsafe {
        let place = std::ptr::from_mut(&mut info).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &mut length)
    };
    assert_eq!(result, 0);
    // The meaning of this field for a listening socket.
    info.tcpi_sacked
}

#[test]
fn options_count_for_connections_that_come_afterwards() {
    let body = |keys: &str| format!("{}[pool.web]\n", listener("web", "127.0.0.1:0", "web", keys));
    let dispatcher = Dispatcher::start(&body("backlog = 100"));
    let address = dispatcher.address("web");
    let worker = own_worker(&dispatcher, "own");
    // The accepted socket; the client stays open until it was checked.
    let next = || -> (TcpStream, TcpStream) {
        let client = connect(address);
        let (stream, guard) = worker.accept().unwrap().unwrap().into_parts().unwrap();
        drop(guard);
        (stream, client)
    };
    let before = next();
    let socket = listening_socket(&dispatcher, address);
    assert_eq!(backlog(&socket), 100);
    assert_eq!(sockopt::socket_keepalive(&before.0), Ok(false));
    assert_eq!(sockopt::tcp_nodelay(&before.0), Ok(true));

    let set = "backlog = 16\nkeepalive = \"61s\"\nkeepalive_interval = \"7s\"\nkeepalive_count = 3\n\
               user_timeout = \"30s\"\nnodelay = false\nreceive_buffer = 70000\nsend_buffer = 80000";
    let done = reload(&dispatcher, &body(set));
    assert_eq!(names(&done["changed"]), ["listener web"]);
    assert_eq!(names(&done["needs_restart"]), [""; 0]);
    assert_eq!(backlog(&socket), 16);
    let after = next();
    assert_eq!(sockopt::socket_keepalive(&after.0), Ok(true));
    assert_eq!(sockopt::tcp_keepidle(&after.0), Ok(Duration::from_secs(61)));
    assert_eq!(sockopt::tcp_keepintvl(&after.0), Ok(Duration::from_secs(7)));
    assert_eq!(sockopt::tcp_keepcnt(&after.0), Ok(3));
    assert_eq!(sockopt::tcp_user_timeout(&after.0), Ok(30_000));
    assert_eq!(sockopt::tcp_nodelay(&after.0), Ok(false));
    // The kernel doubles the size.
    assert_eq!(sockopt::socket_recv_buffer_size(&after.0), Ok(140_000));
    assert_eq!(sockopt::socket_send_buffer_size(&after.0), Ok(160_000));
    assert_eq!(sockopt::socket_keepalive(&before.0), Ok(false), "those inside stay as they are");

    // Removes the options again, as far as the kernel allows.
    let done = reload(&dispatcher, &body(""));
    let fixed = ["receive_buffer", "send_buffer", "keepalive_count", "keepalive_interval"];
    let fixed: BTreeSet<String> = fixed.map(|key| format!("{key} of listener web")).into();
    let named: BTreeSet<String> =
        names(&done["needs_restart"]).into_iter().map(str::to_owned).collect();
    assert_eq!(named, fixed);
    // The default, or the limit of this machine.
    let most: u32 =
        std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap().trim().parse().unwrap();
    assert_eq!(backlog(&socket), most.min(4096));
    let last = next();
    assert_eq!(sockopt::socket_keepalive(&last.0), Ok(false));
    assert_eq!(sockopt::tcp_keepcnt(&last.0), Ok(3), "as it was, and as was said");
    assert_eq!(sockopt::tcp_user_timeout(&last.0), Ok(0));
    assert_eq!(sockopt::tcp_nodelay(&last.0), Ok(true));
    drop(socket);
}

#[test]
fn everything_that_needs_a_restart_is_named_and_is_as_before() {
    let text = |top: &str, six: &str| {
        let six = listener("six", "[::1]:0", "web", six);
        format!("{top}{six}{}", one_pool(""))
    };
    // Writes both socket settings in full, so that they can differ.
    let plain = "dispatch_socket = \"DIR/dispatch.sock\"\nadmin_socket = \"DIR/admin.sock\"\n";
    let write = |dir: &std::path::Path, text: &str| {
        let text = text.replace("DIR", dir.to_str().unwrap());
        std::fs::write(dir.join("dispatcher.toml"), text).unwrap();
    };
    let temp = tempfile::tempdir().unwrap();
    write(temp.path(), &text(plain, "keepalive = \"1m\"\nkeepalive_interval = \"5s\""));
    let dispatcher = Dispatcher::start_in(temp.path());
    let mode = |name: &str| {
        std::fs::metadata(temp.path().join(name)).unwrap().permissions().mode() & 0o777
    };
    let modes = ["dispatch.sock", "admin.sock"].map(mode);
    let other = "dispatch_socket = \"DIR/other.sock\"\ndispatch_socket_mode = \"0600\"\n\
                 dispatch_socket_user = \"root\"\ndispatch_socket_group = \"root\"\n\
                 admin_socket = \"DIR/elsewhere.sock\"\nadmin_socket_mode = \"0660\"\n\
                 admin_socket_user = \"root\"\nadmin_socket_group = \"root\"\n\
                 admin_http = \"127.0.0.1:0\"\n";
    let six = "ipv6_only = true\nfree_bind = true\nreuse_port = true";
    write(temp.path(), &text(other, six));
    let output = run(&dispatcher, &["reload", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let done: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let fixed = [
        "dispatch_socket",
        "dispatch_socket_mode",
        "dispatch_socket_user",
        "dispatch_socket_group",
        "admin_socket",
        "admin_socket_mode",
        "admin_socket_user",
        "admin_socket_group",
        "admin_http",
        "ipv6_only of listener six",
        "reuse_port of listener six",
        "free_bind of listener six",
        "keepalive_interval of listener six",
    ];
    assert_eq!(names(&done["needs_restart"]), fixed);
    for what in fixed {
        wait_for_log(&dispatcher, &format!("event=reload_needs_restart what=\"{what}\""));
    }
    // The sockets are where they were.
    assert_eq!(["dispatch.sock", "admin.sock"].map(mode), modes);
    assert!(
        !temp.path().join("other.sock").exists() && !temp.path().join("elsewhere.sock").exists()
    );
    let _worker = dispatcher.workers("blocking", "web", 1);
    Client::connect(dispatcher.address("web")).unwrap().echo("as ever");
    assert!(!dispatcher.log().contains("event=admin_http "));
    // With the old settings there is nothing to report.
    write(temp.path(), &text(plain, "keepalive = \"1m\"\nkeepalive_interval = \"5s\""));
    let output = run(&dispatcher, &["reload"]);
    let words = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && !words.contains("restart"), "{words}");
}

#[test]
fn the_mode_of_a_socket_file_changes() {
    let body = |mode: &str| {
        let keys = format!("mode = \"{mode}\"");
        format!("{}[pool.web]\n", listener("web", "unix:DIR/web.sock", "web", &keys))
    };
    let dispatcher = Dispatcher::start(&body("0600"));
    let path = dispatcher.dir.join("web.sock");
    let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o600);
    let _worker = dispatcher.workers("blocking", "web", 1);
    let inode = {
        use std::os::unix::fs::MetadataExt;
        move |path: &std::path::Path| std::fs::metadata(path).unwrap().ino()
    };
    let file = inode(&path);
    let done = reload(&dispatcher, &body("0640"));
    assert_eq!((names(&done["changed"]), mode()), (vec!["listener web"], 0o640));
    assert_eq!(inode(&path), file, "the same socket");
    assert_eq!(served_by(UnixStream::connect(&path).unwrap()), "w0");
}

#[test]
fn a_client_that_is_turned_away_gets_the_new_response() {
    let body = "wait_for_worker = \"0s\"\nunavailable_response = \"DIR/sorry\"";
    let temp = tempfile::tempdir().unwrap();
    let sorry = temp.path().join("sorry");
    std::fs::write(&sorry, "first").unwrap();
    write_config(temp.path(), &one_pool(body));
    let dispatcher = Dispatcher::start_in(temp.path());
    let address = dispatcher.address("web");
    let told = || {
        let mut text = String::new();
        connect(address).read_to_string(&mut text).unwrap();
        text
    };
    dispatcher.wait_status("refusing", |status| pool(status, "web").state == "refusing");
    assert_eq!(told(), "first");
    // The same file with another content is another configuration.
    std::fs::write(&sorry, "second").unwrap();
    assert_eq!(told(), "first");
    let done = reload(&dispatcher, &one_pool(body));
    assert_eq!(names(&done["changed"]), ["pool web"]);
    assert_eq!(told(), "second");
    std::fs::write(temp.path().join("other"), "third").unwrap();
    reload(&dispatcher, &one_pool(&body.replace("sorry", "other")));
    assert_eq!(told(), "third");
    reload(&dispatcher, &one_pool("wait_for_worker = \"0s\""));
    assert_eq!(told(), "");
    // An unreadable file is refused, and the old content stays in force.
    write_config(temp.path(), &one_pool(&body.replace("sorry", "missing")));
    assert_eq!(run(&dispatcher, &["reload"]).status.code(), Some(78));
    assert_eq!(told(), "");
}

#[test]
fn what_is_in_flight_stays_there_and_is_served() {
    let body = |keys: &str| one_pool(keys);
    let patient = "handoff_timeout = \"10m\"";
    let dispatcher = Dispatcher::start(&body(patient));
    let address = dispatcher.address("web");
    let worker = dispatcher.worker("tokio", "web", "stopped");
    dispatcher.wait_joined("web", 1);
    let warm = Client::connect(address).unwrap();
    worker.signal(Signal::SIGSTOP);
    let streams: Vec<TcpStream> = (0..8).map(|_| connect(address)).collect();
    dispatcher.wait_status("one in flight", |status| status.in_flight == 8);
    for keys in ["policy = \"random\"", "policy = \"hash\"\nmax_untaken = 9", "history = 3"] {
        reload(&dispatcher, &body(&format!("{patient}\n{keys}")));
        let status = dispatcher.status();
        assert_eq!(
            (status.in_flight, status.queued, pool(&status, "web").revoked),
            (8, 0, 0),
            "{keys}"
        );
    }
    // A shorter timeout applies to connections that already wait.
    reload(&dispatcher, &body("handoff_timeout = \"50ms\""));
    let _other = dispatcher.worker("blocking", "web", "other");
    let clients = all_greeted(streams);
    assert_eq!(tally(&clients)["other"], 8);
    worker.signal(Signal::SIGCONT);
    let mut warm = warm;
    warm.echo("never noticed");
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

#[test]
fn many_at_once_go_one_after_the_other() {
    let dispatcher = Dispatcher::start(&one_pool(""));
    let _worker = dispatcher.workers("blocking", "web", 1);
    let address = dispatcher.address("web");
    let mut client = Client::connect(address).unwrap();
    let policies = ["random", "round-robin", "two-choices", "hash", "failover"];
    let put = |policy: &str| {
        // Atomically: a concurrent reader gets the old or the new file.
        let part = dispatcher.dir.join(format!("part-{policy}"));
        std::fs::create_dir(&part).unwrap();
        write_config(&part, &one_pool(&format!("policy = \"{policy}\"")));
        let text = std::fs::read_to_string(part.join("dispatcher.toml")).unwrap();
        let text = text.replace(part.to_str().unwrap(), dispatcher.dir.to_str().unwrap());
        std::fs::write(part.join("dispatcher.toml"), text).unwrap();
        std::fs::rename(part.join("dispatcher.toml"), dispatcher.dir.join("dispatcher.toml"))
            .unwrap();
    };
    std::thread::scope(|scope| {
        for policy in policies {
            let (put, dispatcher) = (&put, &dispatcher);
            scope.spawn(move || {
                put(policy);
                let output = run(dispatcher, &["reload"]);
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            });
        }
        // Also by signals, of which several may become one.
        (0..20).for_each(|_| dispatcher.process.signal(Signal::SIGHUP));
    });
    // Each reload has read the file as it was at its start or later, so the last file is in force.
    let file = std::fs::read_to_string(dispatcher.dir.join("dispatcher.toml")).unwrap();
    let last = policies.iter().find(|policy| file.contains(&format!("\"{policy}\""))).unwrap();
    let status = dispatcher.status();
    assert_eq!(pool(&status, "web").policy, *last);
    client.echo("no client noticed");
    Client::connect(address).unwrap().echo("no later client does");
    assert!(!dispatcher.log().contains("event=reload_refused"));
}
