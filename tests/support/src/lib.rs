//! Helpers of the whole-process tests: real dispatchers, workers and clients.
//!
//! Everything started here is killed when it goes out of scope. Every wait is for a condition, with
//! a deadline.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]
#![allow(missing_debug_implementations, reason = "only tests use these")]

pub mod browser;
pub mod chaos;
pub mod fake_dispatcher;
pub mod forger;
pub mod peer;
mod process;
pub mod reloading;
pub mod shown;
pub mod sigterm;
pub mod stuck_page;
pub mod systemd;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use dispatcher::api::status::{PoolStatus, Status, WorkerStatus};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

pub use process::Process;

/// Enough time on a loaded machine; a test that exceeds it has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives a value.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(what, || condition().then_some(()));
}

/// Reports visibly that a test is skipped, and why; fails instead where every test must run.
pub fn skip(reason: &str) {
    assert!(
        std::env::var_os("REQUIRE_ALL").is_none_or(|value| value != "1"),
        "REQUIRE_ALL=1, but: {reason}"
    );
    // Not `eprintln!`: the test harness hides what that prints in a passing test.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {reason}");
}

/// Reports visibly that a test is skipped because the kernel of this machine refuses what it needs.
/// No tool could be installed for it, so it is a skip everywhere.
pub fn skip_on_this_kernel(reason: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED on this kernel: {reason}");
}

/// Raises this process's descriptor limit; false (after a notice) if `wanted` is not allowed.
pub fn descriptors(wanted: u64) -> bool {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    }
    if hard < wanted {
        skip(&format!("needs {wanted} file descriptors, the hard limit is {hard}"));
    }
    hard >= wanted
}

/// The dispatcher's binary.
pub fn dispatcher_bin() -> &'static str {
    static PATH: OnceLock<String> = OnceLock::new();
    PATH.get_or_init(|| built("dispatcher").into_os_string().into_string().unwrap())
}

/// The path of a built example.
pub fn example(name: &str) -> PathBuf {
    built(&format!("examples/{name}"))
}

/// The path of a program of this build, relative to the running test.
fn built(path: &str) -> PathBuf {
    let mut directory = std::env::current_exe().unwrap();
    directory.pop();
    if directory.ends_with("deps") || directory.ends_with("examples") {
        directory.pop();
    }
    let path = directory.join(path);
    assert!(path.exists(), "{} is not built; run: cargo test --workspace", path.display());
    path
}

/// A running dispatcher with a configuration and directory of its own.
pub struct Dispatcher {
    pub process: Process,
    pub dir: PathBuf,
    _temp: Option<TempDir>,
}

/// A new directory, and a configuration in it whose `DIR` has been replaced by its path.
pub fn configure(body: &str) -> TempDir {
    let temp = tempfile::tempdir().unwrap();
    write_config(temp.path(), body);
    temp
}

pub fn write_config(dir: &Path, body: &str) {
    let sockets = "dispatch_socket = \"DIR/dispatch.sock\"\nadmin_socket = \"DIR/admin.sock\"\n";
    let text = format!("{sockets}{body}").replace("DIR", dir.to_str().unwrap());
    std::fs::write(dir.join("dispatcher.toml"), text).unwrap();
}

impl Dispatcher {
    /// Starts with this configuration (sockets are added; use port 0) and waits until the
    /// dispatcher serves.
    pub fn start(body: &str) -> Dispatcher {
        let temp = configure(body);
        let mut dispatcher = Dispatcher::start_in(temp.path());
        dispatcher._temp = Some(temp);
        dispatcher
    }

    /// Starts in a directory that holds a `dispatcher.toml`; the directory stays.
    pub fn start_in(dir: &Path) -> Dispatcher {
        Dispatcher::start_as(dir, Command::new(dispatcher_bin()).env_remove("NOTIFY_SOCKET"))
    }

    /// Starts with a command to which the program's name is appended.
    pub fn start_as(dir: &Path, command: &mut Command) -> Dispatcher {
        let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
        command.args(["run", "--config"]).arg(dir.join("dispatcher.toml")).stderr(log);
        Dispatcher::start_by(dir, command)
    }

