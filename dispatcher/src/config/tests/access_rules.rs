//! Rules about clients: how they are written, and what is wrong with them.

use super::*;
use dispatcher_core::Rate;

fn with(lines: &str) -> Config {
    good(&GOOD.replace("pool = \"web\"\n", &format!("pool = \"web\"\n{lines}\n")))
}

#[test]
fn every_client_is_allowed_by_default() {
    let rules = &good(GOOD).listeners[0].access_rules;
    assert_eq!(*rules, AccessRules::default());
    assert!(rules.is_open());
}

#[test]
fn rules_are_read() {
    let config = with(
        "allow = ['10.0.0.0/8', '2001:db8::/32', '192.0.2.7', '::ffff:198.51.100.0/120']\n\
         deny = ['10.9.0.0/16']\nrate_limit = '30/m'\nrate_burst = 5\nmax_queued_per_client = 20\n\
         client_prefix_ipv4 = 24\nclient_prefix_ipv6 = 48\nmax_tracked_clients = 100",
    );
    assert_eq!(config.warnings, []);
    let rules = &config.listeners[0].access_rules;
    let allow: Vec<String> = rules.allow.iter().map(ToString::to_string).collect();
    // A mapped network is the IPv4 network it means.
    assert_eq!(allow, ["10.0.0.0/8", "2001:db8::/32", "192.0.2.7/32", "198.51.100.0/24"]);
    assert_eq!(rules.deny.len(), 1);
    assert_eq!(rules.rate, Some(Rate { every: Duration::from_secs(2), burst: 5 }));
    assert_eq!(rules.max_queued_per_client, Some(20));
    assert_eq!((rules.prefix_ipv4, rules.prefix_ipv6, rules.max_clients), (24, 48, 100));

    let rate =
        |text| with(&format!("rate_limit = '{text}'")).listeners[0].access_rules.rate.unwrap();
    assert_eq!(rate("100/s"), Rate { every: Duration::from_millis(10), burst: 100 });
    assert_eq!(rate("10 / h"), Rate { every: Duration::from_secs(360), burst: 10 });
}

#[test]
fn mistakes_in_rules() {
    listener_refused(
        "allow = ['10.0.0.0/8', ‹'10.0.0.0/33'›]",
        "`10.0.0.0/33` is not a network",
        "192.0.2.0/24",
    );
    listener_refused("deny = [‹'example.org'›]", "is not a network", "a single address");
    listener_refused(
        "deny = [‹'10.1.2.3/8'›]",
        "bits set beyond its first 8",
        "the network is \"10.0.0.0/8\"",
    );
    listener_refused("allow = ‹'10.0.0.0/8'›", "expected an array", "");
    for text in ["100", "fast", "100/d", "/s", "-1/s", "1.5/s"] {
        listener_refused(&format!("rate_limit = ‹'{text}'›"), "is not a rate", "\"100/s\"");
    }
    listener_refused("rate_limit = ‹'0/s'›", "from 1 to 1000000", "");
    listener_refused("rate_limit = ‹'2000000/s'›", "from 1 to 1000000", "");
    listener_refused("rate_limit = '1/s'\nrate_burst = ‹0›", "from 1 to", "");
    listener_refused("client_prefix_ipv4 = ‹33›", "from 0 to 32", "");
    listener_refused("client_prefix_ipv6 = ‹129›", "from 0 to 128", "");
    listener_refused("max_queued_per_client = ‹0›", "from 1 to", "");
    listener_refused("max_tracked_clients = ‹0›", "from 1 to", "");
    listener_refused("‹denny› = []", "unknown key `denny`", "did you mean `deny`?");
}

#[test]
fn rules_without_effect_are_warned_about() {
    let warnings = |config: Config| -> Vec<String> {
        config.warnings.iter().map(|warning| warning.0.message.clone()).collect()
    };
    let said = warnings(with("rate_burst = 3"));
    assert_eq!(said, ["this has no effect without `rate_limit`"]);
    let said = warnings(with("client_prefix_ipv4 = 24\nmax_tracked_clients = 3"));
    assert_eq!(said.len(), 2);
    assert!(said[0].contains("`max_queued_per_client`"));
    let unix = GOOD.replace("127.0.0.1:8080\"", "unix:/run/web\"\nallow = ['10.0.0.0/8']");
    let said = warnings(good(&unix));
    assert!(said.len() == 1 && said[0].contains("no effect"), "{said:?}");
}
