//! Versions that do not become ready: the roll stops, the old workers serve on, the operator sees
//! why, and `rollout undo` restores.

use super::*;

/// A pool of three processes with a good version is to be replaced by a bad one. Clients come all
/// the time. `expected` are parts of what the operator reads.
#[track_caller]
fn stops(good: &str, bad: &str, expected: &[&str]) {
    let dispatcher = Dispatcher::start(good);
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 3);
    let before = dispatcher.status();
    let mut held: Vec<Client> = (0..6).map(|_| Client::connect(address).unwrap()).collect();
    let ((), served) = with_clients(address, || {
        let text = reload(&dispatcher, bad);
        assert!(text.contains("until `dispatcher restart web`"), "{text}");
        let Outcome { code, text } = run(&dispatcher, &["restart", "web", "--wait"]);
        assert_eq!(code, 70, "{text}");
        check(&text, expected);
        assert!(text.contains("0 processes replaced; the other processes serve on"), "{text}");
        assert!(text.contains("dispatcher rollout undo web"), "{text}");
        let Outcome { code, text } = run(&dispatcher, &["rollout", "status", "web"]);
        assert_eq!(code, 70, "{text}");
        check(&text, expected);
        assert!(text.contains("replaced: 0 of 3"), "{text}");
        // Nothing else is tried.
        let status = dispatcher.wait_status("the bad process to end", |status| {
            processes(status).leaving == 0 && pool(status, "web").workers.len() == 3
        });
        assert_eq!(pids(&status), pids(&before));
        assert_eq!(plain(&status), ["1"; 3]);
        assert!(!processes(&status).crash_loop);
        assert!(processes(&status).restart_needed);
        let text = order(&dispatcher, &["rollout", "undo", "web", "--wait"]);
        assert!(text.contains("back to generation 1: 0 processes to replace"), "{text}");
        let status = dispatcher.status();
        assert_eq!((processes(&status).generation, pids(&status)), (1, pids(&before)));
        let text = order(&dispatcher, &["rollout", "status", "web"]);
        assert!(text.contains("last return from 2 to 1: done"), "{text}");
        // A process that ends is started from the former command again.
        let victim = pool(&status, "web").workers[1].pid;
        held.iter_mut().filter(|client| client.pid != victim).for_each(|client| client.echo("on"));
        kill(Pid::from_raw(victim), Signal::SIGTERM).unwrap();
        held.retain(|client| client.pid != victim);
        dispatcher.wait_status("another process", |status| {
            plain(status) == ["1"; 3] && !pids(status).contains(&victim)
        });
    });
    held.iter_mut().for_each(|client| client.echo("through it all"));
    assert!(served > 0);
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
    assert_eq!(dispatcher.log().matches("event=roll_stopped pool=web").count(), 1);
}

