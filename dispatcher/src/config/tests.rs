//! Every kind of mistake: where the caret is, what is said, what is suggested.

use super::*;

/// A good file around one part that is being tested.
const GOOD: &str = "\
[[listener]]
name = \"web\"
address = \"127.0.0.1:8080\"
pool = \"web\"

[pool.web]
";

/// Parses a text in which `‹` and `›` enclose what the caret should mark, and checks place, message and help.
#[track_caller]
fn refused(marked: &str, message: &str, help: &str) {
    let start = marked.find('‹').expect("a marked place");
    let end = marked.find('›').expect("its end") - '‹'.len_utf8();
    let text = marked.replace(['‹', '›'], "");
    let error = Config::parse(&text, "test.toml").expect_err("this should be refused");
    let found = error.diagnostic().expect("a place").clone();
    check_place(&found, &text, start, end);
    assert!(
        found.message.contains(message),
        "message: {}",
        found.message
    );
    let said = found.help.clone().unwrap_or_default();
    assert!(said.contains(help), "help: {said}");

    // And the printed form points at the same place.
    let shown = error.to_string();
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(
        lines[0],
        format!(
            "test.toml:{}:{}: {}",
            found.line, found.column, found.message
        )
    );
    let gutter = lines[1].find("| ").expect("a gutter") + 2;
    assert_eq!(&lines[1][gutter..], found.text);
    assert_eq!(lines[2].find("| "), Some(gutter - 2));
    let caret = lines[2].find('^').expect("a caret");
    assert_eq!(caret - gutter + 1, found.column);
    assert_eq!(lines[2].matches('^').count(), found.width);
}

#[track_caller]
fn check_place(found: &Diagnostic, text: &str, start: usize, end: usize) {
    let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
    assert_eq!(
        (found.line, found.column, found.width),
        (
            text[..start].matches('\n').count() + 1,
            text[line_start..start].chars().count() + 1,
            text[start..end].chars().count().max(1),
        ),
        "{found:?}"
    );
}

/// The good file with `line` added to `[pool.web]`.
#[track_caller]
fn pool_refused(line: &str, message: &str, help: &str) {
    refused(&format!("{GOOD}{line}\n"), message, help);
}

/// The good file with `line` added to its `[[listener]]`.
#[track_caller]
fn listener_refused(line: &str, message: &str, help: &str) {
    refused(
        &GOOD.replace("pool = \"web\"\n", &format!("pool = \"web\"\n{line}\n")),
        message,
        help,
    );
}

/// The good file with `line` at its top.
#[track_caller]
fn top_refused(line: &str, message: &str, help: &str) {
    refused(&format!("{line}\n{GOOD}"), message, help);
}

/// The good file with another address.
#[track_caller]
fn address_refused(address: &str, help: &str) {
    refused(
        &GOOD.replace("\"127.0.0.1:8080\"", &format!("‹\"{address}\"›")),
        "is not an address",
        help,
    );
}

