//! Chaos on dispatchers in steer mode: clients that number each connection, unmodified servers that
//! write down what they accepted, a nemesis, and a checker.
//!
//! Requirements: a connection is answered by one server, or lost for a reason that is documented.
//! At quiet points the counts of the dispatcher are those of the kernel's list of sockets, with
//! connections and without; maps, descriptors, memory and processes are as in the beginning. At the
//! end nothing is left.

mod census;
#[path = "../steered/cgroup.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod cgroup;
mod checker;
#[path = "../chaos/client.rs"]
#[allow(dead_code, reason = "shared with the chaos of passed connections")]
mod client;
#[path = "../steered/place.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod lab;
mod nemesis;
pub mod place;
#[path = "../chaos/protocol.rs"]
pub mod protocol;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use census::Quiet;
use checker::{Evidence, report};
use nemesis::Nemesis;
use place::{MEMBERS, PUBLICS, Run};
use simulator::Random;
use test_support::chaos::OnDrop;
use test_support::{assert_conserved, wait_until};

/// The faults and the duration.
#[derive(Debug)]
pub struct Options {
    pub faults_for: Duration,
    pub seed: u64,
    pub clients: usize,
    pub programs: Programs,
}

#[derive(Debug)]
pub struct Programs {
    pub dispatcher: PathBuf,
    pub server: PathBuf,
}

/// The time between two quiet points.
const ROUND: Duration = Duration::from_secs(20);

/// Tables that were used once keep their memory: less growth than this, in KiB, is no leak.
const MEMORY: u64 = 32 * 1024;

/// Links of the programs of all pools.
const LINKS: usize = 8;

/// Returns true without a problem, or if it was skipped. Prints a summary, and the history of each
/// problem.
pub fn run(options: &Options) -> bool {
    let programs = Programs {
        dispatcher: options.programs.dispatcher.clone(),
        server: options.programs.server.clone(),
    };
    let Some(run) = place::enter(programs) else { return true };
    println!("steer chaos for {:?}, seed {}", options.faults_for, options.seed);
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The run ends early, in order.
        signal_hook::flag::register(signal, std::sync::Arc::clone(&run.clients.stop)).unwrap();
    }
    test_support::write_config(&run.directory, &run.configuration(None));
    let began = Instant::now();
    let mut nemesis = Nemesis::new(&run, options.seed);
    let mut random = Random::new(options.seed);
    let mut quiets: Vec<Quiet> = Vec::new();
    let sampling = AtomicBool::new(true);
    run.clients.paused.store(true, Ordering::SeqCst);
    let samples = std::thread::scope(|scope| {
        let sampler = scope.spawn(|| sample(&run, &sampling));
        let clients: Vec<_> = (0..options.clients as u64)
            .map(|number| {
                let (run, seed) = (&run, options.seed ^ ((number + 1) << 32));
                let thread = std::thread::Builder::new().stack_size(256 * 1024);
                thread.spawn_scoped(scope, move || run.clients.work(seed)).unwrap()
            })
            .collect();
        let _ended = OnDrop(|| {
            run.clients.stop.store(true, Ordering::SeqCst);
            sampling.store(false, Ordering::SeqCst);
        });
        let end = Instant::now() + options.faults_for;
        // The first one is the state before any fault.
        while let Some(quiet) = be_quiet(&run, &mut nemesis, &mut random) {
            quiets.push(quiet);
            let now = Instant::now();
            if now >= end || run.clients.stop.load(Ordering::SeqCst) {
                break;
            }
            run.clients.paused.store(false, Ordering::SeqCst);
            nemesis.rage(end.min(now + ROUND));
        }
        run.clients.stop.store(true, Ordering::SeqCst);
        for client in clients {
            if client.join().is_err() {
                nemesis.problems.push("a client panicked".to_owned());
            }
        }
        sampling.store(false, Ordering::SeqCst);
        sampler.join().unwrap_or_else(|_| {
            nemesis.problems.push("a status did not balance".to_owned());
            0
        })
    });
    nemesis.dismiss();
    let left = leave(&run, &mut nemesis);
    nemesis.problems.extend(left);
    nemesis.problems.extend(growth(&quiets));
    let told = run.clients.told();
    let evidence = Evidence {
        run: &run,
        told: &told,
        connections: run.clients.count(),
        servers: &run.register(),
        deeds: &nemesis.deeds,
    };
    let mut verdict = evidence.judge();
    let others = nemesis.problems.iter().map(|problem| (None, problem.clone()));
    verdict.problems.splice(0..0, others);
    report(&verdict, &evidence, &quiets, nemesis.forged, samples);
    println!("steer chaos, seed {}, took {:.1?}", options.seed, began.elapsed());
    let good = verdict.problems.is_empty();
    if !good && let Some(place) = std::env::var_os("CHAOS_KEEP") {
        let mut copy = std::process::Command::new("cp");
        let copied = copy.arg("-r").arg(&run.directory).arg(&place).status();
        println!("kept in {}: {copied:?}", place.display());
    }
    good
}

