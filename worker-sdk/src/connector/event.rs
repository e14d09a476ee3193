//! What a connector tells its application, and asks of it.

use super::error::ConnectionLost;

/// An attempt that is about to be made.
///
/// With `max_retries` 3 and `max_retries_alternative` 2 the events of a connect that fails are
/// `(false, 2)`, `(false, 1)`, `(false, 0)`, `(true, 1)` and `(true, 0)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt<A = super::Address> {
    /// Whether the attempt goes to an alternative address: the attempts on the current one have
    /// failed.
    pub alternative: bool,
    /// Attempts of the same kind that are left after this one.
    pub retries_left: u32,
    /// The address. The handler may replace it, for this attempt.
    pub address: A,
}

/// What follows when all attempts have failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// All attempts again, after a back-off.
    TryAgain,
    /// The error [`Error::ConnectionLost`](super::Error::ConnectionLost).
    GiveUp,
}

pub(super) type OnAttempt = dyn Fn(&mut Attempt) + Send + Sync;
pub(super) type OnConnectionLost = dyn Fn(&ConnectionLost) -> Decision + Send + Sync;