    /// Starts with another destination for the log.
    pub fn start_logging_to(dir: &Path, log: Stdio) -> Dispatcher {
        let mut command = Command::new(dispatcher_bin());
        command.args(["run", "--config"]).arg(dir.join("dispatcher.toml")).stderr(log);
        Dispatcher::start_by(dir, command.env_remove("NOTIFY_SOCKET"))
    }

    /// Starts by a command that becomes the dispatcher.
    pub fn start_by(dir: &Path, command: &mut Command) -> Dispatcher {
        command.stdin(Stdio::null());
        Dispatcher::started(dir, command)
    }

    /// Starts with a listening socket, as systemd passes it.
    pub fn start_with_socket(dir: &Path, socket: OwnedFd, name: &str) -> Dispatcher {
        let script = "exec 3<&0 0</dev/null; \
            LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=\"$2\" exec \"$0\" run --config \"$1\"";
        let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script, dispatcher_bin()]).arg(dir.join("dispatcher.toml")).arg(name);
        command.env_remove("NOTIFY_SOCKET").stdin(Stdio::from(socket)).stderr(log);
        Dispatcher::started(dir, &mut command)
    }

    fn started(dir: &Path, command: &mut Command) -> Dispatcher {
        command.env("DISPATCHER_LOG", "debug").env(DIRECTORY, dir).stdout(Stdio::null());
        let process = Process::start("dispatcher", command);
        let mut dispatcher = Dispatcher { process, dir: dir.to_owned(), _temp: None };
        wait_until("the dispatcher to serve", || {
            assert!(dispatcher.process.running(), "it ended:\n{}", dispatcher.log());
            let health = http_get(&dispatcher.admin(), "/healthz");
            health.is_ok_and(|(status, _)| status == 200)
        });
        dispatcher
    }

    /// Removes the directory when the dispatcher is dropped.
    pub fn keep(&mut self, temp: TempDir) {
        self._temp = Some(temp);
    }

    pub fn admin(&self) -> PathBuf {
        self.dir.join("admin.sock")
    }

    pub fn dispatch(&self) -> PathBuf {
        self.dir.join("dispatch.sock")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub fn fds(&self) -> usize {
        self.process.fds()
    }

    pub fn status(&self) -> Status {
        let (code, body) = http_get(&self.admin(), "/v1/status").unwrap();
        assert_eq!(code, 200, "{body}");
        let status: Status = serde_json::from_str(&body).unwrap();
        assert_conserved(&status);
        status
    }

    /// The sum of all series of a metric.
    pub fn metric(&self, name: &str) -> f64 {
        let (code, body) = http_get(&self.admin(), "/metrics").unwrap();
        assert_eq!(code, 200, "{body}");
        let series = body.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        let values: Vec<f64> =
            series.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
        assert!(!values.is_empty(), "{name} in {body}");
        values.iter().sum()
    }

    pub fn wait_status(&self, what: &str, mut condition: impl FnMut(&Status) -> bool) -> Status {
        let mut last = None;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let status = self.status();
            if condition(&status) {
                return status;
            }
            last = Some(status);
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("waited for {what}; last: {last:#?}\n{}", self.log());
    }

    /// The address a listener is bound to.
    pub fn address(&self, listener: &str) -> SocketAddr {
        let status = self.status();
        let found = status.listeners.iter().find(|l| l.name == listener);
        found.expect("listener").address.parse().expect("an IP address")
    }

    /// Starts a test worker of this flavour (`blocking`, `tokio`, `mio`).
    pub fn worker(&self, flavour: &str, pool: &str, name: &str) -> Process {
        self.worker_with(flavour, pool, name, &[])
    }

    pub fn worker_with(
        &self,
        flavour: &str,
        pool: &str,
        name: &str,
        environment: &[(&str, &str)],
    ) -> Process {
        let mut command = Command::new(example("test-worker"));
        command.arg(flavour).env("DISPATCH_SOCKET", self.dispatch());
        command.env("DISPATCH_POOL", pool).env("DISPATCH_NAME", name);
        command.envs(environment.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(
            File::options().create(true).append(true).open(self.dir.join("worker-log")).unwrap(),
        );
        Process::start(name, &mut command)
    }

    /// Starts `count` workers named `w0`, `w1`, … and waits until all have joined.
    pub fn workers(&self, flavour: &str, pool: &str, count: usize) -> Vec<Process> {
        let workers: Vec<_> =
            (0..count).map(|n| self.worker(flavour, pool, &format!("w{n}"))).collect();
        self.wait_joined(pool, count);
        workers
    }

    pub fn wait_joined(&self, name: &str, count: usize) {
        self.wait_status("workers to join", |status| {
            pool(status, name).workers.iter().filter(|w| w.state == "active").count() == count
        });
    }

    /// Serves clients until every worker has shown several times that it takes connections; no
    /// client stays.
    pub fn prove_all(&self, address: SocketAddr) {
        self.wait_status("all workers to take connections", |status| {
            let workers = || status.pools.iter().flat_map(|pool| &pool.workers);
            let clients: Vec<Client> =
                workers().filter_map(|_| Client::connect(address).ok()).collect();
            clients.into_iter().for_each(Client::finish);
            workers().all(|worker| worker.proven && worker.taken >= 8 && worker.load == 0)
        });
    }

    /// Sends SIGTERM and waits for the end.
    pub fn stop(&mut self) -> ExitStatus {
        self.process.signal(Signal::SIGTERM);
        self.process.wait()
    }
}

/// Children of a process that are not reaped.
pub fn children_of(parent: i32) -> Vec<i32> {
    let is_child = |pid: &i32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        after_name.split(' ').nth(1) == Some(&parent.to_string())
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(is_child).collect()
}

/// A variable of each dispatcher, which its processes inherit: its directory.
const DIRECTORY: &str = "TEST_DISPATCHER_DIRECTORY";

/// The processes of all dispatchers that ran in a directory: they may outlive one.
pub fn started_in(dir: &Path) -> Vec<i32> {
    let entry = format!("{DIRECTORY}={}", dir.display());
    let has_it = |pid: &i32| {
        let all = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        all.split(|byte| *byte == 0).any(|one| one == entry.as_bytes())
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(has_it).collect()
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        // Its workers would continue without it. A stopped dispatcher neither starts processes nor
        // reaps them.
        if self.process.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.process.signal(Signal::SIGSTOP);
            for pid in children_of(self.process.pid()).into_iter().chain(started_in(&self.dir)) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            self.process.kill();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- the dispatcher's log, newest last:");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// `accepted + returned = queued + in flight + taken + Σ closed`, at every instant.
pub fn assert_conserved(status: &Status) {
    let closed: u64 = status.closed.values().sum();
    let (arrived, placed) = (
        status.accepted + status.returned,
        status.queued + status.in_flight + status.taken + closed,
    );
    assert_eq!(arrived, placed, "conservation: {status:?}");
    for worker in status.pools.iter().flat_map(|pool| &pool.workers) {
        let load = worker.base + worker.taken + worker.in_flight - worker.finished;
        assert_eq!(worker.load, load, "load: {worker:?}");
    }
}

pub fn pool<'a>(status: &'a Status, name: &str) -> &'a PoolStatus {
    status.pools.iter().find(|pool| pool.name == name).expect("pool")
}

pub fn worker<'a>(status: &'a Status, name: &str) -> Option<&'a WorkerStatus> {
    status.pools.iter().flat_map(|pool| &pool.workers).find(|worker| worker.name == name)
}

