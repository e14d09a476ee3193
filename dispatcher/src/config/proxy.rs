//! The keys about the PROXY protocol of a listener.

use std::time::Duration;

use toml::Spanned;

use super::Address;
use super::access_rules::networks;
use super::error::Mistake;
use super::file::ListenerKeys;
use super::validate::Check;
use dispatcher_core::ProxyRules;

/// A lost packet is sent again after this time at the latest.
const RETRANSMISSION: Duration = Duration::from_secs(3);

/// The rules, with a warning for each key without effect; `None` without `proxy_protocol`.
/// `address` is missing if it has a mistake.
pub(super) fn proxy_rules(
    check: &mut Check<'_>,
    keys: &ListenerKeys,
    address: Option<&Address>,
) -> Option<ProxyRules> {
    let list = keys.proxy_protocol_from.as_ref();
    let from = networks(check, list.map(|list| list.get_ref().as_slice()));
    let unix = matches!(address, Some(Address::Unix(_)));
    let Some(on) = keys.proxy_protocol.as_ref().filter(|on| *on.get_ref()) else {
        let spans = [
            list.map(Spanned::span),
            keys.proxy_timeout.as_ref().map(Spanned::span),
            keys.proxy_max_header.as_ref().map(Spanned::span),
        ];
        for span in spans.into_iter().flatten() {
            check.warn(Mistake::new(span, "this has no effect without `proxy_protocol = true`"));
        }
        return None;
    };
    match list {
        Some(list) if unix => check.warn(Mistake::new(
            list.span(),
            "this has no effect: clients of a Unix listener have no address; `mode` decides who \
             may connect, and all of them must send a header",
        )),
        Some(list) if list.get_ref().is_empty() => check.mistake(
            Mistake::new(list.span(), "no proxy is trusted, so every header would be refused")
                .help("write the networks of your proxies, such as [\"10.0.0.0/24\"]"),
        ),
        None if !unix => check.mistake(
            Mistake::new(on.span(), "`proxy_protocol` needs `proxy_protocol_from`").help(
                "write the networks of your proxies, such as [\"10.0.0.0/24\"]: a source that may send \
                 a header can take any address",
            ),
        ),
        Some(_) | None => {}
    }
    let timeout = keys.proxy_timeout.as_ref();
    if let Some(timeout) = timeout.filter(|timeout| timeout.get_ref().0 < RETRANSMISSION) {
        check.warn(
            Mistake::new(timeout.span(), "clients are lost with a packet")
                .help("a lost packet is sent again within 3 seconds: wait longer than that"),
        );
    }
    let max_header = keys.proxy_max_header.as_ref();
    Some(ProxyRules {
        from,
        timeout: timeout.map_or(ProxyRules::DEFAULT_TIMEOUT, |wait| wait.get_ref().0),
        max_header: max_header.map_or(ProxyRules::DEFAULT_MAX_HEADER, |n| n.get_ref().0),
    })
}
