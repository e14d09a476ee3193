//! A thread for blocking work such as reading files and resolving names. It is started with the
//! dispatcher, so it is available when no new thread can be created. It runs one job at a time.

use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::sync::oneshot;

use crate::background::restart;

/// Most queued jobs. A reload and the check of socket files queue at most one job each.
const MAX_JOBS: usize = 16;

type Job = Box<dyn FnOnce() + Send>;

/// A handle to the thread. The thread ends after its last job when all handles are dropped; nothing
/// waits for it.
#[derive(Clone, Debug)]
pub(super) struct FileThread {
    jobs: SyncSender<Job>,
}

impl FileThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system cannot create a thread.
    pub(super) fn start() -> io::Result<FileThread> {
        let (jobs, receiver) = sync_channel::<Job>(MAX_JOBS);
        // A job catches its own panics: see `run`.
        let work = move || receiver.into_iter().for_each(|job| job());
        std::thread::Builder::new().name("files".to_owned()).spawn(work)?;
        Ok(FileThread { jobs })
    }

    /// Runs a job on the thread.
    ///
    /// # Errors
    /// If the job panicked or the queue is full.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        let (done, result) = oneshot::channel();
        let job = move || {
            let outcome = restart::caught(job);
            let outcome = outcome.map_err(|why| format!("a defect of the dispatcher: {why}"));
            // If the receiver is gone, the result is not needed.
            let _ = done.send(outcome);
        };
        let queued = self.jobs.try_send(Box::new(job));
        queued.map_err(|_| "the thread for files is busy; try again".to_owned())?;
        result.await.unwrap_or_else(|_| Err("the thread for files has ended".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_only_its_job() {
        let file_thread = FileThread::start().expect("a thread");
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let failed = file_thread.run(|| -> u32 { panic!("on purpose") }).await;
            assert!(failed.expect_err("it panicked").ends_with("on purpose"));
            let here = std::thread::current().id();
            let there = file_thread.run(|| std::thread::current().id()).await.expect("done");
            assert_ne!(here, there);
        });
    }
}
