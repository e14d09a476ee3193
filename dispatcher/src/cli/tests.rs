//! Exit codes, the search for the admin socket, and the status table.

use std::path::Path;

use super::*;
use crate::api::status::{
    FaultStatus, ListenerStatus, NotSteered, PoolStatus, Status, SteerStatus, SteerWorkerStatus,
    WorkerStatus,
};

fn run(arguments: &[&str]) -> Exit {
    execute(std::iter::once(&"dispatcher").chain(arguments).map(OsString::from))
}

#[test]
fn the_arguments_are_consistent() {
    use clap::CommandFactory;
    Cli::command().debug_assert();
}

#[test]
fn every_command_has_examples_and_json() {
    use clap::CommandFactory;
    // These commands have no JSON output; those of `relay` have it.
    let without = ["run", "serve", "demo", "top", "completions", "man"];
    let mut whole = Cli::command();
    whole.build();
    let shown = whole.get_subcommands().filter(|command| !command.is_hide_set());
    let mut seen = 0;
    for command in shown.filter(|command| command.get_name() != "help") {
        seen += 1;
        let name = command.get_name();
        assert!(command.get_about().is_some(), "{name}: what is it for?");
        let more = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(more.contains("Example"), "{name}: an example");
        assert!(more.contains(&format!("dispatcher {name}")), "{name}: an example of it");
        let parts: Vec<&clap::Command> = match command.has_subcommands() {
            true => command.get_subcommands().filter(|it| it.get_name() != "help").collect(),
            false => vec![command],
        };
        for command in parts {
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{name} {}: what is it?", argument.get_id());
            }
            let json = command.get_arguments().any(|argument| argument.get_id() == "json");
            let serves = without.contains(&name) || command.get_name() == "serve";
            assert_eq!(json, !serves, "{name}: --json");
        }
    }
    assert!(seen >= 8);
}

#[test]
fn every_command_has_its_own_description() {
    use clap::CommandFactory;
    let whole = Cli::command();
    let about = |command: &clap::Command| command.get_about().expect("an about").to_string();
    let mut abouts: Vec<String> = whole.get_subcommands().map(about).collect();
    let of = |name| whole.find_subcommand(name).map(about).expect("a command");
    assert!(of("weight").contains("share") && of("scale").contains("processes"));
    // The description of a shared argument group must not become the description of a command.
    assert!(!abouts.iter().any(|about| about.contains("client commands")), "{abouts:?}");
    let all = abouts.len();
    abouts.sort();
    abouts.dedup();
    assert_eq!(abouts.len(), all, "{abouts:?}");
}

#[test]
fn exit_codes_are_documented() {
    use clap::CommandFactory;
    let codes = include_str!("exit.rs").lines().filter_map(|line| {
        let (_, code) = line.trim().strip_suffix(',')?.split_once(" = ")?;
        code.parse::<u8>().ok()
    });
    let codes: Vec<u8> = codes.collect();
    assert_eq!(codes.len(), 13, "{codes:?}");
    let page = include_str!("../../../docs/COMMANDS.md");
    let help = Cli::command().get_after_help().expect("more").to_string();
    let help = help.split("Exit codes").nth(1).expect("exit codes").to_owned();
    for code in codes {
        assert!(page.contains(&format!("| {code} |")), "{code} is not in docs/COMMANDS.md");
        assert!(help.contains(&format!(" {code} ")), "{code} is not in --help");
    }
}

