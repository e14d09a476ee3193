//! Exit codes: every command that asks a dispatcher, for each reason to fail.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use test_support::*;

/// All such commands.
const ASKING: [&[&str]; 14] = [
    &["status"],
    &["workers"],
    &["top", "--snapshot"],
    &["drain", "1"],
    &["drain", "--all", "--wait"],
    &["resume", "--pool", "web"],
    &["weight", "1", "2"],
    &["scale", "web", "2"],
    &["restart", "web"],
    &["reload"],
    &["log-level"],
    &["log-level", "info"],
    &["history", "web"],
    &["explain", "web"],
];

/// The exit code and the error of a command, which must print nothing else.
fn end(mut program: Command, arguments: &[&str], admin: &Path) -> (i32, String) {
    program.args(arguments).arg("--admin").arg(admin).stdin(Stdio::null());
    let output = program.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert_eq!(out, "", "{arguments:?}");
    assert!(err.starts_with("dispatcher: "), "{arguments:?}: {err}");
    (output.status.code().expect("an exit code"), err)
}

fn ours(arguments: &[&str], admin: &Path) -> (i32, String) {
    end(Command::new(dispatcher_bin()), arguments, admin)
}

/// Answers every request with this text.
fn answering(dir: &Path, answer: &'static str) -> std::path::PathBuf {
    let path = dir.join("pretended.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|count| count > 2) {
                line.clear();
            }
            let _ = stream.write_all(answer.as_bytes());
            let _ = stream.shutdown(std::net::Shutdown::Write);
            // A socket that is closed with unread bytes discards its answer.
            let _ = reader.read_to_end(&mut Vec::new());
        }
    });
    path
}

#[test]
fn no_process_listens() {
    let dir = tempfile::tempdir().unwrap();
    let admin = dir.path().join("admin.sock");
    for arguments in ASKING {
        let (code, error) = ours(arguments, &admin);
        assert_eq!(code, 69, "{arguments:?}: {error}");
        assert!(error.contains("is the dispatcher running? tried "), "{arguments:?}: {error}");
    }
}

#[test]
fn not_for_you() {
    use std::os::unix::fs::PermissionsExt;
    let (dispatcher, _) = start_one_pool("");
    let mode = if nix::unistd::geteuid().is_root() { 0o700 } else { 0o000 };
    std::fs::set_permissions(dispatcher.admin(), PermissionsExt::from_mode(mode)).unwrap();
    let program = unprivileged(&dispatcher.dir);
    for arguments in ASKING {
        let mut again = Command::new(program.get_program());
        if nix::unistd::geteuid().is_root() {
            use std::os::unix::process::CommandExt;
            again.uid(65_534).gid(65_534).current_dir("/");
        }
        let (code, error) = end(again, arguments, &dispatcher.admin());
        assert_eq!(code, 77, "{arguments:?}: {error}");
        assert!(error.contains("admin_socket_mode"), "{arguments:?}: {error}");
    }
}

#[test]
fn too_busy_to_answer() {
    let dir = tempfile::tempdir().unwrap();
    // The exact answer of a dispatcher whose hot thread is overloaded.
    let busy = "HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n\r\n\
                {\"error\":\"the dispatcher is busy or stopping\"}";
    let admin = answering(dir.path(), busy);
    for arguments in ASKING {
        let (code, error) = ours(arguments, &admin);
        assert_eq!(code, 75, "{arguments:?}: {error}");
        assert!(error.contains("busy or stopping"), "{arguments:?}: {error}");
    }
}

#[test]
fn there_and_silent() {
    let (dispatcher, _) = start_one_pool("");
    dispatcher.process.signal(Signal::SIGSTOP);
    std::thread::scope(|scope| {
        for arguments in [&["status"][..], &["drain", "--all"], &["history", "web"]] {
            let admin = dispatcher.admin();
            scope.spawn(move || {
                let (code, error) = ours(arguments, &admin);
                assert_eq!(code, 75, "{arguments:?}: {error}");
                assert!(error.contains("did not answer in time"), "{arguments:?}: {error}");
            });
        }
    });
    dispatcher.process.signal(Signal::SIGCONT);
    dispatcher.status();
}

