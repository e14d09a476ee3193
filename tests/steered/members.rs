//! Workers that something else starts, at addresses and in cgroups of the configuration.

use std::net::TcpStream;

use nix::sys::signal::Signal;
use test_support::{Dispatcher, Process, configure, wait_until, write_config};

use crate::cgroup::Cgroup;
use crate::place::*;

/// A keeper of connections in a cgroup below.
fn keeper(cgroup: &Cgroup, name: &str, port: u16) -> Process {
    let mut command = cgroup.command(name);
    command.args(["python3", "-c", KEEPER, "127.0.0.1", &port.to_string()]);
    Process::start(name, &mut command)
}

fn pool(more: &str) -> String {
    format!("{}[pool.web]\nmode = \"steer\"\nwait_for_worker = \"5s\"\n{more}", listener())
}

#[test]
fn members_join_when_they_listen_and_return_after_a_restart() {
    let Some(cgroup) = enter().then(Cgroup::new).flatten() else { return };
    let members = [cgroup.member("a", 9001), cgroup.member("b", 9002)].concat();
    let dispatcher = Dispatcher::start(&pool(&members));
    let waiting = std::thread::spawn(connect);
    let first = keeper(&cgroup, "a", 9001);
    let mut held = vec![waiting.join().unwrap()];
    let mut second = keeper(&cgroup, "b", 9002);
    ready(&dispatcher, 2);
    held.extend((0..19).map(|_| connect()));
    let status = wait_loads(&dispatcher, &[10, 10]);
    assert_eq!(status.pools[0].workers[0].steer.as_ref().unwrap().address, "127.0.0.1:9001");
    // The unit is restarted.
    second.signal(Signal::SIGTERM);
    second.wait();
    dispatcher.wait_status("it to be gone", |status| active(&status.pools[0]).len() == 1);
    let _again = keeper(&cgroup, "b", 9002);
    ready(&dispatcher, 2);
    held.extend((0..10).map(|_| connect()));
    wait_loads(&dispatcher, &[10, 10]);
    command(&dispatcher, &["drain", "web/a"]);
    held.extend((0..5).map(|_| connect()));
    wait_loads(&dispatcher, &[15]);
    drop((held, first));
}

/// Servers that ran before the dispatcher are found, and need not be restarted.
#[test]
fn members_that_listen_already_are_found() {
    let Some(cgroup) = enter().then(Cgroup::new).flatten() else { return };
    let (_a, b) = (keeper(&cgroup, "a", 9001), keeper(&cgroup, "b", 9002));
    for port in [9001, 9002] {
        wait_until("it to listen", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    }
    let members = [cgroup.member("a", 9001), cgroup.member("b", 9002)].concat();
    let dispatcher = Dispatcher::start(&pool(&members));
    ready(&dispatcher, 2);
    let held: Vec<TcpStream> = (0..20).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[10, 10]);
    drop(held);
    wait_loads(&dispatcher, &[0, 0]);
    drop(b);
    // The first of these finds that its listener is closed.
    (0..4).for_each(|_| drop(connect()));
    dispatcher.wait_status("its end to be seen", |status| active(&status.pools[0]).len() == 1);
    drop(connect());
    let log = dispatcher.log();
    assert!(!log.contains("worker_not_steered"), "nothing is wrong with its listener: {log}");
}

