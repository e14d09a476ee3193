//! How the hosts are reached: loopback addresses, or network namespaces behind a bridge.
//!
//! The test runs itself again in a namespace of its own, where the clients live and the bridge is.
//! Each host is a namespace inside that, held by a process that ends with the test. All of it is
//! gone when the last process has ended.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use test_support::*;

/// Set in the run inside the namespace.
const INSIDE: &str = "FAILOVER_INSIDE";

/// Makes a namespace for a command: as root, or as root of a user namespace.
const UNSHARE: [&[&str]; 2] = [&["--net"], &["--map-root-user", "--net"]];

/// What happens to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// All processes are killed. Its kernel refuses connections.
    Kill,
    /// All processes are stopped. Its kernel accepts connections.
    Stop,
    /// Its link is down.
    LinkDown,
    /// No packet reaches it.
    Drop,
}

pub enum Network {
    Loopback,
    /// The holders of the hosts' namespaces.
    Namespaces(Vec<Holder>),
}

pub struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Network {
    /// The network of so many hosts, inside the namespace; none outside, where `test` has run
    /// inside already, or has been skipped.
    pub fn namespaces(test: &str, hosts: usize) -> Option<Network> {
        if std::env::var_os(INSIDE).is_some() {
            return Some(Network::build(hosts));
        }
        let possible = |options: &&&[&str]| {
            let probe = "ip link add probe0 type veth peer name probe1 && unshare --net true";
            let probed = Command::new("unshare").args(**options).args(["sh", "-c", probe]).output();
            probed.is_ok_and(|output| output.status.success())
        };
        let Some(options) = UNSHARE.iter().find(possible) else {
            skip("needs ip, unshare, and the right to make network namespaces");
            return None;
        };
        let mut inside = Command::new("unshare");
        inside.args(*options).args(["--fork", "--kill-child"]);
        inside.arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]);
        let status = inside.env(INSIDE, "1").status().unwrap();
        assert!(status.success(), "inside the namespace: {status}");
        None
    }

    fn build(hosts: usize) -> Network {
        let ip = |arguments: &str| must(Command::new("ip").args(arguments.split(' ')));
        ip("link set lo up");
        ip("link add bridge0 type bridge");
        ip("addr add 10.77.0.254/24 dev bridge0");
        ip("link set bridge0 up");
        let mut holders = Vec::new();
        for number in 0..hosts {
            let mut holder = Command::new("unshare");
            // It ends when its input does, which is when this process ends.
            holder.args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null());
            let holder = Holder(holder.spawn().unwrap());
            let pid = holder.0.id();
            let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
            wait_until("the namespace", || namespace(&pid.to_string()) != namespace("self"));
            ip(&format!("link add host{number} type veth peer name eth0 netns {pid}"));
            ip(&format!("link set host{number} master bridge0 up"));
            holders.push(holder);
        }
        let network = Network::Namespaces(holders);
        for number in 0..hosts {
            let address = format!("addr add {}/24 dev eth0", network.ip(number));
            for arguments in [address.as_str(), "link set eth0 up", "link set lo up"] {
                let mut command = network.command(number, Path::new("ip"));
                must(command.args(arguments.split(' ')));
            }
        }
        network
    }

    /// The address of a host.
    pub fn ip(&self, number: usize) -> String {
        match self {
            // Other tests use 127.0.x.x, and 127.64.0.0 and above.
            Network::Loopback => {
                let [_, _, high, low] = std::process::id().to_be_bytes();
                format!("127.{}.{low}.{}", 32 + high % 32, number + 1)
            }
            Network::Namespaces(_) => format!("10.77.0.{}", number + 1),
        }
    }

    /// A command on a host.
    pub fn command(&self, number: usize, program: &Path) -> Command {
        match self {
            Network::Loopback => Command::new(program),
            Network::Namespaces(holders) => {
                let mut command = Command::new("nsenter");
                command.args(["--net", "--target", &holders[number].0.id().to_string()]);
                // nsenter becomes the program.
                command.arg("--").arg(program);
                command
            }
        }
    }

    pub fn faults(&self) -> Vec<Fault> {
        match self {
            Network::Loopback => vec![Fault::Kill, Fault::Stop],
            Network::Namespaces(_) => {
                vec![Fault::Kill, Fault::LinkDown, Fault::Stop, Fault::Drop]
            }
        }
    }

    /// Cuts a host off.
    pub fn cut(&self, number: usize, fault: Fault) {
        match fault {
            Fault::LinkDown => {
                let link = format!("host{number}");
                must(Command::new("ip").args(["link", "set", &link, "down"]));
            }
            // What the host sends goes nowhere: no answer, and no error either.
            _ => must(self.command(number, Path::new("ip")).args(BLACKHOLE)),
        }
    }

    pub fn restore(&self, number: usize, fault: Fault) {
        match fault {
            Fault::LinkDown => {
                let link = format!("host{number}");
                must(Command::new("ip").args(["link", "set", &link, "up"]));
            }
            _ => {
                let remove = BLACKHOLE.map(|word| if word == "add" { "del" } else { word });
                must(self.command(number, Path::new("ip")).args(remove));
            }
        }
    }
}

/// A command that has to succeed.
pub fn must(command: &mut Command) {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
}

/// Before the rules that find the way to the clients.
const BLACKHOLE: [&str; 5] = ["rule", "add", "pref", "100", "blackhole"];
