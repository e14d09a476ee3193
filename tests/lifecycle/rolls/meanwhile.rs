//! What operators, crashes and reloads do while a roll is in progress.

use super::*;

/// The second version, whose processes start once there is a file for them.
fn gated() -> String {
    script("while ! test -e DIR/go-$DISPATCH_NAME; do sleep 0.05; done; exec SERVER blocking")
}

fn open_gates(dispatcher: &Dispatcher, numbers: impl IntoIterator<Item = u32>) {
    for number in numbers {
        std::fs::write(dispatcher.dir.join(format!("go-web-{number}")), "").unwrap();
    }
}

/// A pool of four in the middle of a roll: one process has been replaced.
fn in_the_middle(keys: &str) -> Dispatcher {
    let keys = |number| version(number, &format!("processes = 4\n{keys}"));
    let dispatcher = Dispatcher::start(&spawning(&good("blocking"), &keys("1")));
    dispatcher.wait_joined("web", 4);
    reload(&dispatcher, &spawning(&gated(), &keys("2")));
    open_gates(&dispatcher, [1]);
    order(&dispatcher, &["restart", "web"]);
    dispatcher.wait_status("one step", |status| {
        roll(status).replaced == 1 && plain(status) == ["2", "1", "1", "1"]
    });
    dispatcher
}

/// Waits until the roll is done and all have the second version.
fn done(dispatcher: &Dispatcher, count: usize) -> Status {
    dispatcher.wait_status("the end of the roll", |status| {
        is("done")(status) && plain(status) == vec!["2"; count]
    })
}

