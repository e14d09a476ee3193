//! What the tests share: a network namespace with a dispatcher, servers and clients.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use dispatch_steer::machine;
use dispatcher::api::status::{PoolStatus, Status};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use test_support::{
    Dispatcher, PATIENCE, assert_conserved, configure, skip, skip_on_this_kernel, wait_for,
    wait_until,
};

/// The public address of every test.
pub const PUBLIC: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8000);

/// Says hello to each connection and keeps it until the client ends it. Ends with SIGTERM. Its
/// arguments are an address and a port; or `fd`, the first listener that it inherits, and how many
/// seconds it needs to start. With SIGUSR1 it closes its first listener.
pub const KEEPER: &str = r#"
import os, selectors, signal, socket, sys, time
def close(*_):
    poll.unregister(listeners[0])
    listeners[0].close()
signal.signal(signal.SIGUSR1, close)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if sys.argv[1] == "fd":
    assert int(os.environ["LISTEN_PID"]) == os.getpid()
    many = int(os.environ["LISTEN_FDS"])
    assert len(os.environ["LISTEN_FDNAMES"].split(":")) == many
    time.sleep(float(sys.argv[3]) if len(sys.argv) > 3 else 0)
    listeners = [socket.socket(fileno=int(sys.argv[2]) + n) for n in range(many)]
else:
    listeners = [socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=4096)]
poll = selectors.DefaultSelector()
for listener in listeners:
    listener.setblocking(False)
    poll.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in poll.select():
        if key.fileobj in listeners:
            try: client, _ = key.fileobj.accept()
            except BlockingIOError: continue
            try: client.sendall(b"hello %d\n" % os.getpid())
            except OSError: client.close(); continue
            poll.register(client, selectors.EVENT_READ)
            continue
        try: data = key.fileobj.recv(4096)
        except OSError: data = b""
        if not data:
            poll.unregister(key.fileobj)
            key.fileobj.close()
"#;

/// The configuration of a pool `web` at [`PUBLIC`] with so many keepers.
pub fn keepers(processes: u32, more: &str) -> String {
    let pool = format!("[pool.web]\nmode = \"steer\"\nwait_for_worker = \"2s\"\n{more}");
    format!("{}{pool}\n{}", listener(), spawn(processes, &["python3", "-c", KEEPER]))
}

/// A configuration whose processes, and the kernel's choice, outlive the dispatcher, in a
/// directory; and the bpffs of the pins. `pool` ends with the table of the processes.
pub fn outliving(pool: &str) -> (Bpffs, TempDir) {
    let pins = bpffs();
    let keys = format!("steer_pins = \"{}/pins\"\n", pins.path().display());
    let folder = configure(&format!("{keys}{pool}on_dispatcher_loss = \"serve\"\n"));
    (pins, folder)
}

/// Clients that come one after the other, four at a time. Each must be served.
pub struct Load {
    /// The clients end when it is dropped.
    goes_on: Vec<Sender<()>>,
    served: Arc<AtomicU64>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    pub fn begin() -> Load {
        let served = Arc::new(AtomicU64::new(0));
        let client = |_| {
            let served = Arc::clone(&served);
            let (goes_on, over) = channel::<()>();
            let client = std::thread::spawn(move || {
                while over.recv_timeout(PACE) == Err(RecvTimeoutError::Timeout) {
                    drop(connect());
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
            (goes_on, client)
        };
        let (goes_on, clients) = (0..4).map(client).unzip();
        Load { goes_on, served, clients }
    }

    /// Ends it when 100 more clients were served.
    pub fn end(self) {
        let enough = self.served.load(Ordering::Relaxed) + 100;
        wait_until("more clients", || {
            let ended = self.clients.iter().any(JoinHandle::is_finished);
            ended || self.served.load(Ordering::Relaxed) > enough
        });
        drop(self.goes_on);
        let clients = self.clients.into_iter();
        clients.for_each(|client| client.join().expect("each client was served"));
    }
}

pub fn listener() -> String {
    format!("[[listener]]\nname = \"web\"\naddress = \"{PUBLIC}\"\npool = \"web\"\n")
}

/// `[pool.web.spawn]`; the address follows the command.
pub fn spawn(processes: u32, command: &[&str]) -> String {
    let words = command.iter().copied().chain(["{addr}", "{port}"]);
    let escaped = |word: &str| match word {
        "{addr}" | "{port}" => format!("{word:?}"),
        word => quoted(word),
    };
    let command: Vec<String> = words.map(escaped).collect();
    format!("[pool.web.spawn]\nprocesses = {processes}\ncommand = [{}]\n", command.join(", "))
}

/// A program as it stands in a configuration.
pub fn quoted(program: &str) -> String {
    format!("{:?}", program.replace('{', "{{").replace('}', "}}"))
}

/// Moves the calling thread, and what it starts, to a network namespace of its own. False, after a
/// notice, if the kernel cannot choose here.
pub fn enter() -> bool {
    let findings = machine::findings(&machine::Places::default());
    let missing = findings.iter().find(|it| !it.ok && !it.optional);
    if let Some(missing) = missing {
        // Root may do everything that the kernel supports.
        let notice = if nix::unistd::geteuid().is_root() { skip_on_this_kernel } else { skip };
        notice(&missing.found);
        return false;
    }
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        skip(&format!("no network namespace: {error}"));
        return false;
    }
    has(&["ip", "python3"]) && run(&["ip", "link", "set", "lo", "up"])
}

/// Whether these programs are installed; says visibly if one is not.
pub fn has(tools: &[&str]) -> bool {
    tools.iter().all(|tool| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).any(|folder| folder.join(tool).exists());
        if !found {
            skip(&format!("{tool} is not installed"));
        }
        found
    })
}

