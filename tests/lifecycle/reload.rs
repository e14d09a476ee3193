//! Reloads of a running dispatcher: by the command, over HTTP and by SIGHUP. A valid configuration
//! is in force when the command returns, an invalid one changes nothing, and no client notices
//! either.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::Value;
use test_support::reloading::*;
use test_support::*;

/// Reloads a file that must be refused; returns the exit code and the message.
fn refused(dispatcher: &Dispatcher) -> (i32, String) {
    let output = run(dispatcher, &["reload"]);
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn web(keys: &str) -> String {
    listener("web", "127.0.0.1:0", "web", keys)
}

#[test]
fn keys_that_are_new_are_claimed_by_workers_that_join_again() {
    let body = |keys: &str| format!("{}[pool.web]\n{keys}\n", web(""));
    let dispatcher = Dispatcher::start(&body(""));
    let before = own_worker(&dispatcher, "before");
    reload(&dispatcher, &body("affinity.key = \"cookie:ID\""));
    let error = before.claim("issued").unwrap_err();
    assert_eq!(error, worker_sdk::ClaimError::NoAffinity);
    assert!(error.to_string().contains("join again"), "{error}");
    before.close();
    let again = own_worker(&dispatcher, "before");
    again.claim("issued").unwrap();
    dispatcher.wait_status("the claim to be noted", |status| {
        pool(status, "web").affinity.as_ref().is_some_and(|affinity| affinity.claimed == 1)
    });
}

fn policy(dispatcher: &Dispatcher, name: &str) -> String {
    pool(&dispatcher.status(), name).policy.clone()
}

#[test]
fn a_good_one_is_in_force_when_the_command_returns() {
    let body = format!("{}[pool.web]\npolicy = \"least-connections\"\n", web(""));
    let mut dispatcher = Dispatcher::start(&body);
    let address = dispatcher.address("web");
    let _workers = dispatcher.workers("blocking", "web", 2);
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    let metrics = || http_get(&dispatcher.admin(), "/metrics").unwrap().1;
    assert!(metrics().contains("w1"));

    let limits = "metrics_max_workers = 0\naccept_batch = 1\nfault_history = 7\n";
    let pool_keys =
        "[pool.web]\npolicy = \"failover\"\nmax_connections_per_worker = 3\nhistory = 5\n";
    let done = reload(&dispatcher, &format!("{limits}{}{pool_keys}", web("")));
    assert_eq!(names(&done["changed"]), ["pool web", "limits"]);
    for key in ["added", "removed", "needs_restart", "warnings"] {
        assert_eq!(names(&done[key]), [""; 0], "{done}");
    }
    assert!(!metrics().contains("w1"));
    let status = dispatcher.status();
    assert_eq!(pool(&status, "web").policy, "failover");
    assert_eq!(dispatcher.address("web"), address, "the same socket");
    assert_eq!(loads(&status, "web"), (vec![2, 2], 0));
    assert!(pool(&status, "web").workers.iter().all(|worker| worker.max_connections == 3));
    clients.iter_mut().for_each(|client| client.echo("no client noticed"));
    // Two workers have room for one client each; the third client waits in the kernel's queue until
    // there is more room.
    clients.extend((0..2).map(|_| Client::connect(address).unwrap()));
    let third = connect(address);
    dispatcher.wait_status("back-pressure", |status| pool(status, "web").state == "back-pressure");
    let history = http_get(&dispatcher.admin(), "/v1/pools/web/history").unwrap().1;
    let history: Value = serde_json::from_str(&history).unwrap();
    assert_eq!(history["decisions"].as_array().unwrap().len(), 2, "{history}");

    let text = format!("{limits}{}[pool.web]\n", web(""));
    let done = reload(&dispatcher, &text);
    assert_eq!(names(&done["changed"]), ["pool web"]);
    Client::greeted(third).unwrap().echo("and more room is used at once");
    let done = reload(&dispatcher, &text);
    assert_eq!(names(&done["changed"]), [""; 0], "the same again");
    let output = run(&dispatcher, &["reload"]);
    let words = String::from_utf8(output.stdout).unwrap();
    assert!(words.ends_with(": in force\nnothing has changed\n"), "{words}");
    clients.iter_mut().for_each(|client| client.echo("still none"));
    assert!(dispatcher.process.running());
}

#[test]
fn a_bad_one_is_refused_with_the_place_and_changes_nothing() {
    let good = format!("{}[pool.web]\n", web(""));
    let dispatcher = Dispatcher::start(&good);
    let address = dispatcher.address("web");
    let _workers = dispatcher.workers("blocking", "web", 2);
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    let unchanged = || {
        let status = dispatcher.status();
        assert_eq!(pool(&status, "web").policy, "least-connections");
        let listeners: Vec<&str> = status.listeners.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(listeners, ["web"]);
        assert_eq!(dispatcher.address("web"), address);
        assert!(!dispatcher.dir.join("new.sock").exists());
    };

    let new = listener("new", "unix:DIR/new.sock", "web", "");
    let changed = "[pool.web]\npolicy = \"random\"\n";
    write_config(&dispatcher.dir, &format!("{new}{}{changed}", web("pol = \"web\"")));
    let (code, words) = refused(&dispatcher);
    assert_eq!(code, 78, "{words}");
    // The same text as `dispatcher check`.
    let file = dispatcher.dir.join("dispatcher.toml");
    let check = run(&dispatcher, &["check", "--config", file.to_str().unwrap()]);
    assert_eq!(check.status.code(), Some(78));
    assert_eq!(words, String::from_utf8(check.stderr).unwrap());
    assert!(words.contains("dispatcher.toml:13:1: ") && words.contains("| ^^^"), "{words}");
    unchanged();
    wait_for_log(&dispatcher, "event=reload_refused by=request error=");

    // An unavailable resource is also found before anything has changed.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = listener("busy", &taken.local_addr().unwrap().to_string(), "web", "");
    write_config(&dispatcher.dir, &format!("{new}{busy}{}{changed}", web("")));
    let (code, words) = refused(&dispatcher);
    assert_eq!(code, 78, "{words}");
    assert!(words.contains("listener `busy`: cannot listen on 127.0.0.1:"), "{words}");
    unchanged();
    // systemd passes nothing to a running process.
    let inherited = listener("late", "systemd:late", "web", "");
    write_config(&dispatcher.dir, &format!("{inherited}{}{changed}", web("")));
    let (code, words) = refused(&dispatcher);
    assert_eq!(code, 78, "{words}");
    assert!(words.contains("systemd:late is new") && words.contains("restart"), "{words}");
    unchanged();
    std::fs::remove_file(&file).unwrap();
    let (code, words) = refused(&dispatcher);
    assert_eq!(code, 78, "{words}");
    assert!(words.contains("dispatcher.toml: No such file"), "{words}");
    unchanged();
    clients.iter_mut().for_each(|client| client.echo("no client noticed"));

    // Further reloads work.
    let done = reload(&dispatcher, &format!("{}{changed}", web("")));
    assert_eq!(names(&done["changed"]), ["pool web"]);
    assert_eq!(policy(&dispatcher, "web"), "random");
}

#[test]
fn a_removed_listener_is_emptied_first_and_an_added_one_serves() {
    let keys = "[pool.web]\nwait_for_worker = \"1h\"\n";
    let old = listener("old", "127.0.0.1:0", "web", "");
    let dispatcher = Dispatcher::start(&format!("{}{old}{keys}", web("")));
    let address = dispatcher.address("old");
    // Without a worker they wait in the kernel's queue.
    let queued: Vec<TcpStream> = (0..150).map(|_| connect(address)).collect();
    assert_eq!(dispatcher.status().accepted, 0);
    let new = listener("new", "unix:DIR/new.sock", "web", "");
    let more = listener("more", "127.0.0.1:0", "web", "");
    let done = reload(&dispatcher, &format!("{}{new}{more}{keys}", web("")));
    assert_eq!(names(&done["added"]), ["listener new", "listener more"]);
    assert_eq!(names(&done["removed"]), ["listener old"]);
    dispatcher.wait_status("the queue to be emptied", |status| status.queued == 150);
    wait_until("the old listener to be closed", || TcpStream::connect(address).is_err());
    wait_for_log(&dispatcher, "event=listener_closed listener=old pool=web");
    let shown = dispatcher.status();
    let shown: Vec<&str> = shown.listeners.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(shown, ["web", "new", "more"]);

    let _worker = dispatcher.workers("blocking", "web", 1);
    for client in queued {
        assert_eq!(served_by(client), "w0");
    }
    assert_eq!(served_by(UnixStream::connect(dispatcher.dir.join("new.sock")).unwrap()), "w0");
    let mut client = Client::connect(dispatcher.address("more")).unwrap();
    assert_eq!((client.served_by.as_str(), client.listener.as_str()), ("w0", "more"));
    client.echo("hello");

    // A listener that comes after the worker has joined; its index was used before.
    let again = listener("again", "127.0.0.1:0", "web", "");
    reload(&dispatcher, &format!("{}{again}{keys}", web("")));
    assert_eq!(served_by(connect(dispatcher.address("again"))), "w0");
    wait_until("its file to go", || !dispatcher.dir.join("new.sock").exists());
    client.echo("its listener is gone, it is not");
    let taken = dispatcher.wait_status("all to be taken", |status| status.taken == 153);
    assert_eq!(taken.closed.values().sum::<u64>(), 0);
}

#[test]
fn a_listener_leads_to_another_pool_and_the_old_one_ends_gently() {
    let dispatcher = Dispatcher::start(&one_pool(""));
    let address = dispatcher.address("web");
    let mut workers = dispatcher.workers("blocking", "web", 1);
    let mut before = Client::connect(address).unwrap();
    let blue = listener("web", "127.0.0.1:0", "blue", "");
    let done = reload(&dispatcher, &format!("{blue}[pool.blue]\n"));
    assert_eq!(names(&done["added"]), ["pool blue"]);
    assert_eq!(names(&done["removed"]), ["pool web"]);
    assert_eq!(names(&done["changed"]), ["listener web"]);
    assert_eq!(dispatcher.address("web"), address, "the socket stays, no client is refused");
    let waiting = connect(address);
    let status = dispatcher.wait_status("the drain", |status| {
        worker(status, "w0").is_some_and(|worker| worker.state == "draining")
    });
    assert_eq!(pool(&status, "web").state, "removed");
    // No worker joins the old pool any more.
    let _new = dispatcher.worker("blocking", "blue", "b0");
    let mut after = Client::greeted(waiting).unwrap();
    assert_eq!((after.served_by.as_str(), after.listener.as_str()), ("b0", "web"));
    before.echo("still here");
    after.echo("here now");
    before.finish();
    assert!(workers[0].wait().success(), "told that it is drained, it has ended by itself");
    dispatcher.wait_status("the old pool to go", |status| status.pools.len() == 1);
}

#[test]
fn processes_come_with_their_pool_and_go_with_it() {
    let mut dispatcher = Dispatcher::start(&one_pool(""));
    let jobs = |processes: u32| {
        let command = example("test-worker");
        format!(
            "{}{}[pool.jobs.spawn]\ncommand = [{:?}, \"blocking\"]\nprocesses = {processes}\n",
            listener("jobs", "127.0.0.1:0", "jobs", ""),
            one_pool(""),
            command.to_str().unwrap()
        )
    };
    reload(&dispatcher, &jobs(1));
    dispatcher.wait_joined("jobs", 1);
    let mut client = Client::connect(dispatcher.address("jobs")).unwrap();
    reload(&dispatcher, &jobs(2));
    dispatcher.wait_joined("jobs", 2);
    reload(&dispatcher, &jobs(1));
    dispatcher
        .wait_status("the second to be gone", |status| pool(status, "jobs").workers.len() == 1);
    assert_eq!(worker(&dispatcher.status(), "jobs-1").unwrap().state, "active");
    client.echo("still here");
    reload(&dispatcher, &one_pool(""));
    client.echo("even now");
    client.finish();
    wait_until("both processes to end", || {
        dispatcher.log().matches("event=process_ended pool=jobs").count() == 2
    });
    assert!(!dispatcher.log().contains("event=process_restarting"), "they are not restarted");
    assert!(dispatcher.stop().success());
}

#[test]
fn an_operator_scales_a_pool_until_the_next_reload() {
    let text = format!(
        "{}[pool.web.spawn]\ncommand = [{:?}, \"blocking\"]\nprocesses = 1\n{}[pool.other]\n",
        one_pool(""),
        example("test-worker").to_str().unwrap(),
        listener("other", "127.0.0.1:0", "other", ""),
    );
    let mut dispatcher = Dispatcher::start(&text);
    let scale = |arguments: &[&str]| {
        let mut command = Command::new(dispatcher_bin());
        let output = command.arg("scale").args(arguments).arg("--admin").arg(dispatcher.admin());
        let output = output.output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.code().unwrap(), text)
    };
    dispatcher.wait_joined("web", 1);
    assert_eq!(
        scale(&["web", "3"]),
        (0, "pool web: 3 processes wanted, 1 before: 1 active, 2 starting, 0 leaving\n".to_owned())
    );
    dispatcher.wait_joined("web", 3);
    let mut client = Client::connect(dispatcher.address("web")).unwrap();
    assert_eq!(scale(&["web", "-1"]).0, 0);
    dispatcher.wait_status("one to be gone", |status| pool(status, "web").workers.len() == 2);
    assert_eq!(scale(&["web", "+1", "--json"]).0, 0);
    dispatcher.wait_joined("web", 3);
    for (wrong, with) in [
        (&["web", "0"][..], 64),
        (&["web", "-3"], 64),
        (&["web", "1025"], 64),
        (&["other", "2"], 65),
        (&["wbe", "2"], 66),
    ] {
        let (code, text) = scale(wrong);
        assert_eq!(code, with, "{wrong:?}: {text}");
        assert!(text.contains("help: "), "{wrong:?}: {text}");
    }
    reload(&dispatcher, &text);
    client.echo("still here");
    dispatcher.wait_status("what the configuration says", |status| {
        let workers = &pool(status, "web").workers;
        workers.iter().filter(|worker| worker.state == "active").count() == 1
    });
    drop(client);
    assert!(dispatcher.log().contains("event=pool_scaled pool=web processes=3 before=1"));
    assert!(dispatcher.stop().success());
}

