//! Mistakes across several keys, warnings, and files.

use super::*;
use dispatcher_core::Policy;

#[test]
fn duplicate_names_and_addresses() {
    let second = |name: &str, address: &str| {
        format!("{GOOD}[[listener]]\nname = {name}\naddress = {address}\npool = 'web'\n")
    };
    refused(&second("‹'web'›", "'127.0.0.1:1'"), "there is a listener `web` already", "");
    refused(&second("'b'", "‹'127.0.0.1:8080'›"), "`web` has this address already", "");
    good(&second("'b'", "'127.0.0.1:8081'"));
    refused(&second("'b'", "‹'[::]:8080'›"), "uses this IPv4 port", "ipv6_only = true");
    good(&second("'b'", "'[::]:8080'\nipv6_only = true"));
    refused(&second("'b'", "‹'0.0.0.0:8080'›"), "uses this port", "keep only the listener");
    good(&second("'b'", "'127.0.0.2:8080'"));
    top_refused(
        "dispatch_socket = '/x'\nadmin_socket = ‹'/x'›",
        "are the same",
        "a different path",
    );
    refused(
        &format!("admin_socket = '/x'\n{}", second("'b'", "‹'unix:/x'›")),
        "this is `admin_socket` already",
        "",
    );
    let any = GOOD.replace("8080", "0");
    good(&format!("{any}[[listener]]\nname = 'b'\naddress = '127.0.0.1:0'\npool = 'web'\n"));
}

#[test]
fn names() {
    let named = |name: &str| GOOD.replace("name = \"web\"", &format!("name = ‹'{name}'›"));
    for bad in ["", "two words", "ünïcode", &"x".repeat(65)] {
        refused(&named(bad), "not a valid name for a listener", "1 to 64");
    }
    let both = GOOD.replace("pool = \"web\"", "pool = 'a b'");
    refused(&both.replace("[pool.web]", "[pool.‹\"a b\"›]"), "not a valid name for a pool", "");
    good(&named(&"x".repeat(64)).replace(['‹', '›'], ""));
}

#[test]
fn missing_things() {
    refused("‹›", "no pool is configured", "[pool.web]");
    refused("‹›[pool.web]\n", "no listener is configured", "[[listener]]");
    refused("‹[[listener]]›\nname='a'\npool='web'\n[pool.web]\n", "missing key `address`", "");
    pool_refused("‹[pool.web.spawn]›\nprocesses = 2", "missing key `command`", "program");
    pool_refused("[pool.web.spawn]\ncommand = ‹[]›", "`command` is empty", "");
    pool_refused("[pool.web.spawn]\ncommand = [‹''›]", "the program has no name", "");
}

#[test]
fn pools_and_policies() {
    refused(
        &GOOD.replace("pool = \"web\"", "pool = ‹\"wbe\"›"),
        "unknown pool `wbe`",
        "did you mean `web`?",
    );
    refused(
        &GOOD.replace("pool = \"web\"", "pool = ‹\"zzzzzz\"›"),
        "unknown pool `zzzzzz`",
        "the pools are: web",
    );
    pool_refused(
        "policy = ‹'least-conections'›",
        "unknown value `least-conections`",
        "did you mean `least-connections`?",
    );
    pool_refused("policy = ‹'fair'›", "unknown value", "the values are: least-connections");
    for policy in Policy::ALL {
        let config = good(&format!("{GOOD}policy = '{}'\n", policy.name()));
        assert_eq!(config.pools[0].settings.policy, policy);
    }
}

