#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;

use proptest::prelude::*;

use super::*;

/// Every report of a stream that comes in these parts, or the first error.
fn all<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Report>, LineError> {
    let mut lines = Lines::default();
    let mut reports = Vec::new();
    for mut part in parts {
        while let Some(report) = lines.next(&mut part) {
            reports.push(report?);
        }
        assert!(part.is_empty(), "everything was taken");
        assert!(lines.pending() <= MAX_LINE + 1);
    }
    Ok(reports)
}

fn one(line: &str) -> Result<Report, LineError> {
    all([line.as_bytes()]).map(|reports| reports.into_iter().next().unwrap())
}

#[test]
fn the_lines_of_acl_are_read() {
    let threads = "count=2&used=9&pid=77&type=default&max_threads=50&curr_threads=3&busy_threads=1&qlen=4\r\n";
    let report = Report {
        count: 2,
        used: Some(9),
        pid: Some(77),
        kind: "default".to_owned(),
        max_threads: Some(50),
        curr_threads: Some(3),
        busy_threads: Some(1),
        qlen: Some(4),
    };
    assert_eq!(one(threads), Ok(report.clone()));
    let aio = one("count=2&used=9&pid=77&type=default\r\n").unwrap();
    let fewer =
        Report { max_threads: None, curr_threads: None, busy_threads: None, qlen: None, ..report };
    assert_eq!(aio, fewer);
}

#[test]
fn only_the_count_is_required() {
    assert_eq!(one("count=5\r\n").unwrap().count, 5);
    assert_eq!(one("pid=5&type=a\r\n"), Err(LineError::NoCount));
    assert_eq!(one("count=\r\n"), Err(LineError::NoCount), "an empty value counts as missing");
    assert_eq!(one("count\r\n"), Err(LineError::NoCount));
    assert_eq!(one("\r\n\n\r\ncount=1\n").unwrap().count, 1, "empty lines are ignored");
}

#[test]
fn unknown_keys_are_ignored_and_the_first_of_equal_keys_counts() {
    let report = one("&&x=1&%zz=2&=3&count=4&count=9&color=%zz&type=a&type=b\n").unwrap();
    assert_eq!((report.count, report.kind.as_str()), (4, "a"));
}

#[test]
fn the_cr_may_be_missing_and_the_url_encoding_is_undone() {
    assert_eq!(
        one("co%75nt=%31%32&type=a%26b%3Dc+d\n").unwrap(),
        Report { count: 12, kind: "a&b=c d".to_owned(), ..Report::default() }
    );
}

#[test]
fn impossible_numbers_are_errors_and_negative_ones_mean_none() {
    assert_eq!(one("count=18446744073709551615\n").unwrap().count, u64::MAX);
    assert_eq!(one("count=18446744073709551616\n"), Err(LineError::NotANumber("count")));
    assert_eq!(one("count=-1\n").unwrap().count, 0);
    for bad in ["count=1x\n", "count=-\n", "count=+1\n", "count=0x1\n", "count= 1\n", "count=1.5\n"]
    {
        assert_eq!(one(bad), Err(LineError::NotANumber("count")), "{bad:?}");
    }
    assert_eq!(one("count=1&qlen=x\n"), Err(LineError::NotANumber("qlen")));
    assert_eq!(one("count=%1\n"), Err(LineError::BadEscape("count")));
}

#[test]
fn a_type_is_text() {
    for bad in ["type=%00", "type=%ff", "type=a%0ab", "type=%e2%80%ae"] {
        assert_eq!(one(&format!("count=1&{bad}\n")), Err(LineError::BadType), "{bad}");
    }
    assert_eq!(one("count=1&type=%4\n"), Err(LineError::BadEscape("type")));
    let longest = "x".repeat(MAX_TYPE);
    assert_eq!(one(&format!("count=1&type={longest}\n")).unwrap().kind, longest);
    assert_eq!(one(&format!("count=1&type={longest}y\n")), Err(LineError::BadType));
}

#[test]
fn a_line_has_a_bound_however_it_comes() {
    let fill = "x".repeat(MAX_LINE - "count=1&".len());
    let longest = format!("count=1&{fill}\r\n");
    assert_eq!(one(&longest).unwrap().count, 1);
    let longer = format!("count=1&y{fill}\n");
    assert_eq!(one(&longer), Err(LineError::TooLong));
    // A CR that ends no line is part of it.
    assert_eq!(one(&format!("count=1&{fill}\r\r\n")), Err(LineError::TooLong));
    let endless = vec![b'x'; 100 * MAX_LINE];
    for size in [1, 7, MAX_LINE, endless.len()] {
        assert_eq!(all(endless.chunks(size)), Err(LineError::TooLong), "parts of {size}");
    }
}

#[test]
fn an_address_is_text_of_at_most_255_bytes() {
    let text = |address: &str| {
        let client = ClientAddr::from(address.parse::<SocketAddr>().unwrap());
        String::from_utf8(AddressText::new(&client).as_bytes().to_vec()).unwrap()
    };
    assert_eq!(text("192.0.2.1:65535"), "192.0.2.1:65535");
    assert_eq!(text("[::ffff:192.0.2.1]:80"), "192.0.2.1:80");
    let longest = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff%4294967295]:65535";
    assert_eq!(text(longest), longest);
    assert_eq!(AddressText::new(&ClientAddr::Unix).as_bytes(), b"unix");
}

fn report() -> impl Strategy<Value = Report> {
    let number = || proptest::option::of(any::<u64>());
    let kind = "[ -~äß日]{0,16}".prop_filter("short enough", |kind| kind.len() <= MAX_TYPE);
    (any::<u64>(), number(), number(), kind, number(), number(), number(), number()).prop_map(
        |(count, used, pid, kind, max_threads, curr_threads, busy_threads, qlen)| Report {
            count,
            used,
            pid,
            kind,
            max_threads,
            curr_threads,
            busy_threads,
            qlen,
        },
    )
}

proptest! {
    /// What is written is read, wherever the stream is cut, with CR or without.
    #[test]
    fn any_cut_gives_the_same_reports(
        reports in proptest::collection::vec(report(), 0..6),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..12),
        without_cr in any::<bool>(),
    ) {
        let mut stream = Vec::new();
        reports.iter().for_each(|report| report.encode(&mut stream));
        if without_cr {
            stream.retain(|&byte| byte != b'\r');
        }
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let parts = cuts.windows(2).map(|ends| &stream[ends[0]..ends[1]]);
        prop_assert_eq!(all(parts), Ok(reports));
    }

    /// Any bytes give a result, the same for any cut, and never more memory than a line.
    #[test]
    fn any_bytes_give_a_result(bytes in proptest::collection::vec(any::<u8>(), 0..4000), size in 1usize..50) {
        prop_assert_eq!(all(bytes.chunks(size)), all([bytes.as_slice()]));
    }
}
