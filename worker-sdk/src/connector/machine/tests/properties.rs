//! What holds for every plan, while servers come and go.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// When each server is down, and how it behaves then: up at every other time.
type Outages = Vec<(Server, u64, u64, bool)>;

fn outages(servers: Server) -> impl Strategy<Value = Outages> {
    let one = (0..servers, 0..120u64, 1..60u64, any::<bool>());
    prop::collection::vec(one, 0..12)
}

fn answer(outages: &Outages, server: Server, at: Duration) -> Answer {
    let at = at.as_secs();
    let outage = outages
        .iter()
        .find(|(down, from, length, _)| *down == server && (*from..from + length).contains(&at));
    match outage {
        None => Answer::Accepts,
        Some((_, _, _, true)) => Answer::Silent,
        Some((_, _, _, false)) => Answer::Refuses,
    }
}

fn selections() -> impl Strategy<Value = Selection> {
    prop_oneof![
        Just(Selection::InOrder),
        Just(Selection::RoundRobin),
        Just(Selection::Random),
        Just(Selection::Weighted),
        Just(Selection::Best),
    ]
}

proptest! {
    /// The numbers of every plan, and the rule for alternatives, while servers come and go.
    #[test]
    fn attempts_keep_the_definition(
        (servers, outages) in (1..6u8).prop_flat_map(|n| (Just(n), outages(n))),
        selection in selections(),
        max_retries in 1..5u32,
        max_retries_alternative in 0..6u32,
        total in 1..40u64,
        seed: u64,
    ) {
        let mut world = World::new(seed);
        let mut targets = targets(selection, servers);
        let total_timeout = Duration::from_secs(total);
        let plan = Plan { total_timeout, ..plan(max_retries, max_retries_alternative) };
        let mut lost = None;
        for _ in 0..20 {
            let mut machine = Machine::new(plan.clone(), lost);
            let course = world.run(&mut machine, &mut targets, 0, |server, at| {
                answer(&outages, server, at)
            });
            // The events count down: first on the current address, then on alternatives.
            let all = (0..max_retries).rev().map(|left| (false, left))
                .chain((0..max_retries_alternative).rev().map(|left| (true, left)));
            let all: Vec<(bool, u32)> = all.collect();
            let kinds = course.kinds();
            prop_assert_eq!(&kinds, &all[..kinds.len()]);
            let (outcomes, timed_out) = machine.outcomes();
            if course.reached.is_none() {
                prop_assert!(kinds.len() == all.len() || timed_out);
                prop_assert_eq!(outcomes.len(), kinds.len());
            }
            // All limits hold: the pause before a reconnect is at most the first back-off.
            prop_assert!(course.took <= total_timeout + plan.back_off.first + MS);
            prop_assert!(outcomes.iter().all(|outcome| outcome.took <= plan.attempt_timeout));
            // An alternative is not the current address, if there is another, and has not failed
            // while there is one that has not.
            let tried = course.addresses();
            for (place, address) in tried.iter().enumerate() {
                if !kinds[place].0 {
                    continue;
                }
                let before: BTreeSet<Server> = tried[..place].iter().copied().collect();
                if before.len() < usize::from(servers) {
                    prop_assert!(!before.contains(address), "{:?}", tried);
                } else if servers > 2 {
                    prop_assert_ne!(*address, tried[place - 1]);
                }
                let current = tried[usize::try_from(max_retries).unwrap() - 1];
                prop_assert!(servers == 1 || *address != current);
            }
            lost = course.reached;
            world.pass(Duration::from_secs(5));
        }
    }

    /// While one server is up, and the plan reaches all others, a connect ends within its limits.
    #[test]
    fn no_connect_fails_while_a_server_is_up(
        servers in 1..6u8,
        selection in selections(),
        silent: bool,
        seed: u64,
    ) {
        let mut world = World::new(seed);
        let mut targets = targets(selection, servers);
        let plan = plan(3, servers.into());
        let mut lost = None;
        for turn in 0..30 {
            let up = world.rng.u8(0..servers);
            let down = if silent { Answer::Silent } else { Answer::Refuses };
            let mut machine = Machine::new(plan.clone(), lost);
            let course = world.run(&mut machine, &mut targets, 0, |server, _| {
                if server == up { Answer::Accepts } else { down }
            });
            prop_assert_eq!(course.reached, Some(up), "turn {}", turn);
            lost = course.reached;
            world.pass_between(0..20_000);
        }
    }

    /// A server that was down for any time has its share again one longest pause after its
    /// recovery.
    #[test]
    fn a_recovered_server_gets_its_share_back(
        servers in 2..6u8,
        selection in prop_oneof![
            Just(Selection::RoundRobin), Just(Selection::Random), Just(Selection::Weighted),
        ],
        down_for in 1..2_000u64,
        seed: u64,
    ) {
        let mut world = World::new(seed);
        let mut targets = targets(selection, servers);
        let recovery = Duration::from_secs(down_for);
        let measured_from = recovery + PAUSES.most + Duration::from_secs(10);
        let mut shares: BTreeMap<Server, u32> = BTreeMap::new();
        let mut count = 0u32;
        while count < 2_000 {
            let course = world.run(&mut Machine::new(plan(3, 4), None), &mut targets, 0, |server, at| {
                if server == 0 && at < recovery { Answer::Refuses } else { Answer::Accepts }
            });
            let reached = course.reached.expect("the others are up");
            if world.time() >= measured_from {
                *shares.entry(reached).or_default() += 1;
                count += 1;
                world.pass(10 * MS);
            } else {
                world.pass_between(1..1_000);
            }
        }
        let even = count / u32::from(servers);
        let off = if selection == Selection::RoundRobin { 1 } else { 150 };
        for server in 0..servers {
            prop_assert!(shares[&server].abs_diff(even) <= off, "{:?}", shares);
        }
    }

    /// In order, the first server is used again after its recovery.
    #[test]
    fn the_first_in_order_is_used_again(down_for in 1..2_000u64, seed: u64) {
        let mut world = World::new(seed);
        let mut targets = targets(Selection::InOrder, 3);
        let recovery = Duration::from_secs(down_for);
        loop {
            let course = world.run(&mut Machine::new(plan(2, 2), None), &mut targets, 0, |server, at| {
                if server == 0 && at < recovery { Answer::Silent } else { Answer::Accepts }
            });
            if world.time() >= recovery + PAUSES.most + Duration::from_secs(4) {
                prop_assert_eq!(course.addresses(), [0]);
                break;
            }
            world.pass_between(1..1_000);
        }
    }
}
