//! Steered pools in the status.

use super::super::EventLoop;
use super::{Holder, Slot};
use crate::api::status::{NotSteered, Status, SteerStatus};
use dispatcher_core::{PoolId, WorkerId};

impl EventLoop {
    /// Adds what the kernel counts to the status.
    pub(in crate::event_loop) fn steer_status(&self, status: &mut Status) {
        for pool in &mut status.pools {
            let Some(id) = self.core.pool_named(&pool.name) else { continue };
            let Some(known) = self.steers.pools.get(&id) else { continue };
            let (opened, totals) = (known.opened.as_ref(), known.totals);
            pool.steer = Some(SteerStatus {
                attached: opened.is_some_and(|opened| opened.hashed.is_none()),
                pinned: opened.is_some_and(|opened| opened.pinned),
                hashed: self.steers.hashed(id).map(str::to_owned),
                not_pinned: opened.and_then(|opened| opened.not_pinned.clone()),
                error: known.failure.clone(),
                chosen: totals.chosen,
                dropped_full: totals.full,
                dropped_no_worker: totals.waited,
                refused: totals.unserved,
                failed: totals.failed,
                not_steered: self.not_steered(id),
            });
        }
        let workers = status.pools.iter_mut().flat_map(|pool| &mut pool.workers);
        for worker in workers {
            let Some(steer) = &mut worker.steer else { continue };
            let of = |(id, _): &(&WorkerId, &Slot)| id.serial == worker.id;
            let Some((_, slot)) = self.steers.workers.iter().find(of) else { continue };
            let Some(io) = self.steers.slots.get(slot) else { continue };
            steer.address = io.address.to_string();
            steer.problem.clone_from(&io.problem);
            steer.hashed = self.steers.hashed(slot.pool).is_some();
            steer.not_counted.clone_from(&io.not_counted);
        }
    }

    /// What the kernel cannot choose, although it is to. Such a worker need not have joined.
    fn not_steered(&self, pool: PoolId) -> Vec<NotSteered> {
        let slots = self.steers.slots.iter().filter(|(slot, _)| slot.pool == pool);
        let mut all: Vec<(u32, NotSteered)> = slots
            .filter_map(|(slot, io)| {
                let is_member = matches!(io.holder, Holder::Member(..));
                let silent = || (is_member && io.listens.is_none()).then(|| SILENT.to_owned());
                let problem = io.problem.clone().or_else(silent)?;
                let name = match io.holder {
                    Holder::Process(process) => self.process_name(process),
                    Holder::Member(_, position) => self.member_name(pool, position),
                };
                let address = io.address.to_string();
                Some((slot.number, NotSteered { name, address, problem }))
            })
            .collect();
        all.sort_by_key(|(number, _)| *number);
        all.into_iter().map(|(_, it)| it).collect()
    }

    fn member_name(&self, pool: PoolId, position: u32) -> String {
        let steer = self.pools.get(usize::from(pool.0)).and_then(|it| it.steer.as_ref());
        let member = steer.and_then(|steer| steer.members.get(position as usize));
        let name = member.map_or("", |member| &member.name);
        format!("{}/{name}", self.core.pool_name(pool))
    }
}

/// Of a member that is not there.
const SILENT: &str = "nothing listens there";
