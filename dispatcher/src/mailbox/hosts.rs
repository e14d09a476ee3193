//! The names by which the admin interface may be asked over TCP.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

/// The host names by which this machine may be asked over TCP, besides `localhost` and its own name: `admin_http_hosts`.
#[derive(Clone, Debug, Default)]
pub struct Hosts(Arc<RwLock<Vec<String>>>);

impl Hosts {
    /// From now on it may be asked by these.
    pub fn set(&self, hosts: Vec<String>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = hosts;
    }

    fn has(&self, name: &str) -> bool {
        let hosts = self.0.read().unwrap_or_else(PoisonError::into_inner);
        hosts.iter().any(|host| host.eq_ignore_ascii_case(name))
    }

    /// Whether a `Host` can be right: an address, which belongs to no page, or a name of this machine.
    pub(crate) fn allow(&self, host: &str) -> bool {
        let name = name_of(host).trim_end_matches('.');
        name.parse::<IpAddr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || is_own_name(name, rustix::system::uname().nodename().to_str().unwrap_or_default())
            || self.has(name)
    }
}

/// Whether `name` is the machine's name, with its domain or without.
pub(crate) fn is_own_name(name: &str, own: &str) -> bool {
    let short = own.split('.').next().unwrap_or(own);
    !name.is_empty() && (name.eq_ignore_ascii_case(own) || name.eq_ignore_ascii_case(short))
}

/// Without the port.
pub(crate) fn name_of(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    }
}
