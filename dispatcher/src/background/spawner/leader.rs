//! The leader of a process group: a child of this process, or a process that an earlier dispatcher
//! started and that is only watched.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use dispatch_protocol::wire::Token;
use nix::sys::signal::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

use super::group;
use super::journal::Record;
use crate::sys;

/// The leader of a process group.
#[derive(Debug)]
pub(super) enum Leader {
    /// A child of this process.
    Child(Child),
    /// A process that is not a child.
    Watched(AsyncFd<OwnedFd>),
    /// It has ended before this dispatcher started; processes of its group run.
    Gone,
}

impl Leader {
    /// Waits for its end, for display.
    pub(super) async fn wait(&mut self) -> String {
        match self {
            Leader::Child(child) => match child.wait().await {
                Ok(status) => describe(status),
                Err(error) => format!("unknown: {error}"),
            },
            Leader::Watched(pidfd) => match pidfd.readable().await {
                Ok(_) => status_of(pidfd.as_fd()).await,
                Err(error) => format!("unknown: {error}"),
            },
            Leader::Gone => UNKNOWN.to_owned(),
        }
    }
}

/// The status of a process that is not a child and has ended. The kernel tells it once the parent
/// has reaped the process; before Linux 6.15 it tells only the parent.
async fn status_of(pidfd: BorrowedFd<'_>) -> String {
    let end = Instant::now() + REAPED;
    loop {
        match sys::pidfd_exit_status(pidfd) {
            Ok(Some(status)) => return describe(ExitStatus::from_raw(status)),
            Ok(None) if Instant::now() < end => tokio::time::sleep(LOOK).await,
            Ok(None) | Err(_) => return UNKNOWN.to_owned(),
        }
    }
}

/// How long the parent of an adopted process may take to reap it.
const REAPED: Duration = Duration::from_millis(250);

/// The interval between two questions.
const LOOK: Duration = Duration::from_millis(5);

pub(crate) const UNKNOWN: &str = "unknown: an earlier dispatcher started it";

/// What is left of a process that an earlier dispatcher has recorded.
#[derive(Debug)]
pub(super) enum Found {
    /// It runs.
    Running(OwnedFd),
    /// It has ended; processes of its group run.
    Group,
    /// Nothing.
    Nothing,
}

/// Looks for a recorded process. Its identity is certain: the kernel started the process with this
/// id at the recorded time, and after the pidfd was opened it was still the same.
pub(super) fn find(token: Token, record: &Record) -> (i32, Found) {
    let Some(pid) = record.pid else { return (0, Found::Nothing) };
    let is_it = || match (record.started, group::stat(pid)) {
        (_, None) => false,
        (Some(started), Some(stat)) => stat.started == started && !stat.ended,
        // The dispatcher ended before it could record the time.
        (None, Some(stat)) => !stat.ended && has_token(pid, token),
    };
    if is_it()
        && let Some(pidfd) = Pid::from_raw(pid).map(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK))
        && let Ok(pidfd) = pidfd
        && is_it()
    {
        return (pid, Found::Running(pidfd));
    }
    // While the group has members, the kernel gives its number to no other process.
    let left = group::members(pid)
        .into_iter()
        .any(|(member, stat)| !stat.ended && member != pid && has_token(member, token));
    (pid, if left { Found::Group } else { Found::Nothing })
}

/// Watches a process that is not a child.
///
/// # Errors
///
/// What `epoll_ctl` answers.
pub(super) fn watch(pidfd: OwnedFd) -> io::Result<Leader> {
    sys::readable(pidfd).map(Leader::Watched)
}

/// Whether a process has this token in its environment. False, too, where that cannot be read.
fn has_token(pid: i32, token: Token) -> bool {
    let wanted = format!("DISPATCH_TOKEN={token}");
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(number)) => match Signal::try_from(number) {
            Ok(signal) => format!("signal {number} ({signal})"),
            Err(_) => format!("signal {number}"),
        },
        (None, None) => status.to_string(),
    }
}
