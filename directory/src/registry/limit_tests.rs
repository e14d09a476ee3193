//! What one member or user can do to others: nothing. Limits, lies, and links that fail.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use dispatch_protocol::relay::Location;

use super::tests::{
    at, drain, enter, entry, id, look_up, lookup, name, register, registry, registry_of,
};
use super::*;

/// A registry with small limits for each user, and large ones for all.
fn limited(change: impl FnOnce(&mut Limits)) -> Registry {
    let mut limits = Limits { grace: 100, ..Limits::default() };
    change(&mut limits);
    Registry::new(name("one"), [(name("chat"), Receives::Newest)], limits, false)
}

/// What a member is told about records that are not accepted.
fn reasons(registry: &mut Registry) -> Vec<String> {
    let reason = |effect| match effect {
        Effect::Send(
            _,
            FromDirectory::NotAccepted { reason, .. }
            | FromDirectory::Declined { reason, .. }
            | FromDirectory::NoLink { reason, .. },
        ) => Some(String::from_utf8(reason).unwrap()),
        Effect::Cut(_, reason) => Some(reason.to_owned()),
        _ => None,
    };
    drain(registry).into_iter().filter_map(reason).collect()
}

fn found(effects: &[Effect], wanted: u64) -> Option<Vec<Location>> {
    effects.iter().find_map(|effect| match effect {
        Effect::Send(_, FromDirectory::Found { request, places }) if *request == wanted => {
            Some(places.clone())
        }
        _ => None,
    })
}

#[test]
fn a_registration_that_was_only_out_of_reach_is_found_again() {
    for grace in [0, 100] {
        let mut registry = limited(|limits| limits.grace = grace);
        let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
        let stamp = register(&mut registry, 0, a, "alice");
        // The way there was lost: at once.
        registry.handle(at(0), b, lookup(5, "alice", stamp, false));
        assert_eq!(found(&drain(&mut registry), 5).unwrap()[0].stamp, stamp);
        // It has refused a message. Its end may be on its way here, and never come.
        registry.handle(at(0), b, lookup(6, "alice", stamp, true));
        assert_eq!(drain(&mut registry), [], "it waits");
        let due = registry.tick(at(0)).unwrap();
        assert!(due <= 100, "{due}");
        registry.tick(at(due));
        assert_eq!(found(&drain(&mut registry), 6).unwrap()[0].stamp, stamp);
        assert_eq!(registry.tick(at(due)), None);
        // One older than what was known is never an answer.
        registry.handle(at(0), b, lookup(7, "alice", stamp + 1, false));
        registry.tick(at(200));
        assert_eq!(found(&drain(&mut registry), 7), Some(Vec::new()));
        assert!(registry.waiting.is_empty() && registry.overdue.is_empty());
    }
}

#[test]
fn an_older_registration_does_not_answer_one_that_waits_for_a_newer() {
    let mut registry = registry(Receives::Newest, false);
    registry.settle(at(0));
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    registry.handle(at(0), b, lookup(5, "alice", 900_002 << 16, false));
    let again = |stamp| ToDirectory::Register { request: 1, id: id("alice"), stamp, key: 1 };
    registry.handle(at(1), a, again(900_001 << 16));
    assert_eq!(found(&drain(&mut registry), 5), None);
    registry.handle(at(2), b, again(900_002 << 16));
    assert_eq!(found(&drain(&mut registry), 5).unwrap()[0].stamp, 900_002 << 16);
}

