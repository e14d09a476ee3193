//! Steered pools at whole dispatchers: the kernel chooses among unmodified servers.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod cgroup;
mod edges;
mod hashed;
mod life;
mod members;
mod place;
mod ready;
mod reload;
mod serve;
mod servers;
mod shared;
mod workers;
