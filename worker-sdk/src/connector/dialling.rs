//! The connects of one attempt: the race of a host's addresses, with what the connector knows of
//! them. No I/O, no wait: the drivers connect and report the results.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::core::Core;
use super::failure::Failure;
use super::race::{Race, RaceStep, Runner};

/// One attempt until it reaches a server. Dropping it gives it up.
#[derive(Debug)]
pub(super) struct Dialling {
    core: Arc<Core>,
    race: Race,
}

impl Dialling {
    pub(super) fn new(core: &Arc<Core>, ordered: Vec<SocketAddr>, deadline: Instant) -> Dialling {
        Dialling { core: Arc::clone(core), race: Race::new(ordered, deadline) }
    }

    pub(super) fn next(&mut self) -> RaceStep {
        let race = &mut self.race;
        self.core.update_peers(|peers, now, random| {
            let step = race.next(peers, now, random);
            let failed = matches!(step, RaceStep::Failed(_));
            (step, failed)
        })
    }

    /// The connect to this address failed.
    pub(super) fn failed(&mut self, peer: SocketAddr, error: &io::Error) {
        let (race, failure) = (&mut self.race, Failure::of_connect(error, peer));
        self.core.update_peers(|peers, now, random| {
            let failed = !failure.local;
            race.failed(peer, failure, peers, now, random);
            ((), failed)
        });
    }

    /// The connect to this address succeeded. Of several at a time the driver reports the one that
    /// began first.
    pub(super) fn won(mut self, peer: SocketAddr) -> Reached {
        let race = &mut self.race;
        let runner = self.core.update_peers(|peers, now, random| {
            let (runner, failed) = race.won(peer, peers, now, random);
            (runner, failed > 0)
        });
        Reached { core: Arc::clone(&self.core), runner: Some(runner), peer }
    }
}

impl Drop for Dialling {
    fn drop(&mut self) {
        let race = &mut self.race;
        self.core.update_peers(|peers, _, _| (race.cancel(peers), false));
    }
}

/// A server that was reached. Whether it serves is reported; without that nothing was learnt.
#[derive(Debug)]
pub(super) struct Reached {
    core: Arc<Core>,
    runner: Option<Runner>,
    pub(super) peer: SocketAddr,
}

impl Reached {
    pub(super) fn failed(mut self, failure: &Failure) {
        if let Some(runner) = self.runner.take_if(|_| !failure.local) {
            self.core.update_peers(|peers, now, random| (runner.failed(peers, now, random), true));
        }
    }

    pub(super) fn serves(mut self) {
        self.runner = None;
        let peer = self.peer;
        self.core.update_peers(|peers, _, _| ((), peers.succeeded(&peer)));
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        if let Some(runner) = self.runner.take() {
            self.core.update_peers(|peers, _, _| (runner.release(peers), false));
        }
    }
}
