//! Waking the event loop from another thread.

use std::sync::Arc;

/// Wakes the hot thread. Called after something was put into one of its channels, from any thread.
pub type Wake = Arc<dyn Fn() + Send + Sync>;