fn good(text: &str) -> Config {
    Config::parse(text, "test.toml").unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn the_least_there_can_be() {
    let config = good(GOOD);
    assert_eq!(config.warnings, []);
    assert_eq!(config.limits, Limits::default());
    assert_eq!(
        config.dispatch_socket,
        UnixEndpoint {
            source: UnixSource::Path(DEFAULT_DISPATCH_SOCKET.into()),
            mode: 0o666,
            user: None,
            group: None
        }
    );
    assert_eq!(config.admin_socket.mode, 0o600);
    let listener = &config.listeners[0];
    assert_eq!(listener.options, ListenerOptions::default());
    assert_eq!(
        listener.address,
        Address::Tcp(([127, 0, 0, 1], 8080).into())
    );
    let pool = &config.pools[0];
    assert_eq!(pool.settings.max_connections_per_worker, 10_000);
    assert_eq!(pool.settings.max_untaken, 256);
    assert_eq!(pool.settings.processes, 0);
    assert!(pool.settings.access.users.contains(&0));
    assert!(pool.spawn.is_none());
}

#[test]
fn pools_and_listeners_keep_their_order() {
    let config = good(
        "[[listener]]\nname='b'\naddress='unix:/b'\npool='zebra'\n\
         [[listener]]\nname='a'\naddress='systemd:web'\npool='ant'\n\
         [pool.zebra]\n[pool.ant]\n[pool.ant.spawn]\ncommand=['x']\n",
    );
    let names: Vec<&str> = config
        .pools
        .iter()
        .map(|p| p.settings.name.as_str())
        .collect();
    assert_eq!(names, ["zebra", "ant"]);
    assert_eq!(config.listeners[0].address, Address::Unix("/b".into()));
    assert_eq!(config.listeners[0].pool, 0);
    assert_eq!(
        config.listeners[1].address,
        Address::Systemd("web".to_owned())
    );
    assert_eq!(config.listeners[1].pool, 1);
    assert_eq!(config.pools[1].settings.processes, 1);
}

#[test]
fn a_pool_overrides_the_defaults() {
    let config = good(&format!(
        "[defaults]\nhandoff_timeout = '1s'\nmax_untaken = 8\n[defaults.spawn]\nprocesses = 3\n\
         {GOOD}max_untaken = 9\n[pool.web.spawn]\ncommand = ['a', 'b']\n\
         environment = {{ A = '1' }}\ndirectory = '/tmp'\n[[listener]]\nname='o'\naddress='unix:/o'\npool='other'\n[pool.other]\n"
    ));
    let web = &config.pools[0];
    assert_eq!(web.settings.handoff_timeout, Duration::from_secs(1));
    assert_eq!(web.settings.max_untaken, 9);
    assert_eq!(web.settings.processes, 3);
    let spawn = web.spawn.as_ref().expect("processes");
    assert_eq!(spawn.command, ["a", "b"]);
    assert_eq!(spawn.environment, [("A".to_owned(), "1".to_owned())]);
    assert_eq!(config.pools[1].settings.max_untaken, 8);
    assert!(config.pools[1].spawn.is_none());
}

#[test]
fn modes() {
    for (written, bits) in [
        ("'0660'", 0o660),
        ("'660'", 0o660),
        ("0o600", 0o600),
        ("'0o777'", 0o777),
        ("'0'", 0),
    ] {
        let config = good(&format!("dispatch_socket_mode = {written}\n{GOOD}"));
        assert_eq!(config.dispatch_socket.mode, bits, "{written}");
    }
    top_refused(
        "dispatch_socket_mode = ‹'1000'›",
        "from \"0000\" to \"0777\"",
        "0660",
    );
    top_refused("admin_socket_mode = ‹'rw'›", "in octal", "0660");
    top_refused("admin_socket_mode = ‹660›", "in octal", "0o660");
    top_refused("admin_socket_mode = ‹true›", "wrong type", "");
    listener_refused("mode = ‹'888'›", "in octal", "0660");
}

#[test]
fn not_toml() {
    refused("name ‹›", "expected", "");
    refused("a =‹›\n", "", "");
    top_refused(
        "dispatch_socket = '/a'\n‹dispatch_socket› = '/b'",
        "duplicate key",
        "",
    );
}

#[test]
fn unknown_keys() {
    top_refused(
        "‹dispach_socket› = '/a'",
        "unknown key `dispach_socket`",
        "`dispatch_socket`?",
    );
    listener_refused(
        "‹no_delay› = true",
        "unknown key `no_delay`",
        "did you mean `nodelay`?",
    );
    pool_refused(
        "‹max-untaken› = 1",
        "unknown key `max-untaken`",
        "`max_untaken`?",
    );
    pool_refused(
        "‹max_connections› = 1",
        "unknown key",
        "`max_connections_per_worker`?",
    );
    pool_refused(
        "‹zzzzzzzzz› = 1",
        "unknown key",
        "the keys here are: policy, ",
    );
    pool_refused(
        "[pool.web.spawn]\n‹comand› = ['x']",
        "unknown key",
        "`command`?",
    );
    top_refused(
        "[defaults]\n‹polcy› = 'x'",
        "unknown key `polcy`",
        "did you mean `policy`?",
    );
    top_refused("[‹listeners›]\n", "unknown key", "`listener`?");
}

#[test]
fn good_keys_in_the_wrong_table() {
    pool_refused(
        "‹admin_socket› = '/a'",
        "unknown key",
        "top-level key: move it above",
    );
    pool_refused(
        "‹processes› = 4",
        "unknown key",
        "belongs in [pool.NAME.spawn]",
    );
    listener_refused("‹max_untaken› = 4", "unknown key", "belongs in [pool.NAME]");
    top_refused("‹policy› = 4", "unknown key", "belongs in [pool.NAME]");
}

#[test]
fn wrong_types() {
    top_refused(
        "dispatch_socket = ‹4›",
        "wrong type: integer `4`, expected a string",
        "",
    );
    pool_refused(
        "max_untaken = ‹'many'›",
        "expected a whole number from 1 to 4096",
        "",
    );
    pool_refused(
        "handoff_timeout = ‹200›",
        "expected a duration with its unit",
        "",
    );
    pool_refused("allow_users = ‹'www'›", "expected an array", "");
    listener_refused("nodelay = ‹'yes'›", "expected a boolean", "");
    refused(
        "‹[listener]›\nname = 'a'\n",
        "expected an array",
        "[[listener]]",
    );
    refused(
        "pool = ‹4›",
        "wrong type: integer `4`, expected a table",
        "",
    );
}

#[test]
fn numbers_out_of_range() {
    top_refused("accept_batch = ‹0›", "from 1 to 4096, not 0", "");
    top_refused("max_pending_hellos = ‹-1›", "not -1", "");
    pool_refused("max_connections_per_worker = ‹0›", "must be from 1", "");
    pool_refused("max_untaken = ‹4097›", "from 1 to 4096, not 4097", "");
    pool_refused("max_workers = ‹0›", "must be from 1", "");
    pool_refused(
        "[pool.web.spawn]\ncommand=['x']\nprocesses = ‹0›",
        "from 1 to 1024",
        "",
    );
    listener_refused("backlog = ‹0›", "must be from 1", "");
    listener_refused("keepalive_count = ‹128›", "from 1 to 127", "");
    pool_refused("allow_users = [‹-2›]", "-2 is not a user id", "");
    pool_refused("allow_groups = [0, ‹99999999999›]", "not a group id", "");
}

#[test]
fn durations() {
    pool_refused(
        "handoff_timeout = ‹'soon'›",
        "`soon` is not a duration",
        "\"200ms\"",
    );
    pool_refused("handoff_timeout = ‹'10'›", "is not a duration", "\"10s\"");
    pool_refused("handoff_timeout = ‹'0s'›", "at least \"1ms\"", "");
    pool_refused("probation = ‹'10y'›", "at most", "");
    top_refused("resource_pause = ‹'0ms'›", "at least \"1ms\"", "");
    listener_refused("keepalive = ‹'10ms'›", "at least \"1s\"", "");
    let config = good(&format!(
        "{GOOD}wait_for_worker = '0s'\nprobation = '1m 30s'\n"
    ));
    assert_eq!(config.pools[0].settings.wait_for_worker, Duration::ZERO);
    assert_eq!(config.pools[0].settings.probation, Duration::from_secs(90));
}

#[test]
fn addresses() {
    address_refused("localhost:80", "\"127.0.0.1:80\"");
    address_refused("8080", "\"0.0.0.0:8080\"");
    address_refused(":8080", "\"[::]:8080\"");
    address_refused("*:8080", "\"0.0.0.0:8080\"");
    address_refused("127.0.0.1", "add a port: \"127.0.0.1:8080\"");
    address_refused("::1", "add a port: \"[::1]:8080\"");
    address_refused("fe80::1::80", "put the IPv6 address in brackets");
    address_refused("127.0.0.1:99999", "a port is a number");
    address_refused("/run/x.sock", "\"unix:/run/x.sock\"");
    address_refused("", "\"systemd:NAME\"");
    let other = |address: &str| GOOD.replace("\"127.0.0.1:8080\"", &format!("‹'{address}'›"));
    refused(&other("unix:"), "a socket needs a path", "");
    refused(
        &other(&format!("unix:/{}", "x".repeat(107))),
        "the kernel allows 107",
        "",
    );
    refused(
        &other("systemd:a:b"),
        "not a name that systemd",
        "FileDescriptorName=",
    );
    top_refused("dispatch_socket = ‹''›", "needs a path", "");
    top_refused("dispatch_socket = ‹'unix:/a'›", "is a path", "leave out");
    top_refused("admin_socket = ‹'systemd:'›", "not a name", "");
    assert_eq!(
        good(&format!("dispatch_socket = 'systemd:dispatch'\n{GOOD}"))
            .dispatch_socket
            .source,
        UnixSource::Systemd("dispatch".to_owned())
    );
}

#[test]
fn two_of_a_kind() {
    let second = |name: &str, address: &str| {
        format!("{GOOD}[[listener]]\nname = {name}\naddress = {address}\npool = 'web'\n")
    };
    refused(
        &second("‹'web'›", "'127.0.0.1:1'"),
        "there is a listener `web` already",
        "",
    );
    refused(
        &second("'b'", "‹'127.0.0.1:8080'›"),
        "`web` has this address already",
        "",
    );
    good(&second("'b'", "'127.0.0.1:8081'"));
    refused(
        &second("'b'", "‹'[::]:8080'›"),
        "takes this IPv4 port",
        "ipv6_only = true",
    );
    good(&second("'b'", "'[::]:8080'\nipv6_only = true"));
    top_refused(
        "dispatch_socket = '/x'\nadmin_socket = ‹'/x'›",
        "are the same",
        "a path of its own",
    );
    refused(
        &format!("admin_socket = '/x'\n{}", second("'b'", "‹'unix:/x'›")),
        "this is `admin_socket` already",
        "",
    );
    let any = GOOD.replace("8080", "0");
    good(&format!(
        "{any}[[listener]]\nname = 'b'\naddress = '127.0.0.1:0'\npool = 'web'\n"
    ));
}

#[test]
fn names() {
    let named = |name: &str| GOOD.replace("name = \"web\"", &format!("name = ‹'{name}'›"));
    for bad in ["", "two words", "ünïcode", &"x".repeat(65)] {
        refused(&named(bad), "not a good name for a listener", "1 to 64");
    }
    refused(
        &GOOD.replace("[pool.web]", "[pool.‹\"a b\"›]"),
        "not a good name for a pool",
        "",
    );
    good(&named(&"x".repeat(64)).replace(['‹', '›'], ""));
}

#[test]
fn missing_things() {
    refused("‹›", "no pool is configured", "[pool.web]");
    refused(
        "‹›[pool.web]\n",
        "no listener is configured",
        "[[listener]]",
    );
    refused(
        "‹[[listener]]›\nname='a'\npool='web'\n[pool.web]\n",
        "missing key `address`",
        "",
    );
    pool_refused(
        "‹[pool.web.spawn]›\nprocesses = 2",
        "missing key `command`",
        "program",
    );
    pool_refused("[pool.web.spawn]\ncommand = ‹[]›", "`command` is empty", "");
    pool_refused(
        "[pool.web.spawn]\ncommand = [‹''›]",
        "the program has no name",
        "",
    );
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
    pool_refused(
        "policy = ‹'random'›",
        "unknown value",
        "the values are: least-connections",
    );
}

#[test]
fn environment() {
    let spawn = "[pool.web.spawn]\ncommand=['x']\n";
    pool_refused(
        &format!("{spawn}environment = {{ ‹DISPATCH_TOKEN› = 'x' }}"),
        "the dispatcher itself sets",
        "",
    );
    pool_refused(
        &format!("{spawn}environment = {{ ‹'a=b'› = 'x' }}"),
        "not a name",
        "",
    );
    pool_refused(
        &format!("{spawn}environment = {{ A = ‹1› }}"),
        "wrong type",
        "",
    );
    pool_refused(
        &format!("{spawn}directory = ‹\"/\\u0000\"›"),
        "zero byte",
        "",
    );
}

#[test]
fn unavailable_response() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("response");
    let line = format!("unavailable_response = ‹'{}'›", path.display());
    pool_refused(&line, "cannot be read", "no worker");
    std::fs::write(&path, b"busy").expect("written");
    let config = good(&format!("{GOOD}{}", line.replace(['‹', '›'], "")));
    assert_eq!(
        config.pools[0].unavailable_response.as_deref(),
        Some(&b"busy"[..])
    );
    std::fs::write(&path, vec![0; MAX_UNAVAILABLE_RESPONSE + 1]).expect("written");
    pool_refused(&line, "longer than 64 KiB", "");
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
    // Nobody is let in instead of somebody unknown.
    let nobody = good(&format!("{GOOD}allow_users = ['no-such-user']\n"));
    assert_eq!(nobody.pools[0].settings.access.users, [] as [u32; 0]);
}

