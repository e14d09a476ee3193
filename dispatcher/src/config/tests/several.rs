//! Several mistakes at once, terms of other programs, examples, and options without effect.

use super::*;
use dispatcher_core::Policy;

/// Line, and beginning of the message, of every mistake.
#[track_caller]
fn all(text: &str, expected: &[(usize, &str)]) -> String {
    let error = Config::parse(text, "test.toml").expect_err("this should be refused");
    let found = error.diagnostics();
    let lines: Vec<usize> = found.iter().map(|mistake| mistake.line).collect();
    let messages: Vec<&str> = found.iter().map(|mistake| mistake.message.as_str()).collect();
    let wanted: Vec<usize> = expected.iter().map(|(line, _)| *line).collect();
    assert_eq!(lines, wanted, "{messages:#?}");
    for (message, (_, start)) in messages.iter().zip(expected) {
        assert!(message.starts_with(start), "{start}: {message}");
    }
    error.to_string()
}

#[test]
fn every_mistake_is_reported() {
    let text = "\
log_levl = 'debug'
dispatch_socket_mode = 660
hello_timeout = 2

[[listener]]
name = 'two words'
address = 'localhost:80'
pool = 'wbe'
allow = ['10.0.0.0/8', 'here', '10.0.0.1/8']
rate_limit = 'often'

[[listener]]
name = 'other'
nodelay = 'yes'

[pool.web]
policy = 'leastconn'
max_untaken = 0
max_unteken = 5
allow_users = [0, -2, true, -3]

[pool.web.spawn]
processes = 2
environment = { 'A=B' = '1', DISPATCH_POOL = 'x' }
";
    let shown = all(
        text,
        &[
            (1, "unknown key `log_levl`"),
            (2, "permission bits must be written in octal"),
            (3, "wrong type: integer `2`, expected a duration"),
            (6, "not a valid name for a listener"),
            (7, "`localhost:80` is not an address"),
            (8, "unknown pool `wbe`"),
            (9, "`here` is not a network"),
            (9, "`10.0.0.1/8` has bits set"),
            (10, "`often` is not a rate"),
            (12, "missing key `address`"),
            (12, "missing key `pool`"),
            (14, "wrong type: string \"yes\", expected a boolean"),
            (17, "unknown value `leastconn`"),
            (18, "must be from 1 to 4096, not 0"),
            (19, "unknown key `max_unteken`"),
            (20, "-2 is not a user id"),
            (20, "wrong type: boolean `true`"),
            (20, "-3 is not a user id"),
            (24, "not a name for an environment variable"),
            (24, "the dispatcher itself sets `DISPATCH_POOL`"),
        ],
    );
    assert!(shown.ends_with("\n20 mistakes"), "{shown}");
    assert!(shown.contains("\nhelp: host names are not resolved"), "{shown}");
    // A single mistake has no count.
    assert!(!all(&format!("nope = 1\n{GOOD}"), &[(1, "unknown key")]).contains("mistake"));
}

#[test]
fn a_mistake_causes_no_further_reports() {
    // The misspelt key is the missing one.
    all(
        "[[listener]]\nname='a'\nadress='127.0.0.1:1'\npool='web'\n[pool.web]\n",
        &[(3, "unknown key")],
    );
    all(
        "[[listener]]\nname=4\naddress='127.0.0.1:1'\npool='web'\n[pool.web]\n",
        &[(2, "wrong type")],
    );
    all("[[listener]]\nname='a'\npool='web'\n[pool.web]\n", &[(1, "missing key `address`")]);
    // A listener with a mistake is not reported as missing.
    all("[listener]\nname='a'\n[pool.web]\n", &[(1, "wrong type")]);
    all(
        "pool = 4\n[[listener]]\nname='a'\naddress='127.0.0.1:1'\npool='web'\n",
        &[(1, "wrong type")],
    );
    all("[[listener]]\nname='a'\naddress='127.0.0.1:1'\npool='web'\n", &[(1, "no pool")]);
    all(&format!("{GOOD}[pool.web.spawn]\ncomand = ['x']\n"), &[(8, "unknown key `comand`")]);
    all(&format!("{GOOD}affinity.kye = 'sni'\n"), &[(7, "unknown key `kye`")]);
    // A mistake in a default is reported once for all pools.
    all(
        &format!(
            "[defaults]\nallow_users = [-1]\n{GOOD}[[listener]]\nname='b'\naddress='unix:/b'\npool='b'\n[pool.b]\n"
        ),
        &[(2, "-1 is not a user id")],
    );
}