#[test]
fn keys_of_clients() {
    use dispatcher_core::KeySource;
    use dispatcher_core::{Affinity, Peek};

    let known = |lines: &str| good(&format!("{GOOD}{lines}\n")).pools[0].settings.clone();
    assert_eq!(known("").affinity, None);
    assert_eq!(known("affinity.key = 'none'").affinity, None);
    let ip = |ipv4_prefix, ipv6_prefix| KeySource::ClientIp { ipv4_prefix, ipv6_prefix };
    for (word, key) in [
        ("client-ip", ip(32, 64)),
        ("cookie:JSESSIONID", KeySource::Cookie("JSESSIONID".to_owned())),
        ("url:jsessionid", KeySource::Url("jsessionid".to_owned())),
        ("form:user name", KeySource::Form("user name".to_owned())),
        ("header:X-User", KeySource::Header("X-User".to_owned())),
        ("sni", KeySource::Sni),
    ] {
        let settings = known(&format!("affinity.key = '{word}'"));
        let ttl = Duration::from_secs(1800);
        assert_eq!(settings.affinity, Some(Affinity { key, ttl, max_entries: 100_000 }), "{word}");
        assert_eq!(settings.peek, Peek::default());
    }
    let settings = known(
        "peek_timeout = '1s'\npeek_max_bytes = 1024\nmax_awaiting = 7\n\
         [pool.web.affinity]\nkey = 'cookie:a'\nttl = '1m'\nmax_entries = 9",
    );
    let (key, ttl) = (KeySource::Cookie("a".to_owned()), Duration::from_secs(60));
    assert_eq!(settings.affinity, Some(Affinity { key, ttl, max_entries: 9 }));
    let timeout = Duration::from_secs(1);
    assert_eq!(settings.peek, Peek { timeout, max_bytes: 1024, max_awaiting: 7 });

    pool_refused("affinity.key = ‹'cokie:a'›", "unknown kind of key `cokie`", "`cookie`?");
    pool_refused(
        "affinity.key = ‹'zzzzzzzz'›",
        "unknown kind of key",
        "the kinds are: client-ip, ",
    );
    pool_refused("affinity.key = ‹'cookie'›", "`cookie` needs a name", "\"cookie:JSESSIONID\"");
    pool_refused("affinity.key = ‹'header:'›", "`header` needs a name", "\"header:NAME\"");
    pool_refused("affinity.key = ‹'sni:a'›", "`sni` takes no name", "write \"sni\" alone");
    pool_refused("affinity.key = ‹'cookie:a b'›", "cannot be the name of a cookie", "");
    pool_refused("affinity.key = ‹\"url:\\n\"›", "cannot be the name of a url", "");
    pool_refused("affinity.key = ‹4›", "wrong type", "");
    pool_refused("affinity.‹kye› = 'sni'", "unknown key `kye`", "did you mean `key`?");
    pool_refused("affinity.ttl = ‹'0s'›", "at least", "");
    pool_refused("affinity.ipv4_prefix = ‹33›", "from 1 to 32", "");
    pool_refused("affinity.max_entries = ‹0›", "must be from 1", "");
    pool_refused("peek_max_bytes = ‹100›", "from 256 to 65536", "");
    pool_refused("‹ttl› = '1s'", "unknown key", "belongs in [pool.NAME.affinity]");
    pool_refused("‹[pool.web.affinity]›\nttl = '1m'", "missing key `key`", "cookie:SESSION");
}

#[test]
fn keys_of_clients_by_default() {
    let config = good(&format!(
        "[defaults]\nmax_awaiting = 5\n[defaults.affinity]\nkey = 'client-ip'\nipv4_prefix = 24\n\
         {GOOD}[pool.web.affinity]\nipv6_prefix = 48\nttl = '1s'\n\
         [[listener]]\nname='o'\naddress='unix:/o'\npool='other'\n\
         [pool.other]\naffinity.key = 'none'\n"
    ));
    let affinity = config.pools[0].settings.affinity.clone().expect("by default");
    let key = dispatcher_core::KeySource::ClientIp { ipv4_prefix: 24, ipv6_prefix: 48 };
    assert_eq!((affinity.key, affinity.ttl), (key, Duration::from_secs(1)));
    assert_eq!(config.pools[0].settings.peek.max_awaiting, 5);
    assert_eq!(config.pools[1].settings.affinity, None);
    assert_eq!(config.warnings, []);
}

