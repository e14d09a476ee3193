//! Machines that cannot steer, reloads, take-overs, and servers that do something else than
//! expected.

use std::net::TcpStream;
use std::process::Command;

use test_support::{Dispatcher, configure, dispatcher_bin, wait_until, write_config};

use crate::place::*;

/// Runs a program as root without capabilities for the kernel's programs.
pub fn without_capabilities() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-bpf,-net_admin,-sys_admin", "--inh-caps=-all"]);
    command.arg(dispatcher_bin());
    command
}

#[test]
fn without_capabilities_the_start_says_what_is_missing() {
    if !enter() || !has(&["setpriv"]) {
        return;
    }
    let folder = configure(&keepers(1, ""));
    let config = folder.path().join("dispatcher.toml");
    let out = without_capabilities().args(["run", "--config"]).arg(&config).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(69), "{text}");
    for part in
        ["pool web", "CAP_BPF is missing", "CAP_NET_ADMIN is missing", "AmbientCapabilities"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// With `fallback` the workers of the SDK are passed their connections.
#[test]
fn without_capabilities_a_pool_with_fallback_is_passed() {
    if !enter() || !has(&["setpriv"]) {
        return;
    }
    let echo = test_support::example("echo");
    let command = [echo.to_str().unwrap()];
    let config = keepers(2, "fallback = \"pass\"\n");
    let config = config.split("[pool.web.spawn]").next().unwrap().to_owned();
    let folder = configure(&format!("{config}{}", spawn(2, &command)));
    let dispatcher = Dispatcher::start_as(folder.path(), &mut without_capabilities());
    let status =
        dispatcher.wait_status("the workers to join", |status| status.pools[0].workers.len() == 2);
    assert!(status.pools[0].steer.is_none());
    assert!(status.faults.iter().any(|fault| fault.kind == "steering"), "{:?}", status.faults);
    drop(TcpStream::connect(PUBLIC).unwrap());
    dispatcher.wait_status("the connection to be taken", |status| status.taken == 1);
}

/// A reload adds a steered pool, and removes it.
#[test]
fn a_reload_adds_a_steered_pool() {
    if !enter() {
        return;
    }
    let passed = "[[listener]]\nname = \"l\"\naddress = \"127.0.0.1:0\"\npool = \"p\"\n[pool.p]\n";
    let folder = configure(passed);
    let dispatcher = Dispatcher::start_in(folder.path());
    write_config(folder.path(), &format!("{passed}{}", keepers(2, "")));
    command(&dispatcher, &["reload"]);
    dispatcher.wait_status("the pool to serve", |status| {
        status.pools.iter().any(|pool| pool.name == "web" && active(pool).len() == 2)
    });
    let held: Vec<TcpStream> = (0..10).map(|_| connect()).collect();
    let status = dispatcher.wait_status("five each", |status| {
        status.pools.iter().any(|pool| active(pool).iter().all(|(_, load)| *load == 5))
    });
    let workers: Vec<i32> = status.pools.iter().flat_map(processes_of).collect();
    write_config(folder.path(), passed);
    command(&dispatcher, &["reload"]);
    assert!(TcpStream::connect(PUBLIC).is_err(), "no server listens there");
    drop(held);
    dispatcher.wait_status("the pool to be gone", |status| {
        !status.pools.iter().any(|pool| pool.name == "web")
    });
    wait_until("its processes to end", || workers.iter().all(|&pid| !is_alive(pid)));
}

/// A server that ends at once, one that is not found, and one that listens elsewhere.
#[test]
fn servers_that_fail_are_started_again_and_named() {
    if !enter() {
        return;
    }
    let elsewhere = KEEPER.replace("int(sys.argv[2])", "1 + int(sys.argv[2])");
    for (command, sign) in [
        (vec!["sh", "-c", "exit 3"], "exit status 3"),
        (vec!["/no/such/program"], "/no/such/program"),
        (vec!["python3", "-c", &elsewhere], "start_timeout"),
    ] {
        let config = format!(
            "{}[pool.web]\nmode = \"steer\"\nwait_for_worker = \"0s\"\n{}start_timeout = \"1s\"\n",
            listener(),
            spawn(1, &command)
        );
        let dispatcher = Dispatcher::start(&config);
        dispatcher.wait_status("a second start", |status| {
            status.pools[0].processes.as_ref().is_some_and(|it| it.restarts > 0)
        });
        let status = dispatcher.status();
        let faults: Vec<&str> = status.faults.iter().map(|fault| fault.text.as_str()).collect();
        assert!(
            faults.iter().any(|text| text.contains(sign)) || dispatcher.log().contains(sign),
            "{sign}: {faults:?}\n{}",
            dispatcher.log()
        );
        wait_until("a client to be refused", || try_connect().is_err());
    }
}

/// A MPTCP listener cannot be steered: the status says so, and what to do.
#[test]
fn an_mptcp_listener_is_named_with_the_remedy() {
    if !enter() {
        return;
    }
    let mptcp = "import socket, sys, time\n\
                 listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)\n\
                 listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
                 listener.bind((sys.argv[1], int(sys.argv[2])))\n\
                 listener.listen()\n\
                 time.sleep(1000)\n";
    let config = format!(
        "{}[pool.web]\nmode = \"steer\"\nwait_for_worker = \"0s\"\n{}",
        listener(),
        spawn(1, &["python3", "-c", mptcp])
    );
    let dispatcher = Dispatcher::start(&config);
    let status = dispatcher.wait_status("the problem to be seen", |status| {
        status.faults.iter().any(|fault| fault.kind == "steering")
    });
    let fault = status.faults.iter().find(|fault| fault.kind == "steering").unwrap();
    assert!(fault.text.contains("MPTCP") && fault.text.contains("GODEBUG"), "{}", fault.text);
}

/// Another dispatcher takes over: clients notice nothing, counts go on.
#[test]
fn a_take_over_keeps_processes_and_counts() {
    if !enter() {
        return;
    }
    for pool in [keepers(2, ""), crate::shared::heirs(2, "")] {
        takes_over(&pool);
    }
}

/// Two processes of `pool` stay while one dispatcher takes over from another.
fn takes_over(pool: &str) {
    let (_pins, folder) = outliving(pool);
    let mut former = Dispatcher::start_in(folder.path());
    let processes = processes_of(&ready(&former, 2));
    let mut held: Vec<TcpStream> = (0..10).map(|_| connect()).collect();
    wait_loads(&former, &[5, 5]);
    let log = std::fs::File::create(folder.path().join("next.log")).unwrap();
    let mut next = Command::new(dispatcher_bin());
    next.args(["run", "--take-over", "--config"]).arg(folder.path().join("dispatcher.toml"));
    next.env_remove("NOTIFY_SOCKET").stderr(log);
    let pid = former.process.pid();
    let process = test_support::Process::start("next", &mut next);
    former.process.wait();
    former.process = process;
    let next = former;
    next.wait_status("the next one to serve", |status| status.pid.cast_signed() != pid);
    let pool = ready(&next, 2);
    assert!(processes_of(&pool).iter().all(|pid| processes.contains(pid)));
    held.extend((0..10).map(|_| connect()));
    wait_loads(&next, &[10, 10]);
    command(&next, &["drain", "web/web-1"]);
    held.extend((0..4).map(|_| connect()));
    wait_loads(&next, &[14]);
    drop(held);
}

/// Two pools share a port, one for each family: the one without workers keeps no client of the
/// other.
#[test]
fn an_ipv6_only_listener_leaves_ipv4_to_another_pool() {
    if !enter() {
        return;
    }
    let four = keepers(2, "").replace("127.0.0.1:8000", "0.0.0.0:8000");
    let six = "[[listener]]\nname = \"six\"\naddress = \"[::]:8000\"\nipv6_only = true\n\
               pool = \"six\"\n[pool.six]\nmode = \"steer\"\nwait_for_worker = \"60s\"\n\
               [pool.six.spawn]\ncommand = [\"sh\", \"-c\", \"sleep 1000\", \"{port}\"]\n";
    // The last program decides, so both orders are tried.
    for config in [format!("{four}{six}"), format!("{six}{four}")] {
        let dispatcher = Dispatcher::start(&config);
        dispatcher.wait_status("the workers to listen", |status| {
            status.pools.iter().any(|pool| pool.name == "web" && active(pool).len() == 2)
        });
        let held: Vec<TcpStream> = (0..10).map(|_| connect()).collect();
        dispatcher.wait_status("five each", |status| {
            let web = status.pools.iter().find(|pool| pool.name == "web");
            web.is_some_and(|pool| active(pool).iter().all(|(_, load)| *load == 5))
        });
        drop(held);
    }
}
