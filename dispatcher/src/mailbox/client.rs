//! Asking the hot thread: many clients, at most one question and one command at a time, and neither too often.

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Gathered, Request};
use crate::api::command::{Answer, Command};
use crate::api::status::Status;
use crate::listen::files::SocketFiles;
use crate::wake::Wake;

/// The status is gathered at most ten times in a second.
const STATUS_EVERY: Duration = Duration::from_millis(100);

/// How often the hot thread is asked whether it turns, at most.
const ALIVE_EVERY: Duration = Duration::from_millis(20);

/// How often it is asked for anything else, at most.
const OTHERS_EVERY: Duration = Duration::from_millis(2);

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// The hot thread has too much else to answer, or has gone.
    Refused,
    /// It did not answer in time.
    Late,
}

/// A question that all who ask it meanwhile share.
struct Question<T> {
    every: Duration,
    state: Mutex<Waiting<T>>,
}

struct Waiting<T> {
    /// Who gets the answer to the question that is out, or about to be. Empty iff there is none. Bounded by the number of
    /// HTTP connections: each waits for one answer, and those that gave up are removed.
    askers: Vec<oneshot::Sender<T>>,
    /// Not asked again before that.
    next: Instant,
}

impl<T: Clone + Send + 'static> Question<T> {
    fn new(every: Duration) -> Question<T> {
        Question { every, state: Mutex::new(Waiting { askers: Vec::new(), next: Instant::now() }) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next answer. When the question is not out yet: from when on it may be asked.
    fn join(&self) -> (oneshot::Receiver<T>, Option<Instant>) {
        let (sender, answer) = oneshot::channel();
        let mut state = self.lock();
        let first = state.askers.is_empty();
        state.askers.retain(|sender| !sender.is_closed());
        state.askers.push(sender);
        (answer, first.then_some(state.next))
    }

    /// It is asked now.
    fn asked(&self) {
        self.lock().next = Instant::now() + self.every;
    }

    /// All who wait get the answer. Without one, dropping the senders says so.
    fn answer(&self, answer: Option<&T>) {
        let askers = std::mem::take(&mut self.lock().askers);
        for asker in askers {
            if let Some(answer) = answer {
                // Nobody minds a client that has left.
                let _ = asker.send(answer.clone());
            }
        }
    }
}

/// A question that is out. However its task ends, the next client asks anew.
struct Unanswered<'a, T: Clone + Send + 'static>(&'a Question<T>);

impl<T: Clone + Send + 'static> Drop for Unanswered<'_, T> {
    fn drop(&mut self) {
        self.0.answer(None);
    }
}

/// Shared by all HTTP connections.
pub(crate) struct MailboxClient {
    requests: SyncSender<Request>,
    wake: Wake,
    files: SocketFiles,
    status: Question<Arc<Status>>,
    alive: Question<()>,
    /// Held by the command that is out; not asked again before the time in it.
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
            commands: tokio::sync::Mutex::new(Instant::now()),
        })
    }

    /// The status, gathered after this was called or about then: however many clients ask, the hot thread answers one
    /// question at a time, and seldom. What takes long to say is said here.
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
                let gathered = mailbox.put(Request::Status).await;
                let status = gathered.map(|Gathered(finish)| {
                    let mut status = finish();
                    status.socket_files_missing = mailbox.files.missing();
                    Arc::new(status)
                });
                mailbox.status.answer(status.as_ref());
            });
        }
        in_time(patience, answer).await
    }

    /// Whether the hot thread turns: it has nothing to gather for that.
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

    /// What came of a command. One that is late may still be carried out.
    pub(crate) async fn command(
        &self,
        command: Command,
        patience: Duration,
    ) -> Result<Answer, NoAnswer> {
        self.ask_for(|answer| Request::Command { command, answer }, patience).await
    }

    /// The answer to any other request. One after the other: the next waits here, on this thread, so that the hot thread
    /// has at most one to look at.
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

    /// Puts one request to the hot thread; `None` if it does not take it, or does not answer.
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
