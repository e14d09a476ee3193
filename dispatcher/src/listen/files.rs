//! Files of Unix sockets that something else has removed or replaced: nothing can connect any more, and no system call
//! says so. They are looked at from time to time on a thread that may wait, the status and readiness show those that are
//! missing, and a reload makes them again.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::fcntl::Flock;
use tokio::sync::Notify;

use crate::api::status::SocketFileStatus;
use crate::background::logger::value;

/// A socket file that the dispatcher has made.
#[derive(Clone, Debug)]
pub struct SocketFile {
    /// Its place in the file system.
    pub path: PathBuf,
    /// The device it is on.
    pub device: u64,
    /// What it is there.
    pub inode: u64,
    /// Keeps other dispatchers away from this path.
    pub lock: Arc<Flock<File>>,
}

impl SocketFile {
    /// Whether there is no such file any more, or another one in its place. What cannot be looked at is there.
    pub fn is_missing(&self) -> bool {
        match std::fs::symlink_metadata(&self.path) {
            Ok(found) => !is(&found, self.device, self.inode),
            Err(error) => matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ),
        }
    }

    /// Whether its lock file is still the one that is locked.
    pub fn is_locked(&self, lock: &Path) -> bool {
        let (Ok(found), Ok(held)) = (std::fs::symlink_metadata(lock), self.lock.metadata()) else {
            return false;
        };
        is(&found, held.dev(), held.ino())
    }
}

/// Whether a file is this one.
pub fn is(found: &std::fs::Metadata, device: u64, inode: u64) -> bool {
    (found.dev(), found.ino()) == (device, inode)
}

/// Most news that wait for the hot thread to ask. Beyond that the oldest are left out.
const MOST_NEWS: usize = 64;

/// What was seen at a look that was not so at the one before.
#[derive(Clone, Debug)]
pub struct News {
    /// When.
    pub at: SystemTime,
    /// Which file.
    pub file: SocketFileStatus,
    /// It is there again, or not wanted any more, after so long; `None`: it is missing.
    pub missed: Option<Duration>,
}

/// All of them, and those that are missing. Shared by the hot thread, which says which there are, and the side thread.
#[derive(Clone, Debug, Default)]
pub struct SocketFiles {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    /// Whether there are news, so that the hot thread rarely touches the lock.
    any_news: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct State {
    /// What each is for, and the file.
    all: Vec<(String, SocketFile)>,
    missing: Vec<(SystemTime, SocketFileStatus)>,
    news: VecDeque<News>,
}

impl State {
    fn tell(&mut self, news: News) {
        if self.news.len() == MOST_NEWS {
            self.news.pop_front();
        }
        self.news.push_back(news);
    }
}

impl SocketFiles {
    /// From now on these are looked at.
    pub fn set(&self, all: Vec<(String, SocketFile)>) {
        self.lock().all = all;
        self.changed.notify_one();
    }

    /// Waits until others are to be looked at.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Those that were missing at the last look.
    pub(crate) fn missing(&self) -> Vec<SocketFileStatus> {
        self.lock().missing.iter().map(|(_, file)| file.clone()).collect()
    }

    /// What has changed since the last call, in its order. Never waits: if the lock is taken, it is told the next time.
    pub(crate) fn news(&self) -> Vec<News> {
        if !self.any_news.load(Ordering::Acquire) {
            return Vec::new();
        }
        let Ok(mut state) = self.state.try_lock() else { return Vec::new() };
        self.any_news.store(false, Ordering::Release);
        state.news.drain(..).collect()
    }

    /// Looks at all of them, and logs what is new. A file system may be slow.
    pub(crate) fn look(&self) {
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
            state.tell(News { at: now, file: file.clone(), missed: None });
        }
        for (since, file) in &gone {
            let missed = Some(now.duration_since(*since).unwrap_or_default());
            state.tell(News { at: now, file: file.clone(), missed });
        }
        state.missing = kept;
        state.missing.extend(new.iter().map(|file| (now, file.clone())));
        drop(state);
        if !(new.is_empty() && gone.is_empty()) {
            self.any_news.store(true, Ordering::Release);
        }
        for file in new {
            log::error!(
                "event=socket_file_missing socket={} path={} \
                 hint=\"nothing can connect there; a reload makes it again: systemctl reload, or kill -HUP {}\"",
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
