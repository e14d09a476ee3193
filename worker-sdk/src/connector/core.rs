//! What the blocking connector and the one for tokio share: the state of all connections of a
//! connector, and the state machine of one connect with it. No I/O, no wait.
//!
//! No lock is held while a handler of the application runs.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Address;
use super::advice::Answer;
use super::asking::Asking;
use super::config::ConnectorConfig;
use super::dialling::Reached;
use super::error::{ConnectionLost, Error};
use super::event::{Attempt, Decision};
use super::failure::Failure;
use super::machine::{Machine, Refresh, Step};
use super::plan::Persistence;
use super::race;
use super::selection::{Candidate, Selection};
use super::set_aside::{SetAside, Standing};
use super::targets::{Chosen, Targets};

/// One connector.
pub(super) struct Core {
    pub(super) config: ConnectorConfig,
    shared: Mutex<Shared>,
}

/// The state of all its connections.
struct Shared {
    targets: Targets<Address>,
    /// The hosts that are asked for advice.
    hosts: Targets<Address>,
    /// The addresses of host names.
    peers: SetAside<SocketAddr>,
    /// The peer of earlier connections, in sticky mode.
    stuck_to: Option<SocketAddr>,
    /// Where the next connect to a host name begins among its addresses; random again when one of
    /// them fails or recovers, as that of the targets.
    rotation: usize,
    /// The last problem with the list of addresses.
    problem: Option<String>,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("config", &self.config).finish_non_exhaustive()
    }
}

fn random() -> u64 {
    fastrand::u64(..)
}

impl Core {
    pub(super) fn new(config: ConnectorConfig) -> Result<Arc<Core>, Error> {
        let config = config.checked()?;
        let mut targets = Targets::new(config.selection, config.sticky, config.pauses);
        let mut list = config.addresses.list.clone();
        if config.addresses.shuffled {
            fastrand::shuffle(&mut list);
        }
        // A list for the beginning is out of date at once.
        let stale_at = config.addresses.advice.as_ref().map(|_| Instant::now());
        targets.replace(list, stale_at);
        // One that answers is asked again.
        let mut hosts = Targets::new(Selection::RoundRobin, true, config.pauses);
        if let Some(advice) = &config.addresses.advice {
            hosts.replace(advice.hosts.iter().cloned().map(Candidate::new).collect(), None);
        }
        let shared = Shared {
            targets,
            hosts,
            peers: SetAside::new(config.pauses),
            stuck_to: None,
            rotation: fastrand::usize(..),
            problem: None,
        };
        Ok(Arc::new(Core { config, shared: Mutex::new(shared) }))
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next host to ask for advice, in a series that has asked `asked` already, and whether it
    /// is the last one. Hosts that are set aside are asked only if it is urgent.
    pub(super) fn next_host(
        &self,
        asked: &[Address],
        urgent: bool,
    ) -> Option<(Chosen<Address>, bool)> {
        let now = Instant::now();
        let mut shared = self.lock();
        let excluded = |host: &Address| asked.contains(host);
        let usable = shared.hosts.usable(now, excluded, None, &mut random);
        let forced = || urgent.then(|| shared.hosts.set_aside(now, excluded)).flatten();
        let host = usable.or_else(forced)?;
        let is_last = shared.hosts.all(|other| *other == host.address || excluded(other));
        Some((host, is_last))
    }

    /// A host was not asked after all.
    pub(super) fn release_host(&self, host: &Chosen<Address>) {
        self.lock().hosts.release(host);
    }

    /// Uses a host's answer, or notes its failure; returns the best address. After an error another
    /// host is asked.
    pub(super) fn answered(
        &self,
        chosen: &Chosen<Address>,
        answer: Result<Answer, Failure>,
    ) -> Result<Option<Address>, ()> {
        let now = Instant::now();
        let host = &chosen.address;
        let mut shared = self.lock();
        let problem = match answer {
            Ok(Answer::Best(address)) => {
                shared.hosts.succeeded(host);
                return Ok(Some(address));
            }
            Ok(Answer::Addresses(mut list, valid_for)) if !list.is_empty() => {
                shared.hosts.succeeded(host);
                if self.config.addresses.shuffled {
                    fastrand::shuffle(&mut list);
                }
                shared.problem = None;
                shared.targets.replace(list, Some(now + valid_for));
                return Ok(None);
            }
            // An empty list would help no client: the last one may still serve.
            Ok(Answer::Addresses(..)) => {
                shared.hosts.works(host);
                "no address is usable".to_owned()
            }
            Ok(Answer::Nothing(problem)) => {
                shared.hosts.works(host);
                problem
            }
            Err(failure) if failure.local => {
                shared.hosts.release(chosen);
                failure.problem
            }
            Err(failure) => {
                shared.hosts.failed(host, now, random());
                failure.problem
            }
        };
        log::debug!(target: "worker_sdk", "advice: {host}: {problem}");
        shared.problem = Some(format!("{host}: {problem}"));
        Err(())
    }

    /// Other connects use the last list while this one fetches the next.
    pub(super) fn fetching(&self, limit: Duration) {
        let mut shared = self.lock();
        if !shared.targets.is_empty() {
            shared.targets.keep_until(Instant::now() + limit);
        }
    }

    /// The addresses of a host name, in the order in which they are tried.
    pub(super) fn order(
        &self,
        resolved: &[SocketAddr],
        preferred: Option<SocketAddr>,
    ) -> Vec<SocketAddr> {
        let now = Instant::now();
        let mut shared = self.lock();
        let rotation = match self.config.selection {
            Selection::InOrder => 0,
            Selection::RoundRobin => {
                shared.rotation = shared.rotation.wrapping_add(1);
                shared.rotation
            }
            Selection::Random | Selection::Weighted | Selection::Best => fastrand::usize(..),
        };
        let preferred = preferred.or(shared.stuck_to);
        race::order(resolved, rotation, preferred, |peer| shared.peers.standing(peer, now))
    }

    /// Changes what is known of the addresses of host names. `update` gets the time and a random
    /// number; it returns its result, and whether an address has failed or recovered.
    pub(super) fn update_peers<T>(
        &self,
        update: impl FnOnce(&mut SetAside<SocketAddr>, Instant, u64) -> (T, bool),
    ) -> T {
        let now = Instant::now();
        let mut shared = self.lock();
        let (result, changed) = update(&mut shared.peers, now, random());
        if changed {
            shared.rotation = fastrand::usize(..);
            let is_usable =
                |peer: &SocketAddr| shared.peers.standing(peer, now) == Standing::Usable;
            shared.stuck_to = shared.stuck_to.filter(is_usable);
        }
        result
    }

    fn stick_to(&self, peer: SocketAddr) {
        if self.config.sticky {
            self.lock().stuck_to = Some(peer);
        }
    }
}

/// A lost connection: the address that it was made to, and the one that it reached.
pub(super) type Lost = (Address, SocketAddr);

/// One connect or reconnect. Dropping it gives it up.
#[derive(Debug)]
pub(super) struct Attempts {
    pub(super) core: Arc<Core>,
    machine: Machine<Address>,
    /// The peer of the lost connection.
    pub(super) preferred: Option<SocketAddr>,
}

impl Attempts {
    pub(super) fn new(core: &Arc<Core>, lost: Option<Lost>) -> Attempts {
        let (lost, preferred) = lost.unzip();
        let machine = Machine::new(core.config.plan.clone(), lost);
        Attempts { core: Arc::clone(core), machine, preferred }
    }

