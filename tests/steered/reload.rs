//! What a reload changes in a steered pool, and what it cannot change.

use nix::sched::{CloneFlags, unshare};
use test_support::{Dispatcher, configure, write_config};

use crate::place::*;

/// The answer to `dispatcher reload`.
fn reload(dispatcher: &Dispatcher) -> serde_json::Value {
    serde_json::from_str(&command(dispatcher, &["reload", "--json"])).unwrap()
}

#[test]
fn the_mode_of_a_pool_needs_a_restart() {
    if !enter() {
        return;
    }
    let any = "family=socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, \
               dualstack_ipv6=':' in sys.argv[1]";
    let program = KEEPER.replace("backlog=4096", any);
    let pool = "[pool.web]\nmode = \"steer\"\nwait_for_worker = \"2s\"\n";
    let text = format!("{}{pool}{}", listener(), spawn(2, &["python3", "-c", &program]));
    let temp = configure(&text);
    let dispatcher = Dispatcher::start_in(temp.path());
    let processes = processes_of(&ready(&dispatcher, 2));
    write_config(temp.path(), &format!("{}[pool.web]\n", listener()));
    let answer = reload(&dispatcher);
    assert_eq!(answer["needs_restart"], serde_json::json!(["mode of pool web"]), "{answer}");
    assert_eq!(processes_of(&dispatcher.status().pools[0]), processes);
    connect();
    // Clients of the other family need processes that listen for them.
    let more = "[[listener]]\nname = \"six\"\naddress = \"[::1]:8000\"\npool = \"web\"\n";
    write_config(temp.path(), &format!("{more}{text}"));
    let answer = reload(&dispatcher);
    assert_eq!(answer["outdated_pools"], serde_json::json!(["web"]), "{answer}");
    command(&dispatcher, &["restart", "web", "--wait"]);
    let stream = std::net::TcpStream::connect("[::1]:8000");
    assert!(stream.is_ok(), "{stream:?}");
    connect();
}

/// Where the kernel cannot choose, the pool is passed, and follows other changes.
#[test]
fn a_pool_that_fell_back_follows_reloads() {
    if !enter() {
        return;
    }
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    run(&["mount", "--make-rprivate", "/"]);
    run(&["umount", "--lazy", "--all", "--types", "cgroup2"]);
    let pool = |more: &str| {
        let pool = "[pool.web]\nmode = \"steer\"\nfallback = \"pass\"\n";
        let member = "[[pool.web.member]]\naddress = \"127.0.0.1:9000\"\ncgroup = \"/a/b\"\n";
        format!("{}{pool}{more}\n{member}", listener())
    };
    let temp = configure(&pool(""));
    let dispatcher = Dispatcher::start_in(temp.path());
    assert!(dispatcher.log().contains("event=steering_not_possible pool=web"));
    assert!(dispatcher.status().pools[0].steer.is_none());
    write_config(temp.path(), &pool("policy = \"hash\""));
    let answer = reload(&dispatcher);
    assert_eq!(answer["needs_restart"], serde_json::json!(["mode of pool web"]), "{answer}");
    assert_eq!(answer["changed"], serde_json::json!(["pool web"]), "{answer}");
    let _workers = dispatcher.workers("tokio", "web", 1);
    let status = dispatcher.wait_status("the worker", |status| !status.pools[0].workers.is_empty());
    assert_eq!(status.pools[0].policy, "hash");
}
