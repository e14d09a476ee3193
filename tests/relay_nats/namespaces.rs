//! Three hosts in network namespaces, each with a dispatcher, a directory and two workers, and the
//! real `nats-server`. Clients know the address of a host, and nothing of workers.
//!
//! Every client sends to every other one while a host is cut off and returns, and while nats-server
//! is killed and returns. Every message has an outcome, and outcomes and arrivals agree exactly.

#[allow(dead_code, reason = "the tests of fail-over use the rest")]
#[path = "../failover/hosts/network.rs"]
mod network;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;
use test_support::{Dispatcher, Process, dispatcher_bin, example, pool, wait_until};

use self::network::{Fault, Network};
use super::Nats;

const PORT: u16 = 7000;
const NATS: &str = "10.77.0.254:4222";
const CLIENTS_PER_HOST: usize = 2;

struct Host {
    // Fields are dropped in this order: the workers first.
    workers: Vec<Process>,
    dispatcher: Dispatcher,
    _directory: Process,
    dir: TempDir,
}

impl Host {
    fn start(network: &Network, number: usize) -> Host {
        let dir = test_support::configure(&format!(
            "relay_socket = \"DIR/relay.sock\"\nrelay_ticket_key = \"DIR/relay.key\"\n\
             [[listener]]\nname = \"chat\"\naddress = \"{}:{PORT}\"\npool = \"web\"\n[pool.web]\n",
            network.ip(number)
        ));
        let path = dir.path().display();
        let text = format!(
            "socket = \"{path}/relay.sock\"\nticket_key = \"{path}/relay.key\"\n\
             host = \"host{number}\"\nnats = \"nats://{NATS}\"\n\
             [namespaces.chat]\npools = [\"web\"]\n"
        );
        std::fs::write(dir.path().join("directory.toml"), text).unwrap();
        let log = |name: &str| std::fs::File::create(dir.path().join(name)).unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_dispatch-directory"));
        let mut command = network.command(number, program);
        command.arg("--config").arg(dir.path().join("directory.toml"));
        command.stdin(Stdio::null()).stderr(log("directory.log"));
        let directory = Process::start("dispatch-directory", &mut command);
        let mut command = network.command(number, Path::new(dispatcher_bin()));
        let dispatcher = Dispatcher::start_as(dir.path(), command.env_remove("NOTIFY_SOCKET"));
        let workers = ["w0", "w1"].map(|name| {
            let mut command = network.command(number, &example("relay-service"));
            command.env("DISPATCH_SOCKET", dispatcher.dispatch()).env("DISPATCH_POOL", "web");
            command.env("DISPATCH_NAME", name).env("DISPATCH_RELAY_NAMESPACE", "chat");
            command.env("DISPATCH_RELAY_SOCKET", dir.path().join("relay.sock"));
            command.stdin(Stdio::null()).stderr(log(name));
            Process::start(name, &mut command)
        });
        dispatcher.wait_joined("web", 2);
        Host { workers: workers.into(), dispatcher, _directory: directory, dir }
    }

    fn logs(&self) -> String {
        let names = ["directory.log", "log", "w0", "w1"];
        let read = |name| std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
        names.map(read).concat()
    }
}

/// What one client was told: the outcome of each message that it sent, and what it received.
#[derive(Default)]
struct Told {
    outcomes: BTreeMap<(String, u64), String>,
    received: Vec<(String, u64)>,
}

struct Client {
    name: String,
    host: usize,
    stream: TcpStream,
    told: Arc<Mutex<Told>>,
    reader: JoinHandle<()>,
}

impl Client {
    fn log_in(network: &Network, host: usize, name: &str) -> Client {
        let stream = TcpStream::connect((network.ip(host), PORT)).unwrap();
        stream.set_nodelay(true).unwrap();
        writeln!(&stream, "login {name}").unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let told = Arc::new(Mutex::new(Told::default()));
        let own = Arc::clone(&told);
        let reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let words: Vec<&str> = line.split(' ').collect();
                let mut told = own.lock().unwrap();
                match words[..] {
                    ["out", to, number, outcome] => {
                        let key = (to.to_owned(), number.parse().unwrap());
                        let before = told.outcomes.insert(key, outcome.to_owned());
                        assert_eq!(before, None, "{line}: one outcome");
                    }
                    ["in", from, number] => {
                        told.received.push((from.to_owned(), number.parse().unwrap()));
                    }
                    _ => panic!("{line}"),
                }
            }
        });
        Client { name: name.to_owned(), host, stream, told, reader }
    }

    fn count(&self, outcome: &str) -> usize {
        self.told.lock().unwrap().outcomes.values().filter(|told| *told == outcome).count()
    }

    /// Messages received from clients of this host.
    fn received_from(&self, host: usize) -> usize {
        let told = self.told.lock().unwrap();
        told.received.iter().filter(|(from, _)| host_of(from) == host).count()
    }
}

fn name(host: usize, number: usize) -> String {
    format!("client{host}{number}")
}

fn host_of(client: &str) -> usize {
    client.as_bytes()["client".len()].wrapping_sub(b'0').into()
}

