use std::path::Path;

use test_support::systemd::Machine;
use test_support::wait_until;

use super::*;

fn service(name: &str, user: bool) -> Option<Unit> {
    Some(Unit { name: name.to_owned(), user })
}

#[test]
fn the_unit_is_the_service_in_the_cgroup() {
    for (cgroup, unit) in [
        ("0::/system.slice/dispatcher.service\n", service("dispatcher.service", false)),
        ("0::/system.slice/dispatcher.service/workers\n", service("dispatcher.service", false)),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/d.service\n",
            service("d.service", true),
        ),
        (
            "12:pids:/x\n1:name=systemd:/system.slice/d@a.service\n0::/elsewhere\n",
            service("d@a.service", false),
        ),
        (
            "0::/system.slice/system-d.slice/d@a\\x2db.service\n",
            service("d@a\\x2db.service", false),
        ),
        // A container, a session, the manager of a user.
        ("0::/\n", None),
        ("0::/user.slice/user-0.slice/session-3.scope\n", None),
        ("0::/system.slice/docker-5e.scope/system.slice\n", None),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/vte.scope\n", None),
        ("", None),
        ("nonsense", None),
    ] {
        assert_eq!(unit_of_cgroup(cgroup), unit, "{cgroup}");
    }
}

#[test]
fn only_the_process_that_systemd_started_has_a_unit() {
    let cgroup = "0::/system.slice/dispatcher.service\n";
    let with = |invocation: Option<&str>, exec: Option<&str>| {
        let variable = |name: &str| match name {
            "INVOCATION_ID" => invocation.map(str::to_owned),
            _ => exec.map(str::to_owned),
        };
        own(variable, 77, cgroup)
    };
    assert!(with(Some("abc"), Some("77")).is_some());
    // A program that a service started, and one without systemd.
    for (invocation, exec) in
        [(Some("abc"), Some("76")), (Some("abc"), None), (None, Some("77")), (Some(""), Some("77"))]
    {
        assert_eq!(with(invocation, exec), None, "{invocation:?} {exec:?}");
    }
}

#[test]
fn the_job_of_the_unit_tells_a_stop_from_a_restart() {
    let jobs = "4 other.service stop running\n5 d.service restart running\n";
    for (jobs, unit, expected) in [
        (jobs, "d.service", StopKind::Restart),
        (jobs, "other.service", StopKind::Stop),
        (jobs, "third.service", StopKind::NoJob),
        ("7 d.service start waiting\n", "d.service", StopKind::Restart),
        ("7 d.service reload running\n", "d.service", StopKind::NoJob),
        ("7 xd.service stop running\n", "d.service", StopKind::NoJob),
        ("", "d.service", StopKind::NoJob),
        ("7\n7 d.service\n", "d.service", StopKind::NoJob),
    ] {
        assert_eq!(kind(jobs, unit), expected, "{jobs} {unit}");
    }
}

/// Set in the service that the next test starts: there the test is this service.
const AS_SERVICE: &str = "TEST_ASKS_FOR_THE_KIND_OF_ITS_STOP";

/// Writes its unit to a file and then, once it is stopped, the kind of its stop.
fn asks_for_the_kind_of_its_stop() {
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM]).expect("a handler");
    let cgroup = std::fs::read_to_string("/proc/self/cgroup");
    let unit = Unit::own();
    let unit = unit.unwrap_or_else(|| panic!("not started by systemd? {cgroup:?}"));
    std::fs::write("/run/test/up", &unit.name).expect("a file");
    signals.forever().next();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let began = std::time::Instant::now();
    let kind = runtime.expect("a runtime").block_on(stop_kind(&unit));
    let took = began.elapsed().as_millis();
    std::fs::write("/run/test/kind", format!("{kind:?} {took} ms\n")).expect("a file");
}

