//! Reads the gauges of workers: only those that a policy uses, and only in pools with such a
//! policy.
//!
//! It maps the gauges of a scoreboard to those of the pool and keeps the last readings. The core
//! says when to read and what a reading is worth. The status shows every gauge that has a name.

use std::sync::Arc;

use dispatch_protocol::scoreboard::Scoreboard;
use dispatch_protocol::scoreboard::gauge::{GaugeName, Reading};

use super::EventLoop;
use super::time::Stamps;
use crate::api::status::{GaugeStatus, Status};
use dispatcher_core::{Core, PoolId, Scored, Time, WorkerId};

/// The gauges of one worker that its pool scores by.
#[derive(Debug)]
pub(super) struct Gauges {
    pool: PoolId,
    scored: Vec<Place>,
    /// The number of gauges whose names were read. Each name is read once, so that a worker cannot
    /// make the dispatcher read it again and again.
    known: u32,
}

#[derive(Debug)]
struct Place {
    name: GaugeName,
    /// The number in the scoreboard, once the worker has named the gauge.
    number: Option<u32>,
    /// The last reading reported to the core.
    told: Option<Reading>,
}

impl Gauges {
    /// For a worker of this pool; `None` if the pool does not score by gauges.
    pub(super) fn new(core: &Core, pool: PoolId) -> Option<Gauges> {
        let scored: Vec<Place> = core
            .scored_gauges(pool)
            .iter()
            .map(|gauge| Place { name: gauge.name, number: None, told: None })
            .collect();
        (!scored.is_empty()).then_some(Gauges { pool, scored, known: 0 })
    }

    fn read(
        &mut self,
        board: &Scoreboard,
        core: &mut Core,
        now: Time,
        worker: WorkerId,
        stamps: &Stamps,
    ) {
        let named = board.named_gauges();
        while self.known < named {
            self.learn(board, core, worker);
        }
        for (position, gauge) in self.scored.iter_mut().enumerate() {
            let Some(said) = gauge.number.map(|number| board.gauge(number)) else { continue };
            if !is_same(said, gauge.told) {
                gauge.told = said;
                let ours = |reading: Reading| Reading { at: stamps.past(reading.at).0, ..reading };
                core.gauge(now, worker, position, said.map(ours));
            }
        }
    }

    fn learn(&mut self, board: &Scoreboard, core: &mut Core, worker: WorkerId) {
        let number = self.known;
        self.known += 1;
        let name = match board.gauge_name(number) {
            Some(Ok(name)) => name,
            Some(Err(_)) | None => return core.misnamed_gauge(worker, None),
        };
        if let Some(gauge) = self.scored.iter_mut().find(|gauge| gauge.name == name) {
            match gauge.number {
                None => gauge.number = Some(number),
                Some(_) => core.misnamed_gauge(worker, Some(name)),
            }
        }
    }
}

/// Compares bits: NaN is never equal to itself.
fn is_same(a: Option<Reading>, b: Option<Reading>) -> bool {
    let bits = |reading: Reading| (reading.value.to_bits(), reading.at);
    a.map(bits) == b.map(bits)
}

impl EventLoop {
    /// Reports changed gauges to the core, before any decision of this turn.
    pub(super) fn read_gauges(&mut self) {
        if !self.workers.any_gauges() {
            return;
        }
        self.workers.gauges_due.clear();
        for pool in 0..self.pools.len() as u16 {
            self.workers.gauges_due.push(self.core.reads_gauges(self.now, PoolId(pool)));
        }
        let mut stamps = None;
        for io in self.workers.table.iter_mut().flatten() {
            if let Some(gauges) = &mut io.gauges
                && (self.workers.gauges_due.get(usize::from(gauges.pool.0)) == Some(&true)
                    || self.core.lacks_gauges(io.id))
            {
                let stamps = stamps.get_or_insert_with(Stamps::now);
                gauges.read(&io.lane.board, &mut self.core, stamps.ours, io.id, stamps);
            }
        }
    }

    /// The scoreboards of all workers with gauges, for another thread to read.
    pub(super) fn boards(&self) -> Vec<Shown> {
        let shown = self.workers.table.iter().flatten().filter_map(|io| {
            let scored = self.core.score(self.now, io.id);
            let named = scored.is_some() || io.lane.board.named_gauges() > 0;
            named.then(|| Shown { worker: io.id.serial, scored, board: Arc::clone(&io.lane.board) })
        });
        shown.collect()
    }
}

/// A worker's gauges and score.
pub(super) struct Shown {
    worker: u64,
    scored: Option<Scored>,
    board: Arc<Scoreboard>,
}

/// Adds the gauges of all workers to a status.
pub(super) fn show_gauges(shown: Vec<Shown>, status: &mut Status) {
    let stamps = Stamps::now();
    for Shown { worker: id, scored, board } in shown {
        let worker = status.pools.iter_mut().find_map(|pool| {
            let at = pool.workers.binary_search_by_key(&id, |worker| worker.id);
            pool.workers.get_mut(at.ok()?)
        });
        if let Some(worker) = worker {
            worker.gauges = all(&board, &stamps);
            match scored {
                Some(Scored::Score(score)) => worker.score = Some(score),
                Some(out) => worker.not_scored = Some(out.to_string()),
                None => {}
            }
        }
    }
}

/// All gauges with valid names, in the order in which the worker named them; of two with the same
/// name the first.
pub(super) fn all(board: &Scoreboard, stamps: &Stamps) -> Vec<GaugeStatus> {
    let mut shown: Vec<GaugeStatus> = Vec::new();
    for number in 0..board.named_gauges() {
        let Some(Ok(name)) = board.gauge_name(number) else { continue };
        if shown.iter().any(|other| other.name == name.as_str()) {
            continue;
        }
        let reading = board.gauge(number).filter(|reading| reading.value.is_finite());
        shown.push(GaugeStatus {
            name: name.to_string(),
            value: reading.map(|reading| reading.value),
            age_milliseconds: reading.map(|reading| {
                u64::try_from((stamps.ours - stamps.past(reading.at)).as_millis())
                    .unwrap_or(u64::MAX)
            }),
        });
    }
    shown
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_name_that_is_there_twice_is_shown_once() {
        let (board, _fd) = Scoreboard::create(1, 0).unwrap();
        for (name, value) in [("x", 1.0), ("y", 2.0), ("x", 3.0)] {
            let number = board.name_gauge(&name.parse().unwrap()).unwrap();
            board.set_gauge(number, Reading { value, at: 1_000_000 });
        }
        let shown = all(&board, &Stamps { ours: Time(3_000_000), realtime: 3_000_000 });
        let shown: Vec<_> =
            shown.iter().map(|g| (g.name.as_str(), g.value, g.age_milliseconds)).collect();
        assert_eq!(shown, [("x", Some(1.0), Some(2)), ("y", Some(2.0), Some(2))]);
    }
}
