//! The command line: output streams, exit codes, and files that are kept or removed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod doctor;
mod output;
mod programs;

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dispatcher::api::status::Status;
use nix::unistd::geteuid;
use test_support::*;

const CONFIG: &str = r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
"#;

/// Exit code and output of a command.
#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn run(arguments: &[&str]) -> Ran {
    finish(Command::new(dispatcher_bin()).args(arguments))
}

/// Runs a command that ends by itself.
fn finish(command: &mut Command) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let file = |name| File::create(dir.path().join(name)).unwrap();
    command.stdin(Stdio::null()).stdout(file("out")).stderr(file("err"));
    let status = Process::start("the command", command).wait();
    let read = |name| std::fs::read_to_string(dir.path().join(name)).unwrap();
    Ran { code: status.code().expect("an exit code"), out: read("out"), err: read("err") }
}

/// `command --config` with the `dispatcher.toml` of a directory.
fn with_config(command: &str, dir: &Path) -> Ran {
    run(&[command, "--config", dir.join("dispatcher.toml").to_str().unwrap()])
}

fn limits(pid: impl std::fmt::Display) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = text.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().skip(3).take(2).map(str::to_owned).collect()
}

#[test]
fn a_valid_configuration_passes() {
    let temp = configure(CONFIG);
    let ran = with_config("check", temp.path());
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(ran.out.contains("dispatcher.toml: ok\nlistener web: 127.0.0.1:0 -> pool web\n"));
    assert!(ran.out.ends_with('\n') && !ran.out.contains("admin_http"));
    write_config(temp.path(), &format!("admin_http = \"127.0.0.1:9900\"\n{CONFIG}"));
    let ran = with_config("check", temp.path());
    assert!(ran.out.ends_with("\nadmin_http: 127.0.0.1:9900, read-only\n"), "{}", ran.out);
}

#[test]
fn the_sample_configuration_passes() {
    let etc = Path::new(env!("CARGO_MANIFEST_DIR")).join("../etc");
    let ran = with_config("check", &etc);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
}

#[test]
fn a_mistake_is_shown_at_its_position() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("dispatcher.toml");
    for (text, place, said) in [
        (
            "[[listener]]\nname = \"web\"\nadress = \"127.0.0.1:0\"\npool = \"web\"\n[pool.web]\n",
            "3:1",
            "unknown key `adress`\n 3 | adress = \"127.0.0.1:0\"\n   | ^^^^^^\n\
             help: did you mean `address`?\n",
        ),
        (
            "[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"wbe\"\n[pool.web]\n",
            "4:8",
            "\n 4 | pool = \"wbe\"\n   |        ^^^^^\nhelp: did you mean `web`?\n",
        ),
        (
            "[pool.web]\npolicy = \"least-conections\"\n",
            "2:10",
            "\n 2 | policy = \"least-conections\"\n   |          ^^^^^^^^^^^^^^^^^^\n\
             help: did you mean `least-connections`? The values are: least-connections, round-robin, ",
        ),
        ("[pool.web\n", "1:10", "\n 1 | [pool.web\n   |          ^"),
    ] {
        std::fs::write(&file, text).unwrap();
        for command in ["check", "run"] {
            let ran = with_config(command, temp.path());
            assert_eq!((ran.code, ran.out.as_str()), (78, ""), "{}", ran.err);
            let start = format!("dispatcher: {}:{place}: ", file.display());
            assert!(ran.err.starts_with(&start), "{start}\n{}", ran.err);
            assert!(ran.err.contains(said) && ran.err.ends_with('\n'), "{said}\n{}", ran.err);
        }
    }
}

#[test]
fn an_unknown_user_is_a_warning() {
    let temp = configure(&format!("{CONFIG}allow_users = [\"root\", \"no-such-user\"]\n"));
    let ran = with_config("check", temp.path());
    assert_eq!(ran.code, 0);
    let carets = "^".repeat("\"no-such-user\"".len());
    for part in ["dispatcher.toml:10:24: warning: ", "no-such-user", "getent passwd", &carets] {
        assert!(ran.err.contains(part), "{part}: {}", ran.err);
    }
}

