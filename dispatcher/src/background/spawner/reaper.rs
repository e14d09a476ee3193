//! Processes that the dispatcher inherits: as process 1 of a container all whose parent has ended, elsewhere those that a
//! wrapper had started before it became the dispatcher. Their ends are collected, or they would stay as zombies.
//!
//! Ends of processes that the spawner started are left to it: a child is looked at before it is collected.

use std::collections::HashSet;
use std::io;
use std::os::unix::net::UnixStream as Pair;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, WaitOptions, waitpid};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::sys;

/// How soon it is looked again when the first child that has ended is one of the spawner's.
const SOON: Duration = Duration::from_millis(10);

/// How often it is looked without a signal. The signal is enough; this is for a system that could not give it to us.
const ANYWAY: Duration = Duration::from_secs(10);

/// The children that the spawner waits for itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Own(Arc<Mutex<HashSet<i32>>>);

impl Own {
    /// To be called before anything else can run on this thread after the process was started.
    pub(super) fn add(&self, pid: i32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(pid);
    }

    /// Its end was collected.
    pub(super) fn remove(&self, pid: i32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
    }

    fn has(&self, pid: i32) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&pid)
    }
}

/// Collects the ends of children that are not `own`, for good. Only for a process that has no other children.
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
            Some(pid) if own.has(pid) => tokio::time::sleep(SOON).await,
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
