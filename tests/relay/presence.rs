//! Presence: who, online, groups, watch.

use test_support::{PATIENCE, wait_until};
use worker_sdk::relay::Change;

use super::{Directory, id};

#[test]
fn who_and_online_name_the_workers() {
    let directory = Directory::start("host = \"one\"");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let all: Vec<_> = (0..300)
        .map(|n| {
            let relay = if n % 2 == 0 { &a } else { &b };
            relay.register(&id(&format!("client-{n}"))).wait().unwrap()
        })
        .collect();
    let found = a.who(&id("client-7")).wait().unwrap().places;
    assert_eq!(found.len(), 1);
    assert_eq!((&*found[0].worker, &*found[0].host), ("b", "one"));
    assert!(a.who(&id("nobody")).wait().unwrap().places.is_empty());

    let mut online = Vec::new();
    let mut cursor = 0;
    loop {
        let page = b.online(cursor).wait().unwrap();
        online.extend(page.places.into_iter().map(|place| place.id.to_string()));
        cursor = page.next;
        if cursor == 0 {
            break;
        }
    }
    online.sort();
    let mut expected: Vec<_> = (0..300).map(|n| format!("client-{n}")).collect();
    expected.sort();
    assert_eq!(online, expected);

    let rooms: Vec<_> = (100..200).map(|n| a.join(&id(&format!("room-{n}")))).collect();
    wait_until("the groups to be there", || directory.count("groups") == 100);
    let first = b.groups(b"").wait().unwrap();
    let last = first.last().unwrap().group.clone();
    let second = b.groups(last.as_bytes()).wait().unwrap();
    assert_eq!((first.len(), second.len()), (64, 36));
    assert!(first.iter().chain(&second).all(|group| group.members == 1));
    drop((all, rooms));
}

#[test]
fn a_watch_tells_came_moved_and_went() {
    let directory = Directory::start("");
    let (a, b) = (directory.relay("a"), directory.relay("b"));
    let watch = a.watch(&id("alice"));
    let room = a.watch_group(&id("room"));
    wait_until("the watch to begin", || a.who(&id("alice")).wait().is_ok());
    let first = a.register(&id("alice")).wait().unwrap();
    let second = b.register(&id("alice")).wait().unwrap();
    drop(first);
    drop(second);
    let changes: Vec<_> =
        (0..3).map(|_| watch.recv().wait_for(PATIENCE).expect("a change").change).collect();
    assert_eq!(changes, [Change::Came, Change::Moved, Change::Went]);
    drop(b.join(&id("room")));
    let changes: Vec<_> =
        (0..2).map(|_| room.recv().wait_for(PATIENCE).expect("a change").change).collect();
    assert_eq!(changes, [Change::Came, Change::Went]);
}
