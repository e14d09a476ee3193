//! What the tests share: a namespace, a cgroup, servers in it, and what the kernel says of sockets.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::shared_lab::Home;
use dispatch_steer::machine::{self, Places};
use dispatch_steer::{Options, Steering, WorkerSettings, second};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use test_support::{descriptors, skip, skip_on_this_kernel, wait_for, wait_until};

/// How long a killed process may take to leave its cgroup after it was waited for.
const LEAVES: Duration = Duration::from_secs(10);

/// The public port of every test.
pub const PUBLIC: u16 = 8000;
pub const FIRST_PORT: u16 = 9000;

pub const V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PUBLIC);
pub const V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), PUBLIC);

/// Accepts and keeps connections until the client ends them; says hello to each.
pub const KEEPER: &str = r#"
import socket, selectors, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
listener = socket.socket(family)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if len(sys.argv) > 3: listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(sys.argv[3]))
listener.bind((sys.argv[1], int(sys.argv[2])))
listener.listen(4096)
kept = []
poll = selectors.DefaultSelector()
poll.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in poll.select():
        if key.fileobj is listener:
            client, _ = listener.accept()
            client.sendall(b"hello\n")
            poll.register(client, selectors.EVENT_READ)
            continue
        try: data = key.fileobj.recv(4096)
        except OSError: data = b""
        if data == b"half\n": continue
        # The client's end is answered by the server's only when the client asks for it.
        if data == b"" and key.data == "stay":
            poll.unregister(key.fileobj); kept.append(key.fileobj); continue
        if data == b"stay\n": poll.modify(key.fileobj, selectors.EVENT_READ, "stay"); continue
        poll.unregister(key.fileobj); key.fileobj.close()
"#;

/// Listens and never accepts.
pub const DEAF: &str = r#"
import socket, sys, time
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((sys.argv[1], int(sys.argv[2])))
listener.listen(int(sys.argv[3]))
time.sleep(600)
"#;

/// A namespace and a cgroup with servers, steered.
pub struct Lab {
    pub steering: Option<Steering>,
    pub servers: Vec<Server>,
    pub files: TempDir,
    pub cgroup: Cgroup,
    /// The cgroup of the calling thread, if that opens the listeners.
    pub home: Option<Home>,
}

/// One server process.
pub struct Server {
    pub port: u16,
    pub child: Child,
}

pub struct Cgroup(pub PathBuf);

