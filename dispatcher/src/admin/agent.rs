//! Answers HAProxy's agent check: one line for each connection, and then its end.
//!
//! The core decides on the answer; this task asks the event loop for it, at most ten times a second
//! for any number of connections. Everything is bounded: connections of a socket, connections of
//! one address, and the time of each. What a client sends (`agent-send`) is read and not used:
//! unread bytes would make the kernel reset the connection, and HAProxy could lose the answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dispatcher_core::advice::{AgentAnswer, DownReason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::client_limits::{AcceptPace, ClientLimits, Connection};
use super::http;
use crate::api::status::Status;
use crate::background::logger::{quoted, value};
use crate::mailbox::agents::{AgentSocket, AgentSockets};
use crate::mailbox::client::{MailboxClient, NoAnswer};

/// Most connections of a socket at once; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;

/// Most of them from one address; further ones are closed without an answer.
const MOST_OF_CLIENT: usize = MAX_CONNECTIONS * 3 / 4;

/// Shortest average interval between two accepted connections.
const ACCEPT_INTERVAL: Duration = Duration::from_micros(500);

/// Longest wait for the event loop. HAProxy waits for `agent-inter`, 2 s by default.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long sending the answer may take.
const SENDING: Duration = Duration::from_secs(1);

/// How long the client may take to close the connection after the answer.
const CLOSING: Duration = Duration::from_millis(500);

/// Pause before a socket is tried again that could not be copied.
const AGAIN: Duration = Duration::from_secs(5);

/// Most bytes that are read of a client.
const MOST_READ: usize = 4096;

/// The copy of a socket from which this thread accepts.
fn listener(socket: &AgentSocket) -> std::io::Result<TcpListener> {
    let listener: std::net::TcpListener = socket.copy()?.into();
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// What was answered for a pool.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// In the order of [`AgentAnswer::NAMES`].
    answers: [u64; AgentAnswer::NAMES.len()],
    refused: u64,
    last: Option<AgentAnswer>,
}

/// Shared by all sockets.
pub(super) struct Agents {
    mailbox: Arc<MailboxClient>,
    sockets: watch::Receiver<AgentSockets>,
    gate: watch::Receiver<bool>,
    /// By pool.
    counts: Mutex<HashMap<String, Counts>>,
}

