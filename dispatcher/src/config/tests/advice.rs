//! `advice_…`, `[advice]`, `[[advice_peer]]` and `advertise`.

use super::*;

fn advised(lines: &str) -> String {
    format!("advice_listen = \"127.0.0.1:9901\"\n{lines}\n{GOOD}")
}

fn listening(keys: &str) -> String {
    advised("").replace("pool = \"web\"\n\n", &format!("pool = \"web\"\n{keys}\n\n"))
}

fn settings(text: &str) -> AdviceSettings {
    let config = good(text);
    assert_eq!(config.warnings, []);
    config.advice
}

#[test]
fn every_key() {
    let off = settings(GOOD);
    assert_eq!(off, AdviceSettings::default());
    let all = settings(&advised(
        "advice_allow = [\"192.0.2.0/24\"]\nadvice_detail = true\n[advice]\ninterval = \"2s\"\n\
         request_timeout = \"300ms\"\nvalid_for = \"5s\"\nhistory = 7\nmultiplier.queue_wait = 100\n\
         multiplier.free_memory = -0.5\nmultiplier.sessions = 0\nmultiplier.connections = 2\n\
         [[advice_peer]]\naddress = \"10.0.0.2:9901\"\n[[advice_peer]]\naddress = \"[::1]:9901\"",
    ));
    let list = |peers: &[SocketAddr]| peers.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(list(&all.peers), ["10.0.0.2:9901", "[::1]:9901"]);
    assert_eq!(all.interval, Some(Duration::from_secs(2)));
    assert_eq!(all.request_timeout, Duration::from_millis(300));
    assert_eq!((all.valid_for, all.history, all.detail), (Duration::from_secs(5), 7, true));
    let names: Vec<_> = all.multipliers.iter().map(|(name, m)| (name.as_str(), *m)).collect();
    assert_eq!(names, [("queue_wait", 100.0), ("free_memory", -0.5), ("sessions", 0.0)]);
    assert_eq!(all.connections, Some(2.0));
    assert_eq!(settings(&advised("[advice]\nmode = \"fresh\"")).interval, None);
    let table = settings(&advised("[advice]\nmultiplier = { queue_wait = 1 }"));
    assert_eq!(table.multipliers.len(), 1);
}

#[test]
fn who_may_ask() {
    let allows = |settings: &AdviceSettings, ip: &str| settings.allows(ip.parse().expect("an IP"));
    let default = AdviceSettings::default();
    for ip in
        ["127.0.0.9", "::1", "10.1.2.3", "172.31.0.1", "192.168.1.1", "::ffff:10.0.0.1", "fd00::1"]
    {
        assert!(allows(&default, ip), "{ip}");
    }
    for ip in ["192.0.2.1", "172.32.0.1", "2001:db8::1", "::2", "11.0.0.1"] {
        assert!(!allows(&default, ip), "{ip}");
    }
    let peers = "advice_allow = []\n[[advice_peer]]\naddress = \"192.0.2.9:1\"";
    let peers = settings(&advised(peers));
    assert!(allows(&peers, "192.0.2.9") && !allows(&peers, "127.0.0.1"));
}

#[test]
fn multipliers_change_the_terms_of_the_policy() {
    use dispatcher_core::advice::Terms;
    let pool = good(&format!(
        "{GOOD}policy = \"least-score\"\n[pool.web.scores]\nmultipliers = {{ connections = 3, queue_wait = 5 }}\n"
    ));
    let terms = Terms::of_pool(&pool.pools[0].settings);
    let shown = |terms: &Terms| {
        let gauges = terms.gauges.iter().map(|(name, m)| (name.to_string(), *m));
        (terms.connections, gauges.collect::<Vec<_>>())
    };
    assert_eq!(shown(&terms), (3.0, vec![("queue_wait".to_owned(), 5.0)]));
    let changed = |lines: &str| shown(&settings(&advised(lines)).terms(terms.clone()));
    assert_eq!(changed("[advice]\nmultiplier.queue_wait = 0"), (3.0, vec![]));
    assert_eq!(
        changed("[advice]\nmultiplier.connections = 0\nmultiplier.free_memory = -1"),
        (0.0, vec![("queue_wait".to_owned(), 5.0), ("free_memory".to_owned(), -1.0)])
    );
    assert_eq!(shown(&Terms::of_pool(&good(GOOD).pools[0].settings)), (1.0, vec![]));
}