#[test]
fn histories() {
    let config = good(&format!("{GOOD}history = 10000\nhistory_candidates = 50\n"));
    assert_eq!(config.pools[0].settings.history, 10_000);
    assert_eq!(config.pools[0].settings.history_candidates, 50);
    pool_refused(
        "history = ‹10000›\nhistory_candidates = 51",
        "10000 decisions with 51 workers each are too many",
        "500000 at most",
    );
    pool_refused("history = ‹10001›", "must be from 0 to 10000", "");
}

#[test]
fn environment() {
    let spawn = "[pool.web.spawn]\ncommand=['x']\n";
    pool_refused(
        &format!("{spawn}environment = {{ ‹DISPATCH_TOKEN› = 'x' }}"),
        "the dispatcher itself sets",
        "",
    );
    pool_refused(&format!("{spawn}environment = {{ ‹'a=b'› = 'x' }}"), "not a name", "");
    pool_refused(&format!("{spawn}environment = {{ A = ‹1› }}"), "wrong type", "");
    for name in NOT_INHERITED {
        pool_refused(
            &format!("{spawn}environment = {{ ‹{name}› = 'x' }}"),
            &format!("`{name}` cannot be set here"),
            "start without it",
        );
    }
    pool_refused(&format!("{spawn}environment = {{ ‹''› = 'x' }}"), "not a name", "");
    pool_refused(&format!("{spawn}environment = {{ ‹\"a\\u0000b\"› = 'x' }}"), "not a name", "");
    pool_refused(&format!("{spawn}environment = {{ A = ‹\"\\u0000\"› }}"), "a zero byte", "");
    let long = "x".repeat(131_072 - 3);
    good(&format!("{GOOD}{spawn}environment = {{ A = '{long}' }}"));
    pool_refused(
        &format!("{spawn}environment = {{ A = ‹'{long}x'› }}"),
        "`A` is too long",
        "131072",
    );
    pool_refused(&format!("{spawn}directory = ‹\"/\\u0000\"›"), "zero byte", "");
}

#[test]
fn unavailable_response() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("response");
    let line = format!("unavailable_response = ‹'{}'›", path.display());
    pool_refused(&line, "cannot be read", "no worker");
    std::fs::write(&path, b"busy").expect("written");
    let config = good(&format!("{GOOD}{}", line.replace(['‹', '›'], "")));
    assert_eq!(config.pools[0].unavailable_response.as_deref(), Some(&b"busy"[..]));
    std::fs::write(&path, vec![0; MAX_UNAVAILABLE_RESPONSE + 1]).expect("written");
    pool_refused(&line, "longer than 64 KiB", "");
    // Opening a pipe without a writer would block.
    std::fs::remove_file(&path).expect("removed");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    pool_refused(&line, "not a regular file", "");
}

#[test]
fn unknown_accounts_are_warnings() {
    let config = good(&format!(
        "dispatch_socket_group = 'no-such-group'\n{GOOD}allow_users = ['root', 7, '8', 'no-such-user']\n"
    ));
    let access = &config.pools[0].settings.access;
    assert_eq!(access.users, [0, 7, 8]);
    let shown: Vec<String> = config.warnings.iter().map(ToString::to_string).collect();
    assert_eq!(shown.len(), 2);
    assert!(
        shown[0].starts_with("test.toml:1:25: warning: unknown group `no-such-group`"),
        "{}",
        shown[0]
    );
    assert!(shown[1].starts_with("test.toml:8:32: warning: unknown user `no-such-user`"));
    // With an unknown user in the list, no user may join.
    let config = good(&format!("{GOOD}allow_users = ['no-such-user']\n"));
    assert_eq!(config.pools[0].settings.access.users, [] as [u32; 0]);
}

