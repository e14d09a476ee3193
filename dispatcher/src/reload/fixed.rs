//! Settings that a running dispatcher cannot change.

use crate::config::Config;

/// The changed settings that need a restart. Workers and operators connect to these sockets;
/// replacing them would strand both.
pub(super) fn fixed(old: &Config, new: &Config) -> Vec<String> {
    let mut keys = Vec::new();
    let ends = [
        ("dispatch_socket", &old.dispatch_socket, &new.dispatch_socket),
        ("admin_socket", &old.admin_socket, &new.admin_socket),
    ];
    for (key, old, new) in ends {
        let differs = [
            ("", old.source != new.source),
            ("_mode", old.mode != new.mode),
            ("_user", old.user != new.user),
            ("_group", old.group != new.group),
        ];
        let differs = differs.into_iter().filter(|(_, differs)| *differs);
        keys.extend(differs.map(|(end, _)| format!("{key}{end}")));
    }
    if old.admin_http != new.admin_http {
        keys.push("admin_http".to_owned());
    }
    if old.advice.listen != new.advice.listen {
        keys.push("advice_listen".to_owned());
    }
    // The address of a directory of its own may change.
    let started = old.relay.directory.is_some() || new.relay.directory.is_some();
    if started && old.relay != new.relay {
        let file = old.relay.directory != new.relay.directory;
        keys.push(if file { "relay_directory" } else { "relay_socket" }.to_owned());
    }
    if old.steer_pins != new.steer_pins {
        keys.push("steer_pins".to_owned());
    }
    keys
}
