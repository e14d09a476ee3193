//! A directory process of a test.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dispatch_directory::Query;
use dispatch_protocol::relay::Name;
use tempfile::TempDir;
use test_support::{Process, wait_until};
use worker_sdk::relay::{Relay, RelayConfig};

/// A running directory.
pub struct Directory {
    process: Option<Process>,
    dir: TempDir,
}

impl Directory {
    /// Starts with this configuration, to which the socket is added.
    pub fn start(body: &str) -> Directory {
        let dir = tempfile::tempdir().unwrap();
        let mut directory = Directory { process: None, dir };
        directory.configure(body);
        directory.restart();
        directory
    }

    pub fn configure(&self, body: &str) {
        let socket = format!("socket = \"{}\"\n", self.socket().display());
        let body = body.replace("DIR", self.dir.path().to_str().unwrap());
        std::fs::write(self.dir.path().join("directory.toml"), socket + &body).unwrap();
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("relay.sock")
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it (again) and waits until it serves.
    pub fn restart(&mut self) {
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

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn config(&self) -> RelayConfig {
        RelayConfig::new().socket(self.socket()).join_timeout(test_support::PATIENCE)
    }

    pub fn relay(&self, name: &str) -> Relay {
        Relay::connect(self.config().name(name)).wait().unwrap()
    }

    pub fn pid(&self) -> &Process {
        self.process.as_ref().unwrap()
    }

    /// One of its numbers.
    pub fn count(&self, name: &str) -> u64 {
        let namespace = Name::new("default").unwrap();
        let mut query = Query::connect(&self.socket(), &namespace).unwrap();
        let counts = query.stats().unwrap();
        let found = counts.iter().find(|count| count.name.as_str() == name);
        found.unwrap_or_else(|| panic!("no number {name}")).value
    }
}