/// The loads of a pool's workers, and the spread between the largest and the smallest.
pub fn loads(status: &Status, name: &str) -> (Vec<u64>, u64) {
    let loads: Vec<u64> = pool(status, name).workers.iter().map(|w| w.load).collect();
    let spread = loads.iter().max().unwrap_or(&0) - loads.iter().min().unwrap_or(&0);
    (loads, spread)
}

/// One request over a Unix socket; the status code and the body.
pub fn http_get(socket: &Path, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let invalid = || std::io::Error::other(format!("not HTTP: {text:?}"));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(invalid)?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(invalid)?;
    Ok((code, body.to_owned()))
}

/// Sends a command to an admin socket; whether it was carried out.
pub fn http_post(socket: &Path, path: &str, body: &str) -> bool {
    let answer = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    answer().is_ok_and(|text| text.starts_with("HTTP/1.1 200 "))
}

/// A client of a test worker: it has read the worker's greeting, `NAME PID LISTENER PEER`.
pub struct Client {
    pub stream: BufReader<TcpStream>,
    pub served_by: String,
    pub pid: i32,
    pub listener: String,
    pub peer: String,
}

impl Client {
    /// Connects and waits for the greeting.
    pub fn connect(address: SocketAddr) -> std::io::Result<Client> {
        Client::greeted(TcpStream::connect(address)?)
    }

