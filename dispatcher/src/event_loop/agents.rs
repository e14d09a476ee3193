//! The sockets for HAProxy's agent check: opened at the start, changed by reloads, passed in a
//! take-over. The side thread accepts from them; this thread never does.

use std::sync::Arc;

use super::EventLoop;
use crate::api::status::{AgentStatus, HostDrainStatus, Status};
use crate::config::{Address, Config, ListenerOptions};
use crate::listen::bind::{self, Listening};
use crate::listen::error::RunError;
use crate::listen::inherit::Inherited;
use crate::mailbox::agents::{AgentSocket, AgentSockets};
use crate::reload::{AgentPlan, AgentStep};

/// Opens the sockets of all pools. `taken` gives one that a running dispatcher has passed.
pub(super) fn open(
    config: &Config,
    inherited: &mut Inherited,
    mut taken: impl FnMut(&str, &Address) -> Option<Listening>,
) -> Result<AgentSockets, RunError> {
    let mut sockets = Vec::new();
    for pool in &config.pools {
        let Some(configured) = &pool.agent_listen else { continue };
        let name = &pool.settings.name;
        let made = match taken(name, configured) {
            Some(listening) => vec![listening],
            None => bind::listen(configured, &ListenerOptions::default(), inherited)?,
        };
        for listening in made {
            let (pool, configured) = (name.clone(), configured.clone());
            sockets.push(Arc::new(AgentSocket { pool, configured, listening }));
        }
    }
    Ok(sockets)
}

pub(super) fn log_opened(socket: &AgentSocket) {
    log::info!(
        "event=agent_listen pool={} address={}{}",
        socket.pool,
        socket.address(),
        if socket.listening.inherited { " inherited=true" } else { "" }
    );
}

impl EventLoop {
    /// Gives the side thread the sockets to serve.
    pub(super) fn publish_agents(&self) {
        self.side.agents.send_replace(self.agents.clone());
    }

    /// The addresses at which a pool's agent answers; none if the pool has no agent.
    pub(super) fn agent_addresses(&self, pool: &str) -> Vec<String> {
        let own = self.agents.iter().filter(|socket| socket.pool == pool);
        own.map(|socket| socket.address().to_owned()).collect()
    }

    /// What each agent answers now.
    pub(super) fn agent_status(&self, status: &mut Status) {
        for pool in &mut status.pools {
            let listen = self.agent_addresses(&pool.name);
            let id = self.core.pool_named(&pool.name).filter(|_| !listen.is_empty());
            let answer = id.and_then(|id| self.core.agent_answer(self.now, id));
            pool.agent = answer.map(|answer| AgentStatus {
                listen,
                answer: answer.to_string(),
                ..AgentStatus::default()
            });
        }
    }

    /// The drain of the host.
    pub(super) fn host_drain_status(&self) -> Option<HostDrainStatus> {
        self.core.host_drain().map(|drain| HostDrainStatus::new(&drain, self.now))
    }

    /// Carries out the part of a reload about agents. What was to be opened is open already.
    pub(super) fn put_agents(&mut self, plan: Vec<AgentPlan>) {
        let mut old = std::mem::take(&mut self.agents);
        for AgentPlan { pool, address, step } in plan {
            let opened = match step {
                AgentStep::Keep { was } => {
                    let same = |socket: &mut Arc<AgentSocket>| {
                        socket.pool == was && socket.configured == address
                    };
                    let kept: Vec<_> = old.extract_if(.., same).collect();
                    self.agents.extend(kept.into_iter().filter_map(|socket| {
                        if was == pool {
                            return Some(socket);
                        }
                        // Another pool answers there from now on.
                        let listening = copied(&socket)?;
                        let (pool, configured) = (pool.clone(), address.clone());
                        Some(Arc::new(AgentSocket { pool, configured, listening }))
                    }));
                    continue;
                }
                AgentStep::Open(made) => made,
                AgentStep::TakeKept(name) => self.take_kept(&name),
            };
            for listening in opened {
                let (pool, configured) = (pool.clone(), address.clone());
                let socket = Arc::new(AgentSocket { pool, configured, listening });
                log_opened(&socket);
                self.agents.push(socket);
            }
        }
        for socket in old {
            log::info!("event=agent_closed pool={} address={}", socket.pool, socket.address());
            // The service manager keeps it open: a later reload may use it again.
            if socket.listening.inherited
                && let Some(listening) = copied(&socket)
            {
                self.listeners.unused.push(listening);
            }
        }
        self.publish_agents();
    }
}

/// The same socket once more. Without a descriptor for it, it is closed and this is logged.
fn copied(socket: &AgentSocket) -> Option<Listening> {
    match socket.copy() {
        Ok(fd) => {
            let Listening { inherited, name, .. } = &socket.listening;
            let (inherited, name) = (*inherited, name.clone());
            Some(Listening { inherited, name, ..socket.listening.duplicate(fd) })
        }
        Err(error) => {
            log::error!(
                "event=agent_lost pool={} address={} error={}",
                socket.pool,
                socket.address(),
                crate::background::logger::quoted(error)
            );
            None
        }
    }
}
