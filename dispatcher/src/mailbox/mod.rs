//! The mailbox between the event loop and the side thread: requests one way, answers and reports the other. Bounded.
//!
//! [`Side`] is the event loop's end, [`client::MailboxClient`] the end of the HTTP interface and of reloads.

pub(crate) mod client;

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use crate::api::command::{Answer, Command, CommandError};
use crate::api::decisions::{Next, Past};
use crate::api::reload::Reloaded;
use crate::api::status::Status;
use crate::background::service_manager::ServiceManager;
use crate::background::spawner::{Report, Spawner};
use crate::listen::files::SocketFiles;
use crate::reload::{InForce, Plan};
use crate::wake::Wake;
use hosts::Hosts;

pub(crate) mod hosts;

/// Starts the side thread: serves HTTP on the first socket, and on the second for reading only. It calls the last argument
/// whenever there is something for the event loop.
pub type StartSide = fn(UnixListener, Option<TcpListener>, Wake) -> io::Result<Side>;

/// Most questions waiting for the hot thread. Status questions share one, so a few are plenty.
pub(crate) const MAX_REQUESTS: usize = 16;

/// How much longer than its timeout stopping may take: SIGKILL has to work, and be seen to.
const PROCESSES_END: Duration = Duration::from_secs(3);

/// A question or command for the hot thread. Dropping it unanswered is fine: the client gets 503.
#[derive(Debug)]
pub enum Request {
    /// What is going on?
    Status(oneshot::Sender<Gathered>),
    /// Does it turn?
    Alive(oneshot::Sender<()>),
    /// Do this.
    Command {
        /// What.
        command: Command,
        /// What came of it.
        answer: oneshot::Sender<Answer>,
    },
    /// Which configuration is in force?
    InForce(oneshot::Sender<Box<InForce>>),
    /// Put this one into force.
    Reload {
        /// What to do.
        plan: Box<Plan>,
        /// What was done.
        answer: oneshot::Sender<Result<Reloaded, CommandError>>,
    },
    /// Who was chosen lately?
    History {
        /// In this pool.
        pool: String,
        /// After the decision with this number.
        after: u64,
        /// The decisions.
        answer: oneshot::Sender<Result<Past, CommandError>>,
    },
    /// Who would get the next connection?
    Explain {
        /// Of this pool.
        pool: String,
        /// Of a client from there.
        peer: dispatch_protocol::ClientAddr,
        /// The decision.
        answer: oneshot::Sender<Result<Next, CommandError>>,
    },
}

/// What the hot thread has gathered for a status: the rest is done where nobody waits.
pub struct Gathered(pub Box<dyn FnOnce() -> Status + Send>);

impl std::fmt::Debug for Gathered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gathered")
    }
}

impl Request {
    /// Whether nobody waits for the answer any more: a client hung up, or its time is over.
    fn is_given_up(&self) -> bool {
        match self {
            Request::Status(answer) => answer.is_closed(),
            Request::Alive(answer) => answer.is_closed(),
            Request::Command { answer, .. } => answer.is_closed(),
            Request::InForce(answer) => answer.is_closed(),
            Request::Reload { answer, .. } => answer.is_closed(),
            Request::History { answer, .. } => answer.is_closed(),
            Request::Explain { answer, .. } => answer.is_closed(),
        }
    }
}

/// The hot thread's side of the side thread.
#[derive(Debug)]
pub struct Side {
    pub(crate) requests: mpsc::Receiver<Request>,
    /// What became of spawned processes: drain with `try_recv` once per wake-up.
    pub reports: mpsc::Receiver<Report>,
    /// Starts and stops processes.
    pub spawner: Spawner,
    /// `metrics_max_workers`; to be set at the start and by a reload.
    pub metrics_max_workers: Arc<AtomicU32>,
    /// `admin_rate`, likewise.
    pub admin_rate: Arc<AtomicU32>,
    /// Asks for a reload, without waiting for it.
    pub reload: Arc<Notify>,
    /// By which names it may be asked over TCP; to be set at the start and by a reload.
    pub hosts: Hosts,
    /// The socket files to look at; to be set at the start and by a reload.
    pub files: SocketFiles,
    /// Tells the service manager how far we are.
    pub manager: ServiceManager,
    pub(crate) stop: oneshot::Sender<()>,
    pub(crate) thread: JoinHandle<()>,
}

impl Side {
    /// The next question that somebody waits for. Others are thrown away: whoever asks and hangs up, again and again, makes the
    /// hot thread do nothing, and a command whose asker has been told that it is late is not carried out after that.
    pub fn request(&self) -> Option<Request> {
        // At most as many as there is room for: who fills it meanwhile waits for the next turn.
        let mut waiting = self.requests.try_iter().take(MAX_REQUESTS);
        waiting.find(|request| !request.is_given_up())
    }

    /// Stops all processes (see [`Spawner::stop`]) and then ends the side thread. Waits for both, at most a few seconds longer
    /// than `timeout`. For the very end: reports that are still queued are thrown away, questions get 503.
    pub fn stop(self, timeout: Duration) {
        self.spawner.stop(timeout);
        let deadline = Instant::now() + timeout + PROCESSES_END;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.reports.recv_timeout(left) {
                Ok(Report::Stopped { killed: 0 }) => break,
                Ok(Report::Stopped { killed }) => {
                    log::warn!("event=processes_killed count={killed} after={timeout:?}");
                    break;
                }
                Ok(_) => {}
                Err(_) => {
                    log::error!("event=processes_left_behind");
                    break;
                }
            }
        }
        self.finish();
    }

    /// Ends the side thread, about at once. Processes that are still running stay; see [`Spawner::stop`].
    pub fn finish(self) {
        let Side { stop, thread, .. } = self;
        // It may have ended by itself already.
        let _ = stop.send(());
        if thread.join().is_err() {
            log::error!("event=admin_thread_panicked");
        }
    }
}
