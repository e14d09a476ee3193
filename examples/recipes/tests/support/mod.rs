//! A dispatcher, the recipes' programs, and their ends.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use worker_sdk::testing::Dispatcher;

/// Long enough for a loaded machine; a test that needs it has failed anyway.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One that runs, or `None` after a visible notice where there is no such program: `cargo test --workspace` builds it.
pub fn dispatcher() -> Option<Dispatcher> {
    match Dispatcher::start() {
        Ok(dispatcher) => Some(dispatcher),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            skip(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Says visibly that a test is skipped, and why; fails instead where everything must run.
pub fn skip(reason: &str) {
    let required = std::env::var_os("REQUIRE_ALL").is_some_and(|value| value == "1");
    assert!(!required, "REQUIRE_ALL=1, but: {reason}");
    // Not `eprintln!`: the test harness hides what that prints in a passing test.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}");
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A certificate for `a.example.test`, and its key.
pub fn tls_files() -> [&'static str; 2] {
    [
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/policies/tls/cert.der"),
        concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/policies/tls/key.der"),
    ]
}

/// A recipe's program; killed when dropped.
pub struct Server(Child);

impl Server {
    /// Started as a worker of this dispatcher, and joined.
    pub fn behind(dispatcher: &mut Dispatcher, name: &str, arguments: &[&str]) -> Server {
        let server = Server::start(command(name, arguments).envs(dispatcher.environment()));
        dispatcher.wait_for_workers(1).unwrap();
        server
    }

    /// Started without a dispatcher.
    pub fn alone(name: &str, arguments: &[&str], port: u16) -> Server {
        let listen = format!("127.0.0.1:{port}");
        Server::start(command(name, arguments).env("DISPATCH_LISTEN", listen))
    }

    pub fn start(command: &mut Command) -> Server {
        Server(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), signal).unwrap();
    }

    /// Waits for its own end.
    pub fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it has printed.
    pub fn output(&mut self) -> String {
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It fails when the process has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Examples are built beside the directory of the test itself.
pub fn command(name: &str, arguments: &[&str]) -> Command {
    let exe = std::env::current_exe().unwrap();
    let path = exe.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is not built; run: cargo test --workspace", path.display());
    let mut command = Command::new(path);
    for variable in ["DISPATCH_SOCKET", "DISPATCH_POOL", "DISPATCH_LISTEN", "DISPATCH_NAME"] {
        command.env_remove(variable);
    }
    command.args(arguments);
    command
}
