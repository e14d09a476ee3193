//! The protocol between the dispatcher and its workers, shared by both sides.
//!
//! [`wire`] encodes and decodes the records on the control connection and on the channel.
//! [`mod@line`] has the line protocol, for servers of the acl framework.
//! [`relay`] has the records of messages between workers.
//! [`scoreboard`] is the memory that both sides map: slots, counters and gauges.
//! [`scoreboard::slot`] has every state transition of a slot with its memory ordering.
//! `docs/PROTOCOL.md` specifies the byte layouts. This crate opens no socket, reads no clock and
//! keeps no state.
#![warn(missing_docs)]

pub mod line;
pub mod relay;
pub mod scoreboard;
pub mod wire;

mod sys;

pub use sys::Mapping;
pub use wire::{ClientAddr, Token};
