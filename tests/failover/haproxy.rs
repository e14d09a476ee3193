//! The real HAProxy, with the configuration that is shipped, in front of three hosts with a
//! dispatcher and workers each: load follows capacity, a drained host empties, a killed one is left
//! out, and all workers of all hosts have the same load.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;
use test_support::*;

use super::hosts::network::Network;

/// Workers of each host. The last host has half of the others' capacity.
const WORKERS: [usize; 3] = [4, 4, 2];

/// The number of HAProxy's namespace.
const BALANCER: usize = 3;

const CLIENTS: usize = 1_000;

/// HAProxy's program, if it is installed.
fn program() -> Option<&'static str> {
    let found = ["/usr/sbin/haproxy", "/usr/local/sbin/haproxy"]
        .into_iter()
        .find(|path| Path::new(path).exists());
    if found.is_none() {
        skip("needs HAProxy (Debian's package haproxy)");
    }
    found
}

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../etc/haproxy/haproxy.cfg")
}

#[test]
fn the_shipped_configuration_is_valid() {
    let Some(program) = program() else { return };
    let output = Command::new(program).args(["-c", "-f"]).arg(shipped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !said.contains("WARNING"), "{said}");
}

/// The dispatcher's part of the recipe is in comments of the same file.
#[test]
fn the_configuration_in_its_comments_is_valid() {
    let text = std::fs::read_to_string(shipped()).unwrap();
    let lines = text.lines().filter_map(|line| line.strip_prefix("#     "));
    let temp = configure(&lines.collect::<Vec<_>>().join("\n"));
    let mut check = Command::new(dispatcher_bin());
    let output = check.arg("check").arg(temp.path().join("dispatcher.toml")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(said.contains("PROXY protocol from 10.0.0.0/24"), "{said}");
    assert!(said.contains("agent of web: 10.0.0.1:9902, 100% is 8 workers"), "{said}");
}

struct Host {
    number: usize,
    directory: TempDir,
    dispatcher: Option<Dispatcher>,
    workers: Vec<Process>,
}

impl Host {
    fn start(network: &Network, number: usize) -> Host {
        let ip = network.ip(number);
        let text = format!(
            "[[listener]]\nname = \"web\"\naddress = \"{ip}:8000\"\npool = \"web\"\n\
             proxy_protocol = true\nproxy_protocol_from = [\"10.77.0.0/24\"]\n\
             [pool.web]\nagent_listen = \"{ip}:9902\"\nagent_workers = {}\n",
            WORKERS[0]
        );
        let directory = configure(&text);
        let mut host = Host { number, directory, dispatcher: None, workers: Vec::new() };
        host.start_processes(network);
        host
    }

    fn start_processes(&mut self, network: &Network) {
        let mut command = network.command(self.number, Path::new(dispatcher_bin()));
        command.env_remove("NOTIFY_SOCKET");
        let dispatcher = Dispatcher::start_as(self.directory.path(), &mut command);
        let count = WORKERS[self.number];
        for worker in 0..count {
            let name = format!("h{}-w{worker}", self.number);
            let mut command = network.command(self.number, &example("test-worker"));
            command.arg("blocking").env("DISPATCH_SOCKET", dispatcher.dispatch());
            command.env("DISPATCH_POOL", "web").env("DISPATCH_NAME", &name);
            command.env("TEST_WORKER", "stays");
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            self.workers.push(Process::start(&name, &mut command));
        }
        dispatcher.wait_status("workers to join", |status| {
            pool(status, "web").workers.iter().filter(|w| w.state != "draining").count() == count
        });
        self.dispatcher = Some(dispatcher);
    }

    fn dispatcher(&self) -> &Dispatcher {
        self.dispatcher.as_ref().expect("the host is up")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(dispatcher_bin());
        command.args(arguments).env("DISPATCHER_ADMIN", self.dispatcher().admin());
        command.stdin(Stdio::null());
        command
    }

    fn kill(&mut self) {
        self.dispatcher.take().expect("the host is up").process.kill();
        self.workers.clear();
    }
}

/// HAProxy in its namespace.
struct Balancer {
    process: Process,
    address: SocketAddr,
    directory: TempDir,
}

impl Balancer {
    fn start(network: &Network, program: &str) -> Balancer {
        let directory = tempfile::tempdir().unwrap();
        let address: SocketAddr = format!("{}:80", network.ip(BALANCER)).parse().unwrap();
        let stats = directory.path().join("admin.sock");
        let mut text = std::fs::read_to_string(shipped()).unwrap();
        let mut replace = |from: &str, to: &str| {
            assert!(text.contains(from), "{from} is in the shipped file");
            text = text.replace(from, to);
        };
        for host in 0..WORKERS.len() {
            let shipped = format!("server host{} 10.0.0.{}:8000", host + 1, host + 1);
            replace(&shipped, &format!("server host{} {}:8000", host + 1, network.ip(host)));
        }
        replace("/run/haproxy/admin.sock", stats.to_str().unwrap());
        // Their descriptors may exceed the limit of the user of this test.
        replace("maxconn 20000", "maxconn 4000");
        let file = directory.path().join("haproxy.cfg");
        std::fs::write(&file, text).unwrap();
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let mut command = network.command(BALANCER, Path::new(program));
        command.args(["-db", "-f"]).arg(&file).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let process = Process::start("haproxy", &mut command);
        Balancer { process, address, directory }
    }

    /// Status and weight of each server: what the agents have told.
    fn servers(&mut self) -> BTreeMap<String, (String, u32)> {
        let log = || std::fs::read_to_string(self.directory.path().join("log")).unwrap();
        assert!(self.process.child.try_wait().unwrap().is_none(), "HAProxy has ended:\n{}", log());
        let ask = || -> std::io::Result<String> {
            let mut socket = UnixStream::connect(self.directory.path().join("admin.sock"))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.write_all(b"show stat\n")?;
            let mut text = String::new();
            socket.read_to_string(&mut text)?;
            Ok(text)
        };
        let text = ask().unwrap_or_default();
        let mut lines = text.lines();
        let names: Vec<&str> =
            lines.next().unwrap_or("").trim_start_matches("# ").split(',').collect();
        let at = |name: &str| names.iter().position(|other| *other == name);
        let (Some(status), Some(weight)) = (at("status"), at("weight")) else {
            return BTreeMap::new();
        };
        let rows = lines.map(|line| line.split(',').collect::<Vec<_>>());
        let servers = rows.filter(|row| row.len() > 1 && row[1].starts_with("host"));
        servers
            .map(|row| {
                (row[1].to_owned(), (row[status].to_owned(), row[weight].parse().unwrap_or(0)))
            })
            .collect()
    }

    fn wait_servers(&mut self, what: &str, wanted: [(&str, Option<u32>); 3]) {
        wait_until(what, || {
            let servers = self.servers();
            (1..).zip(wanted).all(|(number, (status, weight))| {
                servers.get(&format!("host{number}")).is_some_and(|(is, has)| {
                    is.starts_with(status) && weight.is_none_or(|weight| weight == *has)
                })
            })
        });
    }
}

/// How many of these clients each host serves.
fn of_hosts(clients: &[Client]) -> [usize; 3] {
    let mut hosts = [0; 3];
    clients.iter().for_each(|client| hosts[host_of(client)] += 1);
    hosts
}

fn host_of(client: &Client) -> usize {
    client.served_by[1..2].parse().unwrap()
}

fn clients(balancer: SocketAddr, count: usize) -> Vec<Client> {
    let connect = |_| Client::connect(balancer).expect("every client is served");
    (0..count).map(connect).collect()
}

fn assert_within_5_percent(what: &str, is: usize, wanted: usize) {
    let off = is.abs_diff(wanted) * 100;
    assert!(off <= wanted * 5, "{what}: {is} instead of {wanted}");
}

#[test]
fn haproxy_balances_hosts_by_capacity_and_leaves_out_drained_and_killed_ones() {
    let Some(program) = program() else { return };
    let test = "haproxy::haproxy_balances_hosts_by_capacity_and_leaves_out_drained_and_killed_ones";
    if !descriptors(6_000) {
        return;
    }
    let Some(network) = Network::namespaces(test, WORKERS.len() + 1) else { return };
    let mut hosts: Vec<Host> =
        (0..WORKERS.len()).map(|number| Host::start(&network, number)).collect();
    let mut balancer = Balancer::start(&network, program);
    let serving = [("UP", Some(100)), ("UP", Some(100)), ("UP", Some(50))];
    balancer.wait_servers("the capacities of all hosts", serving);
    let address = balancer.address;

    // Load follows capacity, and all workers of all hosts are equal.
    let mut connected = clients(address, CLIENTS);
    let all = WORKERS.iter().sum::<usize>();
    for (host, served) in of_hosts(&connected).into_iter().enumerate() {
        assert_within_5_percent(&format!("host {host}"), served, CLIENTS * WORKERS[host] / all);
    }
    let workers = tally(&connected);
    println!("of each worker: {workers:?}");
    assert_eq!(workers.len(), all);
    for (worker, served) in &workers {
        assert_within_5_percent(worker, *served, CLIENTS / all);
    }
    for client in &connected {
        // The greeting has the client's address as the worker sees it.
        assert_eq!(client.peer, client.stream.get_ref().local_addr().unwrap().to_string());
    }

    // A host drains: every client that comes meanwhile is served, and soon none comes to it.
    let draining = hosts[0].command(&["drain", "--all", "--announce", "5s", "--wait"]);
    let over = AtomicBool::new(false);
    let (came, mut draining) = std::thread::scope(|scope| {
        let coming = scope.spawn(|| {
            let mut came = Vec::new();
            while !over.load(Ordering::Relaxed) {
                came.extend(clients(address, 1));
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            came
        });
        let mut draining = draining;
        let draining = draining.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        balancer.wait_servers("HAProxy to drain it", [("DRAIN", None), ("UP", None), ("UP", None)]);
        hosts[0].dispatcher().wait_status("the announcement to be over", |status| {
            status.draining.as_ref().is_some_and(|drain| drain.state == "draining")
        });
        over.store(true, Ordering::Relaxed);
        (coming.join().unwrap(), draining)
    });
    println!("while it began to drain: {:?}", of_hosts(&came));
    let new = clients(address, 60);
    assert_eq!(of_hosts(&new)[0], 0, "a drained host gets none");
    assert!(of_hosts(&came)[1] > 0);
    connected.extend(came);
    connected.extend(new);
    // Its clients stay until they leave by themselves, and then it is empty.
    let (leaving, mut staying): (Vec<Client>, Vec<Client>) =
        connected.into_iter().partition(|client| host_of(client) == 0);
    assert!(leaving.len() >= CLIENTS / 3);
    assert!(draining.try_wait().unwrap().is_none(), "it waits for them");
    for mut client in leaving {
        client.echo("still here");
        client.finish();
    }
    let status = wait_for("the end of the drain", || draining.try_wait().unwrap());
    assert!(status.success(), "{status}");
    assert!(hosts[0].command(&["resume", "--all"]).output().unwrap().status.success());
    balancer.wait_servers("the host to return", serving);
    let back = clients(address, 100);
    assert_within_5_percent("the returned host", of_hosts(&back)[0], 100);
    staying.extend(back);

    // A host is killed: its new clients go elsewhere at once, and others notice nothing.
    hosts[1].kill();
    let new = clients(address, 100);
    assert_eq!(of_hosts(&new)[1], 0);
    balancer.wait_servers("HAProxy to notice", [("UP", None), ("DOWN", None), ("UP", None)]);
    assert_eq!(of_hosts(&clients(address, 20))[1], 0);
    // The clients of the killed host close, too: until then HAProxy counts their connections.
    staying.retain(|client| host_of(client) != 1);
    for client in &mut staying {
        client.echo("still here");
    }
    hosts[1].start_processes(&network);
    balancer.wait_servers("the killed host to return", serving);
    assert!(of_hosts(&clients(address, 20))[1] > 0);
    let bad = ["proxy_missing", "proxy_untrusted", "proxy_malformed", "no_worker"];
    for host in &hosts {
        let status = host.dispatcher().status();
        assert!(bad.iter().all(|reason| status.closed[*reason] == 0), "{:?}", status.closed);
    }
}
