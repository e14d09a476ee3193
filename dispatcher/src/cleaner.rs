//! Drops what takes long to drop, away from the hot thread: large tables, and socket files that have to be removed.
//!
//! Such things come with a reload, seldom and all at once, so each time has a thread of its own: nothing waits for a
//! close that lingers, and no thread waits for the next reload.

use std::thread::JoinHandle;

/// Drops what it is given.
#[derive(Debug, Default)]
pub struct Cleaner {
    busy: Vec<JoinHandle<()>>,
}

impl Cleaner {
    /// Drops it soon, on another thread; here and now only if the system has none left.
    pub fn clean(&mut self, rubbish: impl Send + 'static) {
        self.busy.retain(|thread| !thread.is_finished());
        let thread = std::thread::Builder::new().name("cleaner".to_owned());
        if let Ok(thread) = thread.spawn(move || drop(rubbish)) {
            self.busy.push(thread);
        }
    }

    /// Waits until everything is dropped.
    pub fn finish(self) {
        for thread in self.busy {
            // A drop that panicked has said so; nothing depends on it.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::thread::ThreadId;

    use super::*;

    struct Rubbish(Sender<ThreadId>);

    impl Drop for Rubbish {
        fn drop(&mut self) {
            self.0.send(std::thread::current().id()).expect("somebody listens");
        }
    }

    #[test]
    fn what_is_handed_over_is_dropped_elsewhere_and_waited_for() {
        let (sender, receiver) = channel();
        let mut cleaner = Cleaner::default();
        for _ in 0..3 {
            cleaner.clean(Rubbish(sender.clone()));
        }
        drop(sender);
        cleaner.finish();
        let dropped: Vec<ThreadId> = receiver.try_iter().collect();
        assert_eq!(dropped.len(), 3);
        assert!(!dropped.contains(&std::thread::current().id()));
    }
}
