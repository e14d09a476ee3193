//! What is measured: each work is a list of cases, each case a list of variants that take turns.

mod bulk;
mod even;
mod growth;
mod idle;
mod short;
mod slow;
mod steer;

use std::io;
use std::path::PathBuf;

use clap::ValueEnum;

use crate::calls::Calls;
use crate::contender::{Contender, How, Setup};
use crate::load::{self, Job, Metrics, Request, Role};
use crate::machine;
use crate::namespace::Namespace;
use crate::report::{self, Report};
use crate::worker::Kind;

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// Short connections: rate, latency, CPU.
    Short,
    /// The same; the client waits for the end.
    ShortFin,
    /// One client at a time: from connect to application.
    Idle,
    /// Many bytes through one connection.
    Bulk,
    /// How evenly held connections are spread.
    Even,
    /// More workers, listeners and held connections.
    Growth,
    /// Workers that take seldom: how long clients wait, compared with a shared listener.
    Slow,
    /// The kernel chooses the worker (`mode = "steer"`); as root, in a network namespace.
    Steer,
}

impl Work {
    pub const ALL: [Work; 8] = [
        Work::Short,
        Work::ShortFin,
        Work::Idle,
        Work::Bulk,
        Work::Even,
        Work::Growth,
        Work::Slow,
        Work::Steer,
    ];

    fn cases(self, plan: &Plan) -> Vec<Case> {
        match self {
            Work::Short => short::cases(plan, false),
            Work::ShortFin => short::cases(plan, true),
            Work::Idle => idle::cases(plan),
            Work::Bulk => bulk::cases(plan),
            Work::Even => even::cases(plan),
            Work::Growth => growth::cases(plan),
            Work::Slow => slow::cases(plan),
            Work::Steer => steer::cases(plan),
        }
    }
}

/// One call of the program.
#[derive(Debug)]
pub struct Plan {
    pub works: Vec<Work>,
    pub only: Vec<String>,
    pub quick: bool,
    pub rounds: usize,
    /// Threads that connect, in the work `steer`.
    pub threads: usize,
    pub out: Option<PathBuf>,
    pub dispatcher: PathBuf,
}

impl Plan {
    /// Every contender, or the most informative ones.
    fn contenders(&self) -> Vec<Contender> {
        let kinds: &[Kind] =
            if self.quick { &[Kind::Mio] } else { &[Kind::Mio, Kind::Blocking, Kind::Tokio] };
        let mut all = Vec::new();
        for how in [How::Dispatcher, How::ReusePort, How::Shared, How::Bare] {
            let kinds = kinds.iter().filter(|&&kind| {
                // The bare loop has no tokio worker; shared accept with tokio shows nothing new.
                kind != Kind::Tokio || matches!(how, How::Dispatcher | How::ReusePort)
            });
            all.extend(kinds.map(|&kind| Contender::new(how, kind)));
        }
        all.extend([How::HaProxy, How::Nginx, How::Node].map(|how| Contender::new(how, Kind::Mio)));
        all
    }
}

/// A figure of the table.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    pub key: &'static str,
    pub label: &'static str,
    pub decimals: usize,
}

pub const fn column(key: &'static str, label: &'static str, decimals: usize) -> Column {
    Column { key, label, decimals }
}

/// Variants that are measured in alternation and compared with each other.
#[derive(Debug)]
pub struct Case {
    pub title: String,
    /// The figure whose ratios are reported, with its spread.
    pub main: Column,
    /// More such figures.
    pub others: Vec<Column>,
    pub columns: Vec<Column>,
    pub variants: Vec<Variant>,
}

/// A contender and its job.
#[derive(Clone, Debug)]
pub struct Variant {
    pub label: String,
    pub contender: Contender,
    pub setup: Setup,
    pub job: Job,
    /// The reason why this variant is skipped, if there is one.
    pub excuse: Option<String>,
}

/// The baseline of a variant's ratio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// The variant with this way and the same kind of worker.
    How(How),
    /// The case's first variant.
    First,
}

impl Baseline {
    pub fn label(self) -> &'static str {
        match self {
            Baseline::How(How::Bare) => "to bare loop",
            Baseline::How(How::Shared) => "to a shared listener",
            Baseline::How(_) => "to SO_REUSEPORT",
            Baseline::First => "to the first",
        }
    }

    pub fn of(self, variant: &Variant, all: &[Variant]) -> Option<usize> {
        match self {
            Baseline::First => Some(0),
            Baseline::How(how) => all
                .iter()
                .position(|other| other.contender == Contender::new(how, variant.contender.kind)),
        }
    }
}

