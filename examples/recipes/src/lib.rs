//! Example servers. Each is a complete program in `examples/`: alone it listens on
//! `DISPATCH_LISTEN`, with `DISPATCH_SOCKET` it is a worker of a dispatcher. `tests/` runs each of
//! them behind a real dispatcher with a real client.
//!
//! | program | shows |
//! |---|---|
//! | `hyper` | HTTP with hyper and a graceful end |
//! | `grpc` | gRPC with tonic, from a stream of connections |
//! | `tls` | rustls, blocking, a thread for each connection |
//! | `tokio-tls` | tokio-rustls |
//! | `websocket` | WebSockets with tokio-tungstenite |
//! | `sigterm` | the end of a blocking server at SIGTERM, with a deadline |
//! | `inetd` | a child process that has the connection as its standard input and output |
//! | `fork` | a fork for each connection |

/// The program in the README of the repository compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

/// The programs of the page on fail-over compile; those that need no server run.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/FAILOVER.md")]
struct Failover;
