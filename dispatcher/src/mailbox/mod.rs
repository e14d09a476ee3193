//! The bounded mailbox between the event loop and the side thread: requests in one direction,
//! answers and reports in the other.
//!
//! [`SideThread`] is the end of the event loop; `client::MailboxClient` is the end of the HTTP
//! interface and of reloads.

pub(crate) mod client;

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot, watch};

use crate::api::command::{Answer, Command, CommandError};
use crate::api::decisions::{RawExplanation, RawHistory};
use crate::api::reload::Reloaded;
use crate::api::status::Status;
use crate::background::service_manager::ServiceManager;
use crate::background::spawner::{Report, Spawner};
use crate::listen::files::SocketFiles;
use crate::reload::{Plan, RunningConfig};
use crate::wake::Wake;
use advice_faults::AdviceFaults;
use agents::AgentSender;
use hosts::Hosts;
use loads::DeferredLoads;

pub(crate) mod advice_faults;
pub(crate) mod agents;
pub(crate) mod hosts;
pub(crate) mod loads;

/// Starts the side thread, which serves HTTP on the first socket, and on those of the second
/// argument. It calls the third argument when there is a new entry for the event loop.
pub type StartSideThread = fn(UnixListener, TcpListeners, Wake, bool) -> io::Result<SideThread>;

/// The TCP sockets that the side thread serves.
#[derive(Debug, Default)]
pub struct TcpListeners {
    /// `admin_http`: the admin interface, read-only.
    pub admin_http: Option<TcpListener>,
    /// `advice_listen`: advice to clients and peers.
    pub advice: Option<TcpListener>,
}

/// Most requests in the mailbox. All status requests share one entry, so few are needed.
pub(crate) const MAX_REQUESTS: usize = 16;

/// Extra time for a stop after its timeout, for SIGKILL to take effect and be noticed.
const PROCESSES_END: Duration = Duration::from_secs(3);

/// How often a stop looks whether it is to hurry.
const HURRY: Duration = Duration::from_millis(50);

/// A request to the event loop. If it is dropped without an answer, the client gets a 503 response.
#[derive(Debug)]
pub enum Request {
    /// The status.
    Status(oneshot::Sender<DeferredStatus>),
    /// The figures for advice.
    Loads(oneshot::Sender<DeferredLoads>),
    /// An empty answer, as a sign of life.
    Alive(oneshot::Sender<()>),
    /// Carries out a command.
    Command {
        /// The command.
        command: Command,
        /// The result.
        answer: oneshot::Sender<Answer>,
    },
    /// Puts a new configuration into force.
    Reload {
        /// The changes.
        plan: Box<Plan>,
        /// The result.
        answer: oneshot::Sender<Result<Reloaded, CommandError>>,
    },
    /// The last decisions of a pool.
    History {
        /// The pool.
        pool: String,
        /// Only decisions with a higher number.
        after: u64,
        /// The decisions.
        answer: oneshot::Sender<Result<RawHistory, CommandError>>,
    },
    /// The next decision of a pool.
    Explain {
        /// The pool.
        pool: String,
        /// The address of the assumed client.
        peer: dispatch_protocol::ClientAddr,
        /// The decision.
        answer: oneshot::Sender<Result<RawExplanation, CommandError>>,
    },
}

/// A function that completes a status. The event loop gathers the data; the rest of the work is
/// done on the side thread.
pub struct DeferredStatus(pub Box<dyn FnOnce() -> Status + Send>);

impl std::fmt::Debug for DeferredStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DeferredStatus")
    }
}

impl Request {
    /// Whether no client waits for the answer any more, because of a disconnect or a timeout.
    fn is_given_up(&self) -> bool {
        match self {
            Request::Status(answer) => answer.is_closed(),
            Request::Loads(answer) => answer.is_closed(),
            Request::Alive(answer) => answer.is_closed(),
            Request::Command { answer, .. } => answer.is_closed(),
            Request::Reload { answer, .. } => answer.is_closed(),
            Request::History { answer, .. } => answer.is_closed(),
            Request::Explain { answer, .. } => answer.is_closed(),
        }
    }
}

/// The event loop's handle of the side thread.
#[derive(Debug)]
pub struct SideThread {
    pub(crate) requests: mpsc::Receiver<Request>,
    /// Results of started processes: read with `try_recv` once per wake-up.
    pub reports: mpsc::Receiver<Report>,
    /// Starts and stops processes.
    pub spawner: Spawner,
    /// `metrics_max_workers`; set at the start and by a reload.
    pub metrics_max_workers: Arc<AtomicU32>,
    /// `admin_rate`; set at the start and by a reload.
    pub admin_rate: Arc<AtomicU32>,
    /// Requests a reload without waiting for it.
    pub reload: Arc<Notify>,
    /// The running configuration, for the plan of the next reload; set at the start and by a
    /// reload.
    pub running: watch::Sender<Option<Arc<RunningConfig>>>,
    /// Whether the side thread accepts connections. It does not while another dispatcher that uses
    /// the same sockets serves.
    pub accepting: watch::Sender<bool>,
    /// The accepted host names over TCP; set at the start and by a reload.
    pub hosts: Hosts,
    /// The sockets for HAProxy's agent check; set at the start and by a reload.
    pub agents: AgentSender,
    /// Peers that advice leaves out.
    pub advice_faults: AdviceFaults,
    /// The socket files to check; set at the start and by a reload.
    pub files: SocketFiles,
    /// Reports the state to the service manager.
    pub manager: ServiceManager,
    pub(crate) stop: oneshot::Sender<()>,
    pub(crate) thread: JoinHandle<()>,
}

impl SideThread {
    /// The next request with a waiting client. Requests of clients that gave up are dropped, so
    /// they cause no work, and a command is not carried out after its client got a timeout.
    pub fn request(&self) -> Option<Request> {
        // Bounded by the capacity: new requests wait for the next turn.
        let mut waiting = self.requests.try_iter().take(MAX_REQUESTS);
        waiting.find(|request| !request.is_given_up())
    }

    /// Stops all processes (see [`Spawner::stop`]) and then the side thread. Waits for both, at
    /// most a few seconds longer than `timeout`; once `hurries` says true, no longer than that for
    /// `hurried`. Queued reports are dropped, and requests get a 503 response.
    pub fn stop(mut self, timeout: Duration, hurried: Duration, mut hurries: impl FnMut() -> bool) {
        // Requests are refused at once from here on.
        drop(std::mem::replace(&mut self.requests, mpsc::channel().1));
        self.spawner.stop(timeout);
        let mut deadline = Instant::now() + timeout + PROCESSES_END;
        let mut may_hurry = true;
        loop {
            if may_hurry && hurries() {
                may_hurry = false;
                self.spawner.hurry(hurried);
                deadline = deadline.min(Instant::now() + hurried + PROCESSES_END);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let look = if may_hurry { left.min(HURRY) } else { left };
            match self.reports.recv_timeout(look) {
                Ok(Report::Stopped { killed: 0 }) => break,
                Ok(Report::Stopped { killed }) => {
                    log::warn!("event=processes_killed count={killed} after={timeout:?}");
                    break;
                }
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Timeout) if look < left => {}
                Err(_) => {
                    log::error!("event=processes_left_behind");
                    break;
                }
            }
        }
        self.finish();
    }

    /// Ends the side thread without delay. Running processes continue; see [`Spawner::stop`].
    pub fn finish(self) {
        let SideThread { stop, thread, .. } = self;
        // The thread may have ended already.
        let _ = stop.send(());
        if thread.join().is_err() {
            log::error!("event=admin_thread_panicked");
        }
    }
}