#[test]
fn a_missing_configuration_is_an_error() {
    let temp = tempfile::tempdir().unwrap();
    for command in ["run", "check", "status"] {
        let ran = with_config(command, temp.path());
        assert_eq!((ran.code, ran.out.as_str()), (78, ""));
        assert!(ran.err.contains("dispatcher.toml: No such file or directory"), "{}", ran.err);
    }
    assert!(with_config("run", temp.path()).err.contains("--config FILE"));
}

#[test]
fn wrong_usage_is_64_and_help_is_not_wrong() {
    for arguments in [
        &[][..],
        &["serve"],
        &["run", "--confg", "x"],
        &["run", "stray"],
        &["status", "--admin"],
        &["demo", "--workers", "0"],
        &["demo", "--workers", "many"],
        &["demo", "--listen", "8080"],
    ] {
        let ran = run(arguments);
        assert_eq!((ran.code, ran.out.as_str()), (64, ""), "{arguments:?}");
        assert!(!ran.err.is_empty());
    }
    assert!(run(&["run", "--confg", "x"]).err.contains("'--config'"));
    for arguments in [&["--help"][..], &["--version"], &["run", "--help"], &["status", "--help"]] {
        let ran = run(arguments);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{arguments:?}");
        assert!(ran.out.contains("dispatcher"));
        assert!(!ran.out.contains("demo-worker"));
    }
}

#[test]
fn a_second_dispatcher_is_refused() {
    let temp = configure(CONFIG);
    let dispatcher = Dispatcher::start_in(temp.path());
    let _worker = dispatcher.workers("blocking", "web", 1);
    let mut held = Client::connect(dispatcher.address("web")).unwrap();

    let same = with_config("run", temp.path());
    let said = format!("{} is in use by another process", dispatcher.dispatch().display());
    assert!(same.code == 69 && same.err.contains(&said), "{same:?}");

    // Only the admin socket is the same.
    let other = tempfile::tempdir().unwrap();
    let (theirs, admin) = (other.path().join("d.sock"), dispatcher.admin());
    let text = format!("dispatch_socket = {theirs:?}\nadmin_socket = {admin:?}\n{CONFIG}");
    std::fs::write(other.path().join("dispatcher.toml"), text).unwrap();
    let ran = with_config("run", other.path());
    let said = format!("{} is in use by another process", dispatcher.admin().display());
    assert!(ran.code == 69 && ran.err.contains(&said), "{ran:?}");
    assert!(!theirs.exists(), "it put away what it had made");

    // The first dispatcher is not affected.
    held.echo("still here");
    Client::connect(dispatcher.address("web")).unwrap().finish();
    assert_eq!(with_config("status", temp.path()).code, 0);
}

#[test]
fn stale_socket_files_are_replaced() {
    let temp = configure(CONFIG);
    let mut dispatcher = Dispatcher::start_in(temp.path());
    dispatcher.process.kill();
    assert!(dispatcher.dispatch().exists() && dispatcher.admin().exists());
    let mut again = Dispatcher::start_in(temp.path());
    let _worker = again.workers("blocking", "web", 1);
    Client::connect(again.address("web")).unwrap().finish();
    // The third one is the take-over socket.
    assert_eq!(again.log().matches("event=stale_socket_removed").count(), 3);
    assert!(again.stop().success());
    assert!(!again.dispatch().exists() && !again.admin().exists());
}

#[test]
fn foreign_files_are_not_removed() {
    for name in ["dispatch.sock", "admin.sock"] {
        let temp = configure(CONFIG);
        let file = temp.path().join(name);
        std::fs::write(&file, "precious").unwrap();
        let ran = with_config("run", temp.path());
        assert_eq!(ran.code, 73);
        let said = format!("{} exists and is not a socket; it was left alone", file.display());
        assert!(ran.err.contains(&said), "{}", ran.err);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    }
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let temp = configure(&CONFIG.replace("127.0.0.1:0", &address));
    let ran = with_config("run", temp.path());
    assert_eq!(ran.code, 73);
    assert!(ran.err.contains(&format!("cannot listen on {address}: ")), "{}", ran.err);
    assert!(ran.err.contains("in use") && ran.err.contains("ss -ltnp"), "{}", ran.err);
    let demo = run(&["demo", "--listen", &address]);
    assert_eq!((demo.code, demo.out.as_str()), (73, ""));
    assert!(demo.err.contains(&format!("cannot listen on {address}: ")), "{}", demo.err);
}