#[test]
fn other_warnings() {
    let warned = |text: &str, message: &str| {
        let config = good(text);
        assert!(
            config.warnings.iter().any(|w| w.0.message.contains(message)),
            "{:?}",
            config.warnings
        );
    };
    warned(&format!("{GOOD}[pool.idle]\n"), "no listener sends connections to pool `idle`");
    let with = |line: &str| GOOD.replace("pool = \"web\"\n", &format!("pool = \"web\"\n{line}\n"));
    warned(&with("mode = '0600'"), "no effect on a TCP listener");
    warned(&with("ipv6_only = true"), "without an IPv6 address");
    warned(&with("keepalive_count = 3"), "no effect without `keepalive`");
    for line in ["peek_timeout = '1s'", "peek_max_bytes = 999", "max_awaiting = 9"] {
        warned(&format!("{GOOD}{line}\naffinity.key = 'client-ip'\n"), "first bytes");
    }
    warned(&format!("{GOOD}affinity.key = 'sni'\naffinity.ipv4_prefix = 9\n"), "client-ip");
}

#[test]
fn carets_under_tabs_and_wide_letters() {
    let text = format!("{GOOD}allow_users = ['ä', 'ö']\n\tpolcy = 'x'\n");
    let error = Config::parse(&text, "t").expect_err("an unknown key").to_string();
    assert!(error.contains(" 8 | \tpolcy = 'x'\n   | \t^^^^^\n"), "{error}");
    pool_refused("allow_users = ['1', \"ä\", ‹true›]", "wrong type", "");
    refused("dispatch_socket = '/a'\r\n‹nope_nope_nope› = 1\r\n", "unknown key", "");
}

#[test]
fn files_that_cannot_be_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let missing = directory.path().join("none.toml");
    let error = Config::load(&missing).expect_err("no such file").to_string();
    assert!(error.contains("none.toml: No such file"), "{error}");
    std::fs::write(&missing, b"\xff\xfe").expect("written");
    let error = Config::load(&missing).expect_err("not text").to_string();
    assert!(error.contains("not UTF-8"), "{error}");
}

#[test]
fn clients_find_the_admin_socket_in_a_broken_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("d.toml");
    std::fs::write(&file, "admin_socket = '/a'\nnot_a_key = 4\n").expect("written");
    let found = Config::admin_source(&file).expect("the socket");
    assert_eq!(found, UnixSource::Path("/a".into()));
    std::fs::write(&file, "").expect("written");
    let found = Config::admin_source(&file).expect("the default");
    assert_eq!(found, UnixSource::Path(DEFAULT_ADMIN_SOCKET.into()));
    std::fs::write(&file, "admin_socket = 4").expect("written");
    Config::admin_source(&file).expect_err("a number is no path");
}

#[test]
fn admin_http_conflicts_with_listeners() {
    let with = |admin: &str, address: &str| {
        let good = GOOD.replace("\"127.0.0.1:8080\"", address);
        format!("admin_http = '{admin}'\nadmin_http_allow_remote = true\n{good}")
    };
    for (admin, address) in [
        ("127.0.0.1:8080", "‹'127.0.0.1:8080'›"),
        ("127.0.0.1:8080", "‹'0.0.0.0:8080'›"),
        ("127.0.0.1:8080", "‹'[::]:8080'›"),
        ("0.0.0.0:8080", "‹'127.0.0.1:8080'›"),
        ("[::1]:8080", "‹'[::1]:8080'›"),
    ] {
        refused(&with(admin, address), "the address of `admin_http` already", "a different port");
    }
    for (admin, address) in [
        ("127.0.0.1:8080", "'127.0.0.1:8081'"),
        ("127.0.0.1:8080", "'127.0.0.2:8080'"),
        ("127.0.0.1:8080", "'[::]:8080'\nipv6_only = true"),
        ("127.0.0.1:0", "'127.0.0.1:0'"),
        ("127.0.0.1:8080", "'unix:/x'"),
    ] {
        assert_eq!(good(&with(admin, address)).warnings, [], "{admin} {address}");
    }
    let warnings = good(&format!("admin_http_allow_remote = true\n{GOOD}")).warnings;
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].0.message.contains("no effect without `admin_http`"), "{warnings:?}");
}