/// Stops the load and the faults, and compares. `None` if that shows a problem.
fn be_quiet(run: &Run, nemesis: &mut Nemesis<'_>, random: &mut Random) -> Option<Quiet> {
    let mut compared = nemesis.relent().and_then(|()| compare(run, nemesis, random));
    for _ in 0..MEMBERS.len() {
        // A member that was told to end has done so only now: the end of a listener that was open
        // before the programs is found out later.
        let absent = run.status().is_none_or(|it| census::everything_is_there(&it).is_err());
        if compared.is_ok() || !absent {
            break;
        }
        compared = compare(run, nemesis, random);
    }
    compared.map_err(|problem| nemesis.problems.push(problem)).ok()
}

fn compare(run: &Run, nemesis: &mut Nemesis<'_>, random: &mut Random) -> Result<Quiet, String> {
    census::hush(&run.clients, &mut || nemesis.tend())?;
    run.wait_status("every worker to be there", |status| {
        nemesis.tend();
        census::everything_is_there(status)
    })?;
    census::compare(run, nemesis.dispatcher().ok_or("no dispatcher")?, random)
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

/// After the end of the dispatcher: nothing of it may be left. Ends everything else.
fn leave(run: &Run, nemesis: &mut Nemesis<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    if lab::has_files(&run.pins) {
        problems.push(format!("pins are left in {}", run.pins.display()));
    }
    let left = run.processes("dispatcher");
    if !left.is_empty() {
        problems.push(format!("processes are left: {left:?}"));
    }
    for (address, _) in PUBLICS {
        if std::net::TcpStream::connect(address).is_ok() {
            problems.push(format!("{address} lets clients in after the end"));
        }
    }
    nemesis.dismiss_members();
    let _ = std::fs::write(run.cgroup.0.join("cgroup.kill"), "1");
    wait_until("every process to end", || {
        let all = ["dispatcher"].into_iter().chain(MEMBERS.map(|(name, _)| name));
        all.into_iter().all(|name| run.processes(name).is_empty())
    });
    problems
}

/// What the dispatcher uses more than at the first quiet point.
fn growth(quiets: &[Quiet]) -> Vec<String> {
    let Some(first) = quiets.first() else { return Vec::new() };
    let mut problems = Vec::new();
    for (number, quiet) in quiets.iter().enumerate() {
        for (kind, count) in &quiet.used.fds {
            // A dispatcher that has adopted the programs has descriptors of their links.
            let adopted = if kind == "anon_inode:bpf-link" { LINKS } else { 0 };
            let before = first.used.fds.get(kind).copied().unwrap_or(0).max(adopted);
            if *count > before {
                problems.push(format!(
                    "at quiet point {number} the dispatcher has {count} of {kind}, not {before}"
                ));
            }
        }
        if quiet.used.memory > first.used.memory + MEMORY {
            let (before, now) = (first.used.memory, quiet.used.memory);
            problems.push(format!("at quiet point {number} it has {now} KiB, not {before}"));
        }
    }
    problems
}
