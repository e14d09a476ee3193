//! Advice to clients: which address of a pool to connect to, over this dispatcher and its peers.
//!
//! Owns the figures of all sources, an advisor for each pool, and the counters. `server` answers
//! clients and peers, `peers` asks other dispatchers, `own` asks the event loop. The core computes
//! scores and chooses. Everything runs on the side thread and is bounded: connections, requests,
//! answers of peers in time and size, and figures in age.
//!
//! With `mode = "interval"` a request is answered from what was collected; a peer that is silent
//! costs it nothing. With `mode = "fresh"` requests start a round, in which this dispatcher and all
//! peers are asked at once; requests that come during a round share it.

mod bounds;
mod own;
mod peers;
mod records;
mod report;
mod server;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dispatcher_core::advice::{Advisor, Asked, Ranking, Server, ServerState, Terms};
use dispatcher_core::{PoolSettings, Time};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::bounds::Bounded;
use self::peers::Peer;
use self::records::server;
use crate::api::advice::OwnAnswer;
use crate::api::command::{CommandError, Problem, unknown_pool};
use crate::background::logger::value;
use crate::config::AdviceSettings;
use crate::mailbox::advice_faults::AdviceFaults;
use crate::mailbox::client::{MailboxClient, NoAnswer, Question, Unanswered};
use crate::reload::{RunningConfig, seed};

pub(super) use self::server::{bound, serve};

/// Longest wait for the event loop.
const PATIENCE: Duration = Duration::from_secs(1);

/// Added to the time since the start, so that figures from before it have a time.
const BEFORE_START: Duration = Duration::from_secs(2 * 366 * 24 * 3600);

/// Most pools with an advisor: further ones are advised without memory of earlier answers.
const MOST_ADVISORS: usize = 4096;

/// Most addresses of a pool in the status.
const MOST_SHOWN: usize = 1024;

/// The figures of one dispatcher.
#[derive(Clone, Debug)]
struct Figures {
    /// When they were asked for.
    asked: Instant,
    answer: Arc<OwnAnswer>,
}

/// A reason why a request got no advice, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refused {
    Denied,
    NoAddress,
    UnknownPool,
    Busy,
}

impl Refused {
    const ALL: [Refused; 4] =
        [Refused::Denied, Refused::NoAddress, Refused::UnknownPool, Refused::Busy];

    fn name(self) -> &'static str {
        match self {
            Refused::Denied => "denied",
            Refused::NoAddress => "no_address",
            Refused::UnknownPool => "unknown_pool",
            Refused::Busy => "busy",
        }
    }
}

#[derive(Debug, Default)]
struct State {
    own: Option<Figures>,
    /// In the order of the configuration.
    peers: Vec<Peer>,
    advisors: HashMap<String, Advisor>,
    best: u64,
    addresses: u64,
    own_asked: u64,
    refused: [u64; Refused::ALL.len()],
    left_out: LeftOut,
}

/// What answers had no room for.
#[derive(Debug, Default)]
struct LeftOut {
    addresses: u64,
    own: u64,
    details: u64,
    /// The pools whose lists have been named in the log; empty: the answer to peers.
    named: HashSet<String>,
}

/// Shared by all requests.
pub(super) struct Adviser {
    /// The bound address.
    listen: SocketAddr,
    mailbox: Arc<MailboxClient>,
    running: watch::Receiver<Option<Arc<RunningConfig>>>,
    faults: AdviceFaults,
    started: Instant,
    state: Mutex<State>,
    /// The round in `mode = "fresh"`.
    round: Question<()>,
}

/// Addresses for one answer.
struct Answer {
    ranking: Ranking,
    /// The records that [`Ranked::server`] refers to.
    records: Vec<(Arc<OwnAnswer>, usize, usize)>,
    /// How long the answer may be used, from the age of the oldest figures in it.
    valid_for: Duration,
}