    /// Waits for the greeting on an existing connection.
    pub fn greeted(stream: TcpStream) -> std::io::Result<Client> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let [served_by, pid, listener, peer] = words.try_into().expect("a whole greeting");
        let pid = pid.parse().expect("a process id");
        Ok(Client { stream, served_by, pid, listener, peer })
    }

    /// Sends a line and checks that the same line comes back.
    pub fn echo(&mut self, text: &str) {
        writeln!(self.stream.get_mut(), "{text}").unwrap();
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), text);
    }

    /// Ends the connection and waits until the worker has ended it too.
    pub fn finish(mut self) {
        self.stream.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        let _ = self.stream.read_to_end(&mut rest);
    }
}

/// Connects without waiting for anything from the worker.
pub fn connect(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).unwrap()
}

/// How many clients each worker served.
pub fn tally(clients: &[Client]) -> BTreeMap<String, usize> {
    let mut tally = BTreeMap::new();
    for client in clients {
        *tally.entry(client.served_by.clone()).or_insert(0) += 1;
    }
    tally
}

/// A configuration of one listener and one pool, both called `web`; `keys` are the pool's.
pub fn one_pool(keys: &str) -> String {
    format!(
        "[[listener]]\nname = \"web\"\naddress = \"127.0.0.1:0\"\npool = \"web\"\n\n[pool.web]\n{keys}\n"
    )
}

/// A dispatcher with [`one_pool`], and its address.
pub fn start_one_pool(keys: &str) -> (Dispatcher, SocketAddr) {
    let dispatcher = Dispatcher::start(&one_pool(keys));
    let address = dispatcher.address("web");
    (dispatcher, address)
}

/// A worker in this process.
pub fn own_worker(dispatcher: &Dispatcher, name: &str) -> worker_sdk::Worker {
    let config = worker_sdk::WorkerConfig::new().dispatch_socket(dispatcher.dispatch());
    worker_sdk::Worker::connect(config.pool("web").name(name)).unwrap()
}

/// Opens `count` connections that the dispatcher finds all at once.
pub fn connect_at_once(
    dispatcher: &Dispatcher,
    address: SocketAddr,
    count: usize,
) -> Vec<TcpStream> {
    dispatcher.process.signal(Signal::SIGSTOP);
    let streams = (0..count).map(|_| connect(address)).collect();
    dispatcher.process.signal(Signal::SIGCONT);
    streams
}

/// Waits for the greetings of all of them.
pub fn all_greeted(streams: Vec<TcpStream>) -> Vec<Client> {
    streams.into_iter().map(|stream| Client::greeted(stream).unwrap()).collect()
}

/// Waits for a log line, which may come a moment after its event.
pub fn wait_for_log(dispatcher: &Dispatcher, text: &str) {
    wait_until(&format!("the log to say {text}"), || dispatcher.log().contains(text));
}

/// The program, run as a user without privileges; if the test has none, the program itself. `dir`
/// is made accessible to that user.
pub fn unprivileged(dir: &Path) -> Command {
    if !nix::unistd::geteuid().is_root() {
        return Command::new(dispatcher_bin());
    }
    // The user may have no access to the build directory. `cp` makes the copy, because a concurrent
    // fork of this process would hold a copy written here open for writing, and such a file cannot
    // be executed.
    let copy = dir.join("program");
    assert!(
        Command::new("cp").args([dispatcher_bin().as_ref(), &*copy]).status().unwrap().success()
    );
    std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new(copy);
    command.uid(65_534).gid(65_534).current_dir("/");
    command
}
