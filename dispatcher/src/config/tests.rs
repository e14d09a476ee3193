//! Every kind of mistake: position of the caret, message and hint.

mod access_rules;
mod advice;
mod agent;
mod line;
mod proxy;
mod relay;
mod sample;
mod scores;
mod several;
mod spawn;
#[cfg(feature = "steer")]
mod steer;
mod whole;

use super::*;

/// A valid file around the tested part.
const GOOD: &str = "\
[[listener]]
name = \"web\"
address = \"127.0.0.1:8080\"
pool = \"web\"

[pool.web]
";

/// Parses a text in which `‹` and `›` enclose the marked part; checks position, message and hint.
#[track_caller]
fn refused(marked: &str, message: &str, help: &str) {
    let start = marked.find('‹').expect("a marked place");
    let end = marked.find('›').expect("its end") - '‹'.len_utf8();
    let text = marked.replace(['‹', '›'], "");
    let error = Config::parse(&text, "test.toml").expect_err("this should be refused");
    let found = error.diagnostic().expect("a place").clone();
    check_place(&found, &text, start, end);
    assert!(found.message.contains(message), "message: {}", found.message);
    let said = found.help.clone().unwrap_or_default();
    assert!(said.contains(help), "help: {said}");

    // The printed form points at the same position.
    let shown = error.to_string();
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines[0], format!("test.toml:{}:{}: {}", found.line, found.column, found.message));
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

/// The valid file with `line` added to `[pool.web]`.
#[track_caller]
fn pool_refused(line: &str, message: &str, help: &str) {
    refused(&format!("{GOOD}{line}\n"), message, help);
}

/// The valid file with `line` added to its `[[listener]]`.
#[track_caller]
fn listener_refused(line: &str, message: &str, help: &str) {
    refused(&GOOD.replace("pool = \"web\"\n", &format!("pool = \"web\"\n{line}\n")), message, help);
}

/// The valid file with `line` at its top.
#[track_caller]
fn top_refused(line: &str, message: &str, help: &str) {
    refused(&format!("{line}\n{GOOD}"), message, help);
}

/// The valid file with another address.
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
fn levels_of_the_log() {
    let config = good(&format!("log_level = 'debug'\n{GOOD}"));
    assert_eq!(config.limits.log_level, log::LevelFilter::Debug);
    top_refused("log_level = ‹'inf'›", "unknown value `inf`", "did you mean `info`?");
}

#[test]
fn the_smallest_configuration() {
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
    assert_eq!(listener.address, Address::Tcp(([127, 0, 0, 1], 8080).into()));
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
    let names: Vec<&str> = config.pools.iter().map(|p| p.settings.name.as_str()).collect();
    assert_eq!(names, ["zebra", "ant"]);
    assert_eq!(config.listeners[0].address, Address::Unix("/b".into()));
    assert_eq!(config.listeners[0].pool, 0);
    assert_eq!(config.listeners[1].address, Address::Systemd("web".to_owned()));
    assert_eq!(config.listeners[1].pool, 1);
    assert_eq!(config.pools[1].settings.processes, 1);
}

#[test]
fn a_pool_overrides_the_defaults() {
    let config = good(&format!(
        "[defaults]\nhandoff_timeout = '1s'\nmax_untaken = 8\n[defaults.spawn]\nprocesses = 3\n\
         {GOOD}max_untaken = 9\n[pool.web.spawn]\ncommand = ['a', 'b']\n\
         environment = {{ A = '1' }}\ndirectory = '/tmp'\non_dispatcher_loss = 'serve'\n[[listener]]\nname='o'\naddress='unix:/o'\npool='other'\n[pool.other]\n"
    ));
    let web = &config.pools[0];
    assert_eq!(web.settings.handoff_timeout, Duration::from_secs(1));
    assert_eq!(web.settings.max_untaken, 9);
    assert_eq!(web.settings.processes, 3);
    let spawn = web.spawn.as_ref().expect("processes");
    assert_eq!(spawn.command, ["a", "b"]);
    assert_eq!(spawn.environment, [("A".to_owned(), "1".to_owned())]);
    assert_eq!(spawn.on_dispatcher_loss, OnDispatcherLoss::Serve);
    assert_eq!(config.pools[1].settings.max_untaken, 8);
    assert!(config.pools[1].spawn.is_none());
}

