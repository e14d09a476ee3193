//! Messages between workers: a real directory, and relays in this process and in others.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod access;
mod chaos;
mod embedded;
mod groups;
mod hostile;
mod messages;
mod outages;
mod presence;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use test_support::{Process, wait_until};
use worker_sdk::relay::{Id, Relay, RelayConfig};

/// A running directory.
struct Directory {
    process: Option<Process>,
    dir: TempDir,
}

impl Directory {
    /// Starts with this configuration, to which the socket is added.
    fn start(body: &str) -> Directory {
        let dir = tempfile::tempdir().unwrap();
        let mut directory = Directory { process: None, dir };
        directory.configure(body);
        directory.restart();
        directory
    }

    fn configure(&self, body: &str) {
        let socket = format!("socket = \"{}\"\n", self.socket().display());
        let body = body.replace("DIR", self.dir.path().to_str().unwrap());
        std::fs::write(self.dir.path().join("directory.toml"), socket + &body).unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("relay.sock")
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it (again) and waits until it serves.
    fn restart(&mut self) {
        self.kill();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_dispatch-directory"));
        command.arg("--config").arg(self.dir.path().join("directory.toml"));
        command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).stderr(log);
        let served = self.log().matches("directory_ready").count();
        let mut process = Process::start("dispatch-directory", &mut command);
        wait_until("the directory to serve", || {
            assert!(process.running(), "it ended:\n{}", self.log());
            self.log().matches("directory_ready").count() > served
        });
        self.process = Some(process);
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn config(&self) -> RelayConfig {
        RelayConfig::new().socket(self.socket()).join_timeout(test_support::PATIENCE)
    }

    fn relay(&self, name: &str) -> Relay {
        Relay::connect(self.config().name(name)).wait().unwrap()
    }

    fn pid(&self) -> &Process {
        self.process.as_ref().unwrap()
    }
}

fn id(text: &str) -> Id {
    Id::new(text).unwrap()
}

/// Waits for the next message of a registration or membership and returns its text.
macro_rules! text_of {
    ($receiver:expr) => {
        $receiver
            .recv()
            .wait_for(test_support::PATIENCE)
            .map(|message| String::from_utf8(message.bytes().to_vec()).unwrap())
    };
}
pub(crate) use text_of;

/// Long enough for anything to happen that must not happen, and not a condition of success.
const MOMENT: Duration = Duration::from_millis(50);
