//! Reloads, one at a time, from all sources; each is reported to the service manager and the log.
//!
//! Owns the order of the steps. `crate::reload` prepares the change and `event_loop` applies it.

use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::net::UnixListener;
use tokio::sync::{Mutex, Notify, watch};

use super::file_thread::FileThread;
use super::listen;
use super::metrics::LastReload;
use super::routes::PATIENCE;
use crate::api::command::{CommandError, Problem};
use crate::api::reload::Reloaded;
use crate::background::logger;
use crate::background::logger::{Quoted, quoted};
use crate::background::restart::message;
use crate::background::service_manager::{ServiceManager, State, unit};
use crate::mailbox::Request;
use crate::mailbox::client::{MailboxClient, NoAnswer};
use crate::mailbox::hosts::Hosts;
use crate::reload::{RunningConfig, prepare};

/// Shared by all sources of reloads.
pub(super) struct Reloader {
    mailbox: Arc<MailboxClient>,
    manager: ServiceManager,
    file_thread: FileThread,
    hosts: Hosts,
    listener: watch::Sender<Arc<UnixListener>>,
    /// The running configuration; `None` until the event loop has started.
    running: watch::Receiver<Option<Arc<RunningConfig>>>,
    /// Held during a reload.
    turn: Mutex<()>,
    /// The result of the last reload.
    last: std::sync::Mutex<LastReload>,
}

type Outcome = Result<Result<Reloaded, CommandError>, NoAnswer>;

impl Reloader {
    pub(super) fn new(
        mailbox: Arc<MailboxClient>,
        manager: ServiceManager,
        file_thread: FileThread,
        hosts: Hosts,
        listener: watch::Sender<Arc<UnixListener>>,
        running: watch::Receiver<Option<Arc<RunningConfig>>>,
    ) -> Arc<Reloader> {
        // The dispatcher started, so its configuration is valid.
        let last = LastReload { successful: true, success_at: since_1970() };
        let (turn, last) = (Mutex::new(()), std::sync::Mutex::new(last));
        Arc::new(Reloader { mailbox, manager, file_thread, hosts, listener, running, turn, last })
    }

