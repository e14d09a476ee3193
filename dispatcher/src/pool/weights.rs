//! What an operator, or chance, has to say about who is chosen.

use super::Core;
use super::random::Random;
use super::types::{Time, WorkerId};

impl Core {
    /// What every choice by lot follows from. The same seed and the same history give the same choices.
    pub fn set_seed(&mut self, seed: u64) {
        let mut seeds = Random::new(seed);
        for pool in &mut self.pools {
            pool.candidates.set_seed(seeds.number());
            if let Some(memory) = &mut pool.memory {
                memory.set_seed(seeds.number());
            }
        }
    }

    /// The worker's share of new connections is another one from now on: 1 to 65,535 (0 counts as 1). False if it is gone.
    pub fn set_weight(&mut self, now: Time, worker: WorkerId, weight: u16) -> bool {
        let Some(w) = self.find(worker) else { return false };
        self.workers[w].weight = u32::from(weight.max(1));
        self.refresh(w);
        self.after(now, self.workers[w].pool);
        true
    }

    /// The worker's share of new connections relative to others, once it has all of it; `None` if it is gone.
    pub fn weight(&self, worker: WorkerId) -> Option<u32> {
        self.find(worker).map(|w| self.workers[w].weight)
    }
}
