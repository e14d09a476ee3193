//! What a run came to, and figures of it.

use std::time::Duration;

/// What became of one client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Client {
    /// When it arrived, in nanoseconds after the start.
    pub at: u64,
    /// How long it waited; `None`: nothing took it.
    pub wait: Option<u64>,
    /// What took it.
    pub worker: u32,
    /// How often it was sent to a worker; the core only.
    pub sends: u32,
    /// It was at a worker while that was stopped; the core only.
    pub met_a_stop: bool,
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Every client, in the order of arrival.
    pub clients: Vec<Client>,
    /// How many of the first clients do not count.
    pub uncounted: usize,
    /// How often a worker that had taken connections became suspect after the warm-up; the core only.
    pub suspicions: u32,
    /// How often one of them did so again.
    pub alternations: u32,
    /// Clients that the dispatcher closed; the core only.
    pub closed: u32,
    /// The longest take of the worker that stopped, before it did, from when the connection was sent to it.
    pub usual: u64,
    /// The longest round of any other worker.
    pub longest_round: u64,
    /// The largest difference of loads of honest workers that ran.
    pub unevenness: u64,
    /// Things that happened.
    pub events: u64,
}

impl Outcome {
    /// Clients that count.
    pub fn counted(&self) -> &[Client] {
        &self.clients[self.uncounted..]
    }

    /// Clients that nothing took.
    pub fn lost(&self) -> usize {
        self.clients.iter().filter(|client| client.wait.is_none()).count()
    }

    /// How often connections that count were sent again.
    pub fn moves(&self) -> u64 {
        self.counted().iter().map(|client| u64::from(client.sends.saturating_sub(1))).sum()
    }

    /// Waits of those that count and were taken, the shortest first.
    pub fn waits(&self) -> Vec<u64> {
        let mut waits: Vec<u64> = self.counted().iter().filter_map(|client| client.wait).collect();
        waits.sort_unstable();
        waits
    }

    /// The part of the clients that arrived between these times that this worker took.
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

/// Of sorted numbers, in seconds; the largest for `part` = 1, and 0 if there are none.
pub fn percentile(sorted: &[u64], part: f64) -> f64 {
    let at = ((sorted.len() as f64 * part) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(0.0, |&nanos| nanos as f64 / 1e9)
}
