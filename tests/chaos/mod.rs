//! Chaos on real processes: clients that number each connection, workers that record what they
//! took, a nemesis that kills, stops, starves and restarts processes (the dispatcher included), and
//! a checker.
//!
//! Requirements: a connection is answered exactly once, or lost for a reason that is counted; never
//! taken twice, never lost without a report. The counts of every status balance. When the faults
//! stop, every client is served, and the dispatcher has no more descriptors than before.

mod checker;
#[allow(dead_code, reason = "shared with the chaos of steered pools")]
mod client;
mod configuration;
mod nemesis;

pub mod protocol;

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use checker::{Evidence, Verdict};
use client::{Clients, Refusal, Target};
use dispatcher::api::status::Status;
use nemesis::{Nemesis, What};
use simulator::Random;

use test_support::chaos::{OnDrop, tail};
use test_support::{Process, assert_conserved, configure, http_get, wait_for, write_config};

/// The faults and the duration.
#[derive(Debug)]
pub struct Options {
    pub faults_for: Duration,
    pub seed: u64,
    pub clients: usize,
    pub only_dispatcher: bool,
    pub programs: Programs,
}

#[derive(Debug)]
pub struct Programs {
    pub dispatcher: PathBuf,
    pub worker: PathBuf,
}

/// What clients, nemesis and sampler share.
struct Run {
    programs: Programs,
    directory: PathBuf,
    /// Stays open throughout: clients wait in its queue while there is no dispatcher.
    listener: TcpListener,
    clients: Clients,
    only_dispatcher: bool,
    /// Reserves the address of the listener that is added and removed.
    extra: SocketAddr,
}

impl Run {
    fn start_dispatcher(&self) -> Process {
        let listener = File::from(OwnedFd::from(self.listener.try_clone().unwrap()));
        let mut command =
            nemesis::dispatcher_command(&self.programs.dispatcher, listener, &self.directory);
        Process::start("dispatcher", &mut command)
    }

    fn start_worker(&self, flavour: &str, name: &str) -> Process {
        let mut command = Command::new(&self.programs.worker);
        command.env("CHAOS_ROLE", flavour).env("CHAOS_TAKEN", self.directory.join("taken"));
        command.env("DISPATCH_SOCKET", self.directory.join("dispatch.sock"));
        command.env("DISPATCH_POOL", "web").env("DISPATCH_NAME", name);
        let log = self.directory.join("worker-log");
        let log = File::options().create(true).append(true).open(log).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Process::start(name, &mut command)
    }

    fn admin(&self) -> PathBuf {
        self.directory.join("admin.sock")
    }

    fn serves(&self, process: &Process) -> bool {
        self.status().is_some_and(|status| i32::try_from(status.pid) == Ok(process.pid()))
    }

    fn has_answered(&self, worker: usize) -> bool {
        self.clients.told().answering.contains(&(worker as u32))
    }

    /// `None` while there is no dispatcher, or if it ends before it has answered.
    fn status(&self) -> Option<Status> {
        let (code, body) = http_get(&self.admin(), "/v1/status").ok()?;
        // While its processes end, a stopping dispatcher refuses.
        if code == 503 {
            return None;
        }
        assert_eq!(code, 200, "{body}");
        // A dispatcher that is killed may leave half an answer.
        serde_json::from_str(&body).ok()
    }

    fn wait_status(
        &self,
        what: &str,
        mut condition: impl FnMut(&Status) -> bool,
    ) -> Result<(), String> {
        let mut last = None;
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            last = self.status();
            if last.as_ref().is_some_and(&mut condition) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(format!("waited for {what}; last: {last:#?}"))
    }
}

