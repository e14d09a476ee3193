//! Be a worker of the dispatcher: receive live TCP connections over a Unix socket.
//!
//! The dispatcher accepts connections and passes each one to the worker process that its pool's policy chooses: unless
//! configured otherwise, the one with the fewest. This crate is the worker's side. It joins the pool, gives each connection
//! to the application when that asks, counts what is live, and joins again after the dispatcher was away; live
//! connections do not notice. Without a dispatcher the same program listens by itself.
//!
//! | feature | for | start at |
//! |---|---|---|
//! | none | programs that block, with one thread or many | `Worker` |
//! | `tokio` | tokio | `tokio::Listener` |
//! | `axum` | axum; the listener goes to `axum::serve` | `tokio::Listener` |
//! | `mio` | event loops with mio | `mio::MioWorker` |
//! | `testing` | tests of a server against a real dispatcher; for `dev-dependencies` | `testing::Dispatcher` |
//!
//! The protocol itself is the crate `dispatch-protocol`.
//!
//! What a worker can do besides taking connections, in every layer:
//!
//! - **be drained** (`dispatcher drain`, `dispatcher scale`): its listener ends, `on_drain` is called, and at the deadline what is
//!   live is shut down. The programs below then say goodbye and wait for their last connection; a `main` that
//!   simply returned would cut them all off. A worker that rather stays waits in `resumed`.
//! - **claim a client** by what it will send, such as the session id just given to it: `own`.
//! - **show numbers** that a pool can choose by, such as how long requests wait: `gauge`. What the machine and the
//!   process do is measured when the pool goes by it (`WorkerConfig::sample`).
//!
//! # A thread for each connection
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
//!     // Drained by an operator, or closed: goodbye, and what is live goes on to its end.
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
//!         // Drained by an operator: goodbye, and what is live goes on to its end.
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
//!         // Edge-triggered, like every source of mio: go on until there is none.
//!         while !closing {
//!             match worker.try_accept() {
//!                 Ok(Some(mut connection)) => connection.write_all(b"hello\n")?,
//!                 Ok(None) => break,
//!                 // Drained by an operator, or closed: goodbye, and on until the last connection has ended.
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
#[cfg(feature = "mio")]
pub mod mio;
mod peer;
#[cfg(feature = "tokio")]
pub mod tokio;

mod sys;
#[cfg(feature = "testing")]
pub mod testing;

#[cfg(fuzzing)]
pub use client::fuzzing;
pub use client::{
    ClaimError, Connection, Drain, Error, Gauge, Guard, Incoming, IntoIncoming, Sampling, Worker,
    WorkerConfig,
};
pub use dispatch_protocol::Token;
pub use peer::PeerAddr;

/// The program in the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