#[test]
fn other_mistakes_are_reported_besides_syntax_errors() {
    let text =
        format!("dispatch_socket = '/a\nlog_level = 'loud'\n{GOOD}max_untaken = = 4\nnope = 1\n");
    all(&text, &[(1, ""), (2, "unknown value `loud`"), (9, ""), (10, "unknown key `nope`")]);
    // Any text terminates and gives at least one mistake.
    for text in
        ["[", "[[", "a", "=", "[a]\n[a]", "a.b = 1\na = 2", "[[listener]]\n[listener]", "\u{0}"]
    {
        let error = Config::parse(text, "t").expect_err("no configuration");
        assert!(!error.diagnostics().is_empty(), "{text:?}");
    }
    let many = (0..1000).map(|n| format!("nope{n} = 1\n")).collect::<String>();
    let error = Config::parse(&many, "t").expect_err("no configuration");
    assert_eq!(error.diagnostics().len(), 100);
}

#[test]
fn terms_of_other_load_balancers_get_hints() {
    for (word, said) in [
        ("leastconn", "of HAProxy is \"least-connections\" here"),
        ("least_conn", "of nginx is \"least-connections\" here"),
        ("roundrobin", "of HAProxy is \"round-robin\" here"),
        ("static-rr", "of HAProxy is \"round-robin\" here"),
        ("source", "of HAProxy is \"hash\", which uses the client's address"),
        ("ip_hash", "of nginx is \"hash\""),
        ("hash $remote_addr consistent", "of nginx is \"hash\""),
        ("first", "of HAProxy is \"failover\""),
        ("least_time header", "of nginx is \"least-score\""),
        ("random two least_conn", "is \"two-choices\" here"),
        ("random(2)", "is \"two-choices\" here"),
        ("random(1)", "is \"random\" here"),
        ("hdr(X-User)", "\"hash\" with affinity.key = \"header:NAME\""),
        ("url_param id", "\"hash\" with affinity.key = \"url:NAME\""),
        ("rdp-cookie(n)", "\"hash\" with affinity.key = \"cookie:NAME\""),
        ("LEASTCONN", "is \"least-connections\" here"),
    ] {
        let line = format!("policy = ‹'{word}'›");
        pool_refused(&line, "unknown value", said);
        // All policies are valid.
        for policy in Policy::ALL {
            pool_refused(&line, "unknown value", policy.name());
        }
    }
    pool_refused("‹balance› = 'roundrobin'", "unknown key `balance`", "did you mean `policy`?");
    listener_refused("‹bind› = ':80'", "unknown key `bind`", "did you mean `address`?");
    pool_refused("‹maxconn› = 5", "unknown key", "`max_connections_per_worker`?");
    top_refused(
        "log_level = ‹'warning'›",
        "unknown value",
        "did you mean `warn`? The values are: off, error",
    );
    pool_refused(
        "policy = 'least-score'\nscores.mode = ‹'often'›",
        "unknown value `often`",
        "the values are: fresh, interval",
    );
}

