use super::last::ENDED_PROCESSES;
use super::lines::{BUDGET, PERIOD};
use super::*;
use std::process::Stdio;

fn fed(pieces: &[&str]) -> Vec<(String, u64)> {
    let (mut lines, mut found) = (Lines::default(), Vec::new());
    let mut add = |line: &[u8], cut| found.push((String::from_utf8_lossy(line).into_owned(), cut));
    for piece in pieces {
        lines.feed(piece.as_bytes(), &mut add);
    }
    lines.end(&mut add);
    found
}

#[test]
fn lines_are_put_together() {
    let line = |text: &str| (text.to_owned(), 0);
    assert_eq!(fed(&["one\ntwo\n"]), [line("one"), line("two")]);
    assert_eq!(fed(&["o", "n", "e\n", "\n", "rest"]), [line("one"), line(""), line("rest")]);
    assert_eq!(fed(&[]), []);
    let long = "x".repeat(MAX_LINE);
    assert_eq!(fed(&[&long, "\n", "next\n"]), [line(&long), line("next")]);
    assert_eq!(fed(&[&format!("{long}yz\nnext\n")]), [(long.clone(), 2), line("next")]);
    assert_eq!(fed(&[&long, "y", "z\nnext"]), [(long.clone(), 2), line("next")]);
}

#[test]
fn a_line_in_the_log_is_bounded_with_its_escape_sequences() {
    assert_eq!(shortened("short", 10, false), ("short".to_owned(), 0));
    assert_eq!(shortened("short", 10, true), ("short…".to_owned(), 0));
    assert_eq!(shortened("0123456789", 10, false), ("0123456…".to_owned(), 3));
    assert_eq!(shortened("\"\"\"\"\"\"", 10, false), ("\"\"\"…".to_owned(), 3));
    for text in
        ["é".repeat(5_000), "\u{1b}[2J".repeat(2_000), "\"".repeat(4_000), "a".repeat(3_582)]
    {
        let (shown, cut) = shortened(&text, MAX_LINE, false);
        assert!(quoted(&shown).to_string().len() <= MAX_LINE + 2, "{}", shown.len());
        assert!(shown.ends_with('…') && cut > 0, "{cut}");
        assert_eq!(shown.len() - '…'.len_utf8() + usize::try_from(cut).expect("small"), text.len());
    }
}

#[test]
fn a_process_has_its_lines_in_each_second() {
    let start = Instant::now();
    let at = |millis| start + Duration::from_millis(millis);
    let mut limit = LineLimit::new(3, start);
    let allowed = |limit: &mut LineLimit, now| (0..10).filter(|_| limit.allow(now)).count();
    assert_eq!(allowed(&mut limit, at(0)), 3);
    assert_eq!(allowed(&mut limit, at(999)), 0);
    assert_eq!(allowed(&mut limit, at(1_000)), 3);
    assert_eq!(limit.report(at(1_000)), None, "nothing lost");
    limit.lost(at(1_100));
    limit.lost(at(1_500));
    assert_eq!(limit.report(at(2_099)), None, "not due");
    assert_eq!(limit.report(at(2_100)), Some(2));
    assert_eq!(limit.report(at(9_000)), None);
}

#[test]
fn reading_pauses_when_the_budget_is_used_up() {
    let start = Instant::now();
    let mut pace = Pace { since: start, bytes: 0 };
    assert_eq!(pace.rest(BUDGET - 1, start), None);
    let soon = start + PERIOD / 4;
    assert_eq!(pace.rest(1, soon), Some(PERIOD - PERIOD / 4));
    assert_eq!(pace.rest(1, start + PERIOD), None, "a new period");
}

#[test]
fn the_last_lines_of_ended_processes_are_bounded() {
    let last = LastOutput::default();
    let process =
        |number| ProcessId { pool: dispatcher_core::PoolId(0), place: number, start: number + 1 };
    let running = last.keep(process(0));
    running.lock().expect("no panic").push_back(OutputLine {
        pid: 1,
        stream: Stream::Stdout,
        text: "kept".to_owned(),
    });
    for number in 1..3_000 {
        drop(last.keep(process(number)));
    }
    let kept = last.0.lock().expect("no panic");
    assert_eq!(kept.processes.len(), ENDED_PROCESSES);
    // The newest ones.
    assert!(kept.processes.contains_key(&process(2_999)));
    assert!(kept.processes.contains_key(&process(2_000)));
    assert!(!kept.processes.contains_key(&process(1_900)));
    drop(kept);
    assert_eq!(last.of(process(0))[0].text, "kept");
    assert_eq!(last.of(process(1_000_000)), []);
}

/// A process that writes a line, waits for a line, and writes another one; and its pipes.
fn writer(outlive: bool) -> (std::process::Child, Pipes) {
    let (pipes, [stdout, stderr]) = Pipes::new(None, outlive).expect("descriptors");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "echo before; read line; echo after; echo error >&2; read line"]);
    let child = command.stdin(Stdio::piped()).stdout(stdout).stderr(stderr).spawn();
    (child.expect("a shell"), pipes)
}

#[tokio::test]
async fn the_next_dispatcher_reads_the_output_of_a_survivor() {
    let process = ProcessId { pool: dispatcher_core::PoolId(0), place: 0, start: 1 };
    let (mut child, pipes) = writer(true);
    let pid = i32::try_from(child.id()).expect("small");
    drop(pipes);
    let stdin = child.stdin.as_mut().expect("a pipe");
    io::Write::write_all(stdin, b"\n").expect("it lives");
    let pipes = Pipes::of_running(pid).expect("may be opened").expect("there");
    let last = LastOutput::default();
    let source = Source { pool: "web".into(), name: "web-1".into(), pid, rate: 9 };
    let reading = pipes.read(source, process, &last);
    let deadline = Instant::now() + Duration::from_secs(30);
    while last.of(process).len() < 3 {
        assert!(Instant::now() < deadline, "{:?}", last.of(process));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let lines: Vec<_> = last.of(process).into_iter().map(|l| (l.stream, l.text)).collect();
    for line in [
        (Stream::Stdout, "before".to_owned()),
        (Stream::Stdout, "after".to_owned()),
        (Stream::Stderr, "error".to_owned()),
    ] {
        assert!(lines.contains(&line), "{lines:?}");
    }
    drop(child.stdin.take());
    assert_eq!(child.wait().expect("a child").code(), Some(1), "the second read found the end");
    drop(reading);
    // The own process has other streams: they are left alone.
    let own = i32::try_from(std::process::id()).expect("small");
    assert!(Pipes::of_running(own).expect("readable").is_none());
}

#[tokio::test]
async fn a_process_that_ends_with_the_dispatcher_has_no_reader_then() {
    use std::os::unix::process::ExitStatusExt;
    let (mut child, pipes) = writer(false);
    let pid = i32::try_from(child.id()).expect("small");
    drop(pipes);
    assert!(Pipes::of_running(pid).expect("readable").is_none());
    let stdin = child.stdin.as_mut().expect("a pipe");
    let _ = io::Write::write_all(stdin, b"\n");
    let status = child.wait().expect("a child");
    // This process ignores SIGPIPE, so the shell may do so, too: then its writes fail.
    assert!(status.signal() == Some(libc::SIGPIPE) || !status.success(), "{status}");
}
