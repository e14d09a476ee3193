//! Listeners that were open before the programs were attached.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dispatch_steer::{Correction, Count, Options, Steering, WorkerSettings};
use test_support::wait_until;

use crate::lab::*;

/// Starts servers for ports without workers, then steers: as after an update of the dispatcher.
struct Earlier {
    // Before the cgroup of the lab, which is removed when it is empty.
    servers: Vec<Server>,
    lab: Lab,
}

impl Earlier {
    /// With a server at each of these addresses. The programs that the lab attached are gone.
    fn new(addresses: &[&str]) -> Option<Earlier> {
        let mut lab = Lab::new()?;
        lab.steering = None;
        let mut servers = Vec::new();
        for (port, address) in (FIRST_PORT..).zip(addresses) {
            servers.push(lab.server_at(address, port, KEEPER));
            wait_listening(own(port));
        }
        Some(Earlier { lab, servers })
    }

    /// Attaches the programs, with a worker for each server; adopts nothing.
    fn steer(&mut self) -> &mut Steering {
        let options = Options { cgroup: self.lab.cgroup().into(), wait: Duration::ZERO };
        let mut steering = Steering::load(&options).unwrap();
        steering.add_public(V4).unwrap();
        steering.add_public(V6).unwrap();
        for (worker, server) in (0..).zip(&self.servers) {
            steering.add_port(worker, server.port).unwrap();
            steering.set_worker(worker, WorkerSettings::new(1)).unwrap();
        }
        self.lab.steering.insert(steering)
    }

    fn adopt(&mut self, worker: u32) -> Result<Vec<SocketAddr>, dispatch_steer::Error> {
        let cgroup = self.lab.cgroup().to_owned();
        self.lab.steering().adopt_listeners(worker, &cgroup)
    }

    fn live(&mut self) -> Vec<i64> {
        let workers = 0..self.servers.len() as u32;
        workers.map(|worker| self.lab.steering().counts(worker).unwrap().live).collect()
    }
}

fn own(port: u16) -> SocketAddr {
    SocketAddr::new(V4.ip(), port)
}

/// Waits until a server listens, and its answer to the probe has ended.
fn wait_listening(at: SocketAddr) {
    wait_until("the server to listen", || TcpStream::connect(at).is_ok());
}

/// Its listener and its connections belong to the number that it had.
#[test]
fn a_worker_that_was_removed_returns_with_its_number() {
    let Some(mut lab) = Lab::keepers(2) else { return };
    let held: Vec<TcpStream> = (0..10).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [5, 5]);
    let at = own(lab.servers[0].port);
    assert_eq!(lab.steering().former_worker(|address| address == at).unwrap(), None);
    lab.steering().remove_worker(0).unwrap();
    let more: Vec<TcpStream> = (0..4).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [5, 9]);
    assert_eq!(lab.steering().former_worker(|address| address == at).unwrap(), Some(0));
    assert!(!lab.steering().is_free(0).unwrap());
    lab.steering().add_port(0, at.port()).unwrap();
    assert!(lab.steering().set_worker(0, WorkerSettings::new(1)).is_err(), "it is not free");
    lab.steering().set_former_worker(0, WorkerSettings::new(1)).unwrap();
    let cgroup = lab.cgroup().to_owned();
    assert_eq!(lab.steering().adopt_listeners(0, &cgroup).unwrap(), [at]);
    assert_eq!(lab.steering().adopt_listeners(0, &cgroup).unwrap(), [], "once is enough");
    let last: Vec<TcpStream> = (0..6).map(|_| connect(V4)).collect();
    assert_eq!(lab.live(), [10, 10]);
    lab.settled();
    drop((held, more, last));
    lab.empty();
    lab.kill(0);
    assert_eq!(lab.steering().counts(0).unwrap().listeners, [0, 0], "its end is reported");
}

