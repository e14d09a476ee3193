//! The sockets at which HAProxy's agent check is answered. The event loop owns them, because
//! reloads and take-overs change them; the side thread accepts from copies.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;

use crate::config::Address;
use crate::listen::bind::Listening;

/// One socket of a pool; a pool has several if a service manager passed several under its name.
#[derive(Debug)]
pub struct AgentSocket {
    /// The pool whose capacity is told.
    pub(crate) pool: String,
    /// As it is configured.
    pub(crate) configured: Address,
    /// The socket.
    pub(crate) listening: Listening,
}

impl AgentSocket {
    /// The address that it is bound to.
    pub(crate) fn address(&self) -> &str {
        &self.listening.address
    }

    /// A copy of its descriptor.
    pub(crate) fn copy(&self) -> std::io::Result<OwnedFd> {
        self.listening.fd.try_clone()
    }
}

/// The sockets in use, in the order of the pools. A socket that stays keeps its `Arc`.
pub type AgentSockets = Vec<Arc<AgentSocket>>;

/// What the side thread serves; the event loop replaces it at the start and in each reload.
pub type AgentSender = watch::Sender<AgentSockets>;
