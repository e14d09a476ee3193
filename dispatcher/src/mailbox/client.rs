//! The client's end of the mailbox. It merges and paces the requests of many HTTP clients, so that
//! the event loop has at most one status request, one liveness request and one other request at a
//! time.

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::loads::{DeferredLoads, OwnLoads};
use super::{DeferredStatus, Request};
use crate::api::advice::AdviceStatus;
use crate::api::command::{Answer, Command};
use crate::api::status::{RelayStatus, Status};
use crate::listen::files::SocketFiles;
use crate::wake::Wake;

/// Shortest interval between two status requests.
const STATUS_EVERY: Duration = Duration::from_millis(100);

/// Shortest interval between two requests for the figures of advice. Answers within it share them.
const LOADS_EVERY: Duration = Duration::from_millis(100);

/// Shortest interval between two liveness requests.
const ALIVE_EVERY: Duration = Duration::from_millis(20);

/// Shortest interval between other requests.
const OTHERS_EVERY: Duration = Duration::from_millis(2);

/// The reason why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// The mailbox is full, or the event loop has ended.
    Refused,
    /// The event loop did not answer in time.
    Late,
}

/// A request whose answer is shared by all clients that wait for it.
pub(crate) struct Question<T> {
    every: Duration,
    state: Mutex<Waiting<T>>,
}

struct Waiting<T> {
    /// The waiting clients; empty iff no request is pending. Bounded by the number of HTTP
    /// connections: each waits for one answer, and clients that gave up are removed.
    askers: Vec<oneshot::Sender<T>>,
    /// Earliest time of the next request.
    next: Instant,
}

