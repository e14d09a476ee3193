//! What operators see of advice: the figures of a pool, the last answers, the part of the status.
//! Nothing here counts as an advice.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use dispatcher_core::advice::{Advisor, Terms};
use tokio::time::Instant;

use super::peers::Peer;
use super::records::{address_record, advice_record};
use super::{Adviser, LeftOut, MOST_SHOWN, Refused, Servers, State, mode, no_answer};
use crate::api::advice::{
    AddressRecord, AdviceAnswer, AdviceHistoryAnswer, AdvicePoolStatus, AdviceStatus,
};
use crate::api::command::{CommandError, unknown_pool};
use crate::config::AdviceSettings;

impl Adviser {
    /// The figures of a pool for an operator, without counting an advice.
    pub(in crate::admin) async fn view(
        self: &Arc<Adviser>,
        pool: &str,
    ) -> Result<AdviceAnswer, CommandError> {
        self.refresh().await.map_err(no_answer)?;
        let settings = self.settings();
        let terms = self.terms(&settings, pool);
        let state = self.lock();
        let found = self.servers(&state, &settings, pool);
        self.check_known(pool, &state, &found)?;
        let gauges = terms.gauges.iter().map(|(name, cost)| (name.to_string(), *cost));
        let connections = std::iter::once(("connections".to_owned(), terms.connections));
        Ok(AdviceAnswer {
            pool: pool.to_owned(),
            mode: mode(&settings).to_owned(),
            addresses: self.addresses(&state, &settings, &terms, pool, &found),
            multiplier: gauges.chain(connections).collect(),
            peers: state.peers.iter().map(Peer::status).collect(),
        })
    }

    /// The last answers of a pool.
    pub(in crate::admin) fn history(
        &self,
        pool: &str,
    ) -> Result<AdviceHistoryAnswer, CommandError> {
        let settings = self.settings();
        let state = self.lock();
        let found = self.servers(&state, &settings, pool);
        self.check_known(pool, &state, &found)?;
        let clock = (self.time(Instant::now()), SystemTime::now());
        let answers = state
            .advisors
            .get(pool)
            .map(|advisor| advisor.history().map(|advice| advice_record(advice, clock)).collect());
        Ok(AdviceHistoryAnswer {
            pool: pool.to_owned(),
            size: settings.history,
            answers: answers.unwrap_or_default(),
        })
    }

    fn check_known(&self, pool: &str, state: &State, found: &Servers) -> Result<(), CommandError> {
        if found.known || self.pool(pool, |_| ()).is_some() {
            return Ok(());
        }
        let names = self.pool_names(state);
        Err(unknown_pool(pool, names.iter().map(String::as_str)))
    }

    /// Own pools, then those that only peers have.
    fn pool_names(&self, state: &State) -> Vec<String> {
        let mut names = self.own_pools();
        let peers = state.peers.iter().filter_map(|peer| peer.figures.as_ref());
        let figures = state.own.iter().chain(peers);
        for pool in figures.flat_map(|figures| &figures.answer.pools) {
            if !names.contains(&pool.pool) {
                names.push(pool.pool.clone());
            }
        }
        names
    }

    fn addresses(
        &self,
        state: &State,
        settings: &AdviceSettings,
        terms: &Terms,
        pool: &str,
        found: &Servers,
    ) -> Vec<AddressRecord> {
        let now = self.time(Instant::now());
        let fresh = OnceLock::new();
        let advisor = state.advisors.get(pool);
        let advisor = advisor.unwrap_or_else(|| fresh.get_or_init(|| Advisor::new(0)));
        let ranking = advisor.view(now, &found.servers, terms, settings.valid_for);
        let all = ranking.usable.iter().chain(&ranking.others);
        all.map(|ranked| address_record(ranked, &found.records)).collect()
    }

    pub(super) fn status(&self) -> AdviceStatus {
        let settings = self.settings();
        let state = self.lock();
        let pools = self.pool_names(&state).into_iter().map(|pool| {
            let found = self.servers(&state, &settings, &pool);
            let terms = self.terms(&settings, &pool);
            let mut addresses = self.addresses(&state, &settings, &terms, &pool, &found);
            addresses.truncate(MOST_SHOWN);
            // The status has the workers already.
            addresses.iter_mut().for_each(|address| address.workers.clear());
            AdvicePoolStatus { addresses, pool }
        });
        let pools = pools.collect();
        let requests =
            [("best", state.best), ("addresses", state.addresses), ("own", state.own_asked)];
        let refused = Refused::ALL.map(|why| (why.name().to_owned(), state.refused[why as usize]));
        let LeftOut { addresses, own, details, .. } = state.left_out;
        let left_out = [("addresses", addresses), ("own", own), ("details", details)];
        AdviceStatus {
            listen: self.listen.to_string(),
            mode: mode(&settings).to_owned(),
            requests: requests.map(|(name, count)| (name.to_owned(), count)).into(),
            refused: BTreeMap::from(refused),
            left_out: left_out.map(|(name, count)| (name.to_owned(), count)).into(),
            peers: state.peers.iter().map(Peer::status).collect(),
            pools,
        }
    }
}