/// Returns true without a problem. Prints a summary, and the history of each problem.
pub fn run(options: &Options) -> bool {
    let temp = configure(&configuration::plain());
    // Workers append to this file and never create it: a worker that outlives the test must fail.
    File::create(temp.path().join("taken")).unwrap();
    let listener = listen();
    let address = listener.local_addr().unwrap();
    let extra = free_address();
    let extra_target = Target { address: extra, refusal: Refusal::Counted };
    let run = Run {
        programs: Programs {
            dispatcher: options.programs.dispatcher.clone(),
            worker: options.programs.worker.clone(),
        },
        directory: temp.path().to_owned(),
        listener,
        // One client in five comes to the listener that is added and removed.
        clients: Clients::new(
            [[Target { address, refusal: Refusal::Never }; 4].as_slice(), &[extra_target]].concat(),
        ),
        only_dispatcher: options.only_dispatcher,
        extra,
    };
    println!("chaos for {:?}, seed {}", options.faults_for, options.seed);
    let began = Instant::now();
    let (baseline, memory_before) = baseline(&run);
    let mut nemesis = Nemesis::new(&run, options.seed);
    let sampling = AtomicBool::new(true);
    let mut samples = 0;
    let (fds, memory) = std::thread::scope(|scope| {
        let sampler = scope.spawn(|| sample(&run, &sampling));
        let clients: Vec<_> = (0..options.clients as u64)
            .map(|number| {
                let (run, seed) = (&run, options.seed ^ (number + 1) << 32);
                let thread = std::thread::Builder::new().stack_size(256 * 1024);
                thread.spawn_scoped(scope, move || run.clients.work(seed)).unwrap()
            })
            .collect();
        let _ended = OnDrop(|| {
            run.clients.stop.store(true, Ordering::SeqCst);
            sampling.store(false, Ordering::SeqCst);
        });
        let start = Instant::now();
        let spare = start + options.faults_for.mul_f64(if run.only_dispatcher { 1.0 } else { 0.7 });
        nemesis.rage(spare, start + options.faults_for);
        nemesis.relent();
        run.clients.stop.store(true, Ordering::SeqCst);
        for client in clients {
            if client.join().is_err() {
                nemesis.problems.push("a client panicked".to_owned());
            }
        }
        // Without processes of the dispatcher and without the second listener.
        write_config(&run.directory, &configuration::plain());
        nemesis.reload();
        let settled = settle(&run, &nemesis, options.seed);
        nemesis.problems.extend(settled.err());
        nemesis.dismiss_workers();
        let empty = |status: &Status| status.pools[0].workers.is_empty();
        nemesis.problems.extend(run.wait_status("the pool to be empty", empty).err());
        sampling.store(false, Ordering::SeqCst);
        match sampler.join() {
            Ok(count) => samples = count,
            Err(_) => nemesis.problems.push("a status did not balance".to_owned()),
        }
        let fds = settled_fds(&nemesis, baseline);
        let memory = nemesis.dispatcher_memory();
        nemesis.dismiss_dispatcher();
        (fds, memory)
    });
    if memory > memory_before + MEMORY {
        let problem = format!("the dispatcher had {memory_before} KiB before, {memory} KiB after");
        nemesis.problems.push(problem);
    }
    if fds > baseline {
        nemesis
            .problems
            .push(format!("the dispatcher had {baseline} descriptors before, {fds} after"));
    }
    let told = run.clients.told();
    let evidence = Evidence {
        told: &told,
        connections: run.clients.count(),
        records: &nemesis.records,
        deeds: &nemesis.deeds,
        killed: &nemesis.killed,
        directory: temp.path(),
    };
    let mut verdict = evidence.judge();
    verdict.problems.extend(nemesis.problems.iter().map(|problem| (None, problem.clone())));
    let unaccounted = u64::from(evidence.connections)
        - verdict.served
        - verdict.abandoned
        - told.refused
        - told.broken.len() as u64;
    if unaccounted > 0 {
        verdict.problems.push((None, format!("{unaccounted} connections without a report")));
    }
    report(&verdict, &evidence, began.elapsed(), options.seed, samples, (baseline, fds));
    println!("  memory of the dispatcher before and after: {memory_before} and {memory} KiB");
    let good = verdict.problems.is_empty();
    if !good && std::env::var_os("CHAOS_KEEP").is_some() {
        println!("kept: {}", temp.keep().display());
    }
    good
}

/// Tables that were used once keep their memory: less growth than this, in KiB, is no leak.
const MEMORY: u64 = 32 * 1024;

fn free_address() -> SocketAddr {
    TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

fn listen() -> TcpListener {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let any = std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 0);
    rustix::net::bind(&socket, &any).unwrap();
    rustix::net::listen(&socket, 4096).unwrap();
    socket.into()
}

/// The descriptors of a dispatcher that has had a worker of each kind and some clients, and has
/// none any more.
fn baseline(run: &Run) -> (usize, u64) {
    let mut nemesis = Nemesis::new(run, 0);
    nemesis.start_worker("blocking");
    nemesis.relent();
    run.wait_status("workers to join", |status| status.pools[0].workers.len() >= 3).unwrap();
    let mut random = Random::new(0);
    (0..20).for_each(|_| run.clients.must_be_served(&mut random));
    nemesis.dismiss_workers();
    run.wait_status("workers to leave", |status| status.pools[0].workers.is_empty()).unwrap();
    let fds = (nemesis.dispatcher_fds(), nemesis.dispatcher_memory());
    nemesis.dismiss_dispatcher();
    // The numbers of these workers will be used again.
    std::fs::write(run.directory.join("taken"), "").unwrap();
    run.clients.forget();
    fds
}

