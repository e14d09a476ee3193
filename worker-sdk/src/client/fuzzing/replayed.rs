//! Replays the corpus of the fuzz target that needs the private receive paths.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super as worker_fuzzing;

#[path = "../../../../fuzz/targets/bytes.rs"]
#[allow(dead_code)]
mod bytes;
#[path = "../../../../fuzz/targets/replay.rs"]
mod replay;
#[path = "../../../../fuzz/targets/sockets.rs"]
mod sockets;
#[path = "../../../../fuzz/targets/worker_path.rs"]
mod worker_path;

#[test]
fn control_path() {
    let name = "client::fuzzing::replayed::control_path";
    replay::replay_alone(name, "control_path", worker_path::worker_path);
}
