//! The life of a worker: suspicion, probes, goodbyes, departures and their timers.

use std::time::Duration;

use super::policy::NEVER;
use super::ring::Item;
use super::types::*;
use super::worker::Round;
use super::{Core, Effect, Event};

/// How long a worker that lost a connection gets none, unless one of its connections ends earlier.
pub const LOST_PAUSE: Duration = Duration::from_secs(1);

/// The reason for expelling a worker with an impossible word in a slot.
pub(super) const BAD_SLOT: &str = "wrote an impossible slot state";

impl Core {
    /// Runs the due timers of a pool's workers.
    pub(super) fn tick_workers(&mut self, now: Time, pool: usize) {
        for at in 0..self.pools[pool].candidates.len() {
            if self.pools[pool].candidates.due(at) <= now {
                let w = self.pools[pool].candidates.get(at).worker as usize;
                self.tick_worker(now, w);
            }
        }
    }

    fn tick_worker(&mut self, now: Time, w: usize) {
        let due = |timer: Option<Time>| timer.is_some_and(|time| time <= now);
        let slow_start = self.pools[self.workers[w].pool].settings.slow_start;
        let worker = &mut self.workers[w];
        worker.warm_up(now, slow_start);
        if due(worker.blocked) {
            worker.blocked = None;
        }
        if due(worker.trial_wait) {
            worker.trial_wait = None;
        }
        if due(worker.starved) {
            self.end_starvation(now, w);
        }
        let worker = &mut self.workers[w];
        if due(worker.probe_again) {
            worker.probe_again = None;
            self.probe(now, w);
        }
        if due(self.workers[w].notice_again) {
            self.repeat_notice(w);
        }
        if due(self.workers[w].drain_deadline) {
            self.end_drain(now, w);
        }
        self.refresh(w);
        self.end_patience(now, w);
    }

    /// Makes a worker suspect that left a connection, sent at `sent`, untaken for too long. The
    /// caller decides for each connection whether it moves.
    pub(super) fn suspect(&mut self, now: Time, w: usize, sent: Time, waited: Duration) {
        let worker = &mut self.workers[w];
        worker.trust.stalled(sent);
        if worker.state == State::Active {
            worker.state = State::Suspect;
            let until = worker.trust.suspect(now);
            worker.trial_wait = worker.trial_wait.max(until);
            self.pools[worker.pool].counts.suspects += 1;
            worker.suspect_since = now;
            self.announce(w);
            self.workers[w].round = Some(Round::Suspect(waited));
        } else if worker.state == State::Draining {
            worker.unproven = true;
        }
        self.refresh(w);
    }

    /// Probes a worker that is not trusted, to see whether it lives.
    pub(super) fn probe(&mut self, now: Time, w: usize) {
        let worker = &mut self.workers[w];
        let wanted = worker.is_usable() && !worker.trust.proven && worker.trust.answer.is_none();
        let wanted = wanted && worker.steered.is_none();
        if wanted && !worker.is_asked() && !worker.purging && worker.ring.has_room() {
            let ticket = worker.ring.issue(now, Item::Probe, NEVER);
            let worker = worker.id;
            self.effects.push_back(Effect::Probe { worker, ticket });
            self.refresh(w);
        }
    }

    /// The worker answered a probe: it lives, which does not show that it takes connections.
    pub(super) fn probe_taken(&mut self, now: Time, w: usize, ticket: Ticket, taken_at: Time) {
        let sent = self.workers[w].ring.sent_at(ticket);
        let at = taken_at.clamp(sent, now.max(sent));
        self.settle(w, ticket);
        let worker = &mut self.workers[w];
        let timeout = self.pools[worker.pool].settings.handoff_timeout;
        worker.trust.answered(now, at - sent, timeout);
    }

    /// Trusts a worker after its first take since it joined or became suspect.
    pub(super) fn trust(&mut self, now: Time, w: usize) {
        let worker = &mut self.workers[w];
        worker.unproven = false;
        worker.trial_wait = None;
        if worker.state != State::Suspect {
            return;
        }
        worker.state = State::Active;
        let event = Event::Trusted { worker: worker.id, after: now - worker.suspect_since };
        worker.start_slowly(now, self.pools[worker.pool].settings.slow_start);
        self.event(event);
    }

    /// The worker lost a connection: it gets none for [`LOST_PAUSE`].
    pub(super) fn starve(&mut self, now: Time, w: usize) {
        self.workers[w].starved = Some(now + LOST_PAUSE);
    }

    fn end_starvation(&mut self, now: Time, w: usize) {
        self.workers[w].starved = None;
        self.workers[w].trust.restart();
        let _ = now;
    }

    /// Updates the `finished` counter, clamped to possible values; returns whether the worker
    /// reported a change.
    pub(super) fn set_finished(&mut self, now: Time, w: usize, said: u64) -> bool {
        let worker = &mut self.workers[w];
        if worker.state == State::Gone || said == worker.finished {
            return false;
        }
        let id = worker.id;
        let most = worker.base.saturating_add(worker.taken);
        let used = said.min(most).max(worker.finished);
        let clamped = |what| Event::Clamped { worker: id, what, said, used };
        let event = if said > most {
            let reported = std::mem::replace(&mut worker.reported_clamped, true);
            (!reported).then(|| clamped("finished"))
        } else if said < worker.finished {
            let reported = std::mem::replace(&mut worker.reported_decrease, true);
            (!reported).then(|| clamped("finished went back"))
        } else {
            None
        };
        let grown = used > worker.finished;
        worker.finished = used;
        let starved = worker.starved.is_some();
        if let Some(event) = event {
            self.event(event);
        }
        if grown {
            if starved {
                self.end_starvation(now, w);
            }
            self.refresh(w);
        }
        true
    }