#[test]
fn listeners_of_running_servers_are_registered() {
    let Some(mut earlier) = Earlier::new(&["127.0.0.1", "0.0.0.0", "::"]) else { return };
    let before: Vec<TcpStream> = (0..3).map(|_| connect(own(FIRST_PORT))).collect();
    earlier.steer();
    let refused = TcpStream::connect_timeout(&V4, Duration::from_secs(10)).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "nothing is registered");
    assert_eq!(earlier.adopt(0).unwrap(), [own(FIRST_PORT)]);
    assert_eq!(earlier.adopt(1).unwrap(), [SocketAddr::new([0, 0, 0, 0].into(), FIRST_PORT + 1)]);
    assert_eq!(earlier.adopt(2).unwrap().len(), 1);
    for worker in 0..3 {
        assert_eq!(earlier.adopt(worker).unwrap(), [], "once is enough");
    }
    let mut held: Vec<TcpStream> = (0..30).map(|_| connect(V4)).collect();
    assert_eq!(earlier.live(), [10, 10, 10]);
    held.push(connect(V6));
    assert_eq!(earlier.live(), [10, 10, 11], "a listener at :: serves both families");
    held.push(connect(own(FIRST_PORT)));
    assert_eq!(earlier.live(), [11, 10, 11]);
    // Those from before do not count, neither do their ends.
    drop(before);
    held.drain(..15);
    eventually("those that ended not to count", 17, || earlier.live().iter().sum());
    held.extend((0..13).map(|_| connect(V4)));
    assert_eq!(earlier.live(), [10, 10, 10]);
    for _ in 0..2 {
        assert_eq!(earlier.lab.steering().reconcile().unwrap(), []);
    }
}

#[test]
fn the_end_of_an_adopted_listener_is_found_out() {
    let Some(mut earlier) = Earlier::new(&["127.0.0.1", "127.0.0.1"]) else { return };
    earlier.steer();
    for worker in 0..2 {
        earlier.adopt(worker).unwrap();
        assert_eq!(earlier.lab.steering().verify_listeners().unwrap(), []);
    }
    let first = earlier.servers.swap_remove(0);
    earlier.servers.truncate(1);
    drop(first);
    let held: Vec<TcpStream> = (0..4).map(|_| connect(V4)).collect();
    let steering = earlier.lab.steering();
    assert_eq!(steering.counts(1).unwrap().live, 4, "it is left out at once");
    assert_eq!(steering.counts(0).unwrap().listeners, [1, 0]);
    assert_eq!(steering.verify_listeners().unwrap(), [], "seen once");
    let gone = Correction { worker: 0, count: Count::ListenersV4, change: -1 };
    assert_eq!(steering.verify_listeners().unwrap(), [gone], "seen twice");
    assert_eq!(steering.counts(0).unwrap().listeners, [0, 0]);
    assert!(steering.is_free(0).unwrap());
    assert_eq!(steering.verify_listeners().unwrap(), []);
    // The next listener at that address registers by itself, and its end is seen.
    let again = earlier.lab.server(FIRST_PORT, KEEPER);
    let steering = earlier.lab.steering();
    eventually("it to register", [1, 0], || steering.counts(0).unwrap().listeners);
    let more: Vec<TcpStream> = (0..4).map(|_| connect(V4)).collect();
    assert_eq!((steering.counts(0).unwrap().live, steering.counts(1).unwrap().live), (4, 4));
    drop(again);
    eventually("its end to be seen", [0, 0], || steering.counts(0).unwrap().listeners);
    for _ in 0..2 {
        assert_eq!(steering.verify_listeners().unwrap(), []);
    }
    drop((held, more));
}

#[test]
fn listeners_that_cannot_be_counted_are_refused_with_the_reason() {
    let Some(mut earlier) = Earlier::new(&["127.0.0.1"]) else { return };
    earlier.steer();
    // Outside of the cgroup.
    let port = FIRST_PORT + 1;
    let outside = Outside::new(port);
    wait_listening(own(port));
    let steering = earlier.lab.steering();
    steering.add_port(1, port).unwrap();
    steering.set_worker(1, WorkerSettings::new(1)).unwrap();
    let text = earlier.adopt(1).unwrap_err().to_string();
    assert!(
        text.starts_with("cannot register the listener at 127.0.0.1:9001: it was opened outside"),
        "{text}"
    );
    // Its process has moved since, its socket has not.
    let procs = earlier.lab.cgroup().join("cgroup.procs");
    std::fs::write(procs, outside.0.id().to_string()).unwrap();
    assert_eq!(earlier.adopt(1).unwrap_err().to_string(), text);
    drop(outside);
    let absent = earlier.lab.steering().adopt_listeners(0, Path::new("/sys/fs/cgroup/absent"));
    let text = absent.unwrap_err().to_string();
    assert!(text.contains("absent: No such file"), "{text}");
}

