//! This dispatcher's own part of advice: its pools with the public addresses of their listeners.

use std::net::SocketAddr;

use crate::api::advice::{OwnAnswer, OwnPool, ServerRecord};
use crate::config::is_advisable;
use crate::mailbox::loads::{ListenerAddresses, OwnLoads};

/// Most workers of a pool that are named with an address of their own.
const MOST_ADVERTISED: usize = 1024;

/// The records of all pools. A pool without a public address has none: no client could be told
/// where to connect.
pub(super) fn records(loads: &OwnLoads, listen: SocketAddr) -> OwnAnswer {
    let pools = loads.pools.iter().map(|pool| {
        let addresses = public_addresses(&pool.load.name, &loads.listeners, listen);
        let server = (!addresses.is_empty()).then(|| ServerRecord {
            addresses,
            state: pool.load.state.name().to_owned(),
            load: pool.load.load,
            capacity: (pool.load.capacity > 0).then_some(pool.load.capacity),
            // Without a worker no client is advised to go there, whatever the weight.
            weight: if pool.load.weight > 0.0 { pool.load.weight } else { 1.0 },
            age_ms: 0,
            gauges: pool.gauges.clone(),
            workers: pool.workers.clone(),
        });
        let single = pool.load.advertised.iter().zip(&pool.advertised);
        // The worker's library refuses such an address; another program may send it.
        let single = single.filter(|(worker, _)| is_advisable(&worker.address));
        let single = single.map(|(worker, gauges)| ServerRecord {
            addresses: vec![worker.address.to_string()],
            state: worker.state.name().to_owned(),
            load: worker.load,
            capacity: Some(worker.capacity),
            weight: worker.weight,
            age_ms: 0,
            gauges: gauges.clone(),
            workers: Vec::new(),
        });
        OwnPool {
            pool: pool.load.name.clone(),
            servers: server.into_iter().chain(single.take(MOST_ADVERTISED)).collect(),
        }
    });
    OwnAnswer { instance: loads.instance.clone(), pools: pools.collect() }
}

/// The addresses that clients of a pool can use: `advertise` of its listeners, and if none has it,
/// the addresses that they are bound to, except those that mean nothing elsewhere.
fn public_addresses(
    pool: &str,
    listeners: &[ListenerAddresses],
    listen: SocketAddr,
) -> Vec<String> {
    let listeners = || listeners.iter().filter(|listener| listener.pool == pool);
    let mut public: Vec<String> =
        listeners().filter_map(|listener| listener.advertise.clone()).collect();
    if public.is_empty() {
        let bound = listeners().flat_map(|listener| &listener.bound);
        public = bound.filter(|bound| is_public(bound, listen)).cloned().collect();
    }
    public.dedup();
    public
}

/// Whether a bound address can be given to those who can reach `listen`.
fn is_public(bound: &str, listen: SocketAddr) -> bool {
    let Ok(address) = bound.parse::<SocketAddr>() else { return false };
    let (ip, asked) = (address.ip().to_canonical(), listen.ip().to_canonical());
    !ip.is_unspecified() && (!ip.is_loopback() || asked.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(advertise: Option<&str>, bound: &[&str]) -> ListenerAddresses {
        ListenerAddresses {
            pool: "web".to_owned(),
            advertise: advertise.map(str::to_owned),
            bound: bound.iter().map(|&address| address.to_owned()).collect(),
        }
    }

    #[test]
    fn which_addresses_are_public() {
        let public = |listeners: &[ListenerAddresses], listen: &str| {
            public_addresses("web", listeners, listen.parse().expect("an address"))
        };
        let all = "0.0.0.0:9901";
        let listeners = [
            listener(None, &["0.0.0.0:80"]),
            listener(None, &["10.0.0.1:80", "[::]:80"]),
            listener(None, &["127.0.0.1:80"]),
            listener(None, &["unix:/run/x"]),
        ];
        assert_eq!(public(&listeners, all), ["10.0.0.1:80"]);
        assert_eq!(public(&listeners, "127.0.0.1:9901"), ["10.0.0.1:80", "127.0.0.1:80"]);
        let advertised = [
            listener(Some("www.example.org:443"), &["unix:/run/x"]),
            listener(None, &["10.0.0.1:80"]),
        ];
        assert_eq!(public(&advertised, all), ["www.example.org:443"]);
        assert!(public(&[listener(None, &["[::ffff:0.0.0.0]:80"])], all).is_empty());
        assert!(
            public_addresses("other", &advertised, "0.0.0.0:1".parse().expect("it")).is_empty()
        );
    }
}
