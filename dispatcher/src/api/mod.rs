//! The types of the admin interface: what the server answers and what the commands read. Plain
//! data.

pub mod action;
pub mod advice;
pub mod command;
pub mod decisions;
pub mod log_level;
pub mod reload;
pub mod status;
