//! `{n}`, `{name}` and `{pool}` in command, environment and directory. `{{` and `}}` are literal
//! braces.

use std::net::SocketAddr;
use std::ops::Range;

use toml::Spanned;

use super::super::error::{Mistake, nearest};
use super::super::validate::{Check, Checked};

/// The placeholders.
const NAMES: [&str; 6] = ["n", "name", "pool", "addr", "port", "fd"];

const KNOWN: &str = "the placeholders are {n}, {name} and {pool}, and in a steered pool {addr}, \
                     {port} and {fd}";

/// The values of the placeholders for one process.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The number of the process in its pool, from 1.
    pub number: u32,
    /// The name of the worker.
    pub name: &'a str,
    /// The name of the pool.
    pub pool: &'a str,
    /// Where it is to listen, in a steered pool. Without it, `{addr}` and `{port}` are `127.0.0.1`
    /// and `0`.
    pub address: Option<SocketAddr>,
    /// Its inherited listener.
    pub fd: Option<i32>,
}

/// A part of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece<'a> {
    Text(&'a str),
    Placeholder(&'a str),
    /// An unknown placeholder or a single brace, with its position.
    Bad(&'a str, usize),
}

/// The text with the values of `place` for its placeholders.
pub fn expand(text: &str, place: Place<'_>) -> String {
    let mut out = String::with_capacity(text.len());
    for piece in Pieces::of(text) {
        match piece {
            Piece::Placeholder("n") => out.push_str(&place.number.to_string()),
            Piece::Placeholder("name") => out.push_str(place.name),
            Piece::Placeholder("pool") => out.push_str(place.pool),
            Piece::Placeholder("addr") if let Some(address) = place.address => {
                out.push_str(&address.ip().to_string());
            }
            Piece::Placeholder("port") if let Some(address) = place.address => {
                out.push_str(&address.port().to_string());
            }
            // The pool is passed instead (`fallback`): its workers listen nowhere.
            Piece::Placeholder("addr") => out.push_str("127.0.0.1"),
            Piece::Placeholder("port") => out.push('0'),
            Piece::Placeholder("fd") if let Some(fd) = place.fd => out.push_str(&fd.to_string()),
            // A checked text has no bad piece.
            Piece::Text(text) | Piece::Placeholder(text) | Piece::Bad(text, _) => {
                out.push_str(text);
            }
        }
    }
    out
}

/// The text in which [`expand`] finds no placeholder and which it turns into `text`.
pub fn literal(text: &str) -> String {
    text.replace('{', "{{").replace('}', "}}")
}

/// Whether the text depends on the process.
pub(super) fn varies(text: &str) -> bool {
    Pieces::of(text).any(|piece| matches!(piece, Piece::Placeholder(_)))
}

/// Whether the text differs between the processes of a pool.
pub fn depends_on_process(text: &str) -> bool {
    let own = |name| matches!(name, "n" | "name" | "addr" | "port" | "fd");
    Pieces::of(text).any(|piece| matches!(piece, Piece::Placeholder(name) if own(name)))
}

/// Whether the text depends on where the process listens.
pub(in crate::config) fn has_address(text: &str) -> bool {
    ["addr", "port", "fd"].into_iter().any(|name| has_placeholder(text, name))
}

/// Whether the text has this placeholder.
pub fn has_placeholder(text: &str, name: &str) -> bool {
    Pieces::of(text).any(|piece| piece == Piece::Placeholder(name))
}

/// Refuses unknown placeholders and single braces.
pub(super) fn known(check: &Check<'_>, text: &Spanned<String>) -> Checked<()> {
    let Some((bad, _)) = first_bad(text.get_ref()) else { return Ok(()) };
    // The value in the file may have escape sequences, so its positions may differ.
    let written = check.slice(&text.span());
    let span = match first_bad(written) {
        Some((same, at)) if same == bad => {
            let start = text.span().start + at;
            Range { start, end: start + bad.len() }
        }
        _ => text.span(),
    };
    let Some(word) = bad.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) else {
        return Err(Mistake::new(span, format!("a single `{bad}`"))
            .help(format!("write `{{{{` and `}}}}` for braces; {KNOWN}")));
    };
    let help = match nearest(word, NAMES) {
        Some(near) => format!("did you mean `{{{near}}}`? Write `{{{{` and `}}}}` for braces"),
        None => format!("{KNOWN}; write `{{{{` and `}}}}` for braces"),
    };
    Err(Mistake::new(span, format!("unknown placeholder `{bad}`")).help(help))
}

fn first_bad(text: &str) -> Option<(&str, usize)> {
    Pieces::of(text).find_map(|piece| match piece {
        Piece::Bad(bad, at) => Some((bad, at)),
        Piece::Text(_) | Piece::Placeholder(_) => None,
    })
}

struct Pieces<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Pieces<'a> {
    fn of(text: &'a str) -> Pieces<'a> {
        Pieces { text, at: 0 }
    }

    fn take(&mut self, len: usize) -> &'a str {
        let piece = &self.text[self.at..self.at + len];
        self.at += len;
        piece
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = Piece<'a>;

    fn next(&mut self) -> Option<Piece<'a>> {
        let (at, rest) = (self.at, &self.text[self.at..]);
        if rest.is_empty() {
            return None;
        }
        if rest.starts_with("{{") || rest.starts_with("}}") {
            self.take(1);
            return Some(Piece::Text(self.take(1)));
        }
        if rest.starts_with('}') {
            return Some(Piece::Bad(self.take(1), at));
        }
        if !rest.starts_with('{') {
            let len = rest.find(['{', '}']).unwrap_or(rest.len());
            return Some(Piece::Text(self.take(len)));
        }
        let Some(len) = rest[1..].find(['{', '}']).filter(|len| rest[1 + len..].starts_with('}'))
        else {
            return Some(Piece::Bad(self.take(1), at));
        };
        let whole = self.take(len + 2);
        let word = &whole[1..=len];
        Some(match NAMES.contains(&word) {
            true => Piece::Placeholder(word),
            false => Piece::Bad(whole, at),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place<'_> =
        Place { number: 3, name: "web-3", pool: "web", address: None, fd: None };

    #[test]
    fn placeholders_have_the_values_of_the_process() {
        for (text, expanded) in [
            ("", ""),
            ("plain", "plain"),
            ("{n}", "3"),
            ("--port=80{n}0", "--port=8030"),
            ("/srv/{pool}/{name}.sock", "/srv/web/web-3.sock"),
            ("{{n}}", "{n}"),
            ("{{{n}}}", "{3}"),
            ("awk '{{print}}'", "awk '{print}'"),
            ("größe{n}", "größe3"),
        ] {
            assert_eq!(expand(text, PLACE), expanded, "{text}");
            assert_eq!(first_bad(text), None, "{text}");
            assert_eq!(expand(&literal(text), PLACE), text);
        }
        assert!(varies("a{n}") && !varies("a{{n}}"));
        assert!(depends_on_process("a{n}") && depends_on_process("{name}"));
        assert!(varies("{pool}") && !depends_on_process("{pool}{{n}}"));
    }

    #[test]
    fn anything_else_in_braces_is_bad() {
        for (text, bad, at) in [
            ("a{nmae}", "{nmae}", 1),
            ("{}", "{}", 0),
            ("{ n }", "{ n }", 0),
            ("a}", "}", 1),
            ("{n", "{", 0),
            ("{n{", "{", 0),
            ("{{{n}}", "}", 5),
            ("ü{N}", "{N}", 2),
        ] {
            assert_eq!(first_bad(text), Some((bad, at)), "{text}");
        }
    }
}
