//! Golden files with the output of commands. Run the tests with `UPDATE_SNAPSHOTS=1` to rewrite
//! the files, and review the difference.

use std::path::Path;
use std::process::{Command, Stdio};

use test_support::*;

const CONFIG: &str = r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
"#;

/// Compares a text with the file `tests/admin/snapshots/NAME.txt`.
fn compare(name: &str, text: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/admin/snapshots");
    let file = folder.join(format!("{name}.txt"));
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some_and(|value| value == "1") {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(&file, text).unwrap();
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        text == expected,
        "{} differs (UPDATE_SNAPSHOTS=1 rewrites it); the output is now:\n{text}",
        file.display()
    );
}

/// The command line, the output, and the exit code if it is not 0.
fn transcript(arguments: &[&str], directory: &Path, admin: Option<&Path>) -> String {
    let mut command = Command::new(dispatcher_bin());
    command.args(arguments).current_dir(directory).stdin(Stdio::null());
    command.env_remove("COLUMNS").env_remove("DISPATCHER_ADMIN");
    if let Some(admin) = admin {
        command.env("DISPATCHER_ADMIN", admin);
    }
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let mut transcript = format!("$ dispatcher {}\n", arguments.join(" "));
    transcript += &text(&output.stdout);
    transcript += &text(&output.stderr);
    match output.status.code() {
        Some(0) => {}
        Some(code) => transcript += &format!("(exit code {code})\n"),
        None => transcript += "(ended by a signal)\n",
    }
    transcript + "\n"
}

#[cfg(all(feature = "demo", feature = "tui"))]
#[test]
fn help_of_all_commands() {
    let here = Path::new(".");
    let mut text = transcript(&["--help"], here, None);
    let commands: Vec<String> = text
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .map_while(|line| line.split_whitespace().next().map(str::to_owned))
        .collect();
    assert!(commands.len() > 10, "{text}");
    for command in commands.iter().filter(|command| *command != "help") {
        text += &transcript(&[command, "--help"], here, None);
    }
    compare("help", &text);
}

#[test]
fn output_of_check() {
    let temp = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(temp.path().join(name), text).unwrap();
    write("good.toml", CONFIG);
    let mistakes = "max_untaken = 'many'\npolicy = 'leastconn'\nhandof_timeout = '1s'\n";
    write("bad.toml", &format!("{CONFIG}{mistakes}"));
    let mut text = String::new();
    for file in ["good.toml", "bad.toml", "missing.toml"] {
        text += &transcript(&["check", file], temp.path(), None);
        text += &transcript(&["check", "--json", file], temp.path(), None);
    }
    compare("check", &text);
}

#[test]
fn output_of_commands_for_a_running_dispatcher() {
    let dispatcher = Dispatcher::start(CONFIG);
    let _worker = dispatcher.worker("blocking", "web", "w0");
    dispatcher.wait_joined("web", 1);
    let client = connect(dispatcher.address("web"));
    let _client = Client::greeted(client).unwrap();
    dispatcher.wait_status("the worker to be proven", |status| {
        status.pools[0].workers[0].proven && status.taken == 1
    });
    let admin = dispatcher.admin();
    let mut text = String::new();
    for arguments in [
        &["drain", "web/w0"][..],
        &["drain", "web/w0", "--json"],
        &["resume", "--pool", "web"],
        &["weight", "web/w0"],
        &["weight", "web/w0", "3", "--json"],
        &["log-level", "--json"],
        &["reload"],
        &["explain", "web"],
        &["history", "web"],
        &["scale", "web", "2"],
        &["drain", "web/w1"],
        &["drain", "wep/w0", "--json"],
    ] {
        text += &transcript(arguments, &dispatcher.dir, Some(&admin));
    }
    // These differ in every run.
    let status = dispatcher.status();
    let file = dispatcher.dir.join("dispatcher.toml");
    text = text.replace(&status.instance, "INSTANCE").replace(file.to_str().unwrap(), "FILE");
    compare("commands", &text);
}

/// The `status` and `workers` commands, with placeholders for values that differ in every run.
/// Process ids get a fixed width, because the width of their column depends on them.
#[test]
fn tables_of_status_and_workers() {
    let dispatcher = Dispatcher::start(&format!("{CONFIG}[pool.spare]\npolicy = \"failover\"\n"));
    let admin = dispatcher.admin();
    let client = || Client::greeted(connect(dispatcher.address("web"))).unwrap();
    // At any time at most one worker of the pool `web` is active, so it gets the next clients.
    let _first = dispatcher.worker("blocking", "web", "w0");
    dispatcher.wait_joined("web", 1);
    let mut clients = vec![client()];
    transcript(&["drain", "web/w0"], &dispatcher.dir, Some(&admin));
    let _second = dispatcher.worker("blocking", "web", "w1");
    dispatcher.wait_joined("web", 1);
    clients.extend([client(), client()]);
    let _spare = dispatcher.worker("blocking", "spare", "s0");
    dispatcher.wait_joined("spare", 1);
    let status = dispatcher.wait_status("all connections to be taken", |status| {
        status.taken == 3 && status.in_flight == 0
    });
    let mut text = String::new();
    for arguments in
        [&["status", "--faults", "0"][..], &["workers"], &["workers", "--pool", "spare"]]
    {
        let mut output = transcript(arguments, &dispatcher.dir, Some(&admin));
        let pids = status.pools.iter().flat_map(|pool| &pool.workers).map(|w| w.pid.to_string());
        let pids: Vec<String> = pids.filter(|pid| output.contains(pid)).collect();
        let width = pids.iter().map(String::len).max().unwrap_or_default().max(3);
        for word in pids.iter().map(String::as_str).chain(["PID"]) {
            let shown = if word == "PID" { "PID" } else { "NUMBER" };
            output = output.replace(&format!("  {word:>width$}  "), &format!("  {shown:>7}  "));
        }
        text += &output;
    }
    let (_, uptime) = text.split_once("  up ").unwrap();
    let uptime = uptime.split('\n').next().unwrap().to_owned();
    text = text
        .replace(&format!("dispatcher {}  ", status.version), "dispatcher VERSION  ")
        .replace(&format!("pid {}  ", status.pid), "pid NUMBER  ")
        .replace(&status.instance, "INSTANCE")
        .replace(&format!("  up {uptime}\n"), "  up TIME\n")
        .replace(&dispatcher.address("web").to_string(), "127.0.0.1:PORT_");
    drop(clients);
    compare("tables", &text);
}
