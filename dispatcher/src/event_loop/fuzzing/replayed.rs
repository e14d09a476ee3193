//! The corpora of the targets that need the functions above.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super as dispatcher_fuzzing;

#[path = "../../../../fuzz/targets/bytes.rs"]
#[allow(dead_code)]
mod bytes;
#[path = "../../../../fuzz/targets/dispatcher_path.rs"]
mod dispatcher_path;
#[path = "../../../../fuzz/targets/listen_fds.rs"]
mod listen_fds;
#[path = "../../../../fuzz/targets/replay.rs"]
mod replay;
#[path = "../../../../fuzz/targets/sockets.rs"]
#[allow(dead_code)]
mod sockets;

#[test]
fn control_path() {
    let name = "event_loop::fuzzing::replayed::control_path";
    replay::replay_alone(name, "control_path", dispatcher_path::dispatcher_path);
}

#[test]
fn listen_fds() {
    replay::replay("listen_fds", listen_fds::listen_fds);
}
