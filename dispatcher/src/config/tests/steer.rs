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

/// Among the mistakes is one at the mark.
#[track_caller]
fn also_refused(marked: &str, message: &str, help: &str) {
    let start = marked.find('‹').expect("a marked place");
    let line = marked[..start].matches('\n').count() + 1;
    let error = Config::parse(&marked.replace(['‹', '›'], ""), "x").expect_err("refused");
    let there = error.diagnostics().iter().filter(|it| it.line == line);
    let mut found = there.filter(|it| {
        it.message.contains(message) && it.help.clone().unwrap_or_default().contains(help)
    });
    assert!(found.next().is_some(), "{message}: {error}");
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
    assert!(steer.passes() && steer.members.is_empty());
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
fn processes_can_share_the_public_ports() {
    let fd = "[pool.web.spawn]\ncommand = [\"/bin/sh\", \"{fd}\"]\n";
    let config = good(&format!("{STEERED}{fd}"));
    let pool = &config.pools[0];
    assert_eq!(pool.steer.as_ref().map(|steer| steer.ports), Some(Ports::Shared));
    assert!(pool.settings.steered && pool.settings.queues_move);
    let options = &config.listeners[0].options;
    assert!(options.bind_only && options.reuse_port);
    let own = good(&format!("{STEERED}{SPAWN}"));
    assert!(!own.pools[0].settings.queues_move && !own.listeners[0].options.bind_only);

    let silent = "[pool.web.spawn]\ncommand = [\"/bin/sh\"]\n";
    let shared = format!("{STEERED}ports = \"shared\"\n{silent}");
    assert_eq!(steer_of(&shared).ports, Ports::Shared);
    let port = format!("{STEERED}ports = \"shared\"\n{SPAWN}");
    assert_eq!(steer_of(&port).ports, Ports::Shared, "{{port}} is the public one");
    let own = format!("{STEERED}ports = \"own\"\n{SPAWN}");
    assert_eq!(steer_of(&own).ports, Ports::Own);
    let text = format!("{STEERED}ports = \"own\"\n{fd}").replace("\"{fd}\"", "‹\"{fd}\"›");
    refused(&text, "only with ports = \"shared\"", "remove `ports`");
    refused(&format!("{STEERED}ports = ‹\"both\"›\n{SPAWN}"), "unknown", "");
    pool_refused("ports = ‹\"shared\"›", "only a pool with mode", "mode = \"steer\"");
    let member = "[[pool.web.member]]\naddress = \"127.0.0.1:1\"\ncgroup = \"/sys/fs/x\"\n";
    let text = format!("{STEERED}ports = ‹\"shared\"›\n{member}");
    refused(&text, "listens at an address of its own", "remove `ports`");

    let http = "ready_check = ‹\"/health\"›\n";
    let hash = format!("{STEERED}fallback = \"hash\"\n{fd}{http}");
    refused(&hash, "cannot be asked by itself", "\"tcp\"");
    let steered = format!("{STEERED}{fd}{http}").replace(['‹', '›'], "");
    assert_eq!(steer_of(&steered).ports, Ports::Shared);
    for (key, help) in [("ipv6_only", "[::] is for IPv4, too"), ("free_bind", "must exist")] {
        let dual = STEERED.replace("127.0.0.1", "[::]");
        let with = dual.replacen("pool = ", &format!("{key} = ‹true›\npool = "), 1);
        refused(&format!("{with}{fd}"), "where processes inherit listeners", help);
    }
    let more = |n: usize| {
        let port = 8100 + n;
        format!("[[listener]]\nname = \"{n}\"\naddress = \"127.0.0.1:{port}\"\npool = \"web\"\n")
    };
    let listeners = |count: usize| (0..count).map(more).collect::<String>();
    good(&format!("{}{STEERED}{fd}", listeners(31)));
    let many = format!("{}{STEERED}{fd}", listeners(32));
    refused(&many.replace("[pool.web]", "[pool.‹web›]"), "more than 32 listeners", "{addr}");
}

#[test]
fn an_address_of_the_wrong_family_is_refused() {
    let v6 = STEERED.replace("127.0.0.1:8080", "[::1]:8080");
    let text =
        format!("{v6}[pool.web.spawn]\ncommand = [\"/bin/sh\", ‹\"127.0.0.1\"›, \"{{port}}\"]\n");
    refused(&text, "cannot serve the IPv6 clients", "write {addr}");
    let dual = STEERED.replace("127.0.0.1:8080", "[::]:8080");
    for (pool, command, reason) in [
        (&v6, "\"--host\", ‹\"0.0.0.0\"›, \"--port\", \"{port}\"", "the IPv6 clients"),
        (&v6, "\"--port={port}\", ‹\"--host=127.0.0.1\"›", "the IPv6 clients"),
        (&v6, "‹\"tcp://127.0.0.1:{port}/x\"›", "the IPv6 clients"),
        (&dual, "‹\"[::1]:{port}\"›", "the IPv4 clients"),
        (&STEERED.to_owned(), "‹\"::1\"›, \"{port}\"", "the IPv4 clients"),
        (&STEERED.to_owned(), "‹\"10.1.2.3:{port}\"›", "knows a process at the loopback"),
    ] {
        let text = format!("{pool}[pool.web.spawn]\ncommand = [\"/bin/sh\", {command}]\n");
        refused(&text.replace("{port}/x", "{port}"), reason, "write {addr}");
    }
    for (pool, command) in [
        // Another server's address.
        (&v6, "\"--db\", \"127.0.0.1\", \"--a\", \"b\", \"{port}\""),
        (&v6, "\"--db\", \"127.0.0.1:{port}\", \"{addr}\""),
        (&dual, "\"[::]:{port}\""),
        (&STEERED.to_owned(), "\"0.0.0.0:{port}\""),
        (&STEERED.to_owned(), "\"[::]:{port}\""),
    ] {
        let text = format!("{pool}[pool.web.spawn]\ncommand = [\"/bin/sh\", {command}]\n");
        good(&text);
    }
    let member = format!(
        "{v6}[[pool.web.member]]\naddress = ‹\"127.0.0.1:9000\"›\ncgroup = \"/sys/fs/x\"\n"
    );
    refused(&member, "cannot serve the IPv6 clients of this pool", "[::1]");
    let member = member.replace(&v6, &dual);
    refused(&member, "cannot serve the IPv6 clients of this pool", "[::]");
    let one = member.replace("127.0.0.1:9000", "[::1]:9000");
    refused(&one, "cannot serve the IPv4 clients of this pool", "[::]");
    let all = one.replace("[::1]:9000", "[::]:9000");
    good(&all.replace(['‹', '›'], ""));
}

#[test]
fn what_the_kernel_cannot_do_is_refused_with_the_reason() {
    key_refused("peek_timeout = ‹\"1s\"›", "before the first byte", "mode = \"pass\"");
    key_refused("affinity = ‹{ key = \"sni\" }›", "before the first byte", "\"hash\"");
    key_refused("affinity = ‹{ key = \"client-ip\" }›", "by the policy alone", "\"hash\"");
    key_refused("history = ‹5›", "records no decisions", "remove it");
    key_refused("history_candidates = ‹5›", "records no decisions", "remove it");
    key_refused("peek_max_bytes = ‹512›", "before the first byte", "mode = \"pass\"");
    key_refused("max_awaiting = ‹5›", "before the first byte", "mode = \"pass\"");
    key_refused("scores = ‹{ connections = 1 }›", "no gauges", "remove it");
    key_refused("line_socket_mode = ‹\"0600\"›", "no worker connects", "remove it");
    key_refused("line_types = ‹{ a = \"web\" }›", "no worker connects", "remove it");
    key_refused("allow_groups = [‹\"root\"›]", "no worker connects", "remove it");
    key_refused("max_untaken = ‹5›", "accept queues of their own", "remove it");
    key_refused("unavailable_response = ‹\"Cargo.toml\"›", "no process accepts", "remove it");
    key_refused("line_socket = ‹\"/run/l\"›", "no worker connects", "remove it");
    key_refused("allow_users = [‹\"root\"›]", "no worker connects", "remove it");
    key_refused("policy = ‹\"least-score\"›", "no gauges", "another policy");
    const CLIENTS: &str = "does not look at clients";
    const SOCKET: &str = "opens its own listener";
    const PROXY: &str = "before the worker does";
    for (key, reason, help) in [
        ("allow = [‹\"10.0.0.0/8\"›]", CLIENTS, "nftables"),
        ("deny = [‹\"10.0.0.0/8\"›]", CLIENTS, "nftables"),
        ("rate_limit = ‹\"5/s\"›", CLIENTS, "nftables"),
        ("max_queued_per_client = ‹5›", CLIENTS, "nftables"),
        ("max_queued_per_client = 5\nmax_tracked_clients = ‹5›", CLIENTS, "nftables"),
        ("rate_limit = \"5/s\"\nrate_burst = ‹5›", CLIENTS, "nftables"),
        ("rate_limit = \"5/s\"\nclient_prefix_ipv4 = ‹5›", CLIENTS, "nftables"),
        ("rate_limit = \"5/s\"\nclient_prefix_ipv6 = ‹5›", CLIENTS, "nftables"),
        ("backlog = ‹5›", SOCKET, "in the server"),
        ("nodelay = ‹false›", SOCKET, "in the server"),
        ("keepalive = ‹\"5s\"›", SOCKET, "in the server"),
        ("keepalive = \"5s\"\nkeepalive_interval = ‹\"5s\"›", SOCKET, "in the server"),
        ("keepalive = \"5s\"\nkeepalive_count = ‹5›", SOCKET, "in the server"),
        ("user_timeout = ‹\"5s\"›", SOCKET, "in the server"),
        ("defer_accept = ‹\"5s\"›", SOCKET, "in the server"),
        ("fast_open = ‹5›", SOCKET, "in the server"),
        ("receive_buffer = ‹5000›", SOCKET, "in the server"),
        ("send_buffer = ‹5000›", SOCKET, "in the server"),
        ("reuse_port = ‹true›", SOCKET, "in the server"),
        ("proxy_protocol = ‹false›", PROXY, "mode = \"pass\""),
        ("proxy_protocol = true\nproxy_protocol_from = ‹[\"10.0.0.0/8\"]›", PROXY, "mode"),
        ("proxy_protocol = true\nproxy_timeout = ‹\"5s\"›", PROXY, "mode"),
        ("proxy_protocol = true\nproxy_max_header = ‹500›", PROXY, "mode"),
    ] {
        let text = STEERED.replace("pool = \"web\"\n\n", &format!("pool = \"web\"\n{key}\n"));
        also_refused(&format!("{text}{SPAWN}"), reason, help);
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
fn defaults_apply_to_steered_pools_or_are_refused() {
    let with = |defaults: &str| format!("{defaults}\n{STEERED}{SPAWN}");
    refused(
        &with("[defaults]\naffinity = ‹{ key = \"sni\" }›"),
        "before the first byte",
        "affinity = { key = \"none\" }",
    );
    let none = STEERED.replace("mode =", "affinity = { key = \"none\" }\nmode =");
    good(&format!("[defaults]\naffinity = {{ key = \"sni\" }}\n{none}{SPAWN}"));
    refused(&with("[defaults]\npolicy = ‹\"least-score\"›"), "no gauges", "another policy");
    also_refused(&with("[defaults.spawn]\nfork = ‹true›"), "forked processes", "fork = false");
    // What the pool has itself is what counts.
    let elsewhere = "[defaults.spawn]\ncommand = [\"/bin/sh\", \"{fd}\"]\nfork = true";
    good(&format!("{}fork = false\n", with(elsewhere)));
    let text = format!(
        "[defaults.spawn]\ncommand = [\"/bin/sh\", ‹\"{{port}}\"›]\n{GOOD}[pool.web.spawn]\n"
    );
    refused(&text, "have a value only with mode", "mode = \"steer\"");
    let member = "[[defaults.member]]\naddress = \"127.0.0.1:1\"\ncgroup = \"/x\"\n";
    also_refused(&with(&format!("‹›{member}")), "belongs to one pool", "[[pool.NAME.member]]");
}

#[test]
fn a_directory_of_each_process_is_not_looked_for() {
    let text = format!("{STEERED}{SPAWN}directory = \"/nowhere/{{port}}\"\n");
    assert_eq!(good(&text).warnings, []);
    let spawn = good(&text).pools.remove(0).spawn.expect("processes");
    assert_eq!(spawn.address, Some([127, 0, 0, 1].into()));
    // Its processes are others once IPv6 clients can come.
    let more = "[[listener]]\nname = \"two\"\naddress = \"[::1]:80\"\npool = \"web\"\n";
    let other = good(&format!("{more}{text}")).pools.remove(0).spawn.expect("processes");
    assert!(!spawn.starts_like(&other));
}

#[test]
fn at_most_64_pools_are_steered() {
    let pools = |count: usize| {
        let pool = |n: usize| {
            let mark = if n == 64 { ("‹", "›") } else { ("", "") };
            format!(
                "[[listener]]\nname = \"{n}\"\naddress = \"127.0.0.1:{}\"\npool = \"{n}\"\n\
                 [pool.{}{n}{}]\nmode = \"steer\"\n\
                 [[pool.{n}.member]]\naddress = \"127.0.0.1:1\"\ncgroup = \"/sys/fs/x\"\n",
                8000 + n,
                mark.0,
                mark.1
            )
        };
        (0..count).map(pool).collect::<String>()
    };
    good(&pools(64));
    refused(&pools(65), "more than 64 steered pools", "network namespace");
    let member = |n: u32| {
        format!("[[pool.web.member]]\naddress = \"127.0.0.1:{}\"\ncgroup = \"/sys/x\"\n", n + 1)
    };
    let members: String = (0..1025).map(member).collect();
    also_refused(
        &format!("{STEERED}{}", members.replacen("[[", "‹›[[", 1)),
        "at most 1024 members",
        "",
    );
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

/// Where the programs cannot be loaded: passing for workers with the SDK, the kernel's hash for
/// inherited listeners.
#[test]
fn each_way_of_listening_has_its_own_fallback() {
    let heirs = "[pool.web.spawn]\ncommand = [\"/bin/sh\", \"{fd}\"]\n";
    let steer = steer_of(&format!("{STEERED}fallback = \"hash\"\n{heirs}"));
    assert_eq!((steer.fallback, steer.ports), (Some(Fallback::Hash), Ports::Shared));
    assert!(!steer.passes());
    assert_eq!(steer_of(&format!("{STEERED}{heirs}")).fallback, None);
    let named = "[pool.web.spawn]\ncommand = [\"/bin/sh\"]\n";
    let shared = format!("{STEERED}ports = \"shared\"\nfallback = \"hash\"\n{named}");
    assert_eq!(steer_of(&shared).fallback, Some(Fallback::Hash));
    let by_default = format!("[defaults]\nfallback = \"hash\"\n{STEERED}{heirs}");
    assert_eq!(steer_of(&by_default).fallback, Some(Fallback::Hash));
    refused(
        &format!("{STEERED}fallback = ‹\"pass\"›\n{heirs}"),
        "takes no connections that are passed",
        "fallback = \"hash\"",
    );
    key_refused("fallback = ‹\"hash\"›", "only among listeners that processes inherit", "{fd}");
    let unknown = format!("{STEERED}fallback = \"no\"\n{heirs}");
    assert!(Config::parse(&unknown, "x").is_err());
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
    let clients = "clients of listener `web` connect to this address";
    refused(&with("‹\"127.0.0.1:8080\"›", "\"/b\"", ""), clients, "another port");
    refused(&with("‹\"0.0.0.0:8080\"›", "\"/b\"", ""), clients, "another port");
    refused(&with("‹\"[::]:8080\"›", "\"/b\"", ""), clients, "another port");
    let other = "[[listener]]\nname = \"other\"\naddress = \"0.0.0.0:9100\"\npool = \"other\"\n\
                 [pool.other]\n";
    refused(
        &format!("{other}{}", with("‹\"127.0.0.1:9100\"›", "\"/b\"", "")),
        "clients of listener `other`",
        "another port",
    );
    refused(&with("\"127.0.0.1:9\"", "‹\"b\"›", ""), "an absolute path", "/sys/fs/cgroup");
    let named = "name = ‹\"web-1\"›\n";
    refused(&with("\"127.0.0.1:9\"", "\"/b\"", named), "has the name `web-1`", "");
    let both = format!("{STEERED}{SPAWN}{one}");
    let error = Config::parse(&both, "x").expect_err("refused").to_string();
    assert!(error.contains("the pool starts its workers itself"), "{error}");
}

#[test]
fn workers_of_the_line_protocol_join_no_steered_pool() {
    let line = "[[listener]]\nname = \"acl\"\naddress = \"127.0.0.1:1\"\npool = \"acl\"\n\
                [pool.acl]\nline_socket = \"/run/l\"\nline_types = { a = ‹\"web\"› }\n";
    refused(&format!("{STEERED}{SPAWN}{line}"), "no worker joins this pool", "mode = \"pass\"");
}
