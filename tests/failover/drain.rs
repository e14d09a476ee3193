//! `dispatcher drain --all`: a host empties, and returns.

use std::process::{Child, Command, Stdio};

use serde_json::Value;
use test_support::reloading::{reload, run};
use test_support::*;

use super::agent::{agent_of, ask, wait_answer, with_agent};

fn start(dispatcher: &Dispatcher, arguments: &[&str]) -> Child {
    let mut command = Command::new(dispatcher_bin());
    command.args(arguments).env("DISPATCHER_ADMIN", dispatcher.admin()).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn staying(dispatcher: &Dispatcher, name: &str) -> Process {
    dispatcher.worker_with("blocking", "web", name, &[("TEST_WORKER", "stays")])
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_host_empties_and_returns() {
    let dispatcher =
        Dispatcher::start(&format!("advice_listen = \"127.0.0.1:0\"\n{}", with_agent("")));
    let agent = agent_of(&dispatcher, "web");
    let address = dispatcher.address("web");
    let _workers = [staying(&dispatcher, "w0"), staying(&dispatcher, "w1")];
    dispatcher.wait_joined("web", 2);
    let clients: Vec<Client> = (0..4).map(|_| Client::connect(address).unwrap()).collect();
    let output = run(&dispatcher, &["drain", "--all", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&answer["host"]["state"], &answer["host"]["connections"]),
        (&"draining".into(), &4.into())
    );
    assert_eq!(answer["workers"][0]["state"], "draining");
    wait_answer(agent, "drain");
    let (code, body) = http_get(&dispatcher.admin(), "/readyz").unwrap();
    assert!(code == 503 && body.contains("the host is draining"), "{code} {body}");
    wait_until("advice to name it as draining", || {
        let advised = http_get(&dispatcher.admin(), "/v1/pools/web/advice").unwrap().1;
        advised.contains("\"state\":\"draining\"")
    });
    let shown = text(&run(&dispatcher, &["status"]).stdout);
    assert!(shown.contains("host: draining, 4 connections"), "{shown}");
    assert!(shown.contains(&format!("agent of web at {agent}: drain")), "{shown}");
    assert_eq!(dispatcher.metric("dispatcher_host_state"), 1.0);
    // A reload changes nothing about it, and neither does a worker that joins.
    reload(&dispatcher, &format!("advice_listen = \"127.0.0.1:0\"\n{}", with_agent("history = 5")));
    let _late = staying(&dispatcher, "late");
    dispatcher.wait_status("the late worker to drain", |status| {
        worker(status, "late").is_some_and(|worker| worker.state == "draining")
    });
    assert_eq!(ask(agent).unwrap(), "drain");
    // Only the whole host returns.
    for target in [&["resume", "web/w0"][..], &["resume", "--pool", "web"]] {
        let refused = run(&dispatcher, target);
        assert_eq!(refused.status.code(), Some(65), "{refused:?}");
        let said = text(&refused.stderr);
        assert!(said.contains("the whole host drains") && said.contains("resume --all"), "{said}");
    }
    let mut waiting = start(&dispatcher, &["drain", "--all", "--wait"]);
    let tired = run(&dispatcher, &["drain", "--all", "--wait", "--timeout", "300ms"]);
    assert_eq!(tired.status.code(), Some(75));
    assert!(text(&tired.stderr).contains("4 connections left on this host after 300ms"));
    assert!(waiting.try_wait().unwrap().is_none());
    clients.into_iter().for_each(Client::finish);
    let output = waiting.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let status = dispatcher.status();
    assert_eq!(status.draining.unwrap().state, "drained");
    let output = run(&dispatcher, &["resume", "--all"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    wait_answer(agent, "ready up 100% maxconn:30000");
    assert_eq!(dispatcher.status().draining, None);
    Client::connect(address).unwrap().finish();
    wait_for_log(&dispatcher, "event=host_draining live=4 after=");
    wait_for_log(&dispatcher, "event=host_resumed");
}

#[test]
fn an_announced_drain_serves_clients_that_still_come() {
    let dispatcher = Dispatcher::start(&with_agent(""));
    let address = dispatcher.address("web");
    let agent = agent_of(&dispatcher, "web");
    let _worker = staying(&dispatcher, "w0");
    dispatcher.wait_joined("web", 1);
    let output = run(&dispatcher, &["drain", "--all", "--announce", "10m"]);
    assert!(
        text(&output.stdout).contains("host: announced, 0 connections, begins in 10m"),
        "{output:?}"
    );
    wait_answer(agent, "drain");
    Client::connect(address).unwrap().finish();
    assert_eq!(dispatcher.status().draining.unwrap().state, "announced");
    // Now it begins at once; a wait notices that the host is resumed.
    let waiting = start(&dispatcher, &["drain", "--all", "--announce", "10m", "--wait"]);
    let begun = run(&dispatcher, &["drain", "--all"]);
    assert!(text(&begun.stdout).contains("host: drained, 0 connections"), "{begun:?}");
    let output = waiting.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(run(&dispatcher, &["resume", "--all"]).status.success());
    let mut client = Client::connect(address).unwrap();
    client.echo("served");
    let waiting = start(&dispatcher, &["drain", "--all", "--wait"]);
    dispatcher.wait_status("the drain", |status| status.draining.is_some());
    assert!(run(&dispatcher, &["resume", "--all"]).status.success());
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(65), "{output:?}");
    assert!(text(&output.stderr).contains("the host was resumed meanwhile"));
}

#[test]
fn the_deadline_ends_connections_and_the_end_of_the_dispatcher_the_wait() {
    let mut dispatcher = Dispatcher::start(&with_agent(""));
    let address = dispatcher.address("web");
    let _worker = staying(&dispatcher, "w0");
    dispatcher.wait_joined("web", 1);
    let _client = Client::connect(address).unwrap();
    let output = run(&dispatcher, &["drain", "--all", "--deadline", "200ms", "--wait"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(dispatcher.status().ended_at_deadline, 1);
    assert!(run(&dispatcher, &["resume", "--all"]).status.success());
    let _client = Client::connect(address).unwrap();
    let waiting = start(&dispatcher, &["drain", "--all", "--wait"]);
    dispatcher.wait_status("the drain", |status| status.draining.is_some());
    dispatcher.process.kill();
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(69), "{output:?}");
    assert!(text(&output.stderr).contains("the dispatcher has ended before"), "{output:?}");
}

#[test]
fn announce_is_for_the_whole_host() {
    let dispatcher = Dispatcher::start(&with_agent(""));
    let refused = run(&dispatcher, &["drain", "--pool", "web", "--announce", "5s"]);
    assert_eq!(refused.status.code(), Some(64), "{refused:?}");
    assert!(text(&refused.stderr).contains("--all"), "{refused:?}");
    assert_eq!(dispatcher.status().draining, None);
}

/// Processes of a pool leave when they are drained and empty; none takes their place meanwhile.
#[test]
fn spawned_workers_are_not_replaced_while_the_host_drains() {
    let program = example("test-worker");
    let keys = format!(
        "[pool.web.spawn]\ncommand = [{:?}, \"tokio\"]\nprocesses = 2\n",
        program.to_str().unwrap()
    );
    let dispatcher = Dispatcher::start(&with_agent(&keys));
    let agent = agent_of(&dispatcher, "web");
    dispatcher.wait_joined("web", 2);
    wait_answer(agent, "ready up 100% maxconn:20000");
    let output = run(&dispatcher, &["drain", "--all", "--wait"]);
    assert!(output.status.success(), "{output:?}");
    // They end by themselves: the pool would start them again.
    dispatcher.wait_status("the processes to end", |status| pool(status, "web").workers.is_empty());
    let refused = run(&dispatcher, &["restart", "web"]);
    assert!(text(&refused.stderr).contains("the whole host drains"), "{refused:?}");
    let before = dispatcher.status();
    let joined = pool(&before, "web").joined;
    // Time for several restarts: the delay begins with 100 ms.
    let status = dispatcher
        .wait_status("time to pass", |status| status.uptime_seconds >= before.uptime_seconds + 3);
    assert_eq!((pool(&status, "web").joined, pool(&status, "web").workers.len()), (joined, 0));
    assert_eq!(ask(agent).unwrap(), "drain");
    assert!(run(&dispatcher, &["resume", "--all"]).status.success());
    dispatcher.wait_joined("web", 2);
    wait_answer(agent, "ready up 100% maxconn:20000");
}
