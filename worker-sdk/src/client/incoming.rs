//! The connections of a worker as iterators.

use super::log_queue::log_now;
use super::{Connection, Worker};

/// An iterator over the connections of a [`Worker`]; see [`Worker::incoming`].
#[derive(Debug)]
pub struct Incoming<'a> {
    pub(super) worker: &'a Worker,
}

impl Iterator for Incoming<'_> {
    type Item = Connection;

    fn next(&mut self) -> Option<Connection> {
        next(self.worker)
    }
}

/// An iterator over the connections of a [`Worker`], which it owns; see [`Worker::into_incoming`].
#[derive(Debug)]
pub struct IntoIncoming {
    pub(super) worker: Worker,
}

impl Iterator for IntoIncoming {
    type Item = Connection;

    fn next(&mut self) -> Option<Connection> {
        next(&self.worker)
    }
}

impl IntoIterator for Worker {
    type Item = Connection;
    type IntoIter = IntoIncoming;

    fn into_iter(self) -> IntoIncoming {
        self.into_incoming()
    }
}

fn next(worker: &Worker) -> Option<Connection> {
    match worker.accept() {
        Ok(connection) => connection,
        Err(error) => {
            log_now(log::Level::Error, format_args!("no more connections: {error}"));
            None
        }
    }
}
