//! Connecting to a host with several addresses (RFC 8305): in which order, when each begins, which
//! of them wins, and what the others' results say about their servers.
//!
//! The families alternate, and an address gets a head start over the next one, which a silent
//! address cannot use and a working one hardly needs. One whose probe is due is probed by one race
//! at a time. Time, random numbers and results come in as arguments; drivers do the I/O.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::failure::Failure;
use super::set_aside::{SetAside, Standing};

/// The head start: the recommended value of RFC 8305.
pub(super) const HEAD_START: Duration = Duration::from_millis(250);

/// The most addresses of a host that one attempt tries.
const MOST: usize = 16;

/// Orders the addresses of a host. Each family keeps the order of the resolver, begun at another
/// place by `rotation`. `preferred` comes first, and those that have failed lately come last, those
/// that are probed by another race after them.
pub(super) fn order(
    resolved: &[SocketAddr],
    rotation: usize,
    preferred: Option<SocketAddr>,
    standing: impl Fn(&SocketAddr) -> Standing,
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
    ordered.sort_by_key(|address| {
        let rank = match standing(address) {
            Standing::Usable | Standing::ToProbe => 0,
            Standing::SetAside(_) => 1,
            Standing::BeingProbed => 2,
        };
        // The preferred one is tried in its pause, too.
        (rank == 2, preferred != Some(*address), rank)
    });
    ordered.truncate(MOST);
    ordered
}

/// What the driver does next.
#[derive(Debug)]
pub(super) enum RaceStep {
    /// Begin to connect to this address.
    Begin(SocketAddr),
    /// Wait for a result, at most until this time.
    Wait(Instant),
    /// Every address has failed, or the time is over.
    Failed(Failure),
}

/// An address of a race, or the one that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Runner {
    pub(super) peer: SocketAddr,
    /// It had been set aside, and no other race probes it.
    probe: bool,
}

impl Runner {
    /// The server behind it failed.
    pub(super) fn failed(self, peers: &mut SetAside<SocketAddr>, now: Instant, random: u64) {
        peers.failed(&self.peer, now, random);
    }

    /// Nothing was learnt of it.
    pub(super) fn release(self, peers: &mut SetAside<SocketAddr>) {
        if self.probe {
            peers.release_probe(&self.peer);
        }
    }
}

/// The connects to the addresses of one host, until one of them succeeds.
#[derive(Debug)]
pub(super) struct Race {
    waiting: VecDeque<SocketAddr>,
    /// In the order in which they began.
    under_way: Vec<Runner>,
    next_at: Option<Instant>,
    deadline: Instant,
    last: Option<Failure>,
}

impl Race {
    pub(super) fn new(ordered: Vec<SocketAddr>, deadline: Instant) -> Race {
        Race { waiting: ordered.into(), under_way: Vec::new(), next_at: None, deadline, last: None }
    }

    /// The next step. `random` is for the pauses of those that have not answered in time.
    pub(super) fn next(
        &mut self,
        peers: &mut SetAside<SocketAddr>,
        now: Instant,
        random: u64,
    ) -> RaceStep {
        if now >= self.deadline {
            self.under_way.drain(..).for_each(|runner| runner.failed(peers, now, random));
            self.waiting.clear();
            return RaceStep::Failed(Failure::timed_out("no answer in the time limit"));
        }
        if self.next_at.is_none_or(|at| now >= at)
            && let Some(runner) = self.choose(peers, now)
        {
            self.under_way.push(runner);
            self.next_at = Some(now + HEAD_START);
            return RaceStep::Begin(runner.peer);
        }
        if self.under_way.is_empty() {
            let nothing = || {
                let nothing = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
                Failure::of_server(&nothing)
            };
            return RaceStep::Failed(self.last.take().unwrap_or_else(nothing));
        }
        // One that another race probes waits for the end of all others.
        let next_at = self.next_at.filter(|at| *at > now && !self.waiting.is_empty());
        RaceStep::Wait(next_at.map_or(self.deadline, |at| at.min(self.deadline)))
    }

    /// The first in the order that no other race probes; if all others have failed, that one, too.
    fn choose(&mut self, peers: &mut SetAside<SocketAddr>, now: Instant) -> Option<Runner> {
        for place in 0..self.waiting.len() {
            let peer = *self.waiting.get(place)?;
            let probe = match peers.standing(&peer, now) {
                Standing::Usable | Standing::SetAside(_) => false,
                Standing::ToProbe => peers.claim_probe(&peer, now),
                Standing::BeingProbed => continue,
            };
            self.waiting.remove(place);
            return Some(Runner { peer, probe });
        }
        if !self.under_way.is_empty() {
            return None;
        }
        Some(Runner { peer: self.waiting.pop_front()?, probe: false })
    }

