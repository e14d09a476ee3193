//! Output of commands: several mistakes, weights, faults, singular and plural, hints, and 80
//! columns.

use super::*;

#[test]
fn check_takes_the_file_as_an_argument_too() {
    let temp = configure(CONFIG);
    let file = temp.path().join("dispatcher.toml");
    let name = file.to_str().unwrap();
    for text in [CONFIG.to_owned(), format!("nope = 1\n{CONFIG}")] {
        std::fs::write(&file, text).unwrap();
        let (one, other) = (run(&["check", name]), run(&["check", "--config", name]));
        assert_eq!((one.code, &one.out, &one.err), (other.code, &other.out, &other.err));
        let (one, other) =
            (run(&["check", "--json", name]), run(&["check", "--json", "--config", name]));
        assert_eq!((one.code, &one.out, &one.err), (other.code, &other.out, &other.err));
    }
    let both = run(&["check", name, "--config", name]);
    assert_eq!(both.code, 64, "{both:?}");
}

#[test]
fn check_reports_all_mistakes_and_warnings_at_once() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("dispatcher.toml");
    let text = format!(
        "handof_timeout = \"1s\"\n{CONFIG}policy = \"leastconn\"\nmax_untaken = \"many\"\n\
         allow_users = [\"no-such-user\"]\n[pool.web.spawn]\ncommand = [\"/no/such/program\"]\n"
    );
    std::fs::write(&file, text).unwrap();
    let ran = with_config("check", temp.path());
    assert_eq!((ran.code, ran.out.as_str()), (78, ""), "{ran:?}");
    for part in [
        "dispatcher.toml:1:1: unknown key `handof_timeout`\n",
        "dispatcher.toml:9:10: unknown value `leastconn`\n 9 | policy = \"leastconn\"\n   |          ^^^^^^^^^^^\n\
         help: `leastconn` of HAProxy is \"least-connections\" here. The values are: least-connections, ",
        "dispatcher.toml:10:15: wrong type: string \"many\", expected a whole number from 1 to 4096\n",
        "help: such as: max_untaken = 256\n",
        "dispatcher.toml:11:16: warning: unknown user `no-such-user`\n",
        "dispatcher.toml:13:12: warning: `/no/such/program`: No such file or directory",
        "\n3 mistakes\n",
    ] {
        assert!(ran.err.contains(part), "{part}\n{}", ran.err);
    }
    let ran = run(&["check", "--json", file.to_str().unwrap()]);
    let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let lines = |key: &str| -> Vec<u64> {
        json[key].as_array().unwrap().iter().map(|found| found["line"].as_u64().unwrap()).collect()
    };
    assert_eq!((lines("mistakes"), lines("warnings")), (vec![1, 9, 10], vec![11, 13]));
    assert_eq!(json["mistake"], json["mistakes"][0]);
}

/// Runs a command for this dispatcher.
fn ask(dispatcher: &Dispatcher, arguments: &[&str]) -> Ran {
    let mut command = Command::new(dispatcher_bin());
    finish(command.args(arguments).env("DISPATCHER_ADMIN", dispatcher.admin()))
}

