//! Reaps processes that the dispatcher inherits, which would otherwise stay as zombies: as process
//! 1 of a container all orphans, elsewhere those that a wrapper started before it became the
//! dispatcher.
//!
//! The spawner reaps its own processes: the reaper looks at each child before it reaps it.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::os::unix::net::UnixStream as Pair;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, WaitOptions, waitpid};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::sys;

/// How soon to check again when the first child that has ended is one of the spawner's.
const SOON: Duration = Duration::from_millis(10);

/// How often to check without a signal. The signal is enough; this is for a system that could not
/// deliver it.
const ANYWAY: Duration = Duration::from_secs(10);

/// The children that the spawner waits for itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Own(Arc<Mutex<HashSet<i32>>>);

impl Own {
    /// Call this after the process was started, before anything else can run on this thread.
    pub(super) fn add(&self, pid: i32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(pid);
    }

    /// The process was reaped.
    pub(super) fn remove(&self, pid: i32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
    }

    fn has(&self, pid: i32) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&pid)
    }
}

/// Children that other parts of the dispatcher wait for themselves.
static EXPECTED: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// See [`expect`].
#[derive(Debug)]
pub(crate) struct Expected(i32);

impl Drop for Expected {
    fn drop(&mut self) {
        EXPECTED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

/// The caller waits for this child until it drops the result. Call this on the reaper's thread,
/// after the process was started and before anything else can run there.
pub(crate) fn expect(pid: i32) -> Expected {
    EXPECTED.lock().unwrap_or_else(PoisonError::into_inner).insert(pid);
    Expected(pid)
}

fn is_expected(pid: i32) -> bool {
    EXPECTED.lock().unwrap_or_else(PoisonError::into_inner).contains(&pid)
}

/// Reaps children that are not `own`, forever. Only for a process without other children.
pub(super) async fn reap(own: Own) {
    let mut signals = match ends() {
        Ok(stream) => Some(stream),
        Err(error) => {
            log::warn!(
                "event=children_not_watched error={}",
                crate::background::logger::quoted(error)
            );
            None
        }
    };
    loop {
        match sys::ended_child() {
            Some(pid) if own.has(pid) || is_expected(pid) => tokio::time::sleep(SOON).await,
            Some(pid) => {
                if let Some(child) = Pid::from_raw(pid) {
                    let _ = waitpid(Some(child), WaitOptions::NOHANG);
                }
                log::debug!("event=process_reaped pid={pid}");
            }
            None => {
                let mut bytes = [0; 64];
                let next = async {
                    match &mut signals {
                        Some(stream) => drop(stream.read(&mut bytes).await),
                        None => std::future::pending().await,
                    }
                };
                let _ = tokio::time::timeout(ANYWAY, next).await;
            }
        }
    }
}

/// Has a byte after each SIGCHLD.
fn ends() -> io::Result<UnixStream> {
    let (read, write) = Pair::pair()?;
    read.set_nonblocking(true)?;
    write.set_nonblocking(true)?;
    signal_hook::low_level::pipe::register(libc::SIGCHLD, write)?;
    UnixStream::from_std(read)
}
