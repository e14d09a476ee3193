//! The worker's side of the protocol, against a dispatcher made by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod drain;
mod finish;
mod loss;
mod nonblocking;
mod reconnect;
mod unread;
mod worker;
