//! Several hosts: directories with different names, each with its own workers, and the real
//! `nats-server`. Each directory reaches it through a proxy of the test, which can be cut. The
//! hosts share this machine's loopback; what separates them is that they have nothing in common but
//! NATS.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod namespaces;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use test_support::{PATIENCE, Process, skip, wait_until};
use worker_sdk::relay::{Ended, Id, Options, Outcome, Registration, Relay, RelayConfig};

/// A nats-server that can be killed and started again at the same address.
struct Nats {
    process: Option<Process>,
    address: SocketAddr,
}

impl Nats {
    /// `None`, after a notice, where it is not installed.
    fn start() -> Option<Nats> {
        if Command::new("nats-server").arg("--version").output().is_err() {
            skip("needs nats-server");
            return None;
        }
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut nats = Nats { process: None, address: free };
        nats.restart();
        Some(nats)
    }

    fn restart(&mut self) {
        self.process = None;
        let mut command = Command::new("nats-server");
        let (ip, port) = (self.address.ip().to_string(), self.address.port().to_string());
        command.args(["--addr", &ip, "--port", &port]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Process::start("nats-server", &mut command);
        wait_until("nats-server to listen", || {
            assert!(process.running(), "it ended");
            TcpStream::connect(self.address).is_ok()
        });
        self.process = Some(process);
    }
}

/// The way of one host to the server.
struct Proxy {
    address: SocketAddr,
    open: Arc<AtomicBool>,
    connections: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    fn start(to: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let open = Arc::new(AtomicBool::new(true));
        let connections = Arc::new(Mutex::new(Vec::new()));
        let (is_open, all) = (Arc::clone(&open), Arc::clone(&connections));
        // It ends with the test's process.
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if !is_open.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(server) = TcpStream::connect(to) else { continue };
                for (mut from, mut into) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap()),
                    (server.try_clone().unwrap(), client.try_clone().unwrap()),
                ] {
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 65_536];
                        while let Ok(count @ 1..) = from.read(&mut buffer) {
                            if into.write_all(&buffer[..count]).is_err() {
                                break;
                            }
                        }
                        let _ = into.shutdown(std::net::Shutdown::Both);
                    });
                }
                all.lock().unwrap().extend([client, server]);
            }
        });
        Proxy { address, open, connections }
    }

    fn cut(&self) {
        self.open.store(false, Ordering::SeqCst);
        for connection in self.connections.lock().unwrap().drain(..) {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }

    fn mend(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}

struct Host {
    proxy: Proxy,
    directory: Process,
    dir: TempDir,
}

impl Host {
    fn start(name: &str, nats: SocketAddr) -> Host {
        Host::start_with(name, nats, "")
    }

    fn start_with(name: &str, nats: SocketAddr, more: &str) -> Host {
        let proxy = Proxy::start(nats);
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "socket = \"{}/relay.sock\"\nhost = \"{name}\"\ngrace = \"300ms\"\nnats = \"nats://{}\"\n{more}",
            dir.path().display(),
            proxy.address
        );
        std::fs::write(dir.path().join("directory.toml"), text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_dispatch-directory"));
        command.arg("--config").arg(dir.path().join("directory.toml")).stdin(Stdio::null());
        command.stderr(std::fs::File::create(dir.path().join("log")).unwrap());
        let directory = Process::start("dispatch-directory", &mut command);
        Host { proxy, directory, dir }
    }

    fn relay(&self, name: &str) -> Relay {
        let config = RelayConfig::new().socket(self.dir.path().join("relay.sock")).name(name);
        Relay::connect(config.timeout(Duration::from_secs(3)).join_timeout(PATIENCE))
            .wait()
            .unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

fn id(text: &str) -> Id {
    Id::new(text).unwrap()
}

fn knows(relay: &Relay, text: &str, host: &str) {
    wait_until(&format!("{text} to be known at {host}"), || {
        let page = relay.who(&id(text)).wait();
        page.is_ok_and(|page| page.places.first().is_some_and(|place| place.host == host))
    });
}

fn next(registration: &Registration) -> Vec<u8> {
    registration.recv().wait_for(PATIENCE).expect("a message").bytes().to_vec()
}

#[test]
fn hosts_are_one_namespace() {
    let Some(nats) = Nats::start() else { return };
    let hosts = ["one", "two", "three"].map(|name| Host::start(name, nats.address));
    let [a, b, c] = [0, 1, 2].map(|n: usize| hosts[n].relay(&format!("w{n}")));
    let bob = b.register(&id("bob")).wait().unwrap();
    knows(&a, "bob", "two");
    knows(&c, "bob", "two");

    // Order, sizes, replies.
    let pending: Vec<_> = (0..300u32).map(|n| a.send(&id("bob"), n.to_le_bytes())).collect();
    for (n, one) in (0..300u32).zip(pending) {
        assert_eq!(one.wait(), Outcome::Delivered, "message {n}\n{}", hosts[0].log());
        assert_eq!(next(&bob), n.to_le_bytes());
    }
    let large = vec![7; 1024 * 1024];
    assert_eq!(a.send(&id("bob"), &large).wait(), Outcome::Delivered);
    assert!(next(&bob) == large);
    std::thread::scope(|scope| {
        scope.spawn(|| bob.recv().wait_for(PATIENCE).unwrap().reply("pong").unwrap());
        assert_eq!(&*c.request(&id("bob"), "ping", PATIENCE).wait().unwrap(), b"pong");
    });

    // Groups over all hosts, and members near the sender first.
    let room = [&a, &b, &c].map(|relay| relay.join(&id("room")));
    wait_until("all members to be known", || {
        [&a, &b, &c].iter().all(|relay| relay.publish(&id("room"), "x").wait().delivered == 3)
    });
    room.iter().for_each(|member| while member.try_recv().is_some() {});
    for _ in 0..10 {
        let local = Options::new().prefer_local(true);
        assert_eq!(c.send_any(&id("room"), "near", local).wait(), Outcome::Delivered);
    }
    assert_eq!(std::iter::from_fn(|| room[2].try_recv()).count(), 10);
    for _ in 0..9 {
        assert_eq!(c.send_any(&id("room"), "any", Options::new()).wait(), Outcome::Delivered);
    }
    for member in &room {
        assert_eq!(std::iter::from_fn(|| member.try_recv()).count(), 3, "round-robin");
    }

    // The newest registration wins, whatever the host.
    let newer = c.register(&id("bob")).wait().unwrap();
    wait_until("the older one to be told", || bob.ended() == Some(Ended::Superseded));
    assert_eq!(a.send(&id("bob"), "to three").wait(), Outcome::Delivered);
    assert_eq!(next(&newer), b"to three");
    drop(newer);
    wait_until("its end to be known", || a.who(&id("bob")).wait().unwrap().places.is_empty());
    assert_eq!(a.send(&id("bob"), "").wait(), Outcome::NotFound);
}

#[test]
fn no_message_between_hosts_costs_a_member_its_directory() {
    let Some(nats) = Nats::start() else { return };
    let large = Host::start_with("one", nats.address, "max_message = 2000000\n");
    let small = Host::start_with("two", nats.address, "max_message = 100000\n");
    let (a, b) = (large.relay("a"), small.relay("b"));
    let bob = b.register(&id("bob")).wait().unwrap();
    let alice = a.register(&id("alice")).wait().unwrap();
    knows(&a, "bob", "two");
    knows(&b, "alice", "one");
    assert_eq!(a.send(&id("bob"), "1").wait(), Outcome::Delivered);
    assert_eq!(next(&bob), b"1");
    // Longer than the other host accepts: it is not sent, and only what was on its way there is
    // lost.
    assert_eq!(a.send(&id("bob"), vec![0; 100_001]).wait(), Outcome::Lost);
    assert_eq!(a.send(&id("bob"), vec![0; 100_000]).wait(), Outcome::Delivered);
    assert_eq!(next(&bob).len(), 100_000);
    // Megabytes at once, which one forward must not carry.
    for (from, to, inbox) in [(&a, "bob", &bob), (&b, "alice", &alice)] {
        let pending: Vec<_> = (0..400).map(|_| from.send(&id(to), vec![1; 20_000])).collect();
        let delivered = pending.into_iter().map(|one| one.wait());
        let delivered = delivered.filter(|outcome| *outcome == Outcome::Delivered).count();
        assert!(delivered > 100, "{delivered} of 400 to {to}");
        (0..delivered).for_each(|_| assert_eq!(next(inbox).len(), 20_000));
    }
    for host in [&large, &small] {
        let log = host.log();
        for event in ["member_cut", "member_left", "gateway_closed"] {
            assert!(!log.contains(event), "{log}");
        }
    }
    assert!(a.is_joined() && b.is_joined());
}

/// What one sender sent and what arrived, with its numbers from 0.
#[derive(Default)]
struct Account {
    outcomes: Vec<Outcome>,
    received: Vec<u32>,
}

impl Account {
    fn check(&self) {
        let count = |wanted| self.outcomes.iter().filter(|outcome| **outcome == wanted).count();
        println!(
            "{} sent: {} delivered, {} not found, {} refused, {} lost; {} received",
            self.outcomes.len(),
            count(Outcome::Delivered),
            count(Outcome::NotFound),
            count(Outcome::Backpressure),
            count(Outcome::Lost),
            self.received.len()
        );
        let ordered = self.received.windows(2).all(|pair| pair[0] < pair[1]);
        assert!(ordered, "none twice, none out of order");
        for (number, outcome) in (0..).zip(&self.outcomes) {
            let received = self.received.binary_search(&number).is_ok();
            match outcome {
                Outcome::Delivered => assert!(received, "{number} was acknowledged"),
                Outcome::Lost => {}
                other => assert!(!received, "{number} is {other:?} and was received"),
            }
        }
        assert!(count(Outcome::Delivered) > 0);
    }
}

#[test]
fn nats_and_a_host_go_and_return_and_every_message_is_accounted_for() {
    let Some(mut nats) = Nats::start() else { return };
    let mut hosts = ["one", "two", "three"].map(|name| Host::start(name, nats.address));
    let [a, b, c] = [0, 1, 2].map(|n: usize| hosts[n].relay(&format!("w{n}")));
    let bob = b.register(&id("bob")).wait().unwrap();
    let carol = c.register(&id("carol")).wait().unwrap();
    let near = a.register(&id("near")).wait().unwrap();
    knows(&a, "bob", "two");
    knows(&a, "carol", "three");
    let stop = AtomicBool::new(false);
    let accounts = std::thread::scope(|scope| {
        let senders = ["bob", "carol"].map(|to| {
            let (a, stop) = (&a, &stop);
            scope.spawn(move || {
                let mut pending = Vec::new();
                for number in 0u32.. {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    pending.push(a.send(&id(to), number.to_le_bytes()));
                    std::thread::sleep(Duration::from_millis(2));
                }
                pending.into_iter().map(|one| one.wait()).collect::<Vec<_>>()
            })
        });
        let receivers = [&bob, &carol].map(|registration| {
            scope.spawn(|| {
                let mut received = Vec::new();
                while let Some(message) = registration.recv().wait() {
                    received.push(u32::from_le_bytes(message.bytes().try_into().unwrap()));
                }
                received
            })
        });
        let delivered = |what: &str| {
            let before = (b.stats().received, c.stats().received);
            wait_until(what, || {
                b.stats().received > before.0 + 20 && c.stats().received > before.1 + 20
            });
        };
        delivered("messages to both hosts");

        // NATS ends. On the own host messages go on; to others they are lost, at once.
        nats.process = None;
        wait_until("messages to be lost", || a.send(&id("dave"), "").wait() != Outcome::Delivered);
        assert_eq!(a.send(&id("near"), "near").wait(), Outcome::Delivered);
        assert_eq!(next(&near), b"near");
        let lost = a.stats().lost;
        wait_until("messages to other hosts to be lost", || a.stats().lost > lost + 10);
        nats.restart();
        delivered("messages after the restart of NATS");

        // One host is cut off and returns.
        hosts[2].proxy.cut();
        let lost = a.stats().lost;
        wait_until("messages to that host to be lost", || a.stats().lost > lost + 10);
        let before = b.stats().received;
        wait_until("messages to the other host to go on", || b.stats().received > before + 50);
        hosts[2].proxy.mend();
        delivered("messages after the return of the host");

        stop.store(true, Ordering::SeqCst);
        let outcomes = senders.map(|sender| sender.join().unwrap());
        bob.close();
        carol.close();
        let received = receivers.map(|receiver| receiver.join().unwrap());
        let pairs = outcomes.into_iter().zip(received);
        pairs.map(|(outcomes, received)| Account { outcomes, received }).collect::<Vec<_>>()
    });
    accounts.iter().for_each(Account::check);
    assert!(hosts.iter_mut().all(|host| host.directory.running()));
}
