//! Runs the body of a fuzz target with every file of its corpus, without the fuzzer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;

/// Set for a process that runs one replay and no other test.
const ALONE: &str = "CORPUS_ALONE";

pub fn replay(target: &str, body: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let entries =
        std::fs::read_dir(&corpus).unwrap_or_else(|e| panic!("{}: {e}", corpus.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 8, "{} has too few files", corpus.display());
    for file in files {
        let input = std::fs::read(&file).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| body(&input)));
        assert!(result.is_ok(), "{target} fails with {}", file.display());
    }
    // The first inputs of any fuzzer.
    for input in [vec![], vec![0; 300], vec![0xff; 300], vec![0xff; 10_000]] {
        body(&input);
    }
}

/// The same in a process that runs only the test `name`: for a body that counts or limits the
/// descriptors of its process.
#[allow(dead_code)] // One of the crates that include this module needs it.
pub fn replay_alone(name: &str, target: &str, body: fn(&[u8])) {
    if std::env::var_os(ALONE).is_some() {
        return replay(target, body);
    }
    let mut alone = Command::new(std::env::current_exe().unwrap());
    let output = alone.args(["--exact", name]).env(ALONE, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}