    fn take(&mut self, peer: SocketAddr) -> Option<(usize, Runner)> {
        let place = self.under_way.iter().position(|runner| runner.peer == peer)?;
        Some((place, self.under_way.remove(place)))
    }

    /// A connect failed: the next one begins at once.
    pub(super) fn failed(
        &mut self,
        peer: SocketAddr,
        failure: Failure,
        peers: &mut SetAside<SocketAddr>,
        now: Instant,
        random: u64,
    ) {
        if let Some((_, runner)) = self.take(peer) {
            match failure.local {
                true => runner.release(peers),
                false => runner.failed(peers, now, random),
            }
        }
        self.next_at = None;
        self.last = Some(failure);
    }

    /// A connect succeeded: the first one in the order of their beginnings that has a result. Those
    /// that began before it had a head start and did not answer; the later ones had not. Returns
    /// the winner, and how many have failed.
    pub(super) fn won(
        &mut self,
        peer: SocketAddr,
        peers: &mut SetAside<SocketAddr>,
        now: Instant,
        random: u64,
    ) -> (Runner, usize) {
        let (place, winner) = self.take(peer).unwrap_or((0, Runner { peer, probe: false }));
        for (began, runner) in self.under_way.drain(..).enumerate() {
            match began < place {
                true => runner.failed(peers, now, random),
                false => runner.release(peers),
            }
        }
        self.waiting.clear();
        (winner, place)
    }

