//! Clients with the connector, against the dispatchers and workers of several hosts.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]

mod agent;
mod drain;
mod haproxy;
mod hosts;
mod line_client;
