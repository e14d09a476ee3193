//! The result of a run, and its figures.

use std::time::Duration;

/// The result of one client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Client {
    /// Arrival time, in nanoseconds after the start.
    pub at: u64,
    /// Time until the take; `None` if no worker took it.
    pub wait: Option<u64>,
    /// The worker that took it.
    pub worker: u32,
    /// How often it was sent to a worker; the core only.
    pub sends: u32,
    /// Whether it was at a worker while that was stopped; the core only.
    pub met_a_stop: bool,
}

/// The result of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Every client, in the order of arrival.
    pub clients: Vec<Client>,
    /// Number of clients at the beginning that do not count.
    pub uncounted: usize,
    /// How often a worker that had taken connections became suspect after the warm-up; the core
    /// only.
    pub suspicions: u32,
    /// How often such a worker became suspect again.
    pub alternations: u32,
    /// Clients that the dispatcher closed; the core only.
    pub closed: u32,
    /// The longest take, measured from the handoff, of the worker that stopped, before it stopped.
    pub usual: u64,
    /// The longest round of any other worker.
    pub longest_round: u64,
    /// The largest difference between the loads of running honest workers.
    pub unevenness: u64,
    /// Number of events.
    pub events: u64,
}

impl Outcome {
    /// Clients after the warm-up.
    pub fn counted(&self) -> &[Client] {
        &self.clients[self.uncounted..]
    }

    /// Clients that no worker took.
    pub fn lost(&self) -> usize {
        self.clients.iter().filter(|client| client.wait.is_none()).count()
    }

    /// How often counted connections were resent.
    pub fn moves(&self) -> u64 {
        self.counted().iter().map(|client| u64::from(client.sends.saturating_sub(1))).sum()
    }

    /// Sorted waits of the counted clients that were taken.
    pub fn waits(&self) -> Vec<u64> {
        let mut waits: Vec<u64> = self.counted().iter().filter_map(|client| client.wait).collect();
        waits.sort_unstable();
        waits
    }

    /// This worker's share of the clients that arrived between these times.
    pub fn share(&self, worker: usize, from: Duration, to: Duration) -> f64 {
        let span = from.as_nanos() as u64..to.as_nanos() as u64;
        let all = self.clients.iter().filter(|client| span.contains(&client.at));
        let (mut count, mut mine) = (0u32, 0u32);
        for client in all {
            count += 1;
            mine += u32::from(client.wait.is_some() && client.worker as usize == worker);
        }
        f64::from(mine) / f64::from(count.max(1))
    }
}

/// A percentile of sorted numbers, in seconds; the largest for `part` = 1, and 0 if there are none.
pub fn percentile(sorted: &[u64], part: f64) -> f64 {
    let at = ((sorted.len() as f64 * part) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(0.0, |&nanos| nanos as f64 / 1e9)
}
