//! Tickets of the relay: proof for its directory that a user has a worker in a pool.

use std::path::{Path, PathBuf};

use dispatch_directory::ticket_key;
use dispatch_protocol::relay::ticket::Key;
use dispatch_protocol::wire::Welcome;

use crate::background::logger::quoted;

/// The key of the file that the configuration names. Reading it may wait, so this belongs to the
/// handshake thread.
#[derive(Debug, Default)]
pub(super) struct Tickets {
    /// The file that was read, and its key if it could be.
    read: Option<(PathBuf, Option<Key>)>,
}

impl Tickets {
    /// Appends a ticket to a welcome, if there is a key.
    pub(super) fn append(
        &mut self,
        file: Option<&Path>,
        record: &mut Vec<u8>,
        pool: &str,
        user: u32,
    ) {
        let Some(file) = file else { return self.read = None };
        if self.read.as_ref().is_none_or(|(read, key)| read != file || key.is_none()) {
            let key = match ticket_key::open(file) {
                Ok(key) => Some(key),
                Err(error) => {
                    log::error!(
                        "event=no_relay_ticket file={file} error={error}",
                        file = quoted(&file.display().to_string()),
                        error = quoted(&error.to_string())
                    );
                    None
                }
            };
            self.read = Some((file.to_owned(), key));
        }
        if let Some((_, Some(key))) = &self.read {
            Welcome::append_ticket(record, &key.issue(pool, user));
        }
    }
}
