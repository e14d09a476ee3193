//! Clients that came to the dispatcher's own listeners before the kernel chose.
//!
//! The listeners of a steered pool keep its addresses; nothing accepts from them. Between their
//! `listen` and the start of the programs the kernel puts clients there.

use std::time::Duration;

use rustix::net::{SocketFlags, accept_with, sockopt};

use super::super::EventLoop;
use crate::background::logger::value;
use dispatcher_core::PoolId;

/// Most clients of one socket in one call: the default backlog. The next event resets the rest.
const MOST: usize = 4096;

impl EventLoop {
    /// Resets them: they would wait for ever, and may find a worker when they try again.
    pub(super) fn reset_early(&self, pool: PoolId) {
        let listeners =
            self.core.listeners().filter(|&it| self.core.pool_of_listener(it) == Some(pool));
        let sockets = listeners.flat_map(|listener| self.listeners.of(listener));
        let mut count = 0_usize;
        for listening in sockets.filter_map(|socket| socket.listening.as_ref()) {
            for _ in 0..MOST {
                let Ok(client) = accept_with(&listening.fd, SocketFlags::CLOEXEC) else { break };
                // Closing sends a reset, and cannot block.
                let _ = sockopt::set_socket_linger(&client, Some(Duration::ZERO));
                count += 1;
            }
        }
        if count > 0 {
            let name = value(self.core.pool_name(pool));
            log::info!("event=early_clients_reset pool={name} count={count}");
        }
    }
}