    /// The race is given up.
    pub(super) fn cancel(&mut self, peers: &mut SetAside<SocketAddr>) {
        self.under_way.drain(..).for_each(|runner| runner.release(peers));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connector::set_aside::Pauses;

    const PAUSES: Pauses = Pauses { first: Duration::from_secs(1), most: Duration::from_secs(15) };

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn refused() -> Failure {
        Failure::of_server(&io::ErrorKind::ConnectionRefused.into())
    }

    /// A race of these addresses, with a minute.
    fn race(texts: &[&str], now: Instant) -> Race {
        Race::new(addresses(texts), now + Duration::from_secs(60))
    }

    fn begun(step: RaceStep) -> SocketAddr {
        let RaceStep::Begin(peer) = step else { panic!("{step:?}") };
        peer
    }

    #[test]
    fn the_families_alternate_beginning_with_the_first_of_the_resolver() {
        let six = ["[::1]:1", "[::2]:1", "[::3]:1"];
        let four = ["10.0.0.1:1", "10.0.0.2:1"];
        let resolved = addresses(&[six.as_slice(), &four, &["[::1]:1"]].concat());
        let none = |_: &SocketAddr| Standing::Usable;
        let expected = [six[0], four[0], six[1], four[1], six[2]];
        assert_eq!(order(&resolved, 0, None, none), addresses(&expected));
        let resolved = addresses(&[four.as_slice(), &six].concat());
        let expected = [four[1], six[1], four[0], six[2], six[0]];
        assert_eq!(order(&resolved, 1, None, none), addresses(&expected));
        let preferred = addresses(&[six[2]])[0];
        let failed = addresses(&[four[0], six[0]]);
        let expected = [six[2], four[1], six[1], four[0], six[0]];
        let until = Instant::now();
        let standing = |address: &SocketAddr| match failed.contains(address) {
            true => Standing::SetAside(until),
            false => Standing::Usable,
        };
        assert_eq!(order(&resolved, 0, Some(preferred), standing), addresses(&expected));
        let probed = |address: &SocketAddr| match *address == preferred {
            true => Standing::BeingProbed,
            false => Standing::SetAside(until),
        };
        assert_eq!(order(&resolved, 0, Some(preferred), probed).last(), Some(&preferred));
        assert!(order(&[], 3, None, none).is_empty());
    }

    #[test]
    fn a_silent_address_costs_its_head_start_and_a_failed_one_nothing() {
        let (now, mut peers) = (Instant::now(), SetAside::new(PAUSES));
        let mut race = race(&["[::1]:1", "10.0.0.1:1", "[::2]:1"], now);
        let first = begun(race.next(&mut peers, now, 0));
        assert!(first.is_ipv6());
        let RaceStep::Wait(until) = race.next(&mut peers, now, 0) else { panic!("not waiting") };
        assert_eq!(until, now + HEAD_START);
        let second = begun(race.next(&mut peers, until, 0));
        assert!(second.is_ipv4());
        race.failed(second, refused(), &mut peers, until, 0);
        let third = begun(race.next(&mut peers, until, 0));
        let deadline = now + Duration::from_secs(60);
        let step = race.next(&mut peers, until, 0);
        assert!(matches!(step, RaceStep::Wait(end) if end == deadline), "two are under way");
        race.failed(first, refused(), &mut peers, until, 0);
        let unreachable = Failure::of_server(&io::ErrorKind::HostUnreachable.into());
        race.failed(third, unreachable.clone(), &mut peers, until, 0);
        let RaceStep::Failed(failure) = race.next(&mut peers, until, 0) else { panic!("goes on") };
        assert_eq!(failure, unreachable);
        for peer in [first, second, third] {
            assert!(!peers.standing(&peer, until).is_usable());
        }
    }

    #[test]
    fn those_that_began_before_the_winner_have_failed_and_later_ones_have_not() {
        let (mut now, mut peers) = (Instant::now(), SetAside::new(PAUSES));
        let all = ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"];
        let mut race = race(&all, now);
        for peer in addresses(&all) {
            assert_eq!(begun(race.next(&mut peers, now, 0)), peer);
            now += HEAD_START;
        }
        let [first, second, third] = addresses(&all)[..] else { panic!("not three") };
        let (winner, failed) = race.won(second, &mut peers, now, 0);
        assert_eq!((winner.peer, failed), (second, 1));
        assert!(matches!(peers.standing(&first, now), Standing::SetAside(_)));
        assert_eq!(peers.standing(&second, now), Standing::Usable);
        assert_eq!(peers.standing(&third, now), Standing::Usable);
    }

    #[test]
    fn the_end_of_the_time_is_a_failure_of_all_that_have_begun() {
        let (now, mut peers) = (Instant::now(), SetAside::new(PAUSES));
        let all = addresses(&["10.0.0.1:1", "10.0.0.2:1"]);
        let deadline = now + HEAD_START / 2;
        let mut race = Race::new(all.clone(), deadline);
        begun(race.next(&mut peers, now, 0));
        assert!(matches!(race.next(&mut peers, now, 0), RaceStep::Wait(end) if end == deadline));
        let RaceStep::Failed(failure) = race.next(&mut peers, deadline, 0) else { panic!("on") };
        assert_eq!(failure.kind, io::ErrorKind::TimedOut);
        assert!(!peers.standing(&all[0], deadline).is_usable());
        assert_eq!(peers.standing(&all[1], deadline), Standing::Usable, "it had not begun");
    }

    #[test]
    fn a_shortage_of_this_machine_sets_no_address_aside() {
        let (now, mut peers) = (Instant::now(), SetAside::new(PAUSES));
        let mut race = race(&["10.0.0.1:1"], now);
        let peer = begun(race.next(&mut peers, now, 0));
        let shortage = Failure::of_io(&rustix::io::Errno::MFILE.into());
        race.failed(peer, shortage.clone(), &mut peers, now, 0);
        let RaceStep::Failed(failure) = race.next(&mut peers, now, 0) else { panic!("goes on") };
        assert_eq!(failure, shortage);
        assert_eq!(peers.standing(&peer, now), Standing::Usable);
    }

    /// Two addresses of a host have failed, and their pauses are over.
    #[test]
    fn one_race_at_a_time_probes_an_address_and_the_others_wait_for_their_own() {
        let (start, mut peers) = (Instant::now(), SetAside::new(PAUSES));
        let all = ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1"];
        let [a, b, c] = addresses(&all)[..] else { panic!("not three") };
        peers.failed(&a, start, 0);
        peers.failed(&b, start, 0);
        let now = start + PAUSES.first;
        let mut first = race(&all, now);
        assert_eq!(begun(first.next(&mut peers, now, 0)), a);
        let mut second = race(&all, now);
        assert_eq!(begun(second.next(&mut peers, now, 0)), b, "the first is probed already");
        let mut third = race(&all, now);
        assert_eq!(begun(third.next(&mut peers, now, 0)), c);
        // However slow this one is, those that are probed by others are left alone.
        let later = now + HEAD_START * 2;
        let step = third.next(&mut peers, later, 0);
        let deadline = now + Duration::from_secs(60);
        assert!(matches!(step, RaceStep::Wait(end) if end == deadline), "{step:?}");
        // A race that is given up leaves its probe to the next one.
        first.cancel(&mut peers);
        assert_eq!(begun(third.next(&mut peers, later, 0)), a);
        // With nothing else left, one that another race probes is tried, too.
        third.failed(a, refused(), &mut peers, later, 0);
        third.failed(c, refused(), &mut peers, later, 0);
        assert_eq!(begun(third.next(&mut peers, later, 0)), b);
        // Its failure is that of the server; the probe of the other race is unharmed by the rest.
        second.won(b, &mut peers, later, 0);
        assert!(peers.succeeded(&b));
        assert_eq!(peers.standing(&b, later), Standing::Usable);
    }
}