#[test]
fn no_dispatcher_at_all() {
    for answer in ["HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", "220 mail ready\r\n"] {
        let dir = tempfile::tempdir().unwrap();
        let admin = answering(dir.path(), answer);
        for arguments in ASKING {
            let (code, error) = ours(arguments, &admin);
            assert_eq!(code, 76, "{arguments:?}: {error}");
        }
    }
}

#[test]
fn what_cannot_be_done_to_this_one() {
    let program = example("test-worker");
    let text = format!(
        "{}[pool.web.spawn]\ncommand = [{:?}, \"blocking\"]\nprocesses = 1\n\
         [[listener]]\nname = \"other\"\naddress = \"127.0.0.1:0\"\npool = \"other\"\n[pool.other]\n",
        one_pool(""),
        program.to_str().unwrap()
    );
    let dispatcher = Dispatcher::start(&text);
    dispatcher.wait_joined("web", 1);
    // A worker that is leaving and cannot be resumed.
    let leaving = dispatcher.worker("blocking", "other", "leaving");
    dispatcher.wait_joined("other", 1);
    let _client = Client::connect(dispatcher.address("other")).unwrap();
    leaving.signal(Signal::SIGTERM);
    dispatcher.wait_status("it to leave", |s| worker(s, "leaving").unwrap().state == "draining");
    for (arguments, wanted) in [
        (&["scale", "web", "0"][..], 64),
        (&["scale", "web", "-3"], 64),
        (&["scale", "web", "1025"], 64),
        (&["scale", "web", "many"], 64),
        (&["scale", "other", "2"], 65),
        (&["scale", "wbe", "2"], 66),
        (&["weight", "web/web-1", "0"], 64),
        (&["weight", "web/web-9", "1"], 66),
        (&["resume", "other/leaving"], 65),
        (&["drain", "web"], 64),
        (&["drain", "77"], 66),
        (&["drain", "--pool", "wbe"], 66),
        (&["history", "wbe"], 66),
        (&["explain", "wbe"], 66),
        (&["explain", "web", "--from", "nowhere"], 64),
        (&["workers", "--pool", "wbe"], 66),
        (&["log-level", "loud"], 64),
        (&["frobnicate"], 64),
    ] {
        let mut command = Command::new(dispatcher_bin());
        command.args(arguments).arg("--admin").arg(dispatcher.admin()).stdin(Stdio::null());
        let output = command.output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(wanted), "{arguments:?}: {error}");
        assert!(!error.is_empty() && output.stdout.is_empty(), "{arguments:?}: {error}");
    }
    // Two different answers to one question.
    assert_eq!(ours(&["workers", "--pool", "wbe"], &dispatcher.admin()).0, 66);
}

#[test]
fn no_reload_while_it_stops() {
    let (mut dispatcher, address) = start_one_pool("handoff_timeout = \"10m\"");
    let lazy = dispatcher.worker_with("blocking", "web", "lazy", &[("TEST_WORKER", "never-take")]);
    dispatcher.wait_joined("web", 1);
    let untaken = connect(address);
    dispatcher.wait_status("one in flight", |status| status.in_flight == 1);
    dispatcher.process.signal(Signal::SIGTERM);
    dispatcher.wait_status("the stop", |status| status.stopping);
    write_config(&dispatcher.dir, &one_pool("policy = \"random\""));
    let (code, error) = ours(&["reload"], &dispatcher.admin());
    assert_eq!(code, 65, "{error}");
    assert!(error.contains("the dispatcher is stopping"), "{error}");
    assert_eq!(pool(&dispatcher.status(), "web").policy, "least-connections");
    // A signal has the same effect, and the stop continues.
    dispatcher.process.signal(Signal::SIGHUP);
    wait_for_log(&dispatcher, "event=reload_refused by=SIGHUP");
    assert!(dispatcher.process.running());
    dispatcher.process.signal(Signal::SIGTERM);
    assert!(dispatcher.process.wait().success());
    drop((lazy, untaken));
}
