//! The side thread: everything that may wait, so that the hot thread never does.
//!
//! Owns one thread with a tokio runtime, on which two services run: HTTP on the admin socket, and the
//! [`crate::background::spawner`]. They talk to the hot thread over bounded channels and wake it; they know nothing of workers,
//! connections or policies. [`client`] is the other end of the admin socket, for the CLI.

pub mod client;
pub mod command;
mod elsewhere;
mod explained;
mod gate;
mod guests;
mod http;
mod manager;
mod metrics;
mod reload;
mod routes;
mod who_may;

#[cfg(test)]
mod tests;

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, Notify, oneshot, watch};

pub use self::manager::{ServiceManager, State};
pub use self::who_may::Hosts;

use self::command::{Answer, Command, CommandError};
use self::elsewhere::Elsewhere;
use self::guests::Guests;
use self::http::AdminSocket;
use crate::api::decisions::{Next, Past};
use crate::api::status::Status;
use crate::background::keep;
use crate::background::logger::quoted;
use crate::background::spawner::{self, Report, Spawner};
use crate::event_loop::reload::{InForce, Plan, Reloaded};
use crate::listen::files::SocketFiles;

/// Wakes the hot thread. Called after something was put into one of its channels, from any thread.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Most questions waiting for the hot thread. Status questions share one, so a few are plenty.
const MAX_REQUESTS: usize = 16;

/// How often socket files are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// Looks at the socket files again and again.
async fn look_at(files: SocketFiles, elsewhere: Elsewhere) {
    loop {
        let looked = files.clone();
        // It is tried again in any case.
        let _ = elsewhere.run(move || looked.look()).await;
        let _ = tokio::time::timeout(LOOK, files.changed()).await;
    }
}

/// How long a finishing side thread may hold the process up.
const THREAD_END: Duration = Duration::from_secs(1);

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
pub struct Admin {
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
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Admin {
    /// Starts the side thread, serving HTTP on `listener` from now on, and on `tcp` for reading only. `wake` is called whenever there is something in
    /// `requests` or `reports`.
    ///
    /// # Errors
    /// When the system has no thread or epoll instance left.
    pub fn start(
        listener: UnixListener,
        tcp: Option<TcpListener>,
        wake: Wake,
    ) -> io::Result<Admin> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        listener.set_nonblocking(true)?;
        let (listener, tcp) = {
            let _inside = runtime.enter();
            let make = |tcp: TcpListener| {
                tcp.set_nonblocking(true)?;
                tokio::net::TcpListener::from_std(tcp)
            };
            (tokio::net::UnixListener::from_std(listener)?, tcp.map(make).transpose()?)
        };
        let (request_sender, requests) = mpsc::sync_channel(MAX_REQUESTS);
        let files = SocketFiles::default();
        let gate = gate::Gate::new(request_sender, Arc::clone(&wake), files.clone());
        let (spawner, spawns, reports) = spawner::service(wake);
        let metrics_max_workers = Arc::new(AtomicU32::new(0));
        let guests = Guests::default();
        let admin_rate = guests.rate();
        let reload = Arc::new(Notify::new());
        let elsewhere = Elsewhere::start()?;
        let (manager, teller) = manager::manager();
        let hosts = Hosts::default();
        let (place, socket) = watch::channel(Arc::new(listener));
        let reloader = reload::Reloader::new(
            Arc::clone(&gate),
            manager.clone(),
            elsewhere.clone(),
            hosts.clone(),
            place,
        );
        let named = hosts.clone();
        let watched = files.clone();
        let app = routes::App {
            gate,
            max_workers: Arc::clone(&metrics_max_workers),
            reloader: Arc::clone(&reloader),
        };
        let asked = Arc::clone(&reload);
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("admin".to_owned()).spawn(move || {
            let serve = async {
                // What these own is shared with the task that replaces one that failed.
                let spawns = Arc::new(Mutex::new(spawns));
                tokio::spawn(keep::task("processes", move || {
                    let spawns = Arc::clone(&spawns);
                    async move { spawns.lock().await.run().await }
                }));
                let teller = Arc::new(Mutex::new(teller));
                tokio::spawn(keep::task("service_manager", move || {
                    let teller = Arc::clone(&teller);
                    async move { teller.lock().await.run().await }
                }));
                tokio::spawn(keep::task("reload", move || {
                    Arc::clone(&reloader).whenever(Arc::clone(&asked))
                }));
                if let Some(tcp) = tcp {
                    let (tcp, app, guests) = (Arc::new(tcp), app.clone(), guests.clone());
                    tokio::spawn(keep::task("admin_http", move || {
                        http::serve_tcp(
                            Arc::clone(&tcp),
                            app.clone(),
                            guests.clone(),
                            named.clone(),
                        )
                    }));
                }
                let socket = Arc::new(AdminSocket::new(socket));
                tokio::spawn(keep::task("admin_socket", move || {
                    http::serve(Arc::clone(&socket), app.clone(), guests.clone())
                }));
                tokio::spawn(keep::task("socket_files", move || {
                    look_at(watched.clone(), elsewhere.clone())
                }));
                // An error is a dropped `Admin`: the same.
                let _ = stopped.await;
            };
            // The tasks are kept one by one. What is left is the runtime itself, which panics if it cannot poll; what is
            // registered with it cannot be moved to another one.
            if let Err(error) = keep::caught(|| runtime.block_on(serve)) {
                log::error!("event=admin_thread_panicked error={}", quoted(error));
            }
            runtime.shutdown_timeout(THREAD_END);
        })?;
        Ok(Admin {
            requests,
            reports,
            spawner,
            metrics_max_workers,
            admin_rate,
            reload,
            hosts,
            files,
            manager,
            stop,
            thread,
        })
    }

    /// Serves the admin socket here from now on: made again, because its file was removed. To be called on the side thread.
    ///
    /// # Errors
    /// What registering it answers.
    pub(crate) fn listen(
        place: &watch::Sender<Arc<tokio::net::UnixListener>>,
        listener: UnixListener,
    ) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        place.send_replace(Arc::new(tokio::net::UnixListener::from_std(listener)?));
        Ok(())
    }

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
        let Admin { stop, thread, .. } = self;
        // It may have ended by itself already.
        let _ = stop.send(());
        if thread.join().is_err() {
            log::error!("event=admin_thread_panicked");
        }
    }
}
