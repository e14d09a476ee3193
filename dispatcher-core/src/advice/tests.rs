use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const CLIENT: (Asked, Option<IpAddr>) = (Asked::Best, None);
const FOR: Duration = Duration::from_secs(3);

fn server(address: &str, load: u64, weight: f64, at: Time) -> Server {
    Server {
        addresses: vec![Arc::from(address)],
        state: ServerState::Ok,
        load,
        capacity: Some(1_000),
        weight,
        gauges: Vec::new(),
        at,
    }
}

fn servers(loads: &[u64], at: Time) -> Vec<Server> {
    (0..).zip(loads).map(|(n, &load)| server(&format!("10.0.0.{n}:80"), load, 4.0, at)).collect()
}

fn best(advisor: &mut Advisor, now: Time, servers: &[Server], terms: &Terms) -> String {
    let ranking = advisor.advise(now, servers, terms, FOR, CLIENT);
    ranking.usable.first().map_or_else(String::new, |best| best.address.to_string())
}

fn tally(answers: impl IntoIterator<Item = String>) -> BTreeMap<String, u64> {
    let mut tally = BTreeMap::new();
    answers.into_iter().for_each(|answer| *tally.entry(answer).or_default() += 1);
    tally
}

fn gauge(name: &str) -> GaugeName {
    name.parse().expect("a name")
}

#[test]
fn the_lowest_score_is_first_and_the_unusable_are_apart() {
    let at = Time(9_000_000_000);
    let mut list = servers(&[90, 10, 50, 0, 0], at);
    list[3].state = ServerState::Draining;
    list[4].state = ServerState::Full;
    list[2].weight = 40.0;
    let ranking = Advisor::new(1).view(at, &list, &Terms::default(), FOR);
    let scores: Vec<_> = ranking.usable.iter().map(|r| (&*r.address, r.score)).collect();
    let wanted =
        [("10.0.0.2:80", 51.0 / 40.0), ("10.0.0.1:80", 11.0 / 4.0), ("10.0.0.0:80", 91.0 / 4.0)];
    assert_eq!(scores, wanted);
    let others: Vec<_> = ranking.others.iter().map(|r| r.state.name()).collect();
    assert_eq!(others, ["draining", "full"], "as loaded as each other: by address");
    assert_eq!(best(&mut Advisor::new(1), at, &list, &Terms::default()), "10.0.0.2:80");
}

#[test]
fn gauges_are_weighted_and_more_can_be_better() {
    let at = Time(1);
    let mut list = servers(&[3, 3], at);
    list[0].gauges = vec![(gauge("queue_wait"), 0.5), (gauge("free_memory"), 4_000.0)];
    list[1].gauges = vec![(gauge("queue_wait"), 0.0), (gauge("free_memory"), 1_000.0)];
    let score = |terms: &Terms| {
        let ranking = Advisor::new(1).view(at, &list, terms, FOR);
        ranking.usable.iter().map(|r| (r.address.to_string(), r.score)).collect::<BTreeMap<_, _>>()
    };
    let mut terms = Terms::default();
    terms.set(gauge("queue_wait"), 10.0);
    assert_eq!(score(&terms), [("10.0.0.0:80".into(), 6.0), ("10.0.0.1:80".into(), 1.0)].into());
    terms.set(gauge("free_memory"), -0.01);
    assert_eq!(score(&terms), [("10.0.0.0:80".into(), -34.0), ("10.0.0.1:80".into(), -9.0)].into());
    terms.set(gauge("queue_wait"), 0.0);
    terms.set(gauge("free_memory"), 0.0);
    assert_eq!(terms, Terms::default(), "0 disables a gauge");
}

#[test]
fn a_server_that_does_not_tell_a_gauge_is_not_preferred_for_it() {
    let at = Time(1);
    let mut list = servers(&[3, 3, 3], at);
    list[0].gauges = vec![(gauge("queue_wait"), 2.0)];
    list[1].gauges = vec![(gauge("queue_wait"), 1.0)];
    let mut terms = Terms::default();
    terms.set(gauge("queue_wait"), 10.0);
    let ranking = Advisor::new(1).view(at, &list, &terms, FOR);
    let scores: Vec<_> = ranking.usable.iter().map(|r| (&*r.address, r.score)).collect();
    assert_eq!(scores, [("10.0.0.1:80", 11.0), ("10.0.0.0:80", 21.0), ("10.0.0.2:80", 21.0)]);
    assert_eq!(ranking.usable[2].gauges, [(gauge("queue_wait"), None)]);
}