impl Case {
    /// The same setup and job for every contender.
    fn same(
        title: String,
        main: Column,
        columns: &[Column],
        contenders: Vec<Contender>,
        setup: &Setup,
        job: &Job,
    ) -> Case {
        let variant = |contender: Contender| Variant {
            label: contender.name(),
            contender,
            setup: setup.clone(),
            job: job.clone(),
            excuse: None,
        };
        let variants = contenders.into_iter().map(variant).collect();
        Case { title, main, others: Vec::new(), columns: columns.to_vec(), variants }
    }

    pub fn baselines(&self) -> &'static [Baseline] {
        let has = |how| self.variants.iter().any(|variant| variant.contender.how == how);
        if has(How::Shared) && !has(How::ReusePort) {
            return &[Baseline::How(How::Shared)];
        }
        match (has(How::ReusePort), has(How::Bare)) {
            (true, true) => &[Baseline::How(How::ReusePort), Baseline::How(How::Bare)],
            (true, false) => &[Baseline::How(How::ReusePort)],
            (false, _) => &[Baseline::First],
        }
    }
}

/// Measures everything, prints each case when it is done, and writes the files.
pub fn run(plan: &Plan) -> io::Result<()> {
    let limit = machine::raise_descriptors();
    let mut report = Report::new(plan);
    println!("{}", report.heading());
    if limit < 18_000 {
        println!("At most {limit} descriptors for each process: loads that need more will fail.\n");
    }
    for work in &plan.works {
        let namespace = (*work == Work::Steer).then(Namespace::enter).transpose();
        if let Err(error) = &namespace {
            let reason = format!("no network namespace of its own ({error}); run it as root");
            report.skip(&format!("{work:?}"), "everything", &reason);
            continue;
        }
        for case in work.cases(plan) {
            let results = measure(plan, &case, &mut report);
            let table = report::table(&case, &results);
            println!("{table}");
            report.add(*work, case, results);
        }
    }
    println!("{}", report.skipped());
    if let Some(directory) = &plan.out {
        report.write(directory)?;
        println!("Written: results.json, tables.md and chart.svg in {}", directory.display());
    }
    Ok(())
}

/// Each variant in turn, round after round; every second round backwards, so that no variant is
/// always first.
fn measure(plan: &Plan, case: &Case, report: &mut Report) -> Vec<Vec<Metrics>> {
    let mut results = vec![Vec::new(); case.variants.len()];
    let mut left_out = vec![false; case.variants.len()];
    for round in 0..plan.rounds {
        let mut order: Vec<usize> = (0..case.variants.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let variant = &case.variants[at];
            if left_out[at] {
                continue;
            }
            let unwanted = !plan.only.is_empty()
                && !plan.only.iter().any(|text| variant.label.contains(text.as_str()));
            if unwanted {
                left_out[at] = true;
                continue;
            }
            let missing = variant.excuse.clone();
            let outcome = match missing.or_else(|| variant.contender.missing(&plan.dispatcher)) {
                Some(reason) => Err(io::Error::other(reason)),
                None => once(variant, plan),
            };
            match outcome {
                Ok(metrics) => results[at].push(metrics),
                Err(error) => {
                    // Rounds must stay comparable: a variant that fails once is skipped in this
                    // case.
                    report.skip(&case.title, &variant.label, &error.to_string());
                    results[at].clear();
                    left_out[at] = true;
                }
            }
        }
    }
    results
}

fn once(variant: &Variant, plan: &Plan) -> io::Result<Metrics> {
    let running = variant.contender.start(&variant.setup, &plan.dispatcher)?;
    let front = running.processes.iter().find(|process| process.role == Role::Front);
    let front = front.filter(|_| variant.setup.count_calls).map(|process| process.pid);
    let calls = front.map(Calls::start).transpose()?;
    let mut metrics = load::drive(&Request {
        addresses: running.addresses.clone(),
        processes: running.processes.clone(),
        job: variant.job.clone(),
    })?;
    if let Some(calls) = calls {
        calls.finish(&mut metrics)?;
    }
    if let Some(decision) = variant.contender.decision(&running)? {
        metrics.insert("decision".to_owned(), decision);
    }
    Ok(metrics)
}
