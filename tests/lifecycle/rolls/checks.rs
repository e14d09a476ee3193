//! Ready checks: their connections count apart, leave nothing behind, come before the first client,
//! and work with every kind of worker.

use super::*;

#[test]
fn check_connections_count_apart_and_leave_nothing_behind() {
    // 100 checks, ten at a time.
    let keys = "processes = 10\nmax_surge = 10\noutput = \"inherit\"";
    let body = spawning(&good("mio"), keys).replacen("output = \"log\"\n", "", 1);
    let dispatcher = Dispatcher::start(&body);
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 10);
    let settled = |status: &Status| {
        processes(status).leaving == 0
            && pool(status, "web").workers.len() == 10
            && pool(status, "web").workers.iter().all(|worker| worker.load == 0)
    };
    Client::connect(address).unwrap().finish();
    let mut before = None;
    for round in 1..=10u64 {
        order(&dispatcher, &["restart", "web", "--wait"]);
        let status = dispatcher.wait_status("the old ones to end", settled);
        let checked = &processes(&status);
        assert_eq!((checked.ready_checks_passed, checked.ready_checks_failed), (10 * round, 0));
        // Only the one client.
        assert_eq!((status.accepted, status.taken, status.in_flight), (1, 1, 0));
        assert!(pool(&status, "web").workers.iter().all(|it| (it.sent, it.taken) == (0, 0)));
        // The first round opens what the dispatcher keeps.
        before = before.or_else(|| Some(dispatcher.fds()));
    }
    let before = before.unwrap();
    wait_until("the last descriptors to be closed", || dispatcher.fds() <= before);
    assert_eq!(dispatcher.metric("dispatcher_ready_checks_total"), 100.0);
    wait_for_log(&dispatcher, "event=ready_check_passed pool=web process=1");
}

#[test]
fn every_kind_of_worker_can_be_replaced() {
    let prefork = format!("[{:?}, \"prefork\", \"blocking\"]", example("test-worker"));
    let kinds = ["blocking", "tokio", "mio", "serial"].map(|kind| (good(kind), ""));
    for (command, more) in kinds.into_iter().chain([(prefork, "fork = true\n")]) {
        let body = spawning(&command, &format!("{more}processes = 2"));
        let dispatcher = Dispatcher::start(&body);
        dispatcher.wait_joined("web", 2);
        let before = pids(&dispatcher.status());
        let ((), served) = with_clients(dispatcher.address("web"), || {
            for round in 1..=2 {
                order(&dispatcher, &["restart", "web", "--wait"]);
                let status = dispatcher.wait_status("the old ones to end", |status| {
                    processes(status).leaving == 0 && plain(status).len() == 2
                });
                assert_eq!(processes(&status).ready_checks_passed, 2 * round, "{command}");
            }
        });
        assert!(served > 0);
        assert!(pids(&dispatcher.status()).is_disjoint(&before));
        assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0, "{command}");
    }
}

#[test]
fn the_prefork_example_can_be_replaced() {
    let command = format!("[{:?}]", example("prefork"));
    let dispatcher = Dispatcher::start(&spawning(&command, "fork = true\nprocesses = 2"));
    dispatcher.wait_joined("web", 2);
    let before = pids(&dispatcher.status());
    order(&dispatcher, &["restart", "web", "--wait"]);
    dispatcher.wait_status("new ones", |status| {
        pids(status).len() == 2 && pids(status).is_disjoint(&before)
    });
}

/// The worker in the first place that is not one of these.
fn new_one(
    status: &Status,
    before: &BTreeSet<i32>,
) -> Option<dispatcher::api::status::WorkerStatus> {
    let mut workers = pool(status, "web").workers.iter();
    workers.find(|worker| !before.contains(&worker.pid)).cloned()
}

#[test]
fn a_worker_under_check_gets_no_clients() {
    let keys =
        |number, more| version(number, &format!("processes = 2\nready_timeout = \"3s\"\n{more}"));
    let dispatcher = Dispatcher::start(&spawning(&good("blocking"), &keys("1", "")));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 2);
    let before = pids(&dispatcher.status());
    let never = script("TEST_WORKER=never-take exec SERVER blocking");
    reload(&dispatcher, &spawning(&never, &keys("2", "")));
    let mut seen = false;
    let ((), served) = with_clients(address, || {
        order(&dispatcher, &["restart", "web"]);
        dispatcher.wait_status("the roll to stop", |status| {
            if let Some(checked) = new_one(status, &before) {
                seen = true;
                assert_eq!((checked.sent, checked.in_flight), (0, 0), "{checked:?}");
            }
            is("stopped")(status)
        });
    });
    assert!(seen && served > 0);
    assert_eq!(processes(&dispatcher.status()).ready_checks_failed, 1);
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

#[test]
fn a_worker_short_of_descriptors_fails_its_check() {
    let keys = |number, more: &str| {
        version(number, &format!("processes = 1\nready_timeout = \"2s\"\n{more}"))
    };
    let dispatcher = Dispatcher::start(&spawning(&good("blocking"), &keys("1", "")));
    dispatcher.wait_joined("web", 1);
    let before = pids(&dispatcher.status());
    // It joins, and then its program uses up what is left.
    let short = script("ulimit -n 64; TEST_WORKER=hoards exec SERVER blocking");
    reload(&dispatcher, &spawning(&short, &keys("2", "")));
    let Outcome { code, text } = run(&dispatcher, &["restart", "web", "--wait"]);
    assert_eq!(code, 70, "{text}");
    assert!(text.contains("the worker may be out of file descriptors"), "{text}");
    assert_eq!(pids(&dispatcher.status()).intersection(&before).count(), 1);
    Client::connect(dispatcher.address("web")).unwrap().echo("the old one serves");
}

