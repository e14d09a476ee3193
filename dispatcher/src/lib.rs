//! The dispatcher: accepts TCP connections and passes each one to the least-loaded worker.

pub mod config;
pub mod pool;
#[doc(hidden)]
pub mod sim;
pub mod status;
