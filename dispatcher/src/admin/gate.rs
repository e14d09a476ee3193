//! Asking the hot thread: many clients, at most one question and one command at a time.

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::command::{Answer, Command};
use super::{Request, Wake};
use crate::status::Status;

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// The hot thread has too much else to answer, or has gone.
    Refused,
    /// It did not answer in time.
    Late,
}

/// Shared by all HTTP connections.
pub(super) struct Gate {
    requests: SyncSender<Request>,
    wake: Wake,
    /// Who gets the answer to the question that is out. Empty iff none is out. Bounded by the number of HTTP
    /// connections: each waits for one answer, and those that gave up are removed.
    waiting: Mutex<Vec<oneshot::Sender<Arc<Status>>>>,
    /// Held by the command that is out.
    commands: tokio::sync::Mutex<()>,
}

impl Gate {
    pub(super) fn new(requests: SyncSender<Request>, wake: Wake) -> Arc<Gate> {
        Arc::new(Gate {
            requests,
            wake,
            waiting: Mutex::new(Vec::new()),
            commands: tokio::sync::Mutex::new(()),
        })
    }

    /// The status, from the question that is already out if there is one: however many clients ask, the hot
    /// thread answers at most once per turn.
    pub(super) async fn status(
        self: &Arc<Gate>,
        patience: Duration,
    ) -> Result<Arc<Status>, NoAnswer> {
        let (sender, answer) = oneshot::channel();
        let first = {
            let mut waiting = self.lock();
            let first = waiting.is_empty();
            waiting.retain(|sender| !sender.is_closed());
            waiting.push(sender);
            first
        };
        if first {
            self.ask();
        }
        match tokio::time::timeout(patience, answer).await {
            Ok(Ok(status)) => Ok(status),
            Ok(Err(_)) => Err(NoAnswer::Refused),
            Err(_) => Err(NoAnswer::Late),
        }
    }

    /// What came of a command. One that is late may still be carried out.
    pub(super) async fn command(
        &self,
        command: Command,
        patience: Duration,
    ) -> Result<Answer, NoAnswer> {
        self.ask_for(|answer| Request::Command { command, answer }, patience).await
    }

    /// The answer to any other request. One after the other: the next waits here, on this thread, so that the hot thread
    /// has at most one to look at.
    pub(super) async fn ask_for<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
        patience: Duration,
    ) -> Result<T, NoAnswer> {
        let exchange = async {
            let _turn = self.commands.lock().await;
            let (sender, answer) = oneshot::channel();
            self.requests.try_send(request(sender)).map_err(|_| NoAnswer::Refused)?;
            (self.wake)();
            answer.await.map_err(|_| NoAnswer::Refused)
        };
        tokio::time::timeout(patience, exchange).await.unwrap_or(Err(NoAnswer::Late))
    }

    fn ask(self: &Arc<Gate>) {
        let (sender, answer) = oneshot::channel();
        if self.requests.try_send(Request::Status(sender)).is_err() {
            self.lock().clear();
            return;
        }
        (self.wake)();
        let gate = Arc::clone(self);
        tokio::spawn(async move {
            let answer = answer.await.ok().map(Arc::new);
            for waiting in gate.lock().drain(..) {
                // Without an answer, dropping the sender says so. Nobody minds a client that has left.
                if let Some(status) = &answer {
                    let _ = waiting.send(Arc::clone(status));
                }
            }
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<oneshot::Sender<Arc<Status>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