#[test]
fn a_broken_configuration_without_an_admin_socket() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("d.toml");
    let other = directory.path().join("other.sock");
    let nothing = AdminArgs::default();
    // The mistake makes the file's `admin_socket` unreadable.
    std::fs::write(&file, "admin_socket = '/custom'\n[pool\n").expect("written");
    let endpoints = admin::endpoints_with(&nothing, None, &file).expect("somewhere");
    assert_eq!(endpoints.len(), 1);
    let endpoint = admin::AdminEndpoint { path: other.clone(), ..endpoints[0].clone() };
    let failure = admin::get(&endpoint, "/v1/status").expect_err("no dispatcher");
    assert_eq!(failure.exit, Exit::Config);
    assert!(failure.message.contains("d.toml:2:6: "), "{}", failure.message);
    assert!(failure.message.contains("| [pool\n"), "{}", failure.message);
    assert!(failure.message.contains("     ^"), "{}", failure.message);
    assert!(failure.message.contains("--admin PATH"), "{}", failure.message);
    // The command line takes precedence.
    let told = Some(OsString::from("/v"));
    let endpoint = admin::find_with(&nothing, told, &file).expect("found");
    assert_eq!((endpoint.from.as_str(), endpoint.mistake), ("DISPATCHER_ADMIN", None));
    // A missing file is not a mistake.
    let missing = directory.path().join("none.toml");
    let endpoint = admin::find_with(&nothing, None, &missing).expect("found");
    let endpoint = admin::AdminEndpoint { path: other, ..endpoint };
    assert_eq!(
        admin::get(&endpoint, "/v1/status").expect_err("no dispatcher").exit,
        Exit::Unavailable
    );
}

#[test]
fn reload_tries_the_old_admin_socket() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("d.toml");
    std::fs::write(&file, "admin_socket = '/custom'").expect("written");
    let paths = |arguments: &AdminArgs, variable: Option<&str>| {
        let endpoints = admin::endpoints_with(arguments, variable.map(OsString::from), &file);
        let endpoints = endpoints.expect("somewhere").into_iter();
        endpoints.map(|endpoint| endpoint.path.display().to_string()).collect::<Vec<_>>()
    };
    let default = "/run/dispatcher/admin.sock";
    assert_eq!(paths(&AdminArgs::default(), None), ["/custom", default]);
    assert_eq!(paths(&AdminArgs::default(), Some("/v")), ["/v"]);
    let given = AdminArgs { admin: Some("/a".into()), config: None };
    assert_eq!(paths(&given, None), ["/a"]);
    // A file named on the command line may belong to another dispatcher.
    let other = AdminArgs { admin: None, config: Some(file.clone()) };
    assert_eq!(paths(&other, None), ["/custom"]);
    std::fs::write(&file, "").expect("written");
    assert_eq!(paths(&AdminArgs::default(), None), [default]);
}

#[test]
fn exit_codes() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("d.toml");
    let name = file.to_str().expect("UTF-8");
    let good = "[[listener]]\nname='a'\naddress='127.0.0.1:0'\npool='a'\n[pool.a]\n";
    std::fs::write(&file, good).expect("written");
    assert_eq!(run(&["check", "--config", name]), Exit::Ok);
    std::fs::write(&file, format!("nope = 1\n{good}")).expect("written");
    assert_eq!(run(&["check", "--config", name]), Exit::Config);
    assert_eq!(run(&["run", "--config", name]), Exit::Config);
    assert_eq!(run(&["check", "--config", "/nonexistent/d.toml"]), Exit::Config);
    assert_eq!(run(&["status", "--config", "/nonexistent/d.toml"]), Exit::Config);
    let socket = directory.path().join("none.sock");
    let socket = socket.to_str().expect("UTF-8");
    assert_eq!(run(&["status", "--admin", socket]), Exit::Unavailable);
    assert_eq!(run(&[]), Exit::Usage);
    assert_eq!(run(&["serve"]), Exit::Usage);
    // Without the demo feature, the command itself is wrong usage.
    assert_eq!(run(&["demo", "--workers", "0"]), Exit::Usage);
    assert_eq!(run(&["demo", "--listen", "here"]), Exit::Usage);
    assert_eq!(run(&["--version"]), Exit::Ok);
    assert_eq!(run(&["check", "--help"]), Exit::Ok);
    assert_eq!([Exit::Usage.code(), Exit::Unavailable.code()], [64, 69]);
    assert_eq!([Exit::NoPermission.code(), Exit::Config.code()], [77, 78]);
}

