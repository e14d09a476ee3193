//! Evenness: how many connections each worker has while connections are opened and closed. Each
//! worker sends its index at the start of a connection; the load generator counts.
//!
//! Time is virtual: the connection whose life ends next is closed, and another is opened at once,
//! without a wait until the worker notices the close. So the load is the same for every contender,
//! fast or slow.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::{CpuMeter, Lifetimes, Metrics, Request, client_socket};
use crate::stats::{Evenness, Random, percentile};

pub(super) struct Plan {
    pub(super) workers: usize,
    pub(super) held: usize,
    pub(super) churn: usize,
    pub(super) lifetimes: Lifetimes,
    pub(super) burst: usize,
}

struct Crowd<'a> {
    request: &'a Request,
    counts: Vec<u64>,
    opened: usize,
}

/// A connection and its worker.
struct Held {
    _fd: OwnedFd,
    worker: usize,
}

pub(super) fn run(request: &Request, plan: &Plan) -> io::Result<Metrics> {
    let mut crowd = Crowd { request, counts: vec![0; plan.workers], opened: 0 };
    let meter = CpuMeter::start(&request.processes);
    let mut random = Random(1);
    let mut clients: Vec<Option<Held>> = Vec::new();
    let mut ends = BinaryHeap::new();
    for place in 0..plan.held {
        clients.push(Some(crowd.open()?));
        ends.push(Reverse((lifetime(plan.lifetimes, &mut random), place)));
    }
    let mut metrics = Metrics::new();
    add(&mut metrics, "fill_", Evenness::of(&crowd.counts));

    let (mut ratios, mut variations, mut spreads) = (Vec::new(), Vec::new(), Vec::new());
    for event in 0..plan.churn {
        let Some(Reverse((time, place))) = ends.pop() else { break };
        if let Some(held) = clients[place].take() {
            crowd.counts[held.worker] -= 1;
        }
        clients[place] = Some(crowd.open()?);
        let end = time + lifetime(plan.lifetimes, &mut random);
        ends.push(Reverse((end, place)));
        // During the first quarter the ages of the connections become a steady mixture.
        if event >= plan.churn / 4 {
            let now = Evenness::of(&crowd.counts);
            ratios.push(now.max_over_mean);
            variations.push(now.variation);
            spreads.push(now.spread);
        }
    }
    for (name, mut values) in
        [("max_over_mean", ratios), ("variation", variations), ("spread", spreads)]
    {
        values.sort_by(f64::total_cmp);
        metrics.insert(format!("churn_{name}"), percentile(&values, 0.5));
        metrics.insert(format!("churn_{name}_p99"), percentile(&values, 0.99));
    }

    let before = crowd.counts.clone();
    let burst = crowd.burst(plan.burst)?;
    let gained: Vec<u64> =
        crowd.counts.iter().zip(&before).map(|(now, then)| now.saturating_sub(*then)).collect();
    add(&mut metrics, "burst_", Evenness::of(&gained));
    meter.read().add_to(&mut metrics, crowd.opened as f64, 1);
    drop(burst);
    Ok(metrics)
}

fn add(metrics: &mut Metrics, prefix: &str, evenness: Evenness) {
    metrics.insert(format!("{prefix}max_over_mean"), evenness.max_over_mean);
    metrics.insert(format!("{prefix}variation"), evenness.variation);
    metrics.insert(format!("{prefix}spread"), evenness.spread);
}

/// In thousandths of the mean life.
fn lifetime(kind: Lifetimes, random: &mut Random) -> u64 {
    let unit = random.unit();
    let lives = match kind {
        Lifetimes::Exponential => -unit.ln(),
        // Shape 1.5, scaled to a mean of 1.
        Lifetimes::HeavyTailed => unit.powf(-1.0 / 1.5) / 3.0,
    };
    (lives * 1000.0).min(1e12) as u64
}

impl Crowd<'_> {
    /// Opens a connection and waits for the index of its worker.
    fn open(&mut self) -> io::Result<Held> {
        let fd = client_socket(false)?;
        rustix::net::connect(&fd, &self.request.addresses[0])?;
        self.count(fd)
    }

    /// Opens many connections, then reads the indices of their workers.
    fn burst(&mut self, count: usize) -> io::Result<Vec<Held>> {
        let mut fresh = Vec::with_capacity(count);
        for _ in 0..count {
            let fd = client_socket(true)?;
            match rustix::net::connect(&fd, &self.request.addresses[0]) {
                Ok(()) | Err(Errno::INPROGRESS) => fresh.push(fd),
                Err(error) => return Err(error.into()),
            }
        }
        fresh
            .into_iter()
            .map(|fd| {
                rustix::io::ioctl_fionbio(&fd, false)?;
                self.count(fd)
            })
            .collect()
    }

    fn count(&mut self, fd: OwnedFd) -> io::Result<Held> {
        let mut index = [0; 2];
        let (_, received) = rustix::net::recv(&fd, &mut index, RecvFlags::WAITALL)?;
        let worker = usize::from(u16::from_le_bytes(index));
        if received != index.len() || worker >= self.counts.len() {
            return Err(io::Error::other("a client was not told its worker"));
        }
        self.counts[worker] += 1;
        self.opened += 1;
        Ok(Held { _fd: fd, worker })
    }
}
