//! Ready checks: a process that replaces another one is asked for a path before it gets clients.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use dispatcher::api::status::Status;
use test_support::{Dispatcher, PATIENCE, wait_until};

use crate::place::*;

/// An HTTP server, unless it stalls: then it accepts one connection, and no more. It answers `/health` with the status that a file has, and other paths with
/// `hello` and its process id; it writes down who was asked for `/health`.
const SERVER: &str = r#"
import os, socket, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
folder = sys.argv[1]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        status, text = 200, b"hello %d\n" % os.getpid()
        if self.path == "/health":
            status = int(open(folder + "/health").read())
            with open(folder + "/asked", "a") as asked:
                asked.write("%d\n" % os.getpid())
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *_): pass
if sys.argv[2] == "fd":
    server = ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(sys.argv[3]))
    server.server_name, server.server_port = "", 0
else:
    server = ThreadingHTTPServer((sys.argv[2], int(sys.argv[3])), Handler)
if os.path.exists(folder + "/stalls"):
    server.socket.accept()
    time.sleep(600)
server.serve_forever()
"#;

/// Starts two servers that answer a check with this status, with ports of their own or shared ones.
fn start(ports: &str, timeout: &str, health: &str) -> Dispatcher {
    let arguments = if ports == "own" { ["{addr}", "{port}"] } else { ["fd", "{fd}"] };
    let dispatcher = Dispatcher::start(&format!(
        "{}[pool.web]\nmode = \"steer\"\nports = {ports:?}\nhandoff_timeout = \"200ms\"\n[pool.web.spawn]\nprocesses = 2\n\
         command = [\"python3\", \"-c\", {}, \"DIR\", {:?}, {:?}]\n\
         ready_check = \"/health\"\nready_timeout = {timeout:?}\n",
        listener(),
        quoted(SERVER),
        arguments[0],
        arguments[1]
    ));
    std::fs::write(dispatcher.dir.join("health"), health).unwrap();
    ready(&dispatcher, 2);
    dispatcher
}

/// The process that answers a client.
fn ask() -> i32 {
    let mut stream = TcpStream::connect_timeout(&PUBLIC, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text.rsplit_once("hello ").unwrap().1.trim().parse().unwrap()
}

/// The processes that were asked for `/health`, in order.
fn asked(folder: &Path) -> Vec<i32> {
    let text = std::fs::read_to_string(folder.join("asked")).unwrap_or_default();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

fn checks(status: &Status) -> (u64, u64) {
    let processes = status.pools[0].processes.as_ref().unwrap();
    (processes.ready_checks_passed, processes.ready_checks_failed)
}

#[test]
fn a_process_gets_no_clients_before_it_has_answered_well() {
    if !enter() {
        return;
    }
    for ports in ["own", "shared"] {
        let dispatcher = start(ports, "60s", "503");
        let before: BTreeSet<i32> =
            processes_of(&dispatcher.status().pools[0]).into_iter().collect();
        assert!(asked(&dispatcher.dir).is_empty(), "they replace no other process");
        command(&dispatcher, &["restart", "web"]);
        wait_until("a process to be asked repeatedly", || asked(&dispatcher.dir).len() >= 3);
        assert!((0..20).all(|_| before.contains(&ask())), "{ports}");
        let only: BTreeSet<i32> = asked(&dispatcher.dir).into_iter().collect();
        assert!(only.len() == 1 && only.is_disjoint(&before), "{ports}: {only:?}");
        assert_eq!(checks(&dispatcher.status()), (0, 0));

        std::fs::write(dispatcher.dir.join("health"), "204").unwrap();
        let status = dispatcher.wait_status("both to be replaced", |status| {
            let now = processes_of(&status.pools[0]);
            checks(status).0 == 2 && now.len() == 2 && !now.iter().any(|pid| before.contains(pid))
        });
        let now: BTreeSet<i32> = processes_of(&status.pools[0]).into_iter().collect();
        assert!((0..20).all(|_| now.contains(&ask())), "{ports}");
        let all: BTreeSet<i32> = asked(&dispatcher.dir).into_iter().collect();
        assert_eq!(all, now, "{ports}");
        wait_loads(&dispatcher, &[0, 0]);
    }
}

#[test]
fn a_version_that_answers_badly_replaces_none() {
    if !enter() {
        return;
    }
    for ports in ["own", "shared"] {
        let dispatcher = start(ports, "5s", "404");
        let before = processes_of(&dispatcher.status().pools[0]);
        let refusal = refused(&dispatcher, &["restart", "web", "--wait"]);
        assert!(refusal.contains("GET /health was answered with 404 Not Found"), "{refusal}");
        assert!((0..20).all(|_| before.contains(&ask())), "{ports}");
        let status = dispatcher.wait_status("the new one to be gone", |status| {
            processes_of(&status.pools[0]).iter().all(|pid| before.contains(pid))
        });
        assert_eq!((checks(&status), status.pools[0].workers.len()), ((0, 1), 2), "{ports}");
    }
}

/// What waits in the queue of a worker that does not accept moves to others. A check does not: their
/// answer is not that of the new process.
#[test]
fn a_process_that_does_not_accept_is_not_ready_because_another_one_answers() {
    if !enter() {
        return;
    }
    let dispatcher = start("shared", "2s", "200");
    let before = processes_of(&dispatcher.status().pools[0]);
    std::fs::write(dispatcher.dir.join("stalls"), "").unwrap();
    let refusal = refused(&dispatcher, &["restart", "web", "--wait"]);
    assert!(refusal.contains("is not ready: "), "{refusal}");
    let trusted = dispatcher.log().matches("event=worker_trusted").count();
    assert_eq!(trusted, 0, "a check that was reset was not accepted: {}", dispatcher.log());
    assert!((0..20).all(|_| before.contains(&ask())));
    assert_eq!(checks(&dispatcher.status()), (0, 1));
}
