//! The dispatcher: accepts TCP connections and passes each one to the worker that the policy chooses.

pub mod admin;
pub mod api;
pub mod background;
pub mod cli;
pub mod config;
#[cfg(feature = "demo")]
pub mod demo;
pub mod event_loop;
pub mod listen;
pub mod preface;
pub mod signals;
mod sys;
mod words;
