//! Reloading, from whoever asks for it: one after the other, the service manager and the log told of each.
//!
//! Owns the order of the steps. What a reload is made of, and what it does, is `shell::reload`.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::{Mutex, Notify};

use super::Request;
use super::command::{CommandError, Problem};
use super::gate::{Gate, NoAnswer};
use super::routes::PATIENCE;
use crate::logger;
use crate::shell::reload::{Reloaded, prepare};

/// How long the service manager may take to read what it is told.
const NOTIFY_TIME: Duration = Duration::from_secs(1);

/// Shared by everybody who can ask for a reload.
pub(super) struct Reloader {
    gate: Arc<Gate>,
    /// Held by the one that is under way.
    turn: Mutex<()>,
}

type Outcome = Result<Result<Reloaded, CommandError>, NoAnswer>;

impl Reloader {
    pub(super) fn new(gate: Arc<Gate>) -> Arc<Reloader> {
        Arc::new(Reloader { gate, turn: Mutex::new(()) })
    }

    /// Reloads whenever it is asked to, by somebody who does not wait. Asked several times meanwhile, once.
    pub(super) async fn whenever(self: Arc<Reloader>, asked: Arc<Notify>) {
        loop {
            asked.notified().await;
            // It is in the log, how it went.
            let _ = self.reload("SIGHUP").await;
        }
    }

    /// Reads the configuration again and puts it into force. When this returns, it is, or nothing has changed.
    pub(super) async fn reload(&self, by: &str) -> Outcome {
        let _turn = self.turn.lock().await;
        log::info!("event=reloading by={by}");
        let mut begin = vec![NotifyState::Reloading];
        // Newer service managers want both in one message.
        begin.extend(NotifyState::monotonic_usec_now());
        notify(begin).await;
        let outcome = self.carry_out().await;
        tell(by, &outcome);
        // Even if it failed: the dispatcher serves as before.
        notify(vec![NotifyState::Ready]).await;
        outcome
    }

    async fn carry_out(&self) -> Outcome {
        let now = self.gate.ask_for(Request::InForce, PATIENCE).await?;
        // Files and name services may take their time; here nobody else waits for them.
        let prepared = tokio::task::spawn_blocking(move || prepare(&now)).await;
        let mut plan = match prepared {
            Ok(Ok(plan)) => plan,
            Ok(Err(why)) => return Ok(Err(why)),
            Err(_) => {
                let message = "reading the configuration failed: a defect of the dispatcher";
                return Ok(Err(CommandError::new(Problem::Conflict, message)));
            }
        };
        let (level, modes) = (plan.log_level(), plan.take_modes());
        let plan = Box::new(plan);
        let put = self.gate.ask_for(|answer| Request::Reload { plan, answer }, PATIENCE).await?;
        let Ok(mut reloaded) = put else { return Ok(put) };
        let set_modes = move || {
            let set = |(path, mode): &(std::path::PathBuf, u32)| {
                let set = std::fs::set_permissions(path, PermissionsExt::from_mode(*mode));
                set.err().map(|error| format!("mode of {} ({error})", path.display()))
            };
            modes.iter().filter_map(set).collect::<Vec<String>>()
        };
        reloaded
            .needs_restart
            .extend(tokio::task::spawn_blocking(set_modes).await.unwrap_or_default());
        logger::configure(level);
        Ok(Ok(reloaded))
    }
}

/// Waits until the message is sent, so that the service manager has it before whoever asked gets the answer.
async fn notify(states: Vec<NotifyState<'static>>) {
    let tell = tokio::task::spawn_blocking(move || sd_notify::notify(&states));
    let failed = match tokio::time::timeout(NOTIFY_TIME, tell).await {
        Ok(Ok(Ok(()))) => return,
        Ok(Ok(Err(error))) => error.to_string(),
        Ok(Err(error)) => error.to_string(),
        Err(late) => late.to_string(),
    };
    log::warn!("event=not_notified error=\"{failed}\" hint=\"is NOTIFY_SOCKET alive?\"");
}

fn tell(by: &str, outcome: &Outcome) {
    match outcome {
        Ok(Ok(reloaded)) => {
            for warning in &reloaded.warnings {
                log::warn!("event=config_warning text=\"{}\"", quoted(warning));
            }
            for what in &reloaded.needs_restart {
                log::warn!("event=reload_needs_restart what=\"{}\"", quoted(what));
            }
            let list = |names: &[String]| quoted(&names.join(", "));
            log::info!(
                "event=reloaded by={by} added=\"{}\" removed=\"{}\" changed=\"{}\"",
                list(&reloaded.added),
                list(&reloaded.removed),
                list(&reloaded.changed)
            );
        }
        Ok(Err(why)) => {
            log::error!("event=reload_refused by={by} error=\"{}\"", quoted(&why.to_string()));
        }
        Err(NoAnswer::Late) => log::error!("event=reload_late by={by}"),
        Err(NoAnswer::Refused) => log::error!("event=reload_refused by={by} error=\"stopping\""),
    }
}

/// On one line, without quotes of its own.
fn quoted(text: &str) -> String {
    text.lines().map(str::trim_end).collect::<Vec<_>>().join(" / ").replace('"', "'")
}