#[test]
fn a_link_that_could_not_be_made_is_made_when_it_is_asked_for_again() {
    let mut registry = registry(Receives::Newest, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    let connect = |member, after| ToDirectory::Connect { member, after };
    registry.handle(at(0), a, connect(2, 0));
    let effects = drain(&mut registry);
    assert!(matches!(effects[..], [Effect::Link(..)]), "{effects:?}");
    registry.link_failed(a, b, "no descriptor");
    assert_eq!(reasons(&mut registry), ["no descriptor"]);
    registry.handle(at(1), a, connect(2, 0));
    let effects = drain(&mut registry);
    let [Effect::Link(from, to, number)] = effects[..] else { panic!("{effects:?}") };
    assert_eq!((from, to), (a, b));
    // The other member comes again with its number: the link before has ended.
    registry.leave(at(2), b);
    drain(&mut registry);
    let b = enter(&mut registry, 0, 2);
    registry.handle(at(3), a, connect(2, number));
    let effects = drain(&mut registry);
    assert!(matches!(effects[..], [Effect::Link(_, to, next)] if to == b && next > number));
    registry.leave(at(4), a);
    registry.leave(at(4), b);
    assert!(registry.users.is_empty());
}

#[test]
fn a_false_link_number_costs_its_sender_alone() {
    let mut registry = registry(Receives::Newest, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    let connect = |after| ToDirectory::Connect { member: 2, after };
    for after in [u64::MAX, 1] {
        registry.handle(at(0), a, connect(after));
        let effects = drain(&mut registry);
        assert!(matches!(effects[..], [Effect::Cut(member, _)] if member == a), "{effects:?}");
    }
    registry.handle(at(0), a, connect(0));
    let [Effect::Link(_, _, number)] = drain(&mut registry)[..] else { panic!("no link") };
    registry.handle(at(0), a, connect(number + 1));
    assert!(matches!(drain(&mut registry)[..], [Effect::Cut(member, _)] if member == a));
    // True numbers, but one link after the other: the other member is spared.
    let mut last = number;
    let mut links = 0;
    for ms in 0..1000 {
        registry.handle(at(ms), a, connect(last));
        for effect in drain(&mut registry) {
            match effect {
                Effect::Link(_, _, number) => {
                    last = number;
                    links += 1;
                }
                Effect::Send(to, FromDirectory::NoLink { .. }) => assert_eq!(to, a),
                other => panic!("{other:?}"),
            }
        }
    }
    assert!((1..=10).contains(&links), "{links} links in a second");
    let _ = b;
}

#[test]
fn a_user_cannot_take_what_others_need() {
    let mut registry = limited(|limits| {
        limits.members_per_user = 2;
        limits.ids_per_user = 3;
        limits.groups_per_user = 2;
        limits.memberships_per_user = 4;
        limits.watches_per_user = 2;
        limits.lookups_per_user = 1;
        limits.links_per_user = 1;
    });
    let first = registry.enter(entry(0, 1, 1)).unwrap();
    let second = registry.enter(entry(0, 2, 1)).unwrap();
    assert!(registry.enter(entry(0, 3, 1)).unwrap_err().contains("max_members_per_user"));
    let other = registry.enter(entry(0, 4, 2)).unwrap();
    let others = registry.enter(entry(0, 5, 2)).unwrap();
    let mut say = |member, record| {
        registry.handle(at(0), member, record);
        reasons(&mut registry)
    };
    let register =
        |text: &str| ToDirectory::Register { request: 1, id: id(text), stamp: 0, key: 1 };
    let join = |text: &str, key| ToDirectory::Join { group: id(text), key, weight: 1 };
    let watch = |text: &str| ToDirectory::Watch { id: id(text), group: false };
    let connect = |member| ToDirectory::Connect { member, after: 0 };
    for (member, text) in [(first, "1"), (second, "2"), (second, "3")] {
        assert_eq!(say(member, register(text)), [""; 0]);
    }
    assert!(say(first, register("4"))[0].contains("max_ids_per_user"));
    assert_eq!(say(first, join("a", 1)), [""; 0]);
    assert_eq!(say(second, ToDirectory::Subscribe { group: id("b") }), [""; 0]);
    assert!(say(second, join("c", 1))[0].contains("max_groups_per_user"));
    assert!(
        say(second, ToDirectory::Watch { id: id("c"), group: true })[0]
            .contains("max_groups_per_user")
    );
    for key in [2, 3] {
        assert_eq!(say(second, join("a", key)), [""; 0]);
    }
    assert!(say(second, join("a", 4))[0].contains("max_memberships_per_user"));
    assert!(
        say(first, ToDirectory::Subscribe { group: id("a") })[0]
            .contains("max_memberships_per_user")
    );
    for member in [first, second] {
        assert_eq!(say(member, watch("1")), [""; 0]);
    }
    assert!(say(first, watch("2"))[0].contains("max_watches_per_user"));
    assert_eq!(say(first, connect(2)), [""; 0]);
    assert!(say(first, connect(4))[0].contains("max_links_per_user"));
    assert_eq!(say(other, connect(1)), [""; 0], "which the other user pays");
    // Another user has all of it.
    for text in ["x", "y", "z"] {
        assert_eq!(say(other, register(text)), [""; 0]);
        assert_eq!(say(other, join("a", text.as_bytes()[0].into())), [""; 0]);
    }
    assert_eq!(say(others, join("d", 1)), [""; 0]);
    assert_eq!(say(other, watch("1")), [""; 0]);
    // Look-ups that wait: the second is answered at once.
    registry.leave(at(1), second);
    drain(&mut registry);
    assert_eq!(look_up(&mut registry, first, "2"), None);
    assert_eq!(look_up(&mut registry, first, "3"), Some(Vec::new()));
    assert_eq!(look_up(&mut registry, other, "3"), None);
    // Everything is given back.
    for member in [first, other, others] {
        registry.leave(at(2), member);
    }
    registry.tick(at(1000));
    assert!(registry.users.is_empty(), "{:?}", registry.users);
    assert!(registry.namespaces[0].groups.is_empty());
}

#[test]
fn ended_registrations_of_one_user_do_not_fill_the_memory_of_ended_ones() {
    let mut registry = limited(|limits| limits.ids_per_user = 5);
    let a = registry.enter(entry(0, 1, 1)).unwrap();
    let b = registry.enter(entry(0, 2, 2)).unwrap();
    let stamp = register(&mut registry, 0, b, "alice");
    for n in 0..100 {
        let text = n.to_string();
        let stamp = register(&mut registry, 0, a, &text);
        registry.handle(at(0), a, ToDirectory::Unregister { id: id(&text), stamp });
    }
    drain(&mut registry);
    assert_eq!(registry.graces.len(), 5);
    registry.handle(at(0), b, ToDirectory::Unregister { id: id("alice"), stamp });
    assert_eq!(look_up(&mut registry, a, "alice"), None, "its grace runs");
    registry.tick(at(100));
    assert!(registry.graces.is_empty() && registry.slots.len() == 0);
}

#[test]
fn a_group_is_counted_for_a_user_that_is_in_it() {
    let mut registry = limited(|limits| limits.groups_per_user = 1);
    let a = registry.enter(entry(0, 1, 1)).unwrap();
    let b = registry.enter(entry(0, 2, 2)).unwrap();
    let join = |text: &str| ToDirectory::Join { group: id(text), key: 1, weight: 1 };
    registry.handle(at(0), a, join("room"));
    registry.handle(at(0), b, join("room"));
    assert_eq!((registry.users.of(Some(1)).groups, registry.users.of(Some(2)).groups), (1, 0));
    registry.handle(at(0), a, ToDirectory::Leave { group: id("room"), key: 1 });
    assert_eq!((registry.users.of(Some(1)).groups, registry.users.of(Some(2)).groups), (0, 1));
    registry.handle(at(0), a, join("another"));
    assert_eq!(reasons(&mut registry), [""; 0]);
    registry.leave(at(0), b);
    registry.leave(at(0), a);
    assert!(registry.users.is_empty());
}

#[test]
fn a_group_that_is_sent_to_no_more_is_forgotten() {
    let mut registry = registry(Receives::Newest, false);
    let a = enter(&mut registry, 0, 1);
    for n in 0..1000 {
        let group = id(&n.to_string());
        registry.handle(at(0), a, ToDirectory::Subscribe { group: group.clone() });
        registry.handle(at(0), a, ToDirectory::Unsubscribe { group: group.clone() });
        // Twice is once.
        registry.handle(at(0), a, ToDirectory::Unsubscribe { group });
    }
    drain(&mut registry);
    assert!(registry.namespaces[0].groups.is_empty());
    assert_eq!(registry.users.of(Some(1)).memberships, 0);
    registry.handle(at(0), a, ToDirectory::Join { group: id("1"), key: 1, weight: 1 });
    assert_eq!(drain(&mut registry), [], "and is told no changes");
}

#[test]
fn an_observer_asks_and_does_nothing_else() {
    let limits = Limits { members: 1, ..Limits::default() };
    let mut registry = Registry::new(name("one"), [(name("chat"), Receives::Newest)], limits, true);
    let a = enter(&mut registry, 0, 1);
    drain(&mut registry);
    let observer = Entry { observes: true, ..entry(0, 2, 0) };
    let observer = registry.enter(observer).unwrap();
    assert_eq!(drain(&mut registry), [], "other hosts do not hear of it");
    assert_eq!(registry.snapshot().len(), 1);
    let (request, group, key) = (1, id("x"), 1);
    for record in [
        ToDirectory::Register { request, id: id("x"), stamp: 0, key },
        ToDirectory::Unregister { id: id("x"), stamp: 1 },
        lookup(1, "x", 0, false),
        ToDirectory::Connect { member: 1, after: 0 },
        ToDirectory::Join { group: group.clone(), key, weight: 1 },
        ToDirectory::Leave { group: group.clone(), key },
        ToDirectory::Subscribe { group: group.clone() },
        ToDirectory::Unsubscribe { group: group.clone() },
        ToDirectory::Watch { id: id("x"), group: false },
        ToDirectory::Unwatch { id: id("x"), group: false },
    ] {
        registry.handle(at(0), observer, record.clone());
        let effects = drain(&mut registry);
        let cut = matches!(effects[..], [Effect::Cut(member, _)] if member == observer);
        assert!(cut, "{record:?}: {effects:?}");
    }
    for record in [
        ToDirectory::Who { request, id: id("x") },
        ToDirectory::Online { request, cursor: 0 },
        ToDirectory::Groups { request, after: Vec::new() },
        ToDirectory::Stats { request },
    ] {
        registry.handle(at(0), observer, record);
        assert!(matches!(drain(&mut registry)[..], [Effect::Send(to, _)] if to == observer));
    }
    // No link leads to it.
    registry.handle(at(0), a, ToDirectory::Connect { member: 2, after: 0 });
    let none = FromDirectory::NoMember { member: 2 };
    assert_eq!(drain(&mut registry), [Effect::Send(a, none)]);
    registry.leave(at(0), observer);
    assert_eq!((drain(&mut registry), registry.observers), (vec![], 0));
}

#[test]
fn stamps_of_members_do_not_move_the_clock() {
    let mut registry = registry(Receives::Newest, true);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    drain(&mut registry);
    let wall = at(0).wall;
    let again = |text: &str, ms: u64| ToDirectory::Register {
        request: 1,
        id: id(text),
        stamp: ms << 16,
        key: 1,
    };
    // Near enough to be kept, and it orders the registrations of its id.
    registry.handle(at(0), a, again("alice", wall + 50_000));
    drain(&mut registry);
    let other = register(&mut registry, 0, b, "bob");
    assert!(other >> 16 <= wall, "{} ms ahead", (other >> 16) - wall);
    registry.handle(at(1), b, again("alice", 0));
    let effects = drain(&mut registry);
    let shared = effects.iter().find_map(|effect| match effect {
        Effect::Share(Shared::Registered { stamp, clock, .. }) => Some((*stamp, *clock)),
        _ => None,
    });
    assert_eq!(shared, Some((((wall + 50_000) << 16) + 1, false)), "later, and not of the clock");
    assert_eq!(look_up(&mut registry, a, "alice").unwrap()[0].member, 2, "the newest wins");
    // Another host does not follow it either.
    let mut two = registry_of("two", Receives::Newest, true);
    let host = two.remote_host(&name("one")).unwrap();
    let (namespace, member) = (name("chat"), 2);
    let worker = name("w2");
    two.apply(at(0), host, Shared::Member { namespace: namespace.clone(), member, worker });
    let (stamp, clock) = shared.unwrap();
    let record = Shared::Registered { namespace, member, id: id("alice"), stamp, clock, key: 1 };
    assert!(two.apply(at(0), host, record));
    assert!(two.hlc.stamp(wall) >> 16 <= wall);
    // Too far: it becomes a new registration, and is counted.
    registry.handle(at(2), a, again("carol", wall + 3_600_000));
    assert!(registry.hlc.last() >> 16 <= wall + 2);
    let places = look_up(&mut registry, a, "carol").unwrap();
    assert!(places[0].stamp >> 16 <= wall + 2);
    let counts = registry.counts();
    let ahead = counts.iter().find(|count| count.name.as_str() == "stamps_ahead_total");
    assert_eq!(ahead.unwrap().value, 1);
}