#[test]
fn status_finds_the_dispatcher() {
    let dispatcher = Dispatcher::start(CONFIG);
    let _workers = dispatcher.workers("blocking", "web", 2);
    let _clients: Vec<Client> =
        (0..3).map(|_| Client::connect(dispatcher.address("web")).unwrap()).collect();
    let (admin, config) = (dispatcher.admin(), dispatcher.dir.join("dispatcher.toml"));
    let mut by_variable = Command::new(dispatcher_bin());
    by_variable.arg("status").env("DISPATCHER_ADMIN", &admin);
    let mut by_option = Command::new(dispatcher_bin());
    // The command line takes precedence.
    by_option.arg("status").arg("--admin").arg(&admin).env("DISPATCHER_ADMIN", "/nonexistent");
    let mut by_config = Command::new(dispatcher_bin());
    by_config.arg("status").arg("--config").arg(config).env("DISPATCHER_ADMIN", "/nonexistent");
    for command in [&mut by_variable, &mut by_option, &mut by_config] {
        let ran = finish(command);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""));
        assert!(ran.out.ends_with('\n') && !ran.out.ends_with("\n\n"), "{:?}", ran.out);
        let rows: Vec<Vec<&str>> =
            ran.out.lines().map(|line| line.split_whitespace().collect()).collect();
        let row = |start: [&str; 2]| {
            let row = rows.iter().find(|row| row.starts_with(&start));
            row.unwrap_or_else(|| panic!("{start:?}: {}", ran.out))[2..].join(" ")
        };
        let instance = dispatcher.status().instance;
        let pid = format!("pid {} instance {instance} up ", dispatcher.process.pid());
        assert!(row(["dispatcher", env!("CARGO_PKG_VERSION")]).starts_with(&pid));
        let address = dispatcher.address("web").to_string();
        assert_eq!(row(["web", &address]), "web accepting 3");
        assert_eq!(row(["web", "least-connections"]), "ready 2 3 0");
        assert!(row(["web", "w0"]).starts_with("active "));
        assert!(row(["web", "w1"]).starts_with("active "));

        let json = finish(command.arg("--json"));
        assert_eq!((json.code, json.err.as_str()), (0, ""));
        assert!(json.out.ends_with("}\n"), "{:?}", json.out);
        let status: Status = serde_json::from_str(&json.out).unwrap();
        assert_conserved(&status);
        assert_eq!((status.accepted, pool(&status, "web").workers.len()), (3, 2));
    }
}

#[test]
fn status_without_a_dispatcher_exits_with_69() {
    let temp = configure(CONFIG);
    let socket = temp.path().join("admin.sock");
    let absent = with_config("status", temp.path());
    // A socket file without a listening process gives the same result.
    drop(UnixListener::bind(&socket).unwrap());
    let dead = run(&["status", "--admin", socket.to_str().unwrap()]);
    for (ran, from) in [(absent, "config "), (dead, "--admin")] {
        assert_eq!((ran.code, ran.out.as_str()), (69, ""));
        assert!(
            ran.err.starts_with("dispatcher: is the dispatcher running? tried "),
            "{}",
            ran.err
        );
        assert!(
            ran.err.contains(socket.to_str().unwrap()) && ran.err.contains(from),
            "{}",
            ran.err
        );
    }
}

