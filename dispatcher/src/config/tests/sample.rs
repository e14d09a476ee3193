//! `etc/dispatcher.toml` is valid and complete, and its defaults are the real ones.

use super::*;

const PAGE: &str = include_str!("../../../../docs/CONFIGURATION.md");
const SAMPLE: &str = include_str!("../../../../etc/dispatcher.toml");

/// The sample with every `#key = …` and `#[table]` active, except the keys in `skip`.
fn uncommented(skip: &[&str]) -> String {
    let setting = |line: &str| {
        let rest = line.strip_prefix('#')?;
        let first = rest.chars().next()?;
        (first == '[' || first.is_ascii_lowercase()).then(|| rest.to_owned())
    };
    // Another kind of pool.
    let steered = [
        "mode = \"steer\"",
        "fallback",
        "ports =",
        "[[pool.web.member]]",
        "address  = \"127.0.0.1:8001\"",
        "cgroup",
        "name     = \"web-a\"",
        "weight   =",
        "priority =",
    ];
    let skip: Vec<&str> = skip.iter().copied().chain(steered).collect();
    SAMPLE
        .lines()
        .filter(|line| !skip.iter().any(|key| line.trim_start_matches('#').starts_with(key)))
        .map(|line| setting(line).unwrap_or_else(|| line.to_owned()) + "\n")
        .collect()
}

#[test]
fn the_sample_is_valid() {
    let config = good(SAMPLE);
    assert_eq!(config.warnings, []);
    assert_eq!(config.listeners.len(), 1);
}

#[test]
fn the_sample_has_every_key() {
    for (table, keys) in file::tables() {
        assert!(!keys.is_empty(), "{table}");
        for key in keys {
            let found = SAMPLE.lines().any(|line| {
                let line = line.strip_prefix('#').unwrap_or(line);
                let name = line.split(['=', ' ']).next();
                let header = line.trim_matches(['[', ']']);
                name == Some(key)
                    || line.starts_with('[')
                        && (header == *key
                            || header.starts_with(&format!("{key}."))
                            || header.ends_with(&format!(".{key}")))
            });
            assert!(found, "{key} of {table} is not in the sample");
            let written = [format!("`{key}`"), format!("{key}]"), format!("[{key}")];
            assert!(
                written.iter().any(|text| PAGE.contains(text)),
                "{key} of {table} is not in docs/CONFIGURATION.md"
            );
        }
    }
}

#[test]
fn the_defaults_in_the_sample_are_the_defaults() {
    // Examples that differ from the default, or that read a file.
    let text = uncommented(&[
        "unavailable_response",
        "advertise",
        "agent_",
        "line_",
        "advice_listen",
        "[[advice_peer]]",
        "address = \"10.",
        "multiplier =",
        "allow",
        "deny",
        "rate_",
        "max_queued_per_client",
        "proxy_",
        "keepalive",
        "user_timeout",
        "defer_accept",
        "fast_open",
        "receive_buffer",
        "send_buffer",
        "dispatch_socket_user",
        "dispatch_socket_group",
        "admin_socket_user",
        "admin_socket_group",
        "admin_http",
        "relay_ticket_key",
        "relay_socket",
        // Other accounts need a permission, and limits depend on the machine.
        "user",
        "group",
        "nofile",
        "core",
        "memory",
        "drain_timeout",
        "kill_hung_after",
        "max_age",
        "max_connections_served",
        "max_memory",
    ]);
    let written = good(&text);
    let least = good(GOOD);
    assert_eq!(written.dispatch_socket, least.dispatch_socket);
    assert_eq!(written.admin_socket, least.admin_socket);
    assert_eq!(written.limits, least.limits);
    assert_eq!(written.advice, least.advice);
    assert_eq!(written.listeners[0].options, least.listeners[0].options);
    assert_eq!(written.listeners[0].access_rules, least.listeners[0].access_rules);
    let (mut written, least) = (written.pools[0].settings.clone(), least.pools[0].settings.clone());
    assert_eq!(written.processes, 1);
    let spawn = good(&text).pools[0].spawn.clone().expect("processes");
    assert_eq!(spawn.setup, ProcessSetup { umask: Some(0o027), ..ProcessSetup::default() });
    written.processes = 0;
    assert_eq!(written.supervision, least.supervision);
    // The sample sets the key to "none", which disables the other keys.
    assert_eq!(written.affinity, None);
    assert_eq!(format!("{written:?}"), format!("{least:?}"));
}

#[test]
fn the_examples_in_the_sample_are_valid() {
    let config =
        good(&uncommented(&["unavailable_response", "user =", "group =", "nofile", "memory"]));
    let supervision = &config.pools[0].settings.supervision;
    assert_eq!(supervision.max_age, Some(Duration::from_secs(24 * 3600)));
    let spawn = config.pools[0].spawn.as_ref().expect("processes");
    assert_eq!(spawn.setup.umask, Some(0o027));
    assert_eq!(spawn.setup.limits.core, Some(Limit { soft: 0, hard: 0 }));
    assert_eq!(spawn.command[0], "/usr/bin/my-server");
    assert_eq!(spawn.on_dispatcher_loss, OnDispatcherLoss::default());
    assert_eq!(config.listeners[0].options.keepalive_count, Some(4));
    assert_eq!(config.listeners[0].advertise.as_deref(), Some("www1.example.org:80"));
    assert_eq!(config.pools[0].settings.agent_workers, Some(8));
    assert_eq!(config.pools[0].agent_listen, Some(Address::Tcp(([127, 0, 0, 1], 9902).into())));
    assert_eq!(config.advice.peers.len(), 1);
    assert_eq!(config.advice.multipliers.len(), 2);
}