#[test]
fn mistakes() {
    refused(
        &format!("advice_listen = ‹\"all\"›\n{GOOD}"),
        "not an address and a port",
        "0.0.0.0:9901",
    );
    refused(
        &format!("advice_listen = \"0.0.0.0:8080\"\n{GOOD}")
            .replace("\"127.0.0.1:8080\"", "‹\"127.0.0.1:8080\"›"),
        "this is the address of `advice_listen` already",
        "a different port",
    );
    refused(
        &format!("admin_http = \"127.0.0.1:9\"\nadvice_listen = ‹\"127.0.0.1:9\"›\n{GOOD}"),
        "this is the address of `admin_http` already",
        "a different port",
    );
    refused(&advised("advice_allow = [‹\"10.0.0.1/8\"›]"), "has bits set", "10.0.0.0/8");
    refused(&advised("[advice]\n‹intervall› = \"1s\""), "unknown key `intervall`", "`interval`");
    refused(&advised("[advice]\nmode = ‹\"slow\"›"), "unknown value `slow`", "fresh, interval");
    refused(&advised("[advice]\nvalid_for = ‹\"1s\"›"), "must be longer than `interval`", "");
    refused(&advised("[advice]\ninterval = ‹\"3s\"›"), "must be longer than `interval`", "");
    refused(&advised("[advice]\nrequest_timeout = ‹\"11s\"›"), "must be at most \"10s\"", "");
    let late = "`request_timeout` must be shorter than `valid_for`";
    let fresh = |keys: &str| advised(&format!("[advice]\nmode = \"fresh\"\n{keys}"));
    refused(&fresh("valid_for = ‹\"1s\"›"), late, "request_timeout (1s)");
    refused(&fresh("request_timeout = ‹\"3s\"›"), late, "valid_for (3s)");
    refused(
        &fresh("request_timeout = ‹\"300ms\"›\nvalid_for = \"300ms\""),
        late,
        "make valid_for longer or request_timeout shorter",
    );
    assert_eq!(settings(&fresh("valid_for = \"1001ms\"")).interval, None);
    // With an interval no request waits for a peer.
    settings(&advised("[advice]\nrequest_timeout = \"10s\""));
    refused(&advised("[advice]\nmultiplier.‹\"a b\"› = 1"), "not a name for a gauge", "");
    refused(&advised("[advice]\nmultiplier.x = ‹\"1\"›"), "wrong type", "");
    let peer = |address: &str| advised(&format!("[[advice_peer]]\naddress = ‹\"{address}\"›"));
    refused(&peer("0.0.0.0:9901"), "stands for all addresses", "the one address");
    refused(&peer("[::]:9901"), "stands for all addresses", "");
    refused(&peer("10.0.0.2"), "is not an address", "\"10.0.0.2:9901\"");
    refused(&peer("host2:9901"), "is not an address", "not resolved");
    refused(&peer("10.0.0.2:0"), "port 0", "");
    refused(
        &advised(
            "[[advice_peer]]\naddress = \"10.0.0.2:1\"\n[[advice_peer]]\naddress = ‹\"10.0.0.2:1\"›",
        ),
        "there is an advice peer 10.0.0.2:1 already",
        "",
    );
    refused(&advised("‹[[advice_peer]]›"), "missing key `address`", "add `address`");
    refused(
        &advised("‹[advice_peer]›\naddress = \"10.0.0.2:1\""),
        "expected an array",
        "write [[advice_peer]], with two brackets",
    );
}