    /// The next step that the driver has to do something for.
    pub(super) fn next(&mut self) -> Step<Address> {
        loop {
            let now = Instant::now();
            match self.machine.next(&mut self.core.lock().targets, now, &mut random) {
                Step::Ask => {}
                step => return step,
            }
            let decision = match &self.core.config.on_connection_lost {
                Some(handler) => handler(&self.lost()),
                None => Decision::GiveUp,
            };
            self.machine.decide(decision, &mut random);
        }
    }

    /// Tells the application, and begins the attempt; returns its address and its end. None if the
    /// application took all the time.
    pub(super) fn begin(&mut self, mut attempt: Attempt) -> Option<(Address, Instant)> {
        if let Some(handler) = &self.core.config.on_attempt {
            handler(&mut attempt);
        }
        let now = Instant::now();
        let address = attempt.address;
        let limit = self.machine.begin(&mut self.core.lock().targets, address.clone(), now)?;
        Some((address, now + limit))
    }

    pub(super) fn succeeded(&mut self, reached: Reached) {
        let peer = reached.peer;
        reached.serves();
        self.core.stick_to(peer);
        self.machine.succeeded(&mut self.core.lock().targets);
    }

    pub(super) fn failed(&mut self, failure: Failure) {
        let now = Instant::now();
        self.machine.failed(&mut self.core.lock().targets, failure, now, &mut random);
    }

    pub(super) fn advise(&mut self, best: Address) {
        self.machine.advise(best);
    }

    /// The questions to the advice hosts before the next choice.
    pub(super) fn ask(&self, what: Refresh) -> Asking {
        let now = Instant::now();
        Asking::new(&self.core, what, now + self.machine.time_for_advice(now))
    }

    fn lost(&self) -> ConnectionLost {
        let (attempts, timed_out) = self.machine.outcomes();
        ConnectionLost { attempts, timed_out, addresses: self.core.lock().problem.clone() }
    }

    pub(super) fn error(&self) -> Error {
        debug_assert!(self.core.config.plan.persistence == Persistence::Ask);
        Error::ConnectionLost(self.lost())
    }
}

impl Drop for Attempts {
    fn drop(&mut self) {
        self.machine.cancel(&mut self.core.lock().targets);
    }
}
