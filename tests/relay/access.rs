//! Who may enter which namespace.

use std::time::Duration;

use worker_sdk::relay::{Error, Outcome, Relay};

use super::{Directory, id};

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
