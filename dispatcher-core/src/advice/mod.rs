//! Advice: which server of a pool a client should connect to, over the servers of several
//! dispatchers.
//!
//! Owns the scores, the choice among servers that are nearly equal, the advice that counts as load,
//! and the last answers with their figures. The time and the seed come in as arguments; it knows
//! no address family, no peer and no clock. [`Core::pool_loads`](super::Core::pool_loads) gives the
//! figures of the own pools.
//!
//! Guarantees that clients that ask at the same time do not all get the same server: each answer
//! counts as one connection to its first server until newer data of that server can include it, and
//! servers that are nearly equal are advised in proportion to their weights.

mod advised;
mod agent;
mod history;
mod load;
mod score;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::GaugeName;

use self::advised::Advised;
use self::history::History;
use super::random::Random;
use super::types::Time;

pub use agent::{AgentAnswer, DownReason};
pub use history::{Advice, Asked};
pub use load::{AdvertisedWorker, PoolLoad};
pub use score::Terms;

/// How long a client may take to connect to the server that it was advised: data of a server that
/// is at least this much younger than an answer includes the client's connection.
pub const SETTLES_IN: Duration = Duration::from_millis(500);

/// Servers whose scores exceed the lowest one by at most this part of it are nearly equal.
const NEAR: f64 = 1.0 / 32.0;

/// Bounds of a server's credit: a server that was passed over for long gets no burst.
const MOST_CREDIT: f64 = 2.0;

/// Most servers that an advisor remembers beyond those of the last answer.
const MOST_REMEMBERED: usize = 256;

/// Whether a server can be given connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServerState {
    /// It can.
    Ok,
    /// All its workers are full or suspect.
    Full,
    /// Its host or its workers are draining, its dispatcher is stopping, or its pool was removed.
    Draining,
    /// It has had no usable worker for `wait_for_worker`: clients are closed at once.
    Refusing,
    /// It has no usable worker: clients wait.
    Unserved,
}

impl ServerState {
    /// Every state.
    pub const ALL: [ServerState; 5] = [
        ServerState::Ok,
        ServerState::Full,
        ServerState::Draining,
        ServerState::Refusing,
        ServerState::Unserved,
    ];

    /// The name in answers and in the status.
    pub fn name(self) -> &'static str {
        match self {
            ServerState::Ok => "ok",
            ServerState::Full => "full",
            ServerState::Draining => "draining",
            ServerState::Refusing => "refusing",
            ServerState::Unserved => "unserved",
        }
    }
}

/// A server of a pool: the workers behind one dispatcher, or one worker with an address of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// The addresses that lead to it, at least one; the first identifies it.
    pub addresses: Vec<Arc<str>>,
    /// Whether it can be given connections.
    pub state: ServerState,
    /// Live connections, untaken ones included.
    pub load: u64,
    /// Most live connections, if known.
    pub capacity: Option<u64>,
    /// Its share relative to other servers; positive and finite.
    pub weight: f64,
    /// Means over its workers; finite.
    pub gauges: Vec<(GaugeName, f64)>,
    /// When this was so.
    pub at: Time,
}

/// An address with the figures behind its place in an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Ranked {
    /// The address.
    pub address: Arc<str>,
    /// Position of its server among those that the advisor was given.
    pub server: usize,
    /// Whether the server can be given connections.
    pub state: ServerState,
    /// Live connections.
    pub load: u64,
    /// Connections that recent answers may have caused, and that `load` may not include.
    pub advised: u64,
    /// Most live connections, if known.
    pub capacity: Option<u64>,
    /// Its share relative to other servers.
    pub weight: f64,
    /// The score after one more connection: the lowest one is best.
    pub score: f64,
    /// The gauges that are part of the score; `None` for one that the server does not have.
    pub gauges: Vec<(GaugeName, Option<f64>)>,
    /// The age of the figures.
    pub age: Duration,
}

/// Addresses in the order in which a client should try them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ranking {
    /// Best first.
    pub usable: Vec<Ranked>,
    /// Those that cannot be given connections.
    pub others: Vec<Ranked>,
}

/// What the advisor of a pool remembers of a server.
#[derive(Debug)]
struct Remembered {
    /// Answers that may not be in the server's load yet.
    advised: Advised,
    /// Its claim to the next answer among nearly equal servers: grows by its share with each of
    /// them, falls by one with each that it gets.
    credit: f64,
    /// The address of it that comes first next.
    next: usize,
    used: Time,
}

/// Advises the clients of one pool.
#[derive(Debug)]
pub struct Advisor {
    servers: HashMap<Arc<str>, Remembered>,
    history: History,
    random: Random,
}

impl Advisor {
    /// An advisor without memory. Advisors with different seeds begin with different servers.
    pub fn new(seed: u64) -> Advisor {
        Advisor { servers: HashMap::new(), history: History::default(), random: Random::new(seed) }
    }