/// Reloads come while the first configuration is still carried out: members are removed, return and
/// change their places.
#[test]
fn members_of_reloads_in_a_row_are_those_of_the_last() {
    let Some(cgroup) = enter().then(Cgroup::new).flatten() else { return };
    let members = |ports: &mut dyn Iterator<Item = u16>| {
        let all: Vec<String> = ports.map(|port| cgroup.member(&format!("m{port}"), port)).collect();
        pool(&all.concat())
    };
    let all = || 9_001..9_031;
    let temp = configure(&members(&mut all()));
    let folder = temp.path();
    let dispatcher = Dispatcher::start_in(folder);
    for round in 0..8 {
        let config = match round % 4 {
            0 => members(&mut all().rev()),
            1 => members(&mut all().filter(|port| port % 2 == 0)),
            2 => members(&mut all().filter(|port| port % 3 == 0)),
            _ => members(&mut all().rev()),
        };
        write_config(folder, &config);
        assert!(test_support::http_post(&folder.join("admin.sock"), "/v1/reload", "{}"));
    }
    let servers: Vec<Process> =
        [9_005, 9_030, 9_016].map(|port| keeper(&cgroup, &format!("m{port}"), port)).into();
    let pool = ready(&dispatcher, 3);
    for worker in &pool.workers {
        let address = worker.steer.as_ref().unwrap().address.clone();
        assert_eq!(address, format!("127.0.0.1:{}", worker.name.strip_prefix('m').unwrap()));
    }
    let held: Vec<TcpStream> = (0..30).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[10; 3]);
    let log = dispatcher.log();
    assert!(!log.contains("worker_not_steered"), "{log}");
    drop((held, servers));
}

#[test]
fn a_reload_adds_and_removes_members() {
    let Some(cgroup) = enter().then(Cgroup::new).flatten() else { return };
    let names = [("a", 9001), ("b", 9002), ("c", 9003)];
    let keepers = names.map(|(name, port)| keeper(&cgroup, name, port));
    let of = |names: &[(&str, u16)]| {
        let members: Vec<String> =
            names.iter().map(|(name, port)| cgroup.member(name, *port)).collect();
        pool(&members.concat())
    };
    let folder = configure(&of(&names[..2]));
    let dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 2);
    let held: Vec<TcpStream> = (0..10).map(|_| connect()).collect();
    write_config(folder.path(), &of(&names[1..]));
    command(&dispatcher, &["reload"]);
    dispatcher.wait_status("b and c", |status| {
        let names: Vec<String> = active(&status.pools[0]).into_iter().map(|it| it.0).collect();
        names == ["b", "c"]
    });
    let more: Vec<TcpStream> = (0..5).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[5, 5]);
    // Their connections go on with a member that is gone, too.
    assert!(held.iter().all(|stream| stream.peer_addr().is_ok()));
    drop((held, more, keepers));
}

/// A member that returns to the configuration has its listener, and its connections count.
#[test]
fn a_member_that_is_removed_and_added_again_serves() {
    let Some(cgroup) = enter().then(Cgroup::new).flatten() else { return };
    let pins = bpffs();
    let names = [("a", 9001), ("b", 9002)];
    let keepers = names.map(|(name, port)| keeper(&cgroup, name, port));
    let of = |names: &[(&str, u16)]| {
        let members: Vec<String> =
            names.iter().map(|(name, port)| cgroup.member(name, *port)).collect();
        format!("steer_pins = \"{}/pins\"\n{}", pins.path().display(), pool(&members.concat()))
    };
    let folder = configure(&of(&names));
    let mut dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 2);
    let held: Vec<TcpStream> = (0..10).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[5, 5]);
    for restart in [false, true] {
        write_config(folder.path(), &of(&names[1..]));
        command(&dispatcher, &["reload"]);
        dispatcher.wait_status("only b", |status| status.pools[0].workers.len() == 1);
        if restart {
            dispatcher.process.kill();
            dispatcher = Dispatcher::start_in(folder.path());
        }
        write_config(folder.path(), &of(&names));
        command(&dispatcher, &["reload"]);
        ready(&dispatcher, 2);
        wait_loads(&dispatcher, &[5, 5]);
    }
    let more: Vec<TcpStream> = (0..10).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[10, 10]);
    drop((held, more));
    wait_loads(&dispatcher, &[0, 0]);
    assert!(!dispatcher.log().contains("steering_corrected"), "{}", dispatcher.log());
    drop(keepers);
}

