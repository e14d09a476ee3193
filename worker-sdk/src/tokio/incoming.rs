//! The connections of a listener as a stream.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;

use super::{Connection, Listener};
use crate::client::Error;

type Accept = Pin<Box<dyn Future<Output = Result<Connection, Error>> + Send + Sync>>;

/// The connections of a [`Listener`] as a stream; from [`Listener::into_incoming`].
///
/// It ends when the listener is closed or drained. Any other error is its last item.
pub struct Incoming {
    listener: Listener,
    /// The pending accept, if there is one.
    next: Option<Accept>,
    ended: bool,
}

impl Incoming {
    pub(super) fn new(listener: Listener) -> Incoming {
        Incoming { listener, next: None, ended: false }
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl Stream for Incoming {
    type Item = Result<Connection, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let Incoming { listener, next, .. } = &mut *self;
        // A separate future instead of `poll_accept`, because other tasks may accept from clones.
        let accept = next.get_or_insert_with(|| {
            let listener = listener.clone();
            Box::pin(async move { listener.accept().await })
        });
        let result = ready!(accept.as_mut().poll(cx));
        *next = None;
        match result {
            Ok(connection) => Poll::Ready(Some(Ok(connection))),
            Err(error) => {
                self.ended = true;
                Poll::Ready(match error {
                    Error::Closed | Error::Draining => None,
                    error => Some(Err(error)),
                })
            }
        }
    }
}
