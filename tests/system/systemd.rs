//! The shipped units under a real systemd: activation, readiness, restarts without an effect on
//! clients, failures.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod accounts;
mod deploying;
mod many;
mod readme;
mod rolls;
mod units;

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};

use test_support::reloading::served_by;
use test_support::systemd::{CONFIG, Machine};
use test_support::*;

const SERVICE: &str = "dispatcher.service";

/// The unit for pools that the kernel balances.
const STEER: &str = "dispatcher-steer.service";
const SOCKETS: [&str; 2] = ["dispatcher.socket", "dispatcher-dispatch.socket"];

/// A booted machine with listening sockets and no dispatcher yet.
fn listening() -> Option<Machine> {
    let machine = Machine::boot()?;
    machine.order(&["start", SOCKETS[0], SOCKETS[1]]);
    assert_eq!(machine.state(SERVICE), "inactive");
    Some(machine)
}

/// The same with a dispatcher and two workers.
fn serving() -> Option<Machine> {
    let machine = listening()?;
    machine.order(&["start", SERVICE]);
    machine.workers(&["w0", "w1"]);
    Some(machine)
}

fn clients(machine: &Machine, count: usize) -> Vec<Client> {
    (0..count).map(|_| Client::connect(machine.address).unwrap()).collect()
}

/// It may run again already.
fn wait_for_its_end(machine: &Machine) {
    wait_until("the end of the dispatcher", || {
        machine.state(SERVICE) != "active" || machine.show(SERVICE, "NRestarts") != "0"
    });
}

/// The clients' connections go on, and the dispatcher counts all of them.
fn assert_held(machine: &Machine, held: &mut [Client]) {
    held.iter_mut().for_each(|client| client.echo("still here"));
    let status = machine.wait_joined(2);
    assert_eq!(loads(&status, "web"), (vec![held.len() as u64 / 2; 2], 0));
}

#[test]
fn the_units_are_valid() {
    let Some(machine) = Machine::boot() else {
        return;
    };
    let mut arguments = vec!["verify", "--man=no", SERVICE, "dispatcher-workers.service", STEER];
    arguments.extend(SOCKETS);
    let output = machine.run("systemd-analyze", &arguments);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && complaints.is_empty(), "{complaints}");
}

/// As an ordinary user that every machine has, because the one of the unit is made by `useradd`.
#[test]
fn the_unit_for_steering_has_two_capabilities_and_a_place_for_pins() {
    let Some(machine) = Machine::boot() else {
        return;
    };
    let unit = std::fs::read_to_string(
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../etc").join(STEER),
    )
    .unwrap();
    let before = unit.lines().filter(|line| line.starts_with("ExecStartPre="));
    let before: Vec<String> =
        before.map(|line| line.replace("dispatcher:dispatcher", "nobody:") + "\n").collect();
    let probe = "ExecStartPre=/run/bin/dispatcher doctor --bpffs /run/dispatcher/bpf\n\
                 ExecStartPre=/bin/mkdir -m 0700 /run/dispatcher/bpf/mine\n";
    let drop_in = format!(
        "[Service]\nUser=nobody\nGroup=\nExecStartPre=\n{}{probe}\
         StandardOutput=journal\nStandardError=journal\n",
        before.concat()
    );
    machine.write_drop_in(STEER, "user", &drop_in);
    machine.configure(
        "[[listener]]\nname = \"l\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n[pool.web]\n",
    );
    machine.order(&["daemon-reload"]);
    // A file system that only some kernels have.
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    if !known.lines().any(|line| line.ends_with("\tbpf")) {
        return skip("needs bpffs");
    }
    machine.order(&["start", STEER]);
    let output = machine.run("systemctl", &["show", "-P", "MainPID", STEER]);
    let pid = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let output = machine.run("cat", &[&format!("/proc/{pid}/status")]);
    let status = String::from_utf8(output.stdout).unwrap();
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().split_whitespace().next().unwrap_or_default().to_owned()
    };
    let two = format!("{:016x}", 1_u64 << 39 | 1 << 12);
    for set in ["CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(value(set), two, "{set}");
    }
    assert_ne!(value("Uid:"), "0");
    let output = machine.run("ls", &["-ld", "/run/dispatcher/bpf/mine"]);
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("drwx------ "), "{output:?}");
}