#[track_caller]
fn check(text: &str, expected: &[&str]) {
    for part in expected {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
}

fn both(bad: &str, keys: &str) -> (String, String) {
    let keys = |number| version(number, &format!("processes = 3\n{keys}"));
    (spawning(&good("blocking"), &keys("1")), spawning(bad, &keys("2")))
}

#[test]
fn a_version_that_crashes_at_start() {
    let bad = script("echo reading the settings; echo cannot open the database >&2; exit 3");
    let (good, bad) = both(&bad, "");
    let reason = "process 1 (web-1) ended before it was ready: exit status 3";
    stops(&good, &bad, &[reason, "  reading the settings", "  cannot open the database"]);
}

#[test]
fn a_version_that_never_joins() {
    let (good, bad) = both(&script("echo waiting; exec sleep 1000"), "start_timeout = \"2s\"");
    let reason = "process 1 (web-1) did not join within start_timeout";
    stops(&good, &bad, &[reason, "  waiting"]);
}

#[test]
fn a_version_that_joins_and_never_takes() {
    let bad = script("echo about to hang; TEST_WORKER=never-take exec SERVER blocking");
    let (good, bad) = both(&bad, "ready_timeout = \"2s\"");
    let reason = "process 1 (web-1) is not ready: its application took no connection within \
                  ready_timeout (2s)";
    stops(&good, &bad, &[reason, "  about to hang"]);
}

#[test]
fn a_version_that_cannot_be_executed() {
    let (good, bad) = both("[\"/nonexistent/server\"]", "");
    stops(&good, &bad, &["process 1 (web-1) could not be started: ", "No such file", "server"]);
}

#[test]
fn a_parent_that_cannot_load_the_application() {
    let keys = |number| version(number, "processes = 3\nfork = true");
    let prefork = format!("[{:?}, \"prefork\", \"blocking\"]", example("test-worker"));
    let bad = script("echo cannot load the application >&2; exit 3");
    let reason = "process 1 (web-1) could not be started: the process that forks the workers of \
                  the pool has ended";
    let (good, bad) = (spawning(&prefork, &keys("1")), spawning(&bad, &keys("2")));
    stops(&good, &bad, &[reason, "  cannot load the application"]);
}

#[test]
fn a_version_that_takes_and_does_not_speak_http() {
    // It greets in its own protocol.
    let bad = script("exec SERVER tokio");
    let (good, bad) = both(&bad, "ready_timeout = \"2s\"\nready_check = \"/health\"");
    stops(&good, &bad, &["process 1 (web-1) is not ready: GET /health: "]);
}

#[test]
fn a_version_that_takes_and_never_answers() {
    let bad = script("TEST_WORKER_PAUSE=1000000 exec SERVER serial");
    let (good, bad) = both(&bad, "ready_timeout = \"2s\"\nready_check = \"/health\"");
    let reason =
        "process 1 (web-1) is not ready: no answer to GET /health within ready_timeout (2s)";
    stops(&good, &bad, &[reason]);
}

/// One request; the process id in the answer.
fn get(address: SocketAddr) -> i32 {
    use std::io::{Read, Write};
    let mut stream = connect(address);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let pid = text.split("pid ").nth(1).unwrap_or_else(|| panic!("{text:?}"));
    pid.split(',').next().unwrap().parse().unwrap()
}

#[test]
fn a_version_whose_http_check_fails() {
    let http = |number: &str, path: &str| {
        let keys = format!("processes = 2\nready_timeout = \"2s\"\nready_check = {path:?}");
        spawning(&format!("[{:?}]", example("http")), &version(number, &keys))
    };
    let dispatcher = Dispatcher::start(&http("1", "/"));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 2);
    order(&dispatcher, &["restart", "web", "--wait"]);
    let before = dispatcher.wait_status("a good roll", |status| {
        is("done")(status) && pool(status, "web").workers.len() == 2
    });
    assert_eq!(processes(&before).ready_checks_passed, 2);
    reload(&dispatcher, &http("2", "/missing"));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                assert!(pids(&before).contains(&get(address)), "only old workers serve");
            }
        });
        let Outcome { code, text } = run(&dispatcher, &["restart", "web", "--wait"]);
        assert_eq!(code, 70, "{text}");
        let reason = "process 1 (web-1) is not ready: GET /missing was answered with 404 Not Found";
        check(&text, &[reason]);
        dispatcher.wait_status("the bad one to end", |status| pids(status) == pids(&before));
    });
    assert_eq!(processes(&dispatcher.status()).ready_checks_failed, 1);
    // With a path that works, the same version is good.
    reload(&dispatcher, &http("2", "/"));
    order(&dispatcher, &["restart", "web", "--wait"]);
    let status = dispatcher.status();
    assert_eq!(plain(&status), ["2"; 2]);
    assert_eq!(processes(&status).ready_checks_passed, 4);
}

/// Four processes; a second version of which only the first process works.
fn only_the_first(more: &str) -> (String, String) {
    let bad = script(
        "echo I am $DISPATCH_NAME; test $DISPATCH_NAME = web-1 || exit 4; exec SERVER blocking",
    );
    both_of(4, &bad, more)
}

fn both_of(count: u32, bad: &str, more: &str) -> (String, String) {
    let keys = |number| version(number, &format!("processes = {count}\n{more}"));
    (spawning(&good("blocking"), &keys("1")), spawning(bad, &keys("2")))
}

