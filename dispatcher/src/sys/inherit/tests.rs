//! Descriptors of this process that have the numbers which a child is to inherit.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;

use super::*;

/// Set for the process in which the test happens: there the low numbers are free.
const INSIDE: &str = "TEST_OF_LOW_NUMBERS";

#[test]
fn low_numbers_may_be_in_use() {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let name = "sys::inherit::tests::low_numbers_may_be_in_use";
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", name, "--test-threads=1", "--nocapture"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .expect("this program");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}\n{errors}");
}

/// A command that has given `descriptors` to its child.
fn inheriting(program: &str, arguments: &[&str], descriptors: &[OwnedFd]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    let kept = keep_numbers(&mut command, descriptors.len());
    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    run_with_descriptors(&mut command, &descriptors, kept).expect("no zero byte");
    command
}

fn inside() {
    const COUNT: usize = 12;
    let directory = tempfile::tempdir().expect("a directory");
    let file = |number: usize| -> OwnedFd {
        let path = directory.path().join(number.to_string());
        std::fs::write(&path, format!("{number}\n")).expect("writable");
        File::open(path).expect("readable").into()
    };
    let holes: Vec<OwnedFd> =
        (0..4).map(|_| File::open("/dev/null").expect("there").into()).collect();
    let mut files: Vec<OwnedFd> = (0..COUNT).map(file).collect();
    // The highest number first; and the pipe of the standard library gets numbers among those that
    // the child is to have.
    files.reverse();
    let last = FIRST_INHERITED + COUNT as RawFd;
    assert!(holes.iter().all(|hole| hole.as_raw_fd() < last), "{holes:?}");
    assert!(files.iter().any(|file| file.as_raw_fd() < last), "{files:?}");
    drop(holes);
    let before = numbers();
    let script = "cat <&3; cat /proc/self/fd/14; echo $LISTEN_PID $$";
    let output = inheriting("sh", &["-c", script], &files).output().expect("started");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    assert_eq!((lines.next(), lines.next()), (Some("11"), Some("0")), "{output:?}");
    let ids = lines.next().and_then(|ids| ids.split_once(' ')).expect("two ids");
    assert_eq!(ids.0, ids.1);
    // The report of an error arrives through the pipe.
    let error = inheriting("/nonexistent/program", &[], &files).spawn().expect_err("no program");
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    // Also the report of an earlier step.
    let mut command = Command::new("true");
    let kept = keep_numbers(&mut command, files.len());
    let setup = super::super::ChildSetup {
        directory: Some(c"/nonexistent".to_owned()),
        ..Default::default()
    };
    super::super::set_up_child(&mut command, setup);
    let descriptors: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    run_with_descriptors(&mut command, &descriptors, kept).expect("no zero byte");
    let error = command.spawn().expect_err("no directory");
    assert!(super::super::failed_step(&error).is_some(), "{error}");
    assert_eq!(numbers(), before);
}

/// The descriptors of this process.
fn numbers() -> Vec<String> {
    let entries = std::fs::read_dir("/proc/self/fd").expect("readable").flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
