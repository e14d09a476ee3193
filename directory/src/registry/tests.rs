#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::collections::BTreeMap;

use dispatch_protocol::relay::{Change, Location, Membership};
use proptest::prelude::*;

use super::*;

pub(super) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

pub(super) fn id(text: &str) -> Id {
    Id::new(text).unwrap()
}

pub(super) fn at(steady: u64) -> Now {
    Now { wall: 1_000_000 + steady, steady }
}

pub(super) fn registry(receives: Receives, shares: bool) -> Registry {
    registry_of("one", receives, shares)
}

pub(super) fn registry_of(host: &str, receives: Receives, shares: bool) -> Registry {
    let namespaces = [(name("chat"), receives), (name("other"), receives)];
    let limits = Limits { grace: 100, ..Limits::default() };
    Registry::new(name(host), namespaces, limits, shares)
}

pub(super) fn entry(namespace: u16, number: u64, user: u32) -> Entry {
    let worker = name(&format!("w{number}"));
    Entry { namespace, number, worker, user, observes: false }
}

pub(super) fn enter(registry: &mut Registry, namespace: u16, number: u64) -> MemberIndex {
    registry.enter(entry(namespace, number, 1)).unwrap()
}

pub(super) fn lookup(request: u64, text: &str, newest: u64, ended: bool) -> ToDirectory {
    ToDirectory::Lookup { request, id: id(text), newest, ended }
}

pub(super) fn drain(registry: &mut Registry) -> Vec<Effect> {
    std::iter::from_fn(|| registry.effect()).collect()
}

pub(super) fn register(registry: &mut Registry, now: u64, member: MemberIndex, text: &str) -> u64 {
    registry.handle(
        at(now),
        member,
        ToDirectory::Register { request: 1, id: id(text), stamp: 0, key: 1 },
    );
    let effects = drain(registry);
    let stamp = effects.iter().find_map(|effect| match effect {
        Effect::Send(to, FromDirectory::Registered { stamp, .. }) if *to == member => Some(*stamp),
        _ => None,
    });
    stamp.unwrap_or_else(|| panic!("{effects:?}"))
}

/// The answer, if it does not wait.
pub(super) fn look_up(
    registry: &mut Registry,
    member: MemberIndex,
    text: &str,
) -> Option<Vec<Location>> {
    registry.handle(at(0), member, lookup(9, text, 0, false));
    drain(registry).into_iter().find_map(|effect| match effect {
        Effect::Send(to, FromDirectory::Found { request: 9, places }) if to == member => {
            Some(places)
        }
        _ => None,
    })
}

#[test]
fn the_newest_registration_wins_and_the_older_one_is_told() {
    let mut registry = registry(Receives::Newest, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    let first = register(&mut registry, 0, a, "alice");
    registry.handle(
        at(1),
        b,
        ToDirectory::Register { request: 2, id: id("alice"), stamp: 0, key: 1 },
    );
    let effects = drain(&mut registry);
    let told = FromDirectory::Superseded { id: id("alice"), stamp: first };
    assert_eq!(effects[0], Effect::Send(a, told), "before the new one is known");
    assert_eq!(look_up(&mut registry, a, "alice").unwrap()[0].member, 2);
    // The older one ends without effect on the newer one.
    registry.handle(at(2), a, ToDirectory::Unregister { id: id("alice"), stamp: first });
    assert_eq!(look_up(&mut registry, a, "alice").unwrap()[0].member, 2);
}

#[test]
fn namespaces_do_not_see_each_other() {
    let mut registry = registry(Receives::Newest, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 1, 2));
    register(&mut registry, 0, a, "alice");
    assert_eq!(look_up(&mut registry, b, "alice"), Some(Vec::new()));
    registry.handle(at(0), b, ToDirectory::Connect { member: 1, after: 0 });
    let answer = Effect::Send(b, FromDirectory::NoMember { member: 1 });
    assert_eq!(drain(&mut registry), [answer], "no link to another namespace");
    registry.handle(at(0), b, ToDirectory::Online { request: 3, cursor: 0 });
    let Effect::Send(_, FromDirectory::Places { places, .. }) = &drain(&mut registry)[0] else {
        panic!("no answer");
    };
    assert_eq!(places, &[], "the other namespace's ids are not listed");
    registry.handle(at(0), a, ToDirectory::Join { group: id("room"), key: 1, weight: 1 });
    registry.handle(at(0), b, ToDirectory::Watch { id: id("alice"), group: false });
    registry.handle(at(0), b, ToDirectory::Watch { id: id("room"), group: true });
    registry.leave(at(0), a);
    assert_eq!(drain(&mut registry), [], "nor watched");
}

