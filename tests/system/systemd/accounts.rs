//! A service that is not root and starts workers as another user, with the capabilities that
//! docs/PROCESSES.md names.

use super::*;

fn config() -> String {
    format!(
        "{CONFIG}\n[pool.web.spawn]\ncommand = [\"/run/bin/test-worker\", \"blocking\"]\n\
         user = \"daemon\"\ngroup = \"daemon\"\numask = \"0027\"\n"
    )
}

/// The lines of the page for the unit, with the user of the test.
fn of_the_page() -> String {
    let page = include_str!("../../../docs/PROCESSES.md");
    let block = page.split("```ini\n").nth(1).unwrap().split("```").next().unwrap();
    assert!(block.contains("AmbientCapabilities=CAP_SETUID CAP_SETGID CAP_KILL"), "{block}");
    block.replace("User=dispatcher", "User=nobody")
}

#[test]
fn a_service_without_root_starts_workers_as_another_user() {
    let Some(machine) = Machine::boot() else { return };
    machine.configure(&config());
    machine.write_drop_in(SERVICE, "user", "[Service]\nUser=nobody\n");
    machine.order(&["daemon-reload"]);
    machine.order(&["start", SOCKETS[0], SOCKETS[1]]);
    assert!(!machine.systemctl(&["start", SERVICE]).1);
    let log = machine.log();
    assert!(log.contains("without CAP_SETUID, CAP_SETGID, CAP_KILL"), "{log}");

    machine.write_drop_in(SERVICE, "user", &of_the_page());
    machine.order(&["daemon-reload"]);
    machine.order(&["restart", SERVICE]);
    let status = machine.wait_joined(1);
    let pid = worker(&status, "web-1").unwrap().pid;
    let text = std::fs::read_to_string(machine.inside(&format!("/proc/{pid}/status"))).unwrap();
    let field = |name: &str| -> Vec<&str> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().split_whitespace().collect()
    };
    let (uid, gid) = {
        let daemon = nix::unistd::User::from_name("daemon").unwrap().unwrap();
        (daemon.uid.to_string(), daemon.gid.to_string())
    };
    assert_eq!(field("Uid:"), [&*uid; 4]);
    assert_eq!(field("Gid:"), [&*gid; 4]);
    assert_eq!(field("Umask:"), ["0027"]);
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    drop(clients(&machine, 2));
    machine.order(&["stop", SOCKETS[0], SOCKETS[1], SERVICE]);
    assert_eq!(machine.show(SERVICE, "Result"), "success");
    assert!(!machine.inside(&format!("/proc/{pid}")).exists(), "the stop left it");
    let log = machine.log();
    assert!(
        !log.contains("event=signal_failed") && !log.contains("event=processes_killed"),
        "{log}"
    );
}
