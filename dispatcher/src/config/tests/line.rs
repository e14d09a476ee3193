//! The socket of the line protocol.

use super::*;

#[test]
fn a_line_socket_is_off_by_default_and_private() {
    assert_eq!(good(GOOD).pools[0].line, None);
    let config = good(&format!("{GOOD}line_socket = \"/run/line.sock\"\n"));
    let line = config.pools[0].line.clone().expect("it is configured");
    assert_eq!((line.path.to_str(), line.mode), (Some("/run/line.sock"), 0o600));
    assert!(line.types.is_empty());
    let text = format!(
        "{GOOD}line_socket = \"/run/line.sock\"\nline_socket_mode = \"0660\"\n\
         line_types = {{ \"chat room\" = \"web\" }}\n"
    );
    let line = good(&text).pools[0].line.clone().expect("it is configured");
    assert_eq!(line.mode, 0o660);
    assert_eq!(line.types.get("chat room").map(String::as_str), Some("web"));
    let text = format!("[defaults]\nline_socket_mode = \"0620\"\n{GOOD}line_socket = \"/run/l\"\n");
    assert_eq!(good(&text).pools[0].line.as_ref().map(|line| line.mode), Some(0o620));
}

#[test]
fn a_line_socket_is_never_writable_for_all() {
    let bad = |mode: &str| format!("line_socket = \"/run/l\"\nline_socket_mode = ‹{mode}›");
    pool_refused(&bad("\"0666\""), "every user of this machine could connect", "\"0600\"");
    pool_refused(&bad("0o602"), "every user of this machine could connect", "allow_users");
    pool_refused(&bad("660"), "must be written in octal", "such as");
}

#[test]
fn a_line_socket_is_a_path_of_its_own() {
    pool_refused("line_socket = ‹\"systemd:x\"›", "`line_socket` is a path", "/run/");
    pool_refused("line_socket = ‹\"unix:/run/l\"›", "`line_socket` is a path", "\"/run/l\"");
    pool_refused("line_socket = ‹\"\"›", "a socket needs a path", "");
    let path = DEFAULT_DISPATCH_SOCKET;
    pool_refused(&format!("line_socket = ‹\"{path}\"›"), "`dispatch_socket` already", "each");
    let path = DEFAULT_ADMIN_SOCKET;
    pool_refused(&format!("line_socket = ‹\"{path}\"›"), "`admin_socket` already", "each");
    let two = "line_socket = \"/run/l\"\n[pool.two]\nline_socket = ‹\"/run/./l\"›";
    pool_refused(two, "the `line_socket` of pool `web` already", "a different path");
    let listener = GOOD.replace("127.0.0.1:8080", "unix:/run/l");
    let text = format!("{listener}line_socket = ‹\"/run/l\"›\n");
    refused(&text, "the address of listener `web` already", "a different path");
    let defaults = format!("[defaults]\nline_socket = ‹\"/run/l\"›\n{GOOD}");
    refused(&defaults, "each pool needs a `line_socket` of its own", "[pool.NAME]");
}

#[test]
fn types_name_pools_that_exist() {
    let bad = |types: &str| format!("line_socket = \"/run/l\"\nline_types = {{ {types} }}");
    pool_refused(&bad("a = ‹\"wbe\"›"), "there is no pool `wbe`", "did you mean `web`?");
    pool_refused(&bad("‹\"\"› = \"web\""), "a type has 1 to 64 bytes", "type=");
    let long = format!("‹\"{}\"› = \"web\"", "x".repeat(65));
    pool_refused(&bad(&long), "a type has 1 to 64 bytes", "");
    for socket in ["", "line_socket = \"/run/l\"\n"] {
        let text = format!("[defaults]\nline_types = {{ a = ‹\"wbe\"› }}\n{GOOD}{socket}");
        refused(&text, "there is no pool `wbe`", "did you mean `web`?");
    }
}

#[test]
fn keys_without_effect_are_named() {
    let text = format!("{GOOD}line_socket_mode = \"0600\"\nline_types = {{ a = \"web\" }}\n");
    let warnings = good(&text).warnings;
    let messages: Vec<&str> = warnings.iter().map(|it| it.0.message.as_str()).collect();
    assert_eq!(messages, ["this has no effect without `line_socket`"; 2]);
    let text = format!(
        "{GOOD}policy = \"least-score\"\nline_socket = \"/run/l\"\n\
         [pool.web.scores]\nmultipliers = {{ connections = 1, queue_wait = 5 }}\n"
    );
    let warnings = good(&text).warnings;
    assert!(warnings[0].0.message.contains("never chooses them"), "{warnings:?}");
}
