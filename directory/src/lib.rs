//! The directory of the relay: it knows which worker holds which client id and which members a
//! group has, and gives two workers a direct link when they need it first. Messages do not pass
//! through it, except those to other hosts.
#![warn(missing_docs)]

pub mod registry;
