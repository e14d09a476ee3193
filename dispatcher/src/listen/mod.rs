//! Listening sockets: binds them, takes those that a service manager passes, and watches the files
//! of Unix sockets.

pub(crate) mod bind;
pub mod error;
pub mod files;
pub(crate) mod inherit;
pub(crate) mod take_over;
