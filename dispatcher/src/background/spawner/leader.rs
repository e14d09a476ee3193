//! The leader of a process group: a child of this process, or a process that an earlier dispatcher
//! started and that is only watched.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use dispatch_protocol::wire::Token;
use nix::sys::signal::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::process::Child;
use tokio::sync::oneshot;

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
    /// A child of a process that forks workers, and the status that this process will report.
    Forked(AsyncFd<OwnedFd>, Status),
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
                Ok(_) => match status_of(pidfd.as_fd()).await {
                    Some(status) => describe(ExitStatus::from_raw(status)),
                    None => UNKNOWN.to_owned(),
                },
                Err(error) => format!("unknown: {error}"),
            },
            Leader::Forked(pidfd, reported) => match pidfd.readable().await {
                Ok(_) => match reported.of(pidfd.as_fd()).await {
                    Some(status) => describe(ExitStatus::from_raw(status)),
                    None => "unknown: the process that forked it has ended".to_owned(),
                },
                Err(error) => format!("unknown: {error}"),
            },
            Leader::Gone => UNKNOWN.to_owned(),
        }
    }
}

/// The status of a forked worker, which its parent reports, or else the kernel.
#[derive(Debug)]
pub(super) struct Status(oneshot::Receiver<i32>);

impl Status {
    /// How long the parent may take to report.
    const WITHIN: Duration = Duration::from_secs(1);

    pub(super) fn new(reported: oneshot::Receiver<i32>) -> Status {
        Status(reported)
    }

    /// The status of a worker that has ended.
    async fn of(&mut self, pidfd: BorrowedFd<'_>) -> Option<i32> {
        if let Ok(Ok(status)) = tokio::time::timeout(Status::WITHIN, &mut self.0).await {
            return Some(status);
        }
        status_of(pidfd).await
    }
}

/// How long a process may stay unreaped before its status is unknown.
const REAPED: Duration = Duration::from_millis(250);

/// The interval between two questions.
const LOOK: Duration = Duration::from_millis(5);

/// The status of a process that has ended and is not a child. Until it is reaped, `/proc` has the
/// status; after that the kernel has it, from Linux 6.15 on.
async fn status_of(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let end = Instant::now() + REAPED;
    loop {
        if let Ok(Some(status)) = sys::pidfd_exit_status(pidfd) {
            return Some(status);
        }
        let Some(pid) = pid_of(pidfd) else {
            // It was reaped meanwhile.
            return sys::pidfd_exit_status(pidfd).ok().flatten();
        };
        // Unreaped before and after: what was read is of this process.
        let status = zombie_status(pid).filter(|_| pid_of(pidfd) == Some(pid));
        if status.is_some() || Instant::now() >= end {
            return status;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The process id behind a pidfd; `None` once the process was reaped.
fn pid_of(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
    (pid > 0).then_some(pid)
}

/// The status in `/proc/PID/stat`.
fn zombie_status(pid: i32) -> Option<i32> {
    // The kernel shows 0 to a reader who may not look into the process, and this link to none.
    std::fs::read_link(format!("/proc/{pid}/ns/user")).ok()?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit(") ").next()?.split(' ');
    // The third field and the 52nd one.
    if fields.next()? != "Z" {
        return None;
    }
    fields.nth(48)?.trim().parse().ok()
}

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
/// id at the recorded time, and after the pidfd was opened it was still the same. `groups` has all
/// processes by group once they were read, because reading them for each record would take long.
pub(super) fn find(
    token: Token,
    record: &Record,
    groups: &mut Option<HashMap<i32, Vec<i32>>>,
) -> (i32, Found) {
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
    let members = groups.get_or_insert_with(group::all).get(&pid);
    let left =
        members.is_some_and(|members| members.iter().any(|&it| it != pid && has_token(it, token)));
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

pub(super) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(number)) => match Signal::try_from(number) {
            Ok(signal) => format!("signal {number} ({signal})"),
            Err(_) => format!("signal {number}"),
        },
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A zombie and a reaped process, which is not waited for like a child.
    #[tokio::test]
    async fn the_status_of_a_process_that_is_not_a_child_is_known() {
        for (script, expected) in
            [("exit 3", "exit status 3"), ("kill -9 $$", "signal 9 (SIGKILL)")]
        {
            let mut command = std::process::Command::new("sh");
            let mut child = command.args(["-c", script]).spawn().expect("a shell");
            let pid = Pid::from_child(&child);
            let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK).expect("it is not reaped");
            let pidfd = sys::readable(pidfd).expect("watched");
            drop(pidfd.readable().await.expect("it ends"));
            let zombie = zombie_status(pid.as_raw_pid()).expect("a zombie");
            assert_eq!(describe(ExitStatus::from_raw(zombie)), expected);
            assert_eq!(status_of(pidfd.as_fd()).await, Some(zombie));
            child.wait().expect("reaped");
            assert_eq!(pid_of(pidfd.as_fd()), None);
            // The kernel knows it, or nothing does.
            let later = status_of(pidfd.as_fd()).await;
            assert!(later.is_none_or(|status| status == zombie), "{later:?}");
        }
    }
}