#[test]
fn other_warnings() {
    let warned = |text: &str, message: &str| {
        let config = good(text);
        assert!(
            config
                .warnings
                .iter()
                .any(|w| w.0.message.contains(message)),
            "{:?}",
            config.warnings
        );
    };
    warned(
        &format!("{GOOD}[pool.idle]\n"),
        "no listener sends connections to pool `idle`",
    );
    let with = |line: &str| GOOD.replace("pool = \"web\"\n", &format!("pool = \"web\"\n{line}\n"));
    warned(&with("mode = '0600'"), "no effect on a TCP listener");
    warned(&with("ipv6_only = true"), "without an IPv6 address");
    warned(
        &with("keepalive_count = 3"),
        "no effect without `keepalive`",
    );
}

#[test]
fn carets_under_tabs_and_wide_letters() {
    let text = format!("{GOOD}allow_users = ['ä', 'ö']\n\tpolcy = 'x'\n");
    let error = Config::parse(&text, "t")
        .expect_err("an unknown key")
        .to_string();
    assert!(
        error.contains(" 8 | \tpolcy = 'x'\n   | \t^^^^^\n"),
        "{error}"
    );
    pool_refused("allow_users = ['1', \"ä\", ‹true›]", "wrong type", "");
    refused(
        "dispatch_socket = '/a'\r\n‹nope_nope_nope› = 1\r\n",
        "unknown key",
        "",
    );
}

#[test]
fn files_that_cannot_be_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let missing = directory.path().join("none.toml");
    let error = Config::load(&missing)
        .expect_err("no such file")
        .to_string();
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