impl<T: Clone + Send + 'static> Question<T> {
    pub(crate) fn new(every: Duration) -> Question<T> {
        Question { every, state: Mutex::new(Waiting { askers: Vec::new(), next: Instant::now() }) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next answer. The first client gets the earliest time of the request and must
    /// send it.
    pub(crate) fn join(&self) -> (oneshot::Receiver<T>, Option<Instant>) {
        let (sender, answer) = oneshot::channel();
        let mut state = self.lock();
        let first = state.askers.is_empty();
        state.askers.retain(|sender| !sender.is_closed());
        state.askers.push(sender);
        (answer, first.then_some(state.next))
    }

    /// Marks the request as sent.
    pub(crate) fn asked(&self) {
        self.lock().next = Instant::now() + self.every;
    }

    /// Sends the answer to all waiting clients. Without an answer, the dropped senders signal the
    /// failure.
    pub(crate) fn answer(&self, answer: Option<&T>) {
        let askers = std::mem::take(&mut self.lock().askers);
        for asker in askers {
            if let Some(answer) = answer {
                // The client may have disconnected.
                let _ = asker.send(answer.clone());
            }
        }
    }
}

/// A pending request. When its task ends for any reason, the next client can send a new one.
pub(crate) struct Unanswered<'a, T: Clone + Send + 'static>(pub(crate) &'a Question<T>);

impl<T: Clone + Send + 'static> Drop for Unanswered<'_, T> {
    fn drop(&mut self) {
        self.0.answer(None);
    }
}

/// Adds a part to a status.
type Addition = Box<dyn Fn(&mut Status) + Send + Sync>;

/// Shared by all HTTP connections.
pub(crate) struct MailboxClient {
    requests: SyncSender<Request>,
    wake: Wake,
    files: SocketFiles,
    status: Question<Arc<Status>>,
    alive: Question<()>,
    loads: Question<(Instant, Arc<OwnLoads>)>,
    /// The last figures for advice, and when they were asked for.
    last_loads: Mutex<Option<(Instant, Arc<OwnLoads>)>>,
    /// Makes the part of the status about advice.
    advice: OnceLock<Box<dyn Fn() -> AdviceStatus + Send + Sync>>,
    /// Makes the part of the status about the relay.
    relay: OnceLock<Box<dyn Fn() -> Option<RelayStatus> + Send + Sync>>,
    /// Adds to the status what is known of agents.
    agents: OnceLock<Addition>,
    /// Locked while a request is pending; holds the earliest time of the next one.
    commands: tokio::sync::Mutex<Instant>,
}

impl MailboxClient {
    pub(crate) fn new(
        requests: SyncSender<Request>,
        wake: Wake,
        files: SocketFiles,
    ) -> Arc<MailboxClient> {
        Arc::new(MailboxClient {
            requests,
            wake,
            files,
            status: Question::new(STATUS_EVERY),
            alive: Question::new(ALIVE_EVERY),
            loads: Question::new(LOADS_EVERY),
            last_loads: Mutex::new(None),
            advice: OnceLock::new(),
            relay: OnceLock::new(),
            agents: OnceLock::new(),
            commands: tokio::sync::Mutex::new(Instant::now()),
        })
    }

    /// The status, gathered at or after this call. The event loop handles one status request at a
    /// time, at a limited rate, for any number of clients. The expensive part runs here.
    pub(crate) async fn status(
        self: &Arc<MailboxClient>,
        patience: Duration,
    ) -> Result<Arc<Status>, NoAnswer> {
        let (answer, from) = self.status.join();
        if let Some(from) = from {
            let mailbox = Arc::clone(self);
            tokio::spawn(async move {
                tokio::time::sleep_until(from).await;
                mailbox.status.asked();
                let _end = Unanswered(&mailbox.status);
                let deferred = mailbox.put(Request::Status).await;
                let status = deferred.map(|DeferredStatus(finish)| {
                    let mut status = finish();
                    status.socket_files_missing = mailbox.files.missing();
                    status.advice = mailbox.advice.get().map(|advice| advice());
                    status.relay = mailbox.relay.get().and_then(|relay| relay());
                    if let Some(agents) = mailbox.agents.get() {
                        agents(&mut status);
                    }
                    Arc::new(status)
                });
                mailbox.status.answer(status.as_ref());
            });
        }
        in_time(patience, answer).await
    }

    /// Sets what makes the part of the status about advice.
    pub(crate) fn set_advice(&self, advice: impl Fn() -> AdviceStatus + Send + Sync + 'static) {
        // Called once, at the start.
        let _ = self.advice.set(Box::new(advice));
    }

    /// Sets what makes the part of the status about the relay.
    pub(crate) fn set_relay(
        &self,
        relay: impl Fn() -> Option<RelayStatus> + Send + Sync + 'static,
    ) {
        // There is one relay.
        let _ = self.relay.set(Box::new(relay));
    }

    /// Sets what adds to the status about agents.
    pub(crate) fn set_agents(&self, agents: impl Fn(&mut Status) + Send + Sync + 'static) {
        // Called once, at the start.
        let _ = self.agents.set(Box::new(agents));
    }

    /// The figures for advice, and when they were asked for: at most 100 ms before this call. So
    /// the event loop handles at most ten such requests a second, for any number of clients.
    pub(crate) async fn loads(
        self: &Arc<MailboxClient>,
        patience: Duration,
    ) -> Result<(Instant, Arc<OwnLoads>), NoAnswer> {
        let last = self.last_loads.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(last) = last.filter(|(at, _)| at.elapsed() < LOADS_EVERY) {
            return Ok(last);
        }
        let (answer, from) = self.loads.join();
        if let Some(from) = from {
            let mailbox = Arc::clone(self);
            tokio::spawn(async move {
                tokio::time::sleep_until(from).await;
                mailbox.loads.asked();
                let _end = Unanswered(&mailbox.loads);
                let asked = Instant::now();
                let deferred = mailbox.put(Request::Loads).await;
                let loads = deferred.map(|DeferredLoads(finish)| (asked, Arc::new(finish())));
                if let Some(loads) = &loads {
                    let mut last =
                        mailbox.last_loads.lock().unwrap_or_else(PoisonError::into_inner);
                    *last = Some(loads.clone());
                }
                mailbox.loads.answer(loads.as_ref());
            });
        }
        in_time(patience, answer).await
    }

    /// Whether the event loop runs.
    pub(crate) async fn alive(
        self: &Arc<MailboxClient>,
        patience: Duration,
    ) -> Result<(), NoAnswer> {
        let (answer, from) = self.alive.join();
        if let Some(from) = from {
            let mailbox = Arc::clone(self);
            tokio::spawn(async move {
                tokio::time::sleep_until(from).await;
                mailbox.alive.asked();
                let _end = Unanswered(&mailbox.alive);
                let answer = mailbox.put(Request::Alive).await;
                mailbox.alive.answer(answer.as_ref());
            });
        }
        in_time(patience, answer).await
    }

    /// Sends a command. After [`NoAnswer::Late`] the command may still be carried out.
    pub(crate) async fn command(
        &self,
        command: Command,
        patience: Duration,
    ) -> Result<Answer, NoAnswer> {
        self.ask_for(|answer| Request::Command { command, answer }, patience).await
    }

    /// Sends any other request. Requests wait here for their turn, so the event loop has at most
    /// one of them.
    pub(crate) async fn ask_for<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
        patience: Duration,
    ) -> Result<T, NoAnswer> {
        let exchange = async {
            let mut turn = self.commands.lock().await;
            tokio::time::sleep_until(*turn).await;
            *turn = Instant::now() + OTHERS_EVERY;
            self.put(request).await.ok_or(NoAnswer::Refused)
        };
        tokio::time::timeout(patience, exchange).await.unwrap_or(Err(NoAnswer::Late))
    }

    /// Puts one request into the mailbox; `None` if the mailbox is full or the event loop drops the
    /// request.
    async fn put<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
        let (sender, answer) = oneshot::channel();
        self.requests.try_send(request(sender)).ok()?;
        (self.wake)();
        answer.await.ok()
    }
}

async fn in_time<T>(patience: Duration, answer: oneshot::Receiver<T>) -> Result<T, NoAnswer> {
    match tokio::time::timeout(patience, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => Err(NoAnswer::Refused),
        Err(_) => Err(NoAnswer::Late),
    }
}
