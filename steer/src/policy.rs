//! The policy of a pool: how its workers are compared.

use std::hash::Hasher;
use std::net::IpAddr;

use siphasher::sip::SipHasher13;

use crate::error::Error;
use crate::layout::Settings;
use crate::steering::Steering;

/// How the worker for a connection is chosen. Each one is described in `docs/LOAD_BALANCING.md`;
/// the crate `dispatcher-core` has the same ones for connections that are passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Fewest connections for its weight.
    #[default]
    LeastConnections,
    /// Each in turn, in proportion to its weight.
    RoundRobin,
    /// At random, in proportion to its weight.
    Random,
    /// The less loaded of two different workers drawn at random, in proportion to their weights.
    TwoChoices,
    /// The worker that the client's address belongs to ([`crate::WorkerSettings::node`]).
    Hash,
    /// The least loaded worker of the highest priority that is up
    /// ([`crate::WorkerSettings::priority`]); the others stand by.
    Failover,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Policy; 6] = [
        Policy::LeastConnections,
        Policy::RoundRobin,
        Policy::Random,
        Policy::TwoChoices,
        Policy::Hash,
        Policy::Failover,
    ];

    /// The name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Policy::LeastConnections => "least-connections",
            Policy::RoundRobin => "round-robin",
            Policy::Random => "random",
            Policy::TwoChoices => "two-choices",
            Policy::Hash => "hash",
            Policy::Failover => "failover",
        }
    }

    /// The number in the settings of the programs.
    pub(crate) fn number(self) -> u32 {
        match self {
            Policy::LeastConnections => 0,
            Policy::RoundRobin => 1,
            Policy::Random => 2,
            Policy::TwoChoices => 3,
            Policy::Hash => 4,
            Policy::Failover => 5,
        }
    }
}

/// The key of a client's address, for the policy `hash`: that of the crate `dispatcher-core`, so
/// that a client has the same worker whether its connections are steered or passed.
pub fn key_of(client: IpAddr) -> u64 {
    match client {
        IpAddr::V4(ip) => hash(&ip.octets()),
        IpAddr::V6(ip) => hash(&ip.octets()),
    }
}

/// A value for [`crate::WorkerSettings::node`] that a restarted worker of the same name has again.
/// `instance` tells workers of one name apart. It is that of the crate `dispatcher-core`.
pub fn node(name: &str, instance: u32) -> u64 {
    hash(format!("{name}\0{instance}").as_bytes())
}

fn hash(bytes: &[u8]) -> u64 {
    // Fixed keys: the same client has the same worker after a restart. `bpf/steer.h` has them, too.
    let mut hasher = SipHasher13::new_with_keys(0x6469_7370_6174_6368, 0x6166_6669_6e69_7479);
    hasher.write(bytes);
    hasher.finish()
}

impl Steering {
    /// Sets the policy of the pool; the next SYN is decided by it. A new pool has
    /// [`Policy::LeastConnections`].
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    pub fn set_policy(&mut self, policy: Policy) -> Result<(), Error> {
        self.write_settings(Settings { policy: policy.number(), ..self.settings })
    }

    /// The policy of the pool.
    pub fn policy(&self) -> Policy {
        let number = self.settings.policy;
        // Only `set_policy` writes it.
        Policy::ALL.into_iter().find(|policy| policy.number() == number).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_the_core() {
        // As in its tests.
        assert_eq!(hash(b"session-1"), 15_927_381_246_406_458_741);
        assert_eq!(key_of([192, 0, 2, 1].into()), hash(&[192, 0, 2, 1]));
        assert_eq!(node("web-1", 2), hash(b"web-1\x002"));
    }
}
