//! Connecting to a host with several addresses (RFC 8305): in which order, and when each begins.
//!
//! The families alternate, and an address gets a head start over the next one, which a silent
//! address cannot use and a working one hardly needs. Time and results come in as arguments.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// The head start: the recommended value of RFC 8305.
pub(super) const HEAD_START: Duration = Duration::from_millis(250);

/// The most addresses of a host that one attempt tries.
const MOST: usize = 16;

/// Orders the addresses of a host. Each family keeps the order of the resolver, begun at another
/// place by `rotation`. `preferred` comes first, and those that have failed lately come last.
pub(super) fn order(
    resolved: &[SocketAddr],
    rotation: usize,
    preferred: Option<SocketAddr>,
    has_failed: impl Fn(&SocketAddr) -> bool,
) -> Vec<SocketAddr> {
    let first_is_v6 = resolved.first().is_some_and(SocketAddr::is_ipv6);
    let family = |first: bool| {
        let mut members: Vec<SocketAddr> = Vec::new();
        for address in resolved.iter().filter(|a| (a.is_ipv6() == first_is_v6) == first) {
            if !members.contains(address) {
                members.push(*address);
            }
        }
        if !members.is_empty() {
            let places = rotation % members.len();
            members.rotate_left(places);
        }
        members.into_iter()
    };
    let (mut one, mut other) = (family(true), family(false));
    let mut ordered = Vec::new();
    loop {
        match (one.next(), other.next()) {
            (None, None) => break,
            (first, second) => ordered.extend(first.into_iter().chain(second)),
        }
    }
    // Stable, so the families still alternate.
    ordered.sort_by_key(|address| (preferred != Some(*address), has_failed(address)));
    ordered.truncate(MOST);
    ordered
}

/// What the driver does next.
#[derive(Debug)]
pub(super) enum RaceStep {
    /// Begin to connect to this address.
    Begin(SocketAddr),
    /// Wait for a result; with a time, at most until then.
    Wait(Option<Instant>),
    /// Every address has failed.
    Failed(io::Error),
}

#[derive(Debug)]
pub(super) struct Race {
    waiting: VecDeque<SocketAddr>,
    under_way: usize,
    next_at: Option<Instant>,
    last: Option<io::Error>,
}

impl Race {
    pub(super) fn new(ordered: Vec<SocketAddr>) -> Race {
        Race { waiting: ordered.into(), under_way: 0, next_at: None, last: None }
    }

    pub(super) fn next(&mut self, now: Instant) -> RaceStep {
        let due = self.next_at.is_none_or(|at| now >= at);
        if due && let Some(address) = self.waiting.pop_front() {
            self.under_way += 1;
            self.next_at = Some(now + HEAD_START);
            return RaceStep::Begin(address);
        }
        if self.under_way == 0 {
            let nothing = || io::Error::new(io::ErrorKind::NotFound, "the host has no address");
            return RaceStep::Failed(self.last.take().unwrap_or_else(nothing));
        }
        RaceStep::Wait(self.next_at.filter(|_| !self.waiting.is_empty()))
    }

    /// A connect failed: the next one begins at once.
    pub(super) fn failed(&mut self, error: io::Error) {
        self.under_way -= 1;
        self.next_at = None;
        self.last = Some(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_families_alternate_beginning_with_the_first_of_the_resolver() {
        let six = ["[::1]:1", "[::2]:1", "[::3]:1"];
        let four = ["10.0.0.1:1", "10.0.0.2:1"];
        let resolved = addresses(&[six.as_slice(), &four, &["[::1]:1"]].concat());
        let none = |_: &SocketAddr| false;
        let expected = [six[0], four[0], six[1], four[1], six[2]];
        assert_eq!(order(&resolved, 0, None, none), addresses(&expected));
        let resolved = addresses(&[four.as_slice(), &six].concat());
        let expected = [four[1], six[1], four[0], six[2], six[0]];
        assert_eq!(order(&resolved, 1, None, none), addresses(&expected));
        let preferred = addresses(&[six[2]])[0];
        let failed = addresses(&[four[0], six[0]]);
        let expected = [six[2], four[1], six[1], four[0], six[0]];
        let ordered = order(&resolved, 0, Some(preferred), |address| failed.contains(address));
        assert_eq!(ordered, addresses(&expected));
        assert!(order(&[], 3, None, none).is_empty());
    }

    #[test]
    fn a_silent_address_costs_its_head_start_and_a_failed_one_nothing() {
        let now = Instant::now();
        let mut race = Race::new(addresses(&["[::1]:1", "10.0.0.1:1", "[::2]:1"]));
        assert!(matches!(race.next(now), RaceStep::Begin(first) if first.is_ipv6()));
        let RaceStep::Wait(Some(until)) = race.next(now) else { panic!("not waiting") };
        assert_eq!(until, now + HEAD_START);
        assert!(matches!(race.next(until), RaceStep::Begin(second) if second.is_ipv4()));
        race.failed(io::ErrorKind::ConnectionRefused.into());
        assert!(matches!(race.next(until), RaceStep::Begin(_)), "at once");
        assert!(matches!(race.next(until), RaceStep::Wait(None)), "two are under way");
        race.failed(io::ErrorKind::ConnectionRefused.into());
        race.failed(io::ErrorKind::HostUnreachable.into());
        let RaceStep::Failed(error) = race.next(until) else { panic!("not failed") };
        assert_eq!(error.kind(), io::ErrorKind::HostUnreachable);
    }
}
