//! The access rules of a listener: networks in CIDR form, a rate, and the prefix that identifies a
//! client.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use toml::Spanned;

use super::Address;
use super::error::Mistake;
use super::file::ListenerKeys;
use super::validate::{Check, Checked};
use dispatcher_core::{AccessRules, Rate};

/// Highest rate per second, minute or hour.
const MAX_RATE: u32 = 1_000_000;

/// The rules, with a warning for each rule without effect. `address` is missing if it has a
/// mistake.
pub(super) fn access_rules(
    check: &mut Check<'_>,
    keys: &ListenerKeys,
    address: Option<&Address>,
) -> AccessRules {
    let default = AccessRules::default();
    for mistake in address.map_or_else(Vec::new, |address| useless(keys, address)) {
        check.warn(mistake);
    }
    AccessRules {
        allow: networks(check, keys.allow.as_deref()),
        deny: networks(check, keys.deny.as_deref()),
        rate: check.keep(rate(keys)).flatten(),
        max_queued_per_client: keys.max_queued_per_client.as_ref().map(|n| n.get_ref().0),
        prefix_ipv4: prefix(keys.client_prefix_ipv4.as_ref().map(|n| n.get_ref().0))
            .unwrap_or(default.prefix_ipv4),
        prefix_ipv6: prefix(keys.client_prefix_ipv6.as_ref().map(|n| n.get_ref().0))
            .unwrap_or(default.prefix_ipv6),
        max_clients: keys
            .max_tracked_clients
            .as_ref()
            .map_or(default.max_clients, |n| n.get_ref().0),
    }
}

fn prefix(length: Option<u32>) -> Option<u8> {
    length.and_then(|length| u8::try_from(length).ok())
}

pub(super) fn networks(check: &mut Check<'_>, list: Option<&[Spanned<String>]>) -> Vec<IpNet> {
    list.unwrap_or_default().iter().filter_map(|text| check.keep(network(text))).collect()
}

fn network(text: &Spanned<String>) -> Checked<IpNet> {
    let word = text.get_ref().as_str();
    let mistake = |message: String| Mistake::new(text.span(), message);
    let net = match (word.parse::<IpNet>(), word.parse::<IpAddr>()) {
        (Ok(net), _) => net,
        (_, Ok(ip)) => IpNet::from(ip),
        _ => {
            return Err(mistake(format!("`{word}` is not a network"))
                .help("write \"192.0.2.0/24\", \"2001:db8::/32\", or a single address"));
        }
    };
    if net != net.trunc() {
        return Err(mistake(format!(
            "`{word}` has bits set beyond its first {}",
            net.prefix_len()
        ))
        .help(format!("the network is \"{}\"", net.trunc())));
    }
    // IPv4 clients are matched by their IPv4 address on every listener.
    let IpNet::V6(net) = net else { return Ok(net) };
    match (net.addr().to_ipv4_mapped(), net.prefix_len().checked_sub(96)) {
        (Some(ip), Some(length)) => Ok(Ipv4Net::new(ip, length).map_or(IpNet::V6(net), IpNet::V4)),
        _ => Ok(IpNet::V6(net)),
    }
}

fn rate(keys: &ListenerKeys) -> Checked<Option<Rate>> {
    let Some(text) = &keys.rate_limit else { return Ok(None) };
    let word = text.get_ref().as_str();
    let mistake = |message: String| {
        Mistake::new(text.span(), message)
            .help("write connections per second, minute or hour: \"100/s\", \"30/m\", \"10/h\"")
    };
    let not_a_rate = || mistake(format!("`{word}` is not a rate"));
    let (count, unit) = word.split_once('/').ok_or_else(not_a_rate)?;
    let seconds = match unit.trim() {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(not_a_rate()),
    };
    let count: u64 = count.trim().parse().map_err(|_| not_a_rate())?;
    let count = u32::try_from(count)
        .ok()
        .filter(|count| (1..=MAX_RATE).contains(count))
        .ok_or_else(|| mistake(format!("a rate must be from 1 to {MAX_RATE}, not {count}")))?;
    Ok(Some(Rate {
        every: Duration::from_secs(seconds) / count,
        burst: keys.rate_burst.as_ref().map_or(count, |n| n.get_ref().0),
    }))
}

/// Keys that have no effect on this listener.
fn useless(keys: &ListenerKeys, address: &Address) -> Vec<Mistake> {
    let of = |span: Option<std::ops::Range<usize>>, message: &str| {
        span.map(|span| Mistake::new(span, message))
    };
    let mut found = Vec::new();
    // Behind a proxy, clients of a Unix listener do have addresses.
    let proxied = keys.proxy_protocol.as_ref().is_some_and(|on| *on.get_ref());
    if matches!(address, Address::Unix(_)) && !proxied {
        let message = "this has no effect: clients of a Unix listener have no address";
        found.extend(of(keys.allow.as_ref().and_then(|list| Some(list.first()?.span())), message));
        found.extend(of(keys.deny.as_ref().and_then(|list| Some(list.first()?.span())), message));
        found.extend(of(keys.rate_limit.as_ref().map(Spanned::span), message));
        found.extend(of(keys.max_queued_per_client.as_ref().map(Spanned::span), message));
    }
    if keys.rate_limit.is_none() {
        let burst = keys.rate_burst.as_ref().map(Spanned::span);
        found.extend(of(burst, "this has no effect without `rate_limit`"));
        if keys.max_queued_per_client.is_none() {
            let message = "this has no effect without `rate_limit` or `max_queued_per_client`";
            found.extend(of(keys.client_prefix_ipv4.as_ref().map(Spanned::span), message));
            found.extend(of(keys.client_prefix_ipv6.as_ref().map(Spanned::span), message));
            found.extend(of(keys.max_tracked_clients.as_ref().map(Spanned::span), message));
        }
    }
    found
}
