//! Real dispatchers and workers: start, stop, reload, death, shortages.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod adoption;
#[cfg(feature = "demo")]
mod demo;
mod deploying;
mod exits;
mod faults;
mod joining;
mod reload;
mod reload_edges;
mod rolls;
mod several_dispatchers;
mod shortages;
mod slow_workers;
mod spawned;
mod supervision;
mod surroundings;
mod take_over;
