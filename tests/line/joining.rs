//! Which workers join which pool, and what connections they get.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use test_support::*;

use super::worker::*;

#[test]
fn a_worker_joins_with_its_first_report_and_gets_blocking_connections() {
    let (dispatcher, address) = start("");
    let mode = std::fs::metadata(dispatcher.dir.join("line.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "only its own user may connect by default");
    let worker = LineWorker::connect(&dispatcher);
    // A client that comes before any worker has reported waits, and is handed out at once then.
    let mut held = connect(address);
    held.write_all(b"early").unwrap();
    worker.write("count=0&used=0&pid=1&type=chat%20room\r\n");
    let (text, fd) = worker.take();
    assert_eq!(text, held.local_addr().unwrap().to_string());
    let flags = rustix::fs::fcntl_getfl(&fd).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "acl expects blocking mode");
    let mut server = std::net::TcpStream::from(fd);
    let mut five = [0; 5];
    server.read_exact(&mut five).unwrap();
    assert_eq!(&five, b"early");
    server.write_all(b"hello").unwrap();
    held.read_exact(&mut five).unwrap();
    assert_eq!(&five, b"hello");

    let status = dispatcher.status();
    let worker_status = worker_of(&status);
    assert_eq!(worker_status.name, "chat_room-1");
    assert_eq!(worker_status.pid, std::process::id() as i32, "not the one that it claims");
    assert_eq!((worker_status.load, status.taken, status.in_flight), (1, 1, 0), "sent is taken");
    let line = worker_status.line.as_ref().unwrap();
    assert_eq!((line.r#type.as_str(), line.count, line.used), ("chat room", 0, Some(0)));
    // When the worker closes it, the client sees the end: the dispatcher has no copy any more.
    drop(server);
    assert_eq!(held.read(&mut five).unwrap(), 0);
}

#[test]
fn the_type_selects_the_pool_and_other_types_join_the_sockets_pool() {
    let dispatcher = Dispatcher::start(
        "[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n\
         [[listener]]\nname = \"chat\"\naddress = \"127.0.0.1:0\"\npool = \"chat\"\n\
         [pool.web]\nline_socket = \"DIR/line.sock\"\nline_types = { \"chat room\" = \"chat\" }\n\
         [pool.chat]\n",
    );
    let worker = |line: &str| {
        let worker = LineWorker::connect(&dispatcher);
        worker.write(line);
        worker
    };
    let chat = worker("type=chat+room&count=0\r\n");
    let others = [worker("type=other&count=0\r\n"), worker("count=0\r\n")];
    let status = dispatcher.wait_status("all join", |status| {
        status.pools.iter().map(|pool| pool.workers.len()).sum::<usize>() == 3
    });
    let names = |pool: &str| {
        let mut names: Vec<String> =
            test_support::pool(&status, pool).workers.iter().map(|w| w.name.clone()).collect();
        names.sort();
        names
    };
    assert_eq!(names("chat"), ["chat_room-1"]);
    assert_eq!(names("web"), ["line-1", "other-1"]);
    let client = connect(dispatcher.address("chat"));
    assert_eq!(chat.take().0, client.local_addr().unwrap().to_string());
    drop(others);
}

#[test]
fn a_user_that_may_not_join_is_refused_and_told_in_log_and_status() {
    let (dispatcher, _) = start("allow_users = [4294967]\n");
    let worker = LineWorker::connect(&dispatcher);
    worker.write("count=0\r\n");
    assert!(worker.receive().is_none(), "its stream is closed");
    let status = dispatcher.wait_status("the fault", |status| !status.faults.is_empty());
    let fault = status.faults.iter().find(|fault| fault.kind == "worker_refused").unwrap();
    assert_eq!(fault.subject, "line_socket");
    assert!(fault.text.contains("allow_users"), "{}", fault.text);
    assert!(status.pools[0].workers.is_empty());
}

#[test]
fn a_reload_opens_and_closes_line_sockets() {
    let (dispatcher, address) = start_one_pool("");
    let socket = dispatcher.dir.join("line.sock");
    assert!(dispatcher.status().line.is_none(), "off by default");
    let reload = |keys: &str| {
        write_config(&dispatcher.dir, &one_pool(keys));
        dispatcher.process.signal(nix::sys::signal::Signal::SIGHUP);
    };
    reload("line_socket = \"DIR/line.sock\"");
    wait_until("the socket", || socket.exists());
    let worker = LineWorker::connect(&dispatcher);
    worker.write("count=0\n");
    let client = connect(address);
    assert_eq!(worker.take().0, client.local_addr().unwrap().to_string());

    reload("line_socket = \"DIR/line.sock\"\nline_socket_mode = \"0660\"");
    let mode = || std::fs::metadata(&socket).map(|it| it.permissions().mode() & 0o777).ok();
    wait_until("the new mode", || mode() == Some(0o660));
    // A removed file is made again by a reload.
    std::fs::remove_file(&socket).unwrap();
    dispatcher.process.signal(nix::sys::signal::Signal::SIGHUP);
    wait_until("the file", || socket.exists());
    let second = LineWorker::join(&dispatcher, 0, "b", "b-1");

    reload("line_socket = \"DIR/other.sock\"");
    let other = dispatcher.dir.join("other.sock");
    wait_until("it has moved", || other.exists() && !socket.exists());
    let third = LineWorker::connect_to(&other);
    third.write("count=0&type=c\n");
    dispatcher.wait_status("it joins", |status| test_support::worker(status, "c-1").is_some());

    reload("");
    wait_until("it is closed", || !other.exists());
    // Workers that have joined stay.
    let status = dispatcher.status();
    assert_eq!(status.pools[0].workers.len(), 3, "{status:?}");
    drop((second, third));
}

/// Each number of descriptors is missing at another step of the start.
#[test]
fn a_start_that_is_short_of_descriptors_leaves_no_thread() {
    let mut failures = 0;
    for spare in 0.. {
        let (dispatcher, _) = start_one_pool("");
        let process = &dispatcher.process;
        write_config(&dispatcher.dir, &one_pool("line_socket = \"DIR/line.sock\""));
        process.limit_descriptors(Some(spare));
        process.signal(nix::sys::signal::Signal::SIGHUP);
        let over = ["event=reloaded", "event=reload_refused", "event=reload_late"];
        wait_until("the reload", || over.iter().any(|event| dispatcher.log().contains(event)));
        process.limit_descriptors(None);
        if dispatcher.status().line.is_some() {
            break;
        }
        let tasks = std::fs::read_dir(format!("/proc/{}/task", process.pid())).unwrap();
        let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
        let runs = names.flatten().any(|name| name == "line\n");
        assert!(!runs, "{spare}: {}", dispatcher.log());
        failures += u32::from(dispatcher.log().contains("line_socket ("));
    }
    assert!(failures > 0, "the start of the thread has failed");
}

#[test]
fn a_real_client_behind_a_proxy_is_named() {
    let dispatcher = Dispatcher::start(
        "[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n\
         proxy_protocol = true\nproxy_protocol_from = [\"127.0.0.1\"]\n\
         [pool.web]\nline_socket = \"DIR/line.sock\"\n",
    );
    let worker = LineWorker::join(&dispatcher, 0, "", "line-1");
    let mut client = connect(dispatcher.address("web"));
    client.write_all(b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 80\r\nrest").unwrap();
    let (text, fd) = worker.take();
    assert_eq!(text, "[2001:db8::7]:4711");
    let mut rest = [0; 4];
    std::net::TcpStream::from(fd).read_exact(&mut rest).unwrap();
    assert_eq!(&rest, b"rest");
}

#[test]
fn native_and_line_workers_share_a_pool() {
    let (dispatcher, address) = start("");
    let worker = LineWorker::join(&dispatcher, 0, "", "line-1");
    let _native = dispatcher.worker("blocking", "web", "native");
    dispatcher.wait_joined("web", 2);
    dispatcher.wait_status("both are trusted", |status| {
        // Clients until the native worker has shown that it takes them.
        drop(connect(address));
        test_support::worker(status, "native").is_some_and(|worker| worker.proven)
    });
    drop(worker);
    let client = Client::connect(address).unwrap();
    assert_eq!(client.served_by, "native", "the line worker has left");
}

#[test]
fn a_drained_line_worker_gets_nothing_and_a_weight_counts() {
    let (dispatcher, address) = start("");
    let one = LineWorker::join(&dispatcher, 0, "a", "a-1");
    let two = LineWorker::join(&dispatcher, 0, "b", "b-1");
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(dispatcher_bin());
        let admin = dispatcher.admin();
        let output = command.args(args).arg("--admin").arg(admin).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["drain", "web/a-1"]);
    let clients: Vec<_> = (0..4).map(|_| connect(address)).collect();
    let served: Vec<_> = (0..4).map(|_| two.take()).collect();
    assert_eq!((load(&dispatcher, "a-1"), load(&dispatcher, "b-1")), (Some(0), Some(4)));
    run(&["resume", "web/a-1"]);
    run(&["weight", "web/a-1", "3"]);
    let more: Vec<_> = (0..12).map(|_| connect(address)).collect();
    wait_load(&dispatcher, "a-1", 12);
    assert_eq!(load(&dispatcher, "b-1"), Some(4), "three times as many");
    drop((clients, served, more, one));
}
