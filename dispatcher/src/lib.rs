//! The dispatcher: accepts TCP connections and passes each one to the worker that the policy chooses.

pub mod admin;
pub mod cleaner;
pub mod cli;
pub mod closer;
pub mod config;
pub mod decisions;
#[cfg(feature = "demo")]
pub mod demo;
mod keep;
pub mod logger;
pub mod preface;
pub mod shell;
pub mod signals;
pub mod socket_files;
pub mod spawner;
pub mod status;
mod sys;
mod words;
