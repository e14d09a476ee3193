//! Process groups. Each process that is started leads a group, so that its own children, such as
//! the server behind `sh -c`, are stopped and waited for with it and do not run beside its
//! replacement.

use std::collections::HashMap;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::background::logger::quoted;

/// The interval between checks of an ending group: the first, and the longest.
const LOOK: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));

/// Sends a signal to a whole group. A group without members is no error.
///
/// The leader must be unreaped, or the group must be known to have a member: otherwise its number
/// may belong to another group.
pub(super) fn signal(group: Pid, signal: Signal) {
    match killpg(group, signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => log::warn!(
            "event=signal_failed group={group} signal={signal} error={error}",
            error = quoted(error)
        ),
    }
}

/// Whether a group has no members, zombies included.
pub(super) fn is_empty(group: Pid) -> bool {
    killpg(group, None) == Err(Errno::ESRCH)
}

/// Waits until a group has no members but zombies. For a group whose leader is reaped.
pub(super) async fn emptied(group: Pid) {
    let mut look = LOOK.0;
    loop {
        // Unreaped zombies count as members; `/proc` identifies them and is read only when the wait
        // is long.
        if is_empty(group) || (look >= LOOK.1 && has_only_zombies(group)) {
            return;
        }
        tokio::time::sleep(look).await;
        look = (look * 2).min(LOOK.1);
    }
}

/// False, too, when that cannot be found out.
pub(super) fn has_only_zombies(group: Pid) -> bool {
    let members = members(group.as_raw());
    match members.is_empty() {
        true => is_empty(group),
        false => members.iter().all(|(_, stat)| stat.ended),
    }
}

/// What `/proc/PID/stat` tells of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    /// It is a zombie.
    pub(super) ended: bool,
    /// The process id of its parent.
    pub(super) parent: i32,
    pub(super) group: i32,
    /// When the kernel started it, in clock ticks since the boot.
    pub(super) started: u64,
}

/// `None` if there is no such process.
pub(super) fn stat(pid: i32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The process name before it may contain anything.
    let mut fields = text.rsplit(") ").next()?.split(' ');
    let ended = matches!(fields.next()?, "Z" | "X");
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    let started = fields.nth(16)?.parse().ok()?;
    Some(Stat { ended, parent, group, started })
}

/// The members of a group. A process that ends meanwhile may be missing.
pub(super) fn members(group: i32) -> Vec<(i32, Stat)> {
    processes().filter(|(_, stat)| stat.group == group).collect()
}

/// The members of every group, without zombies.
pub(super) fn all() -> HashMap<i32, Vec<i32>> {
    let mut groups: HashMap<i32, Vec<i32>> = HashMap::new();
    for (pid, stat) in processes().filter(|(_, stat)| !stat.ended) {
        groups.entry(stat.group).or_default().push(pid);
    }
    groups
}

fn processes() -> impl Iterator<Item = (i32, Stat)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| Some((pid, stat(pid)?)))
}