#[test]
fn rules_and_options_of_a_listener_change_while_it_is_open() {
    let body = |keys: &str| format!("{}[pool.web]\n", web(keys));
    let dispatcher = Dispatcher::start(&body(""));
    let address = dispatcher.address("web");
    let _worker = dispatcher.workers("blocking", "web", 1);
    let mut before = Client::connect(address).unwrap();
    let done =
        reload(&dispatcher, &body("deny = [\"127.0.0.0/8\"]\nbacklog = 16\nkeepalive = \"1m\""));
    assert_eq!(names(&done["changed"]), ["listener web"]);
    let mut byte = [0; 1];
    assert!(matches!(connect(address).read(&mut byte), Ok(0) | Err(_)), "kept out");
    dispatcher.wait_status("it to be counted", |status| status.closed["denied"] == 1);
    before.echo("those inside stay");
    reload(&dispatcher, &body("nodelay = false"));
    Client::connect(address).unwrap().echo("let in again");
    assert_eq!(dispatcher.address("web"), address);
}

#[test]
fn what_cannot_change_is_named_and_the_rest_is_in_force() {
    let dispatcher = Dispatcher::start(&format!("{}[pool.web]\n", web("send_buffer = 65536")));
    let other = format!(
        "admin_http = \"127.0.0.1:1\"\ndispatch_socket_mode = \"0600\"\n{}[pool.web]\npolicy = \"hash\"\n",
        web("reuse_port = true")
    );
    let done = reload(&dispatcher, &other);
    let fixed = [
        "dispatch_socket_mode",
        "admin_http",
        "reuse_port of listener web",
        "send_buffer of listener web",
    ];
    assert_eq!(names(&done["needs_restart"]), fixed);
    assert_eq!(policy(&dispatcher, "web"), "hash");
    wait_for_log(&dispatcher, "event=reload_needs_restart what=\"admin_http\"");
    // For as long as they differ.
    let output = run(&dispatcher, &["reload"]);
    assert!(output.status.success());
    let words = String::from_utf8(output.stdout).unwrap();
    assert!(words.contains("needs a restart, not changed: admin_http\n"), "{words}");
    assert!(words.contains("nothing has changed\n"), "{words}");
}