#[test]
fn what_processes_do_without_a_dispatcher() {
    let action = |defaults: &str, own: &str| {
        let config = good(&format!(
            "[defaults.spawn]\n{defaults}\n{GOOD}[pool.web.spawn]\ncommand = ['x']\n{own}\n"
        ));
        config.pools[0].spawn.as_ref().expect("processes").on_dispatcher_loss
    };
    assert_eq!(action("", ""), OnDispatcherLoss::Drain);
    assert_eq!(action("on_dispatcher_loss = 'stop'", ""), OnDispatcherLoss::Stop);
    for every in [OnDispatcherLoss::Serve, OnDispatcherLoss::Drain, OnDispatcherLoss::Stop] {
        let own = format!("on_dispatcher_loss = '{}'", every.name());
        assert_eq!(action("on_dispatcher_loss = 'stop'", &own), every);
    }
    pool_refused(
        "[pool.web.spawn]\ncommand=['x']\non_dispatcher_loss = ‹'end'›",
        "unknown value `end`",
        "serve, drain, stop",
    );
}

#[test]
fn modes() {
    for (written, bits) in
        [("'0660'", 0o660), ("'660'", 0o660), ("0o600", 0o600), ("'0o777'", 0o777), ("'0'", 0)]
    {
        let config = good(&format!("dispatch_socket_mode = {written}\n{GOOD}"));
        assert_eq!(config.dispatch_socket.mode, bits, "{written}");
    }
    top_refused("dispatch_socket_mode = ‹'1000'›", "from \"0000\" to \"0777\"", "0660");
    top_refused("admin_socket_mode = ‹'rw'›", "in octal", "0660");
    top_refused("admin_socket_mode = ‹660›", "in octal", "0o660");
    top_refused("admin_socket_mode = ‹true›", "wrong type", "");
    listener_refused("mode = ‹'888'›", "in octal", "0660");
}

#[test]
fn not_toml() {
    refused("name ‹›", "expected", "");
    refused("a =‹›\n", "", "");
    top_refused("dispatch_socket = '/a'\n‹dispatch_socket› = '/b'", "duplicate key", "");
}

#[test]
fn unknown_keys() {
    top_refused("‹dispach_socket› = '/a'", "unknown key `dispach_socket`", "`dispatch_socket`?");
    listener_refused("‹no_delay› = true", "unknown key `no_delay`", "did you mean `nodelay`?");
    pool_refused("‹max-untaken› = 1", "unknown key `max-untaken`", "`max_untaken`?");
    pool_refused("‹max_connections› = 1", "unknown key", "`max_connections_per_worker`?");
    pool_refused("‹zzzzzzzzz› = 1", "unknown key", "the keys here are: policy, ");
    pool_refused("[pool.web.spawn]\n‹comand› = ['x']", "unknown key", "`command`?");
    top_refused("[defaults]\n‹polcy› = 'x'", "unknown key `polcy`", "did you mean `policy`?");
    top_refused("[‹listeners›]\n", "unknown key", "`listener`?");
}

#[test]
fn valid_keys_in_the_wrong_table() {
    pool_refused("‹admin_socket› = '/a'", "unknown key", "top-level key: move it above");
    pool_refused("‹processes› = 4", "unknown key", "belongs in [pool.NAME.spawn]");
    listener_refused("‹max_untaken› = 4", "unknown key", "belongs in [pool.NAME]");
    top_refused("‹policy› = 4", "unknown key", "belongs in [pool.NAME]");
}

