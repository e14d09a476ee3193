//! The directory of the relay as a process of this dispatcher: starts it, starts it again when it
//! ends, asks it for its numbers, and ends it.
//!
//! It is this program with other arguments. It knows that its dispatcher has gone when its standard
//! input ends, so it ends with it in every case. None of its work is done in this process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dispatch_directory::Query;
use dispatch_protocol::relay::Name;
use tokio::process::{Child, Command};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::api::status::{RelayProcess, RelayStatus};
use crate::background::logger::quoted;
use crate::background::spawner::reaper;
use crate::config::{NOT_INHERITED, RelayDirectory, RelaySettings};
use crate::reload::RunningConfig;
use crate::sys;

/// This program, also after its file was replaced or removed: the directory that is started again
/// is of the same version.
const PROGRAM: &str = "/proc/self/exe";

/// The first wait before another start.
const FIRST_WAIT: Duration = Duration::from_millis(100);

/// The longest wait before another start.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// After this long a process counts as one that works, and the waits begin anew.
const STEADY: Duration = Duration::from_secs(10);

/// How often the directory is asked for its numbers.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// How often, while it does not answer.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// How long the process may take to end.
const END: Duration = Duration::from_secs(2);

/// The part of the side thread that looks after the directory.
#[derive(Clone, Debug)]
pub(crate) struct DirectoryProcess {
    configured: watch::Receiver<Option<Arc<RunningConfig>>>,
    /// Whether this dispatcher serves. Before that, another one may have the directory.
    serving: watch::Receiver<bool>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    stop: Notify,
    stopped: Notify,
}

#[derive(Debug, Default)]
struct State {
    process: Option<RelayProcess>,
    /// Whether the last question was answered; `None` before the first.
    up: Option<bool>,
    error: Option<String>,
    numbers: BTreeMap<String, u64>,
    stopping: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirectoryProcess {
    pub(crate) fn new(
        configured: watch::Receiver<Option<Arc<RunningConfig>>>,
        serving: watch::Receiver<bool>,
    ) -> DirectoryProcess {
        DirectoryProcess { configured, serving, shared: Arc::default() }
    }

    /// The part of the status; `None` if no directory is configured.
    pub(crate) fn status(&self) -> Option<RelayStatus> {
        let socket = self.settings()?.socket?;
        let state = self.shared.lock();
        Some(RelayStatus {
            socket: socket.display().to_string(),
            state: match state.up {
                Some(true) => "up",
                None if state.process.is_some() => "starting",
                Some(false) | None => "down",
            }
            .to_owned(),
            error: state.error.clone().filter(|_| state.up != Some(true)),
            process: state.process,
            numbers: state.numbers.clone(),
        })
    }

    fn settings(&self) -> Option<RelaySettings> {
        self.configured.borrow().as_ref().map(|running| running.config.relay.clone())
    }

    /// Waits until this dispatcher serves, and returns the settings of its start.
    async fn begun(&self) -> Option<(RelaySettings, Option<PathBuf>)> {
        let mut serving = self.serving.clone();
        serving.wait_for(|serving| *serving).await.ok()?;
        let mut configured = self.configured.clone();
        let running = configured.wait_for(Option::is_some).await.ok()?;
        let config = &running.as_ref()?.config;
        Some((config.relay.clone(), config.limits.relay_ticket_key.clone()))
    }

    /// Keeps a process running, if one is configured, until [`Self::stop`].
    pub(crate) async fn keep(self) {
        let Some((settings, ticket_key)) = self.begun().await else { return };
        let (Some(directory), Some(socket)) = (&settings.directory, &settings.socket) else {
            return std::future::pending().await;
        };
        let mut wait = FIRST_WAIT;
        // A task that replaces a failed one continues to count.
        self.shared.lock().process.get_or_insert_default();
        loop {
            let began = Instant::now();
            if self.shared.lock().stopping {
                break;
            }
            let problem = match start(directory, socket, ticket_key.as_deref()) {
                Err(error) => error.to_string(),
                Ok(mut child) => {
                    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
                    let _expected = pid.map(reaper::expect);
                    self.started(child.id());
                    // `wait` would close it.
                    let input = child.stdin.take();
                    tokio::select! {
                        ended = child.wait() => match ended {
                            Ok(status) => format!("it has ended: {status}"),
                            Err(error) => error.to_string(),
                        },
                        () = self.shared.stop.notified() => {
                            drop(input);
                            end(child).await;
                            break;
                        }
                    }
                }
            };
            if began.elapsed() >= STEADY {
                wait = FIRST_WAIT;
            }
            log::error!(
                "event=relay_directory_ended error={} restart_in={}",
                quoted(&problem),
                humantime::format_duration(wait)
            );
            self.failed(problem);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.shared.stop.notified() => break,
            }
            wait = (wait * 2).min(LONGEST_WAIT);
        }
        self.shared.lock().process = None;
        self.shared.stopped.notify_one();
    }

