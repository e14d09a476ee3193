//! Where the chaos happens: a network namespace, a bpffs and a cgroup of its own, with the
//! configuration of the pools and the register of the servers.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::io::{Read, Seek, SeekFrom};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dispatcher::api::status::{Status, WorkerStatus};
use simulator::Random;
use test_support::{Process, configure, http_get};

use super::Programs;
use super::cgroup::Cgroup;
use super::client::{Clients, Refusal, Target};
use super::lab;

/// The length of a line in the register: pid, port, pool, time.
pub const ENTRY: usize = 8 + 7 + 7 + 16 + 1;

/// The last lines of the register that may be those of living servers.
const RECENT: u64 = 4_000;

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// The public addresses, each with its pool.
pub const PUBLICS: [(SocketAddr, &str); 6] = [
    (SocketAddr::new(V4, 8000), "web"),
    (SocketAddr::new(V6, 8000), "web"),
    (SocketAddr::new(V6, 8001), "turns"),
    (SocketAddr::new(V4, 8002), "units"),
    (SocketAddr::new(V4, 8003), SHARED),
    (SocketAddr::new(V6, 8003), SHARED),
];

/// The pool whose processes inherit their listeners.
pub const SHARED: &str = "share";

/// Pools whose processes the dispatcher starts, and how many there are without faults.
pub const SPAWNED: [(&str, usize); 3] = [("web", 4), ("turns", 3), (SHARED, 3)];

/// The members of the pool `units`, with their ports.
pub const MEMBERS: [(&str, u16); 3] = [("a", 9001), ("b", 9002), ("c", 9003)];

const POLICIES: [&str; 6] =
    ["least-connections", "round-robin", "random", "two-choices", "hash", "failover"];

/// Clients are refused after this long without a worker.
const WAIT_FOR_WORKER: &str = "3s";

/// One server that was ever started; its number is its place in the register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub number: usize,
    pub pid: i32,
    pub port: u16,
    pub pool: String,
}

/// What clients, nemesis and census share.
pub struct Run {
    pub programs: Programs,
    /// With the configuration, the sockets and all records.
    pub directory: PathBuf,
    pub cgroup: Cgroup,
    pub pins: PathBuf,
    pub clients: Clients,
    _places: (tempfile::TempDir, lab::Bpffs),
}

/// Moves the calling thread, and what it starts, to namespaces of its own. `None`, after a notice,
/// if that is not possible here.
pub fn enter(programs: Programs) -> Option<Run> {
    if !lab::enter() || !lab::has(&["ip", "ss", "sh"]) || !test_support::descriptors(8_000) {
        return None;
    }
    let cgroup = Cgroup::new()?;
    let bpffs = lab::bpffs();
    lab::run(&["ip", "-6", "route", "add", "local", "fd00:c::/64", "dev", "lo"]);
    kernel("net/ipv6/ip_nonlocal_bind", 1);
    // What the floods leave is over in seconds.
    kernel("net/ipv4/tcp_synack_retries", 1);
    kernel("net/core/somaxconn", 512);
    test_support::forger::black_hole();
    let temp = configure("");
    let directory = temp.path().to_owned();
    // Servers append to these and never create them: one that outlives the test must fail.
    for name in ["taken", "given-up", "register", "log"] {
        std::fs::File::create(directory.join(name)).unwrap();
    }
    let target = |(address, _)| Target { address, refusal: Refusal::Told };
    let mut clients = Clients::new(PUBLICS.map(target).to_vec());
    clients.vanish = true;
    let pins = bpffs.path().join("pins");
    Some(Run { programs, directory, cgroup, pins, clients, _places: (temp, bpffs) })
}

/// Sets a parameter of the kernel, in the own network namespace.
pub fn kernel(name: &str, value: u32) {
    std::fs::write(Path::new("/proc/sys").join(name), value.to_string()).unwrap();
}

impl Run {
    pub fn admin(&self) -> PathBuf {
        self.directory.join("admin.sock")
    }

    pub fn start_dispatcher(&self, take_over: bool) -> Process {
        let mut command = self.cgroup.command("dispatcher");
        command.arg(&self.programs.dispatcher).arg("run");
        command.args(take_over.then_some("--take-over"));
        command.arg("--config").arg(self.directory.join("dispatcher.toml"));
        command.env("CHAOS_ROLE", "dispatcher").env("DISPATCHER_LOG", "debug");
        command.env_remove("NOTIFY_SOCKET").stdout(Stdio::null()).stderr(self.log("log"));
        Process::start("dispatcher", &mut command)
    }

    pub fn start_member(&self, name: &str, port: u16) -> Process {
        let mut command = self.cgroup.command(name);
        command.arg(&self.programs.server).args([V4.to_string(), port.to_string()]);
        for (key, value) in self.environment("units") {
            command.env(key, value);
        }
        command.stdout(Stdio::null()).stderr(self.log("servers.log"));
        Process::start(name, &mut command)
    }

    fn log(&self, name: &str) -> std::fs::File {
        let path = self.directory.join(name);
        std::fs::File::options().create(true).append(true).open(path).unwrap()
    }