#[test]
fn advice_counts_until_the_data_can_include_it() {
    let (mut advisor, terms) = (Advisor::new(7), Terms::default());
    let start = Time(10_000_000_000);
    let list = servers(&[0, 1_000], start);
    (0..100).for_each(|_| assert_eq!(best(&mut advisor, start, &list, &terms), "10.0.0.0:80"));
    let advised = |now: Time, list: &[Server]| {
        let ranking = advisor.view(now, list, &terms, FOR);
        ranking.usable.iter().map(|r| r.advised).collect::<Vec<_>>()
    };
    assert_eq!(advised(start + FOR / 2, &list), [100, 0]);
    let newer = servers(&[60, 1_000], start + SETTLES_IN / 2);
    assert_eq!(advised(start + FOR / 2, &newer), [100, 0], "clients may still connect");
    let newest = servers(&[100, 1_000], start + SETTLES_IN);
    assert_eq!(advised(start + FOR / 2, &newest), [0, 0], "the load includes them");
    assert_eq!(advised(start + FOR, &list), [0, 0], "and for a short time in any case");
}

#[test]
fn several_addresses_of_a_server_share_its_advice() {
    let (mut advisor, terms, now) = (Advisor::new(3), Terms::default(), Time(5_000_000_000));
    let mut list = servers(&[0, 0], now);
    list[0].addresses.push(Arc::from("[::1]:80"));
    let tally = tally((0..400).map(|_| best(&mut advisor, now, &list, &terms)));
    assert_eq!((tally["10.0.0.0:80"], tally["[::1]:80"]), (100, 100));
    assert_eq!(tally["10.0.0.1:80"], 200);
}

#[test]
fn the_last_answers_are_kept_with_their_figures() {
    let (mut advisor, terms, now) = (Advisor::new(3), Terms::default(), Time(5_000_000_000));
    let list = servers(&[7, 90], now);
    assert_eq!(best(&mut advisor, now, &list, &terms), "10.0.0.0:80");
    assert_eq!(advisor.history().count(), 0, "none is kept by default");
    advisor.set_history(3);
    (0..5).for_each(|_| drop(best(&mut advisor, now, &list, &terms)));
    let numbers: Vec<u64> = advisor.history().map(|advice| advice.number).collect();
    assert_eq!(numbers, [4, 5, 6]);
    let last = advisor.history().last().expect("an answer");
    assert_eq!(last.chosen.as_deref(), Some("10.0.0.0:80"));
    assert_eq!((last.ranked[0].load, last.ranked[0].advised), (7, 5));
    assert_eq!(last.ranked[0].score, (7 + 5 + 1) as f64 / 4.0);
    advisor.set_history(1);
    assert_eq!(advisor.history().count(), 1);
}

#[test]
fn memory_does_not_grow_with_servers_that_come_and_go() {
    let (mut advisor, terms) = (Advisor::new(3), Terms::default());
    for n in 0..10_000 {
        let now = Time(n * 1_000_000);
        let list = [server(&format!("10.0.0.1:{n}"), 0, 1.0, now)];
        assert_eq!(best(&mut advisor, now, &list, &terms), format!("10.0.0.1:{n}"));
        assert!(advisor.servers.len() <= MOST_REMEMBERED + 2, "{}", advisor.servers.len());
    }
    let now = Time(1_000_000_000_000);
    let list = servers(&[0], now);
    (0..100_000).for_each(|n| drop(best(&mut advisor, now + FOR / 1_000 * n, &list, &terms)));
    let entries = advisor.servers.values().map(|known| known.advised.len()).max();
    assert!(entries <= Some(advised::MOST), "{entries:?}");
}

