//! The keys about the relay's directory.

use super::*;

fn with_spawn(keys: &str) -> String {
    format!("{keys}{GOOD}[pool.web.spawn]\ncommand = [\"/bin/true\"]\n")
}

fn told(config: &Config) -> Option<&str> {
    let spawn = config.pools[0].spawn.as_ref().expect("processes");
    let mut values = spawn.environment.iter().filter(|(name, _)| name == "DISPATCH_RELAY_SOCKET");
    let value = values.next().map(|(_, value)| value.as_str());
    assert_eq!(values.next(), None, "once");
    value
}

#[test]
fn the_socket_follows_from_the_keys() {
    let none = good(&with_spawn("relay_directory = false\n"));
    assert_eq!((&none.relay, told(&none)), (&RelaySettings::default(), None));
    let on = good(&with_spawn("relay_directory = true\ndispatch_socket = \"/run/a/d.sock\"\n"));
    assert_eq!(on.relay.directory, Some(RelayDirectory::Defaults));
    assert_eq!(told(&on), Some("/run/a/relay.sock"));
    let systemd = "relay_directory = true\ndispatch_socket = \"systemd:dispatch\"\n";
    assert_eq!(told(&good(&with_spawn(systemd))), Some("/run/dispatcher/relay.sock"));
    // A path is no template.
    let both = good(&with_spawn("relay_directory = true\nrelay_socket = \"/run/{n}.sock\"\n"));
    assert_eq!(told(&both), Some("/run/{{n}}.sock"));
    let other = good(&with_spawn("relay_socket = \"/run/r.sock\"\n"));
    assert_eq!((&other.relay.directory, told(&other)), (&None, Some("/run/r.sock")));
    // What the user sets stays.
    let own = "[pool.web.spawn.environment]\nDISPATCH_RELAY_SOCKET = \"/mine\"\n";
    assert_eq!(told(&good(&(with_spawn("relay_directory = true\n") + own))), Some("/mine"));
}

#[test]
fn the_file_of_the_directory_is_checked() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("directory.toml");
    let key = |rest: &str| format!("relay_directory = ‹\"{}\"›\n{rest}{GOOD}", file.display());
    refused(&key(""), "No such file", "dispatch-directory --check");
    std::fs::write(&file, "graze = \"1s\"").expect("written");
    refused(&key(""), "line 1: unknown field `graze`", "dispatch-directory --check");
    std::fs::write(&file, "nats = \"nats://n\"").expect("written");
    refused(&key(""), "serves one host", "relay_socket");
    std::fs::write(&file, "socket = \"/run/x.sock\"").expect("written");
    let plain = key("").replace(['‹', '›'], "");
    assert_eq!(good(&plain).relay.socket, Some("/run/x.sock".into()));
    let both = key("relay_socket = ‹\"/run/y.sock\"›\n").replacen('‹', "", 1).replacen('›', "", 1);
    refused(&both, "the file of the directory decides this", "remove `relay_socket`");
    refused(
        &format!("relay_directory = ‹1›\n{GOOD}"),
        "true, false, or the configuration file of the directory",
        "",
    );
}