/// The servers of a pool, from all sources.
#[derive(Default)]
struct Servers {
    servers: Vec<Server>,
    records: Vec<(Arc<OwnAnswer>, usize, usize)>,
    /// Whether any source has the pool.
    known: bool,
}

impl Adviser {
    pub(super) fn new(
        listen: SocketAddr,
        mailbox: Arc<MailboxClient>,
        running: watch::Receiver<Option<Arc<RunningConfig>>>,
        faults: AdviceFaults,
    ) -> Arc<Adviser> {
        let adviser = Arc::new(Adviser {
            listen,
            mailbox,
            running,
            faults,
            started: Instant::now(),
            state: Mutex::default(),
            round: Question::new(Duration::ZERO),
        });
        let reporter = Arc::clone(&adviser);
        adviser.mailbox.set_advice(move || reporter.status());
        adviser
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The settings in force.
    fn settings(&self) -> AdviceSettings {
        let running = self.running.borrow();
        running.as_ref().map(|running| running.config.advice.clone()).unwrap_or_default()
    }

    /// The settings of an own pool.
    fn pool<T>(&self, name: &str, read: impl FnOnce(&PoolSettings) -> T) -> Option<T> {
        let running = self.running.borrow();
        let running = running.as_ref()?;
        let pools = running.pools.iter();
        let mut pools = pools.filter_map(|id| running.config.pools.get(usize::from(id.0)));
        pools.find(|pool| pool.settings.name == name).map(|pool| read(&pool.settings))
    }

    fn own_pools(&self) -> Vec<String> {
        let running = self.running.borrow();
        let Some(running) = running.as_ref() else { return Vec::new() };
        let pools = running.pools.iter();
        let pools = pools.filter_map(|id| running.config.pools.get(usize::from(id.0)));
        pools.map(|pool| pool.settings.name.clone()).collect()
    }

    fn terms(&self, settings: &AdviceSettings, pool: &str) -> Terms {
        settings.terms(self.pool(pool, Terms::of_pool).unwrap_or_default())
    }

    /// This instant for the core.
    fn time(&self, at: Instant) -> Time {
        Time(0) + BEFORE_START + at.saturating_duration_since(self.started)
    }

    /// Collects figures for as long as it is polled: with `mode = "interval"` of this dispatcher
    /// and of each peer on its own, so that none delays another.
    pub(super) async fn collect(self: Arc<Adviser>) {
        let mut running = self.running.clone();
        loop {
            if running.wait_for(Option::is_some).await.is_err() {
                return;
            }
            running.mark_unchanged();
            let settings = self.settings();
            self.set_peers(&settings);
            // Dropping the set ends its tasks.
            let mut tasks = JoinSet::new();
            if let Some(interval) = settings.interval {
                tasks.spawn(Arc::clone(&self).collect_own(interval));
                for &peer in &settings.peers {
                    tasks.spawn(Arc::clone(&self).collect_peer(peer, interval));
                }
            }
            loop {
                if running.changed().await.is_err() {
                    return;
                }
                if self.settings() != settings {
                    break;
                }
            }
        }
    }

    async fn collect_own(self: Arc<Adviser>, interval: Duration) {
        loop {
            let next = Instant::now() + interval;
            // The next attempt follows.
            let _ = self.ask_own().await;
            tokio::time::sleep_until(next).await;
        }
    }

    async fn collect_peer(self: Arc<Adviser>, peer: SocketAddr, interval: Duration) {
        loop {
            let next = Instant::now() + interval;
            self.ask_peer(peer).await;
            tokio::time::sleep_until(next).await;
        }
    }

    /// Keeps the state of the peers that stay.
    fn set_peers(&self, settings: &AdviceSettings) {
        let mut state = self.lock();
        let mut before = std::mem::take(&mut state.peers);
        for &address in &settings.peers {
            let known = before.iter().position(|peer| peer.address == address);
            let peer = known.map_or_else(|| Peer::new(address), |at| before.swap_remove(at));
            state.peers.push(peer);
        }
        for gone in &mut before {
            gone.removed(&self.faults);
        }
        for advisor in state.advisors.values_mut() {
            advisor.set_history(settings.history);
        }
    }

    /// Asks the event loop, unless it was asked a moment ago.
    async fn ask_own(&self) -> Result<Figures, NoAnswer> {
        let settings = self.settings();
        let (asked, loads) = self.mailbox.loads(PATIENCE).await?;
        let known = self.lock().own.clone().filter(|own| own.asked == asked);
        let figures = known.unwrap_or_else(|| Figures {
            asked,
            answer: Arc::new(own::records(&loads, settings.listen.unwrap_or(self.listen))),
        });
        self.lock().own = Some(figures.clone());
        Ok(figures)
    }

    async fn ask_peer(&self, peer: SocketAddr) {
        let settings = self.settings();
        let asked = Instant::now();
        let outcome = peers::ask(peer, settings.request_timeout).await;
        let outcome = outcome.map(|answer| Figures { asked, answer: Arc::new(answer) });
        let mut state = self.lock();
        let own = state.own.as_ref().map(|own| own.answer.instance.clone());
        if let Some(known) = state.peers.iter_mut().find(|known| known.address == peer) {
            known.asked(outcome, own.as_deref(), &self.faults);
        }
    }

    /// Brings the figures up to date, as the mode says.
    async fn refresh(self: &Arc<Adviser>) -> Result<(), NoAnswer> {
        let settings = self.settings();
        if settings.interval.is_some() {
            let own = self.lock().own.as_ref().map(|own| own.asked);
            if own.is_none_or(|asked| asked.elapsed() > settings.valid_for) {
                self.ask_own().await?;
            }
            return Ok(());
        }
        let (done, first) = self.round.join();
        if first.is_some() {
            let adviser = Arc::clone(self);
            tokio::spawn(async move {
                let _end = Unanswered(&adviser.round);
                let mut asking = JoinSet::new();
                for &peer in &settings.peers {
                    let adviser = Arc::clone(&adviser);
                    asking.spawn(async move { adviser.ask_peer(peer).await });
                }
                // Without an answer the earlier figures are too old.
                let _ = adviser.ask_own().await;
                while asking.join_next().await.is_some() {}
                adviser.round.answer(Some(&()));
            });
        }
        done.await.map_err(|_| NoAnswer::Refused)
    }

    /// The figures of a pool that are not too old, own ones first. An address that several sources
    /// have is that of the first.
    fn servers(&self, state: &State, settings: &AdviceSettings, pool: &str) -> Servers {
        let mut found = Servers::default();
        let mut seen: HashSet<&str> = HashSet::new();
        let peers = state.peers.iter().filter_map(|peer| peer.figures.as_ref());
        for figures in state.own.iter().chain(peers) {
            for (p, of_pool) in figures.answer.pools.iter().enumerate() {
                if of_pool.pool != pool {
                    continue;
                }
                found.known = true;
                for (s, record) in of_pool.servers.iter().enumerate() {
                    let age = figures.asked.elapsed() + Duration::from_millis(record.age_ms);
                    if age > settings.valid_for {
                        continue;
                    }
                    let addresses = record.addresses.iter().map(String::as_str);
                    let addresses: Vec<&str> = addresses.filter(|text| seen.insert(text)).collect();
                    if addresses.is_empty() {
                        continue;
                    }
                    let at = self.time(Instant::now());
                    let at = Time(at.0.saturating_sub(nanoseconds(age)));
                    found.servers.push(server(record, &addresses, at, age, settings.valid_for));
                    found.records.push((Arc::clone(&figures.answer), p, s));
                }
            }
        }
        found
    }

    /// Answers a client.
    async fn advise(
        self: &Arc<Adviser>,
        pool: &str,
        asked: Asked,
        client: IpAddr,
    ) -> Result<Answer, CommandError> {
        {
            let mut state = self.lock();
            match asked {
                Asked::Best => state.best += 1,
                Asked::Addresses => state.addresses += 1,
            }
        }
        if let Err(why) = self.refresh().await {
            return Err(self.refuse(Refused::Busy, no_answer(why)));
        }
        let settings = self.settings();
        let terms = self.terms(&settings, pool);
        let mut state = self.lock();
        let found = self.servers(&state, &settings, pool);
        if !found.known && self.pool(pool, |_| ()).is_none() {
            drop(state);
            // Clients are not told which pools there are.
            let error = CommandError { hint: None, ..unknown_pool(pool, [].into_iter()) };
            return Err(self.refuse(Refused::UnknownPool, error));
        }
        let now = self.time(Instant::now());
        if state.advisors.len() >= MOST_ADVISORS && !state.advisors.contains_key(pool) {
            state.advisors.clear();
        }
        let advisor = state.advisors.entry(pool.to_owned()).or_insert_with(|| {
            let mut advisor = Advisor::new(seed());
            advisor.set_history(settings.history);
            advisor
        });
        let client = Some(client.to_canonical());
        let ranking =
            advisor.advise(now, &found.servers, &terms, settings.valid_for, (asked, client));
        drop(state);
        let oldest = match asked {
            Asked::Best => ranking.usable.first().map(|best| best.age),
            Asked::Addresses => ranking.usable.iter().map(|one| one.age).max(),
        };
        let valid_for = settings.valid_for.saturating_sub(oldest.unwrap_or_default());
        Ok(Answer { ranking, records: found.records, valid_for })
    }

    fn refuse(&self, why: Refused, error: CommandError) -> CommandError {
        self.lock().refused[why as usize] += 1;
        error
    }

    /// What peers ask for, as JSON.
    async fn own(&self) -> Result<Vec<u8>, CommandError> {
        self.lock().own_asked += 1;
        let figures =
            self.ask_own().await.map_err(|why| self.refuse(Refused::Busy, no_answer(why)))?;
        let mut answer = OwnAnswer::clone(&figures.answer);
        let age = milliseconds(figures.asked.elapsed());
        for server in answer.pools.iter_mut().flat_map(|pool| &mut pool.servers) {
            server.age_ms = age;
            for gauge in &mut server.gauges {
                gauge.age_ms += age;
            }
        }
        let bounded = bounds::own(answer);
        self.note_left_out(None, &bounded);
        Ok(bounded.body)
    }

    /// Counts what an answer has no room for, of this pool or of the answer to a peer, and names it
    /// once.
    fn note_left_out(&self, pool: Option<&str>, bounded: &Bounded) {
        let Bounded { left_out, details_left_out: details, .. } = *bounded;
        if left_out == 0 && details == 0 {
            return;
        }
        let mut state = self.lock();
        let counts = &mut state.left_out;
        let count = if pool.is_some() { &mut counts.addresses } else { &mut counts.own };
        *count += left_out as u64;
        counts.details += details as u64;
        let is_new = counts.named.len() < MOST_ADVISORS
            && counts.named.insert(pool.unwrap_or_default().to_owned());
        drop(state);
        if is_new {
            let to = if pool.is_some() { "clients" } else { "peers" };
            let pool = pool.map(|pool| format!(" pool={}", value(pool))).unwrap_or_default();
            log::warn!(
                "event=advice_shortened to={to}{pool} left_out={left_out} details={details}"
            );
        }
    }
}

fn mode(settings: &AdviceSettings) -> &'static str {
    if settings.interval.is_some() { "interval" } else { "fresh" }
}

fn no_answer(why: NoAnswer) -> CommandError {
    let text = match why {
        NoAnswer::Refused => "the dispatcher is busy or stopping",
        NoAnswer::Late => "the dispatcher did not answer in time",
    };
    CommandError::new(Problem::Unavailable, text)
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn state_of(name: &str) -> Option<ServerState> {
    ServerState::ALL.into_iter().find(|state| state.name() == name)
}
