//! The clients: a process of its own that drives one load and reports its measurements and its own
//! CPU use.

mod bulk;
mod even;
mod held;
mod idle;
mod short;
mod slow;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use serde::{Deserialize, Serialize};

use crate::machine;

/// Figures by name.
pub type Metrics = BTreeMap<String, f64>;

/// A load and the contender that it measures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    pub addresses: Vec<SocketAddr>,
    /// Processes whose CPU time is measured, by role.
    pub processes: Vec<Process>,
    pub job: Job,
}

/// A process of the contender.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    pub role: Role,
    pub pid: i32,
}

/// The role of a process in its contender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// In front of the workers: dispatcher, proxy, cluster master.
    Front,
    Worker,
}

/// One load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Job {
    /// `clients` at a time connect, read a byte and reset; with `fin` they wait for the end first.
    /// The threads share them.
    Short { clients: usize, threads: usize, fin: bool, warm: Duration, time: Duration },
    /// One client at a time, with pauses in which all processes fall asleep.
    Idle { count: usize, pause: Duration },
    /// One connection, 64 KiB for each byte sent.
    Bulk { bytes: u64 },
    /// Held connections: how evenly they are spread while connections are opened and closed.
    Even { workers: usize, held: usize, churn: usize, lifetimes: Lifetimes, burst: usize },
    /// Clients at a rate, and how long each of them waits.
    Slow { count: usize, rate: f64 },
    /// Opens a number of connections and measures the memory of the front process.
    Held { count: usize },
}

/// How long connections live, in units of their mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lifetimes {
    Exponential,
    /// Pareto with shape 1.5: a few live very long.
    HeavyTailed,
}

/// Runs the load of a hidden command: the request is JSON, the metrics go to standard output as
/// JSON.
pub fn run(request: &str) -> io::Result<()> {
    machine::die_with_parent();
    machine::raise_descriptors();
    let request: Request = serde_json::from_str(request)?;
    let metrics = match &request.job {
        Job::Short { clients, threads, fin, warm, time } => {
            short::run(&request, (*clients, *threads), *fin, *warm, *time)
        }
        Job::Idle { count, pause } => idle::run(&request, *count, *pause),
        Job::Bulk { bytes } => bulk::run(&request, *bytes),
        Job::Even { workers, held, churn, lifetimes, burst } => even::run(
            &request,
            &even::Plan {
                workers: *workers,
                held: *held,
                churn: *churn,
                lifetimes: *lifetimes,
                burst: *burst,
            },
        ),
        Job::Slow { count, rate } => slow::run(&request, *count, *rate),
        Job::Held { count } => held::run(&request, *count),
    }?;
    println!("{}", serde_json::to_string(&metrics)?);
    Ok(())
}

/// Runs a load in a child process and waits for its metrics.
pub fn drive(request: &Request) -> io::Result<Metrics> {
    let output = Command::new(std::env::current_exe()?)
        .arg("load")
        .arg(serde_json::to_string(request)?)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(io::Error::other(format!("the load generator failed: {}", output.status)));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// CPU time by role, from the creation of this value on.
struct CpuMeter<'a> {
    processes: &'a [Process],
    before: Vec<Duration>,
    /// How often the workers had gone to sleep.
    sleeps: u64,
    own: Duration,
    since: Instant,
}

/// The CPU time used since the creation.
struct CpuUse {
    front: Duration,
    workers: Duration,
    load: Duration,
    worker_sleeps: u64,
    elapsed: Duration,
}

impl CpuMeter<'_> {
    fn start(processes: &[Process]) -> CpuMeter<'_> {
        let before = processes.iter().map(|process| machine::cpu(process.pid)).collect();
        let own = machine::cpu(own_pid());
        CpuMeter { processes, before, sleeps: sleeps(processes), own, since: Instant::now() }
    }

    fn read(&self) -> CpuUse {
        let elapsed = self.since.elapsed();
        let load = machine::cpu(own_pid()) - self.own;
        let of = |role: Role| {
            let both = self.processes.iter().zip(&self.before);
            both.filter(|(process, _)| process.role == role)
                .map(|(process, before)| machine::cpu(process.pid).saturating_sub(*before))
                .sum()
        };
        let worker_sleeps = sleeps(self.processes).saturating_sub(self.sleeps);
        CpuUse { front: of(Role::Front), workers: of(Role::Worker), load, worker_sleeps, elapsed }
    }
}

fn sleeps(processes: &[Process]) -> u64 {
    let workers = processes.iter().filter(|process| process.role == Role::Worker);
    workers.map(|process| machine::sleeps(process.pid)).sum()
}

impl CpuUse {
    /// Adds the figures per `unit` of work done, in microseconds, and how busy the threads of the
    /// generator were.
    fn add_to(&self, metrics: &mut Metrics, units: f64, threads: usize) {
        let micros = |time: Duration| time.as_secs_f64() * 1e6 / units;
        metrics.insert("cpu_front".to_owned(), micros(self.front));
        metrics.insert("cpu_workers".to_owned(), micros(self.workers));
        metrics.insert("cpu_load".to_owned(), micros(self.load));
        metrics.insert("worker_sleeps".to_owned(), self.worker_sleeps as f64 / units);
        let busy = self.load.as_secs_f64() / self.elapsed.as_secs_f64() / threads as f64;
        metrics.insert("load_busy".to_owned(), busy);
    }
}

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap_or(0)
}

/// A client's socket. Closing it resets the connection, so that no port stays in TIME_WAIT.
fn client_socket(nonblocking: bool) -> io::Result<OwnedFd> {
    let mut flags = SocketFlags::CLOEXEC;
    flags.set(SocketFlags::NONBLOCK, nonblocking);
    let fd = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_linger(&fd, Some(Duration::ZERO))?;
    Ok(fd)
}

/// Sorts and adds percentiles of nanoseconds, in microseconds.
fn add_percentiles(metrics: &mut Metrics, prefix: &str, mut nanos: Vec<u64>) {
    nanos.sort_unstable();
    for (name, quantile) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999)] {
        let value = crate::stats::percentile(&nanos, quantile) as f64 / 1e3;
        metrics.insert(format!("{prefix}{name}"), value);
    }
}
