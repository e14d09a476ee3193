//! The keys about HAProxy's agent check: `agent_listen` and `agent_workers` of a pool.

use std::net::SocketAddr;

use toml::Spanned;

use super::address::{address, collides};
use super::error::Mistake;
use super::file::PoolKeys;
use super::validate::Check;
use super::{Address, Listener};

/// `agent_listen`: an IP address and a port, or `systemd:NAME`.
pub(super) fn agent_listen(check: &mut Check<'_>, keys: &PoolKeys) -> Option<Address> {
    let Some(text) = &keys.agent_listen else {
        if let Some(workers) = &keys.agent_workers {
            let message = "this has no effect without `agent_listen`";
            check.warn(Mistake::new(workers.span(), message));
        }
        return None;
    };
    match check.keep(address(text))? {
        Address::Unix(_) => {
            check.mistake(
                Mistake::new(text.span(), "HAProxy's agent check cannot use a Unix socket")
                    .help("write an address that HAProxy reaches, such as \"10.0.0.1:9902\""),
            );
            None
        }
        known => Some(known),
    }
}

/// The address of each pool is its own, so `[defaults]` cannot have one.
pub(super) fn check_defaults(check: &mut Check<'_>, defaults: &PoolKeys) {
    if let Some(text) = &defaults.agent_listen {
        check.mistake(
            Mistake::new(text.span(), "pools cannot share `agent_listen`")
                .help("write it in each [pool.NAME], with a different port"),
        );
    }
}

/// An agent must not have an address that another socket of the dispatcher has. `agents` are the
/// keys and addresses of the pools that have one, in file order.
pub(super) fn check_distinct(
    check: &mut Check<'_>,
    agents: &[(&str, &Spanned<String>, Address)],
    listeners: &[Listener],
    http: [(&str, Option<SocketAddr>); 2],
) {
    for (at, (_, text, wanted)) in agents.iter().enumerate() {
        let of_listener = listeners
            .iter()
            .find(|it| collides((wanted, false), (&it.address, it.options.ipv6_only)))
            .map(|listener| format!("listener `{}`", listener.name));
        let of_http = http.iter().find_map(|(key, address)| {
            let other = Address::Tcp((*address)?);
            collides((wanted, false), (&other, false)).then(|| format!("`{key}`"))
        });
        let of_agent = agents[..at]
            .iter()
            .find(|(_, _, other)| collides((wanted, false), (other, false)))
            .map(|(pool, _, _)| format!("the agent of pool `{pool}`"));
        if let Some(owner) = of_listener.or(of_http).or(of_agent) {
            check.mistake(
                Mistake::new(text.span(), format!("{owner} has this address already"))
                    .help("use a different port for each"),
            );
        }
    }
}
