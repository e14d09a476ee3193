//! The last answers of a pool's advisor, with the figures behind them: a bounded ring.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;

use super::{Ranked, Ranking};
use crate::types::Time;

/// Most addresses kept of one answer.
const MOST_ADDRESSES: usize = 32;

/// What a client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// One address.
    Best,
    /// All addresses.
    Addresses,
}

impl Asked {
    /// The name in answers and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Asked::Best => "best",
            Asked::Addresses => "addresses",
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Advice {
    /// Number of the answer in its pool, from 1.
    pub number: u64,
    /// When.
    pub at: Time,
    /// What was asked for.
    pub asked: Asked,
    /// The client.
    pub client: Option<IpAddr>,
    /// The advised address; `None` if no server could be given a connection.
    pub chosen: Option<Arc<str>>,
    /// The addresses in the order of the answer, the unusable ones last.
    pub ranked: Vec<Ranked>,
    /// How many more there were.
    pub left_out: usize,
}

/// The last answers, oldest first.
#[derive(Debug, Default)]
pub(super) struct History {
    size: usize,
    answers: VecDeque<Arc<Advice>>,
    count: u64,
}

impl History {
    /// Changes the size and keeps the latest answers.
    pub(super) fn resize(&mut self, size: u32) {
        self.size = size as usize;
        let surplus = self.answers.len().saturating_sub(self.size);
        self.answers.drain(..surplus);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Advice>> {
        self.answers.iter()
    }

    pub(super) fn record(
        &mut self,
        at: Time,
        asked: Asked,
        client: Option<IpAddr>,
        ranking: &Ranking,
    ) {
        self.count += 1;
        if self.size == 0 {
            return;
        }
        if self.answers.len() >= self.size {
            self.answers.pop_front();
        }
        let all = || ranking.usable.iter().chain(&ranking.others);
        let ranked: Vec<Ranked> = all().take(MOST_ADDRESSES).cloned().collect();
        self.answers.push_back(Arc::new(Advice {
            number: self.count,
            at,
            asked,
            client,
            chosen: ranking.usable.first().map(|best| Arc::clone(&best.address)),
            left_out: all().count() - ranked.len(),
            ranked,
        }));
    }
}