#[test]
fn systemd_tells_a_stop_from_a_restart() {
    if std::env::var_os(AS_SERVICE).is_some() {
        return asks_for_the_kind_of_its_stop();
    }
    let Some(machine) = Machine::boot() else { return };
    let shared = machine.shared();
    let program = std::env::current_exe().expect("this test");
    let inside = Path::new("/run/test/program");
    std::fs::copy(program, shared.join("program")).expect("a copy");
    let test = "systemd_tells_a_stop_from_a_restart";
    // Its name needs the escaping of systemd.
    let name = "asks@a\\x2db.service";
    let text = format!(
        "[Unit]\nDefaultDependencies=no\n[Service]\nKillMode=mixed\n\
         Environment={AS_SERVICE}=1\n\
         StandardOutput=append:/run/test/log\nStandardError=append:/run/test/log\n\
         ExecStart={} --exact background::service_manager::unit::tests::{test}\n",
        inside.display()
    );
    std::fs::write(shared.join("units/asks@.service"), text).expect("a unit");
    let start = || {
        machine.order(&["start", name]);
        wait_until("the service", || shared.join("up").exists());
    };
    for (order, expected) in [
        (&["restart"][..], "Restart"),
        (&["try-restart"], "Restart"),
        (&["stop"], "Stop"),
        (&["kill"], "NoJob"),
    ] {
        start();
        let up = shared.join("up");
        assert_eq!(std::fs::read_to_string(&up).expect("its unit"), name);
        std::fs::remove_file(&up).expect("a file");
        let mut arguments = order.to_vec();
        arguments.push(name);
        machine.order(&arguments);
        let kind = shared.join("kind");
        wait_until("the answer", || {
            std::fs::read_to_string(&kind).is_ok_and(|text| text.ends_with('\n'))
        });
        let answer = std::fs::read_to_string(&kind).expect("an answer");
        assert!(answer.starts_with(expected), "{order:?}: {answer}");
        std::fs::remove_file(&kind).expect("a file");
        println!("{order:?}: {}", answer.trim_end());
    }
    machine.systemctl(&["kill", "--signal=KILL", name]);
}

/// A service manager that does not answer must not delay a stop for long.
#[test]
fn an_answer_that_does_not_come_is_unknown() {
    let directory = tempfile::tempdir().expect("a directory");
    let script = directory.path().join("systemctl");
    std::fs::write(&script, "#!/bin/sh\nexec sleep 1000\n").expect("a script");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).expect("executable");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let answer = runtime.expect("a runtime").block_on(async {
        let deadline = Instant::now() + Duration::from_millis(300);
        run(script.as_os_str(), false, &["list-jobs"], deadline).await
    });
    assert_eq!(answer, Err("systemctl: no answer in time".to_owned()));
}

#[test]
fn the_kill_mode_tells_whether_processes_survive() {
    let answer =
        |mode: &str, kill: &str| format!("KillMode={mode}\nSendSIGKILL={kill}\nLoadState=loaded\n");
    for (mode, kill, spares) in [
        ("process", "yes", true),
        ("none", "yes", true),
        ("mixed", "yes", false),
        ("mixed", "no", true),
        ("control-group", "yes", false),
        ("control-group", "no", false),
        ("something-new", "yes", false),
    ] {
        let ending = ending(&answer(mode, kill), "d.service").expect("an answer");
        assert_eq!(ending.spares_processes(), spares, "{ending}");
        assert!(ending.to_string().starts_with(&format!("KillMode={mode}")), "{ending}");
    }
    for (answer, says) in [
        ("LoadState=not-found\nKillMode=control-group\n", "has no unit d.service"),
        ("LoadState=bad-setting\nKillMode=mixed\n", "LoadState=bad-setting"),
        ("LoadState=loaded\n", "not a unit with processes"),
        ("", "without LoadState"),
    ] {
        let error = ending(answer, "d.service").expect_err("no settings");
        assert!(error.contains(says), "{error}");
    }
}
