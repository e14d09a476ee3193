//! What each server must pass. A panic says what it did not.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dispatcher::api::status::{PoolStatus, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_support::{Dispatcher, children_of, configure, descriptors, wait_for, wait_until};

use super::catalogue::Server;
use super::client::Client;
use crate::place::*;

const PROCESSES: usize = 4;

/// How much of each.
#[derive(Clone, Copy)]
pub struct Numbers {
    pub held: usize,
    pub churn: usize,
}

/// What was measured; the rest passed or panicked.
pub struct Results {
    pub sequential: Vec<u64>,
    pub held: usize,
    pub spread: u64,
    pub evenness: f64,
    pub restarted: u64,
}

/// Runs a dispatcher with four processes of this server in a network namespace of its own. `None`,
/// after a notice, if that is not possible here.
pub fn examine(server: &Server, numbers: Numbers) -> Option<Results> {
    if !enter() || !has(&["ss"]) || !descriptors(8_000) {
        return None;
    }
    let mut lab = Lab::start(server);
    let sequential = lab.sequential();
    let spread = lab.hold(numbers.held);
    let evenness = lab.churn(numbers.churn);
    lab.drain();
    lab.release();
    lab.settled();
    lab.kill();
    lab.stop();
    lab.scale();
    let restarted = lab.restart();
    lab.end();
    Some(Results { sequential, held: numbers.held, spread, evenness, restarted })
}

struct Lab<'a> {
    server: &'a Server,
    dispatcher: Dispatcher,
    held: Vec<Client>,
}

