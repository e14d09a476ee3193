//! Drops objects whose drop takes long, away from the hot thread: large tables, and socket files to
//! remove.
//!
//! The thread starts with the dispatcher, because later the system may have no thread left. Reloads
//! produce such objects; while too many wait, no reload is accepted: see [`Cleaner::is_full`].

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use crate::background::restart;

/// Most objects that wait for the thread; further objects wait in the hot thread.
const MAX_WAITING: usize = 64;

type Rubbish = Box<dyn Send>;

/// Drops objects on another thread.
pub struct Cleaner {
    thread: JoinHandle<()>,
    rubbish: SyncSender<Rubbish>,
    /// Objects for which there was no room: those of one reload at most, because no reload is
    /// accepted while there are any.
    late: VecDeque<Rubbish>,
}

impl std::fmt::Debug for Cleaner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cleaner").field("late", &self.late.len()).finish_non_exhaustive()
    }
}

impl Cleaner {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start() -> io::Result<Cleaner> {
        let (rubbish, receiver) = sync_channel(MAX_WAITING);
        let thread = std::thread::Builder::new().name("cleaner".to_owned());
        let thread = thread.spawn(move || {
            for rubbish in receiver {
                restart::piece("cleaner", || drop(rubbish));
            }
        })?;
        Ok(Cleaner { thread, rubbish, late: VecDeque::new() })
    }

    /// Drops the object soon, on another thread.
    pub fn clean(&mut self, rubbish: impl Send + 'static) {
        self.late.push_back(Box::new(rubbish));
        self.hand_over();
    }

    /// Whether too many objects wait. Also moves waiting objects to the thread if there is room.
    pub fn is_full(&mut self) -> bool {
        self.hand_over();
        !self.late.is_empty()
    }

    fn hand_over(&mut self) {
        while let Some(next) = self.late.pop_front() {
            // The thread ends only after this sender is gone.
            if let Err(TrySendError::Full(next) | TrySendError::Disconnected(next)) =
                self.rubbish.try_send(next)
            {
                return self.late.push_front(next);
            }
        }
    }

    /// Waits until everything is dropped.
    pub fn finish(self) {
        for rubbish in self.late {
            // Called only at the end of the process, so it may block.
            let _ = self.rubbish.send(rubbish);
        }
        drop(self.rubbish);
        let _ = self.thread.join();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::ThreadId;

    use super::*;

    struct Told(Sender<ThreadId>);

    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send(std::thread::current().id()).expect("the receiver exists");
        }
    }

    struct Defect;

    impl Drop for Defect {
        fn drop(&mut self) {
            panic!("on purpose");
        }
    }

    /// Its drop blocks until the other end is gone.
    struct Slow(Receiver<()>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    #[test]
    fn what_is_handed_over_is_dropped_elsewhere_and_waited_for() {
        let (sender, receiver) = channel();
        let mut cleaner = Cleaner::start().expect("a thread");
        for _ in 0..3 {
            cleaner.clean(Told(sender.clone()));
            cleaner.clean(Defect);
        }
        drop(sender);
        cleaner.finish();
        let dropped: Vec<ThreadId> = receiver.try_iter().collect();
        assert_eq!(dropped.len(), 3, "also after a panic");
        assert!(!dropped.contains(&std::thread::current().id()));
    }

    #[test]
    fn what_finds_no_room_waits_and_is_never_dropped_here() {
        let (sender, receiver) = channel();
        let mut cleaner = Cleaner::start().expect("a thread");
        let (go, slow) = channel();
        cleaner.clean(Slow(slow));
        let most = 3 * MAX_WAITING;
        for _ in 0..most {
            cleaner.clean(Told(sender.clone()));
        }
        assert!(cleaner.is_full());
        assert_eq!(receiver.try_iter().count(), 0);
        drop((go, sender));
        cleaner.finish();
        let here = std::thread::current().id();
        assert_eq!(receiver.iter().filter(|thread| *thread != here).count(), most);
    }
}
