//! A dispatcher and the processes of the recipes.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use worker_sdk::testing::Dispatcher;

/// Long enough for a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running dispatcher, or `None` with a visible notice if the program is missing; `cargo test
/// --workspace` builds it.
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

/// Reports visibly that a test is skipped, and why; fails if skips are not allowed.
pub fn skip(reason: &str) {
    let required = std::env::var_os("REQUIRE_ALL").is_some_and(|value| value == "1");
    assert!(!required, "REQUIRE_ALL=1, but: {reason}");
    // Not `eprintln!`, whose output the test harness hides in a passing test.
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

/// The process of a recipe; killed on drop.
pub struct Server(Child);

impl Server {
    /// Starts a worker of this dispatcher, and waits until it has joined.
    pub fn behind(dispatcher: &mut Dispatcher, name: &str, arguments: &[&str]) -> Server {
        let server = Server::start(command(name, arguments).envs(dispatcher.environment()));
        dispatcher.wait_for_workers(1).unwrap();
        server
    }

    /// Starts it without a dispatcher.
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

    /// Waits until the process ends.
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

    /// The output so far.
    pub fn output(&mut self) -> String {
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It fails if the process has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Cargo builds examples next to the directory of the test.
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
