//! What an answer may have. The side that reads an answer refuses it whole if it has more, so the
//! side that writes it leaves the rest out, and says how much that was.

use serde::Serialize;

use crate::api::advice::{AddressesAnswer, OwnAnswer, OwnPool, ServerRecord};

/// Longest answer to a peer, in bytes.
pub(super) const MAX_OWN: usize = 1024 * 1024;

/// Most pools, and servers of all pools, in an answer to a peer.
pub(super) const MOST_POOLS: usize = 1024;
pub(super) const MOST_SERVERS: usize = 4096;

/// Most addresses and gauges of a server.
pub(super) const MOST_OF_SERVER: usize = 64;

/// Most addresses of a pool, in an answer to a peer and in a list for a client.
pub(super) const MOST_OF_POOL: usize = 1024;

/// Longest list for a client, in bytes: what the client's library accepts.
pub(super) const MAX_LIST: usize = 256 * 1024;

/// For the parts of a list around its addresses, and for the names of pools and their braces.
const FRAME: usize = 512;

/// Bounds of a weight: scores stay finite.
pub(super) const WEIGHTS: std::ops::RangeInclusive<f64> = 1e-6..=1e9;

/// The greatest load or capacity: sums of them stay far below the greatest number.
pub(super) const MAX_LOAD: u64 = 1 << 48;

/// The bytes of an answer, and what it does not have.
#[derive(Debug, Default)]
pub(super) struct Bounded {
    pub(super) body: Vec<u8>,
    /// Pools, servers and addresses of servers.
    pub(super) left_out: usize,
    /// Servers or addresses without their details.
    pub(super) details_left_out: usize,
}

fn bytes<T: Serialize>(value: &T) -> Vec<u8> {
    // These types have nothing that JSON cannot express.
    serde_json::to_vec(value).unwrap_or_default()
}

/// A list for a client: the first addresses, because the best come first, then the details of as
/// many of them as there is room for. `total` is how many addresses there are, with those that
/// `answer` does not have already.
pub(super) fn list(mut answer: AddressesAnswer, total: usize) -> Bounded {
    answer.addresses.truncate(MOST_OF_POOL);
    answer.left_out = total.saturating_sub(answer.addresses.len());
    let body = bytes(&answer);
    if body.len() <= MAX_LIST {
        return Bounded { body, left_out: answer.left_out, details_left_out: 0 };
    }
    let mut details = Vec::with_capacity(answer.addresses.len());
    let mut used = FRAME;
    let mut fitting = 0;
    for address in &mut answer.addresses {
        let with = bytes(address).len();
        let detail = (std::mem::take(&mut address.gauges), std::mem::take(&mut address.workers));
        let without = bytes(address).len() + 1;
        if used + without > MAX_LIST {
            break;
        }
        used += without;
        fitting += 1;
        details.push((detail, (with + 1).saturating_sub(without)));
    }
    answer.addresses.truncate(fitting);
    let mut details_left_out = 0;
    for (address, ((gauges, workers), size)) in answer.addresses.iter_mut().zip(details) {
        if used + size <= MAX_LIST {
            used += size;
            (address.gauges, address.workers) = (gauges, workers);
        } else {
            details_left_out += 1;
        }
    }
    answer.left_out = total.saturating_sub(fitting);
    Bounded { body: bytes(&answer), left_out: answer.left_out, details_left_out }
}

/// What a peer gets. Of each pool the usable servers come first. If all together are too many, the
/// pools with the most servers lose some, so that no pool is without a server for another one's
/// sake.
pub(super) fn own(mut answer: OwnAnswer) -> Bounded {
    let mut bounded = Bounded::default();
    cut_pools(&mut answer.pools, &mut bounded);
    for pool in &mut answer.pools {
        cut_pool(pool, &mut bounded);
    }
    let total: usize = answer.pools.iter().map(|pool| pool.servers.len()).sum();
    bounded.body = bytes(&answer);
    if total <= MOST_SERVERS && bounded.body.len() <= MAX_OWN {
        return bounded;
    }
    // Names of workers are for operators; the figures are needed.
    let servers = answer.pools.iter_mut().flat_map(|pool| &mut pool.servers);
    for server in servers.filter(|server| !server.workers.is_empty()) {
        server.workers = Vec::new();
        bounded.details_left_out += 1;
    }
    let most = share(&answer);
    for pool in &mut answer.pools {
        bounded.left_out += pool.servers.len().saturating_sub(most);
        pool.servers.truncate(most);
    }
    bounded.body = bytes(&answer);
    bounded
}