#[test]
fn precedence_of_admin_socket_settings() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("d.toml");
    let systemd = directory.path().join("s.toml");
    let missing = directory.path().join("none.toml");
    std::fs::write(&file, "admin_socket = '/from/file'").expect("written");
    std::fs::write(&systemd, "admin_socket = 'systemd:admin'").expect("written");
    let find =
        |given: Option<&str>, config: Option<&Path>, variable: Option<&str>, default: &Path| {
            let arguments =
                AdminArgs { admin: given.map(PathBuf::from), config: config.map(Path::to_owned) };
            admin::find_with(&arguments, variable.map(OsString::from), default)
                .map(|endpoint| (endpoint.path.display().to_string(), endpoint.from))
                .map_err(|failure| failure.exit)
        };
    let (path, from) = find(Some("/a"), Some(&file), Some("/v"), &file).expect("found");
    assert_eq!((path.as_str(), from.as_str()), ("/a", "--admin"));
    let (path, from) = find(None, Some(&file), Some("/v"), &missing).expect("found");
    assert_eq!((path.as_str(), from), ("/from/file", format!("config {}", file.display())));
    let (path, from) = find(None, None, Some("/v"), &file).expect("found");
    assert_eq!((path.as_str(), from.as_str()), ("/v", "DISPATCHER_ADMIN"));
    let (path, _) = find(None, None, Some(""), &file).expect("found");
    assert_eq!(path, "/from/file");
    let (path, from) = find(None, None, None, &missing).expect("found");
    assert_eq!((path.as_str(), from.as_str()), ("/run/dispatcher/admin.sock", "default"));
    assert_eq!(find(None, Some(&missing), None, &file), Err(Exit::Config));
    assert_eq!(find(None, None, None, &systemd), Err(Exit::Usage));
}