/// A year of requests on figures that stay valid for a year, and are collected rarely or never.
#[test]
fn memory_and_time_do_not_grow_with_the_time_for_which_figures_are_valid() {
    let terms = Terms::default();
    let year = Duration::from_secs(366 * 24 * 3600);
    let start = Time(0) + year;
    for collected_each in [Duration::from_secs(3600), year * 2] {
        let mut advisor = Advisor::new(3);
        let (mut now, mut figures) = (start, start);
        let mut given = 0;
        // As many in a second at first as in a day at the end.
        for n in 0..50_000u32 {
            now = now
                + Duration::from_millis(1)
                + Duration::from_secs_f64(f64::from(n).powi(2) / 1.6e6);
            if now - figures >= collected_each {
                (figures, given) = (now, 0);
            }
            let list = servers(&[0], figures);
            let ranking = advisor.advise(now, &list, &terms, year * 2, CLIENT);
            // Exactly those that the figures cannot include.
            assert_eq!(ranking.usable[0].advised, given, "{n}");
            given += 1;
            let entries = advisor.servers.values().map(|known| known.advised.len()).max();
            assert!(entries <= Some(advised::MOST), "{entries:?}");
        }
        assert!(now - start > year / 2, "{:?}", now - start);
    }
}

#[test]
fn advisors_with_other_seeds_begin_with_other_servers() {
    let now = Time(1);
    let list = servers(&[5, 5, 5, 5], now);
    let first = |seed| best(&mut Advisor::new(seed), now, &list, &Terms::default());
    let tally = tally((0..400).map(first));
    assert!(tally.len() == 4 && tally.values().all(|&count| count > 60), "{tally:?}");
}

proptest! {
    /// Whatever the figures: every usable address is in the answer once and the others are apart;
    /// the first is nearly equal to the lowest score, and a view orders by score.
    #[test]
    fn an_answer_has_every_address_once(
        seed: u64,
        figures in proptest::collection::vec((0u64..2_000, 1u32..50, 0usize..5, -3i8..4), 0..12),
        terms in (-2i8..3, -2i8..3),
        answers in 1usize..30,
    ) {
        let now = Time(20_000_000_000);
        let mut list = Vec::new();
        for (n, (load, weight, state, value)) in figures.into_iter().enumerate() {
            let mut one = server(&format!("10.0.0.{n}:80"), load, f64::from(weight), now);
            one.state = ServerState::ALL[state];
            if value > 0 {
                one.gauges.push((gauge("g"), f64::from(value)));
            }
            list.push(one);
        }
        let mut terms = Terms { connections: f64::from(terms.0), gauges: vec![(gauge("g"), f64::from(terms.1))] };
        terms.gauges.retain(|(_, multiplier)| *multiplier != 0.0);
        let mut advisor = Advisor::new(seed);
        for _ in 0..answers {
            let view = advisor.view(now, &list, &terms, FOR);
            prop_assert!(view.usable.is_sorted_by(|a, b| a.score <= b.score));
            let answer = advisor.advise(now, &list, &terms, FOR, CLIENT);
            let mut seen: Vec<&str> =
                answer.usable.iter().chain(&answer.others).map(|r| &*r.address).collect();
            seen.sort_unstable();
            let mut all: Vec<&str> = list.iter().map(|s| &*s.addresses[0]).collect();
            all.sort_unstable();
            prop_assert_eq!(seen, all);
            prop_assert!(answer.usable.iter().all(|r| r.state == ServerState::Ok));
            prop_assert!(answer.others.iter().all(|r| r.state != ServerState::Ok));
            if let (Some(first), Some(lowest)) = (answer.usable.first(), view.usable.first()) {
                let one = (terms.connections / lowest.weight).abs();
                let room = (lowest.score.abs() * NEAR).max(one);
                prop_assert!(first.score <= lowest.score + room + 1e-9);
                prop_assert!(first.score.is_finite());
            }
        }
    }

    /// Nearly equal servers are advised in proportion to their weights.
    #[test]
    fn equal_servers_have_their_shares(
        seed: u64,
        weights in proptest::collection::vec(1u32..9, 2..7),
        per_weight in 50u64..2_000,
    ) {
        let now = Time(20_000_000_000);
        let list: Vec<Server> = weights
            .iter()
            .enumerate()
            .map(|(n, &weight)| {
                let load = per_weight * u64::from(weight);
                server(&format!("10.0.0.{n}:80"), load, f64::from(weight), now)
            })
            .collect();
        let mut advisor = Advisor::new(seed);
        let tally = tally((0..1_000).map(|_| best(&mut advisor, now, &list, &Terms::default())));
        let total: u32 = weights.iter().sum();
        for (server, weight) in list.iter().zip(&weights) {
            let fair = 1_000.0 * f64::from(*weight) / f64::from(total);
            let got = tally.get(&*server.addresses[0]).copied().unwrap_or(0) as f64;
            prop_assert!((got - fair).abs() <= 4.0, "{got} instead of {fair}: {tally:?}");
        }
    }
}