#[test]
fn sighup_does_the_same_and_the_log_says_how_it_went() {
    let dispatcher = Dispatcher::start(&one_pool(""));
    let _worker = dispatcher.workers("blocking", "web", 1);
    let mut client = Client::connect(dispatcher.address("web")).unwrap();
    write_config(&dispatcher.dir, &one_pool("policy = \"round-robin\""));
    dispatcher.process.signal(Signal::SIGHUP);
    wait_for_log(
        &dispatcher,
        "event=reloaded by=SIGHUP added=\"\" removed=\"\" changed=\"pool web\"",
    );
    assert_eq!(policy(&dispatcher, "web"), "round-robin");
    write_config(&dispatcher.dir, &one_pool("policy = \"random\"\nhistroy = 7"));
    dispatcher.process.signal(Signal::SIGHUP);
    wait_for_log(&dispatcher, "event=reload_refused by=SIGHUP error=");
    let log = dispatcher.log();
    let line = log.lines().find(|line| line.contains("event=reload_refused")).unwrap();
    assert!(line.contains("dispatcher.toml:10:1: ") && line.contains("`history`"), "{line}");
    assert_eq!(policy(&dispatcher, "web"), "round-robin", "nothing has changed");
    client.echo("no client noticed");
}

#[test]
fn the_log_level_changes_with_it() {
    let temp = configure(&one_pool(""));
    let mut command = Command::new("env");
    command.args(["-u", "DISPATCHER_LOG", "-u", "NOTIFY_SOCKET", dispatcher_bin()]);
    let dispatcher = Dispatcher::start_as(temp.path(), &mut command);
    let level = || http_get(&dispatcher.admin(), "/v1/log_level").unwrap().1;
    assert!(level().contains("info"), "{}", level());
    reload(&dispatcher, &format!("log_level = \"error\"\n{}", one_pool("")));
    assert!(level().contains("error"), "{}", level());
    reload(&dispatcher, &one_pool(""));
    assert!(level().contains("info"), "{}", level());
}

#[test]
fn over_http_it_is_the_same() {
    let dispatcher = Dispatcher::start(&one_pool(""));
    let post = || {
        let mut stream = UnixStream::connect(dispatcher.admin()).unwrap();
        let head = "POST /v1/reload HTTP/1.1\r\nHost: test\r\nConnection: close\r\n";
        write!(stream, "{head}Content-Length: 0\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let code: u16 = head.split(' ').nth(1).unwrap().parse().unwrap();
        (code, serde_json::from_str::<Value>(body).unwrap())
    };
    let (code, done) = post();
    assert_eq!(code, 200, "{done}");
    assert_eq!(names(&done["changed"]), [""; 0]);
    write_config(&dispatcher.dir, "nonsense");
    let (code, why) = post();
    assert_eq!((code, why["problem"].as_str()), (422, Some("config")), "{why}");
    assert!(why["error"].as_str().unwrap().contains("^"), "{why}");
    assert_eq!(http_get(&dispatcher.admin(), "/v1/reload").unwrap().0, 405);
}
