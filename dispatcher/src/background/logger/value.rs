//! Formats values of log lines so that a program can parse them, whatever a peer, a file or the
//! system put into them.
//!
//! A log line is `event=NAME key=value …`. A value is one word or in double quotes; inside quotes a
//! backslash precedes a quote and a backslash, and an invisible character is written as `\n`, `\t`
//! or `\u{…}`.

use std::fmt::{self, Write};

use dispatch_protocol::wire::is_hidden;

/// A value that is usually one word, such as a name: quoted only if necessary.
pub fn value<T: fmt::Display>(value: T) -> Value<T> {
    Value(value)
}

/// Free text, such as an error: always quoted.
pub fn quoted<T: fmt::Display>(text: T) -> Quoted<T> {
    Quoted(text)
}

/// See [`value`].
#[derive(Clone, Copy, Debug)]
pub struct Value<T>(T);

/// See [`quoted`].
#[derive(Clone, Copy, Debug)]
pub struct Quoted<T>(T);

impl<T: fmt::Display> fmt::Display for Value<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut check = QuoteCheck { empty: true, plain: true };
        write!(check, "{}", self.0)?;
        if check.empty || !check.plain { Quoted(&self.0).fmt(f) } else { write!(f, "{}", self.0) }
    }
}

impl<T: fmt::Display> fmt::Display for Quoted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        write!(Escape(f), "{}", self.0)?;
        f.write_char('"')
    }
}

/// Finds out whether a text needs no quotes.
struct QuoteCheck {
    empty: bool,
    plain: bool,
}

impl Write for QuoteCheck {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.empty &= text.is_empty();
        self.plain &=
            !text.contains(|c: char| matches!(c, ' ' | '"' | '\'' | '\\' | '=') || is_hidden(c));
        Ok(())
    }
}

/// Escapes what is written through it.
struct Escape<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Write for Escape<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '"' | '\\' => {
                    self.0.write_char('\\')?;
                    self.0.write_char(c)?;
                }
                '\n' => self.0.write_str("\\n")?,
                '\t' => self.0.write_str("\\t")?,
                c if is_hidden(c) => write!(self.0, "\\u{{{:x}}}", u32::from(c))?,
                c => self.0.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_one_word_or_in_quotes() {
        for (text, shown) in [
            ("web-1", "web-1"),
            ("größe", "größe"),
            ("", "\"\""),
            ("a b", "\"a b\""),
            ("\"q", "\"\\\"q\""),
            ("it's", "\"it's\""),
            ("a=b", "\"a=b\""),
            ("c:\\x", "\"c:\\\\x\""),
            ("a\nb\tc", "\"a\\nb\\tc\""),
            ("a\u{202e}b", "\"a\\u{202e}b\""),
            ("a\u{200b}", "\"a\\u{200b}\""),
            ("a\x1b[2J", "\"a\\u{1b}[2J\""),
        ] {
            assert_eq!(value(text).to_string(), shown);
        }
        assert_eq!(quoted("one").to_string(), "\"one\"");
        assert_eq!(quoted("say \"hi\"").to_string(), "\"say \\\"hi\\\"\"");
        // Text in pieces gives the same result.
        assert_eq!(value(format_args!("{}{}", "a", ' ')).to_string(), "\"a \"");
        assert_eq!(value(42).to_string(), "42");
    }

    /// Checks the sources of the whole program: no value is put between quotes by hand.
    #[test]
    fn no_log_line_quotes_by_hand() {
        fn check(folder: &std::path::Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).expect("the sources") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    check(&path, found);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let text = std::fs::read_to_string(&path).expect("a source");
                    let by_hand = concat!("=", "\\\"", "{");
                    let lines = text.lines().zip(1..).filter(|(line, _)| line.contains(by_hand));
                    found
                        .extend(lines.map(|(line, at)| format!("{}:{at}: {line}", path.display())));
                }
            }
        }
        let mut found = Vec::new();
        check(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        found.retain(|line| !line.contains("nonce="));
        assert!(found.is_empty(), "use logger::quoted or logger::value:\n{}", found.join("\n"));
    }
}