#[test]
fn a_bad_second_process_stops_the_roll_and_undo_returns_the_first() {
    let (good, bad) = only_the_first("");
    let dispatcher = Dispatcher::start(&good);
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 4);
    let before = dispatcher.status();
    with_clients(address, || {
        reload(&dispatcher, &bad);
        let Outcome { code, text } = run(&dispatcher, &["restart", "web", "--wait"]);
        assert_eq!(code, 70, "{text}");
        let reason = "process 2 (web-2) ended before it was ready: exit status 4";
        check(&text, &[reason, "  I am web-2", "1 process replaced"]);
        let status = dispatcher.wait_status("both versions", |status| plain(status).len() == 4);
        assert_eq!(plain(&status), ["2", "1", "1", "1"]);
        assert_eq!((roll(&status).replaced, roll(&status).remaining), (1, 3));
        assert_eq!(pids(&status).intersection(&pids(&before)).count(), 3);
        assert!(processes(&status).restart_needed);
        // Each place keeps its version.
        for (place, kept) in [(0, "2"), (1, "1")] {
            let name = format!("web-{}", place + 1);
            let victim = worker(&dispatcher.status(), &name).unwrap().pid;
            kill(Pid::from_raw(victim), Signal::SIGTERM).unwrap();
            dispatcher.wait_status("another process", |status| {
                let next = worker(status, &name);
                next.is_some_and(|it| it.pid != victim && it.state != "draining")
                    && plain(status).get(place).is_some_and(|version| version == kept)
            });
        }
        let text = order(&dispatcher, &["rollout", "undo", "web", "--wait"]);
        assert!(text.contains("back to generation 1: 1 process to replace"), "{text}");
        assert_eq!(plain(&dispatcher.status()), ["1"; 4]);
    });
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

#[test]
fn on_failure_undo_returns_by_itself() {
    let (good, bad) = only_the_first("on_failure = \"undo\"");
    let dispatcher = Dispatcher::start(&good);
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 4);
    with_clients(address, || {
        reload(&dispatcher, &bad);
        let Outcome { code, text } = run(&dispatcher, &["restart", "web", "--wait"]);
        assert_eq!(code, 70, "{text}");
        let reason = "process 2 (web-2) ended before it was ready: exit status 4";
        check(&text, &[reason, "  I am web-2", "undone"]);
        let status = dispatcher.wait_status("the former version", |status| {
            is("done")(status) && plain(status) == ["1"; 4]
        });
        assert!(roll(&status).undo);
        assert_eq!(processes(&status).generation, 1);
        // Its reason is still shown, and the deploy has failed.
        for wait in [&[][..], &["--wait"]] {
            let arguments = [&["rollout", "status", "web"], wait].concat();
            let Outcome { code, text } = run(&dispatcher, &arguments);
            assert_eq!(code, 70, "{text}");
            check(&text, &[reason, "return from 2 to 1: done"]);
        }
        // To undo it again would return to the version that failed.
        let Outcome { code, text } = run(&dispatcher, &["rollout", "undo", "web"]);
        assert_eq!(code, 65, "{text}");
        check(&text, &["pool web has returned to generation 1 already"]);
    });
    // Corrected, it goes through.
    reload(&dispatcher, &good.replace("VERSION = \"1\"", "VERSION = \"3\""));
    order(&dispatcher, &["restart", "web", "--wait"]);
    assert_eq!(plain(&dispatcher.status()), ["3"; 4]);
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

