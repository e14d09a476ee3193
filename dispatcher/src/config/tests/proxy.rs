//! Keys about the PROXY protocol: how they are written, and what is wrong with them.

use super::*;
use dispatcher_core::ProxyRules;

fn with_text(lines: &str) -> String {
    GOOD.replace("pool = \"web\"\n", &format!("pool = \"web\"\n{lines}\n"))
}

fn with(lines: &str) -> Config {
    good(&with_text(lines))
}

fn rules(lines: &str) -> Option<ProxyRules> {
    with(lines).listeners[0].proxy.clone()
}

fn warned(config: &Config) -> Vec<(String, String)> {
    let all = config.warnings.iter().map(|warning| &warning.0);
    all.map(|it| (it.message.clone(), it.help.clone().unwrap_or_default())).collect()
}

const ON: &str = "proxy_protocol = true\nproxy_protocol_from = ['10.0.0.0/24']";

#[test]
fn headers_are_off_by_default() {
    assert_eq!(good(GOOD).listeners[0].proxy, None);
    assert_eq!(rules("proxy_protocol = false"), None);
}

#[test]
fn rules_are_read() {
    let config = with(ON);
    assert_eq!(config.warnings, []);
    let by_default = config.listeners[0].proxy.as_ref().unwrap();
    assert_eq!(by_default.from, ["10.0.0.0/24".parse().unwrap()]);
    let (timeout, max_header) = (Duration::from_secs(5), 536);
    assert_eq!((by_default.timeout, by_default.max_header), (timeout, max_header));
    let own = "proxy_protocol = true\nproxy_protocol_from = ['::1', '::ffff:10.0.0.0/120']\n\
               proxy_timeout = '30s'\nproxy_max_header = 4096";
    let from = vec!["::1/128".parse().unwrap(), "10.0.0.0/24".parse().unwrap()];
    let timeout = Duration::from_secs(30);
    assert_eq!(rules(own), Some(ProxyRules { from, timeout, max_header: 4096 }));
    // Clients of a Unix listener have no address.
    let unix = "unix:/run/web.sock\"\nproxy_protocol = true\nallow = ['192.0.2.0/24']";
    let unix = GOOD.replace("127.0.0.1:8080\"", unix);
    let config = good(&unix);
    assert_eq!(config.warnings, []);
    assert!(config.listeners[0].proxy.is_some());
}

#[test]
fn mistakes() {
    listener_refused(
        "proxy_protocol = ‹true›",
        "`proxy_protocol` needs `proxy_protocol_from`",
        "write the networks of your proxies",
    );
    listener_refused(
        "proxy_protocol = true\nproxy_protocol_from = ‹[]›",
        "no proxy is trusted",
        "write the networks of your proxies",
    );
    listener_refused(
        "proxy_protocol = true\nproxy_protocol_from = [‹'haproxy.example.org'›]",
        "is not a network",
        "a single address",
    );
    listener_refused(
        "proxy_protocol = true\nproxy_protocol_from = [‹'10.0.0.1/24'›]",
        "bits set beyond its first 24",
        "the network is \"10.0.0.0/24\"",
    );
    listener_refused("proxy_protocol = ‹'v2'›", "a boolean", "such as: proxy_protocol = false");
    for size in [231, 16_385] {
        let line = format!("{ON}\nproxy_max_header = ‹{size}›");
        listener_refused(&line, "from 232 to 16384", "");
    }
    listener_refused(&format!("{ON}\nproxy_timeout = ‹'0s'›"), "", "");
    listener_refused("‹proxy_protcol› = true", "unknown", "proxy_protocol");
}

#[test]
fn keys_without_effect() {
    let config =
        with("proxy_protocol_from = ['::1']\nproxy_timeout = '9s'\nproxy_max_header = 600");
    let without = "this has no effect without `proxy_protocol = true`";
    assert_eq!(warned(&config).iter().filter(|(message, _)| message == without).count(), 3);
    let config = with(&format!("{ON}\nproxy_timeout = '2s'"));
    let said = warned(&config);
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].1.contains("within 3 seconds"), "{said:?}");
    let unix = "unix:/run/web.sock\"\nproxy_protocol = true\nproxy_protocol_from = ['::1']";
    let said = warned(&good(&GOOD.replace("127.0.0.1:8080\"", unix)));
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].0.contains("Unix listener"), "{said:?}");
    // The bound of what is awaited is also that of headers.
    let bound =
        |lines: &str| good(&with_text(lines).replace("[pool.web]", "[pool.web]\nmax_awaiting = 9"));
    assert_eq!(bound(ON).warnings, []);
    assert_eq!(warned(&bound("nodelay = true")).len(), 1);
}
