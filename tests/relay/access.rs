//! Who may enter which namespace.

use std::time::Duration;

use worker_sdk::relay::{Error, Outcome, Relay};

use super::{Directory, id};

/// The way of a ticket: from the dispatcher's configuration into a worker, and to the directory.
#[test]
fn the_dispatcher_gives_its_workers_tickets() {
    let directory = Directory::start(
        "host = \"one\"\nticket_key = \"DIR/relay.key\"\n[namespaces.chat]\npools = [\"web\"]\n",
    );
    let key = directory.path().join("relay.key");
    let dispatcher = test_support::Dispatcher::start(&format!(
        "relay_ticket_key = \"{}\"\n[[listener]]\nname = \"http\"\naddress = \"127.0.0.1:0\"\n\
         pool = \"web\"\n[pool.web]\n",
        key.display()
    ));
    let config = worker_sdk::WorkerConfig::new().dispatch_socket(dispatcher.dispatch());
    let worker = worker_sdk::Worker::connect(config.pool("web").name("web-1")).unwrap();
    let ticket = worker.relay_ticket();
    assert!(ticket.is_some());
    let config = directory.config().namespace("chat").name("web-1").ticket(ticket);
    let relay = Relay::connect(config).wait().unwrap();
    let _alice = relay.register(&id("alice")).wait().unwrap();
    let _room = relay.join(&id("room"));
    test_support::wait_until("the group to be there", || {
        relay.groups(b"").wait().unwrap().len() == 1
    });

    let ask = |arguments: &[&str]| {
        let mut command = std::process::Command::new(test_support::dispatcher_bin());
        command.arg("relay").args(arguments);
        command.arg("--socket").arg(directory.socket()).args(["--namespace", "chat"]);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    assert_eq!(ask(&["who", "alice"]), (Some(0), "alice web-1 one\n".to_owned()));
    assert_eq!(ask(&["who"]), (Some(0), "alice web-1 one\n".to_owned()));
    assert_eq!(ask(&["who", "bob"]).0, Some(66));
    assert_eq!(ask(&["groups"]), (Some(0), "room 1\n".to_owned()));
    let (code, text) = ask(&["stats", "--json"]);
    let numbers: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &numbers["ids"], &numbers["groups"]), (Some(0), &1.into(), &1.into()));
    assert!(ask(&["stats", "--openmetrics"]).1.contains("dispatch_relay_registered_total 1\n"));
    drop(worker);
}

#[test]
fn a_ticket_of_the_pool_opens_the_namespace_and_no_other() {
    let directory = Directory::start(
        "ticket_key = \"DIR/relay.key\"\ngrace = \"0s\"\n\
         [namespaces.chat]\npools = [\"web\"]\n[namespaces.jobs]\npools = [\"api\"]\n\
         [namespaces.others]\nusers = [4000000000]\n",
    );
    let key = dispatch_directory::ticket_key::open(&directory.path().join("relay.key")).unwrap();
    let user = rustix::process::geteuid().as_raw();
    let enter = |namespace: &str, ticket: Option<Vec<u8>>| {
        let config = directory.config().namespace(namespace).ticket(ticket);
        Relay::connect(config.join_timeout(Duration::from_secs(30))).wait()
    };
    let refused = |namespace: &str, ticket| match enter(namespace, ticket) {
        Err(Error::Refused(reason)) => reason,
        other => panic!("{other:?}"),
    };
    let web = key.issue("web", user);
    let chat = enter("chat", Some(web.clone())).unwrap();
    assert!(refused("chat", None).contains("relay_ticket_key"));
    assert!(refused("jobs", Some(web.clone())).contains("namespaces.jobs.pools"));
    assert!(refused("chat", Some(key.issue("web", user + 1))).contains("not valid"));
    assert!(refused("others", None).contains("namespaces.others.users"));
    assert!(refused("none", None).contains("[namespaces.none]"));

    // The same id in two namespaces is two ids.
    let jobs = enter("jobs", Some(key.issue("api", user))).unwrap();
    let _alice = chat.register(&id("alice")).wait().unwrap();
    assert_eq!(jobs.send(&id("alice"), "").wait(), Outcome::NotFound);
    assert!(jobs.online(0).wait().unwrap().places.is_empty());
}
