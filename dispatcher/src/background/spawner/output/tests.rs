use super::*;

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
    assert_eq!(last.0.lock().expect("no panic").len(), ENDED_PROCESSES);
    assert_eq!(last.of(process(0))[0].text, "kept");
    assert_eq!(last.of(process(1_000_000)), []);
}
