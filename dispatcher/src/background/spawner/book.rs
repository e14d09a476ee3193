//! The journal as the tasks of all processes share it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dispatch_protocol::wire::Token;

use super::SpawnRequest;
use super::journal::Journal;
use crate::background::logger::{quoted, value};
use crate::config::OnDispatcherLoss;
use dispatcher_core::ProcessId;

/// The journal, once there is one.
#[derive(Clone, Debug, Default)]
pub(super) struct Book(Arc<Mutex<BookState>>);

#[derive(Debug, Default)]
pub(super) struct BookState {
    pub(super) path: Option<PathBuf>,
    pub(super) journal: Option<Journal>,
    /// The log was told that there is no journal.
    pub(super) reported: bool,
    pub(super) tokens: HashMap<ProcessId, Token>,
    /// Another dispatcher has the journal.
    pub(super) given_up: bool,
}

impl Book {
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut BookState) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The process has ended.
    pub(super) fn ended(&self, process: ProcessId) {
        self.with(|book| {
            if let (Some(token), Some(journal)) = (book.tokens.remove(&process), &mut book.journal)
            {
                journal.ended(token);
            }
        });
    }

    pub(super) fn leaves(&self, process: ProcessId, leaves: bool) {
        self.with(|book| {
            if let (Some(token), Some(journal)) = (book.tokens.get(&process), &mut book.journal) {
                match leaves {
                    true => journal.leaves(*token),
                    false => journal.stays(*token),
                }
            }
        });
    }
}

/// Why a process that would outlive this dispatcher is not started.
pub(super) const GIVEN_UP: &str = "another dispatcher has taken over";

impl BookState {
    /// Whether this process must not be started, because the next dispatcher would not know it.
    pub(super) fn refuses(&self, request: &SpawnRequest) -> bool {
        self.given_up && request.on_dispatcher_loss == OnDispatcherLoss::Serve
    }

    /// The journal, which is made now if there is none. Does not wait for its lock: the side thread
    /// has other work.
    pub(super) fn journal(&mut self) -> Option<&mut Journal> {
        if self.journal.is_none()
            && let Some(path) = &self.path
        {
            match Journal::open(path, true, Duration::ZERO) {
                Ok(journal) => self.journal = journal,
                Err(error) if !std::mem::replace(&mut self.reported, true) => {
                    report_journal(path, &error);
                }
                Err(_) => {}
            }
        }
        self.journal.as_mut()
    }
}

pub(super) fn report_journal(path: &Path, error: &std::io::Error) {
    log::error!(
        "event=process_journal_not_opened path={} error={} \
         hint=\"processes that are started now will not be adopted by a later dispatcher\"",
        value(&path.display()),
        quoted(error)
    );
}
