//! Weights set by operators, updates by workers, and the seed of random choices.

use dispatch_protocol::wire::Update;

use super::random::Random;
use super::types::{State, Time, WorkerId};
use super::worker::Round;
use super::{Core, Event};

impl Core {
    /// Sets the seed of every random choice. The same seed and the same history give the same
    /// choices.
    pub fn set_seed(&mut self, seed: u64) {
        let mut seeds = Random::new(seed);
        for pool in &mut self.pools {
            pool.candidates.set_seed(seeds.number());
            if let Some(memory) = &mut pool.memory {
                memory.set_seed(seeds.number());
            }
        }
    }

    /// Sets a worker's weight: 1 to 65,535 (0 counts as 1). False if it is gone.
    pub fn set_weight(&mut self, now: Time, worker: WorkerId, weight: u16) -> bool {
        let Some(w) = self.find(worker) else { return false };
        self.workers[w].weight = u32::from(weight.max(1));
        self.workers[w].weight_set = true;
        self.refresh(w);
        self.after(now, self.workers[w].pool);
        true
    }

    /// A worker changes values of its hello. An operator's weight and the pool's maximum take
    /// precedence. A paused worker gets nothing and its untaken connections go to other workers: it
    /// counts as full, not as suspect.
    pub fn update(&mut self, now: Time, worker: WorkerId, update: Update) {
        let Some(w) = self.find(worker) else { return };
        let pool = self.workers[w].pool;
        let most = self.pools[pool].settings.max_connections_per_worker;
        let state = &mut self.workers[w];
        if state.said_goodbye || state.closed || state.state == State::Gone {
            return;
        }
        if !state.weight_set {
            state.weight = u32::from(update.weight.max(1));
        }
        state.own_max = update.max_connections;
        state.max = update.max_connections.min(most);
        let pauses = update.paused && !state.paused;
        state.paused = update.paused;
        if pauses {
            self.begin_round(now, w, Round::Paused);
        } else {
            let (weight, max) = (state.weight, state.max);
            self.event(Event::Updated { worker, weight, max, paused: update.paused });
        }
        self.refresh(w);
        self.after(now, pool);
    }

    /// The worker's weight after its slow start; `None` if it is gone.
    pub fn weight(&self, worker: WorkerId) -> Option<u32> {
        self.find(worker).map(|w| self.workers[w].weight)
    }
}
