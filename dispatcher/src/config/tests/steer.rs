//! `mode = "steer"`.

use super::*;

/// A steered pool around the tested part.
const STEERED: &str = "\
[[listener]]
name = \"web\"
address = \"127.0.0.1:8080\"
pool = \"web\"

[pool.web]
mode = \"steer\"
";

const SPAWN: &str = "[pool.web.spawn]\ncommand = [\"/bin/sh\", \"{addr}\", \"{port}\"]\n";

fn steer_of(text: &str) -> Steer {
    good(text).pools[0].steer.clone().expect("it is steered")
}

/// A key of the pool, with a mark, is refused.
#[track_caller]
fn key_refused(key: &str, message: &str, help: &str) {
    refused(&format!("{STEERED}{key}\n{SPAWN}"), message, help);
}

#[test]
fn a_pool_is_passed_by_default() {
    assert_eq!(good(GOOD).pools[0].steer, None);
    assert!(!good(GOOD).pools[0].settings.steered);
    let config = good(&format!("{STEERED}{SPAWN}"));
    assert!(config.pools[0].settings.steered);
    assert_eq!(config.steer_pins.as_deref(), Some(Path::new("/sys/fs/bpf/dispatcher")));
    assert_eq!(good(&format!("steer_pins = false\n{GOOD}")).steer_pins, None);
    let steer = steer_of(&format!("{STEERED}fallback = \"pass\"\n{SPAWN}"));
    assert!(steer.fallback && steer.members.is_empty());
    assert_eq!(steer.ports, Ports::Own);
    let all = format!("[defaults]\nmode = \"steer\"\n{GOOD}{SPAWN}");
    assert!(good(&all).pools[0].steer.is_some());
    refused(&format!("steer_pins = ‹\"bpf\"›\n{GOOD}"), "an absolute path", "/sys/fs/bpf");
}

#[test]
fn the_address_of_the_processes_has_the_family_of_the_clients() {
    let of = |address: &str, more: &str| {
        let text = STEERED.replace("127.0.0.1:8080", address);
        let text = text.replace("pool = \"web\"\n\n", &format!("pool = \"web\"\n{more}\n"));
        steer_of(&format!("{text}{SPAWN}")).address.to_string()
    };
    assert_eq!(of("0.0.0.0:80", ""), "127.0.0.1");
    assert_eq!(of("[::1]:80", ""), "::1");
    assert_eq!(of("[::]:80", ""), "::");
    assert_eq!(of("[::]:80", "ipv6_only = true"), "::1");
    let two = "[[listener]]\nname = \"two\"\naddress = \"[::1]:80\"\npool = \"web\"";
    assert_eq!(of("0.0.0.0:80", two), "::");
}

#[test]
fn a_steered_pool_needs_workers_that_know_where_to_listen() {
    let none = STEERED.replace("\"steer\"", "‹\"steer\"›");
    refused(&none, "without workers", "[pool.NAME.spawn]");
    let silent = format!("{STEERED}[pool.web.spawn]\ncommand = ‹[\"/bin/sh\"]›\n");
    refused(&silent, "would not know where to listen", "{addr}");
    let both =
        format!("{STEERED}[pool.web.spawn]\ncommand = [\"/bin/sh\", \"{{port}}\", ‹\"{{fd}}\"›]\n");
    refused(&both, "not both", "remove one");
    let fork =
        format!("{STEERED}{SPAWN}fork = ‹true›\n").replace("\"{addr}\", \"{port}\"", "\"x\"");
    let error = Config::parse(&fork.replace(['‹', '›'], ""), "x").expect_err("refused");
    assert!(error.to_string().contains("forked processes would listen at one address"), "{error}");
    let variable = format!(
        "{STEERED}[pool.web.spawn]\ncommand = [\"/bin/sh\"]\nenvironment = {{ PORT = \"{{port}}\" }}\n"
    );
    assert_eq!(steer_of(&variable).ports, Ports::Own);
    let many = format!("{STEERED}{SPAWN}processes = 600\n");
    let error = Config::parse(&many, "x").expect_err("refused");
    assert!(error.to_string().contains("more than 512 processes"), "{error}");
}

#[test]
fn an_address_of_the_wrong_family_is_refused() {
    let v6 = STEERED.replace("127.0.0.1:8080", "[::1]:8080");
    let text =
        format!("{v6}[pool.web.spawn]\ncommand = [\"/bin/sh\", ‹\"127.0.0.1\"›, \"{{port}}\"]\n");
    refused(&text, "cannot serve the IPv6 clients", "write {addr}");
    let member = format!(
        "{v6}[[pool.web.member]]\naddress = ‹\"127.0.0.1:9000\"›\ncgroup = \"/sys/fs/x\"\n"
    );
    refused(&member, "cannot serve the IPv6 clients of listener `web`", "[::1]");
}

