//! Workers of the line protocol at whole dispatchers: written here by hand, and the examples.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod examples;
mod hostile;
mod joining;
mod loads;
mod recovery;
mod status;
mod take_over;
mod worker;
