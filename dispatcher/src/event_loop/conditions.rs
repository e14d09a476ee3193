//! Conditions of pools that last from an event to a later change of state, for the faults of the
//! status. No decision depends on them.

use std::time::Duration;

use super::fault_kind::FaultKind;
use dispatcher_core::{PoolId, PoolState, Time};

/// A condition of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    NoWorker,
    Refusing,
    /// Clients are refused although there are workers: no worker takes a connection.
    Unserved,
    BackPressure,
}

impl Condition {
    /// The kind of the fault.
    pub(super) fn kind(self) -> FaultKind {
        match self {
            Condition::NoWorker => FaultKind::NoWorker,
            Condition::Refusing | Condition::Unserved => FaultKind::Refusing,
            Condition::BackPressure => FaultKind::BackPressure,
        }
    }

    /// Whether the condition lasts in this state of the pool.
    fn goes_on(self, state: PoolState) -> bool {
        match self {
            Condition::NoWorker => state == PoolState::NoWorker,
            Condition::Refusing | Condition::Unserved => state == PoolState::Refusing,
            Condition::BackPressure => state == PoolState::BackPressure,
        }
    }

    /// The text of the fault; `clients` were turned away since the condition began.
    pub(super) fn text(self, lasted: Duration, clients: u64, ongoing: bool) -> String {
        let lasted = super::events::span(lasted);
        let away = match clients {
            1 => "1 client was turned away".to_owned(),
            clients => format!("{clients} clients were turned away"),
        };
        match (self, ongoing) {
            (Condition::NoWorker, true) => format!("no worker for {lasted} now: clients wait"),
            (Condition::NoWorker, false) => format!("no worker for {lasted}: clients waited"),
            (Condition::Refusing, true) => {
                format!("no worker for wait_for_worker: {away} in {lasted}, and new ones are too")
            }
            (Condition::Refusing, false) => {
                format!("no worker for wait_for_worker: {away} in {lasted}")
            }
            (Condition::Unserved, true) => {
                format!("no worker takes a connection: {away} in {lasted}, and new ones are too")
            }
            (Condition::Unserved, false) => {
                format!("no worker took a connection: {away} in {lasted}")
            }
            (Condition::BackPressure, true) => {
                format!("every worker is full or suspect: clients wait, for {lasted} now")
            }
            (Condition::BackPressure, false) => {
                format!("every worker was full or suspect: clients waited for {lasted}")
            }
        }
    }
}

/// A condition that lasts.
#[derive(Debug)]
pub(super) struct Ongoing {
    pub(super) condition: Condition,
    pub(super) pool: PoolId,
    pub(super) since: Time,
    /// Clients of the pool that were turned away before the condition began.
    before: u64,
}

/// The conditions of all pools: at most one of each kind for each pool.
#[derive(Debug, Default)]
pub(super) struct Conditions {
    list: Vec<Ongoing>,
    /// Clients turned away since the start, by pool.
    turned_away: Vec<u64>,
}

impl Conditions {
    /// Counts a client that was turned away because there was no worker.
    pub(super) fn turned_away(&mut self, pool: Option<PoolId>) {
        let Some(pool) = pool else { return };
        let place = usize::from(pool.0);
        if self.turned_away.len() <= place {
            self.turned_away.resize(place + 1, 0);
        }
        self.turned_away[place] += 1;
    }

    /// A condition begins; so many clients have already been turned away because of it.
    pub(super) fn begin(&mut self, condition: Condition, pool: PoolId, now: Time, clients: u64) {
        self.list.retain(|one| (one.condition, one.pool) != (condition, pool));
        let before = self.clients(pool).saturating_sub(clients);
        self.list.push(Ongoing { condition, pool, since: now, before });
    }

    /// Removes and returns the conditions that are over.
    pub(super) fn over(&mut self, state: impl Fn(PoolId) -> Option<PoolState>) -> Vec<Ongoing> {
        let over =
            |one: &mut Ongoing| !state(one.pool).is_some_and(|state| one.condition.goes_on(state));
        self.list.extract_if(.., over).collect()
    }

    /// The conditions that last, as far as is known.
    pub(super) fn ongoing(&self) -> &[Ongoing] {
        &self.list
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The number of clients turned away while the condition lasted.
    pub(super) fn clients_of(&self, one: &Ongoing) -> u64 {
        self.clients(one.pool).saturating_sub(one.before)
    }

    fn clients(&self, pool: PoolId) -> u64 {
        self.turned_away.get(usize::from(pool.0)).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_counts_its_own_clients_until_it_is_over() {
        let mut conditions = Conditions::default();
        let (web, chat) = (PoolId(0), PoolId(1));
        conditions.turned_away(Some(web));
        // Two clients that waited are turned away, and then the condition begins.
        (0..2).for_each(|_| conditions.turned_away(Some(web)));
        conditions.begin(Condition::NoWorker, web, Time(0), 0);
        conditions.begin(Condition::Refusing, web, Time(5), 2);
        (0..655).for_each(|_| conditions.turned_away(Some(web)));
        conditions.turned_away(Some(chat));
        conditions.turned_away(None);
        assert!(
            conditions.over(|_| Some(PoolState::Refusing)).len() == 1,
            "the pool refuses clients, so none waits"
        );
        assert_eq!(conditions.ongoing().len(), 1);
        let over = conditions.over(|_| Some(PoolState::Ready));
        assert_eq!(over.len(), 1);
        assert_eq!(over[0].condition, Condition::Refusing);
        assert_eq!(conditions.clients_of(&over[0]), 657);
        assert!(conditions.is_empty());
        let second = Duration::from_secs(1);
        assert!(
            Condition::Refusing.text(second, 657, true).contains("657 clients were turned away")
        );
        assert!(
            Condition::Refusing.text(second, 1, false).contains("1 client was turned away in 1s")
        );
    }
}