    /// Sets how many answers are kept.
    pub fn set_history(&mut self, size: u32) {
        self.history.resize(size);
    }

    /// The kept answers, oldest first.
    pub fn history(&self) -> impl Iterator<Item = &Arc<Advice>> {
        self.history.iter()
    }

    /// Answers one client: the first address of the result is the advice, and counts as a
    /// connection to its server for at most `counts_for`. The answer is kept, with `asked` and
    /// `client`.
    pub fn advise(
        &mut self,
        now: Time,
        servers: &[Server],
        terms: &Terms,
        counts_for: Duration,
        (asked, client): (Asked, Option<IpAddr>),
    ) -> Ranking {
        self.forget(now, servers, counts_for);
        for server in servers {
            let random = &mut self.random;
            let new = || Remembered {
                advised: Advised::default(),
                credit: random.below(1 << 20) as f64 / f64::from(1 << 20),
                next: 0,
                used: now,
            };
            let known = self.servers.entry(key(server)).or_insert_with(new);
            known.used = now;
            // Later figures are not older than these.
            known.advised.forget_included(server.at);
        }
        let scored = self.scored(now, servers, terms, counts_for);
        let near = score::near(servers, &scored, terms);
        let total: f64 = near.iter().map(|&at| servers[at].weight).sum();
        for &at in &near {
            if let Some(known) = self.servers.get_mut(&key(&servers[at])) {
                let credit = known.credit + servers[at].weight / total;
                known.credit = credit.clamp(-MOST_CREDIT, MOST_CREDIT);
            }
        }
        let mut order = score::order(servers, &scored);
        let credit =
            |at: &usize| self.servers.get(&key(&servers[*at])).map_or(0.0, |known| known.credit);
        // The nearly equal ones are a prefix of the order.
        order[..near.len()].sort_by(|a, b| credit(b).total_cmp(&credit(a)));
        let ranking = self.ranking(now, servers, terms, &scored, &order);
        if let Some(best) = ranking.usable.first()
            && let Some(known) = self.servers.get_mut(&key(&servers[best.server]))
        {
            known.credit = (known.credit - 1.0).max(-MOST_CREDIT);
            known.next += 1;
            known.advised.add(now);
        }
        self.history.record(now, asked, client, &ranking);
        ranking
    }

    /// The addresses by score, without counting an advice.
    pub fn view(
        &self,
        now: Time,
        servers: &[Server],
        terms: &Terms,
        counts_for: Duration,
    ) -> Ranking {
        let scored = self.scored(now, servers, terms, counts_for);
        let order = score::order(servers, &scored);
        self.ranking(now, servers, terms, &scored, &order)
    }

    /// For each server: connections that answers have caused and its load may lack, and its score.
    fn scored(
        &self,
        now: Time,
        servers: &[Server],
        terms: &Terms,
        counts_for: Duration,
    ) -> Vec<(u64, f64)> {
        let advised = |server: &Server| {
            let known = self.servers.get(&key(server));
            known.map_or(0, |known| known.advised.count(now, counts_for, server.at))
        };
        score::scores(servers, terms, advised)
    }

    fn ranking(
        &self,
        now: Time,
        servers: &[Server],
        terms: &Terms,
        scored: &[(u64, f64)],
        order: &[usize],
    ) -> Ranking {
        let mut ranking = Ranking::default();
        for &at in order {
            let server = &servers[at];
            let (advised, score) = scored[at];
            let first = self.servers.get(&key(server)).map_or(0, |known| known.next);
            let list = match server.state {
                ServerState::Ok => &mut ranking.usable,
                _ => &mut ranking.others,
            };
            for turn in 0..server.addresses.len() {
                let address = &server.addresses[(first + turn) % server.addresses.len()];
                list.push(Ranked {
                    address: Arc::clone(address),
                    server: at,
                    state: server.state,
                    load: server.load,
                    advised,
                    capacity: server.capacity,
                    weight: server.weight,
                    score,
                    gauges: terms.of(server),
                    age: now - server.at,
                });
            }
        }
        ranking
    }

    /// Forgets answers that count no more, and servers that are gone.
    fn forget(&mut self, now: Time, servers: &[Server], counts_for: Duration) {
        for known in self.servers.values_mut() {
            known.advised.forget_old(now, counts_for);
        }
        if self.servers.len() > servers.len() + MOST_REMEMBERED {
            let mut used: Vec<Time> = self.servers.values().map(|known| known.used).collect();
            used.sort_unstable();
            let oldest = used[used.len() - MOST_REMEMBERED];
            self.servers.retain(|_, known| known.used >= oldest);
        }
    }
}

/// What identifies a server to its advisor.
fn key(server: &Server) -> Arc<str> {
    server.addresses.first().map_or_else(|| Arc::from(""), Arc::clone)
}

#[cfg(test)]
mod tests;
