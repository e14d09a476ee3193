//! The systemd unit of this process: which one it is, whether processes that it starts survive it,
//! and what order of systemd is behind a stop.
//!
//! Asks with `systemctl`, so that the dispatcher needs no D-Bus client. Every question has a time
//! limit and a size limit. Must run on the side thread, or before it is started: see
//! [`reaper::expect`].

use std::ffi::OsStr;
use std::fmt;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::Instant;

use crate::background::logger::quoted;
use crate::background::spawner::reaper;

/// How long a stop may take to find its reason. systemd answers within milliseconds unless it is
/// overloaded or restarts itself.
const STOP_KIND_TIME: Duration = Duration::from_secs(2);

/// How long the settings of a unit are waited for.
const SETTINGS_TIME: Duration = Duration::from_secs(5);

/// The pause between two attempts while systemd does not answer.
const RETRY: Duration = Duration::from_millis(50);

/// Most bytes that are read of an answer. A system that shuts down has some hundreds of jobs.
const MAX_ANSWER: u64 = 1 << 20;

/// The reason of a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopKind {
    /// systemd stops the unit, or the whole system.
    Stop,
    /// systemd starts the unit again afterwards.
    Restart,
    /// systemd has no order for the unit: the signal came from another process.
    NoJob,
    /// systemd did not answer in time.
    Unknown,
}

/// A unit of systemd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unit {
    name: String,
    /// It belongs to the service manager of a user (`systemctl --user`).
    user: bool,
}

impl Unit {
    /// The service as which systemd started this process; `None` if systemd did not start it.
    pub(crate) fn own() -> Option<Unit> {
        let variable = |name: &str| std::env::var(name).ok();
        let cgroup = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        own(variable, std::process::id(), &cgroup)
    }
}

/// What systemd does to the processes of a unit when its main process has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    /// `KillMode=`.
    kill_mode: String,
    /// `SendSIGKILL=`.
    send_sigkill: bool,
}

impl Ending {
    /// Whether processes that the main process has started survive it.
    pub(crate) fn spares_processes(&self) -> bool {
        match self.kill_mode.as_str() {
            "process" | "none" => true,
            // SIGTERM to the main process, SIGKILL to the others.
            "mixed" => !self.send_sigkill,
            _ => false,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KillMode={}", self.kill_mode)?;
        if self.send_sigkill { Ok(()) } else { f.write_str(" SendSIGKILL=no") }
    }
}

impl Unit {
    /// A unit of the system, by the name that an operator has written.
    pub(crate) fn named(name: &str) -> Unit {
        Unit { name: name.to_owned(), user: false }
    }

