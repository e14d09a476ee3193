//! Watches the files of Unix sockets. If another program removes or replaces a file, no client can
//! connect any more, and no system call reports it. A thread that may block checks the files
//! regularly, the status and readiness show missing files, and a reload makes them again.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use tokio::sync::Notify;

use crate::api::status::SocketFileStatus;
use crate::background::logger::value;

/// A socket file that the dispatcher has made.
#[derive(Clone, Debug)]
pub struct SocketFile {
    /// Its path.
    pub path: PathBuf,
    /// The device of the file.
    pub device: u64,
    /// The inode of the file.
    pub inode: u64,
    /// The lock that keeps other dispatchers away from this path.
    pub lock: Arc<PathLock>,
}

/// The locked lock file beside a socket.
///
/// In a take-over two dispatchers hold the same lock, because one passes it to the other. While it
/// is shared, neither removes the socket file or the lock; the kernel removes the lock when the
/// last of them has closed it.
#[derive(Debug)]
pub struct PathLock {
    file: File,
    shared: AtomicBool,
}

impl PathLock {
    /// Locks the file.
    ///
    /// # Errors
    /// `WouldBlock` if another process holds the lock.
    pub fn lock(file: File) -> std::io::Result<PathLock> {
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(PathLock { file, shared: AtomicBool::new(false) })
    }

    /// A lock that another dispatcher has passed, and still holds.
    pub fn passed(file: File) -> PathLock {
        PathLock { file, shared: AtomicBool::new(true) }
    }

    /// The lock file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Another dispatcher holds the same lock, and uses the socket.
    pub fn share(&self) {
        self.shared.store(true, Ordering::SeqCst);
    }

    /// This dispatcher alone uses the socket.
    pub fn own(&self) {
        self.shared.store(false, Ordering::SeqCst);
    }

    /// Whether another dispatcher holds the same lock.
    pub fn is_shared(&self) -> bool {
        self.shared.load(Ordering::SeqCst)
    }
}

impl Drop for PathLock {
    fn drop(&mut self) {
        if !self.is_shared() {
            // A child that has not run its program yet may have a copy of the descriptor.
            let _ = flock(&self.file, FlockOperation::NonBlockingUnlock);
        }
    }
}

impl SocketFile {
    /// Whether the file is missing or replaced. A file that cannot be checked counts as present.
    pub fn is_missing(&self) -> bool {
        match std::fs::symlink_metadata(&self.path) {
            Ok(found) => !is(&found, self.device, self.inode),
            Err(error) => matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ),
        }
    }

    /// Whether the lock file is still the file that this process has locked.
    pub fn is_locked(&self, lock: &Path) -> bool {
        let (Ok(found), Ok(held)) = (std::fs::symlink_metadata(lock), self.lock.file().metadata())
        else {
            return false;
        };
        is(&found, held.dev(), held.ino())
    }
}

/// Whether `found` is this file.
pub fn is(found: &std::fs::Metadata, device: u64, inode: u64) -> bool {
    (found.dev(), found.ino()) == (device, inode)
}

/// Most changes that wait for the hot thread. Beyond that the oldest are dropped.
const MAX_EVENTS: usize = 64;

/// A change since the check before.
#[derive(Clone, Debug)]
pub struct FileEvent {
    /// The time of the check.
    pub at: SystemTime,
    /// The file.
    pub file: SocketFileStatus,
    /// For how long the file was missing, if it is back or no longer wanted; `None`: it is missing
    /// now.
    pub missed: Option<Duration>,
}

/// All socket files, and the missing ones. The hot thread sets the list; the side thread checks the
/// files.
#[derive(Clone, Debug, Default)]
pub struct SocketFiles {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    /// Whether there are changes, so that the hot thread rarely takes the lock.
    any_events: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct State {
    /// The purpose and the file of each.
    all: Vec<(String, SocketFile)>,
    missing: Vec<(SystemTime, SocketFileStatus)>,
    events: VecDeque<FileEvent>,
}

impl State {
    fn record(&mut self, events: FileEvent) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(events);
    }
}

impl SocketFiles {
    /// Replaces the list of files to check.
    pub fn set(&self, all: Vec<(String, SocketFile)>) {
        self.lock().all = all;
        self.changed.notify_one();
    }

    /// Waits until the list has changed.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The files that were missing at the last check.
    pub(crate) fn missing(&self) -> Vec<SocketFileStatus> {
        self.lock().missing.iter().map(|(_, file)| file.clone()).collect()
    }

    /// The changes since the last call, in order. Never blocks: if the lock is taken, the next call
    /// returns them.
    pub(crate) fn events(&self) -> Vec<FileEvent> {
        if !self.any_events.load(Ordering::Acquire) {
            return Vec::new();
        }
        let Ok(mut state) = self.state.try_lock() else { return Vec::new() };
        self.any_events.store(false, Ordering::Release);
        state.events.drain(..).collect()
    }

    /// Checks all files and logs what has changed. May block on a slow file system.
    pub(crate) fn check(&self) {
        let all = self.lock().all.clone();
        let found: Vec<SocketFileStatus> = all
            .into_iter()
            .filter(|(_, file)| file.is_missing())
            .map(|(socket, file)| SocketFileStatus {
                socket,
                path: file.path.display().to_string(),
            })
            .collect();
        let now = SystemTime::now();
        let mut state = self.lock();
        let before = std::mem::take(&mut state.missing);
        let (kept, gone): (Vec<_>, Vec<_>) =
            before.into_iter().partition(|(_, file)| found.contains(file));
        let is_new = |file: &&SocketFileStatus| !kept.iter().any(|(_, before)| before == *file);
        let new: Vec<SocketFileStatus> = found.iter().filter(is_new).cloned().collect();
        for file in &new {
            state.record(FileEvent { at: now, file: file.clone(), missed: None });
        }
        for (since, file) in &gone {
            let missed = Some(now.duration_since(*since).unwrap_or_default());
            state.record(FileEvent { at: now, file: file.clone(), missed });
        }
        state.missing = kept;
        state.missing.extend(new.iter().map(|file| (now, file.clone())));
        drop(state);
        if !(new.is_empty() && gone.is_empty()) {
            self.any_events.store(true, Ordering::Release);
        }
        for file in new {
            log::error!(
                "event=socket_file_missing socket={} path={} \
                 hint=\"no client can connect there; a reload creates it again: systemctl reload, or kill -HUP {}\"",
                value(&file.socket),
                value(&file.path),
                std::process::id()
            );
        }
        for (_, file) in gone {
            log::info!(
                "event=socket_file_back socket={} path={}",
                value(&file.socket),
                value(&file.path)
            );
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