#[test]
fn a_weight_is_printed() {
    let dispatcher = Dispatcher::start(CONFIG);
    let _worker = dispatcher.workers("blocking", "web", 1);
    let ran = ask(&dispatcher, &["weight", "web/w0", "3"]);
    assert_eq!(
        (ran.code, ran.out.as_str()),
        (0, "worker 1 (web/w0): weight 3, active, 0 connections\n")
    );
    let _client = Client::connect(dispatcher.address("web")).unwrap();
    let ran = ask(&dispatcher, &["weight", "1", "12"]);
    assert_eq!(ran.out, "worker 1 (web/w0): weight 12, active, 1 connection\n");
    let ran = ask(&dispatcher, &["weight", "web/w0"]);
    assert_eq!(ran.out, "worker 1 (web/w0): weight 12, active, 1 connection\n");
    assert_eq!(ask(&dispatcher, &["weight", "web/w1"]).code, 66);
    let ran = ask(&dispatcher, &["weight", "1", "1", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(json["workers"][0]["weight"], 1, "{json}");
}

#[test]
fn singular_for_one() {
    let dispatcher = Dispatcher::start(CONFIG);
    let _worker = dispatcher.worker_with("blocking", "web", "w0", &[("TEST_WORKER", "stays")]);
    dispatcher.wait_joined("web", 1);
    let client = Client::connect(dispatcher.address("web")).unwrap();
    let ran = ask(&dispatcher, &["drain", "--all", "--wait", "--timeout", "300ms"]);
    assert_eq!(ran.code, 75, "{ran:?}");
    let host = "host: draining, 1 connection\n";
    assert_eq!(ran.out, format!("{host}worker 1 (web/w0): draining, 1 connection\n"));
    assert!(ran.err.starts_with(host), "{ran:?}");
    assert_eq!(ask(&dispatcher, &["resume", "--all"]).code, 0);
    let ran = ask(&dispatcher, &["drain", "--pool", "web", "--wait", "--timeout", "300ms"]);
    assert_eq!(ran.code, 75, "{ran:?}");
    assert_eq!(ran.out, "worker 1 (web/w0): draining, 1 connection\n");
    assert!(ran.err.starts_with("0 of 1 worker drained, 1 connection left\n"), "{ran:?}");
    assert!(ran.err.contains("dispatcher: 1 connection left after 300ms, at web/w0: "), "{ran:?}");
    client.finish();
    dispatcher.wait_status("its end", |s| worker(s, "w0").is_some_and(|w| w.load == 0));
    let ran = ask(&dispatcher, &["resume", "web/w0"]);
    assert_eq!(ran.out, "worker 1 (web/w0): active, 0 connections\n");
}

#[test]
fn a_pool_name_instead_of_a_worker_gets_a_hint() {
    let dispatcher = Dispatcher::start(CONFIG);
    for command in ["drain", "resume"] {
        let ran = ask(&dispatcher, &[command, "web"]);
        assert_eq!((ran.code, ran.out.as_str()), (64, ""), "{ran:?}");
        let said = format!("for every worker of a pool: dispatcher {command} --pool web; ");
        assert!(
            ran.err.contains("`web` does not name a worker") && ran.err.contains(&said),
            "{ran:?}"
        );
        let ran = ask(&dispatcher, &[command, "web", "--json"]);
        let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(json["problem"], "invalid", "{json}");
        assert!(json["hint"].as_str().unwrap().contains(&said), "{json}");
        // The command in the hint works.
        let _worker = dispatcher.workers("blocking", "web", 1);
        assert_eq!(ask(&dispatcher, &[command, "--pool", "web"]).code, 0);
    }
}

#[test]
fn the_status_shows_the_last_faults() {
    let dispatcher = Dispatcher::start(CONFIG);
    assert!(!ask(&dispatcher, &["status"]).out.contains("last faults"));
    let mut workers = dispatcher.workers("blocking", "web", 2);
    let client = Client::connect(dispatcher.address("web")).unwrap();
    let served_by = client.served_by.clone();
    let at = usize::from(served_by == "w1");
    workers[at].kill();
    dispatcher.wait_status("a fault", |status| !status.faults.is_empty());
    let ran = ask(&dispatcher, &["status"]);
    let (_, faults) = ran.out.split_once("\nlast faults\n").unwrap();
    let words = faults.split_whitespace().collect::<Vec<_>>().join(" ");
    let head = faults.lines().next().unwrap();
    assert!(head.ends_with(&format!("Z worker_gone web/{served_by}")), "{faults}");
    assert!(faults.contains("\n    process "), "{faults}");
    assert!(words.contains(", 1 was being served"), "{faults}");
    assert!(!ask(&dispatcher, &["status", "--faults", "0"]).out.contains("last faults"));
}

#[test]
fn tables_fit_eighty_columns() {
    let pool = "p".repeat(64);
    let config = CONFIG.replace("[pool.web]", &format!("[pool.{pool}]\nhistory = 5"));
    let dispatcher =
        Dispatcher::start(&config.replace("pool = \"web\"", &format!("pool = \"{pool}\"")));
    let _worker = dispatcher.worker("blocking", &pool, &"w".repeat(64));
    dispatcher.wait_joined(&pool, 1);
    let _client = Client::connect(dispatcher.address("web")).unwrap();
    for arguments in [&["status"][..], &["workers"], &["explain", &pool]] {
        let ran = ask(&dispatcher, arguments);
        assert_eq!(ran.code, 0, "{ran:?}");
        let table = ran.out.lines().filter(|line| !line.starts_with("the next connection"));
        for line in table {
            assert!(line.chars().count() <= 80, "{arguments:?}: {line}");
        }
    }
}
