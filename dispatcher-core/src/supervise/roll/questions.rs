//! What can be asked about the roll of a pool and about the generations of its processes.
//!
//! Guarantees: no question changes anything.

use std::collections::BTreeMap;

use super::super::place::{Phase, Process};
use super::super::processes::{Processes, Replacement};
use super::{Generation, LeavingGeneration, Roll, RollState};
use crate::types::ProcessId;

impl Processes {
    /// Whether the process that is started in this place is part of a roll, and the generation of
    /// that process. `beside`: an older process serves.
    pub(crate) fn next_generation(&self, place: usize, beside: bool) -> (Generation, bool) {
        let own = self.places[place].generation;
        let Some(roll) = self.roll.filter(|roll| roll.replaces(place as u32)) else {
            return (own, beside);
        };
        // Beside nothing, the old generation is the better choice until the new one is known.
        let proven = roll.replaced > 0 || roll.undo || !self.serves();
        match beside || proven || own == roll.generation {
            true => (roll.generation, true),
            false => (own, false),
        }
    }

    /// Whether the roll is to replace a process of this generation in this place.
    pub(crate) fn is_outdated(&self, place: usize, generation: Generation) -> bool {
        self.roll.is_some_and(|roll| roll.replaces(place as u32) && roll.generation != generation)
    }

    pub(super) fn serves(&self) -> bool {
        let wanted = self.places.iter().take(self.wanted as usize);
        wanted.flat_map(|place| place.holders()).any(|it| it.phase == Phase::Serving && !it.step)
    }

    /// The places that the last roll covers and that have no ready process of it.
    pub(crate) fn remaining(&self) -> u32 {
        let Some(roll) = self.roll else { return 0 };
        let places = self.places.iter().take(self.wanted as usize).zip(0..);
        let open = places.filter(|(place, number)| {
            let mut holders = place.holders();
            let is_new = |process: &Process| {
                !process.step
                    && process.phase == Phase::Serving
                    && process.generation == roll.generation
                    && process.replace != Some(Replacement::Restart)
            };
            roll.covers(*number) && !holders.any(is_new)
        });
        open.count() as u32
    }

    /// The last roll.
    pub(crate) fn last_roll(&self) -> Option<Roll> {
        self.roll
    }

    /// The generation that new connections go to: that of a roll in progress.
    pub(crate) fn preferred(&self) -> Option<Generation> {
        let roll = self.roll.filter(|roll| roll.state == RollState::Progressing);
        roll.filter(|roll| roll.place.is_none() && self.settings.prefer_new).map(|it| it.generation)
    }

    /// The generation of a process.
    pub(crate) fn generation_of(&self, id: ProcessId) -> Option<Generation> {
        self.find(id).map(|process| process.generation)
    }

    /// Every generation that a process has, or may get.
    pub(crate) fn generations(&self) -> impl Iterator<Item = Generation> + '_ {
        let roll = self.roll.iter().flat_map(|roll| [roll.generation, roll.former]);
        let places = self.places.iter().map(|place| place.generation);
        roll.chain(places).chain([self.current])
    }

    /// A generation that was never used.
    pub(crate) fn unused_generation(&self) -> Generation {
        Generation(self.newest.0.saturating_add(1))
    }

    /// The generation of the pool: that of new places.
    pub(crate) fn current(&self) -> Generation {
        self.current
    }

    /// The generations that leave because of a roll and have connections, oldest first.
    pub(crate) fn leaving_generations(&self) -> Vec<LeavingGeneration> {
        let mut found = BTreeMap::new();
        for process in self.places.iter().flat_map(|place| &place.processes) {
            if process.may_have_connections() {
                let (processes, connections) = found.entry(process.generation).or_insert((0, 0));
                *processes += 1;
                *connections += process.view.load;
            }
        }
        let leaving = found.into_iter();
        leaving
            .map(|(generation, (processes, connections))| LeavingGeneration {
                generation,
                processes,
                connections,
            })
            .collect()
    }

    /// Whether more processes may leave, of the whole pool or of one place. If not, what has to end
    /// first: the oldest generation, or the oldest process of the place.
    pub(crate) fn too_many_leaving(
        &self,
        place: Option<u32>,
    ) -> Option<(LeavingGeneration, Vec<ProcessId>)> {
        let most = self.settings.max_leaving_generations as usize;
        if most == 0 {
            return None;
        }
        let Some(place) = place else {
            // The processes that are to be replaced are of generations that need not be counted
            // again.
            let holders = self.places.iter().flat_map(|place| place.holders());
            let now: Vec<Generation> = holders.map(|process| process.generation).collect();
            let mut leaving = self.leaving_generations();
            leaving.retain(|old| !now.contains(&old.generation));
            let oldest = *leaving.first().filter(|_| leaving.len() >= most)?;
            let all = self.places.iter().flat_map(|place| &place.processes);
            let of = |process: &&Process| {
                process.may_have_connections() && process.generation == oldest.generation
            };
            return Some((oldest, all.filter(of).map(|process| process.id).collect()));
        };
        let processes = &self.places.get(place as usize)?.processes;
        let leaving = processes.iter().filter(|process| process.may_have_connections());
        // In the order of their starts.
        let leaving: Vec<&Process> = leaving.collect();
        let oldest = leaving.first().filter(|_| leaving.len() >= most)?;
        let Process { id, generation, view, .. } = oldest;
        let connections = view.load;
        let oldest = LeavingGeneration { generation: *generation, processes: 1, connections };
        Some((oldest, vec![*id]))
    }

    /// Names the pool where a process is expected.
    pub(crate) fn whole(&self) -> ProcessId {
        ProcessId { pool: self.pool, place: 0, start: 0 }
    }
}