impl Agents {
    pub(super) fn new(
        mailbox: Arc<MailboxClient>,
        sockets: watch::Receiver<AgentSockets>,
        gate: watch::Receiver<bool>,
    ) -> Arc<Agents> {
        let agents = Arc::new(Agents { mailbox, sockets, gate, counts: Mutex::default() });
        let reporter = Arc::clone(&agents);
        agents.mailbox.set_agents(move |status| reporter.report(status));
        agents
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Counts>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the counters to a status.
    fn report(&self, status: &mut Status) {
        let counts = self.lock();
        for pool in &mut status.pools {
            let Some(agent) = &mut pool.agent else { continue };
            let known = counts.get(&pool.name).copied().unwrap_or_default();
            let named = AgentAnswer::NAMES.iter().zip(known.answers);
            agent.answers = named.map(|(name, count)| ((*name).to_owned(), count)).collect();
            agent.refused = known.refused;
        }
    }

    /// Serves for as long as it is polled, and follows changes of the sockets.
    pub(super) async fn serve(self: Arc<Agents>) {
        let mut changes = self.sockets.clone();
        changes.mark_changed();
        let mut tasks = JoinSet::new();
        // By the address of the shared socket: the entry keeps it, so that none other can have it.
        let mut serving: Vec<(Arc<AgentSocket>, AbortHandle)> = Vec::new();
        let mut failed = false;
        loop {
            tokio::select! {
                changed = changes.changed() => if changed.is_err() {
                    return;
                },
                () = tokio::time::sleep(AGAIN), if failed => {}
                Some(ended) = tasks.join_next() => {
                    // The caller starts all of them again.
                    if let Err(Ok(panic)) = ended.map_err(tokio::task::JoinError::try_into_panic) {
                        std::panic::resume_unwind(panic);
                    }
                    continue;
                },
            }
            let wanted = changes.borrow_and_update().clone();
            failed = false;
            serving.retain(|(socket, task)| {
                let stays = wanted.iter().any(|other| Arc::ptr_eq(socket, other));
                if !stays {
                    task.abort();
                }
                stays
            });
            for socket in &wanted {
                if serving.iter().any(|(other, _)| Arc::ptr_eq(socket, other)) {
                    continue;
                }
                match listener(socket) {
                    Ok(listener) => {
                        let (agents, pool) = (Arc::clone(&self), socket.pool.clone());
                        let task = tasks.spawn(agents.accept(listener, pool));
                        serving.push((Arc::clone(socket), task));
                    }
                    Err(error) => {
                        failed = true;
                        log::error!(
                            "event=agent_not_served pool={} address={} error={}",
                            socket.pool,
                            value(socket.address()),
                            quoted(error)
                        );
                    }
                }
            }
            let named = |pool: &String| wanted.iter().any(|socket| socket.pool == *pool);
            self.lock().retain(|pool, _| named(pool));
        }
    }

    async fn accept(self: Arc<Agents>, listener: TcpListener, pool: String) {
        let pool: Arc<str> = pool.into();
        let limits = ClientLimits::new(MOST_OF_CLIENT);
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut pace = AcceptPace::new(ACCEPT_INTERVAL);
        let mut gate = self.gate.clone();
        while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
            pace.pace().await;
            let (stream, client) = match http::next(&listener, &mut gate).await {
                Ok(accepted) => accepted,
                Err(error) => {
                    log::warn!("event=agent_accept_failed pool={pool} error={}", quoted(&error));
                    tokio::time::sleep(http::REST).await;
                    continue;
                }
            };
            match limits.connect(client) {
                Some(client) => {
                    let (agents, pool) = (Arc::clone(&self), Arc::clone(&pool));
                    tokio::spawn(async move { agents.answer(stream, &pool, (slot, client)).await });
                }
                None => self.lock().entry(pool.to_string()).or_default().refused += 1,
            }
        }
    }

    /// Answers one client. The guards count its connection until it is closed.
    async fn answer(
        &self,
        mut stream: TcpStream,
        pool: &str,
        _guards: (OwnedSemaphorePermit, Connection),
    ) {
        let answer = self.current(pool).await;
        let line = format!("{answer}\n");
        let sent = tokio::time::timeout(SENDING, stream.write_all(line.as_bytes())).await;
        if !matches!(sent, Ok(Ok(()))) {
            return;
        }
        self.count(pool, answer);
        // Sends the end at once; HAProxy closes as soon as it has the line.
        let _ = stream.shutdown().await;
        let mut read = 0;
        let mut bytes = [0; 512];
        let _ = tokio::time::timeout(CLOSING, async {
            while read < MOST_READ {
                match stream.read(&mut bytes).await {
                    Ok(0) | Err(_) => return,
                    Ok(count) => read += count,
                }
            }
        })
        .await;
    }

    /// The answer of the core, from figures that are at most 100 ms old.
    async fn current(&self, pool: &str) -> AgentAnswer {
        let down = AgentAnswer::Down;
        match self.mailbox.loads(PATIENCE).await {
            Ok((_, loads)) => {
                let known = loads.pools.iter().find(|other| other.load.name == pool);
                known.map_or(down(DownReason::Removed), |pool| pool.load.answer)
            }
            Err(NoAnswer::Refused) => down(DownReason::Stopping),
            Err(NoAnswer::Late) => down(DownReason::NoAnswer),
        }
    }

    /// Counts an answer. A new kind of answer is logged, because HAProxy changes its server then.
    fn count(&self, pool: &str, answer: AgentAnswer) {
        let mut counts = self.lock();
        let counts = counts.entry(pool.to_owned()).or_default();
        let at = AgentAnswer::NAMES.iter().position(|name| *name == answer.name());
        if let Some(count) = at.and_then(|at| counts.answers.get_mut(at)) {
            *count += 1;
        }
        let before = counts.last.replace(answer);
        if before.is_none_or(|before| before.name() != answer.name()) {
            log::info!("event=agent_answer pool={pool} answer={}", quoted(answer));
        }
    }
}

#[cfg(test)]
mod tests;