/// Whether this machine can steer; says visibly why not.
pub fn can_steer() -> bool {
    let missing: Vec<String> = machine::findings(&Places::default())
        .into_iter()
        .filter(|finding| !finding.ok && !finding.optional)
        .map(|finding| finding.found)
        .collect();
    if !missing.is_empty() {
        skip_on_this_kernel(&missing.join("; "));
        return false;
    }
    if !nix::unistd::geteuid().is_root() {
        skip("a network namespace of the test's own needs root");
        return false;
    }
    true
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

/// Runs a command that must succeed, in the namespaces of the calling thread; its output.
pub fn run(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let out = Command::new(words[0]).args(&words[1..]).output().unwrap_or_else(|error| {
        panic!("{line}: {error}");
    });
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

impl Lab {
    /// Moves the calling thread to a namespace of its own and steers there, without workers.
    /// `None`, after a notice, if that is not possible here.
    pub fn new() -> Option<Lab> {
        Lab::with_wait(Duration::ZERO)
    }

    pub fn with_wait(wait: Duration) -> Option<Lab> {
        if !can_steer() || !has(&["ip", "ss", "python3", "sh"]) || !descriptors(8_000) {
            return None;
        }
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        run("ip link set lo up");
        let cgroup = Cgroup::new();
        let mut steering = Steering::load(&Options { cgroup: cgroup.0.clone(), wait }).unwrap();
        steering.add_public(V4).unwrap();
        steering.add_public(V6).unwrap();
        let files = tempfile::tempdir().unwrap();
        Some(Lab { steering: Some(steering), servers: Vec::new(), files, cgroup, home: None })
    }

    /// With this many keepers of connections, at IPv4 addresses.
    pub fn keepers(many: u32) -> Option<Lab> {
        let mut lab = Lab::new()?;
        for _ in 0..many {
            lab.keeper("127.0.0.1");
        }
        Some(lab)
    }

    /// Pins the programs; the directory of the pins, in the first one.
    pub fn pin(&mut self) -> (TempDir, PathBuf) {
        let mounted = tempfile::tempdir().unwrap();
        own_bpffs(mounted.path());
        let pins = mounted.path().join("pool");
        self.steering = Some(self.steering.take().unwrap().pin(&pins).unwrap());
        (mounted, pins)
    }

    pub fn steering(&mut self) -> &mut Steering {
        self.steering.as_mut().unwrap()
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup.0
    }

    /// Adds a worker and starts its server with these arguments; `PORT` stands for its port.
    pub fn start(&mut self, command: &[&str]) -> u32 {
        let worker = self.announce();
        self.spawn(worker, command);
        self.wait_listening(worker);
        worker
    }

    /// Adds a worker without a server.
    pub fn announce(&mut self) -> u32 {
        let worker = self.servers.len() as u32;
        let port = FIRST_PORT + worker as u16;
        self.steering().add_port(worker, port).unwrap();
        self.steering().set_worker(worker, WorkerSettings::new(1)).unwrap();
        let child = Command::new("true").spawn().unwrap();
        self.servers.push(Server { port, child });
        worker
    }

    /// Starts the server of a worker in the cgroup.
    pub fn spawn(&mut self, worker: u32, command: &[&str]) {
        let port = self.servers[worker as usize].port.to_string();
        let log = File::create(self.log_of(worker)).unwrap();
        let words = command.iter().map(|word| if *word == "PORT" { port.as_str() } else { word });
        let child = self.in_cgroup(words).stderr(log).spawn().unwrap();
        let mut old = std::mem::replace(&mut self.servers[worker as usize].child, child);
        let _ = old.kill();
        let _ = old.wait();
    }

    /// A Python server that is no worker of [`Lab::steering`]; killed when dropped.
    pub fn server(&self, port: u16, code: &str) -> Server {
        self.server_at("127.0.0.1", port, code)
    }

    pub fn server_at(&self, address: &str, port: u16, code: &str) -> Server {
        let text = port.to_string();
        let words = ["python3", "-c", code, address, &text];
        Server { port, child: self.in_cgroup(words.into_iter()).spawn().unwrap() }
    }

    pub fn in_cgroup<'a>(&self, words: impl Iterator<Item = &'a str>) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo 0 > \"$0\"/cgroup.procs && exec \"$@\""])
            .arg(&self.cgroup.0)
            .args(words)
            .current_dir(self.files.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    pub fn log_of(&self, worker: u32) -> PathBuf {
        self.files.path().join(format!("{worker}.log"))
    }

    pub fn wait_listening(&mut self, worker: u32) {
        let log = self.log_of(worker);
        wait_until("the server to listen", || {
            let counts = self.steering().counts(worker).unwrap();
            assert_eq!(counts.problem(), None, "{}", fs::read_to_string(&log).unwrap_or_default());
            counts.listeners != [0, 0]
        });
    }

    pub fn keeper(&mut self, address: &str) -> u32 {
        self.start(&["python3", "-c", KEEPER, address, "PORT"])
    }

    /// Kills the server of a worker and waits until the programs know.
    pub fn kill(&mut self, worker: u32) {
        let server = &mut self.servers[worker as usize];
        server.child.kill().unwrap();
        server.child.wait().unwrap();
        wait_until("the listener to be gone", || {
            self.steering().counts(worker).unwrap().listeners == [0, 0]
        });
    }

    /// Live connections by worker.
    pub fn live(&mut self) -> Vec<i64> {
        (0..self.servers.len() as u32)
            .map(|worker| self.steering().counts(worker).unwrap().live)
            .collect()
    }

    /// Handshakes under way, of all workers.
    pub fn pending(&mut self) -> u64 {
        let workers = 0..self.servers.len() as u32;
        workers.map(|worker| self.steering().counts(worker).unwrap().pending(second())).sum()
    }

    /// Connections whose handshake was completed, by worker.
    pub fn total(&mut self) -> Vec<u64> {
        (0..self.servers.len() as u32)
            .map(|worker| self.steering().counts(worker).unwrap().total)
            .collect()
    }

    /// Waits until the counts are those of the kernel's own list of sockets, worker by worker, and
    /// no handshake counts. Connections that wait to be accepted have no process there.
    pub fn settled(&mut self) {
        wait_until("counts to equal the kernel's", || {
            let live = self.live();
            let sockets = sockets_by_process();
            let own = |server: &Server| sockets.get(&server.child.id()).copied().unwrap_or(0);
            let kernel: Vec<i64> = self.servers.iter().map(own).collect();
            let pending = self.pending();
            live == kernel && pending == 0 && !sockets.contains_key(&0)
        });
        for _ in 0..2 {
            assert_eq!(self.steering().reconcile().unwrap(), [], "nothing is to be corrected");
        }
    }

    /// As [`Lab::settled`] at the end of a test: every client is gone.
    pub fn empty(&mut self) {
        // Servers answer the ends of their clients one after the other.
        wait_until("the last connections to end", || self.live().iter().all(|&live| live == 0));
        self.settled();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Detached first, so that a failed test shows no second failure.
        self.steering = None;
        self.servers.clear();
    }
}

