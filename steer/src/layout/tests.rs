use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};

use super::*;
use crate::shared::{Moves, SharedSettings};

/// Structures of the compiled object: size, and the offset of each member in bytes.
type Structures = BTreeMap<String, (usize, BTreeMap<String, usize>)>;

/// Reads the type information of the compiled object (the format is that of `linux/btf.h`).
fn structures() -> Structures {
    const STRUCT: u32 = 4;
    let parsed = aya_obj::Object::parse(crate::OBJECT).unwrap();
    let btf = parsed.btf.unwrap().to_bytes();
    let word = |at: usize| u32::from_ne_bytes(btf[at..at + 4].try_into().unwrap());
    let header = word(4) as usize;
    let (types, types_len) = (header + word(8) as usize, word(12) as usize);
    let strings = header + word(16) as usize;
    let text = |offset: u32| {
        let from = strings + offset as usize;
        let len = btf[from..].iter().position(|&byte| byte == 0).unwrap();
        String::from_utf8(btf[from..from + len].to_vec()).unwrap()
    };
    let mut found = Structures::new();
    let mut at = types;
    while at < types + types_len {
        let (name, info, size) = (word(at), word(at + 4), word(at + 8));
        let (kind, many) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        at += 12;
        if kind == STRUCT {
            let member = |n: usize| (text(word(at + 12 * n)), word(at + 12 * n + 8) as usize / 8);
            found.insert(text(name), (size as usize, (0..many).map(member).collect()));
        }
        // What follows the common part of each kind.
        at += match kind {
            1 | 14 | 17 => 4,                  // integer, variable, tag
            3 => 12,                           // array
            STRUCT | 5 | 15 | 19 => 12 * many, // structure, union, section, 64-bit enumeration
            6 | 13 => 8 * many,                // enumeration, prototype
            _ => 0,
        };
    }
    found
}

macro_rules! same {
    ($structures:expr, $name:literal, $type:ty, [$($field:ident),*]) => {{
        let (size, members) = &$structures[$name];
        assert_eq!(size_of::<$type>(), *size, $name);
        let ours = [$((stringify!($field).to_owned(), offset_of!($type, $field))),*];
        assert_eq!(&BTreeMap::from(ours), members, $name);
    }};
}

#[test]
fn types_are_those_of_the_compiled_programs() {
    let all = structures();
    same!(
        all,
        "steer_settings",
        Settings,
        [version, workers, netns, wait_ns, seed, policy, reserved]
    );
    same!(all, "steer_shared_settings", SharedSettings, [pinned, directs]);
    same!(all, "steer_moves", Moves, [migrated, lost, open]);
    same!(
        all,
        "steer_worker",
        WorkerSettings,
        [weight, slow_start, maximum, draining, suspect, priority, node]
    );
    same!(
        all,
        "steer_counts",
        WorkerCounts,
        [
            live, total, pending, listeners, listens, lost_at, no_v4_at, refused, last_turn,
            moved_in, moved_out
        ]
    );
    same!(
        all,
        "steer_state",
        Totals,
        [
            turn,
            unserved_since,
            last,
            second,
            chosen,
            repeated,
            full,
            waited,
            unserved,
            no_sink,
            failed,
            clock
        ]
    );
    same!(all, "steer_address", Address, [ip, port]);
}

#[test]
fn constants_are_those_of_the_header() {
    let header = include_str!("../../bpf/steer.h");
    let constant = |name: &str| -> u32 {
        let line = header.lines().find(|line| line.starts_with(&format!("#define {name} ")));
        line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
    };
    for policy in crate::Policy::ALL {
        let name = policy.name().to_uppercase().replace('-', "_");
        assert_eq!(constant(&format!("STEER_{name}")), policy.number());
    }
    assert_eq!(constant("STEER_VERSION"), VERSION);
    assert_eq!(constant("STEER_MAX_WORKERS"), MAX_WORKERS);
    assert_eq!(constant("STEER_SCAN_WORKERS"), SCAN_WORKERS);
    assert_eq!(constant("STEER_DRAWS"), DRAWS);
    assert_eq!(constant("STEER_FULL_SPEED"), FULL_SPEED);
    assert_eq!(constant("STEER_PENDING_SECONDS"), PENDING_SECONDS);
    assert!(
        header
            .contains(&format!("STEER_BOUND_CHANGE (1ULL << {})\n", BOUND_CHANGE.trailing_zeros()))
    );
    assert!(header.contains(&format!("STEER_BOUND_COST {BOUND_COST:#x}ULL\n")));
    assert!(header.contains(&format!("STEER_TURN (1ULL << {})\n", TURN.trailing_zeros())));
    assert!(header.contains(&format!("STEER_TURN_FAR (1ULL << {})\n", TURN_FAR.trailing_zeros())));
}

#[test]
fn pending_connections_count_for_four_seconds() {
    let mut counts = WorkerCounts::default();
    counts.add_pending(10);
    counts.add_pending(10);
    counts.add_pending(12);
    assert_eq!([9, 10, 12, 13, 14, 15, 16].map(|at| counts.pending(at)), [0, 2, 3, 3, 1, 1, 0]);
    counts.add_pending(14);
    assert_eq!(counts.pending(14), 2, "the place of second 10 is used again");
    counts.live = -1;
    assert_eq!(counts.load(14), 2, "a negative count is none");
}

#[test]
fn addresses_are_mapped_and_back() {
    for text in ["127.0.0.1:80", "[::1]:80", "0.0.0.0:1", "[::]:65535"] {
        let address: SocketAddr = text.parse().unwrap();
        assert_eq!(Address::from(address).socket_addr(), address);
    }
    let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().unwrap();
    assert_eq!(Address::from(mapped).socket_addr(), "10.0.0.1:80".parse().unwrap());
}

#[test]
fn problems_name_the_cause_and_the_remedy() {
    let refused = |error: i32| WorkerCounts { refused: -error, ..Default::default() }.problem();
    assert!(refused(libc::EOPNOTSUPP).unwrap().contains("make it a TCP socket"));
    assert!(refused(libc::ENOMEM).unwrap().contains("Cannot allocate memory"));
    let hidden = WorkerCounts { listens: 2, lost_at: 2, listeners: [1, 0], ..Default::default() };
    assert!(hidden.problem().unwrap().contains("one listener for each address"));
    assert_eq!(WorkerCounts { listeners: [0, 0], ..hidden }.problem(), None, "not listening");
    assert_eq!(WorkerCounts { lost_at: 1, ..hidden }.problem(), None, "another one since");
}
