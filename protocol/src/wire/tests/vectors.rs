//! Records and their bytes.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use super::super::*;

pub(super) const HELLO: &str = "0100000001000200010000000000000000000000e803000000000000070000000000000005000000\
     0000000001000300776562020008007765622d31323334";
pub(super) const HELLO_TOKEN: &str = "01000000010001000000000000000000000000000100000000000000000000000000000000000000\
     000000000100070064656661756c7402000100770300100000112233445566778899aabbccddeeff";
pub(super) const WELCOME: &str = "0200000001000000000100002a000000000000000000000000000000e80300008813000010000600\
     00006874747010000700030061646d696e";
pub(super) const WELCOME_GAUGES: &str = "020000000100000000010000070000000000000000000000000000000a000000c800000013000a00\
     71756575655f7761697413000b00667265655f6d656d6f727910000600000068747470";
pub(super) const REFUSED: &str =
    "030000000200000011000b006e6f20706f6f6c2077656212000800706f6f6c2e776562";
pub(super) const REFUSED_BARE: &str = "03000000050000001100080073746f7070696e67";
pub(super) const GOODBYE: &str = "04000000";
pub(super) const CLAIM: &str = "0500000004000600366631643239";
pub(super) const HANDOFF: &str = "1000000003000000010000000000000000ca9a3b000000000100000000000000040050c300000000\
     c0000201000000000000000000000000020000000000000001ca9a3b000000000200000003000100\
     0600bb010700000020010db8000000000000000000000001030000000000000002ca9a3b00000000\
     ff00000000000000010000000000000000000000000000000000000000000000";
pub(super) const PROBE: &str = "1100000009000000000000000900000000000000";
pub(super) const DRAIN: &str = "1200000000ac23fc06000000";
pub(super) const DRAIN_LEFT: &str = "1200000000ac23fc060000001400080000e40b5402000000";
pub(super) const UPDATE: &str = "0600000002000100f4010000";
pub(super) const NUMBERED: &str = "1000000001000000010000000000000000ca9a3b00000000010000000000000001000000000000000000000000000000000000000000000015000800d204000000000000";
pub(super) const PROXIED: &str = "1000000001000000010000000000000000ca9a3b000000000100000000000000040050c300000000\
     c00002010000000000000000000000001700220000000000040028a0000000000a00000500000000\
     0000000000000000020003612e62";
pub(super) const RESUME: &str = "13000000";

pub(super) fn hello() -> Hello {
    Hello {
        weight: 2,
        priority: 1,
        max_connections: 1000,
        base: 7,
        finished: 5,
        pool: "web".to_owned(),
        name: "web-1234".to_owned(),
        ..Hello::default()
    }
}

pub(super) fn control_vectors() -> Vec<(&'static str, Control)> {
    let token = std::array::from_fn(|i| 17 * i as u8);
    vec![
        (HELLO, Control::Hello(hello())),
        (
            HELLO_TOKEN,
            Control::Hello(Hello {
                name: "w".to_owned(),
                token: Some(Token(token)),
                ..Hello::default()
            }),
        ),
        (
            WELCOME,
            Control::Welcome(Welcome {
                version: VERSION,
                slots: 256,
                worker_id: 42,
                features: Features::NONE,
                max_connections: 1000,
                handoff_timeout_ms: 5000,
                listeners: vec![
                    WelcomeListener { index: 0, name: "http".to_owned() },
                    WelcomeListener { index: 3, name: "admin".to_owned() },
                ],
                gauges: vec![],
                relay_ticket: Vec::new(),
            }),
        ),
        (
            WELCOME_GAUGES,
            Control::Welcome(Welcome {
                version: VERSION,
                slots: 256,
                worker_id: 7,
                features: Features::NONE,
                max_connections: 10,
                handoff_timeout_ms: 200,
                listeners: vec![WelcomeListener { index: 0, name: "http".to_owned() }],
                gauges: vec!["queue_wait".parse().unwrap(), "free_memory".parse().unwrap()],
                relay_ticket: Vec::new(),
            }),
        ),
        (
            REFUSED,
            Control::Refused(Refused {
                code: RefusedCode::UnknownPool,
                reason: "no pool web".to_owned(),
                key: Some("pool.web".to_owned()),
            }),
        ),
        (
            REFUSED_BARE,
            Control::Refused(Refused {
                code: RefusedCode::Stopping,
                reason: "stopping".to_owned(),
                key: None,
            }),
        ),
        (GOODBYE, Control::Goodbye(Goodbye)),
        (CLAIM, Control::Claim(Claim::new(b"6f1d29").unwrap())),
        (UPDATE, Control::Update(Update { weight: 2, paused: true, max_connections: 500 })),
    ]
}

pub(super) fn numbered() -> Handoff {
    let entry = Entry {
        seq: 1,
        slot: 1,
        listener: 0,
        flags: EntryFlags::NONE,
        accepted_ns: 1_000_000_000,
        peer: ClientAddr::Unix,
        number: 1234,
    };
    Handoff { entries: vec![entry], ..Handoff::default() }
}

pub(super) fn proxied() -> Handoff {
    let entry = Entry {
        peer: ClientAddr::Inet(([192, 0, 2, 1], 50_000).into()),
        number: 0,
        ..numbered().entries[0]
    };
    let header = ProxyHeader {
        address: ClientAddr::Inet(([10, 0, 0, 5], 41_000).into()),
        local: false,
        tlvs: b"\x02\0\x03a.b".to_vec(),
    };
    Handoff { entries: vec![entry], proxy_headers: vec![(0, header)] }
}

pub(super) fn handoff() -> Handoff {
    let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    let entry = |seq, slot, listener, flags, peer| Entry {
        seq,
        slot,
        listener,
        flags,
        accepted_ns: 1_000_000_000 + seq - 1,
        peer,
        number: 0,
    };
    Handoff {
        entries: vec![
            entry(1, 1, 0, EntryFlags::NONE, ClientAddr::Inet(([192, 0, 2, 1], 50_000).into())),
            entry(
                2,
                2,
                3,
                EntryFlags::RESENT,
                ClientAddr::Inet(SocketAddrV6::new(v6, 443, 0, 7).into()),
            ),
            entry(3, 255, 0, EntryFlags::NONE, ClientAddr::Unix),
        ],
        ..Handoff::default()
    }
}

pub(super) fn channel_vectors() -> Vec<(&'static str, Channel)> {
    vec![
        (HANDOFF, Channel::Handoff(handoff())),
        (PROBE, Channel::Probe(Probe { seq: 9, slot: 9 })),
        (DRAIN, Channel::Drain(Drain { deadline_ns: 30_000_000_000, left: None })),
        (
            DRAIN_LEFT,
            Channel::Drain(Drain {
                deadline_ns: 30_000_000_000,
                left: Some(Duration::from_secs(10)),
            }),
        ),
        (NUMBERED, Channel::Handoff(numbered())),
        (PROXIED, Channel::Handoff(proxied())),
        (RESUME, Channel::Resume(Resume)),
    ]
}
