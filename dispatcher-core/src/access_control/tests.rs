//! Access rules against a naive model.

use core::net::{Ipv4Addr, SocketAddr};
use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn peer(ip: IpAddr) -> ClientAddr {
    ClientAddr::Inet(SocketAddr::new(ip, 1234))
}

fn of(text: &str) -> ClientAddr {
    peer(text.parse().unwrap())
}

fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|text| text.parse().unwrap()).collect()
}

fn rules() -> AccessRules {
    AccessRules { max_clients: 100, ..AccessRules::default() }
}

fn rate(every_ms: u64, burst: u32) -> Option<Rate> {
    Some(Rate { every: ms(every_ms), burst })
}

#[test]
fn deny_wins_and_mapped_addresses_are_ipv4() {
    let rules = AccessRules {
        allow: nets(&["10.0.0.0/8", "10.0.0.0/9", "2001:db8::/32"]),
        deny: nets(&["10.5.0.0/16", "2001:db8:bad::/48"]),
        ..rules()
    };
    let mut access_control = AccessControl::new(rules, 1).unwrap();
    let mut says = |text: &str| access_control.admit(Time(0), of(text));
    for good in ["10.4.255.255", "10.6.0.0", "::ffff:10.1.2.3", "2001:db8::1"] {
        assert_eq!(says(good), Ok(UNTRACKED), "{good}");
    }
    for bad in
        ["10.5.1.1", "::ffff:10.5.1.1", "11.0.0.0", "9.255.255.255", "2001:db8:bad::1", "::1"]
    {
        assert_eq!(says(bad), Err(CloseReason::Denied), "{bad}");
    }
    assert_eq!(access_control.admit(Time(0), ClientAddr::Unix), Ok(UNTRACKED));

    let deny = AccessRules { deny: nets(&["0.0.0.0/0"]), ..AccessRules::default() };
    let mut access_control = AccessControl::new(deny, 1).unwrap();
    assert_eq!(access_control.admit(Time(0), of("::1")), Ok(UNTRACKED));
    assert_eq!(access_control.admit(Time(0), of("127.0.0.1")), Err(CloseReason::Denied));
}

#[test]
fn prefixes_make_clients() {
    let wide = AccessRules { rate: rate(1000, 1), prefix_ipv4: 24, prefix_ipv6: 64, ..rules() };
    let mut access_control = AccessControl::new(wide, 1).unwrap();
    let mut passes = |text: &str| access_control.admit(Time(0), of(text)).is_ok();
    assert!(passes("192.0.2.1"));
    assert!(!passes("192.0.2.200") && !passes("::ffff:192.0.2.3"), "the same /24");
    assert!(passes("192.0.3.1"));
    assert!(passes("2001:db8::1") && !passes("2001:db8::ffff:1") && passes("2001:db8:0:1::1"));

    let one_prefix = AccessRules { rate: rate(1000, 1), prefix_ipv4: 0, prefix_ipv6: 0, ..rules() };
    let mut access_control = AccessControl::new(one_prefix, 1).unwrap();
    assert!(access_control.admit(Time(0), of("192.0.2.1")).is_ok());
    assert!(access_control.admit(Time(0), of("203.0.113.9")).is_err());
}

#[test]
fn a_full_table_forgets_the_least_recently_seen_client() {
    let rules = AccessRules { rate: rate(1000, 1), max_clients: 3, ..rules() };
    let mut access_control = AccessControl::new(rules, 1).unwrap();
    let ip = |last| peer(Ipv4Addr::new(10, 0, 0, last).into());
    let places: Vec<u32> = (0..3).map(|n| access_control.admit(Time(0), ip(n)).unwrap()).collect();
    // All three have a connection queued: no entry can be removed, and the fourth passes without
    // being counted.
    assert_eq!(access_control.admit(Time(0), ip(3)), Ok(UNTRACKED));
    assert_eq!(access_control.admit(Time(0), ip(3)), Ok(UNTRACKED));
    access_control.check();
    // The second one's is taken: it goes. The others are still known, and over their rate.
    access_control.uncount(places[1]);
    let fourth = access_control.admit(Time(0), ip(3)).unwrap();
    assert_eq!(fourth, places[1], "its place is used again");
    assert_eq!(access_control.len(), 3);
    for known in [0, 2, 3] {
        assert_eq!(access_control.admit(Time(0), ip(known)), Err(CloseReason::RateLimited));
    }
    assert_eq!(access_control.admit(Time(0), ip(1)), Ok(UNTRACKED));
    access_control.check();
}

/// Token buckets as one would explain them: a number of tokens that grows with time.
struct Bucket {
    tokens: f64,
    at: u64,
}