#[test]
fn a_command_that_fails_when_a_file_exists() {
    let temp = configure("");
    let flag = temp.path().join("broken");
    let text =
        format!("test -e {} && echo broken >&2 && exit 9; exec SERVER blocking", flag.display());
    let body = spawning(&script(&text), "processes = 3");
    write_config(temp.path(), &body);
    let mut dispatcher = Dispatcher::start_in(temp.path());
    dispatcher.keep(temp);
    dispatcher.wait_joined("web", 3);
    std::fs::write(&flag, "").unwrap();
    let before = dispatcher.status();
    let address = dispatcher.address("web");
    with_clients(address, || {
        for round in 1..=3 {
            let Outcome { code, text } = run(&dispatcher, &["restart", "web", "--wait"]);
            assert_eq!(code, 70, "{text}");
            check(&text, &["exit status 9", "  broken"]);
            assert_eq!(pids(&dispatcher.status()), pids(&before), "round {round}");
        }
        std::fs::remove_file(&flag).unwrap();
        order(&dispatcher, &["restart", "web", "--wait"]);
        dispatcher.wait_status("new ones", |status| {
            pids(status).len() == 3 && pids(status).is_disjoint(&pids(&before))
        });
    });
}

#[test]
fn the_other_new_processes_of_a_stopped_roll_end() {
    // One fails while the others are being checked.
    let bad = script(
        "if test $DISPATCH_NAME = web-3; then while ! test -e DIR/fail; do sleep 0.05; done; exit 5; fi; \
         TEST_WORKER_PAUSE=1000000 exec SERVER serial",
    );
    let (good, bad) =
        both_of(4, &bad, "max_surge = \"100%\"\nready_check = \"/\"\nstop_timeout = \"1s\"");
    let dispatcher = Dispatcher::start(&good);
    dispatcher.wait_joined("web", 4);
    let before = pids(&dispatcher.status());
    with_clients(dispatcher.address("web"), || {
        reload(&dispatcher, &bad);
        order(&dispatcher, &["restart", "web"]);
        dispatcher.wait_status("three new ones", |status| pids(status).len() == 7);
        std::fs::write(dispatcher.dir.join("fail"), "").unwrap();
        let Outcome { code, text } = run(&dispatcher, &["rollout", "status", "web", "--wait"]);
        assert_eq!(code, 70, "{text}");
        check(&text, &["process 3 (web-3) ended before it was ready: exit status 5"]);
        dispatcher.wait_status("the new ones to end", |status| {
            pids(status) == before && processes(status).leaving == 0
        });
    });
    assert_eq!(children_of(dispatcher.process.pid()).len(), 4);
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

#[test]
fn an_undo_that_fails_stops_too() {
    let temp = configure("");
    let flag = temp.path().join("gone");
    let former = format!("test -e {} && exit 6; exec SERVER blocking", flag.display());
    let keys = |number| version(number, "processes = 2\non_failure = \"undo\"");
    write_config(temp.path(), &spawning(&script(&former), &keys("1")));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    dispatcher.keep(temp);
    dispatcher.wait_joined("web", 2);
    reload(&dispatcher, &spawning(&good("blocking"), &keys("2")));
    order(&dispatcher, &["restart", "web", "--wait"]);
    std::fs::write(&flag, "").unwrap();
    let Outcome { code, text } = run(&dispatcher, &["rollout", "undo", "web", "--wait"]);
    assert_eq!(code, 70, "{text}");
    check(&text, &["the return to generation 1 stopped", "exit status 6", "0 of 2 returned"]);
    let status = dispatcher.status();
    assert_eq!(plain(&status), ["2"; 2]);
    assert_eq!(roll(&status).state, "stopped");
    Client::connect(dispatcher.address("web")).unwrap().echo("served");
}

#[test]
fn an_undo_checks_the_former_version_with_its_own_check() {
    let keys = |number, check| version(number, &format!("processes = 2\nready_check = {check:?}"));
    // It does not speak HTTP.
    let dispatcher = Dispatcher::start(&spawning(&good("blocking"), &keys("1", "tcp")));
    dispatcher.wait_joined("web", 2);
    let http = format!("[{:?}]", example("http"));
    reload(&dispatcher, &spawning(&http, &keys("2", "/health")));
    order(&dispatcher, &["restart", "web", "--wait"]);
    assert_eq!(plain(&dispatcher.status()), ["2"; 2]);
    order(&dispatcher, &["rollout", "undo", "web", "--wait"]);
    assert_eq!(plain(&dispatcher.status()), ["1"; 2]);
}