impl Server {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Cgroup {
    pub fn new() -> Cgroup {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = machine::cgroup2_mount(&mounts).unwrap();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("dispatch-steer-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Cgroup(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + LEAVES;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Sockets at the servers' side that are connected or half-closed by the client, by process. 0:
/// those without a process, which wait to be accepted.
pub fn sockets_by_process() -> BTreeMap<u32, i64> {
    let mut found = BTreeMap::new();
    for state in ["established", "close-wait"] {
        for line in run(&format!("ss -tnpH state {state}")).lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let port = |word: &str| word.rsplit(':').next().and_then(|port| port.parse().ok());
            let local: u16 = port(words[2]).unwrap();
            if local != PUBLIC && !(FIRST_PORT..FIRST_PORT + 100).contains(&local) {
                continue;
            }
            let pid = line.split("pid=").nth(1).and_then(|rest| rest.split(',').next());
            *found.entry(pid.map_or(0, |pid| pid.parse().unwrap())).or_insert(0) += 1;
        }
    }
    found
}

/// Gives the calling thread a bpffs that no other process sees.
pub fn own_bpffs(folder: &Path) {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    run("mount --make-rprivate /");
    run(&format!("mount -t bpf bpf {}", folder.display()));
}

/// Connects and reads the keeper's hello.
pub fn connect(to: SocketAddr) -> TcpStream {
    let mut client = dial(to);
    read_hello(&mut client);
    client
}

pub fn read_hello(client: &mut TcpStream) {
    let mut hello = [0; 6];
    client.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello\n");
}

pub fn dial(to: SocketAddr) -> TcpStream {
    let client = TcpStream::connect_timeout(&to, Duration::from_secs(20)).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client
}

/// One HTTP request; the whole answer.
pub fn http(to: SocketAddr) -> String {
    let mut client = dial(to);
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

/// The largest difference of two workers.
pub fn spread(counts: &[i64]) -> i64 {
    counts.iter().max().unwrap() - counts.iter().min().unwrap()
}

/// Waits for a value of the programs.
pub fn eventually<T: PartialEq + std::fmt::Debug>(
    what: &str,
    wanted: T,
    mut now: impl FnMut() -> T,
) {
    wait_for(what, || (now() == wanted).then_some(()));
}
