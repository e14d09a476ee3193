//! The types of the admin interface: what the server answers and what the commands read. Plain data.

pub mod command;
pub mod decisions;
pub mod reload;
pub mod status;