#[test]
fn two_that_ask_at_once_get_one_link() {
    let mut registry = registry(Receives::Newest, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    registry.handle(at(0), a, ToDirectory::Connect { member: 2, after: 0 });
    registry.handle(at(0), b, ToDirectory::Connect { member: 1, after: 0 });
    let effects = drain(&mut registry);
    let [Effect::Link(_, _, first)] = effects[..] else { panic!("{effects:?}") };
    // It broke, and one of them asks for another.
    registry.handle(at(200), b, ToDirectory::Connect { member: 1, after: first });
    let effects = drain(&mut registry);
    assert!(matches!(effects[..], [Effect::Link(_, _, second)] if second > first), "{effects:?}");
    registry.leave(at(2), a);
    drain(&mut registry);
    assert!(registry.members[b as usize].as_ref().unwrap().links.is_empty());
}

#[test]
fn a_look_up_waits_for_the_grace_and_no_longer() {
    let mut registry = registry(Receives::Newest, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    register(&mut registry, 0, a, "alice");
    register(&mut registry, 0, a, "bob");
    registry.leave(at(10), a);
    registry.handle(at(10), b, lookup(9, "alice", 0, false));
    registry.handle(at(10), b, lookup(9, "bob", 0, false));
    assert_eq!(drain(&mut registry), [], "both wait");
    assert_eq!(registry.tick(at(50)), Some(110));
    registry.handle(
        at(60),
        b,
        ToDirectory::Register { request: 5, id: id("alice"), stamp: 0, key: 1 },
    );
    let effects = drain(&mut registry);
    assert!(
        matches!(&effects[..], [
            Effect::Send(to, FromDirectory::Registered { request: 5, .. }),
            Effect::Send(waited, FromDirectory::Found { request: 9, places }),
        ] if *to == b && *waited == b && places[0].member == 2),
        "{effects:?}"
    );
    assert_eq!(registry.tick(at(110)), None);
    let none = FromDirectory::Found { request: 9, places: Vec::new() };
    assert_eq!(drain(&mut registry), [Effect::Send(b, none)], "bob has not come back");
    assert_eq!(look_up(&mut registry, b, "bob"), Some(Vec::new()), "and is forgotten");
}

#[test]
fn a_look_up_can_be_ahead_of_the_end_of_a_registration() {
    let mut registry = registry(Receives::Newest, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    let stale = register(&mut registry, 0, a, "alice");
    registry.handle(at(0), b, lookup(9, "alice", stale, true));
    assert_eq!(drain(&mut registry), [], "it waits");
    registry.handle(at(1), a, ToDirectory::Unregister { id: id("alice"), stamp: stale });
    registry.tick(at(101));
    let none = FromDirectory::Found { request: 9, places: Vec::new() };
    assert_eq!(drain(&mut registry), [Effect::Send(b, none)]);
}

#[test]
fn a_new_directory_gives_members_time_to_register_again() {
    let mut registry = registry(Receives::Newest, false);
    registry.settle(at(0));
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    assert_eq!(look_up(&mut registry, a, "alice"), None);
    assert_eq!(look_up(&mut registry, a, "bob"), None);
    // A stamp of the earlier directory; one that is older than what the sender knows is no answer.
    let stamp = 900_000 << 16;
    registry.handle(at(1), b, ToDirectory::Register { request: 1, id: id("alice"), stamp, key: 1 });
    let effects = drain(&mut registry);
    assert!(matches!(&effects[1], Effect::Send(_, FromDirectory::Found { places, .. })
        if places[0].stamp == stamp));
    let stale = stamp + 1;
    registry.handle(at(2), a, lookup(8, "alice", stale, false));
    assert_eq!(drain(&mut registry), []);
    registry.tick(at(100));
    let none = FromDirectory::Found { request: 9, places: Vec::new() };
    assert_eq!(drain(&mut registry), [Effect::Send(a, none)], "bob");
    assert_eq!(registry.slots.len(), 1);
}

#[test]
fn all_registrations_receive_where_that_is_configured() {
    let mut registry = registry(Receives::All, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    register(&mut registry, 0, a, "alice");
    let second = register(&mut registry, 0, b, "alice");
    assert_eq!(look_up(&mut registry, a, "alice").unwrap().len(), 2);
    registry.handle(at(0), b, ToDirectory::Unregister { id: id("alice"), stamp: second });
    assert_eq!(look_up(&mut registry, a, "alice").unwrap()[0].member, 1, "at once");
}

#[test]
fn subscribers_know_the_memberships() {
    let mut registry = registry(Receives::Newest, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    for key in 1..=100 {
        registry.handle(at(0), a, ToDirectory::Join { group: id("room"), key, weight: 1 });
    }
    assert_eq!(drain(&mut registry), []);
    registry.handle(at(0), b, ToDirectory::Subscribe { group: id("room") });
    let mut known: BTreeMap<(u64, u32), Membership> = BTreeMap::new();
    let mut follow = |registry: &mut Registry| {
        for effect in drain(registry) {
            let Effect::Send(to, FromDirectory::Memberships { reset, added, removed, .. }) = effect
            else {
                continue;
            };
            assert_eq!(to, b);
            if reset {
                known.clear();
            }
            known.extend(added.into_iter().map(|one| ((one.member, one.key), one)));
            for one in removed {
                known.remove(&(one.member, one.key));
            }
        }
        known.len()
    };
    assert_eq!(follow(&mut registry), 100, "in pages");
    registry.handle(at(0), a, ToDirectory::Leave { group: id("room"), key: 7 });
    registry.handle(at(0), b, ToDirectory::Join { group: id("room"), key: 7, weight: 1 });
    assert_eq!(follow(&mut registry), 100);
    registry.leave(at(0), a);
    assert_eq!(follow(&mut registry), 1);
    registry.leave(at(0), b);
    assert!(registry.namespaces[0].groups.is_empty(), "nothing is left of the group");
}

#[test]
fn watchers_learn_of_came_went_and_moved() {
    let mut registry = registry(Receives::Newest, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    registry.handle(at(0), a, ToDirectory::Watch { id: id("alice"), group: false });
    let mut changes = Vec::new();
    let mut take = |registry: &mut Registry| {
        for effect in drain(registry) {
            if let Effect::Send(_, FromDirectory::Changed { change, .. }) = effect {
                changes.push(change);
            }
        }
        std::mem::take(&mut changes)
    };
    for (member, expected) in [(a, Change::Came), (b, Change::Moved)] {
        registry.handle(
            at(0),
            member,
            ToDirectory::Register { request: 1, id: id("alice"), stamp: 0, key: 1 },
        );
        assert_eq!(take(&mut registry), [expected]);
    }
    registry.leave(at(0), b);
    assert_eq!(take(&mut registry), [Change::Went]);
    registry.handle(at(0), a, ToDirectory::Unwatch { id: id("alice"), group: false });
    register(&mut registry, 0, a, "alice");
    assert_eq!(take(&mut registry), []);
}

#[test]
fn limits_are_kept_and_named() {
    let limits = Limits { ids: 3, ids_per_member: 2, members: 2, ..Limits::default() };
    let mut registry =
        Registry::new(name("one"), [(name("chat"), Receives::Newest)], limits, false);
    let (a, b) = (enter(&mut registry, 0, 1), enter(&mut registry, 0, 2));
    let third = entry(0, 3, 1);
    assert!(registry.enter(third).unwrap_err().contains("max_members"));
    let mut refused = |member, text: &str| {
        registry.handle(
            at(0),
            member,
            ToDirectory::Register { request: 1, id: id(text), stamp: 0, key: 1 },
        );
        drain(&mut registry).into_iter().find_map(|effect| match effect {
            Effect::Send(_, FromDirectory::NotAccepted { reason, .. }) => {
                Some(String::from_utf8(reason).unwrap())
            }
            _ => None,
        })
    };
    assert_eq!(refused(a, "1"), None);
    assert_eq!(refused(a, "2"), None);
    assert!(refused(a, "3").unwrap().contains("max_ids_per_member"));
    assert_eq!(refused(b, "3"), None);
    assert!(refused(b, "4").unwrap().contains("max_ids ids"));
}

/// Delivers what one directory tells the others.
fn exchange(from: &mut Registry, to: &mut Registry, now: u64) -> Vec<Effect> {
    let host = to.remote_host(&from.hosts[0].name.clone()).unwrap();
    let effects = drain(from);
    for effect in &effects {
        if let Effect::Share(record) = effect {
            assert!(to.apply(at(now), host, record.clone()));
        }
    }
    effects
}

#[test]
fn two_hosts_agree_on_the_newest_whatever_the_order() {
    let mut one = registry_of("one", Receives::Newest, true);
    let mut two = registry_of("two", Receives::Newest, true);
    let (a, b) = (enter(&mut one, 0, 1), enter(&mut two, 0, 2));
    exchange(&mut one, &mut two, 0);
    exchange(&mut two, &mut one, 0);
    // Both at the same moment; each hears of the other's later.
    for (registry, member) in [(&mut one, a), (&mut two, b)] {
        let record = ToDirectory::Register { request: 1, id: id("alice"), stamp: 0, key: 1 };
        registry.handle(at(0), member, record);
    }
    exchange(&mut one, &mut two, 0);
    exchange(&mut two, &mut one, 0);
    let seen_by_one = look_up(&mut one, a, "alice").unwrap();
    let seen_by_two = look_up(&mut two, b, "alice").unwrap();
    assert_eq!(seen_by_one, seen_by_two);
    // A snapshot removes what it does not name, and keeps the rest without a report.
    let record = ToDirectory::Watch { id: id("bob"), group: false };
    two.handle(at(0), b, record);
    one.handle(at(0), a, ToDirectory::Register { request: 1, id: id("bob"), stamp: 0, key: 1 });
    one.handle(at(0), a, ToDirectory::Register { request: 1, id: id("carol"), stamp: 0, key: 1 });
    one.handle(at(0), a, ToDirectory::Join { group: id("room"), key: 1, weight: 1 });
    exchange(&mut one, &mut two, 0);
    drain(&mut two);
    let stamp = one.slots.get(one.slots.find(0, &id("carol"))[0]).unwrap().stamp;
    one.handle(at(0), a, ToDirectory::Unregister { id: id("carol"), stamp });
    drain(&mut one);
    let host = two.remote_host(&name("one")).unwrap();
    two.begin_snapshot(host);
    for record in one.snapshot() {
        assert!(two.apply(at(1), host, record));
    }
    two.end_snapshot(at(1), host);
    assert_eq!(drain(&mut two), [], "bob stayed");
    assert_eq!(look_up(&mut two, b, "bob").unwrap().len(), 1);
    assert_eq!(look_up(&mut two, b, "carol"), None, "gone, and its grace runs");
    two.forget_host(at(2), host);
    two.tick(at(500));
    assert_eq!(look_up(&mut two, b, "bob"), Some(Vec::new()));
    assert!(two.namespaces[0].groups.is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Enter(u64),
    Leave(u64),
    Register(u64, u8),
    Unregister(u64, u8),
    Wait(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let member = 1..6u64;
    prop_oneof![
        member.clone().prop_map(Step::Enter),
        member.clone().prop_map(Step::Leave),
        (member.clone(), 0..8u8).prop_map(|(m, i)| Step::Register(m, i)),
        (member.clone(), 0..8u8).prop_map(|(m, i)| Step::Register(m, i)),
        (member, 0..8u8).prop_map(|(m, i)| Step::Unregister(m, i)),
        any::<u8>().prop_map(Step::Wait),
    ]
}

proptest! {
    /// Against a model that is a list: the last registration of each id that has not ended.
    #[test]
    fn the_registry_agrees_with_a_list(steps in proptest::collection::vec(step(), 1..120)) {
        let mut registry = registry(Receives::Newest, false);
        let observer = enter(&mut registry, 0, 99);
        let mut members: BTreeMap<u64, MemberIndex> = BTreeMap::new();
        let mut model: BTreeMap<u8, (u64, u64)> = BTreeMap::new();
        let mut time = 0;
        for step in steps {
            match step {
                Step::Enter(number) => {
                    members.entry(number).or_insert_with(|| enter(&mut registry, 0, number));
                }
                Step::Leave(number) => if let Some(index) = members.remove(&number) {
                    registry.leave(at(time), index);
                    model.retain(|_, (owner, _)| *owner != number);
                },
                Step::Register(number, text) => if let Some(&index) = members.get(&number) {
                    let stamp = register(&mut registry, time, index, &text.to_string());
                    model.insert(text, (number, stamp));
                },
                Step::Unregister(number, text) => if let Some(&index) = members.get(&number) {
                    // A member ends what it believes to have, which may be superseded.
                    let stamp = model.get(&text).map_or(1, |(_, stamp)| *stamp);
                    let record = ToDirectory::Unregister { id: id(&text.to_string()), stamp };
                    registry.handle(at(time), index, record);
                    if model.get(&text).is_some_and(|(owner, _)| *owner == number) {
                        model.remove(&text);
                    }
                },
                Step::Wait(ms) => {
                    time += u64::from(ms);
                    registry.tick(at(time));
                }
            }
            drain(&mut registry);
            for text in 0..8u8 {
                registry.handle(at(time), observer, ToDirectory::Who { request: 1, id: id(&text.to_string()) });
                let effects = drain(&mut registry);
                let Effect::Send(_, FromDirectory::Places { places, .. }) = &effects[0] else {
                    panic!("{effects:?}")
                };
                let seen: Vec<_> = places.iter().map(|p| (p.worker.to_string(), p.stamp)).collect();
                let expected: Vec<_> =
                    model.get(&text).map(|(m, stamp)| (format!("w{m}"), *stamp)).into_iter().collect();
                prop_assert_eq!(seen, expected);
            }
            let held: u32 = registry.members.iter().flatten().map(|member| member.ids).sum();
            prop_assert_eq!(held as usize, model.len());
        }
        // Nothing is left when all have left and every grace has ended.
        for index in members.into_values() {
            registry.leave(at(time), index);
        }
        registry.tick(at(time + 1000));
        prop_assert_eq!(registry.slots.len(), 0);
        prop_assert!(registry.graces.is_empty() && registry.waiting.is_empty());
    }
}
