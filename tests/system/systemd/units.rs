//! The two units: what each promises, the check whether a configuration works in a unit, and the
//! watchdog.

use super::*;

pub(super) const WORKERS: &str = "dispatcher-workers.service";

/// A pool with two processes that do this when the dispatcher is lost.
pub(super) fn spawning(action: &str) -> String {
    format!(
        "{CONFIG}\n[pool.web.spawn]\ncommand = [\"/run/bin/test-worker\", \"blocking\"]\n\
         processes = 2\non_dispatcher_loss = \"{action}\"\n"
    )
}

/// A machine whose sockets start this unit.
pub(super) fn machine_with(unit: &str, config: &str) -> Option<Machine> {
    let machine = Machine::boot()?;
    machine.configure(config);
    if unit == WORKERS {
        machine.sockets_start(WORKERS);
    }
    machine.order(&["start", SOCKETS[0], SOCKETS[1]]);
    Some(machine)
}

pub(super) fn pids(machine: &Machine) -> Vec<i32> {
    let status = machine.wait_joined(2);
    pool(&status, "web").workers.iter().map(|worker| worker.pid).collect()
}

pub(super) fn lives(machine: &Machine, pid: i32) -> bool {
    let stat = std::fs::read_to_string(machine.inside(&format!("/proc/{pid}/stat")));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn both_units_start_and_stop_cleanly() {
    for (unit, action) in [(SERVICE, "drain"), (SERVICE, "stop"), (WORKERS, "serve")] {
        let Some(machine) = machine_with(unit, &spawning(action)) else { return };
        for _ in 0..2 {
            machine.order(&["start", unit]);
            let pids = pids(&machine);
            let mut held = clients(&machine, 4);
            held.iter_mut().for_each(|client| client.echo("hello"));
            held.into_iter().for_each(Client::finish);
            machine.order(&["stop", unit]);
            assert_eq!(machine.state(unit), "inactive", "{action}");
            assert_eq!(machine.show(unit, "Result"), "success", "{action}");
            assert!(!pids.iter().any(|&pid| lives(&machine, pid)), "{action}: a process is left");
        }
        assert_eq!(machine.show(unit, "NRestarts"), "0");
    }
}

#[test]
fn only_one_of_the_units_runs() {
    for (unit, other) in [(WORKERS, SERVICE), (SERVICE, WORKERS)] {
        let Some(machine) = machine_with(unit, &spawning("drain")) else { return };
        // A client starts the unit that the sockets name.
        let client = TcpStream::connect(machine.address).unwrap();
        wait_until("the unit", || machine.state(unit) == "active");
        assert!(["web-1", "web-2"].contains(&served_by(client).as_str()));
        // The other one does not get these sockets, so it fails, but this one has ended.
        machine.systemctl(&["start", "--no-block", other]);
        wait_until("the unit to end", || machine.state(unit) == "inactive");
        machine.order(&["stop", SOCKETS[0], SOCKETS[1], other]);
    }
}

#[test]
fn a_crash_in_the_unit_with_workers_ends_no_connection() {
    let Some(machine) = machine_with(WORKERS, &spawning("serve")) else { return };
    machine.order(&["start", WORKERS]);
    let mut before = pids(&machine);
    before.sort();
    let mut held = clients(&machine, 4);
    for crash in 1..=3 {
        machine.order(&["kill", "--signal=KILL", "--kill-who=main", WORKERS]);
        wait_until("it to be back", || {
            machine.show(WORKERS, "NRestarts") == crash.to_string()
                && machine.state(WORKERS) == "active"
        });
        held.iter_mut().for_each(|client| client.echo("still here"));
        // The same processes, in their places again.
        let mut now = pids(&machine);
        now.sort();
        assert_eq!(now, before);
    }
    drop(clients(&machine, 2));
    held.into_iter().for_each(Client::finish);
    machine.order(&["stop", SOCKETS[0], SOCKETS[1], WORKERS]);
    assert!(!before.iter().any(|&pid| lives(&machine, pid)));
}

#[test]
fn a_restart_in_the_unit_with_workers_ends_no_worker() {
    let Some(machine) = machine_with(WORKERS, &spawning("serve")) else { return };
    machine.order(&["start", WORKERS]);
    let sorted = |mut pids: Vec<i32>| {
        pids.sort();
        pids
    };
    let before = sorted(pids(&machine));
    let mut held = clients(&machine, 4);
    for _ in 0..3 {
        machine.order(&["restart", WORKERS]);
        assert_eq!(sorted(pids(&machine)), before);
        held.iter_mut().for_each(|client| client.echo("still here"));
        held.extend(clients(&machine, 2));
    }
    assert_eq!(machine.show(WORKERS, "NRestarts"), "0");
    // A stop ends them.
    held.into_iter().for_each(Client::finish);
    machine.order(&["stop", SOCKETS[0], SOCKETS[1], WORKERS]);
    assert!(!before.iter().any(|&pid| lives(&machine, pid)));
}

#[test]
fn a_stop_during_a_restart_ends_the_workers() {
    // Workers that take nothing keep the restart waiting for stop_timeout.
    let never = "environment = { TEST_WORKER = \"never-take\" }\n";
    let config = format!("stop_timeout = \"3s\"\n{}{never}", spawning("serve"));
    let Some(machine) = machine_with(WORKERS, &config) else { return };
    machine.order(&["start", WORKERS]);
    let before = pids(&machine);
    let waiting: Vec<TcpStream> = (0..4).map(|_| connect(machine.address)).collect();
    wait_until("connections in flight", || {
        machine.status().is_some_and(|status| status.in_flight > 0)
    });
    machine.order(&["restart", "--no-block", WORKERS]);
    wait_until("the stop to begin", || machine.log().contains("leaves_processes=true"));
    machine.order(&["stop", "--no-block", SOCKETS[0], SOCKETS[1], WORKERS]);
    wait_until("the end of the unit", || machine.state(WORKERS) == "inactive");
    drop(waiting);
    assert!(!before.iter().any(|&pid| lives(&machine, pid)), "{}", machine.log());
}

/// As the head of the unit says.
#[test]
fn what_a_crash_has_left_can_be_ended() {
    let Some(machine) = machine_with(WORKERS, &spawning("serve")) else { return };
    machine.write_drop_in(WORKERS, "restart", "[Service]\nRestart=no\n");
    machine.order(&["daemon-reload"]);
    machine.order(&["start", WORKERS]);
    let pids = pids(&machine);
    machine.order(&["stop", SOCKETS[0], SOCKETS[1]]);
    machine.order(&["kill", "--signal=KILL", "--kill-who=main", WORKERS]);
    wait_until("the end of the dispatcher", || machine.state(WORKERS) == "failed");
    machine.order(&["stop", WORKERS]);
    assert!(pids.iter().all(|&pid| lives(&machine, pid)), "systemd ends none of them");
    machine.order(&["kill", "--kill-who=all", WORKERS]);
    wait_until("their end", || !pids.iter().any(|&pid| lives(&machine, pid)));
}

#[test]
fn run_refuses_to_serve_on_where_the_unit_kills_the_workers() {
    let Some(machine) = machine_with(SERVICE, &spawning("serve")) else { return };
    let (text, started) = machine.systemctl(&["start", SERVICE]);
    assert!(!started, "{text}");
    assert_eq!(machine.show(SERVICE, "ExecMainStatus"), "78");
    let log = machine.log();
    for part in [
        "/run/test/dispatcher.toml: on_dispatcher_loss = \"serve\" of [pool.web.spawn]",
        "does not work in the unit dispatcher.service: with KillMode=mixed",
        "help: run the dispatcher in dispatcher-workers.service, or set KillMode=process",
    ] {
        assert!(log.contains(part), "{part}: {log}");
    }
    // A mistake in the file is corrected, and the next attempt succeeds.
    machine.configure(&spawning("drain"));
    wait_until("it to start", || machine.state(SERVICE) == "active");
    let before = pids(&machine);
    // A reload is refused in the same way, and nothing changes.
    machine.configure(&spawning("serve").replace("processes = 2", "processes = 3"));
    let (text, reloaded) = machine.systemctl(&["reload", SERVICE]);
    assert!(!reloaded, "{text}");
    let log = machine.log();
    assert!(log.contains("event=reload_refused by=request"), "{log}");
    assert!(log.matches("does not work in the unit dispatcher.service").count() >= 2, "{log}");
    let mut now = pids(&machine);
    now.sort();
    assert_eq!(now, {
        let mut before = before;
        before.sort();
        before
    });
    // The same file works in a unit that lets the processes live.
    machine.write_drop_in(SERVICE, "kill-mode", "[Service]\nKillMode=process\n");
    machine.order(&["daemon-reload"]);
    machine.order(&["reload", SERVICE]);
    machine.wait_joined(3);
    machine.order(&["stop", SOCKETS[0], SOCKETS[1], SERVICE]);
}

#[test]
fn check_looks_at_a_unit_in_advance() {
    let Some(machine) = Machine::boot() else { return };
    machine.configure(&spawning("serve"));
    let check = |arguments: &[&str]| {
        let mut all = vec!["check", "/run/test/dispatcher.toml"];
        all.extend(arguments);
        let output = machine.run("/run/bin/dispatcher", &all);
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        (output.status.code().unwrap(), text.concat())
    };
    let (code, text) = check(&["--unit", SERVICE]);
    assert_eq!(code, 78, "{text}");
    assert!(text.contains("does not work in the unit dispatcher.service"), "{text}");
    assert!(text.contains("help: run the dispatcher in dispatcher-workers.service"), "{text}");
    let (code, text) = check(&["--unit", WORKERS]);
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("unit dispatcher-workers.service: KillMode=process; without the dispatcher its processes can serve on"),
        "{text}"
    );
    let (code, text) = check(&["--unit", "nothing.service"]);
    assert_eq!(code, 69, "{text}");
    assert!(text.contains("systemd has no unit nothing.service"), "{text}");
    let (code, text) = check(&["--unit", SERVICE, "--json"]);
    assert_eq!(code, 78, "{text}");
    let json = text.lines().take_while(|line| !line.starts_with("error")).collect::<String>();
    let json: serde_json::Value =
        serde_json::Deserializer::from_str(&json).into_iter().next().expect("JSON").unwrap();
    assert_eq!(json["ok"], false);
    let message = json["mistake"]["message"].as_str().unwrap();
    assert!(message.contains("does not work in the unit"), "{json}");
    // Without the option no unit is of interest.
    let (code, text) = check(&[]);
    assert!(code == 0 && !text.contains("unit"), "{text}");
    machine.configure(&spawning("drain"));
    let (code, text) = check(&["--unit", SERVICE]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("KillMode=mixed; without the dispatcher its processes end"), "{text}");
}

#[test]
fn the_watchdog_restarts_a_dispatcher_that_hangs() {
    let Some(machine) = Machine::boot() else { return };
    assert_ne!(machine.show(SERVICE, "WatchdogUSec"), "0");
    // It is restarted for this reason only.
    let drop_in = "[Service]\nWatchdogSec=2s\nRestart=on-watchdog\n";
    machine.write_drop_in(SERVICE, "watchdog", drop_in);
    machine.order(&["daemon-reload"]);
    machine.order(&["start", SOCKETS[0], SOCKETS[1], SERVICE]);
    machine.workers(&["w0", "w1"]);
    let mut held = clients(&machine, 4);
    // An idle hot thread is no hanging one: the messages go on.
    let last = || machine.show(SERVICE, "WatchdogTimestampMonotonic").parse::<u64>().unwrap();
    let first = last();
    wait_until("messages during several intervals", || last() > first + 7_000_000);
    assert_eq!(machine.show(SERVICE, "NRestarts"), "0");
    machine.order(&["kill", "--signal=STOP", "--kill-who=main", SERVICE]);
    wait_until("a restart", || {
        machine.show(SERVICE, "NRestarts") == "1" && machine.state(SERVICE) == "active"
    });
    assert_held(&machine, &mut held);
}
