//! Work that may block, on threads of its own: log, closes, drops, processes.
//!
//! The event loop hands work over through bounded queues and never waits for the result.

pub mod cleaner;
pub mod closer;
pub mod logger;
pub mod restart;
pub mod service_manager;
pub mod spawner;
