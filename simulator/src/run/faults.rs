//! Faults of a run: their beginnings and ends.

use std::time::Duration;

use super::{Process, Run, What};
use crate::plan::FaultKind;
use dispatcher_core::*;

impl Run<'_> {
    pub(super) fn fault(&mut self, p: usize, kind: FaultKind) {
        match kind {
            FaultKind::Hang(time) => self.impair(p, time, |process| process.hung = true),
            FaultKind::LoseFds(time) => self.impair(p, time, |process| process.losing = true),
            FaultKind::SmallChannel(time) => {
                if let Some(worker) = self.processes[p].worker {
                    self.driver.link(worker).capacity = 1;
                }
                self.impair(p, time, |_| {});
            }
            FaultKind::Crash => self.die(p),
            FaultKind::Leave => {
                if let Some(worker) = self.processes[p].worker {
                    self.processes[p].leaving = true;
                    self.driver.core.goodbye(self.driver.now, worker);
                    self.driver.pump();
                    self.hear_of_races();
                    if self.processes[p].live() == 0 {
                        self.die(p);
                    }
                }
            }
            FaultKind::Rejoin => self.rejoin(p),
            FaultKind::Lie => self.processes[p].lying = true,
            FaultKind::Scribble => self.processes[p].scribbling = true,
            FaultKind::CloseChannel => {
                if let Some(worker) = self.processes[p].worker {
                    self.driver.link(worker).closed = true;
                }
                self.processes[p].leaving = true;
            }
            FaultKind::Drain(time) => {
                if let Some(worker) = self.processes[p].worker {
                    let now = self.driver.now;
                    let deadline = self.random.once_in(2).then(|| now + time / 2);
                    self.driver.core.drain_worker(now, worker, deadline);
                    self.driver.pump();
                    self.hear_of_races();
                    self.after(time.as_nanos() as u64, What::Resume(worker.serial));
                }
            }
            FaultKind::Scarcity(count) => self.driver.scarcity += count,
            FaultKind::Burst(count) => self.backlog = (self.backlog + count).min(self.most_waiting),
        }
    }

    pub(super) fn resume(&mut self, serial: u64) {
        let worker = self.driver.links[serial as usize - 1].id;
        // A worker that is leaving cannot be resumed.
        let _ = self.driver.core.resume_worker(self.driver.now, worker);
        self.driver.pump();
        self.hear_of_races();
    }

    fn impair(&mut self, p: usize, time: Duration, change: impl FnOnce(&mut Process)) {
        change(&mut self.processes[p]);
        self.after(time.as_nanos() as u64, What::Heal(p));
    }

    /// The process's connection to the dispatcher breaks; the process reads the old channel to its
    /// end before it joins again.
    fn rejoin(&mut self, p: usize) {
        let process = &mut self.processes[p];
        let Some(worker) = process.worker else { return };
        if process.lying || process.leaving || process.hung {
            return;
        }
        while self.driver.take(worker).is_some() {
            self.took(p);
        }
        self.processes[p].worker = None;
        self.driver.link(worker).alive = false;
        let now = self.driver.now;
        self.driver.core.leave(now, worker, Departure::Disconnected);
        self.driver.pump();
        self.begin(p);
    }

    /// Ends all faults and arrivals.
    pub(super) fn calm_down(&mut self) {
        self.calm = true;
        self.driver.scarcity = 0;
        self.driver.races = None;
        for p in 0..self.processes.len() {
            self.heal(p);
            self.processes[p].scribbling = false;
            let process = &self.processes[p];
            let cut = process
                .worker
                .is_some_and(|worker| self.driver.links[worker.serial as usize - 1].cut);
            if process.lying || process.leaving || cut {
                self.die(p);
            }
        }
        for serial in 1..=self.driver.links.len() as u64 {
            self.resume(serial);
        }
        if self.stops {
            let now = self.driver.now;
            self.backlog = 0;
            self.driver.core.stop(now, now + Duration::from_secs(1));
        }
    }
}
