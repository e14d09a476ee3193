//! Text output: tables that fit the terminal, paragraphs, and numbers with their noun.

use std::fmt::Write as _;
use std::io::IsTerminal;

pub(super) use crate::plural::count;
use dispatch_protocol::wire::is_hidden;

/// Line width of files, pipes and narrow terminals.
pub(super) const NARROW: usize = 80;

/// Text columns are not cut to fewer characters than this.
const LEAST: usize = 8;

/// Most characters in a line.
pub(super) fn width() -> usize {
    let out = std::io::stdout();
    if !out.is_terminal() {
        return NARROW;
    }
    rustix::termios::tcgetwinsize(&out).map_or(NARROW, |size| NARROW.max(size.ws_col.into()))
}

/// Replaces control characters. Workers choose their names, and a name must not move the cursor.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if is_hidden(c) { '\u{fffd}' } else { c }).collect()
}

/// Cuts to at most this many characters; the last one then marks the cut.
pub(super) fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let mut kept: String = text.chars().take(most.saturating_sub(1)).collect();
    kept.push('…');
    kept
}

/// Lines of at most `width` characters, broken between words, each with an indentation. A longer
/// word stays whole.
pub(super) fn wrap(text: &str, indent: &str, width: usize) -> String {
    let mut out = String::new();
    let mut line = indent.to_owned();
    for word in text.split_whitespace() {
        let first = line.len() == indent.len();
        if !first && line.chars().count() + 1 + word.chars().count() > width {
            out.push_str(&line);
            out.push('\n');
            line.truncate(indent.len());
        }
        if line.len() > indent.len() {
            line.push(' ');
        }
        line.push_str(word);
    }
    out.push_str(&line);
    out.push('\n');
    out
}

/// A table with columns as wide as their contents: the first `left` ones are left-aligned, the
/// others right-aligned. If the table is too wide, optional columns are dropped in the given order;
/// then texts are cut.
pub(super) struct Table<const N: usize> {
    head: [&'static str; N],
    left: usize,
    optional: &'static [&'static [&'static str]],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new(head: &[&'static str; N], left: usize) -> Table<N> {
        Table { head: *head, left, optional: &[], rows: Vec::new() }
    }

    /// Groups of columns to drop if the table is too wide, the first group first.
    pub(super) fn optional(mut self, columns: &'static [&'static [&'static str]]) -> Table<N> {
        self.optional = columns;
        self
    }

    pub(super) fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(super) fn show(&self, text: &mut String, width: usize) {
        let widest = |column: usize| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.chain([self.head[column].len()]).max().unwrap_or(0)
        };
        let mut widths: [usize; N] = std::array::from_fn(widest);
        let mut shown = [true; N];
        let total = |widths: &[usize; N], shown: &[bool; N]| -> usize {
            let columns = widths.iter().zip(shown).filter(|(_, shown)| **shown);
            columns.map(|(width, _)| width + 2).sum::<usize>().saturating_sub(2)
        };
        for group in self.optional {
            if total(&widths, &shown) <= width {
                break;
            }
            for (head, shown) in self.head.iter().zip(&mut shown) {
                *shown &= !group.contains(head);
            }
        }
        while total(&widths, &shown) > width {
            let Some(column) = (0..self.left).max_by_key(|&column| widths[column]) else { break };
            if widths[column] <= LEAST {
                break;
            }
            widths[column] -= 1;
        }
        let heads = self.head.map(str::to_owned);
        for row in std::iter::once(&heads).chain(&self.rows) {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate().filter(|(column, _)| shown[*column]) {
                let gap = if line.is_empty() { "" } else { "  " };
                let width = widths[column];
                // Writing to a string cannot fail.
                let _ = if column < self.left {
                    write!(line, "{gap}{:<width$}", cut(cell, width))
                } else {
                    write!(line, "{gap}{cell:>width$}")
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_are_broken_between_words() {
        assert_eq!(wrap("one two three", "  ", 9), "  one two\n  three\n");
        assert_eq!(wrap("", "  ", 9), "  \n");
        assert_eq!(wrap("a longer-than-that b", "", 6), "a\nlonger-than-that\nb\n");
    }

    #[test]
    fn columns_that_do_not_fit_are_dropped() {
        let table = |name: &str| {
            let mut table =
                Table::new(&["NAME", "STATE", "LOAD", "SENT"], 2).optional(&[&["SENT"], &["LOAD"]]);
            table.row([name.to_owned(), "active".to_owned(), "1".to_owned(), "22".to_owned()]);
            table
        };
        let shown = |name: &str, width: usize| {
            let mut text = String::new();
            table(name).show(&mut text, width);
            text
        };
        assert_eq!(shown("w0", 24), "NAME  STATE   LOAD  SENT\nw0    active     1    22\n");
        assert_eq!(shown("w0", 23), "NAME  STATE   LOAD\nw0    active     1\n");
        assert_eq!(shown("w0", 17), "NAME  STATE\nw0    active\n");
        assert_eq!(shown("a-very-long-name", 20), "NAME          STATE\na-very-long…  active\n");
        for width in 20..60 {
            let text = shown(&"n".repeat(64), width);
            assert!(text.lines().all(|line| line.chars().count() <= width), "{text}");
        }
    }
}