/// Requests the status repeatedly; every answer must balance.
fn sample(run: &Run, go_on: &AtomicBool) -> u64 {
    let mut samples = 0;
    while go_on.load(Ordering::SeqCst) {
        if let Some(status) = run.status() {
            assert_conserved(&status);
            samples += 1;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    samples
}

/// After the faults: every client is served, and the counts go down to zero.
fn settle(run: &Run, nemesis: &Nemesis<'_>, seed: u64) -> Result<(), String> {
    let mut random = Random::new(seed);
    let names = nemesis.names();
    // A suspect worker is trusted again only when it takes a connection.
    let there = |state: &str| matches!(state, "active" | "suspect");
    run.wait_status("all workers to be there", |status| {
        let workers = &status.pools[0].workers;
        names.iter().all(|name| workers.iter().any(|w| &w.name == name && there(&w.state)))
    })?;
    (0..200).for_each(|_| run.clients.must_be_served(&mut random));
    run.wait_status("every load to be zero", |status| {
        let idle = status.pools[0].workers.iter().all(|worker| worker.load == 0);
        idle && status.queued == 0 && status.in_flight == 0
    })
}

fn settled_fds(nemesis: &Nemesis<'_>, baseline: usize) -> usize {
    let deadline = Instant::now() + Duration::from_secs(10);
    wait_for("the descriptors to be closed", || {
        let fds = nemesis.dispatcher_fds();
        (fds <= baseline || Instant::now() > deadline).then_some(fds)
    })
}

fn report(
    verdict: &Verdict,
    evidence: &Evidence<'_>,
    took: Duration,
    seed: u64,
    samples: u64,
    fds: (usize, usize),
) {
    let row = |name: &str, count: u64| println!("  {name:<62} {count:>9}");
    println!("chaos, seed {seed}, took {took:.1?}");
    row("connections", evidence.connections.into());
    for (kind, count) in &evidence.told.kinds {
        row(&format!("- {kind:?}"), *count);
    }
    row("answered, whole", verdict.served);
    row("given up by the client itself", verdict.abandoned);
    row("not let in by a listener that was not there", evidence.told.refused);
    row("answered, then cut: its worker was killed", verdict.cut);
    row("lost", verdict.lost.values().sum());
    verdict.lost.iter().for_each(|(reason, count)| row(&format!("- {reason}"), *count));
    row("workers started", evidence.records.len() as u64);
    let count = |what| evidence.deeds.iter().filter(|deed| deed.what == what).count() as u64;
    for (what, name) in [
        (What::Kill, "workers killed"),
        (What::StopShort, "workers stopped for less than handoff_timeout"),
        (What::StopLong, "workers stopped for longer"),
        (What::Goodbye, "workers sent away"),
        (What::Starve, "workers starved of descriptors"),
        (What::DispatcherTerm, "dispatcher restarted by SIGTERM"),
        (What::DispatcherKill, "dispatcher restarted by SIGKILL"),
        (What::DispatcherStop, "dispatcher stopped and continued"),
        (What::Reload, "other configurations"),
        (What::Command, "drains, resumptions and scalings asked for"),
        (What::KillSpawned, "processes of the dispatcher's own killed"),
    ] {
        row(name, count(what));
    }
    verdict.told.iter().for_each(|(name, count)| row(name, *count));
    row("status samples that balanced", samples);
    println!("  descriptors of the dispatcher before and after: {} and {}", fds.0, fds.1);
    if verdict.problems.is_empty() {
        return println!("nothing was taken twice or lost without a reason");
    }
    println!("{} PROBLEMS, seed {seed}", verdict.problems.len());
    for (number, (id, problem)) in verdict.problems.iter().enumerate().take(20) {
        println!(
            "{}. {}{problem}",
            number + 1,
            id.map_or(String::new(), |id| format!("connection {id}: "))
        );
        // The history of many problems would only hide the first.
        if let Some(id) = id.filter(|_| number < 5) {
            println!("{}", evidence.history(id));
        }
    }
    tail(&evidence.directory.join("worker-log"), 20);
    tail(&evidence.directory.join("log"), 60);
}