    /// What systemd does when the unit's main process has ended.
    ///
    /// # Errors
    ///
    /// When systemd does not answer, or has no such unit.
    pub(crate) async fn ending(&self) -> Result<Ending, String> {
        let deadline = Instant::now() + SETTINGS_TIME;
        // The name follows `--`, so that it cannot be taken for an option.
        let arguments = ["show", "-p", "LoadState,KillMode,SendSIGKILL", "--", &self.name];
        ending(&systemctl(self.user, &arguments, deadline).await?, &self.name)
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Reads `KillMode=mixed` and so on, a property a line.
fn ending(answer: &str, unit: &str) -> Result<Ending, String> {
    let property =
        |name: &str| answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    match (property("LoadState"), property("KillMode")) {
        (Some("loaded"), Some(kill_mode)) => Ok(Ending {
            kill_mode: kill_mode.to_owned(),
            send_sigkill: property("SendSIGKILL") != Some("no"),
        }),
        (Some("not-found"), _) => Err(format!("systemd has no unit {unit}")),
        (Some("loaded"), None) => Err(format!("{unit} is not a unit with processes")),
        (Some(state), _) => Err(format!("systemd cannot load the unit {unit} (LoadState={state})")),
        (None, _) => Err("systemctl: an answer without LoadState".to_owned()),
    }
}

/// Why `on_dispatcher_loss = "serve"` of these pools does not work in this unit.
pub(crate) fn serve_refused(unit: &Unit, ending: &Ending, pools: &[String]) -> String {
    format!(
        "on_dispatcher_loss = \"serve\" of {} does not work in the unit {unit}: with {ending}, systemd \
         kills the processes of the dispatcher when the dispatcher ends",
        pools.join(", ")
    )
}

/// What to do about [`serve_refused`].
pub(crate) fn serve_hint(unit: &Unit) -> String {
    format!(
        "run the dispatcher in dispatcher-workers.service, or set KillMode=process (systemctl edit \
         {unit}), or set on_dispatcher_loss to \"drain\" or \"stop\""
    )
}

/// A shell and its programs inherit both variables from a service. The process id tells whether
/// systemd started this very process.
fn own(variable: impl Fn(&str) -> Option<String>, pid: u32, cgroup: &str) -> Option<Unit> {
    variable("INVOCATION_ID").filter(|id| !id.is_empty())?;
    let started = variable("SYSTEMD_EXEC_PID")?.parse::<u32>().ok()?;
    if started == pid { unit_of_cgroup(cgroup) } else { None }
}

/// The service in the text of `/proc/self/cgroup`.
fn unit_of_cgroup(text: &str) -> Option<Unit> {
    text.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        // systemd uses the unified hierarchy, which has no name, or the older one of its own. A
        // system can have both.
        if matches!(controllers, "" | "name=systemd") { unit_of_path(path) } else { None }
    })
}

fn unit_of_path(path: &str) -> Option<Unit> {
    let parts: Vec<&str> = path.split('/').collect();
    // The service may have cgroups of its own below its unit.
    let suffixes = [".service", ".scope", ".slice"];
    let place = parts.iter().rposition(|part| suffixes.iter().any(|end| part.ends_with(end)))?;
    let name = parts[place];
    // `user@1000.service` is the service manager of a user.
    let manager = |part: &&str| part.starts_with("user@") && part.ends_with(".service");
    let user = parts[..place].iter().any(manager);
    name.ends_with(".service").then(|| Unit { name: name.to_owned(), user })
}

/// The order of systemd behind a stop of `unit`, asked while the stop is in progress. Takes some
/// milliseconds, and at most [`STOP_KIND_TIME`].
pub(crate) async fn stop_kind(unit: &Unit) -> StopKind {
    let deadline = Instant::now() + STOP_KIND_TIME;
    loop {
        match systemctl(unit.user, &["list-jobs", "--no-legend", "--plain"], deadline).await {
            Ok(jobs) => return kind(&jobs, &unit.name),
            Err(error) if Instant::now() + RETRY >= deadline => {
                log::warn!("event=stop_kind_unknown unit={} error={}", unit.name, quoted(error));
                return StopKind::Unknown;
            }
            // It restarts itself (`systemctl daemon-reexec`), for example.
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
}

/// A line of the answer is `5 dispatcher.service restart running`. A pattern as argument of the
/// command would not match names with a backslash.
fn kind(jobs: &str, unit: &str) -> StopKind {
    let job = jobs.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        (words.next() == Some(unit)).then(|| words.next())?
    });
    match job {
        Some("stop") => StopKind::Stop,
        // A start that was ordered during the stop has replaced the order to stop.
        Some("restart" | "try-restart" | "start") => StopKind::Restart,
        _ => StopKind::NoJob,
    }
}

/// What `systemctl` prints, until `deadline`.
async fn systemctl(user: bool, arguments: &[&str], deadline: Instant) -> Result<String, String> {
    run(OsStr::new("systemctl"), user, arguments, deadline).await
}

async fn run(
    program: &OsStr,
    user: bool,
    arguments: &[&str],
    deadline: Instant,
) -> Result<String, String> {
    let mut command = Command::new(program);
    command
        .args(user.then_some("--user"))
        .args(["--no-pager", "--full"])
        .args(arguments)
        .env("LC_ALL", "C")
        .env("SYSTEMD_COLORS", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| format!("systemctl: {error}"))?;
    let _expected = child.id().and_then(|pid| i32::try_from(pid).ok()).map(reaper::expect);
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let all = async {
        let (output, errors) = tokio::join!(text(output), text(errors));
        (output, errors, child.wait().await)
    };
    let Ok((output, errors, ended)) = tokio::time::timeout_at(deadline, all).await else {
        return Err("systemctl: no answer in time".to_owned());
    };
    match ended {
        Ok(status) if status.success() => Ok(output),
        Ok(status) => match errors.trim().lines().next() {
            Some(line) => Err(format!("systemctl: {line}")),
            None => Err(format!("systemctl: {status}")),
        },
        Err(error) => Err(format!("systemctl: {error}")),
    }
}

async fn text(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // What was read before an error is used; the exit status tells whether it is complete.
        let _ = pipe.take(MAX_ANSWER).read_to_end(&mut bytes).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests;