/// Those without servers only say that they exist.
fn cut_pools(pools: &mut Vec<OwnPool>, bounded: &mut Bounded) {
    let surplus = pools.len().saturating_sub(MOST_POOLS);
    if surplus > 0 {
        pools.sort_by_key(|pool| pool.servers.is_empty());
        pools.truncate(MOST_POOLS);
        bounded.left_out += surplus;
    }
}

fn cut_pool(pool: &mut OwnPool, bounded: &mut Bounded) {
    for server in &mut pool.servers {
        normalize(server);
        bounded.left_out += server.addresses.len().saturating_sub(MOST_OF_SERVER);
        server.addresses.truncate(MOST_OF_SERVER);
    }
    let addresses: usize = pool.servers.iter().map(|server| server.addresses.len()).sum();
    if addresses > MOST_OF_POOL {
        pool.servers.sort_by_key(|server| server.state != "ok");
        let mut left = MOST_OF_POOL;
        for server in &mut pool.servers {
            server.addresses.truncate(left);
            left -= server.addresses.len();
        }
        pool.servers.retain(|server| !server.addresses.is_empty());
        bounded.left_out += addresses - MOST_OF_POOL;
    }
}

/// Figures that no peer would believe.
fn normalize(server: &mut ServerRecord) {
    server.gauges.truncate(MOST_OF_SERVER);
    server.weight = server.weight.clamp(*WEIGHTS.start(), *WEIGHTS.end());
    server.load = server.load.min(MAX_LOAD);
    server.capacity = server.capacity.map(|capacity| capacity.min(MAX_LOAD));
}