#[test]
fn the_table() {
    let status = Status {
        version: "1.2.3".to_owned(),
        pid: 42,
        instance: "00c0ffee".to_owned(),
        uptime_seconds: 3661,
        accepted: 1000,
        taken: 990,
        in_flight: 7,
        closed: [("no_worker".to_owned(), 3), ("shutdown".to_owned(), 0)].into(),
        listeners: vec![ListenerStatus {
            name: "web".to_owned(),
            address: "127.0.0.1:8080".to_owned(),
            pool: "web".to_owned(),
            state: "accepting".to_owned(),
            accepted: 1000,
            ..ListenerStatus::default()
        }],
        pools: vec![PoolStatus {
            name: "web".to_owned(),
            policy: "least-connections".to_owned(),
            state: "ready".to_owned(),
            queued: 0,
            affinity: None,
            workers: vec![WorkerStatus {
                id: 1,
                name: "a\x1b[2J".to_owned(),
                pid: 77,
                state: "active".to_owned(),
                weight: 1,
                max_connections: 10_000,
                load: 12,
                sent: 997,
                taken: 990,
                finished: 985,
                in_flight: 7,
                ..WorkerStatus::default()
            }],
            ..PoolStatus::default()
        }],
        ..Status::default()
    };
    assert_eq!(
        status::table(&status, 5, 200),
        "\
dispatcher 1.2.3  pid 42  instance 00c0ffee  up 1h 1m 1s

ACCEPTED  QUEUED  INFLIGHT  TAKEN  CLOSED
    1000       0         7    990       3
closed no_worker: 3

LISTENER  ADDRESS         POOL  STATE      ACCEPTED
web       127.0.0.1:8080  web   accepting      1000

POOL  POLICY             STATE  WORKERS  LOAD  QUEUED
web   least-connections  ready        1    12       0

POOL  WORKER  STATE   ID  PID  WEIGHT  LOAD    MAX  SENT  TAKEN  FINISHED  INFLIGHT  REVOKED
web   a\u{fffd}[2J   active   1   77       1    12  10000   997    990       985         7        0
"
    );
    assert!(status::table(&Status::default(), 5, 80).ends_with("\nno workers\n"));
    // 80 columns are enough for the longest names and for the last faults.
    let mut status = status;
    status.pools[0].name = "p".repeat(64);
    status.pools[0].workers[0].name = "w".repeat(64);
    status.listeners[0].address = format!("unix:/{}", "x".repeat(100));
    status.faults = (1..=7)
        .map(|n| FaultStatus {
            time: format!("2026-01-02T03:04:{n:02}.678Z"),
            kind: "worker_gone".to_owned(),
            subject: format!("web/w{n}"),
            text: format!("process {n} died; {}", "5 untaken went elsewhere, ".repeat(4)),
            count: n,
            ongoing: n == 7,
        })
        .collect();
    let text = status::table(&status, 5, 80);
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let (_, faults) = text.split_once("\nlast faults (5 of 7)\n").expect("the faults");
    let first = "2026-01-02 03:04:03Z worker_gone web/w3 3 times\n    process 3 died; 5 untaken";
    assert!(faults.starts_with(first), "{faults}");
    assert!(faults.contains("worker_gone web/w7 7 times, ongoing"), "{faults}");
    status.faults.truncate(1);
    let text = status::table(&status, 5, 80);
    assert!(text.contains("\nlast faults\n2026-01-02 03:04:01Z worker_gone web/w1\n"), "{text}");
    assert!(!status::table(&status, 0, 80).contains("last faults"));
}

#[test]
fn steered_pools_in_the_table() {
    let worker = |name: &str, pid, problem: Option<&str>| WorkerStatus {
        name: name.to_owned(),
        pid,
        state: "active".to_owned(),
        steer: Some(SteerWorkerStatus {
            problem: problem.map(str::to_owned),
            ..SteerWorkerStatus::default()
        }),
        ..WorkerStatus::default()
    };
    let not_steered = NotSteered {
        name: "web/b".to_owned(),
        address: "127.0.0.1:9001".to_owned(),
        problem: "it uses MPTCP".to_owned(),
    };
    let mut steer = SteerStatus {
        attached: true,
        pinned: true,
        chosen: 1_234,
        dropped_full: 3,
        not_steered: vec![not_steered],
        ..SteerStatus::default()
    };
    let shown = |steer: &SteerStatus| {
        let pool = PoolStatus {
            name: "web".to_owned(),
            steer: Some(steer.clone()),
            workers: vec![worker("a", 0, None), worker("b", 77, Some("it uses MPTCP"))],
            ..PoolStatus::default()
        };
        status::table(&Status { pools: vec![pool], ..Status::default() }, 5, 200)
    };
    let text = shown(&steer);
    for line in [
        "steering of web: pinned, 1234 connections chosen, 3 SYNs dropped (workers full), 0 refused",
        "not steered: web/b at 127.0.0.1:9001: it uses MPTCP",
    ] {
        assert!(text.lines().any(|it| it == line), "{text}");
    }
    let words = |name: &str| {
        let row = text.lines().find(|line| line.starts_with(&format!("web   {name} ")));
        row.map(|row| row.split_whitespace().skip(2).take(5).collect::<Vec<_>>().join(" "))
    };
    assert_eq!(words("a").as_deref(), Some("active steered 0 - 0"));
    assert_eq!(words("b").as_deref(), Some("active not steered 0 77"));
    steer.pinned = false;
    steer.not_pinned = Some("bpffs is not mounted".to_owned());
    steer.error = Some("Operation not permitted".to_owned());
    (steer.dropped_full, steer.dropped_no_worker, steer.failed) = (1, 2, 5);
    let text = shown(&steer);
    for line in [
        "steering of web: attached, 1234 connections chosen, 1 SYN dropped (workers full), \
         2 SYNs dropped (no worker), 0 refused, 5 failed",
        "steering of web fails: Operation not permitted",
        "steering of web ends with the dispatcher: bpffs is not mounted",
    ] {
        assert!(text.lines().any(|it| it == line), "{text}");
    }
    steer.attached = false;
    assert!(shown(&steer).contains("steering of web: not attached, "));
    steer.hashed = Some("CAP_BPF is missing".to_owned());
    let mut unknown = worker("a", 7, None);
    if let Some(steer) = &mut unknown.steer {
        (steer.hashed, steer.not_counted) = (true, Some("EACCES".to_owned()));
    }
    assert_eq!(
        (unknown.shown_kind().as_str(), unknown.shown_load().as_str()),
        ("active hashed", "?")
    );
    let pool = PoolStatus {
        name: "web".to_owned(),
        steer: Some(steer),
        workers: vec![unknown],
        ..PoolStatus::default()
    };
    let text = status::table(&Status { pools: vec![pool], ..Status::default() }, 5, 200);
    assert!(text.contains("steering of web: by the kernel's hash: CAP_BPF is missing\n"), "{text}");
    assert!(text.contains("not counted: web/a: EACCES\n"), "{text}");
}
