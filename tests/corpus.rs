//! Every file of the fuzz corpora through the body of its fuzz target, without the fuzzer. `fuzz/README.md` says how a
//! new file gets there.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../fuzz/targets/mod.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;

/// Set for a process that runs one target and nothing else.
const ALONE: &str = "CORPUS_ALONE";

fn replay(target: &str, body: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let entries =
        std::fs::read_dir(&corpus).unwrap_or_else(|e| panic!("{}: {e}", corpus.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 8, "{} has hardly anything in it", corpus.display());
    for file in files {
        let input = std::fs::read(&file).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| body(&input)));
        assert!(result.is_ok(), "{target} fails with {}", file.display());
    }
    // What fuzzers try first.
    for input in [vec![], vec![0; 300], vec![0xff; 300], vec![0xff; 10_000]] {
        body(&input);
    }
}

#[test]
fn wire_control() {
    replay("wire_control", targets::wire_control);
}

#[test]
fn wire_channel() {
    replay("wire_channel", targets::wire_channel);
}

#[test]
fn config() {
    replay("config", targets::config);
}

/// This one counts the descriptors of its process and limits them, so it has a process of its own.
#[test]
fn control_path() {
    if std::env::var_os(ALONE).is_some() {
        return replay("control_path", targets::control_path);
    }
    let mut alone = Command::new(std::env::current_exe().unwrap());
    let output = alone.args(["--exact", "corpus::control_path"]).env(ALONE, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn listen_fds() {
    replay("listen_fds", targets::listen_fds);
}

#[test]
fn pool_ops() {
    replay("pool_ops", targets::pool_ops);
}

#[test]
fn first_bytes() {
    replay("first_bytes", targets::first_bytes);
}