#[test]
fn what_the_kernel_cannot_do_is_refused_with_the_reason() {
    key_refused("peek_timeout = ‹\"1s\"›", "before the first byte", "mode = \"pass\"");
    key_refused("affinity = ‹{ key = \"sni\" }›", "before the first byte", "\"hash\"");
    key_refused("history = ‹5›", "records no decisions", "remove it");
    key_refused("max_untaken = ‹5›", "accept queues of their own", "remove it");
    key_refused("unavailable_response = ‹\"Cargo.toml\"›", "no process accepts", "remove it");
    key_refused("line_socket = ‹\"/run/l\"›", "no worker connects", "remove it");
    key_refused("allow_users = [‹\"root\"›]", "no worker connects", "remove it");
    key_refused("policy = ‹\"least-score\"›", "no gauges", "another policy");
    for key in [
        "allow = [‹\"10.0.0.0/8\"›]",
        "deny = [‹\"10.0.0.0/8\"›]",
        "rate_limit = ‹\"5/s\"›",
        "max_queued_per_client = ‹5›",
        "backlog = ‹5›",
        "nodelay = ‹false›",
        "keepalive = ‹\"5s\"›",
        "user_timeout = ‹\"5s\"›",
        "defer_accept = ‹\"5s\"›",
        "fast_open = ‹5›",
        "receive_buffer = ‹5000›",
        "send_buffer = ‹5000›",
        "reuse_port = ‹true›",
        "proxy_protocol = ‹false›",
    ] {
        let text = STEERED.replace("pool = \"web\"\n\n", &format!("pool = \"web\"\n{key}\n"));
        refused(&format!("{text}{SPAWN}"), "is not possible at a listener", "mode = \"pass\"");
    }
    for (address, message) in [
        ("unix:/run/x", "TCP listeners only"),
        ("systemd:web", "a socket of systemd"),
        ("127.0.0.1:0", "a port that is known"),
    ] {
        let text = STEERED.replace("\"127.0.0.1:8080\"", &format!("‹\"{address}\"›"));
        refused(&format!("{text}{SPAWN}"), message, "");
    }
}

#[test]
fn keys_of_steered_pools_are_refused_elsewhere() {
    pool_refused("fallback = ‹\"pass\"›", "only a pool with mode", "mode = \"steer\"");
    let member = "[[pool.web.member]]\naddress = \"127.0.0.1:1\"\ncgroup = \"/x\"\n";
    let text = format!("{GOOD}{member}");
    let error = Config::parse(&text, "x").expect_err("refused").to_string();
    assert!(error.contains("only a pool with mode = \"steer\" has members"), "{error}");
    let text = format!("{GOOD}[pool.web.spawn]\ncommand = [\"/bin/sh\", ‹\"{{port}}\"›]\n");
    refused(&text, "have a value only with mode", "mode = \"steer\"");
}

#[test]
fn members_have_an_address_a_cgroup_and_a_name() {
    let one = "[[pool.web.member]]\naddress = \"127.0.0.1:9000\"\ncgroup = \"/sys/fs/a\"\n";
    let two = "[[pool.web.member]]\naddress = \"127.0.0.1:9001\"\ncgroup = \"/sys/fs/b\"\n\
               name = \"b\"\nweight = 3\npriority = 2\n";
    let steer = steer_of(&format!("{STEERED}{one}{two}"));
    assert_eq!(steer.members.len(), 2);
    let (first, second) = (&steer.members[0], &steer.members[1]);
    assert_eq!((first.name.as_str(), first.weight, first.priority), ("web-1", 1, 0));
    assert_eq!((second.name.as_str(), second.weight, second.priority), ("b", 3, 2));
    assert_eq!(second.cgroup, Path::new("/sys/fs/b"));
    let with = |address: &str, cgroup: &str, more: &str| {
        format!("{STEERED}{one}[[pool.web.member]]\naddress = {address}\ncgroup = {cgroup}\n{more}")
    };
    refused(&with("‹\"x\"›", "\"/b\"", ""), "not an address", "127.0.0.1:8001");
    refused(&with("‹\"127.0.0.1:0\"›", "\"/b\"", ""), "a port of its own", "listens");
    refused(&with("‹\"127.0.0.1:9000\"›", "\"/b\"", ""), "address of another member", "");
    refused(&with("‹\"127.0.0.1:8080\"›", "\"/b\"", ""), "clients connect to this", "");
    refused(&with("\"127.0.0.1:9\"", "‹\"b\"›", ""), "an absolute path", "/sys/fs/cgroup");
    let named = "name = ‹\"web-1\"›\n";
    refused(&with("\"127.0.0.1:9\"", "\"/b\"", named), "has the name `web-1`", "");
    let both = format!("{STEERED}{SPAWN}{one}");
    let error = Config::parse(&both, "x").expect_err("refused").to_string();
    assert!(error.contains("the pool starts its workers itself"), "{error}");
}
