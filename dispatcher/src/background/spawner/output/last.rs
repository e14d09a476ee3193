//! The last lines of each process, kept in memory.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use dispatcher_core::ProcessId;

/// Lines of each process that are kept in memory, and the bytes of each.
pub(super) const LAST_LINES: usize = 20;
pub(super) const LAST_LINE: usize = 512;

/// Ended processes whose last lines are kept.
pub(super) const ENDED_PROCESSES: usize = 1024;

/// A stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// The name of the stream in the log.
    pub fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

pub(super) const STREAMS: [Stream; 2] = [Stream::Stdout, Stream::Stderr];

/// A line that a process has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputLine {
    /// The process.
    pub pid: i32,
    /// Where it wrote the line.
    pub stream: Stream,
    /// The line, not escaped; at most 512 bytes.
    pub text: String,
}

pub(super) type Kept = Arc<Mutex<VecDeque<OutputLine>>>;

/// The last lines of each process, also of those that have ended. Without output in the log there
/// are none.
#[derive(Clone, Debug, Default)]
pub struct LastOutput(pub(super) Arc<Mutex<AllKept>>);

#[derive(Debug, Default)]
pub(super) struct AllKept {
    /// With the number of its start among all processes.
    pub(super) processes: HashMap<ProcessId, (u64, Kept)>,
    started: u64,
}

impl LastOutput {
    /// The last 20 lines, oldest first.
    pub fn of(&self, process: ProcessId) -> Vec<OutputLine> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = all.processes.get(&process).map(|(_, kept)| Arc::clone(kept));
        drop(all);
        let kept = kept.unwrap_or_default();
        let lines = kept.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().cloned().collect()
    }

    /// The place for the lines of a process that starts.
    pub(super) fn keep(&self, process: ProcessId) -> Kept {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let AllKept { processes, started } = &mut *all;
        if processes.len() >= ENDED_PROCESSES {
            // A reader holds the lines of each process that has not ended.
            let ended = processes.iter().filter(|(_, (_, kept))| Arc::strong_count(kept) == 1);
            let oldest =
                ended.min_by_key(|(_, (started, _))| *started).map(|(process, _)| *process);
            if let Some(oldest) = oldest {
                processes.remove(&oldest);
            }
        }
        *started += 1;
        let (_, kept) = processes.entry(process).or_insert_with(|| (*started, Kept::default()));
        Arc::clone(kept)
    }
}