/// The programs of an earlier dispatcher are attached to a cgroup. Members elsewhere would not be
/// counted by them.
#[test]
fn members_in_another_cgroup_are_counted_after_a_restart() {
    let Some(cgroup) = enter().then(Cgroup::new).flatten() else { return };
    let Some(other) = Cgroup::new() else { return };
    let pins = bpffs();
    let config = |cgroup: &Cgroup| {
        let members = [cgroup.member("a", 9001), cgroup.member("b", 9002)].concat();
        format!("steer_pins = \"{}/pins\"\n{}", pins.path().display(), pool(&members))
    };
    let folder = configure(&config(&cgroup));
    let mut dispatcher = Dispatcher::start_in(folder.path());
    let before = [("a", 9001), ("b", 9002)].map(|(name, port)| keeper(&cgroup, name, port));
    ready(&dispatcher, 2);
    dispatcher.process.kill();
    drop(before);
    let after = [("a", 9001), ("b", 9002)].map(|(name, port)| keeper(&other, name, port));
    for port in [9001, 9002] {
        wait_until("it to listen", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    }
    write_config(folder.path(), &config(&other));
    let mut dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 2);
    let held: Vec<TcpStream> = (0..10).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[5, 5]);
    // A stop detaches the programs, and leaves nothing.
    assert!(dispatcher.stop().success());
    assert!(!has_files(&pins.path().join("pins")), "no pin is left");
    drop((held, after));
}

/// A pool that is removed leaves its public address to another one.
#[test]
fn a_removed_pool_gives_its_address_up() {
    let Some(cgroup) = enter().then(Cgroup::new).flatten() else { return };
    let keepers = [("a", 9001), ("b", 9002)].map(|(name, port)| keeper(&cgroup, name, port));
    let folder = configure(&pool(&cgroup.member("a", 9001)));
    let dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 1);
    let held = connect();
    let other = pool(&cgroup.member("b", 9002)).replace("web]", "next]").replace("web.", "next.");
    let other = other.replace("pool = \"web\"", "pool = \"next\"");
    write_config(folder.path(), &other);
    command(&dispatcher, &["reload"]);
    dispatcher.wait_status("the other pool", |status| {
        let next = status.pools.iter().find(|pool| pool.name == "next");
        next.is_some_and(|pool| active(pool).len() == 1)
            && !status.pools.iter().any(|pool| pool.name == "web")
    });
    let more: Vec<TcpStream> = (0..5).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[5]);
    drop((held, more, keepers));
}

/// The policies of the kernel, by name.
#[test]
fn policies_apply() {
    let Some(cgroup) = enter().then(Cgroup::new).flatten() else { return };
    let keepers = [("a", 9001), ("b", 9002)].map(|(name, port)| keeper(&cgroup, name, port));
    let members = [
        cgroup.member("a", 9001),
        "priority = 2\n".to_owned(),
        cgroup.member("b", 9002),
        "weight = 3\npriority = 1\n".to_owned(),
    ]
    .concat();
    let of = |policy: &str| pool(&format!("policy = \"{policy}\"\n{members}"));
    let folder = configure(&of("failover"));
    let dispatcher = Dispatcher::start_in(folder.path());
    ready(&dispatcher, 2);
    let held: Vec<TcpStream> = (0..8).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[8, 0]);
    write_config(folder.path(), &of("hash"));
    command(&dispatcher, &["reload"]);
    drop(held);
    wait_loads(&dispatcher, &[0, 0]);
    let held: Vec<TcpStream> = (0..8).map(|_| connect()).collect();
    let one = dispatcher.wait_status("all at one worker", |status| {
        active(&status.pools[0]).iter().any(|(_, load)| *load == 8)
    });
    assert_eq!(one.pools[0].policy, "hash");
    drop(held);
    wait_loads(&dispatcher, &[0, 0]);
    write_config(folder.path(), &of("least-connections"));
    command(&dispatcher, &["reload"]);
    let held: Vec<TcpStream> = (0..40).map(|_| connect()).collect();
    wait_loads(&dispatcher, &[10, 30]);
    drop((held, keepers));
}
