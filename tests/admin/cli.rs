//! The command line as a user meets it: what is printed where, exit codes, what is left alone and what is put away.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod output;

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dispatcher::status::Status;
use nix::unistd::geteuid;
use test_support::*;

const CONFIG: &str = r#"
[[listener]]
name = "web"
address = "127.0.0.1:0"
pool = "web"

[pool.web]
"#;

/// How a command ended, and what it said.
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
fn a_good_configuration_passes() {
    let temp = configure(CONFIG);
    let ran = with_config("check", temp.path());
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(ran.out.contains("dispatcher.toml: ok\nlistener web: 127.0.0.1:0 -> pool web\n"));
    assert!(ran.out.ends_with('\n') && !ran.out.contains("admin_http"));
    write_config(temp.path(), &format!("admin_http = \"127.0.0.1:9900\"\n{CONFIG}"));
    let ran = with_config("check", temp.path());
    assert!(ran.out.ends_with("\nadmin_http: 127.0.0.1:9900, only for reading\n"), "{}", ran.out);
}

#[test]
fn the_sample_configuration_passes() {
    let etc = Path::new(env!("CARGO_MANIFEST_DIR")).join("../etc");
    let ran = with_config("check", &etc);
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
}

#[test]
fn a_mistake_is_shown_in_its_place() {
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
fn no_configuration_is_a_bad_configuration() {
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

    // The first one has noticed nothing.
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
    assert_eq!(again.log().matches("event=stale_socket_removed").count(), 2);
    assert!(again.stop().success());
    assert!(!again.dispatch().exists() && !again.admin().exists());
}

#[test]
fn something_else_in_the_way_is_left_alone() {
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
    // The nearest word counts.
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
fn status_of_nothing_is_69() {
    let temp = configure(CONFIG);
    let socket = temp.path().join("admin.sock");
    let absent = with_config("status", temp.path());
    // A socket file that nobody serves is the same.
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
fn what_is_not_permitted_is_77() {
    // A status for somebody else.
    let dispatcher = Dispatcher::start(CONFIG);
    let admin = dispatcher.admin();
    if !geteuid().is_root() {
        std::fs::set_permissions(&admin, Permissions::from_mode(0o000)).unwrap();
    }
    let ran = finish(unprivileged(&dispatcher.dir).arg("status").arg("--admin").arg(&admin));
    assert_eq!((ran.code, ran.out.as_str()), (77, ""), "{}", ran.err);
    let said = format!("{}: permission denied", admin.display());
    assert!(ran.err.contains(&said) && ran.err.contains("admin_socket_mode"), "{}", ran.err);
    // A socket where one may not write.
    let temp = configure(CONFIG);
    let mut command = unprivileged(temp.path());
    std::fs::set_permissions(temp.path(), Permissions::from_mode(0o555)).unwrap();
    let ran = finish(command.args(["run", "--config"]).arg(temp.path().join("dispatcher.toml")));
    assert_eq!(ran.code, 77, "{}", ran.err);
    assert!(ran.err.contains("dispatch.sock: Permission denied"), "{}", ran.err);
    std::fs::set_permissions(temp.path(), Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn descriptors_are_for_the_dispatcher_and_not_for_its_processes() {
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
    // Which is what it offers to hold.
    assert!(worker.max_connections < 300, "{worker:?}");
    Client::connect(dispatcher.address("web")).unwrap().finish();
    let pid = worker.pid;
    assert!(dispatcher.stop().success());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn the_service_manager_is_told() {
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
fn a_dead_service_manager_is_no_reason_not_to_serve() {
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
fn sockets_for_another_process_are_not_ours() {
    // Descriptor 3 is whatever it is: nobody looks at it.
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

#[test]
fn a_check_for_programs() {
    let temp = configure(CONFIG);
    let file = temp.path().join("dispatcher.toml");
    let check = || {
        let ran =
            finish(Command::new(dispatcher_bin()).args(["check", "--json", "--config"]).arg(&file));
        let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(json["file"], file.to_str().unwrap());
        (ran.code, json)
    };
    let (code, json) = check();
    assert_eq!((code, &json["ok"], json["mistake"].is_null()), (0, &true.into(), true), "{json}");
    let good = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("handof_timeout = \"1s\"\n{good}")).unwrap();
    let (code, json) = check();
    assert_eq!((code, &json["ok"]), (78, &false.into()), "{json}");
    let mistake = &json["mistake"];
    assert_eq!(
        (&mistake["line"], &mistake["column"], &mistake["width"]),
        (&1.into(), &1.into(), &14.into())
    );
    assert_eq!(mistake["message"], "unknown key `handof_timeout`");
    std::fs::remove_file(&file).unwrap();
    let (code, json) = check();
    assert_eq!(code, 78);
    assert!(json["mistake"]["message"].as_str().unwrap().contains("No such file"), "{json}");
}

#[test]
fn who_follows_ends_with_whoever_reads() {
    let dispatcher = Dispatcher::start(&one_pool("history = 10"));
    let _worker = dispatcher.workers("blocking", "web", 1);
    let address = dispatcher.address("web");
    (0..3).for_each(|_| Client::connect(address).unwrap().finish());
    for arguments in [&["history", "web", "--follow"][..], &["status", "--watch", "100ms"]] {
        let mut command = Command::new(dispatcher_bin());
        command.args(arguments).env("DISPATCHER_ADMIN", dispatcher.admin()).stdout(Stdio::piped());
        let mut process = Process::start(arguments[0], &mut command);
        let mut reader = BufReader::new(process.child.stdout.take().unwrap());
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert!(!line.is_empty() && process.running());
        // Nothing more happens that it could write about.
        drop(reader);
        assert_eq!(process.wait().code(), Some(0), "{arguments:?}");
    }
}

#[test]
fn failures_for_programs() {
    let dispatcher = Dispatcher::start(CONFIG);
    let admin = dispatcher.admin();
    let fails = |arguments: &[&str], socket: &Path| {
        let ran = finish(
            Command::new(dispatcher_bin()).args(arguments).arg("--json").arg("--admin").arg(socket),
        );
        assert!(ran.code != 0 && ran.err.starts_with("dispatcher: "), "{ran:?}");
        assert_eq!(ran.out.lines().count(), 1, "{ran:?}");
        let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        (ran.code, json)
    };
    let (code, json) = fails(&["drain", "web/none"], &admin);
    assert_eq!((code, &json["problem"]), (66, &"not_found".into()), "{json}");
    assert_eq!(json["error"], "there is no worker `web/none`");
    assert!(json["hint"].as_str().unwrap().contains("dispatcher workers"), "{json}");
    let (code, json) = fails(&["scale", "web", "3"], &admin);
    assert_eq!((code, &json["problem"]), (65, &"conflict".into()), "{json}");
    let (code, json) = fails(&["explain", "wep"], &admin);
    assert_eq!(
        (code, &json["problem"], &json["hint"]),
        (66, &"not_found".into(), &"did you mean `web`?".into())
    );
    for arguments in [&["workers", "--pool", "wep"][..], &["history", "wep"]] {
        assert_eq!(fails(arguments, &admin).0, 66);
    }
    for arguments in [&["resume", "9"][..], &["weight", "9", "2"]] {
        assert_eq!(fails(arguments, &admin).1["problem"], "not_found");
    }
    assert_eq!(fails(&["log-level", "loud"], &admin).1["problem"], "invalid");
    write_config(&dispatcher.dir, &format!("nope = 1\n{CONFIG}"));
    let (code, json) = fails(&["reload"], &admin);
    assert_eq!((code, &json["problem"]), (78, &"config".into()), "{json}");
    assert!(json["error"].as_str().unwrap().contains("dispatcher.toml:3:1: "), "{json}");
    let (code, json) = fails(&["status"], Path::new("/nonexistent"));
    assert_eq!((code, &json["problem"]), (69, &"not_running".into()), "{json}");
}

#[test]
fn absurd_durations_are_long_ones() {
    let dispatcher = Dispatcher::start(CONFIG);
    let _worker = dispatcher.workers("blocking", "web", 1);
    const LONGEST: &str = "18446744073709551615s";
    for more in [&["--deadline", LONGEST][..], &["--timeout", LONGEST]] {
        let mut command = Command::new(dispatcher_bin());
        command.args(["drain", "--all", "--wait"]).args(more);
        let ran = finish(command.env("DISPATCHER_ADMIN", dispatcher.admin()));
        assert_eq!(ran.code, 0, "{more:?}: {ran:?}");
    }
}

/// Plays the dispatcher for a command: one answer to each request, and what was asked.
fn play(
    socket: PathBuf,
    answers: Vec<(&'static str, String)>,
) -> std::thread::JoinHandle<Vec<String>> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let mut asked = Vec::new();
        for (status, body) in answers {
            let (stream, _) = listener.accept().unwrap();
            asked.push(hear(&stream));
            answer(&stream, status, &body);
        }
        asked
    })
}

/// The first line of a request, once all of it is there.
fn hear(stream: &UnixStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim_end().is_empty() {
            break;
        }
        lines.push(line.trim_end().to_lowercase());
    }
    let length = lines.iter().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    reader.read_exact(&mut body).unwrap();
    lines.swap_remove(0)
}

fn answer(mut stream: &UnixStream, status: &str, body: &str) {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .unwrap();
}

#[test]
fn a_drain_is_waited_for_although_the_dispatcher_is_busy_for_a_moment() {
    let temp = tempfile::tempdir().unwrap();
    let socket = temp.path().join("admin.sock");
    let nobody = serde_json::to_string(&Status::default()).unwrap();
    let busy = || ("503 Service Unavailable", r#"{"error":"busy"}"#.to_owned());
    let draining = r#"{"workers":[{"id":7,"pool":"web","name":"a","state":"draining","load":1}]}"#;
    let plan = vec![("200 OK", draining.to_owned()), busy(), busy(), ("200 OK", nobody)];
    let dispatcher = play(socket.clone(), plan);
    let ran = run(&["drain", "7", "--wait", "--admin", socket.to_str().unwrap()]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.err.contains("1 of 1 worker drained"), "{ran:?}");
    let asked = dispatcher.join().unwrap();
    assert_eq!(asked.iter().filter(|line| line.starts_with("get /v1/status")).count(), 3);
}

#[test]
fn a_reload_that_takes_its_time_says_so() {
    let temp = tempfile::tempdir().unwrap();
    let socket = temp.path().join("admin.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let words = temp.path().join("words");
    let mut command = Command::new(dispatcher_bin());
    command.args(["reload", "--admin"]).arg(&socket).stdout(Stdio::null());
    let mut process = Process::start("reload", command.stderr(File::create(&words).unwrap()));
    let (stream, _) = listener.accept().unwrap();
    assert!(hear(&stream).starts_with("post /v1/reload"));
    let said = || std::fs::read_to_string(&words).unwrap();
    // It gets no answer before it has said that it waits.
    wait_until("it to say that it waits", || said().starts_with("dispatcher: waiting for "));
    answer(&stream, "200 OK", r#"{"file":"f"}"#);
    assert_eq!(process.wait().code(), Some(0), "{}", said());
    assert_eq!(said().lines().count(), 1);
}

#[test]
fn a_reload_finds_the_dispatcher_or_says_why_not() {
    let dispatcher = Dispatcher::start(CONFIG);
    let file = dispatcher.dir.join("dispatcher.toml");
    let reload = |variable: Option<&Path>| {
        let mut command = Command::new(dispatcher_bin());
        command.arg("reload").env_remove("DISPATCHER_ADMIN");
        match variable {
            Some(path) => command.env("DISPATCHER_ADMIN", path),
            None => command.arg("--config").arg(&file),
        };
        finish(&mut command)
    };
    let good = std::fs::read_to_string(&file).unwrap();
    // The file names another socket, so it cannot be found by that; by the old one it can.
    std::fs::write(&file, good.replace("admin.sock", "other.sock")).unwrap();
    let ran = reload(None);
    assert_eq!(ran.code, 69, "{ran:?}");
    assert!(
        ran.err.contains("if admin_socket was changed") && ran.err.contains("--admin PATH"),
        "{ran:?}"
    );
    let ran = reload(Some(&dispatcher.admin()));
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.contains("needs a restart, and is as before: admin_socket\n"), "{ran:?}");
    // The mistake is shown, not where nobody listens.
    std::fs::write(&file, format!("{good}\n[pool\n")).unwrap();
    let ran = reload(None);
    assert_eq!(ran.code, 78, "{ran:?}");
    assert!(ran.err.contains("| [pool\n") && ran.err.contains("     ^"), "{ran:?}");
}

#[test]
fn the_level_of_the_log_is_shown_and_changed() {
    let dispatcher = Dispatcher::start(CONFIG);
    let level = |arguments: &[&str]| {
        let mut command = Command::new(dispatcher_bin());
        command.arg("log-level").args(arguments).env("DISPATCHER_ADMIN", dispatcher.admin());
        finish(&mut command)
    };
    assert_eq!(level(&[]).out, "debug\n");
    assert_eq!(level(&["error"]).out, "error, debug before\n");
    assert_eq!(level(&[]).out, "error\n");
    assert!(level(&["--json"]).out.contains("\"level\":\"error\""));
    let wrong = level(&["loud"]);
    assert!(wrong.code == 64 && wrong.err.contains("off, error, warn"), "{wrong:?}");
}