#[test]
fn three_hosts_account_for_every_message_while_one_and_nats_go_and_return() {
    let test = "namespaces::three_hosts_account_for_every_message_while_one_and_nats_go_and_return";
    if Command::new("nats-server").arg("--version").output().is_err() {
        return test_support::skip("needs nats-server");
    }
    let Some(network) = Network::namespaces(test, 3) else { return };
    let mut nats = Nats { process: None, address: NATS.parse().unwrap() };
    nats.restart();
    let hosts: Vec<Host> = (0..3).map(|number| Host::start(&network, number)).collect();
    let mut clients: Vec<Client> = Vec::new();
    for (host, _) in hosts.iter().enumerate() {
        for number in 0..CLIENTS_PER_HOST {
            clients.push(Client::log_in(&network, host, &name(host, number)));
        }
    }
    for host in &hosts {
        let status = host.dispatcher.status();
        let workers = &pool(&status, "web").workers;
        assert!(workers.iter().all(|worker| worker.load == 1), "different workers: {workers:?}");
    }

    let stop = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for client in &clients {
            let others: Vec<&Client> =
                clients.iter().filter(|other| other.name != client.name).collect();
            let (stop, sent) = (&stop, &sent);
            scope.spawn(move || {
                for number in 0u64.. {
                    for other in &others {
                        writeln!(&client.stream, "send {} {number}", other.name).unwrap();
                        sent.fetch_add(1, Ordering::SeqCst);
                    }
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
        }
        // A failed condition must not leave the senders running.
        let end = StopAtEnd(&stop);
        let logs = || hosts.iter().map(Host::logs).collect::<String>();
        let arrive = |what: &str, between: &[usize]| {
            let pairs: Vec<(&Client, usize, usize)> = clients
                .iter()
                .filter(|client| between.contains(&client.host))
                .flat_map(|client| between.iter().map(move |&from| (client, from)))
                .map(|(client, from)| (client, from, client.received_from(from)))
                .collect();
            wait_until(&format!("{what}\n{}", logs()), || {
                pairs.iter().all(|(client, from, before)| client.received_from(*from) > before + 5)
            });
        };
        arrive("messages between all hosts", &[0, 1, 2]);

        network.cut(2, Fault::LinkDown);
        let lost = clients[0].count("Lost");
        wait_until("messages to the host that was cut off to be lost", || {
            clients[0].count("Lost") > lost + 5
        });
        arrive("messages between the other hosts", &[0, 1]);
        network.restore(2, Fault::LinkDown);
        arrive("messages to and from the host that returned", &[0, 1, 2]);

        nats.process = None;
        let lost: Vec<usize> = clients.iter().map(|client| client.count("Lost")).collect();
        wait_until("messages between hosts to be lost", || {
            clients.iter().zip(&lost).all(|(client, lost)| client.count("Lost") > lost + 5)
        });
        for host in 0..3 {
            arrive("messages within a host", &[host]);
        }
        nats.restart();
        arrive("messages after the restart of nats-server", &[0, 1, 2]);
        drop(end);
    });
    let sent = usize::try_from(sent.load(Ordering::SeqCst)).unwrap();
    wait_until("an outcome for every message", || {
        clients.iter().map(|it| it.told.lock().unwrap().outcomes.len()).sum::<usize>() == sent
    });
    // What was delivered is in a queue and on its way to the client.
    let missing = || {
        let received: BTreeSet<(String, String, u64)> = clients
            .iter()
            .flat_map(|client| {
                let told = client.told.lock().unwrap();
                let to = &client.name;
                let all = told.received.iter();
                all.map(|(from, number)| (from.clone(), to.clone(), *number)).collect::<Vec<_>>()
            })
            .collect();
        clients
            .iter()
            .flat_map(|client| {
                let told = client.told.lock().unwrap();
                let delivered = told.outcomes.iter().filter(|(_, outcome)| *outcome == "Delivered");
                delivered
                    .map(|((to, number), _)| (client.name.clone(), to.clone(), *number))
                    .filter(|message| !received.contains(message))
                    .collect::<Vec<_>>()
            })
            .next()
    };
    wait_until("everything that was acknowledged", || missing().is_none());
    check(&clients);

    for client in clients {
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
        client.reader.join().unwrap();
    }
    for mut host in hosts {
        let logs = host.logs();
        assert!(host.workers.iter_mut().all(Process::running), "{logs}");
        assert!(host.dispatcher.stop().success(), "{logs}");
    }
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Outcomes and arrivals agree: none twice, none out of order, none that was refused.
fn check(clients: &[Client]) {
    let mut totals: BTreeMap<String, usize> = BTreeMap::new();
    let mut received = 0;
    for receiver in clients {
        let told = receiver.told.lock().unwrap();
        received += told.received.len();
        let mut last: BTreeMap<&str, u64> = BTreeMap::new();
        for (from, number) in &told.received {
            let before = last.insert(from, *number);
            assert!(
                before.is_none_or(|before| before < *number),
                "{from} {number}: in order, once"
            );
        }
        for sender in clients.iter().filter(|sender| sender.name != receiver.name) {
            let outcomes = &sender.told.lock().unwrap().outcomes;
            let arrived: BTreeSet<u64> = told
                .received
                .iter()
                .filter(|(from, _)| *from == sender.name)
                .map(|(_, number)| *number)
                .collect();
            for ((_, number), outcome) in
                outcomes.iter().filter(|((to, _), _)| *to == receiver.name)
            {
                *totals.entry(outcome.clone()).or_default() += 1;
                match outcome.as_str() {
                    "Delivered" => assert!(arrived.contains(number), "acknowledged"),
                    "Lost" => {}
                    refused => assert!(!arrived.contains(number), "{refused}, and received"),
                }
            }
        }
    }
    println!("{totals:?}, {received} received");
    assert!(totals["Delivered"] > 100 && totals["Lost"] > 0, "{totals:?}");
}
