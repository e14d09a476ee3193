//! Every file of the fuzz corpora through the body of its fuzz target, without the fuzzer.
//! `fuzz/README.md` says how to add a file. The corpora of targets that need private functions are
//! replayed by unit tests of `dispatcher` and `worker-sdk`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../fuzz/targets/bytes.rs"]
#[allow(dead_code)] // Shared with targets that are not replayed here.
mod bytes;
#[path = "../fuzz/targets/config.rs"]
mod config;
#[path = "../fuzz/targets/first_bytes.rs"]
mod first_bytes;
#[path = "../fuzz/targets/line.rs"]
mod line;
#[path = "../fuzz/targets/pool_ops.rs"]
mod pool_ops;
#[path = "../fuzz/targets/replay.rs"]
mod replay;
#[path = "../fuzz/targets/wire.rs"]
mod wire;

use replay::replay;

#[test]
fn wire_control() {
    replay("wire_control", wire::wire_control);
}

#[test]
fn wire_channel() {
    replay("wire_channel", wire::wire_channel);
}

#[test]
fn wire_prefork() {
    replay("wire_prefork", wire::wire_prefork);
}

#[test]
fn config() {
    replay("config", config::config);
}

#[test]
fn line() {
    replay("line", line::line);
}

#[test]
fn pool_ops() {
    replay("pool_ops", pool_ops::pool_ops);
}

#[test]
fn first_bytes() {
    replay("first_bytes", first_bytes::first_bytes);
}