impl Lab<'_> {
    fn start(server: &Server) -> Lab<'_> {
        let pool = "[pool.web]\nmode = \"steer\"\nwait_for_worker = \"5s\"\n\
                    handoff_timeout = \"300ms\"\n";
        let pool = format!("{pool}{}", server.pool);
        let folder =
            configure(&format!("stop_timeout = \"60s\"\n{}{pool}{}", listener(), server.spawn()));
        for (name, text) in server.files {
            let text = text.replace("DIR", &folder.path().display().to_string());
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let mut dispatcher = Dispatcher::start_in(folder.path());
        dispatcher.keep(folder);
        ready(&dispatcher, PROCESSES);
        Lab { server, dispatcher, held: Vec::new() }
    }

    fn client(&self) -> Client {
        Client::served(self.server.speaks, PUBLIC).expect("a client that is served")
    }

    fn pool(&self) -> PoolStatus {
        self.dispatcher.status().pools[0].clone()
    }

    /// Waits until the counts are those of the kernel, in total what is held here.
    fn settled(&self) -> Vec<u64> {
        let mut last = None;
        wait_for("counts equal to the kernel's list", || {
            let status = self.dispatcher.status();
            let workers = &status.pools[0].workers;
            let counted: BTreeMap<i32, u64> =
                workers.iter().map(|worker| (worker.pid, worker.load)).collect();
            let total: u64 = counted.values().sum();
            let (listed, direct) = sockets(&status);
            let equal = total == self.held.len() as u64 + direct && counted == listed;
            let loads = counted.values().copied().collect();
            let seen = Some((self.held.len(), counted, listed));
            if !equal && last != seen {
                eprintln!("held here, counted, listed: {seen:?}");
                last = seen;
            }
            equal.then_some(loads)
        })
    }

    /// One after the other: each process gets the same number.
    fn sequential(&self) -> Vec<u64> {
        for _ in 0..50 * PROCESSES {
            self.client().finish().expect("a server that ends its side, too");
        }
        self.settled();
        let taken = taken(&self.dispatcher.status());
        assert_eq!(taken, [50; PROCESSES]);
        taken
    }

    fn hold(&mut self, count: usize) -> u64 {
        while self.held.len() < count {
            self.held.push(self.client());
        }
        let loads = self.settled();
        let spread = loads.iter().max().unwrap() - loads.iter().min().unwrap();
        assert!(spread <= 1, "{loads:?}");
        spread
    }

    fn release(&mut self) {
        for client in self.held.drain(..) {
            client.finish().expect("a server that ends its side, too");
        }
    }

    /// Opens and closes at random, around the number that is held; returns max/mean at the end.
    fn churn(&mut self, events: usize) -> f64 {
        let mut random = fastrand::Rng::with_seed(7);
        let (least, most) = (self.held.len() * 9 / 10, self.held.len() * 11 / 10);
        for _ in 0..events {
            let open = random.bool();
            if (open && self.held.len() < most) || self.held.len() <= least {
                self.held.push(self.client());
            } else {
                let at = random.usize(..self.held.len());
                self.held.swap_remove(at).finish().expect("a server that ends its side, too");
            }
        }
        let loads = self.settled();
        let max = *loads.iter().max().unwrap();
        let mean = loads.iter().sum::<u64>() as f64 / PROCESSES as f64;
        let evenness = max as f64 / mean;
        // A whole connection more is the least that can be seen at a few hundred.
        assert!(evenness <= 1.01 || (max as f64) < mean + 2.0, "{loads:?}");
        evenness
    }

    /// Nothing new for a drained process; it keeps what it has.
    fn drain(&mut self) {
        let drained = |pool: &PoolStatus| {
            let worker = pool.workers.iter().find(|it| it.name == "web-2").unwrap();
            (worker.taken, worker.load)
        };
        let before = drained(&self.pool());
        command(&self.dispatcher, &["drain", "web/web-2"]);
        // A drain is answered before the kernel knows of it; what comes next is answered after.
        self.dispatcher.status();
        self.held.extend((0..30).map(|_| self.client()).collect::<Vec<_>>());
        self.settled();
        assert_eq!(drained(&self.pool()), before);
        command(&self.dispatcher, &["resume", "web/web-2"]);
        ready(&self.dispatcher, PROCESSES);
    }

    /// Ends a process at once: its clients are lost, and no others.
    fn kill(&mut self) {
        self.held.extend((0..40).map(|_| self.client()).collect::<Vec<_>>());
        assert_eq!(self.settled(), [10; PROCESSES]);
        let victim = self.pool().workers[1].pid;
        signal_tree(victim, Signal::SIGKILL);
        self.dispatcher.wait_status("another process", |status| {
            let workers = &status.pools[0].workers;
            workers.iter().all(|it| it.pid != victim) && active(&status.pools[0]).len() == PROCESSES
        });
        self.held.retain_mut(|client| client.ask().is_ok());
        assert_eq!(self.held.len(), 30);
        self.held.extend((0..10).map(|_| self.client()).collect::<Vec<_>>());
        assert_eq!(self.settled(), [10; PROCESSES]);
    }

    /// A process that does not accept is suspect, and trusted again when it accepts.
    fn stop(&mut self) {
        let stopped = self.pool().workers[2].pid;
        signal_tree(stopped, Signal::SIGSTOP);
        // Two of these wait in its accept queue.
        let open = || Client::open(self.server.speaks, PUBLIC).unwrap();
        let waiting: Vec<Client> = (0..8).map(|_| open()).collect();
        self.dispatcher.wait_status("it to be suspect", |status| {
            let mut workers = status.pools[0].workers.iter();
            workers.any(|it| it.pid == stopped && it.state == "suspect")
        });
        let more: Vec<Client> = (0..10).map(|_| self.client()).collect();
        signal_tree(stopped, Signal::SIGCONT);
        ready(&self.dispatcher, PROCESSES);
        for client in waiting.into_iter().chain(more) {
            self.held.push(client);
        }
        for client in &mut self.held {
            client.ask().expect("a client that is served");
        }
        // It is even again with the next ones.
        self.held.extend((0..22).map(|_| self.client()).collect::<Vec<_>>());
        assert_eq!(self.settled(), [20; PROCESSES]);
    }

    fn scale(&mut self) {
        command(&self.dispatcher, &["scale", "web", "6"]);
        ready(&self.dispatcher, 6);
        self.held.extend((0..40).map(|_| self.client()).collect::<Vec<_>>());
        assert_eq!(self.settled(), [20; 6]);
        command(&self.dispatcher, &["scale", "web", "2"]);
        ready(&self.dispatcher, 2);
        for client in &mut self.held {
            client.ask().expect("a client that is served");
        }
        self.release();
        self.dispatcher.wait_status("the others to end", |it| it.pools[0].workers.len() == 2);
        command(&self.dispatcher, &["scale", "web", "4"]);
        ready(&self.dispatcher, PROCESSES);
    }

    /// Replaces all processes while clients come without a pause; returns how many were served.
    fn restart(&self) -> u64 {
        let before = processes_of(&self.pool());
        let (over, served) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        self.client().finish().expect("a server that ends its side, too");
                        served.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(PACE);
                    }
                });
            }
            // The threads end if this one panics, too.
            let over = Over(&over);
            wait_until("the first clients", || served.load(Ordering::Relaxed) > 20);
            command(&self.dispatcher, &["restart", "web", "--wait"]);
            self.dispatcher.wait_status("the former processes to end", |status| {
                let now = processes_of(&status.pools[0]);
                now.len() == PROCESSES && now.iter().all(|pid| !before.contains(pid))
            });
            let enough = served.load(Ordering::Relaxed) + 20;
            wait_until("more clients", || served.load(Ordering::Relaxed) > enough);
            drop(over);
        });
        assert_eq!(self.pool().steer.unwrap().refused, 0);
        served.into_inner()
    }

    /// SIGTERM ends a process that has idle connections, long before `stop_timeout` does.
    fn end(&mut self) {
        self.held.extend((0..8).map(|_| self.client()).collect::<Vec<_>>());
        self.settled();
        let started = Instant::now();
        assert!(self.dispatcher.stop().success());
        assert!(started.elapsed() < Duration::from_secs(50), "{:?}", started.elapsed());
    }
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A process and all that it has started.
fn tree(root: i32) -> Vec<i32> {
    let mut all = vec![root];
    let mut at = 0;
    while at < all.len() {
        all.extend(children_of(all[at]));
        at += 1;
    }
    all
}

fn signal_tree(root: i32, signal: Signal) {
    for pid in tree(root) {
        // One that has ended meanwhile is no matter.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// The kernel's own list: connections that each worker has, by its process id, and how many of all
/// are not of clients: to its own port, or ended by this side. The dispatcher makes such to see
/// whether a process accepts; a server can keep one for a while.
fn sockets(status: &Status) -> (BTreeMap<i32, u64>, u64) {
    let filter = ["-Htnp", "state", "established", "state", "close-wait"];
    let out = Command::new("ss").args(filter).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut by_process: BTreeMap<i32, u64> = BTreeMap::new();
    let mut owner: BTreeMap<i32, i32> = BTreeMap::new();
    for worker in &status.pools[0].workers {
        by_process.insert(worker.pid, 0);
        owner.extend(tree(worker.pid).into_iter().map(|pid| (pid, worker.pid)));
    }
    let mut direct = 0;
    for line in text.lines() {
        let pid = line.split("pid=").nth(1).and_then(|it| it.split(',').next()?.parse().ok());
        if let Some(worker) = pid.and_then(|pid: i32| owner.get(&pid)) {
            *by_process.entry(*worker).or_default() += 1;
            // State, two queues, the local address, that of the client.
            let local = line.split_whitespace().nth(3).unwrap_or_default();
            let ended = line.starts_with("CLOSE-WAIT");
            direct += u64::from(ended || local != PUBLIC.to_string());
        }
    }
    (by_process, direct)
}
