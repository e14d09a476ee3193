//! The dispatcher: accepts TCP connections and passes each one to the least-loaded worker.

pub mod config;
pub mod pool;
pub mod status;
