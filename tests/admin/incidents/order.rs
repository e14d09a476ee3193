//! The log has causes before consequences; a requested end is not a fault; an ongoing fault is
//! updated.

use dispatcher::api::status::FaultStatus;

use super::*;

/// The fault of this kind with this subject.
fn fault<'a>(
    status: &'a dispatcher::api::status::Status,
    kind: &str,
    subject: &str,
) -> Option<&'a FaultStatus> {
    let mut found = status.faults.iter().filter(|f| f.kind == kind && f.subject == subject);
    let first = found.next();
    assert!(found.next().is_none(), "each once: {:#?}", status.faults);
    first
}

fn command(dispatcher: &Dispatcher, arguments: &[&str]) {
    let mut command = Command::new(dispatcher_bin());
    command.args(arguments).env("DISPATCHER_ADMIN", dispatcher.admin());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_death_is_logged_before_its_consequences() {
    let dispatcher = start("handoff_timeout = \"10m\"\nwait_for_worker = \"300ms\"");
    let mut first = dispatcher.worker("blocking", "web", "first");
    dispatcher.wait_joined("web", 1);
    let mut second = dispatcher.worker("blocking", "web", "second");
    dispatcher.wait_joined("web", 2);
    let address = dispatcher.address("web");
    dispatcher.prove_all(address);
    [&first, &second].iter().for_each(|worker| worker.signal(Signal::SIGSTOP));
    let waiting: Vec<TcpStream> = (0..10).map(|_| connect(address)).collect();
    dispatcher.wait_status("all in flight", |s| s.in_flight == 10);
    first.kill();
    dispatcher.wait_status("one to be left", |s| pool(s, "web").workers.len() == 1);
    second.kill();
    dispatcher.wait_status("refusing", |s| pool(s, "web").state == "refusing");
    drop(waiting);

    let mut story = Story::after(&dispatcher, "client_turned_away", 10);
    story.then(&[("event", "worker_gone"), ("name", "first"), ("resent", "5")]);
    for _ in 0..5 {
        story.then(&[("event", "connection_resent"), ("name", "second")]);
    }
    story.then(&[("event", "worker_gone"), ("name", "second"), ("resent", "10")]);
    story.then(&[("event", "no_worker"), ("pool", "web")]);
    story.then(&[("event", "refusing"), ("pool", "web"), ("closed", "10")]);
    story.then(&[("event", "client_turned_away"), ("reason", "no_worker")]);
    assert_eq!(story.all("connection_resent").len(), 5, "none of them before its cause");
}

#[test]
fn causes_are_logged_before_their_effect_on_the_pool() {
    let dispatcher = start("handoff_timeout = \"100ms\"\nwait_for_worker = \"10m\"");
    let only = dispatcher.worker_with("blocking", "web", "only", &[("TEST_WORKER", "stays")]);
    dispatcher.wait_joined("web", 1);
    only.signal(Signal::SIGSTOP);
    let waiting = connect(dispatcher.address("web"));
    wait_for_log(&dispatcher, "event=worker_suspect ");
    only.signal(Signal::SIGCONT);
    Client::greeted(waiting).unwrap().finish();
    wait_for_log(&dispatcher, "event=worker_trusted ");
    command(&dispatcher, &["drain", "web/only"]);
    wait_for_log(&dispatcher, "event=no_worker ");
    command(&dispatcher, &["resume", "web/only"]);
    only.signal(Signal::SIGTERM);

    // The first one is the start without workers.
    let mut story = Story::after(&dispatcher, "no_worker", 3);
    story.then(&[("event", "worker_suspect"), ("name", "only")]);
    story.then(&[("event", "worker_trusted"), ("name", "only")]);
    story.then(&[("event", "worker_draining"), ("name", "only")]);
    story.then(&[("event", "no_worker"), ("pool", "web")]);
    story.then(&[("event", "worker_resumed"), ("name", "only")]);
    story.then(&[("event", "worker_goodbye"), ("name", "only")]);
    story.then(&[("event", "no_worker"), ("pool", "web")]);
}

#[test]
fn an_ongoing_fault_is_updated() {
    let dispatcher = start("wait_for_worker = \"200ms\"");
    let mut worker = dispatcher.worker("blocking", "web", "w");
    dispatcher.wait_joined("web", 1);
    let address = dispatcher.address("web");
    let _client = Client::connect(address).unwrap();
    worker.kill();
    let status = dispatcher.wait_status("refusing", |s| pool(s, "web").state == "refusing");
    let refusing = fault(&status, "refusing", "web").expect("a fault");
    assert!(
        refusing.ongoing && refusing.text.contains(": 0 clients were turned away in "),
        "{refusing:?}"
    );
    let none = fault(&status, "no_worker", "web").expect("a fault");
    assert!(!none.ongoing && none.text.ends_with("s: clients waited"), "{none:?}");
    for _ in 0..57 {
        assert_eq!(connect(address).read(&mut [0]).unwrap_or(0), 0);
    }
    let status = dispatcher.wait_status("all of them", |s| s.closed["no_worker"] == 57);
    let refusing = fault(&status, "refusing", "web").expect("a fault");
    assert!(refusing.text.contains(": 57 clients were turned away"), "{refusing:?}");
    assert_eq!(refusing.count, 1, "it is one fault");

    // The fault is over and reports its duration.
    let mut worker = dispatcher.worker("blocking", "web", "w");
    dispatcher.wait_joined("web", 1);
    let status = dispatcher.status();
    let refusing = fault(&status, "refusing", "web").expect("a fault");
    assert!(
        !refusing.ongoing && refusing.text.contains("57 clients were turned away in "),
        "{refusing:?}"
    );
    assert!(!fault(&status, "no_worker", "web").expect("a fault").ongoing);

    // The same faults again, with another worker in between, are counted.
    let _client = Client::connect(address).unwrap();
    worker.kill();
    let status = dispatcher.wait_status("refusing", |s| pool(s, "web").state == "refusing");
    let refusing = fault(&status, "refusing", "web").expect("a fault");
    assert!(
        refusing.ongoing && refusing.count == 2 && refusing.text.contains(": 0 clients"),
        "{refusing:?}"
    );
    assert_eq!(fault(&status, "no_worker", "web").expect("a fault").count, 2);
    assert_eq!(fault(&status, "worker_gone", "web/w").expect("a fault").count, 2);
}

#[test]
fn the_same_fault_counts_wherever_it_is() {
    let dispatcher = start("wait_for_worker = \"10m\"");
    let address = dispatcher.address("web");
    for name in ["a", "b", "a", "b", "a"] {
        let mut worker = dispatcher.worker("blocking", "web", name);
        dispatcher.wait_joined("web", 1);
        let _client = Client::connect(address).unwrap();
        worker.kill();
        dispatcher.wait_status("it to go", |s| pool(s, "web").workers.is_empty());
    }
    let status = dispatcher.status();
    let count = |subject| fault(&status, "worker_gone", subject).map(|fault| fault.count);
    assert_eq!((count("web/a"), count("web/b")), (Some(3), Some(2)));
    let kinds: Vec<&str> = status.faults.iter().map(|fault| fault.subject.as_str()).collect();
    assert_eq!(kinds, ["web/b", "web/a", "web"], "the latest is the last");
}

#[test]
fn a_requested_end_is_not_a_fault() {
    let program = example("test-worker");
    let spawn = format!(
        "[pool.web.spawn]\ncommand = [{:?}, \"blocking\"]\nprocesses = 3\n",
        program.to_str().unwrap()
    );
    let dispatcher = start(&spawn);
    dispatcher.wait_joined("web", 3);
    let names = |dispatcher: &Dispatcher| {
        let status = dispatcher.status();
        pool(&status, "web").workers.iter().map(|w| w.name.clone()).collect::<Vec<_>>()
    };
    // One process fewer; and one process that is drained and started again.
    command(&dispatcher, &["scale", "web", "2"]);
    dispatcher.wait_joined("web", 2);
    let drained = names(&dispatcher)[0].clone();
    command(&dispatcher, &["drain", &format!("web/{drained}")]);
    let mut story = Story::after(&dispatcher, "process_ended", 2);
    for _ in 0..2 {
        let ended = story.then(&[("event", "process_ended"), ("pool", "web")]);
        assert_eq!(&*ended.level, "info", "{ended:?}");
    }
    assert!(story.all("worker_gone").iter().all(|line| line.level == "info"));
    wait_for_log(&dispatcher, "event=process_restarting ");
    dispatcher.wait_joined("web", 2);
    assert_eq!(dispatcher.status().faults, []);

    // An end that was not requested is a fault.
    let status = dispatcher.status();
    let victim = &pool(&status, "web").workers[0];
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim.pid), Signal::SIGKILL).unwrap();
    let subject = format!("web/{}", victim.name);
    let status = dispatcher
        .wait_status("a fault", |s| s.faults.iter().any(|fault| fault.kind == "process_ended"));
    let ended = fault(&status, "process_ended", &subject).expect("a fault");
    assert!(ended.text.contains("signal 9"), "{ended:?}");
    // A crash during a drain is a fault as well.
    dispatcher.wait_joined("web", 2);
    let _clients: Vec<Client> =
        (0..4).map(|_| Client::connect(dispatcher.address("web")).unwrap()).collect();
    let name = names(&dispatcher)[0].clone();
    command(&dispatcher, &["drain", &format!("web/{name}")]);
    let status = dispatcher.status();
    let victim = worker(&status, &name).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim.pid), Signal::SIGKILL).unwrap();
    dispatcher.wait_status("a fault", |s| {
        s.faults.iter().any(|f| f.kind == "worker_gone" && f.subject == format!("web/{name}"))
    });
}