#[test]
fn wrong_types() {
    top_refused("dispatch_socket = ‹4›", "wrong type: integer `4`, expected a string", "");
    pool_refused("max_untaken = ‹'many'›", "expected a whole number from 1 to 4096", "");
    pool_refused("handoff_timeout = ‹200›", "expected a duration with its unit", "");
    pool_refused("allow_users = ‹'www'›", "expected an array", "");
    listener_refused("nodelay = ‹'yes'›", "expected a boolean", "");
    refused("‹[listener]›\nname = 'a'\n", "expected an array", "[[listener]]");
    refused("pool = ‹4›", "wrong type: integer `4`, expected a table", "");
}

#[test]
fn numbers_out_of_range() {
    top_refused("accept_batch = ‹0›", "from 1 to 4096, not 0", "");
    top_refused("max_pending_hellos = ‹-1›", "not -1", "");
    pool_refused("max_connections_per_worker = ‹0›", "must be from 1", "");
    pool_refused("max_untaken = ‹4097›", "from 1 to 4096, not 4097", "");
    pool_refused("max_workers = ‹0›", "must be from 1", "");
    pool_refused("[pool.web.spawn]\ncommand=['x']\nprocesses = ‹0›", "from 1 to 1024", "");
    listener_refused("backlog = ‹0›", "must be from 1", "");
    listener_refused("keepalive_count = ‹128›", "from 1 to 127", "");
    pool_refused("allow_users = [‹-2›]", "-2 is not a user id", "");
    pool_refused("allow_groups = [0, ‹99999999999›]", "not a group id", "");
}

#[test]
fn durations() {
    pool_refused("handoff_timeout = ‹'soon'›", "`soon` is not a duration", "\"200ms\"");
    pool_refused("handoff_timeout = ‹'10'›", "is not a duration", "\"10s\"");
    pool_refused("handoff_timeout = ‹'0s'›", "at least \"1ms\"", "");
    pool_refused("max_handoff_timeout = ‹'10y'›", "at most", "");
    top_refused("admin_http = ‹'here'›", "not an address and a port", "127.0.0.1:9900");
    top_refused("admin_http = ‹'0.0.0.0:9900'›", "other machines", "admin_http_allow_remote");
    top_refused("busy_poll = ‹'2s'›", "at most \"1s\"", "");
    top_refused("resource_pause = ‹'0ms'›", "at least \"1ms\"", "");
    listener_refused("keepalive = ‹'10ms'›", "at least \"1s\"", "");
    let config = good(&format!("{GOOD}wait_for_worker = '0s'\nmax_handoff_timeout = '1m 30s'\n"));
    assert_eq!(config.pools[0].settings.wait_for_worker, Duration::ZERO);
    assert_eq!(config.pools[0].settings.max_handoff_timeout, Duration::from_secs(90));
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
    refused(&other(&format!("unix:/{}", "x".repeat(107))), "the kernel allows 107", "");
    refused(&other("systemd:a:b"), "not a name that systemd", "FileDescriptorName=");
    top_refused("dispatch_socket = ‹''›", "needs a path", "");
    top_refused("dispatch_socket = ‹'unix:/a'›", "is a path", "omit");
    top_refused("dispatch_socket = ‹'/run/a:b/d.sock'›", "has a `:`", "separate several sockets");
    top_refused("admin_socket = ‹'systemd:'›", "not a name", "");
    assert_eq!(
        good(&format!("dispatch_socket = 'systemd:dispatch'\n{GOOD}")).dispatch_socket.source,
        UnixSource::Systemd("dispatch".to_owned())
    );
}

#[cfg(not(feature = "steer"))]
#[test]
fn a_pool_cannot_be_steered_without_the_feature() {
    let spawn = "[pool.web.spawn]\ncommand = [\"/bin/sh\", \"{addr}\", \"{port}\"]\n";
    refused(
        &format!("{GOOD}mode = ‹\"steer\"›\n{spawn}"),
        "it was built without the feature",
        "--features steer",
    );
}