#[test]
fn a_slash_in_a_pool_name_is_refused() {
    let listener = "[[listener]]\nname = 'a'\naddress = '127.0.0.1:1'\npool = 'a/b'\n";
    refused(&format!("{listener}[pool.‹'a/b'›]\n"), "a slash in its name", "POOL/NAME");
}

#[test]
fn host_names_accepted_by_admin_http() {
    let config = good(&format!(
        "admin_http = '127.0.0.1:9900'\nadmin_http_hosts = ['Status.Example.ORG', 'web1.']\n{GOOD}"
    ));
    assert_eq!(config.admin_http_hosts, ["status.example.org", "web1"]);
    for name in ["", "http://a", "a:80", "a b", "a..b", ".", "größe.example"] {
        top_refused(
            &format!("admin_http = '127.0.0.1:9900'\nadmin_http_hosts = ['a', ‹'{name}'›]"),
            "not a host name",
            "without a scheme or a port",
        );
    }
    let config = good(&format!("admin_http_hosts = ['a']\n{GOOD}"));
    assert!(config.warnings[0].to_string().contains("no effect without `admin_http`"));
}

#[test]
fn equal_addresses_in_different_notation() {
    let two = |first: &str, second: &str| {
        format!(
            "{}[[listener]]\nname='o'\naddress={second}\npool='web'\n",
            GOOD.replace("\"127.0.0.1:8080\"", first)
        )
    };
    let real = tempfile::tempdir().expect("a directory");
    let link = real.path().join("link");
    std::os::unix::fs::symlink(real.path(), &link).expect("a link");
    let (real, link) = (real.path().display(), link.display());
    for (first, second) in [
        ("'127.0.0.1:8080'".to_owned(), "‹'[::ffff:127.0.0.1]:8080'›".to_owned()),
        ("'0.0.0.0:8080'".to_owned(), "‹'[::ffff:127.0.0.1]:8080'›".to_owned()),
        (format!("'unix:{real}/s'"), format!("‹'unix:{real}//./s'›")),
        (format!("'unix:{real}/s'"), format!("‹'unix:{link}/s'›")),
        // One path is the lock file of the other.
        (format!("'unix:{real}/s'"), format!("‹'unix:{real}/s.lock'›")),
    ] {
        refused(&two(&first, &second), "", "");
    }
    good(&two(&format!("'unix:{real}/s'"), &format!("'unix:{real}/t'")));
    top_refused(
        &format!("dispatch_socket = '{real}/s'\nadmin_socket = ‹'{link}/s'›"),
        "are the same",
        "",
    );
    // A loopback address in IPv6 notation is not a remote one.
    good(&format!("admin_http = '[::ffff:127.0.0.1]:9900'\n{GOOD}"));
    top_refused("admin_http = ‹'[::ffff:10.0.0.1]:9900'›", "other machines", "");
    // Workers connect by the absolute path.
    let cwd = std::env::current_dir().expect("a directory").as_os_str().len();
    let long = "x".repeat(107 - cwd - 1);
    good(&format!("dispatch_socket = '{long}'\n{GOOD}"));
    top_refused(
        &format!("dispatch_socket = ‹'{long}x'›"),
        "as an absolute path this has 108 bytes",
        "",
    );
}

#[test]
fn options_that_the_kernel_counts_in_whole_units() {
    for key in ["keepalive", "defer_accept"] {
        listener_refused(&format!("{key} = ‹'1500ms'›"), "must be whole seconds", "");
    }
    listener_refused("user_timeout = ‹'1500us'›", "must be whole milliseconds", "");
    let text = GOOD.replace("pool = \"web\"\n", "pool = \"web\"\nkeepalive = '2000ms'\n");
    assert_eq!(good(&text).listeners[0].options.keepalive, Some(Duration::from_secs(2)));
}
