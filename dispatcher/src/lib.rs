//! The dispatcher: accepts TCP connections and passes each one to the worker that the policy chooses.

pub mod admin;
pub mod affinity;
pub mod cleaner;
pub mod cli;
pub mod closer;
pub mod config;
pub mod decisions;
#[cfg(feature = "demo")]
pub mod demo;
mod keep;
pub mod logger;
pub mod measure;
pub mod pool;
pub mod shell;
pub mod signals;
#[doc(hidden)]
pub mod sim;
pub mod socket_files;
pub mod spawner;
pub mod status;
mod sys;
mod words;