#[test]
fn a_wrong_type_gets_an_example() {
    top_refused(
        "dispatch_socket = ‹4›",
        "expected a string",
        "such as: dispatch_socket = \"/run/dispatcher/dispatch.sock\"",
    );
    top_refused("hello_timeout = ‹2›", "wrong type", "such as: hello_timeout = \"2s\"");
    top_refused(
        "admin_http_allow_remote = ‹'no'›",
        "a boolean",
        "such as: admin_http_allow_remote = false",
    );
    listener_refused("nodelay = ‹'yes'›", "a boolean", "such as: nodelay = true");
    listener_refused(
        "allow = ‹'10.0.0.0/8'›",
        "an array",
        "such as: allow = [\"192.0.2.0/24\", \"2001:db8::/32\"]",
    );
    listener_refused("rate_limit = ‹100›", "a string", "such as: rate_limit = \"100/s\"");
    pool_refused("max_untaken = ‹'many'›", "a whole number", "such as: max_untaken = 256");
    pool_refused("allow_users = ‹'www'›", "an array", "such as: allow_users = [\"root\", 33]");
    pool_refused("allow_users = [‹true›]", "a name or a numeric id", "such as: allow_users = [");
    pool_refused("spawn = ‹'x'›", "a table", "such as: [pool.web.spawn]");
    top_refused("pool = ‹3›", "a table", "such as: [pool.web]");
    top_refused("listener = ‹3›", "an array", "such as: [[listener]]");
    pool_refused(
        "[pool.web.spawn]\ncommand = ‹'x y'›",
        "an array",
        "such as: command = [\"/usr/bin/my-server\", \"--quiet\"]",
    );
    pool_refused("affinity.ttl = ‹30›", "a duration", "such as: ttl = \"30m\"");
    top_refused("[defaults]\nslow_start = ‹5›", "a duration", "such as: slow_start = \"0s\"");
    // Every key has an example.
    for (table, keys) in file::tables() {
        for key in keys {
            let table = table.trim_matches(['[', ']']).replace("NAME", "web");
            let table = if table == "listener" { "listener.0".to_owned() } else { table };
            let path: Vec<String> = table
                .split('.')
                .filter(|part| !part.is_empty())
                .chain([*key])
                .map(str::to_owned)
                .collect();
            assert!(hints::example(&path).is_some(), "{path:?}");
        }
    }
}

/// The messages of the warnings, in order.
fn warned(text: &str) -> Vec<String> {
    good(text).warnings.iter().map(|warning| warning.0.message.clone()).collect()
}