#[test]
fn a_hostile_worker_delays_nothing_else() {
    // It takes the connection of its check and never answers.
    let hostile = script("TEST_WORKER_PAUSE=1000000 exec SERVER serial");
    let more = format!(
        "[[listener]]\nname = \"bad\"\naddress = \"127.0.0.1:0\"\npool = \"bad\"\n\n[pool.bad]\n\
         [pool.bad.spawn]\nready_check = \"/\"\nready_timeout = \"20s\"\nprocesses = 2\n\
         stop_timeout = \"1s\"\ncommand = {hostile}\n"
    );
    let body = format!("{}{more}", spawning(&good("blocking"), "processes = 2"));
    let dispatcher = Dispatcher::start(&body);
    dispatcher.wait_joined("web", 2);
    dispatcher.wait_joined("bad", 2);
    order(&dispatcher, &["restart", "bad"]);
    dispatcher
        .wait_status("the check to be under way", |status| pool(status, "bad").workers.len() == 3);
    for _ in 0..3 {
        order(&dispatcher, &["restart", "web", "--wait"]);
        Client::connect(dispatcher.address("web")).unwrap().echo("served meanwhile");
    }
    let status = dispatcher.status();
    assert_eq!(pool(&status, "bad").processes.as_ref().unwrap().ready_checks_failed, 0);
    let Outcome { code, text } = run(&dispatcher, &["rollout", "status", "bad", "--wait"]);
    assert_eq!(code, 70, "{text}");
    assert!(text.contains("no answer to GET / within ready_timeout (20s)"), "{text}");
    dispatcher.wait_status("it to be ended", |status| pool(status, "bad").workers.len() == 2);
}

#[test]
fn min_ready_and_no_check() {
    let keys = "processes = 2\nready_check = \"none\"\nmin_ready = \"300ms\"";
    let dispatcher = Dispatcher::start(&spawning(&good("blocking"), keys));
    dispatcher.wait_joined("web", 2);
    let begin = std::time::Instant::now();
    order(&dispatcher, &["restart", "web", "--wait"]);
    assert!(begin.elapsed() >= std::time::Duration::from_millis(600), "{:?}", begin.elapsed());
    assert_eq!(processes(&dispatcher.status()).ready_checks_passed, 0);
}

#[test]
fn a_dispatcher_short_of_descriptors_stops_the_roll() {
    let keys =
        "processes = 2\nstart_timeout = \"1s\"\nready_timeout = \"1s\"\nstop_timeout = \"1s\"";
    let dispatcher = Dispatcher::start(&spawning(&good("blocking"), keys));
    let address = dispatcher.address("web");
    dispatcher.wait_joined("web", 2);
    Client::connect(address).unwrap().finish();
    let over = || {
        let log = dispatcher.log();
        log.matches("event=roll_stopped").count() + log.matches("event=roll_done").count()
    };
    let mut stopped = 0;
    // Too few to start a process, to let it join, to check it; and then enough.
    for spare in [0, 3, 5, 7, 9, 11, 13, 40] {
        let (before, rolls) = (pids(&dispatcher.status()), over());
        dispatcher.process.limit_descriptors(Some(spare));
        // The admin socket cannot be used now.
        dispatcher.process.signal(Signal::SIGUSR2);
        wait_until("the roll to stop or to be done", || over() > rolls);
        dispatcher.process.limit_descriptors(None);
        let status = dispatcher.wait_status("two workers", |status| {
            processes(status).active == 2 && processes(status).leaving == 0
        });
        match roll(&status).state.as_str() {
            "stopped" => {
                stopped += 1;
                let reason = roll(&status).reason.clone().expect("a reason");
                assert!(reason.contains("process "), "{reason}");
            }
            state => {
                assert_eq!(state, "done");
                assert!(pids(&status).is_disjoint(&before));
            }
        }
        Client::connect(address).unwrap().echo("served");
    }
    assert!(stopped > 0);
    order(&dispatcher, &["restart", "web", "--wait"]);
    assert_eq!(dispatcher.status().closed.values().sum::<u64>(), 0);
}

#[test]
fn failed_checks_leave_nothing_behind() {
    let keys =
        "processes = 2\nready_timeout = \"300ms\"\nstop_timeout = \"300ms\"\nready_check = \"/\"";
    let dispatcher = Dispatcher::start(&spawning(&good("blocking"), keys));
    dispatcher.wait_joined("web", 2);
    let before = pids(&dispatcher.status());
    let never = script("TEST_WORKER=never-take exec SERVER blocking");
    let silent = script("TEST_WORKER_PAUSE=1000000 exec SERVER serial");
    let mut descriptors = None;
    for round in 0..8 {
        reload(&dispatcher, &spawning(if round % 2 == 0 { &never } else { &silent }, keys));
        assert_eq!(run(&dispatcher, &["restart", "web", "--wait"]).code, 70);
        let status = dispatcher.wait_status("the bad one to end", |status| {
            pids(status) == before && processes(status).leaving == 0
        });
        assert_eq!(processes(&status).ready_checks_failed, round + 1);
        // The first round opens what the dispatcher keeps.
        let most = *descriptors.get_or_insert_with(|| dispatcher.fds());
        wait_until("the descriptors to be closed", || dispatcher.fds() <= most);
    }
}
