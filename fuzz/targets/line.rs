//! Streams of the line protocol, however they are cut.

use dispatch_protocol::line::{LineError, Lines, MAX_LINE, MAX_TYPE, Report};

/// The first byte is the length of the parts. The reports, and the first error, are the same for
/// any parts; a report can be encoded and is then read as the same; memory is bounded.
pub fn line(data: &[u8]) {
    let Some((&size, stream)) = data.split_first() else { return };
    let whole = all(std::iter::once(stream));
    assert_eq!(all(stream.chunks(usize::from(size).max(1))), whole);
    for report in whole.0 {
        assert!(report.kind.len() <= MAX_TYPE);
        let mut bytes = Vec::new();
        report.encode(&mut bytes);
        assert!(bytes.len() <= MAX_LINE);
        assert_eq!(all(std::iter::once(bytes.as_slice())), (vec![report], None));
    }
}

fn all<'a>(parts: impl Iterator<Item = &'a [u8]>) -> (Vec<Report>, Option<LineError>) {
    let (mut lines, mut reports) = (Lines::default(), Vec::new());
    for mut part in parts {
        while let Some(report) = lines.next(&mut part) {
            match report {
                Ok(report) => reports.push(report),
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    return (reports, Some(error));
                }
            }
        }
        assert!(lines.pending() <= MAX_LINE + 1);
    }
    (reports, None)
}