    /// The worker gets no more connections; its untaken ones stay with it for now.
    pub(super) fn drain(&mut self, now: Time, w: usize) {
        let worker = &mut self.workers[w];
        if !worker.is_usable() {
            return;
        }
        worker.state = State::Draining;
        worker.probe_again = None;
        let pool = worker.pool;
        self.refresh(w);
        self.remove_usable(now, pool);
    }

    /// The worker closed its end of the channel: it is leaving or gone.
    pub(super) fn closed(&mut self, now: Time, w: usize) {
        self.workers[w].closed = true;
        self.drain(now, w);
        self.process_leaves(now, w);
    }

    pub(super) fn say_goodbye(&mut self, now: Time, w: usize) {
        let worker = &mut self.workers[w];
        if worker.state == State::Gone || std::mem::replace(&mut worker.said_goodbye, true) {
            return;
        }
        self.drain(now, w);
        self.begin_round(now, w, Round::Goodbye);
        self.process_leaves(now, w);
    }

    /// Removes a worker that is gone or expelled.
    pub(super) fn remove(&mut self, now: Time, w: usize, why: Departure) {
        let worker = &mut self.workers[w];
        if worker.state == State::Gone {
            return;
        }
        if let Departure::Expelled(reason) = why {
            self.effects.push_back(Effect::Disconnect { worker: worker.id, reason });
        }
        let (pool, at, usable) = (worker.pool, worker.at, worker.is_usable());
        worker.state = State::Gone;
        if let Some(line) = &mut worker.line {
            line.left = Some(why);
            self.pools[pool].unrecovered += line.unread();
        }
        self.pools[pool].counts.gone += 1;
        if let Some(memory) = &mut self.pools[pool].memory {
            memory.unbind(worker.binding, w as u32);
        }
        if let Some(moved) = self.pools[pool].candidates.remove(at) {
            self.workers[moved as usize].at = at;
        }
        if usable {
            self.remove_usable(now, pool);
        }
        self.begin_round(now, w, Round::Gone(why));
        self.process_lost(now, w);
    }

    /// Revokes all untaken connections; after the last outcome [`Core::end_round`] reports the
    /// result.
    pub(super) fn begin_round(&mut self, now: Time, w: usize, round: Round) {
        self.announce(w);
        let worker = &mut self.workers[w];
        worker.round = Some(round);
        let id = worker.id;
        let effects = &mut self.effects;
        worker.ring.revoke_all(|ticket| {
            effects.push_back(Effect::Revoke { worker: id, ticket });
        });
        match round {
            Round::Goodbye | Round::Drained | Round::Paused => self.purge(w),
            // Suspect: purged after the round. Gone: `Forget` drops the channel.
            Round::Suspect(_) | Round::Quiet | Round::Gone(_) => {}
        }
        self.end_round(now, w);
        self.refresh(w);
    }

    /// Ends a round of revocations if every outcome is known.
    pub(super) fn end_round(&mut self, now: Time, w: usize) {
        let worker = &self.workers[w];
        if worker.ring.revoking() > 0 || worker.round.is_none() {
            return;
        }
        self.announce(w);
        let worker = &mut self.workers[w];
        match worker.state {
            State::Suspect => self.sort_out(now, w),
            State::Gone => {
                worker.forgotten = true;
                let worker = worker.id;
                self.effects.push_back(Effect::Forget { worker });
            }
            State::Active | State::Draining => {}
        }
    }

    /// Purges the channel of a suspect worker that has nothing left to take, because its records
    /// are all revoked; then probes it.
    pub(super) fn sort_out(&mut self, now: Time, w: usize) {
        let worker = &self.workers[w];
        if worker.untaken() > 0 || worker.stale == 0 {
            return self.probe(now, w);
        }
        if worker.purging {
            return;
        }
        if worker.is_asked() {
            // The purge would remove the probe too.
            self.begin_round(now, w, Round::Quiet);
        } else {
            self.purge(w);
        }
    }

    /// Empties the worker's channel; [`Core::purged`] follows. A worker of the line protocol has
    /// none, and a steered one neither.
    fn purge(&mut self, w: usize) {
        let worker = &mut self.workers[w];
        if worker.steered.is_none()
            && worker.line.is_none()
            && !std::mem::replace(&mut worker.purging, true)
        {
            let worker = worker.id;
            self.effects.push_back(Effect::Purge { worker });
        }
    }

    /// Reports the result of the current round, if there is one, and ends it.
    fn announce(&mut self, w: usize) {
        let worker = &mut self.workers[w];
        let live = worker.load().saturating_sub(u64::from(worker.untaken()));
        let id = worker.id;
        let Some(round) = worker.round.take() else {
            return;
        };
        let resent = std::mem::take(&mut worker.resent);
        let event = match round {
            Round::Quiet => return,
            Round::Suspect(waited) => Event::Suspect { worker: id, revoked: resent, waited },
            Round::Goodbye => Event::Goodbye { worker: id, resent, live },
            Round::Drained => {
                let notified = worker.supports_notices;
                Event::DrainOver { worker: id, resent, live, notified }
            }
            Round::Paused => Event::Paused { worker: id, resent, live },
            Round::Gone(why) => Event::Gone { worker: id, why, resent, live },
        };
        self.event(event);
    }

    /// This machine or user is short of descriptors or memory: nothing is placed for a while.
    pub(super) fn note_out_of_resources(&mut self, now: Time) {
        let until = now + self.resource_pause;
        if self.out_of_resources.replace(until).is_none() {
            let pause = self.resource_pause;
            self.event(Event::OutOfResources { pause });
        }
    }
}