/// A server that is not in the cgroup; killed when dropped.
struct Outside(Child);

impl Outside {
    fn new(port: u16) -> Outside {
        let mut command = Command::new("python3");
        command.args(["-c", KEEPER, "127.0.0.1", &port.to_string()]);
        Outside(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The variable that tells the test below that it is the steering process; its value is the cgroup.
const INNER: &str = "STEER_TEST_EXISTING_CGROUP";

const AS_NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

/// As a process has it that was executed as that user: it can be dumped (PR_SET_DUMPABLE).
const BECOME_NOBODY: &str = "import ctypes, os, selectors, socket
os.setgroups([]); os.setgid(65534); os.setuid(65534)
assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0
";

#[test]
fn without_the_right_to_trace_the_missing_capability_is_named() {
    if let Some(cgroup) = std::env::var_os(INNER) {
        let cgroup = Path::new(&cgroup);
        let mut steering =
            Steering::load(&Options { cgroup: cgroup.into(), wait: Duration::ZERO }).unwrap();
        steering.add_port(0, FIRST_PORT).unwrap();
        steering.set_worker(0, WorkerSettings::new(1)).unwrap();
        println!("\nsays {:?}", steering.adopt_listeners(0, cgroup).map_err(|e| e.to_string()));
        return;
    }
    if !has(&["setpriv"]) {
        return;
    }
    let Some(mut earlier) = Earlier::new(&["127.0.0.1"]) else { return };
    let name = "existing::without_the_right_to_trace_the_missing_capability_is_named";
    let cgroup = earlier.lab.cgroup().to_owned();
    let says = |capabilities: &str| -> String {
        let set = format!("-all,{capabilities}");
        let out = Command::new(AS_NOBODY[0])
            .args(&AS_NOBODY[1..])
            .args(["--inh-caps", &set, "--ambient-caps", &set, "--bounding-set", &set])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(INNER, &cgroup)
            .output()
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("says "));
        line.unwrap_or_else(|| panic!("{text} {}", String::from_utf8_lossy(&out.stderr))).to_owned()
    };
    let refused = says("+bpf,+net_admin");
    let pid =
        format!("CAP_SYS_PTRACE is missing to fetch it from process {}", earlier.servers[0].pid());
    assert!(refused.contains(&pid), "{refused}");
    assert!(refused.contains("or restart the server"), "{refused}");
    assert_eq!(says("+bpf,+net_admin,+sys_ptrace"), "Ok([127.0.0.1:9000])");
    // A server of the same user.
    drop(earlier.servers.pop());
    let code = format!("{BECOME_NOBODY}{KEEPER}");
    earlier.servers.push(earlier.lab.server(FIRST_PORT, &code));
    wait_listening(own(FIRST_PORT));
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    let said = says("+bpf,+net_admin");
    if scope.is_ok_and(|scope| scope.trim() != "0") {
        assert!(said.contains("CAP_SYS_PTRACE is missing"), "{said}");
    } else {
        assert_eq!(said, "Ok([127.0.0.1:9000])");
    }
}

/// Container managers make cgroups for threads, whose processes the kernel does not list there.
#[test]
fn threaded_cgroups_below_are_no_obstacle() {
    let Some(mut earlier) = Earlier::new(&["127.0.0.1"]) else { return };
    let threads = earlier.lab.cgroup().join("threads");
    std::fs::create_dir(&threads).unwrap();
    std::fs::write(threads.join("cgroup.type"), "threaded").unwrap();
    let refused = std::fs::read_to_string(threads.join("cgroup.procs")).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::Unsupported);
    earlier.steer();
    let adopted = earlier.adopt(0);
    std::fs::remove_dir(&threads).unwrap();
    assert_eq!(adopted.unwrap(), [own(FIRST_PORT)]);
    drop(connect(V4));
}
