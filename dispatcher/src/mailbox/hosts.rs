//! The host names that the admin interface accepts over TCP.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

/// The names in `admin_http_hosts`, accepted in addition to `localhost` and the name of the
/// machine.
#[derive(Clone, Debug, Default)]
pub struct Hosts(Arc<RwLock<Vec<String>>>);

impl Hosts {
    /// Replaces the names.
    pub fn set(&self, hosts: Vec<String>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = hosts;
    }

    fn has(&self, name: &str) -> bool {
        let hosts = self.0.read().unwrap_or_else(PoisonError::into_inner);
        hosts.iter().any(|host| host.eq_ignore_ascii_case(name))
    }

    /// Whether a `Host` header is accepted: an address, which no web page can own, or a name of
    /// this machine.
    pub(crate) fn allow(&self, host: &str) -> bool {
        let name = name_of(host).trim_end_matches('.');
        name.parse::<IpAddr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || is_own_name(name, rustix::system::uname().nodename().to_str().unwrap_or_default())
            || self.has(name)
    }
}

/// Whether `name` is the name of the machine, with or without its domain.
pub(crate) fn is_own_name(name: &str, own: &str) -> bool {
    let short = own.split('.').next().unwrap_or(own);
    !name.is_empty() && (name.eq_ignore_ascii_case(own) || name.eq_ignore_ascii_case(short))
}

/// The host without the port.
pub(crate) fn name_of(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    }
}