#[test]
fn the_first_connection_starts_the_dispatcher() {
    let Some(machine) = listening() else { return };
    let first = TcpStream::connect(machine.address).unwrap();
    wait_until("the service", || machine.state(SERVICE) == "active");
    // The client connected before the dispatcher and the workers started.
    machine.workers(&["w0"]);
    let mut first = Client::greeted(first).unwrap();
    assert_eq!((first.served_by.as_str(), first.listener.as_str()), ("w0", "web"));
    first.echo("hello");
    let status = machine.status().unwrap();
    assert_eq!(status.listeners[0].address, machine.address.to_string());
    assert_eq!((status.accepted, status.taken), (1, 1));
    let log = machine.log();
    assert!(log.contains(" pool=web inherited=true"), "{log}");
    assert!(log.contains("dispatch_socket=unix:/run/dispatcher/dispatch.sock"), "{log}");
    assert!(!log.contains("event=socket_unused"), "{log}");
}

#[test]
fn the_sample_configuration_fits_the_units() {
    let Some(machine) = Machine::boot() else {
        return;
    };
    let etc = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../etc");
    let sample = std::fs::read_to_string(etc.join("dispatcher.toml")).unwrap();
    // The two edits that the comments in the socket units ask for.
    let edited = sample.replace("\"127.0.0.1:8080\"", "\"systemd:web\"").replace(
        "#dispatch_socket = \"/run/dispatcher/dispatch.sock\"",
        "dispatch_socket = \"systemd:dispatch\"",
    );
    assert_eq!(edited.matches("\"systemd:").count(), sample.matches("\"systemd:").count() + 2);
    machine.configure(&edited);
    machine.order(&["start", SOCKETS[0], SOCKETS[1], SERVICE]);
    machine.workers(&["w0"]);
    assert_eq!(clients(&machine, 1)[0].served_by, "w0");
}

#[test]
fn workers_find_a_recreated_dispatch_socket() {
    let Some(machine) = Machine::boot() else {
        return;
    };
    machine.configure(&CONFIG.replace("dispatch_socket = \"systemd:dispatch\"", ""));
    machine.order(&["start", SOCKETS[0], SERVICE]);
    machine.workers(&["w0", "w1"]);
    let mut held = clients(&machine, 20);
    machine.order(&["restart", SERVICE]);
    assert_held(&machine, &mut held);
    // Without a clean stop, the socket files remain and are replaced.
    machine.order(&["kill", "--signal=KILL", "--kill-who=main", SERVICE]);
    wait_for_its_end(&machine);
    assert_held(&machine, &mut held);
    held.extend(clients(&machine, 2));
    assert_held(&machine, &mut held);
    assert!(machine.log().contains("event=stale_socket_removed"));
}

#[test]
fn the_first_worker_starts_the_dispatcher() {
    let Some(machine) = listening() else { return };
    machine.workers(&["w0"]);
    assert_eq!(machine.state(SERVICE), "active");
}

#[test]
fn started_means_ready() {
    let Some(machine) = listening() else { return };
    machine.order(&["start", SERVICE]);
    // The status is available without waiting.
    assert!(machine.status().is_some());
    assert_eq!(machine.state(SERVICE), "active");
    assert_eq!(machine.show(SERVICE, "StatusErrno"), "0");
    machine.order(&["stop", SERVICE]);
    assert_eq!(machine.show(SERVICE, "Result"), "success");
    assert!(machine.log().contains("event=stopped"));
}

