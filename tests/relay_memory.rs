//! What a registered id costs: bytes, and time for a look-up. Ids of 16 bytes; `RELAY_IDS`
//! changes their number (default 250,000, just after the table has grown, which is its worst case).
#![allow(unsafe_code, reason = "an allocator that counts")]
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use dispatch_directory::registry::{Entry, Limits, Now, Receives, Registry};
use dispatch_protocol::relay::{Id, Name, ToDirectory};

struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);

/// Blocks have a header and are multiples of 16 bytes in the C library's allocator.
fn cost(size: usize) -> usize {
    (size + 8).next_multiple_of(16).max(32)
}

// SAFETY: every call goes to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        USED.fetch_add(cost(layout.size()), Ordering::Relaxed);
        // SAFETY: as the caller guarantees.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(cost(layout.size()), Ordering::Relaxed);
        // SAFETY: as the caller guarantees.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn id(n: usize) -> Id {
    Id::new(format!("client-{n:09}")).unwrap()
}

#[test]
fn an_id_takes_at_most_200_bytes() {
    let ids = std::env::var("RELAY_IDS").map_or(250_000, |text| text.parse().unwrap());
    let namespaces = [(Name::new("chat").unwrap(), Receives::Newest)];
    let limits = Limits { ids: 2 * ids, ids_per_user: ids, ..Limits::default() };
    let mut registry = Registry::new(Name::new("one").unwrap(), namespaces, limits, false);
    let worker = Name::new("w").unwrap();
    let members: Vec<_> = (1..=4)
        .map(|number| {
            let worker = worker.clone();
            registry
                .enter(Entry { namespace: 0, number, worker, user: 1, observes: false })
                .unwrap()
        })
        .collect();
    let now = Now { wall: 1_000_000, steady: 0 };
    let before = USED.load(Ordering::Relaxed);
    let start = Instant::now();
    for n in 0..ids {
        let record = ToDirectory::Register { request: 1, id: id(n), stamp: 0, key: 1 };
        registry.handle(now, members[n % members.len()], record);
        while registry.effect().is_some() {}
    }
    let registering = start.elapsed();
    let bytes = (USED.load(Ordering::Relaxed) - before) as f64 / ids as f64;
    let start = Instant::now();
    let lookups = 200_000;
    for n in 0..lookups {
        let id = id(n * 7919 % ids);
        registry.handle(
            now,
            members[0],
            ToDirectory::Lookup { request: 1, id, newest: 0, ended: false },
        );
        while registry.effect().is_some() {}
    }
    let rate = lookups as f64 / start.elapsed().as_secs_f64();
    println!("{bytes:.1} bytes per id; {ids} registered in {registering:?}; {rate:.0} look-ups/s");
    assert!(bytes <= 200.0, "{bytes} bytes per id");
    let start = Instant::now();
    members.iter().for_each(|member| registry.leave(now, *member));
    while registry.effect().is_some() {}
    registry.tick(Now { steady: 10_000, ..now });
    println!("all left in {:?}", start.elapsed());
}