/// Runs a command that must succeed.
pub fn run(words: &[&str]) -> bool {
    let out = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
    true
}

/// A directory with a bpffs.
pub struct Bpffs(TempDir);

impl Bpffs {
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Bpffs {
    /// A directory on which something is mounted could not be removed.
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).status();
    }
}

/// A directory in which the calling thread, and what it starts, sees a bpffs of its own.
pub fn bpffs() -> Bpffs {
    let folder = tempfile::tempdir().unwrap();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    run(&["mount", "--make-rprivate", "/"]);
    run(&["mount", "-t", "bpf", "bpf", folder.path().to_str().unwrap()]);
    Bpffs(folder)
}

/// Connects, and waits for the first bytes.
pub fn connect() -> TcpStream {
    try_connect().expect("a client that is served")
}

pub fn try_connect() -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&PUBLIC, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut first = [0; 6];
    stream.read_exact(&mut first)?;
    assert_eq!(&first, b"hello ");
    Ok(stream)
}

/// The pool, once `processes` workers of it are active and listen.
pub fn ready(dispatcher: &Dispatcher, processes: usize) -> PoolStatus {
    let status = dispatcher
        .wait_status("the workers to listen", |status| active(&status.pools[0]).len() == processes);
    status.pools[0].clone()
}

/// Names and loads of the active workers, by name.
pub fn active(pool: &PoolStatus) -> Vec<(String, u64)> {
    let active = pool.workers.iter().filter(|worker| worker.state == "active");
    let mut all: Vec<_> = active.map(|worker| (worker.name.clone(), worker.load)).collect();
    all.sort();
    all
}

/// Waits until the loads of the active workers are these, in the order of their names.
pub fn wait_loads(dispatcher: &Dispatcher, expected: &[u64]) -> Status {
    let mut last = Vec::new();
    wait_for(&format!("the loads {expected:?}"), || {
        let status = dispatcher.status();
        assert_conserved(&status);
        let loads: Vec<u64> = active(&status.pools[0]).into_iter().map(|(_, load)| load).collect();
        if loads != last {
            last.clone_from(&loads);
            eprintln!("loads: {loads:?}");
        }
        (loads == expected).then_some(status)
    })
}

/// Connects so often in turn, each time when the worker has closed the connection before; then
/// waits until the workers have had `all` connections together, and none any more.
pub fn in_turn(dispatcher: &Dispatcher, many: usize, all: u64) -> Status {
    for _ in 0..many {
        let mut client = connect();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        client.read_to_end(&mut Vec::new()).unwrap();
    }
    dispatcher.wait_status("all to be counted", |status| {
        let is_idle = active(&status.pools[0]).iter().all(|(_, load)| *load == 0);
        is_idle && taken(status).iter().sum::<u64>() == all
    })
}

/// The connection is open, and nothing has come since.
#[track_caller]
pub fn assert_open(client: &mut TcpStream) {
    client.set_nonblocking(true).unwrap();
    let nothing = client.read(&mut [0]).expect_err("it is open");
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
}

/// Connections that each worker has had, by name.
pub fn taken(status: &Status) -> Vec<u64> {
    let mut all: Vec<_> =
        status.pools[0].workers.iter().map(|it| (it.name.clone(), it.taken)).collect();
    all.sort();
    all.into_iter().map(|(_, taken)| taken).collect()
}

/// Runs a command of the dispatcher against a running one, which must succeed.
pub fn command(dispatcher: &Dispatcher, arguments: &[&str]) -> String {
    let out = Command::new(test_support::dispatcher_bin())
        .args(arguments)
        .arg("--admin")
        .arg(dispatcher.admin())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// What a command says that fails.
pub fn refused(dispatcher: &Dispatcher, arguments: &[&str]) -> String {
    let mut command = Command::new(test_support::dispatcher_bin());
    let out = command.args(arguments).arg("--admin").arg(dispatcher.admin()).output().unwrap();
    assert!(!out.status.success());
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// The processes that run with this directory as their working directory or argument.
pub fn processes_of(pool: &PoolStatus) -> Vec<i32> {
    pool.workers.iter().map(|worker| worker.pid).collect()
}

/// Whether a process exists, other than as a zombie.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state.is_some_and(|state| state != 'Z')
}

/// A short pause of a load; no test depends on it.
pub const PACE: Duration = Duration::from_millis(2);

/// Whether the directory has any file, at any depth.
pub fn has_files(path: &Path) -> bool {
    let entries = std::fs::read_dir(path).map(|it| it.flatten().collect::<Vec<_>>());
    entries.unwrap_or_default().into_iter().any(|entry| {
        let path = entry.path();
        !path.is_dir() || has_files(&path)
    })
}