    fn started(&self, pid: Option<u32>) {
        let mut state = self.shared.lock();
        let process = state.process.get_or_insert_default();
        process.pid = pid;
        process.starts += 1;
        let starts = process.starts;
        drop(state);
        log::info!("event=relay_directory_started pid={} starts={starts}", pid.unwrap_or_default());
    }

    fn failed(&self, problem: String) {
        let mut state = self.shared.lock();
        if let Some(process) = &mut state.process {
            process.pid = None;
        }
        state.up = Some(false);
        state.error = Some(problem);
    }

    /// Ends the process and waits for its end.
    pub(crate) async fn stop(&self) {
        {
            let mut state = self.shared.lock();
            state.stopping = true;
            if state.process.is_none() {
                return;
            }
        }
        self.shared.stop.notify_one();
        let _ = tokio::time::timeout(END + END, self.shared.stopped.notified()).await;
    }

    /// Asks the directory for its numbers again and again, for the status.
    pub(crate) async fn ask(self) {
        if self.begun().await.is_none() {
            return;
        }
        let mut open: Option<(PathBuf, Query)> = None;
        loop {
            // The address of a directory of its own may change in a reload.
            let socket = self.settings().and_then(|settings| settings.socket);
            let Some(socket) = socket else {
                let mut configured = self.configured.clone();
                configured.mark_unchanged();
                if configured.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let query = open.take().filter(|(path, _)| *path == socket).map(|(_, query)| query);
            // A directory that hangs holds up one blocking thread for a few seconds.
            let asked = tokio::task::spawn_blocking(move || {
                let answer = numbers(query, &socket);
                answer.map(|(query, numbers)| ((socket, query), numbers))
            });
            let asked = asked.await.unwrap_or_else(|error| Err(error.to_string()));
            let again = if asked.is_ok() { ASK_EVERY } else { ASK_AGAIN };
            self.answered(asked.map(|(query, numbers)| {
                open = Some(query);
                numbers
            }));
            tokio::time::sleep(again).await;
        }
    }

    fn answered(&self, answer: Result<BTreeMap<String, u64>, String>) {
        let mut state = self.shared.lock();
        match answer {
            Ok(numbers) => {
                state.up = Some(true);
                state.numbers = numbers;
            }
            // The process that was just started may not listen yet.
            Err(_) if state.up.is_none() && state.process.is_some_and(|it| it.starts <= 1) => {}
            Err(error) => {
                // The end of the process says more.
                if state.up != Some(false) || state.error.is_none() {
                    state.error = Some(error);
                }
                state.up = Some(false);
            }
        }
    }
}

fn start(
    directory: &RelayDirectory,
    socket: &Path,
    ticket_key: Option<&Path>,
) -> std::io::Result<Child> {
    let mut command = Command::new(PROGRAM);
    command.arg0("dispatcher").args(["relay", "serve", "--end-with-stdin"]);
    match directory {
        RelayDirectory::Defaults => {
            command.arg("--socket").arg(socket);
            if let Some(key) = ticket_key {
                command.arg("--ticket-key").arg(key);
            }
        }
        RelayDirectory::File(file) => {
            command.arg("--config").arg(file);
        }
    }
    for name in NOT_INHERITED {
        command.env_remove(name);
    }
    // A process group of its own: Ctrl-C at a terminal reaches only the dispatcher.
    command.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
    sys::start_with_default_signals(command.as_std_mut());
    command.spawn()
}

/// Waits for the end of a process whose standard input has ended; SIGKILL if it takes too long.
async fn end(mut child: Child) {
    if tokio::time::timeout(END, child.wait()).await.is_err() {
        log::warn!("event=relay_directory_killed after={END:?}");
        // It may have ended meanwhile.
        let _ = child.kill().await;
    }
}

/// Asks over the open connection, or over a new one.
fn numbers(open: Option<Query>, socket: &Path) -> Result<(Query, BTreeMap<String, u64>), String> {
    let ask = || {
        let mut query = match open {
            Some(query) => query,
            None => {
                let namespace = Name::new("default").map_err(std::io::Error::other)?;
                Query::connect(socket, &namespace)?
            }
        };
        let counts = query.stats()?;
        Ok((query, counts))
    };
    let (query, counts) = ask().map_err(|error: std::io::Error| error.to_string())?;
    let numbers = counts.into_iter().map(|count| (count.name.to_string(), count.value)).collect();
    Ok((query, numbers))
}