/// The most servers that each pool can keep.
fn share(answer: &OwnAnswer) -> usize {
    let sizes: Vec<Vec<usize>> = answer
        .pools
        .iter()
        .map(|pool| pool.servers.iter().map(|server| bytes(server).len() + 1).collect())
        .collect();
    let names: usize = answer.pools.iter().map(|pool| bytes(&pool.pool).len() + 32).sum();
    let fits = |most: usize| {
        let kept = || sizes.iter().map(|servers| &servers[..servers.len().min(most)]);
        let count: usize = kept().map(<[usize]>::len).sum();
        let bytes: usize = kept().flatten().sum();
        count <= MOST_SERVERS && FRAME + names + bytes <= MAX_OWN
    };
    let longest = sizes.iter().map(Vec::len).max().unwrap_or_default();
    // None at all always fits. `fits` holds up to some number and not beyond it.
    let candidates: Vec<usize> = (1..=longest).collect();
    candidates.partition_point(|&most| fits(most))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::time::Duration;

    use proptest::prelude::*;
    use worker_sdk::connector::{Addresses, Connector, ConnectorConfig, Error, Selection};

    use super::*;
    use crate::admin::advice::peers::check;
    use crate::api::advice::{AddressRecord, GaugeRecord, WorkerDetail};

    /// As long as an address can be.
    fn long_address(n: usize) -> String {
        let name = format!("h{n}.{}", ["x".repeat(62), "y".repeat(62), "z".repeat(62)].join("."));
        format!("{name}.{}:65535", "w".repeat(252 - name.len()))
    }

    fn worker(n: usize) -> WorkerDetail {
        WorkerDetail { name: format!("\"worker {n}"), pid: 1 << 22, ..WorkerDetail::default() }
    }

    fn listed(n: usize, address: String, workers: usize) -> AddressRecord {
        AddressRecord {
            address,
            load: u64::MAX,
            capacity: Some(u64::MAX),
            score: std::f64::consts::PI * 1e9,
            weight: std::f64::consts::E,
            state: "unserved".to_owned(),
            age_ms: u64::MAX,
            advised: n as u64,
            gauges: [("g".repeat(32), Some(f64::MIN_POSITIVE))].into(),
            workers: (0..workers).map(worker).collect(),
        }
    }

    fn answer(addresses: Vec<AddressRecord>) -> AddressesAnswer {
        AddressesAnswer { pool: "\"".repeat(64), valid_for_ms: u64::MAX, left_out: 0, addresses }
    }

    fn read(bounded: &Bounded) -> AddressesAnswer {
        assert!(bounded.body.len() <= MAX_LIST, "{} bytes", bounded.body.len());
        let answer: AddressesAnswer = serde_json::from_slice(&bounded.body).expect("a list");
        assert_eq!(answer.left_out, bounded.left_out);
        answer
    }

    #[test]
    fn a_list_for_a_client_has_its_first_addresses_and_what_details_fit() {
        let short = |n: usize| format!("10.0.0.1:{}", n + 1);
        for (count, address, workers, kept, detailed) in [
            (1_024, short as fn(usize) -> String, 0, 1_024, 400..1_024),
            (1_025, short, 0, 1_024, 400..1_024),
            (5_000, short, 300, 1_024, 1..20),
            (700, short, 0, 700, 700..701),
            (5_000, long_address, 0, 520, 0..8),
            (3, short, 100_000, 3, 0..1),
        ] {
            let all = (0..count).map(|n| listed(n, address(n), workers)).collect();
            let bounded = list(answer(all), count);
            let read = read(&bounded);
            assert!((kept..=kept + kept / 5).contains(&read.addresses.len()), "{count}: {kept}");
            assert_eq!(read.left_out, count - read.addresses.len());
            let first: Vec<u64> = read.addresses.iter().map(|one| one.advised).collect();
            assert!(first.iter().copied().eq(0..first.len() as u64), "the first come first");
            let with = read.addresses.iter().filter(|one| !one.gauges.is_empty()).count();
            assert!(detailed.contains(&with), "{with} of {count} have details");
            assert_eq!(bounded.details_left_out, read.addresses.len() - with);
        }
    }

    /// Serves this body to a client of the SDK, which asks for the list and tries the first
    /// address.
    fn read_by_client(body: Vec<u8>) -> Error {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let host = listener.local_addr().expect("an address").to_string();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("a request");
                head.push(byte[0]);
            }
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            // The client may have read enough.
            let _ = stream.write_all(&[head.as_bytes(), &body].concat());
            let _ = stream.read(&mut head.into_bytes());
        });
        let addresses = Addresses::advice([host], "web").expect("a host");
        let config = ConnectorConfig::new(addresses)
            .selection(Selection::InOrder)
            .max_retries(1)
            .max_retries_alternative(0)
            .advice_timeout(Duration::from_secs(60))
            .total_timeout(Duration::from_secs(240))
            .resolver(|_, _| Err(std::io::ErrorKind::NotFound.into()));
        let error = Connector::new(config).expect("valid").connect().expect_err("no such host");
        server.join().expect("no panic");
        error
    }

    #[test]
    fn the_client_library_reads_the_longest_lists() {
        for (count, address) in [
            (1_024, (|n| format!("h{n}:1")) as fn(usize) -> String),
            (3_000, |n| format!("h{n}:1")),
            (3_000, long_address),
        ] {
            let mut all: Vec<_> = (0..count).map(|n| listed(n, address(n), 7)).collect();
            all.iter_mut().for_each(|one| one.state = "ok".to_owned());
            let error = read_by_client(list(answer(all.clone()), count).body);
            let Error::ConnectionLost(lost) = error else { panic!("{error}") };
            assert_eq!(lost.addresses, None, "{count} addresses");
            assert_eq!(lost.attempts[0].address.to_string(), address(0));
            if count > MOST_OF_POOL {
                // What it refuses without the bound.
                let Error::ConnectionLost(lost) = read_by_client(bytes(&answer(all))) else {
                    panic!("another error")
                };
                let problem = lost.addresses.expect("a problem");
                assert!(problem.contains("than"), "{problem}");
            }
        }
    }

    /// Every address that advice can name is one for the client library.
    #[test]
    fn the_client_library_reads_every_address_that_can_be_advertised() {
        for text in [
            "203.0.113.5:443",
            "[2001:db8::5]:1",
            "[fe80::1%3]:80",
            "www1.example.org:65535",
            "www.example.org.:80",
            "web_1:8080",
            &long_address(0),
        ] {
            assert!(crate::config::is_advisable(text), "{text}");
            assert!(text.parse::<worker_sdk::connector::Address>().is_ok(), "{text}");
        }
    }

    fn server(addresses: Vec<String>, state: &str) -> ServerRecord {
        ServerRecord { addresses, state: state.to_owned(), weight: 1.0, ..ServerRecord::default() }
    }

    fn pool(name: usize, servers: Vec<ServerRecord>) -> OwnPool {
        OwnPool { pool: format!("pool-{name}"), servers }
    }

    fn one(n: usize) -> Vec<String> {
        vec![format!("10.0.0.1:{}", n % 65_535 + 1)]
    }

    fn own_answer(pools: Vec<OwnPool>) -> OwnAnswer {
        OwnAnswer { instance: "i".repeat(32), pools }
    }

    #[test]
    fn a_peer_reads_whatever_this_dispatcher_has() {
        let many = |count: usize| (0..count).map(|n| server(one(n), "ok")).collect::<Vec<_>>();
        let large = |n: usize| ServerRecord {
            gauges: vec![
                GaugeRecord { name: "g".repeat(32), value: -1e-300, age_ms: u64::MAX };
                100
            ],
            workers: (0..256).map(worker).collect(),
            ..server(one(n), "ok")
        };
        let cases: Vec<(&str, Vec<OwnPool>, usize)> = vec![
            ("few", vec![pool(0, many(10)), pool(1, vec![])], 0),
            ("at the bounds", (0..4).map(|n| pool(n, many(1_024))).collect(), 0),
            ("many servers of a pool", vec![pool(0, many(5_000))], 3_976),
            (
                "many servers",
                (0..5).map(|n| pool(n, many(if n == 0 { 96 } else { 1_010 }))).collect(),
                40,
            ),
            ("many pools", (0..1_500).map(|n| pool(n, many(1))).collect(), 476),
            ("many without servers", (0..1_500).map(|n| pool(n, vec![])).collect(), 476),
            (
                "many addresses of a server",
                vec![pool(0, vec![server((0..100).flat_map(one).collect(), "ok")])],
                36,
            ),
            (
                "many addresses of a pool",
                vec![pool(
                    0,
                    (0..20).map(|_| server((0..64).flat_map(one).collect(), "ok")).collect(),
                )],
                256,
            ),
            (
                "impossible figures",
                vec![pool(
                    0,
                    vec![ServerRecord {
                        weight: 0.0,
                        load: u64::MAX,
                        capacity: Some(u64::MAX),
                        ..server(one(0), "ok")
                    }],
                )],
                0,
            ),
        ];
        for (what, pools, left_out) in cases {
            let bounded = own(own_answer(pools));
            assert!(check(&bounded.body).is_ok(), "{what}: {:?}", check(&bounded.body));
            assert_eq!((bounded.left_out, bounded.details_left_out), (left_out, 0), "{what}");
        }
        // Bytes are the bound.
        let pools = (0..8).map(|p| pool(p, (0..100).map(large).collect())).collect();
        let bounded = own(own_answer(pools));
        assert_eq!(bounded.details_left_out, 800);
        let read = check(&bounded.body).expect("an answer");
        let kept: Vec<usize> = read.pools.iter().map(|pool| pool.servers.len()).collect();
        assert_eq!(kept, [kept[0]; 8]);
        assert!(kept[0] > 5 && bounded.left_out == 800 - 8 * kept[0], "{kept:?}");
        assert!(bounded.body.len() > MAX_OWN * 9 / 10, "{}", bounded.body.len());
    }

    #[test]
    fn usable_servers_are_the_last_to_be_left_out() {
        let states = |n: usize| if n.is_multiple_of(3) { "ok" } else { "draining" };
        let servers = (0..3_000).map(|n| server(one(n), states(n))).collect();
        let bounded = own(own_answer(vec![pool(0, servers)]));
        let read = check(&bounded.body).expect("an answer");
        let usable = read.pools[0].servers.iter().filter(|server| server.state == "ok").count();
        assert_eq!((usable, read.pools[0].servers.len()), (1_000, 1_024));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn no_figures_make_an_answer_that_a_peer_refuses(
            pools in proptest::collection::vec((0usize..1_200, 1usize..80, 0usize..8), 0..8),
        ) {
            let made = pools.iter().enumerate().map(|(p, &(servers, addresses, gauges))| {
                let gauge = GaugeRecord { name: "g".to_owned(), value: 1.5, age_ms: 7 };
                let one = ServerRecord {
                    gauges: vec![gauge; gauges],
                    ..server((0..addresses).flat_map(one).collect(), "full")
                };
                pool(p, vec![one; servers])
            });
            let bounded = own(own_answer(made.collect()));
            prop_assert!(check(&bounded.body).is_ok());
        }
    }
}