    fn environment(&self, pool: &str) -> [(&'static str, String); 5] {
        let path = |name| self.directory.join(name).to_str().unwrap().to_owned();
        [
            ("CHAOS_ROLE", "server".to_owned()),
            ("CHAOS_POOL", pool.to_owned()),
            ("CHAOS_TAKEN", path("taken")),
            ("CHAOS_GIVEN_UP", path("given-up")),
            ("CHAOS_REGISTER", path("register")),
        ]
    }

    /// `None` while there is no dispatcher, or if it ends before it has answered.
    pub fn status(&self) -> Option<Status> {
        let (code, body) = http_get(&self.admin(), "/v1/status").ok()?;
        // While its processes end, a stopping dispatcher refuses.
        if code == 503 {
            return None;
        }
        assert_eq!(code, 200, "{body}");
        // A dispatcher that is killed may leave half an answer.
        serde_json::from_str(&body).ok()
    }

    pub fn wait_status(
        &self,
        what: &str,
        mut condition: impl FnMut(&Status) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut last = "no status".to_owned();
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(status) = self.status() {
                match condition(&status) {
                    Ok(()) => return Ok(()),
                    Err(missing) => last = missing,
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let pools = self.status().map(|status| status.pools).unwrap_or_default();
        let workers = pools.iter().flat_map(|pool| &pool.workers);
        let brief = |it: &WorkerStatus| (it.name.clone(), it.pid, it.state.clone(), it.load);
        let workers: Vec<_> = workers.map(brief).collect();
        Err(format!("waited for {what}: {last}; {workers:?}"))
    }

    /// The processes in a cgroup of the test.
    pub fn processes(&self, cgroup: &str) -> BTreeSet<i32> {
        let path = self.cgroup.0.join(cgroup).join("cgroup.procs");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// The servers that run now.
    pub fn servers(&self) -> Vec<Server> {
        let cgroups = MEMBERS.iter().map(|(name, _)| *name).chain(["dispatcher"]);
        let alive: BTreeSet<i32> = cgroups.flat_map(|name| self.processes(name)).collect();
        let mut file = std::fs::File::open(self.directory.join("register")).unwrap();
        let skip = (file.metadata().unwrap().len() / ENTRY as u64).saturating_sub(RECENT);
        file.seek(SeekFrom::Start(skip * ENTRY as u64)).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        // A process id can be used again.
        let mut latest: HashMap<i32, Server> = HashMap::new();
        for server in parse_register(&text, skip as usize) {
            latest.insert(server.pid, server);
        }
        let mut all: Vec<Server> =
            latest.into_values().filter(|server| alive.contains(&server.pid)).collect();
        all.sort_by_key(|server| server.number);
        all
    }

    /// Every server that was ever started, by number.
    pub fn register(&self) -> Vec<Server> {
        parse_register(&std::fs::read_to_string(self.directory.join("register")).unwrap(), 0)
    }

    /// Without faults, or a random configuration.
    pub fn configuration(&self, mut random: Option<&mut Random>) -> String {
        let mut text = format!("steer_pins = {:?}\nstop_timeout = \"3s\"\n", self.pins);
        for (number, (address, pool)) in PUBLICS.iter().enumerate() {
            let _ = writeln!(
                text,
                "[[listener]]\nname = \"l{number}\"\naddress = \"{address}\"\npool = \"{pool}\""
            );
        }
        let usual = ["least-connections", "round-robin", "least-connections", "hash"];
        for ((pool, processes), usual) in SPAWNED.into_iter().chain([("units", 0)]).zip(usual) {
            let mut below = |bound| random.as_deref_mut().map_or(0, |it| it.below(bound));
            // The first ones are those without faults.
            let changed = below(8);
            // Only members have priorities.
            let known = if pool == "units" { 6 } else { 5 };
            let policy = if changed < 2 { usual } else { POLICIES[below(known) as usize] };
            let maximum = if changed < 5 { 10_000 } else { 2 + below(12) };
            let slow_start = if changed < 7 { "0s" } else { "2s" };
            let _ = write!(
                text,
                "[pool.{pool}]\nmode = \"steer\"\npolicy = \"{policy}\"\n\
                 wait_for_worker = \"{WAIT_FOR_WORKER}\"\nhandoff_timeout = \"300ms\"\n\
                 max_connections_per_worker = {maximum}\nslow_start = \"{slow_start}\"\n"
            );
            if processes > 0 {
                let hung = if changed < 4 { "" } else { "kill_hung_after = \"1s\"\n" };
                let environment = self.environment(pool);
                let environment = environment.map(|(key, value)| format!("{key} = {value:?}"));
                let listens = match pool {
                    SHARED => "\"inherits\", \"{fd}\"",
                    _ => "\"{addr}\", \"{port}\"",
                };
                let _ = writeln!(
                    text,
                    "[pool.{pool}.spawn]\ncommand = [{:?}, {listens}]\n\
                     processes = {processes}\non_dispatcher_loss = \"serve\"\n\
                     environment = {{ {} }}\nstart_timeout = \"10s\"\ncrash_loop_after = 1000\n\
                     max_restart_delay = \"500ms\"\n{hung}",
                    self.programs.server,
                    environment.join(", ")
                );
                continue;
            }
            let left_out = below(12) as usize;
            for (at, (name, port)) in MEMBERS.iter().enumerate() {
                if changed > 0 && at == left_out {
                    continue;
                }
                let (weight, priority) = (1 + below(3), below(2));
                let _ = writeln!(
                    text,
                    "[[pool.units.member]]\nname = \"{name}\"\naddress = \"{V4}:{port}\"\n\
                     cgroup = {:?}\nweight = {weight}\npriority = {priority}",
                    self.cgroup.0.join(name)
                );
            }
        }
        text
    }
}

fn parse_register(text: &str, first: usize) -> Vec<Server> {
    let of = |(number, line): (usize, &str)| {
        let mut words = line.split_whitespace();
        let mut word = || words.next().unwrap_or_default();
        let (pid, port) = (word().parse().ok()?, word().parse().ok()?);
        Some(Server { number, pid, port, pool: word().to_owned() })
    };
    (first..).zip(text.lines()).filter_map(of).collect()
}

/// Runs a program of the machine; its output.
pub fn output(words: &[&str]) -> String {
    let out = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}