proptest! {
    #[test]
    fn like_a_naive_bucket_per_client(
        every in 1u64..50,
        burst in 1u32..6,
        most in 1u32..5,
        steps in proptest::collection::vec((0u64..60, 0u8..6, any::<bool>()), 1..400),
    ) {
        let rules = AccessRules { rate: rate(every, burst), max_queued_per_client: Some(most), ..rules() };
        let mut access_control = AccessControl::new(rules, 99).unwrap();
        let mut buckets: HashMap<u8, Bucket> = HashMap::new();
        let mut queued: HashMap<u8, Vec<u32>> = HashMap::new();
        let mut now = 0;
        for (pause, prefix, taken) in steps {
            now += pause;
            let waiting = queued.entry(prefix).or_default();
            if taken && let Some(place) = waiting.pop() {
                access_control.uncount(place);
            }
            let bucket = buckets.entry(prefix).or_insert(Bucket { tokens: burst.into(), at: now });
            let grown = (now - bucket.at) as f64 / every as f64;
            bucket.tokens = (bucket.tokens + grown).min(burst.into());
            bucket.at = now;
            let ip = Ipv6Addr::new(0x2001, 0xdb8, 0, prefix.into(), 0, 0, 0, 1);
            let expected = if waiting.len() >= most as usize {
                Err(CloseReason::TooManyQueued)
            } else if bucket.tokens < 1.0 - 1e-9 {
                Err(CloseReason::RateLimited)
            } else {
                Ok(())
            };
            let place = access_control.admit(Time(ms(now).as_nanos() as u64), peer(ip.into()));
            prop_assert_eq!(place.map(|_| ()), expected);
            if let Ok(place) = place {
                bucket.tokens -= 1.0;
                waiting.push(place);
            }
            access_control.check();
            prop_assert_eq!(access_control.queued(), queued.values().map(Vec::len).sum::<usize>() as u64);
        }
    }

    /// However many clients come, the table stays within its bound and consistent, and a client
    /// with queued connections is not forgotten.
    #[test]
    fn the_table_is_bounded(
        most in 1u32..20,
        steps in proptest::collection::vec((any::<u8>(), 0u8..4), 1..500),
    ) {
        let rules = AccessRules { max_queued_per_client: Some(2), max_clients: most, ..rules() };
        let mut access_control = AccessControl::new(rules, 5).unwrap();
        let mut waiting: Vec<(u8, u32)> = Vec::new();
        for (prefix, take) in steps {
            if take > 0 && !waiting.is_empty() {
                let (_, place) = waiting.swap_remove(usize::from(prefix) % waiting.len());
                access_control.uncount(place);
            }
            let mine = waiting.iter().filter(|&&(other, _)| other == prefix).count();
            match access_control.admit(Time(0), peer(Ipv4Addr::new(10, 0, 0, prefix).into())) {
                Ok(UNTRACKED) => prop_assert_eq!(mine, 0, "a client with queued connections is known"),
                Ok(place) => {
                    prop_assert!(mine < 2);
                    waiting.push((prefix, place));
                }
                Err(reason) => {
                    prop_assert_eq!((reason, mine), (CloseReason::TooManyQueued, 2));
                }
            }
            access_control.check();
            prop_assert!(access_control.len() <= most as usize);
        }
    }

    /// Merged ranges contain exactly what the networks do.
    #[test]
    fn lists_are_exact(
        allow in proptest::collection::vec((any::<u8>(), 0u8..=8), 0..6),
        deny in proptest::collection::vec((any::<u8>(), 0u8..=8), 0..6),
    ) {
        let make = |list: &[(u8, u8)]| -> Vec<IpNet> {
            let net = |&(last, length): &(u8, u8)| {
                IpNet::new(Ipv4Addr::new(10, 0, 0, last).into(), 24 + length).unwrap().trunc()
            };
            list.iter().map(net).collect()
        };
        let (allow, deny) = (make(&allow), make(&deny));
        let mut access_control =
            AccessControl::new(AccessRules { allow: allow.clone(), deny: deny.clone(), ..rules() }, 1);
        for last in 0..=255 {
            let ip: IpAddr = Ipv4Addr::new(10, 0, 0, last).into();
            let inside = |list: &[IpNet]| list.iter().any(|net| net.contains(&ip));
            let may = (allow.is_empty() || inside(&allow)) && !inside(&deny);
            let admits = access_control.as_mut().is_none_or(|s| s.admit(Time(0), peer(ip)).is_ok());
            prop_assert_eq!(admits, may, "{}", ip);
        }
    }
}

/// docs/ACCESS_CONTROL.md and etc/dispatcher.toml say 56 to 60 bytes.
#[test]
fn a_client_takes_56_to_60_bytes() {
    // As many heads of chains as clients, up to the next power of two; and a place among those that
    // are free.
    let number = size_of::<u32>();
    let client = AccessControl::CLIENT + number;
    assert_eq!((client + number, client + 2 * number), (56, 60));
}
