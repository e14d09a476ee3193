//! A real dispatcher for the tests of a server.
//!
//! A server can be tested alone with [`WorkerConfig::listen`] on `127.0.0.1:0` and the address from
//! [`Worker::local_addr`](crate::Worker::local_addr). Behind a dispatcher there are also handoffs,
//! drains and losses of the dispatcher. [`Dispatcher`] starts one in its own directory and kills it
//! on drop.
//!
//! ```no_run
//! use std::io::{Read, Write};
//! use std::net::TcpStream;
//! use worker_sdk::Worker;
//! use worker_sdk::testing::Dispatcher;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dispatcher = Dispatcher::start()?;
//! let worker = Worker::connect(dispatcher.config())?;
//! let mut client = TcpStream::connect(dispatcher.address())?;
//! let mut connection = worker.accept()?.ok_or("drained")?;
//! connection.write_all(b"hello\n")?;
//! drop(connection);
//! let mut text = String::new();
//! client.read_to_string(&mut text)?;
//! assert_eq!(text, "hello\n");
//!
//! dispatcher.command(&["drain", "--pool", "default"])?;
//! assert!(worker.accept()?.is_none());
//! # Ok(())
//! # }
//! ```

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::WorkerConfig;

/// The longest time until a dispatcher serves, and until workers join; a loaded machine is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// The name of the pool and of its listener.
const POOL: &str = "default";

/// A running dispatcher with one listener on a free port of the loopback interface, and one pool,
/// `default`.
#[derive(Debug)]
pub struct Dispatcher {
    binary: PathBuf,
    child: Child,
    dir: Directory,
    address: SocketAddr,
}

