//! SDK for workers of the connection dispatcher: receive accepted TCP connections over a Unix
//! socket.
//!
//! The dispatcher accepts connections and passes each one to a worker process of a pool; by default
//! to the one with the fewest connections. This crate is the worker's side. It joins the pool,
//! gives connections to the application on request, counts the live ones, and joins again after a
//! loss of the dispatcher, while live connections continue. Without a dispatcher the same program
//! listens itself.
//!
//! | feature | for | start at |
//! |---|---|---|
//! | none | programs that block, with one thread or many | `Worker` |
//! | `tokio` | tokio | `tokio::Listener` |
//! | `axum` | axum; the listener goes to `axum::serve` | `tokio::Listener` |
//! | `mio` | event loops with mio | `mio::MioWorker` |
//! | `connector` | clients of a service on several hosts; with `tokio` also for tokio | `connector::Connector` |
//! | `relay` | messages between workers | `relay::Relay` |
//! | `testing` | tests of a server against a real dispatcher; for `dev-dependencies` | `testing::Dispatcher` |
//!
//! The crate `dispatch-protocol` has the protocol itself.
//!
//! Further functions, in every layer:
//!
//! - **Drain** (`dispatcher drain`, `dispatcher scale`): the listener ends, `on_drain` callbacks
//!   run, and the deadline shuts down live connections. The programs below then say goodbye and
//!   wait for their last connection, because the return of `main` would end all connections. A
//!   worker that stays waits in `resumed`.
//! - **Claims**: `claim` binds a client to this worker by what the client will send, such as a new
//!   session id.
//! - **Gauges**: `gauge` shows numbers that a pool can use for its choice, such as the time that
//!   requests wait. The SDK measures machine and process if the pool needs it
//!   (`WorkerConfig::sample`).
//!
//! - **Several dispatchers**: `DISPATCH_SOCKET` may list several sockets, separated by `:`. They are
//!   tried in order, and a worker stays with the dispatcher that it has joined until it loses it.
//!
//! - **Pre-fork**: [`prefork`] loads the application once and forks the workers of a pool with
//!   `fork = true`; they share what was loaded.
//!
//! - **Inherited listeners**: [`inherited_listeners`] is for servers that listen by themselves, at
//!   a listener that the dispatcher or a service manager passes to them.
//!
//! # One thread per connection
//!
//! ```no_run
//! use std::io;
//! use worker_sdk::{Worker, WorkerConfig};
//!
//! fn main() -> Result<(), worker_sdk::Error> {
//!     let config = WorkerConfig::new().listen("127.0.0.1:7000").with_env()?;
//!     let mut worker = Worker::connect(config)?;
//!     for connection in worker.incoming() {
//!         std::thread::spawn(move || io::copy(&mut &connection, &mut &connection));
//!     }
//!     // The worker is drained or closed. Its live connections may still end by themselves.
//!     worker.close();
//!     worker.wait_until_idle();
//!     Ok(())
//! }
//! ```
//!
//! # axum
//!
#![cfg_attr(feature = "axum", doc = "```no_run")]
#![cfg_attr(not(feature = "axum"), doc = "```ignore")]
//! use axum::{Router, extract::ConnectInfo, routing::get};
//! use worker_sdk::{PeerAddr, WorkerConfig, tokio::Listener};
//!
//! async fn hello(ConnectInfo(peer): ConnectInfo<PeerAddr>) -> String {
//!     format!("hello {peer}\n")
//! }
//!
//! async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//!     let config = WorkerConfig::new().listen("127.0.0.1:8080").with_env()?;
//!     let listener = Listener::connect(config).await?;
//!     let drained = listener.clone();
//!     let app = Router::new().route("/", get(hello));
//!     axum::serve(listener, app.into_make_service_with_connect_info::<PeerAddr>())
//!         // The worker is drained. Its live connections may still end by themselves.
//!         .with_graceful_shutdown(async move {
//!             drained.drained().await;
//!             drained.close();
//!         })
//!         .await?;
//!     Ok(())
//! }
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve())
//! }
//! ```
//!
//! # mio
//!
#![cfg_attr(feature = "mio", doc = "```no_run")]
#![cfg_attr(not(feature = "mio"), doc = "```ignore")]
//! use std::io::Write;
//! use mio::{Events, Interest, Poll, Token};
//! use worker_sdk::{Error, WorkerConfig, mio::MioWorker};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let mut poll = Poll::new()?;
//!     let config = WorkerConfig::new().listen("127.0.0.1:7000").with_env()?;
//!     let mut worker = MioWorker::new(config)?;
//!     poll.registry().register(&mut worker, Token(0), Interest::READABLE)?;
//!     let mut events = Events::with_capacity(64);
//!     let mut closing = false;
//!     while !closing || worker.live() > 0 {
//!         poll.poll(&mut events, None)?;
//!         // Edge-triggered, as every source of mio: call it until it returns none.
//!         while !closing {
//!             match worker.try_accept() {
//!                 Ok(Some(mut connection)) => connection.write_all(b"hello\n")?,
//!                 Ok(None) => break,
//!                 // Drained or closed: continue until the last connection has ended.
//!                 Err(Error::Draining | Error::Closed) => {
//!                     worker.close();
//!                     closing = true;
//!                 }
//!                 Err(error) => return Err(error.into()),
//!             }
//!         }
//!     }
//!     Ok(())
//! }
//! ```
#![warn(missing_docs)]

#[cfg(feature = "axum")]
mod axum;
mod client;
#[cfg(feature = "connector")]
pub mod connector;
#[cfg(not(feature = "connector"))]
mod connector;
mod inherit;
#[cfg(feature = "mio")]
pub mod mio;
mod peer;
mod proxy;
#[cfg(feature = "relay")]
pub mod relay;
#[cfg(feature = "tokio")]
pub mod tokio;

mod sys;
#[cfg(feature = "testing")]
pub mod testing;

#[cfg(fuzzing)]
pub use client::fuzzing;
pub use client::{
    ClaimError, Connection, Drain, Error, Gauge, Guard, Incoming, IntoIncoming, OnDispatcherLoss,
    Sampling, Worker, WorkerConfig, prefork,
};
pub use dispatch_protocol::Token;
pub use inherit::inherited_listeners;
pub use peer::PeerAddr;
pub use proxy::{Proxy, Tlvs};

/// The program in the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