#[test]
fn a_second_roll_replaces_the_first() {
    let dispatcher = in_the_middle("");
    let address = dispatcher.address("web");
    with_clients(address, || {
        let first = Running::start(&dispatcher.dir, &["rollout", "status", "web", "--wait"]);
        let text = order(&dispatcher, &["restart", "web"]);
        assert!(text.contains("generation 3: 4 processes to replace"), "{text}");
        open_gates(&dispatcher, 1..=4);
        let status = done(&dispatcher, 4);
        assert_eq!((processes(&status).generation, roll(&status).generation), (3, 3));
        assert_eq!(first.wait().code, 0);
        dispatcher.wait_status("nothing to be left", |status| processes(status).leaving == 0);
    });
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

#[test]
fn two_operators_at_once_hear_of_each_other() {
    let dispatcher = in_the_middle("");
    let first = Running::start(&dispatcher.dir, &["restart", "web", "--wait"]);
    dispatcher.wait_status("the roll of the first", |status| roll(status).generation == 3);
    order(&dispatcher, &["restart", "web"]);
    let Outcome { code, text } = first.wait();
    assert_eq!(code, 65, "{text}");
    assert!(
        text.contains("another roll of pool web has begun meanwhile, to generation 4"),
        "{text}"
    );
    open_gates(&dispatcher, 1..=4);
    done(&dispatcher, 4);
}

#[test]
fn undo_in_the_middle_of_a_roll() {
    let dispatcher = in_the_middle("");
    with_clients(dispatcher.address("web"), || {
        let text = order(&dispatcher, &["rollout", "undo", "web", "--wait"]);
        assert!(text.contains("1 process to replace"), "{text}");
        let status = dispatcher.wait_status("the former version", |status| {
            plain(status) == ["1"; 4] && processes(status).leaving == 0
        });
        assert_eq!(processes(&status).generation, 1);
        // And forward again.
        open_gates(&dispatcher, 1..=4);
        order(&dispatcher, &["rollout", "undo", "web", "--wait"]);
        assert_eq!(plain(&dispatcher.status()), ["2"; 4]);
    });
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

#[test]
fn scaling_during_a_roll() {
    let dispatcher = in_the_middle("");
    with_clients(dispatcher.address("web"), || {
        order(&dispatcher, &["scale", "web", "6"]);
        open_gates(&dispatcher, 1..=6);
        let status = done(&dispatcher, 6);
        assert_eq!(processes(&status).generation, 2);
    });
    let dispatcher = in_the_middle("");
    with_clients(dispatcher.address("web"), || {
        order(&dispatcher, &["scale", "web", "2"]);
        open_gates(&dispatcher, 1..=4);
        done(&dispatcher, 2);
        // A place that is wanted again has the new version, too.
        order(&dispatcher, &["scale", "web", "4"]);
        done(&dispatcher, 4);
    });
}

#[test]
fn draining_and_resuming_during_a_roll() {
    let dispatcher = in_the_middle("");
    let address = dispatcher.address("web");
    let mut held: Vec<Client> = (0..8).map(|_| Client::connect(address).unwrap()).collect();
    // An old one, and the new one.
    order(&dispatcher, &["drain", "web/web-3"]);
    order(&dispatcher, &["drain", "web/web-1"]);
    open_gates(&dispatcher, 1..=4);
    let status = dispatcher.wait_status("the others to be replaced", |status| {
        ["web-2", "web-3", "web-4"]
            .iter()
            .all(|name| versions(status).contains(&((*name).to_owned(), "2".to_owned())))
    });
    held.iter_mut().for_each(|client| client.echo("drained, not ended"));
    drop(held);
    drop(status);
    dispatcher.wait_status("all to be new", |status| {
        is("done")(status) && plain(status) == ["2"; 4] && processes(status).leaving == 0
    });
}

#[test]
fn a_new_process_that_is_killed_at_any_moment_stops_the_roll_and_hurts_nobody() {
    // The second version takes the connection of its check and never answers.
    let keys = |number, path| {
        version(number, &format!("processes = 3\nready_check = {path:?}\nstop_timeout = \"1s\""))
    };
    let dispatcher = Dispatcher::start(&spawning(&good("blocking"), &keys("1", "tcp")));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 3);
    let silent = script("TEST_WORKER_PAUSE=1000000 exec SERVER serial");
    reload(&dispatcher, &spawning(&silent, &keys("2", "/")));
    let killed = |before: &BTreeSet<i32>| {
        let mut children = children_of(dispatcher.process.pid()).into_iter();
        children.find(|pid| !before.contains(pid))
    };
    with_clients(address, || {
        for round in 0..6u64 {
            let before = BTreeSet::from_iter(children_of(dispatcher.process.pid()));
            order(&dispatcher, &["restart", "web"]);
            let new = wait_for("a new process", || killed(&before));
            // At another moment each time: before it joins, and during its check.
            std::thread::sleep(std::time::Duration::from_millis(round * 40));
            kill(Pid::from_raw(new), Signal::SIGKILL).unwrap();
            let Outcome { code, text } = run(&dispatcher, &["rollout", "status", "web", "--wait"]);
            assert!(code == 70 && text.contains("(web-1)"), "round {round}: {text}");
            assert!(text.contains("ended before it was ready: signal 9"), "{text}");
            let status = dispatcher.wait_status("three", |status| plain(status).len() == 3);
            assert_eq!(plain(&status), ["1"; 3], "round {round}");
        }
        reload(&dispatcher, &spawning(&good("blocking"), &keys("3", "tcp")));
        order(&dispatcher, &["restart", "web", "--wait"]);
    });
    assert_eq!(plain(&dispatcher.status()), ["3"; 3]);
}

#[test]
fn an_old_process_that_is_killed_during_a_roll() {
    let dispatcher = in_the_middle("");
    // One beside which a new one is starting, and one that waits for its turn.
    for name in ["web-2", "web-4"] {
        let old = worker(&dispatcher.status(), name).unwrap().pid;
        kill(Pid::from_raw(old), Signal::SIGKILL).unwrap();
        dispatcher.wait_status("its end", |status| !pids(status).contains(&old));
        Client::connect(dispatcher.address("web")).unwrap().echo("served");
    }
    open_gates(&dispatcher, 1..=4);
    done(&dispatcher, 4);
}

#[test]
fn a_reload_that_removes_the_pool_during_a_roll() {
    let dispatcher = in_the_middle("");
    let mut client = Client::connect(dispatcher.address("web")).unwrap();
    let waiting = Running::start(&dispatcher.dir, &["rollout", "status", "web", "--wait"]);
    let other = one_pool("").replace("web", "other");
    reload(&dispatcher, &other);
    client.echo("drained");
    let Outcome { code, text } = waiting.wait();
    assert!(code == 66 || code == 0, "{code}: {text}");
    client.finish();
    dispatcher.wait_status("the pool to vanish", |status| status.pools.len() == 1);
    wait_until("its processes to end", || children_of(dispatcher.process.pid()).is_empty());
    // The name can be used again.
    reload(&dispatcher, &spawning(&good("blocking"), &version("5", "processes = 2")));
    dispatcher.wait_status("new ones", |status| plain(status) == ["5"; 2]);
    order(&dispatcher, &["restart", "web", "--wait"]);
}

#[test]
fn a_stop_during_a_roll_ends_all_processes() {
    let mut dispatcher = in_the_middle("");
    let address = dispatcher.address("web");
    let mut client = Client::connect(address).unwrap();
    client.echo("before");
    client.finish();
    let children = children_of(dispatcher.process.pid());
    assert!(children.len() >= 5, "{children:?}");
    assert!(dispatcher.stop().success(), "{}", dispatcher.log());
    assert!(!children.iter().any(|&pid| kill(Pid::from_raw(pid), None).is_ok()));
}

#[test]
fn a_restart_during_a_crash_loop_starts_the_new_version() {
    let keys = "processes = 3\ncrash_loop_after = 2\nmax_restart_delay = \"1h\"";
    let body = |command: &str, number| spawning(command, &version(number, keys));
    let dispatcher = Dispatcher::start(&body("[\"false\"]", "1"));
    dispatcher.wait_status("a crash loop", |status| processes(status).crash_loop);
    // The same again: there is nothing that could serve on.
    order(&dispatcher, &["restart", "web"]);
    dispatcher.wait_status("a crash loop again", |status| processes(status).crash_loop);
    write_config(&dispatcher.dir, &body(&good("blocking"), "2"));
    order(&dispatcher, &["reload", "--restart"]);
    dispatcher.wait_status("three that serve", |status| plain(status) == ["2"; 3]);
    assert!(!processes(&dispatcher.status()).crash_loop);
}