#[test]
fn missing_permission_exits_with_77() {
    // The status with a closed stdout.
    let dispatcher = Dispatcher::start(CONFIG);
    let admin = dispatcher.admin();
    if !geteuid().is_root() {
        std::fs::set_permissions(&admin, Permissions::from_mode(0o000)).unwrap();
    }
    let ran = finish(unprivileged(&dispatcher.dir).arg("status").arg("--admin").arg(&admin));
    assert_eq!((ran.code, ran.out.as_str()), (77, ""), "{}", ran.err);
    let said = format!("{}: permission denied", admin.display());
    assert!(ran.err.contains(&said) && ran.err.contains("admin_socket_mode"), "{}", ran.err);
    // A socket without write permission.
    let temp = configure(CONFIG);
    let mut command = unprivileged(temp.path());
    std::fs::set_permissions(temp.path(), Permissions::from_mode(0o555)).unwrap();
    let ran = finish(command.args(["run", "--config"]).arg(temp.path().join("dispatcher.toml")));
    assert_eq!(ran.code, 77, "{}", ran.err);
    assert!(ran.err.contains("dispatch.sock: Permission denied"), "{}", ran.err);
    std::fs::set_permissions(temp.path(), Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn spawned_processes_inherit_no_descriptors() {
    let worker = example("test-worker");
    let temp =
        configure(&format!("{CONFIG}[pool.web.spawn]\ncommand = [{worker:?}, \"blocking\"]\n"));
    let mut command = Command::new("sh");
    let limited = "ulimit -S -n 300 && ulimit -H -n 2000 && exec \"$0\" \"$@\"";
    command.args(["-c", limited, dispatcher_bin()]).env_remove("NOTIFY_SOCKET");
    let mut dispatcher = Dispatcher::start_as(temp.path(), &mut command);
    dispatcher.wait_joined("web", 1);
    assert_eq!(limits(dispatcher.process.pid()), ["2000", "2000"]);
    let status = dispatcher.status();
    let worker = &pool(&status, "web").workers[0];
    assert_eq!(limits(worker.pid), ["300", "2000"]);
    // The worker offers to hold fewer connections.
    assert!(worker.max_connections < 300, "{worker:?}");
    Client::connect(dispatcher.address("web")).unwrap().finish();
    let pid = worker.pid;
    assert!(dispatcher.stop().success());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn the_service_manager_is_notified() {
    let temp = configure(CONFIG);
    let path = temp.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 100];
    let mut hear = || {
        let count = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..count].to_vec()).unwrap()
    };
    let mut command = Command::new(dispatcher_bin());
    let mut dispatcher = Dispatcher::start_as(temp.path(), command.env("NOTIFY_SOCKET", path));
    assert_eq!(hear(), "READY=1\n");
    assert!(dispatcher.stop().success());
    assert_eq!(hear(), "STOPPING=1\n");
}

#[test]
fn the_dispatcher_serves_without_its_service_manager() {
    let temp = configure(CONFIG);
    let dead = temp.path().join("notify");
    drop(UnixDatagram::bind(&dead).unwrap());
    let mut command = Command::new(dispatcher_bin());
    let mut dispatcher = Dispatcher::start_as(temp.path(), command.env("NOTIFY_SOCKET", dead));
    let _worker = dispatcher.workers("blocking", "web", 1);
    Client::connect(dispatcher.address("web")).unwrap().finish();
    assert!(dispatcher.log().contains("event=not_notified"));
    assert!(dispatcher.stop().success());
}

#[test]
fn sockets_for_another_process_are_ignored() {
    // Descriptor 3 is not used.
    let with_sockets = |command: &mut Command| {
        let variables = [("LISTEN_PID", "1"), ("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "web")];
        command.envs(variables);
    };
    let temp = configure(CONFIG);
    let mut command = Command::new(dispatcher_bin());
    with_sockets(&mut command);
    let mut dispatcher = Dispatcher::start_as(temp.path(), command.env_remove("NOTIFY_SOCKET"));
    let log = dispatcher.log();
    assert!(!log.contains("inherited=true") && !log.contains("event=socket"), "{log}");
    assert!(dispatcher.stop().success());

    write_config(temp.path(), &CONFIG.replace("127.0.0.1:0", "systemd:web"));
    let mut command = Command::new(dispatcher_bin());
    with_sockets(&mut command);
    let ran = finish(command.args(["run", "--config"]).arg(temp.path().join("dispatcher.toml")));
    assert_eq!(ran.code, 78);
    let said = "systemd:web: no socket of this name; no other sockets were passed";
    assert!(ran.err.contains(said) && ran.err.contains("FileDescriptorName=web"), "{}", ran.err);
}
