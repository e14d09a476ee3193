//! Keys that mean nothing where the kernel chooses; each is refused with the reason.

use std::ops::Range;

use toml::Spanned;

use super::super::affinity::AffinityKeys;
use super::super::error::Mistake;
use super::super::file::{ListenerKeys, PoolKeys};
use super::super::validate::Check;
use dispatcher_core::{KeySource, PoolSettings};

const BYTES: &str = "the kernel chooses before the first byte comes";

/// Affinity, the pool's own or that of `[defaults]`.
pub(super) fn refuse_affinity(
    check: &mut Check<'_>,
    keys: Option<&Spanned<AffinityKeys>>,
    settings: &PoolSettings,
) {
    let (Some(keys), Some(affinity)) = (keys, &settings.affinity) else { return };
    let reason = match &affinity.key {
        KeySource::ClientIp { .. } => "the kernel chooses by the policy alone",
        _ => BYTES,
    };
    let message = format!("`affinity` is not possible with mode = \"steer\": {reason}");
    check.mistake(Mistake::new(keys.span(), message).help(
        "policy = \"hash\" gives a client address the same worker; or write mode = \"pass\", or \
         affinity = { key = \"none\" } in this pool",
    ));
}

/// Keys of a pool that mean nothing where the kernel chooses.
pub(super) fn refuse_keys(check: &mut Check<'_>, keys: &PoolKeys) {
    const HISTORY: &str = "the kernel records no decisions";
    const JOIN: &str = "no worker connects to the dispatcher";
    fn span<T>(key: &Option<Spanned<T>>) -> Option<Range<usize>> {
        key.as_ref().map(Spanned::span)
    }
    fn list<T>(key: &Option<Vec<Spanned<T>>>) -> Option<Range<usize>> {
        key.as_ref().and_then(|all| all.first().map(Spanned::span))
    }
    let refused = [
        ("peek_timeout", span(&keys.peek_timeout), BYTES),
        ("peek_max_bytes", span(&keys.peek_max_bytes), BYTES),
        ("max_awaiting", span(&keys.max_awaiting), BYTES),
        ("scores", span(&keys.scores), "the kernel knows no gauges"),
        ("history", span(&keys.history), HISTORY),
        ("history_candidates", span(&keys.history_candidates), HISTORY),
        ("max_untaken", span(&keys.max_untaken), "workers have accept queues of their own"),
        ("unavailable_response", span(&keys.unavailable_response), "no process accepts clients"),
        ("line_socket", span(&keys.line_socket), JOIN),
        ("line_socket_mode", span(&keys.line_socket_mode), JOIN),
        ("line_types", span(&keys.line_types), JOIN),
        ("allow_users", list(&keys.allow_users), JOIN),
        ("allow_groups", list(&keys.allow_groups), JOIN),
    ];
    for (key, at, reason) in refused {
        let Some(at) = at else { continue };
        let message = format!("`{key}` is not possible with mode = \"steer\": {reason}");
        let help = "remove it, or write mode = \"pass\"";
        check.mistake(Mistake::new(at, message).help(help));
    }
}

/// Keys of a listener that mean nothing there.
pub(super) fn refuse_listener_keys(check: &mut Check<'_>, keys: &ListenerKeys) {
    const CLIENTS: &str = "the kernel's program does not look at clients";
    const PROXY: &str = "no process reads the header before the worker does";
    const SOCKET: &str = "each worker opens its own listener";
    fn span<T>(key: &Option<Spanned<T>>) -> Option<Range<usize>> {
        key.as_ref().map(Spanned::span)
    }
    let list = |key: &Option<Vec<Spanned<String>>>| {
        key.as_ref().map(|all| all.first().map_or_else(|| keys.name.span(), Spanned::span))
    };
    let refused = [
        ("allow", list(&keys.allow), CLIENTS),
        ("deny", list(&keys.deny), CLIENTS),
        ("rate_limit", span(&keys.rate_limit), CLIENTS),
        ("rate_burst", span(&keys.rate_burst), CLIENTS),
        ("max_queued_per_client", span(&keys.max_queued_per_client), CLIENTS),
        ("client_prefix_ipv4", span(&keys.client_prefix_ipv4), CLIENTS),
        ("client_prefix_ipv6", span(&keys.client_prefix_ipv6), CLIENTS),
        ("max_tracked_clients", span(&keys.max_tracked_clients), CLIENTS),
        ("proxy_protocol", span(&keys.proxy_protocol), PROXY),
        ("proxy_protocol_from", span(&keys.proxy_protocol_from), PROXY),
        ("proxy_timeout", span(&keys.proxy_timeout), PROXY),
        ("proxy_max_header", span(&keys.proxy_max_header), PROXY),
        ("backlog", span(&keys.backlog), SOCKET),
        ("nodelay", span(&keys.nodelay), SOCKET),
        ("keepalive", span(&keys.keepalive), SOCKET),
        ("keepalive_interval", span(&keys.keepalive_interval), SOCKET),
        ("keepalive_count", span(&keys.keepalive_count), SOCKET),
        ("user_timeout", span(&keys.user_timeout), SOCKET),
        ("defer_accept", span(&keys.defer_accept), SOCKET),
        ("fast_open", span(&keys.fast_open), SOCKET),
        ("receive_buffer", span(&keys.receive_buffer), SOCKET),
        ("send_buffer", span(&keys.send_buffer), SOCKET),
        ("reuse_port", span(&keys.reuse_port), SOCKET),
    ];
    for (key, at, reason) in refused {
        let Some(at) = at else { continue };
        let message = format!("`{key}` is not possible at a listener of a steered pool: {reason}");
        let help = match reason {
            CLIENTS => "use a firewall, such as nftables, or write mode = \"pass\" in the pool",
            SOCKET => "set it in the server, or write mode = \"pass\" in the pool",
            _ => "remove it, or write mode = \"pass\" in the pool",
        };
        check.mistake(Mistake::new(at, message).help(help));
    }
}