#[test]
fn what_can_be_advertised() {
    for (written, kept) in [
        ("203.0.113.5:443", "203.0.113.5:443"),
        ("[2001:DB8::5]:443", "[2001:db8::5]:443"),
        ("www1.example.org:80", "www1.example.org:80"),
        ("web_1:8080", "web_1:8080"),
    ] {
        let config = good(&listening(&format!("advertise = \"{written}\"")));
        assert_eq!(config.warnings, []);
        assert_eq!(config.listeners[0].advertise.as_deref(), Some(kept));
    }
    let bad = |address: &str, message: &str, help: &str| {
        refused(&listening(&format!("advertise = ‹\"{address}\"›")), message, help);
    };
    bad("0.0.0.0:80", "stands for all addresses", "the one address that others connect to");
    bad("[::]:80", "stands for all addresses", "");
    bad("[::ffff:0.0.0.0]:80", "stands for all addresses", "");
    bad("*:80", "stands for all addresses", "");
    bad("10.0.0.1:0", "port 0", "");
    bad("224.0.0.1:80", "multicast", "");
    bad("10.0.0.1", "not an address to connect to", "\"10.0.0.1:443\"");
    bad("www.example.org", "not an address to connect to", "\"www.example.org:443\"");
    bad("www.example.org:http", "not an address to connect to", "a port is a number");
    bad("10.0.0.256:80", "not an address to connect to", "");
    bad("a b:80", "not an address to connect to", "www1.example.org:443");
    bad("http://www.example.org:80", "not an address to connect to", "");
    bad("", "not an address to connect to", "");
}

#[track_caller]
fn warned(text: &str, message: &str, help: &str) {
    let warnings = good(text).warnings;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let said = warnings[0].to_string();
    assert!(said.contains(message) && said.contains(help) && said.contains('^'), "{said}");
}

#[test]
fn what_advice_cannot_name_and_what_has_no_effect() {
    let on = |address: &str, listen: &str| {
        advised("").replace("127.0.0.1:8080", address).replace("127.0.0.1:9901", listen)
    };
    let help = "advertise = \"HOST:PORT\"";
    warned(&on("0.0.0.0:8080", "10.0.0.1:9901"), "it listens on all addresses", help);
    warned(&on("[::]:8080", "10.0.0.1:9901"), "it listens on all addresses", help);
    warned(&on("127.0.0.1:8080", "0.0.0.0:9901"), "other machines cannot connect", help);
    warned(&on("unix:/run/x", "0.0.0.0:9901"), "it is a Unix socket", help);
    let named = listening("advertise = \"10.0.0.1:80\"").replace("127.0.0.1:8080", "0.0.0.0:8080");
    assert_eq!(good(&named).warnings, []);
    let second = "[[listener]]\nname = \"all\"\naddress = \"[::]:81\"\npool = \"web\"\n";
    assert_eq!(good(&format!("{named}{second}")).warnings, [], "one of them has the key");
    warned(&format!("advice_detail = true\n{GOOD}"), "no effect without `advice_listen`", "");
    warned(&format!("{GOOD}[advice]\n"), "no effect without `advice_listen`", "");
    warned(
        &format!("{GOOD}[[advice_peer]]\naddress = \"10.0.0.2:1\"\n"),
        "no effect without `advice_listen`",
        "",
    );
    let useless = listening("advertise = \"10.0.0.1:80\"")
        .replace("advice_listen = \"127.0.0.1:9901\"\n", "");
    warned(&useless, "`advertise` has no effect without `advice_listen`", "");
    warned(
        &advised("[advice]\nmode = \"fresh\"\ninterval = \"1s\""),
        "`interval` has no effect in this mode",
        "",
    );
    warned(
        &advised("[advice]\nmultiplier.queue_wiat = 1"),
        "not a predefined gauge",
        "`queue_wait`",
    );
}