#[test]
fn options_of_sockets_that_systemd_makes() {
    let options = [
        ("backlog = 5", "Backlog="),
        ("ipv6_only = true", "BindIPv6Only="),
        ("nodelay = false", "NoDelay="),
        ("keepalive = '5m'", "KeepAliveTimeSec="),
        ("keepalive_interval = '5s'", "KeepAliveIntervalSec="),
        ("keepalive_count = 3", "KeepAliveProbes="),
        ("user_timeout = '5s'", "remove the key"),
        ("defer_accept = '5s'", "DeferAcceptSec="),
        ("fast_open = 5", "remove the key"),
        ("receive_buffer = 5000", "ReceiveBuffer="),
        ("send_buffer = 5000", "SendBuffer="),
        ("reuse_port = true", "ReusePort="),
        ("free_bind = true", "FreeBind="),
        ("mode = '0600'", "SocketMode="),
    ];
    for (line, there) in options {
        let text = GOOD.replace("pool = \"web\"\n", &format!("pool = \"web\"\n{line}\n"));
        let text = text.replace("127.0.0.1:8080", "systemd:web");
        let warnings = good(&text).warnings;
        let key = line.split(' ').next().expect("a key");
        assert_eq!(warnings.len(), 1, "{line}: {warnings:?}");
        let Diagnostic { message, help, line: at, .. } = &warnings[0].0;
        assert_eq!(*message, format!("`{key}` has no effect on a socket created by systemd"));
        assert!(help.as_deref().is_some_and(|help| help.contains(there)), "{line}: {help:?}");
        assert_eq!(*at, 5);
    }
    // All options.
    let known = [
        "name",
        "address",
        "pool",
        "advertise",
        "allow",
        "deny",
        "rate_limit",
        "rate_burst",
        "max_queued_per_client",
        "client_prefix_ipv4",
        "client_prefix_ipv6",
        "max_tracked_clients",
        "proxy_protocol",
        "proxy_protocol_from",
        "proxy_timeout",
        "proxy_max_header",
    ];
    let (_, keys) = file::tables()[1];
    for key in keys {
        let shown = options.iter().any(|(line, _)| line.split(' ').next() == Some(key));
        assert_ne!(shown, known.contains(key), "{key}");
    }
    // Access rules do have an effect there.
    let rules =
        GOOD.replace("127.0.0.1:8080\"", "systemd:web\"\nrate_limit = '1/s'\nallow = ['::/0']");
    assert_eq!(warned(&rules), [] as [String; 0]);
    let text = format!(
        "dispatch_socket = 'systemd:d'\ndispatch_socket_mode = '0600'\ndispatch_socket_user = 0\n\
         dispatch_socket_group = 0\nadmin_socket = 'systemd:a'\nadmin_socket_mode = '0660'\n{GOOD}"
    );
    let about = |key: &str| format!("`{key}` has no effect on a socket created by systemd");
    assert_eq!(
        warned(&text),
        [
            "dispatch_socket_mode",
            "dispatch_socket_user",
            "dispatch_socket_group",
            "admin_socket_mode"
        ]
        .map(about)
    );
    let path = "dispatch_socket_mode = '0600'\ndispatch_socket_user = 0\nadmin_socket_group = 0\n";
    assert_eq!(warned(&format!("{path}{GOOD}")), [] as [String; 0]);
}

#[test]
fn a_missing_program_is_a_warning() {
    use std::os::unix::fs::PermissionsExt;

    let temp = tempfile::tempdir().expect("a directory");
    let here = temp.path().display();
    let program = temp.path().join("server");
    let spawn = |lines: &str| format!("{GOOD}[pool.web.spawn]\n{lines}\n");
    let whole = spawn(&format!("command = ['{here}/server']"));
    assert_eq!(
        warned(&whole),
        [format!("`{here}/server`: No such file or directory (os error 2)")]
    );
    std::fs::write(&program, "#!/bin/sh\n").expect("written");
    assert_eq!(warned(&whole), [format!("`{here}/server` is not an executable file")]);
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("executable");
    assert_eq!(warned(&whole), [] as [String; 0]);
    // A relative path is searched in the working directory of the process; a name in its own PATH.
    let relative = format!("command = ['./server']\ndirectory = '{here}'");
    assert_eq!(warned(&spawn(&relative)), [] as [String; 0]);
    assert_eq!(warned(&spawn("command = ['sh']")), [] as [String; 0]);
    let own = format!("command = ['server']\nenvironment = {{ PATH = '{here}' }}");
    assert_eq!(warned(&spawn(&own)), [] as [String; 0]);
    let found = warned(&spawn("command = ['no-such-server']"));
    assert!(
        found.len() == 1 && found[0].starts_with("there is no program `no-such-server` in PATH"),
        "{found:?}"
    );
    assert_eq!(
        warned(&spawn(&format!("command = ['{here}']"))),
        [format!("`{here}` is not an executable file")]
    );
    let found = warned(&spawn("command = ['sh']\ndirectory = '/no/such/place'"));
    assert_eq!(found, ["there is no directory `/no/such/place`"]);
    // A warning about a default is reported at most once per pool.
    let both = format!(
        "[defaults.spawn]\ncommand = ['{here}/none']\n{GOOD}[pool.web.spawn]\n[[listener]]\nname='b'\naddress='unix:/b'\npool='b'\n[pool.b.spawn]\n"
    );
    assert_eq!(warned(&both).len(), 1);
}
