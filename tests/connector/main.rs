//! The connector against real sockets, blocking and with tokio.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod advice;
mod attempts;
mod limits;
mod names;
mod sessions;
mod support;
