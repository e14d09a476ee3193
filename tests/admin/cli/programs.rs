//! JSON output of commands, and commands with a busy, missing or wrong dispatcher.

use super::*;

#[test]
fn check_prints_json() {
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
fn follow_ends_without_a_reader() {
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
        // From here on there is nothing to print.
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
fn very_long_durations_do_not_overflow() {
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

/// Plays the dispatcher: one answer to each request; records the requests.
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

/// The first line of a complete request.
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
fn waiting_for_a_drain_survives_a_busy_dispatcher() {
    let temp = tempfile::tempdir().unwrap();
    let socket = temp.path().join("admin.sock");
    let empty = serde_json::to_string(&Status::default()).unwrap();
    let busy = || ("503 Service Unavailable", r#"{"error":"busy"}"#.to_owned());
    let draining = r#"{"workers":[{"id":7,"pool":"web","name":"a","state":"draining","load":1}]}"#;
    let plan = vec![("200 OK", draining.to_owned()), busy(), busy(), ("200 OK", empty)];
    let dispatcher = play(socket.clone(), plan);
    let ran = run(&["drain", "7", "--wait", "--admin", socket.to_str().unwrap()]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.err.contains("1 of 1 worker drained"), "{ran:?}");
    let asked = dispatcher.join().unwrap();
    assert_eq!(asked.iter().filter(|line| line.starts_with("get /v1/status")).count(), 3);
}

#[test]
fn a_slow_reload_prints_a_notice() {
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
    // The answer comes after the command has printed that it waits.
    wait_until("it to say that it waits", || said().starts_with("dispatcher: waiting for "));
    answer(&stream, "200 OK", r#"{"file":"f"}"#);
    assert_eq!(process.wait().code(), Some(0), "{}", said());
    assert_eq!(said().lines().count(), 1);
}

#[test]
fn reload_finds_the_dispatcher_or_explains_why_not() {
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
    // The changed file names another socket, so the command finds the dispatcher only by the old
    // one.
    std::fs::write(&file, good.replace("admin.sock", "other.sock")).unwrap();
    let ran = reload(None);
    assert_eq!(ran.code, 69, "{ran:?}");
    assert!(
        ran.err.contains("if admin_socket in the file has changed")
            && ran.err.contains("--admin PATH"),
        "{ran:?}"
    );
    let ran = reload(Some(&dispatcher.admin()));
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.contains("needs a restart, not changed: admin_socket\n"), "{ran:?}");
    // The output has the mistake, not the missing dispatcher.
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