#[test]
fn a_restart_loses_no_client() {
    let Some(machine) = serving() else { return };
    let mut held = clients(&machine, 20);
    let over = AtomicBool::new(false);
    let greeted: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let mut count = 0;
                    while !over.load(Ordering::SeqCst) || count < 100 {
                        let client = Client::connect(machine.address);
                        client.expect("greeted, whenever it came").finish();
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        for _ in 0..3 {
            machine.order(&["restart", SERVICE]);
            machine.wait_joined(2);
        }
        over.store(true, Ordering::SeqCst);
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(greeted >= 800);
    wait_until("the last of them to be counted", || {
        loads(&machine.status().unwrap(), "web").0.iter().sum::<u64>() == 20
    });
    // The workers were not restarted and kept their connections.
    assert_eq!(machine.show("worker@w0.service", "NRestarts"), "0");
    held.iter_mut().for_each(|client| client.echo("still here"));
    let log = machine.log();
    assert_eq!(log.matches("event=ready").count(), 4, "{log}");
    assert_eq!(log.matches("event=stopped").count(), 3, "{log}");
}

#[test]
fn clients_of_before_are_counted_after_a_restart() {
    let Some(machine) = serving() else { return };
    let mut held = clients(&machine, 20);
    machine.order(&["restart", SERVICE]);
    assert_held(&machine, &mut held);
    held.extend(clients(&machine, 2));
    assert_held(&machine, &mut held);
    // This dispatcher knows only the connections that the workers reported.
    assert_eq!(machine.status().unwrap().accepted, 2);
}

#[test]
fn after_a_stop_a_client_starts_the_dispatcher() {
    let Some(machine) = serving() else { return };
    let held = clients(&machine, 2);
    // A worker that connects would start the dispatcher as well.
    drop(held);
    machine.order(&["stop", "worker@w0.service", "worker@w1.service", SERVICE]);
    assert_eq!(machine.state(SERVICE), "inactive");
    assert_eq!(SOCKETS.map(|unit| machine.state(unit)), ["active", "active"]);
    assert!(machine.inside("/run/dispatcher/dispatch.sock").exists());
    let client = TcpStream::connect(machine.address).unwrap();
    wait_until("the service", || machine.state(SERVICE) == "active");
    machine.workers(&["w2"]);
    assert_eq!(Client::greeted(client).unwrap().served_by, "w2");
    // Only stopping all three units keeps it down.
    machine.order(&["stop", SOCKETS[0], SOCKETS[1], SERVICE]);
    assert!(TcpStream::connect(machine.address).is_err());
    assert_eq!(machine.state(SERVICE), "inactive");
}

#[test]
fn systemd_restarts_a_killed_dispatcher() {
    let Some(machine) = serving() else { return };
    let mut held = clients(&machine, 20);
    machine.order(&["kill", "--signal=KILL", "--kill-who=main", SERVICE]);
    wait_for_its_end(&machine);
    // The clients wait in the queue of a socket that systemd holds.
    let waiting: Vec<TcpStream> = (0..200).map(|_| connect(machine.address)).collect();
    let served: Vec<Client> = waiting.into_iter().map(|s| Client::greeted(s).unwrap()).collect();
    assert_eq!(served.len(), 200);
    assert_eq!(machine.show(SERVICE, "NRestarts"), "1");
    assert_eq!(machine.state(SERVICE), "active");
    served.into_iter().for_each(Client::finish);
    wait_until("the last of them to be counted", || {
        loads(&machine.status().unwrap(), "web") == (vec![10, 10], 0)
    });
    assert_held(&machine, &mut held);
}

#[test]
fn systemctl_reload_returns_after_the_reload() {
    let Some(machine) = serving() else { return };
    let mut held = clients(&machine, 4);
    let policy = || pool(&machine.status().unwrap(), "web").policy.clone();
    let serves = || {
        wait_until("it to serve as before", || machine.state(SERVICE) == "active");
        assert_eq!(machine.show(SERVICE, "NRestarts"), "0");
    };
    machine.configure(&CONFIG.replace("[pool.web]", "[pool.web]\npolicy = \"failover\""));
    machine.order(&["reload", SERVICE]);
    // The new policy is in force without waiting.
    assert_eq!(policy(), "failover");
    serves();
    machine.configure(&CONFIG.replace("handoff_timeout", "handof_timeout"));
    let (text, reloaded) = machine.systemctl(&["reload", SERVICE]);
    assert!(!reloaded, "{text}");
    assert_eq!(policy(), "failover");
    serves();
    let log = machine.log();
    assert!(log.contains("event=reload_refused by=request"), "{log}");
    assert!(
        log.contains("\nhelp: did you mean `handoff_timeout`?"),
        "what the command said: {log}"
    );
    // systemd must be told that the reload has ended.
    machine.configure(CONFIG);
    machine.order(&["kill", "--signal=HUP", "--kill-who=main", SERVICE]);
    wait_until("the log to tell of it", || machine.log().contains("event=reloaded by=SIGHUP"));
    assert_eq!(policy(), "least-connections");
    serves();
    assert_held(&machine, &mut held);
}

#[test]
fn a_missing_systemd_socket_is_a_configuration_error() {
    let Some(machine) = listening() else { return };
    machine.configure(&CONFIG.replace("systemd:web", "systemd:wbe"));
    let (text, started) = machine.systemctl(&["start", SERVICE]);
    assert!(!started, "{text}");
    assert_eq!(machine.show(SERVICE, "ExecMainStatus"), "78");
    let log = machine.log();
    assert!(log.contains("systemd:wbe: no socket of this name; passed were: web"), "{log}");
    machine.configure(CONFIG);
    machine.order(&["start", SERVICE]);
    machine.workers(&["w0"]);
    assert_eq!(clients(&machine, 1)[0].served_by, "w0");
}

/// Waiting clients, which connect while no process accepts.
fn come(machine: &Machine, count: usize) -> Vec<TcpStream> {
    (0..count).map(|_| connect(machine.address)).collect()
}

#[test]
fn a_bad_configuration_keeps_the_sockets_open() {
    let Some(machine) = serving() else { return };
    let mut held = clients(&machine, 4);
    machine.configure("nope = 1\nhandof_timeout = \"1s\"\n");
    let (text, restarted) = machine.systemctl(&["restart", SERVICE]);
    assert!(!restarted && text.contains("failed"), "{text}");
    assert_eq!(machine.show(SERVICE, "ExecMainStatus"), "78");
    // Clients keep connecting, and each would start the dispatcher.
    let mut waiting = Vec::new();
    let restarts = || machine.show(SERVICE, "NRestarts").parse::<u32>().unwrap();
    wait_until("it to be tried again and again", || {
        waiting.extend(come(&machine, 5));
        let (_, again) = machine.systemctl(&["restart", SERVICE]);
        assert!(!again);
        machine.log().matches("unknown key `handof_timeout`").count() >= 12
    });
    let before = restarts();
    wait_until("it to be tried without being asked", || restarts() >= before + 3);
    assert_eq!(SOCKETS.map(|unit| machine.state(unit)), ["active", "active"]);
    // After the correction it starts by itself and serves all waiting clients.
    machine.configure(CONFIG);
    wait_until("it to be back", || machine.state(SERVICE) == "active");
    machine.wait_joined(2);
    waiting.into_iter().for_each(|stream| Client::greeted(stream).unwrap().finish());
    held.iter_mut().for_each(|client| client.echo("still here"));
    machine.order(&["restart", SERVICE]);
    machine.wait_joined(2);
    drop(clients(&machine, 2));
}

#[test]
fn crashes_never_stop_restarts() {
    let Some(machine) = serving() else { return };
    let mut held = clients(&machine, 4);
    // More than systemd's default limit of five starts within ten seconds.
    for crash in 1..=8 {
        machine.order(&["kill", "--signal=KILL", "--kill-who=main", SERVICE]);
        wait_until("it to be back", || {
            machine.show(SERVICE, "NRestarts") == crash.to_string()
                && machine.state(SERVICE) == "active"
        });
    }
    assert_eq!(SOCKETS.map(|unit| machine.state(unit)), ["active", "active"]);
    assert_held(&machine, &mut held);
}

#[test]
fn a_restart_ends_only_spawned_processes() {
    let Some(machine) = Machine::boot() else { return };
    machine.configure(&format!(
        "{CONFIG}\n[pool.web.spawn]\ncommand = [\"/run/bin/test-worker\", \"blocking\"]\n"
    ));
    machine.order(&["start", SOCKETS[0], SOCKETS[1], SERVICE]);
    machine.wait_joined(1);
    machine.order(&["start", "worker@own.service"]);
    let pids = |status: &dispatcher::api::status::Status| {
        ["web-1", "own"].map(|name| worker(status, name).expect("a worker").pid)
    };
    let before = pids(&machine.wait_joined(2));
    // On a busy machine a worker can be suspect for a while, and gets no client then.
    let mut held: Vec<Client> = Vec::new();
    wait_until("clients at both", || {
        held.extend(clients(&machine, 2));
        ["web-1", "own"].iter().all(|name| held.iter().any(|client| client.served_by == *name))
    });
    machine.order(&["restart", SERVICE]);
    let after = pids(&machine.wait_joined(2));
    assert!(before[0] != after[0] && before[1] == after[1], "{before:?} {after:?}");
    assert_eq!(machine.show("worker@own.service", "NRestarts"), "0");
    let (own, started): (Vec<&mut Client>, Vec<&mut Client>) =
        held.iter_mut().partition(|client| client.served_by == "own");
    assert!(!started.is_empty());
    own.into_iter().for_each(|client| client.echo("still here"));
}

#[test]
fn a_removed_listener_closes_clients_and_can_return() {
    let Some(machine) = serving() else { return };
    let mut held = clients(&machine, 4);
    let elsewhere = CONFIG.replace("systemd:web", "127.0.0.1:0");
    machine.configure(&elsewhere);
    machine.order(&["reload", SERVICE]);
    let turned_away = |machine: &Machine| {
        let mut stream = TcpStream::connect(machine.address).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
        let end = std::io::Read::read(&mut stream, &mut [0; 16]);
        assert!(matches!(end, Ok(0)), "{end:?}");
    };
    for _ in 0..3 {
        turned_away(&machine);
    }
    let status = machine.status().unwrap();
    assert_eq!(status.listeners.len(), 1);
    let kept: Vec<_> =
        status.kept_sockets.iter().map(|kept| (&*kept.name, kept.turned_away)).collect();
    assert_eq!(kept, [("web", 3)]);
    let log = machine.log();
    assert!(log.contains("event=listener_kept listener=web"), "{log}");
    assert!(log.contains("event=config_warning text=\"listener web: systemd keeps"), "{log}");
    // The same socket with another listener name.
    machine.configure(&CONFIG.replace("name = \"web\"", "name = \"again\""));
    machine.order(&["reload", SERVICE]);
    for _ in 0..4 {
        assert!(["w0", "w1"].contains(&served_by(connect(machine.address)).as_str()));
    }
    let status = machine.status().unwrap();
    assert_eq!((status.listeners[0].name.as_str(), status.kept_sockets.len()), ("again", 0));
    assert_eq!(status.listeners[0].address, machine.address.to_string());
    held.iter_mut().for_each(|client| client.echo("still here"));
}

#[test]
fn an_unused_systemd_socket_is_available_to_a_reload() {
    let Some(machine) = Machine::boot() else { return };
    machine.configure(&CONFIG.replace("systemd:web", "127.0.0.1:0"));
    machine.order(&["start", SOCKETS[0], SOCKETS[1], SERVICE]);
    machine.workers(&["w0"]);
    assert!(machine.log().contains("event=socket_unused name=web"));
    let early = TcpStream::connect(machine.address).unwrap();
    machine.configure(CONFIG);
    machine.order(&["reload", SERVICE]);
    assert_eq!(served_by(early), "w0");
    assert_eq!(served_by(connect(machine.address)), "w0");
}
