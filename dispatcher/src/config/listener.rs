//! A listener: its pool, its options, and warnings about options without effect.

use std::net::SocketAddr;

use toml::Spanned;

use super::address::address;
use super::error::{Mistake, suggest};
use super::file::ListenerKeys;
use super::validate::{Check, check_name};
use super::{Address, Listener, ListenerOptions, Pool, access_rules, advice, proxy};

impl Check<'_> {
    pub(super) fn listener(&mut self, keys: &ListenerKeys, pools: &[Pool]) -> Option<Listener> {
        self.keep(check_name(&keys.name, "listener"));
        let address = self.keep(address(&keys.address));
        let names = pools.iter().map(|pool| pool.settings.name.as_str());
        let wanted = keys.pool.get_ref();
        let pool = names
            .clone()
            .position(|name| name == wanted)
            .and_then(|position| u16::try_from(position).ok())
            .ok_or_else(|| {
                let message = format!("unknown pool `{wanted}`");
                let mistake = match pools.len() {
                    0 => Mistake::absence(keys.pool.span(), message),
                    _ => Mistake::new(keys.pool.span(), message),
                };
                mistake.help(suggest(wanted, "the pools are", names))
            });
        // A missing pool is reported separately.
        let pool = if pools.is_empty() { None } else { self.keep(pool) };
        let default = ListenerOptions::default();
        let options = ListenerOptions {
            backlog: keys.backlog.as_ref().map_or(default.backlog, |n| n.get_ref().0),
            ipv6_only: keys.ipv6_only.as_ref().map_or(default.ipv6_only, |flag| *flag.get_ref()),
            nodelay: keys.nodelay.as_ref().map_or(default.nodelay, |flag| *flag.get_ref()),
            keepalive: keys.keepalive.as_ref().map(|w| w.get_ref().0),
            keepalive_interval: keys.keepalive_interval.as_ref().map(|w| w.get_ref().0),
            keepalive_count: keys.keepalive_count.as_ref().map(|n| n.get_ref().0),
            user_timeout: keys.user_timeout.as_ref().map(|w| w.get_ref().0),
            defer_accept: keys.defer_accept.as_ref().map(|w| w.get_ref().0),
            fast_open: keys.fast_open.as_ref().map(|n| n.get_ref().0),
            receive_buffer: keys.receive_buffer.as_ref().map(|n| n.get_ref().0),
            send_buffer: keys.send_buffer.as_ref().map(|n| n.get_ref().0),
            reuse_port: keys.reuse_port.as_ref().map_or(default.reuse_port, |flag| *flag.get_ref()),
            bind_only: false,
            free_bind: keys.free_bind.as_ref().map_or(default.free_bind, |flag| *flag.get_ref()),
            mode: {
                let mode = self.mode(&keys.mode, default.mode);
                self.keep(mode).unwrap_or(default.mode)
            },
        };
        if let Some(address) = &address {
            self.useless_options(keys, address);
        }
        let access_rules = access_rules::access_rules(self, keys, address.as_ref());
        let advertise = keys.advertise.as_ref().map(advice::advertise);
        let advertise = advertise.and_then(|checked| self.keep(checked));
        let proxy = proxy::proxy_rules(self, keys, address.as_ref());
        let (address, pool) = (address?, pool?);
        Some(Listener {
            name: keys.name.get_ref().clone(),
            address_text: keys.address.get_ref().clone(),
            address,
            pool,
            advertise,
            options,
            access_rules,
            proxy,
        })
    }

    /// Warns about options that have no effect.
    fn useless_options(&mut self, keys: &ListenerKeys, address: &Address) {
        if let Address::Systemd(_) = address {
            self.useless_for_systemd(keys);
            return;
        }
        if let (Some(mode), Address::Tcp(_)) = (&keys.mode, address) {
            self.warn(Mistake::new(mode.span(), "`mode` has no effect on a TCP listener"));
        }
        if let (Some(flag), Address::Tcp(SocketAddr::V4(_)) | Address::Unix(_)) =
            (&keys.ipv6_only, address)
        {
            self.warn(Mistake::new(
                flag.span(),
                "`ipv6_only` has no effect without an IPv6 address",
            ));
        }
        if keys.keepalive.is_none() {
            let spans = [
                keys.keepalive_interval.as_ref().map(Spanned::span),
                keys.keepalive_count.as_ref().map(Spanned::span),
            ];
            for span in spans.into_iter().flatten() {
                self.warn(Mistake::new(span, "this has no effect without `keepalive`"));
            }
        }
    }

    /// systemd sets the options of the sockets that it creates.
    fn useless_for_systemd(&mut self, keys: &ListenerKeys) {
        let options = [
            ("backlog", keys.backlog.as_ref().map(Spanned::span), "Backlog="),
            ("ipv6_only", keys.ipv6_only.as_ref().map(Spanned::span), "BindIPv6Only="),
            ("nodelay", keys.nodelay.as_ref().map(Spanned::span), "NoDelay="),
            ("keepalive", keys.keepalive.as_ref().map(Spanned::span), "KeepAliveTimeSec="),
            (
                "keepalive_interval",
                keys.keepalive_interval.as_ref().map(Spanned::span),
                "KeepAliveIntervalSec=",
            ),
            (
                "keepalive_count",
                keys.keepalive_count.as_ref().map(Spanned::span),
                "KeepAliveProbes=",
            ),
            ("user_timeout", keys.user_timeout.as_ref().map(Spanned::span), ""),
            ("defer_accept", keys.defer_accept.as_ref().map(Spanned::span), "DeferAcceptSec="),
            ("fast_open", keys.fast_open.as_ref().map(Spanned::span), ""),
            ("receive_buffer", keys.receive_buffer.as_ref().map(Spanned::span), "ReceiveBuffer="),
            ("send_buffer", keys.send_buffer.as_ref().map(Spanned::span), "SendBuffer="),
            ("reuse_port", keys.reuse_port.as_ref().map(Spanned::span), "ReusePort="),
            ("free_bind", keys.free_bind.as_ref().map(Spanned::span), "FreeBind="),
            ("mode", keys.mode.as_ref().map(Spanned::span), "SocketMode="),
        ];
        for (key, span, there) in options {
            let Some(span) = span else { continue };
            let message = format!("`{key}` has no effect on a socket created by systemd");
            self.warn(Mistake::new(span, message).help(set_in_unit(there)));
        }
    }
}

/// Names the option of the systemd unit.
pub(super) fn set_in_unit(option: &str) -> String {
    match option {
        "" => "a .socket unit has no such option: remove the key".to_owned(),
        option => format!("set {option} in its .socket unit"),
    }
}
