//! Pools whose processes inherit listeners at the public addresses (`ports = "shared"`).

use toml::Spanned;

use super::super::error::Mistake;
use super::super::file::{ListenerKeys, PoolKeys};
use super::super::validate::Check;
use super::super::{ListenerOptions, ReadyCheck, Spawn};
use super::{Fallback, Ports};

/// Most public addresses of such a pool.
pub(super) const MAX_ADDRESSES: usize = 32;

/// Keys of a pool that are not possible where the kernel's hash may choose.
pub(super) fn refuse(
    check: &mut Check<'_>,
    (keys, defaults): (&PoolKeys, &PoolKeys),
    spawn: Option<&Spawn>,
) {
    let (Some(own), Some(spawn)) = (&keys.spawn, spawn) else { return };
    let defaults = defaults.spawn.as_ref().map(Spanned::get_ref);
    if let ReadyCheck::Http(_) = spawn.ready_check {
        let own = own.get_ref().ready_check.as_ref();
        let key = own.or(defaults.and_then(|it| it.ready_check.as_ref()));
        let span = key.map_or(0..0, Spanned::span);
        check.mistake(
            Mistake::new(span, "with fallback = \"hash\" a process cannot be asked by itself")
                .help(
                    "ready_check = \"tcp\": it is ready when it accepts a connection; or remove \
                 `fallback`",
                ),
        );
    }
}

/// Each way of listening has a fallback of its own.
pub(super) fn check_fallback(check: &mut Check<'_>, key: &Spanned<Fallback>, ports: Ports) {
    let (message, help) = match (ports, key.get_ref()) {
        (Ports::Own, Fallback::Pass) | (Ports::Shared, Fallback::Hash) => return,
        (Ports::Shared, Fallback::Pass) => (
            "a server that inherits a listener takes no connections that are passed",
            "fallback = \"hash\": the kernel's own hash chooses among the listeners then",
        ),
        (Ports::Own, Fallback::Hash) => (
            "the kernel's hash chooses only among listeners that processes inherit",
            "write {fd} in the command or ports = \"shared\" if the server can inherit a listener, \
             or remove `fallback`",
        ),
    };
    check.mistake(Mistake::new(key.span(), message).help(help));
}

/// Keys of a listener of such a pool; then its options.
pub(super) fn listener(check: &mut Check<'_>, keys: &ListenerKeys, options: &mut ListenerOptions) {
    let refused = [
        ("ipv6_only", keys.ipv6_only.as_ref().filter(|on| *on.get_ref()), "[::] is for IPv4, too"),
        ("free_bind", keys.free_bind.as_ref().filter(|on| *on.get_ref()), "it must exist"),
    ];
    for (name, key, help) in refused {
        let Some(key) = key else { continue };
        let message = format!("`{name}` is not possible where processes inherit listeners");
        check.mistake(Mistake::new(key.span(), message).help(format!("remove it: {help}")));
    }
    // The workers' listeners join this one at its address.
    (options.bind_only, options.reuse_port) = (true, true);
}