    pub(super) fn last(&self) -> LastReload {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reloads whenever `asked` is notified. Notifications during a reload cause one more reload.
    pub(super) async fn whenever(self: Arc<Reloader>, asked: Arc<Notify>) {
        loop {
            asked.notified().await;
            // The log has the result.
            let _ = self.reload("SIGHUP").await;
        }
    }

    /// Reads the configuration and applies it. When this returns, the new configuration is in
    /// force, or nothing has changed.
    pub(super) async fn reload(self: &Arc<Reloader>, by: &str) -> Outcome {
        let _turn = self.turn.lock().await;
        log::info!("event=reloading by={by}");
        self.manager.tell_now(State::Reloading).await;
        // Also after a failure or a panic: the dispatcher serves as before.
        let ready = self.manager.ready_afterwards();
        // A separate task confines a panic to this reload.
        let reloader = Arc::clone(self);
        let outcome = match tokio::spawn(async move { reloader.carry_out().await }).await {
            Ok(outcome) => outcome,
            Err(error) => {
                let panic = error.try_into_panic();
                let why = panic.as_ref().map_or("it was cancelled", |panic| message(&**panic));
                Ok(Err(failed(&format!("a defect of the dispatcher: {why}"))))
            }
        };
        let mut last = self.last();
        last.successful = matches!(outcome, Ok(Ok(_)));
        if last.successful {
            last.success_at = since_1970();
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = last;
        log_outcome(by, &outcome);
        ready.now().await;
        outcome
    }

    /// The running configuration. Waits for the start of the event loop.
    async fn running(&self) -> Result<Arc<RunningConfig>, NoAnswer> {
        let mut running = self.running.clone();
        let started = tokio::time::timeout(PATIENCE, running.wait_for(Option::is_some)).await;
        let started = started.map_err(|_| NoAnswer::Late)?.map_err(|_| NoAnswer::Refused)?;
        started.clone().ok_or(NoAnswer::Refused)
    }

    async fn carry_out(&self) -> Outcome {
        let now = self.running().await?;
        // Files and name services may block; the file thread does not block others.
        let mut plan = match self.file_thread.run(move || prepare(&now)).await {
            Ok(Ok(plan)) => plan,
            Ok(Err(why)) => return Ok(Err(why)),
            Err(why) => return Ok(Err(failed(&why))),
        };
        if let Err(why) = check_unit(&plan.serving_pools()).await {
            return Ok(Err(why));
        }
        let (level, modes) = (plan.log_level(), plan.take_modes());
        let hosts = plan.admin_http_hosts().to_vec();
        let admin = plan.take_admin();
        let plan = Box::new(plan);
        let put = self.mailbox.ask_for(|answer| Request::Reload { plan, answer }, PATIENCE).await?;
        let Ok(mut reloaded) = put else { return Ok(put) };
        let set_modes = move || {
            let set = |(path, mode): &(std::path::PathBuf, u32)| {
                let set = std::fs::set_permissions(path, PermissionsExt::from_mode(*mode));
                set.err().map(|error| format!("mode of {} ({error})", path.display()))
            };
            modes.iter().filter_map(set).collect::<Vec<String>>()
        };
        let left = self.file_thread.run(set_modes).await;
        reloaded
            .needs_restart
            .extend(left.unwrap_or_else(|why| vec![format!("modes of socket files ({why})")]));
        logger::configure(level);
        self.hosts.set(hosts);
        if let Some(admin) = admin
            && let Err(error) = listen(&self.listener, admin)
        {
            reloaded.needs_restart.push(format!("admin_socket ({error})"));
        }
        Ok(Ok(reloaded))
    }
}

/// Refuses pools whose processes are to serve on in a unit that kills them.
async fn check_unit(serving: &[String]) -> Result<(), CommandError> {
    let Some(unit) = unit::Unit::own().filter(|_| !serving.is_empty()) else { return Ok(()) };
    match unit.ending().await {
        Ok(ending) if ending.spares_processes() => Ok(()),
        Ok(ending) => {
            let why = unit::serve_refused(&unit, &ending, serving);
            Err(CommandError::new(Problem::Config, why).hint(unit::serve_hint(&unit)))
        }
        Err(error) => {
            log::warn!("event=unit_unknown unit={unit} error={}", quoted(error));
            Ok(())
        }
    }
}

fn since_1970() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn failed(why: &str) -> CommandError {
    CommandError::new(Problem::Conflict, format!("reading the configuration failed: {why}"))
}

fn log_outcome(by: &str, outcome: &Outcome) {
    match outcome {
        Ok(Ok(reloaded)) => {
            for warning in &reloaded.warnings {
                log::warn!("event=config_warning text={}", one_line(warning));
            }
            for what in &reloaded.needs_restart {
                log::warn!("event=reload_needs_restart what={}", one_line(what));
            }
            let list = |names: &[String]| quoted(names.join(", "));
            log::info!(
                "event=reloaded by={by} added={} removed={} changed={}",
                list(&reloaded.added),
                list(&reloaded.removed),
                list(&reloaded.changed)
            );
        }
        Ok(Err(why)) => {
            log::error!("event=reload_refused by={by} error={}", one_line(&why.to_string()));
        }
        Err(NoAnswer::Late) => log::error!("event=reload_late by={by}"),
        Err(NoAnswer::Refused) => log::error!("event=reload_refused by={by} error=\"stopping\""),
    }
}

/// Quotes a text that has several lines, such as a mistake in a configuration, on one line.
fn one_line(text: &str) -> Quoted<String> {
    quoted(text.lines().map(str::trim_end).collect::<Vec<_>>().join(" / "))
}
