//! Process groups. Each process that is started leads a group, so that its own children, such as
//! the server behind `sh -c`, are stopped and waited for with it and do not run beside its
//! replacement.

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
fn has_only_zombies(group: Pid) -> bool {
    let Ok(entries) = std::fs::read_dir("/proc") else { return false };
    let mut members = 0;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        // A process that ends meanwhile does not count.
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // The process name before it may contain anything.
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        let mut fields = after_name.split(' ');
        let (state, its_group) = (fields.next(), fields.nth(1));
        if its_group != Some(group.to_string().as_str()) {
            continue;
        }
        if !matches!(state, Some("Z" | "X")) {
            return false;
        }
        members += 1;
    }
    members > 0 || is_empty(group)
}
