//! The plan of a run: its faults and their times; also reduces the plan of a failing run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use super::Random;
use super::run::{Outcome, run};

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The process stops for a while, then continues.
    Hang(Duration),
    /// The process dies; another replaces it later.
    Crash,
    /// The process says goodbye, finishes its connections and ends.
    Leave,
    /// The process loses its connection to the dispatcher, keeps its clients, and joins again.
    Rejoin,
    /// Descriptors do not arrive at the process for a while.
    LoseFds(Duration),
    /// The process writes random counters from now on.
    Lie,
    /// The process writes an impossible word into its next slot.
    Scribble,
    /// The process's channel has room for one record only, for a while.
    SmallChannel(Duration),
    /// The process closes its end of the channel, and dies later.
    CloseChannel,
    /// An operator drains its worker, and resumes it after a while.
    Drain(Duration),
    /// This number of sends fails for lack of resources.
    Scarcity(u32),
    /// This number of clients arrives at once.
    Burst(u32),
}

/// A fault of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Time after the start.
    pub at: Duration,
    /// The process.
    pub process: usize,
    /// The fault.
    pub kind: FaultKind,
}

/// A run: its plan determines everything in it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed of everything except the faults.
    pub seed: u64,
    /// Number of processes; a few in most runs, thousands in some.
    pub processes: u64,
    /// How long faults occur and clients arrive.
    pub horizon: Duration,
    /// The faults, by time.
    pub faults: Vec<Fault>,
}

impl Plan {
    /// The plan for a seed. One in 64 has many workers, one in 256 very many, for a shorter time.
    pub fn from_seed(seed: u64) -> Plan {
        let mut random = Random::new(seed ^ 0xfau64);
        let (processes, most_faults, horizon) = match seed % 256 {
            255 => (2_000, 4_000, Duration::from_millis(500)),
            63 | 127 | 191 => (200, 600, Duration::from_secs(1)),
            _ => (1 + random.below(6), 60, Duration::from_secs(6)),
        };
        let count = random.below(most_faults);
        let mut faults: Vec<Fault> = (0..count)
            .map(|_| Fault {
                at: Duration::from_micros(random.below(horizon.as_micros() as u64)),
                process: random.below(processes) as usize,
                kind: kind(&mut random),
            })
            .collect();
        faults.sort_by_key(|fault| fault.at);
        Plan { seed, processes, horizon, faults }
    }
}

fn kind(random: &mut Random) -> FaultKind {
    let time = Duration::from_millis(random.below(800));
    match random.below(16) {
        0..=2 => FaultKind::Hang(time),
        3..=4 => FaultKind::Crash,
        5 => FaultKind::Leave,
        6 => FaultKind::Rejoin,
        7 => FaultKind::LoseFds(time),
        8 => FaultKind::Lie,
        9 => FaultKind::Scribble,
        10 => FaultKind::SmallChannel(time),
        11 => FaultKind::CloseChannel,
        12..=13 => FaultKind::Drain(time),
        14 => FaultKind::Scarcity(1 + random.below(20) as u32),
        _ => FaultKind::Burst(random.below(300) as u32),
    }
}

/// Runs a plan; the error is the reason of a failure.
pub fn attempt(plan: &Plan) -> Result<Outcome, String> {
    catch_unwind(AssertUnwindSafe(|| run(plan))).map_err(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        text.unwrap_or_else(|| "a panic without a text".to_owned())
    })
}

/// Reduces a failing plan: leaves out parts of the faults, in ever smaller portions, as long as the
/// run still fails.
pub fn shrink(plan: &Plan, mut fails: impl FnMut(&Plan) -> bool) -> Plan {
    let mut best = plan.clone();
    let mut portion = best.faults.len().div_ceil(2);
    let mut tries = 200;
    while portion > 0 && tries > 0 {
        let mut at = 0;
        while at < best.faults.len() && tries > 0 {
            tries -= 1;
            let mut shorter = best.clone();
            let end = (at + portion).min(shorter.faults.len());
            shorter.faults.drain(at..end);
            if fails(&shorter) {
                best = shorter;
            } else {
                at += portion;
            }
        }
        portion /= 2;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shrinking_finds_the_two_faults_that_matter() {
        let plan = (0..).map(Plan::from_seed).find(|plan| plan.faults.len() > 40);
        let plan = plan.unwrap();
        let (first, second) = (plan.faults[7], plan.faults[31]);
        let shortest =
            shrink(&plan, |plan| plan.faults.contains(&first) && plan.faults.contains(&second));
        assert_eq!(shortest.faults, [first, second]);
    }
}