/// Removed with its contents on drop.
#[derive(Debug)]
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        // Another program may have cleaned the directory for temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Dispatcher {
    /// Starts a dispatcher and waits until it serves.
    ///
    /// The program is the value of `DISPATCHER_BIN`, or `dispatcher` in the target directory of the
    /// test, in `CARGO_TARGET_DIR`, or on the `PATH`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such program, [`ErrorKind::TimedOut`] if it does not
    /// serve within a minute, [`ErrorKind::Other`], with its log, if it ends.
    pub fn start() -> Result<Dispatcher> {
        Dispatcher::start_with("")
    }

    /// As [`start`](Dispatcher::start), with further keys of the pool, such as `"max_untaken =
    /// 4\n"`, or further tables of the configuration.
    ///
    /// # Errors
    /// As [`start`](Dispatcher::start).
    pub fn start_with(keys: &str) -> Result<Dispatcher> {
        let binary = find(&candidates())?;
        let dir = directory()?;
        let at = dir.0.to_str().ok_or(ErrorKind::InvalidFilename)?;
        let config = format!(
            "dispatch_socket = \"{at}/dispatch.sock\"\nadmin_socket = \"{at}/admin.sock\"\n\n\
             [[listener]]\nname = \"{POOL}\"\naddress = \"127.0.0.1:0\"\npool = \"{POOL}\"\n\n\
             [pool.{POOL}]\n{keys}"
        );
        std::fs::write(dir.0.join("dispatcher.toml"), config)?;
        let mut command = Command::new(&binary);
        command.args(["run", "--config"]).arg(dir.0.join("dispatcher.toml"));
        // It must not act as a service of the manager that runs the tests.
        command.env_remove("NOTIFY_SOCKET").env_remove("LISTEN_FDS").env_remove("LISTEN_PID");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(File::create(dir.0.join("log"))?).spawn()?;
        let unknown = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut dispatcher = Dispatcher { binary, child, dir, address: unknown };
        let end = Instant::now() + PATIENCE;
        dispatcher.address = loop {
            match dispatcher.bound_to() {
                Some(address) => break address,
                None => dispatcher.pause(end, "to serve")?,
            }
        };
        Ok(dispatcher)
    }

    /// The address for clients.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The path of the dispatch socket, for workers.
    pub fn dispatch_socket(&self) -> PathBuf {
        self.dir.0.join("dispatch.sock")
    }

    /// The configuration of a worker in the process of the test.
    pub fn config(&self) -> WorkerConfig {
        WorkerConfig::new().dispatch_socket(self.dispatch_socket()).pool(POOL)
    }

    /// The environment of a worker in a process of its own, for [`Command::envs`].
    pub fn environment(&self) -> [(&'static str, OsString); 2] {
        [("DISPATCH_SOCKET", self.dispatch_socket().into()), ("DISPATCH_POOL", POOL.into())]
    }

    /// Runs the dispatcher's program with these arguments and the admin socket, such as `["drain",
    /// "--pool", "default"]`; returns its output.
    ///
    /// # Errors
    /// [`ErrorKind::Other`], with the error output, if the program fails.
    pub fn command(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.binary);
        let output = command
            .args(arguments)
            .arg("--admin")
            .arg(self.dir.0.join("admin.sock"))
            .stdin(Stdio::null())
            .output()?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            Err(Error::other(format!("dispatcher {}: {said}", arguments.join(" "))))
        }
    }

    /// Waits until the pool has `count` active workers.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] after a minute.
    pub fn wait_for_workers(&mut self, count: usize) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status().unwrap_or_default();
            let workers = status["pools"][0]["workers"].as_array().map_or(&[][..], Vec::as_slice);
            if workers.iter().filter(|worker| worker["state"] == "active").count() == count {
                return Ok(());
            }
            self.pause(end, &format!("to have {count} workers"))?;
        }
    }

    /// The log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.0.join("log")).unwrap_or_default()
    }

    fn status(&self) -> Option<Value> {
        let text = self.command(&["status", "--json"]).ok()?;
        serde_json::from_str(&text).ok()
    }

    fn bound_to(&self) -> Option<SocketAddr> {
        self.status()?["listeners"][0]["address"].as_str()?.parse().ok()
    }

    fn pause(&mut self, end: Instant, what: &str) -> Result<()> {
        let ended = self.child.try_wait()?;
        if let Some(status) = ended {
            return Err(Error::other(format!("the dispatcher ended, {status}:\n{}", self.log())));
        }
        if Instant::now() >= end {
            let text =
                format!("the dispatcher took more than {PATIENCE:?} {what}:\n{}", self.log());
            return Err(Error::new(ErrorKind::TimedOut, text));
        }
        std::thread::sleep(Duration::from_millis(10));
        Ok(())
    }
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        // It fails if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Possible paths of the program, the preferred first.
fn candidates() -> Vec<PathBuf> {
    if let Some(told) = std::env::var_os("DISPATCHER_BIN") {
        return vec![told.into()];
    }
    let mut places = Vec::new();
    // target/debug/deps/test-1234, target/debug/examples/server or target/debug/server
    if let Ok(exe) = std::env::current_exe() {
        places.extend(exe.ancestors().skip(1).take(3).map(Path::to_owned));
    }
    if let Some(target) = std::env::var_os("CARGO_TARGET_DIR") {
        places.extend(["debug", "release"].map(|profile| Path::new(&target).join(profile)));
    }
    if let Some(path) = std::env::var_os("PATH") {
        places.extend(std::env::split_paths(&path));
    }
    places.into_iter().map(|place| place.join("dispatcher")).collect()
}

fn find(candidates: &[PathBuf]) -> Result<PathBuf> {
    candidates.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        let tried: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
        let text = format!(
            "no dispatcher: build or install it, or set DISPATCHER_BIN to its path; looked for {}",
            tried.join(", ")
        );
        Error::new(ErrorKind::NotFound, text)
    })
}

/// A new directory for this user only. Its path is short, because the paths of sockets have a
/// limit.
fn directory() -> Result<Directory> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("dispatcher-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok(Directory(path)),
            // Left by an earlier process with the same id.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_reported_with_the_remedy() {
        let error = find(&["/nonexistent/dispatcher".into(), "/tmp".into()]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let text = error.to_string();
        assert!(
            text.contains("DISPATCHER_BIN") && text.contains("/nonexistent/dispatcher"),
            "{text}"
        );
        assert!(candidates().iter().all(|path| path.ends_with("dispatcher")));
    }

    #[test]
    fn every_directory_is_a_new_one_and_goes() {
        let (one, other) = (directory().unwrap(), directory().unwrap());
        assert_ne!(one.0, other.0);
        let path = one.0.clone();
        assert!(path.is_dir());
        drop(one);
        assert!(!path.exists());
    }
}
