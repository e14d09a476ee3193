//! Reads the text into [`File`] and collects mistakes: each part with a mistake is removed and the
//! rest is read again. Translates the errors of the parser and of serde.

use std::borrow::Cow;
use std::ops::Range;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue, Deserializer, Error};

use super::error::{ConfigError, Mistake, Source, suggest};
use super::file::{File, tables};
use super::hints;

/// Most reported mistakes. The file is read once for each.
const MOST: usize = 100;

/// Reads the whole file. The mistakes are those of syntax, unknown and missing keys, and wrong
/// types. After a syntax error there is no file; after other mistakes the file lacks the parts that
/// have them.
pub(super) fn read(source: &Source<'_>) -> (Option<File>, Vec<Mistake>) {
    let (mut table, errors) = DeTable::parse_recoverable(source.text);
    let mut mistakes: Vec<Mistake> = Vec::new();
    for error in &errors {
        let mistake = translate(error, source, &[]);
        // One typing mistake can cause several parser errors on its line.
        if !mistakes.iter().any(|other| source.same_line(&other.span, &mistake.span)) {
            mistakes.push(mistake);
        }
    }
    let syntax = mistakes.len();
    let (file, found) = past_mistakes(&mut table, source);
    let new = |mistake: &Mistake| {
        let of_syntax = &mistakes[..syntax];
        syntax == 0
            || !mistake.absence
                && !of_syntax.iter().any(|other| source.same_line(&other.span, &mistake.span))
    };
    let found: Vec<Mistake> = found.into_iter().filter(new).collect();
    mistakes.extend(found);
    (file.filter(|_| syntax == 0), mistakes)
}

/// Reads a table with valid syntax, without its parts that have mistakes.
fn past_mistakes(
    table: &mut Spanned<DeTable<'_>>,
    source: &Source<'_>,
) -> (Option<File>, Vec<Mistake>) {
    let mut mistakes = Vec::new();
    // Removed entries: the table, and the key or the probably intended key.
    let mut removed: Vec<(Vec<String>, String)> = Vec::new();
    // Listeners and peers that lack a required key.
    let mut unfinished: Vec<Range<usize>> = Vec::new();
    while mistakes.len() < MOST {
        let error = match File::deserialize(Deserializer::from(table.clone())) {
            Ok(mut file) => {
                file.listener.retain(|listener| !unfinished.contains(&listener.span()));
                file.advice_peer.retain(|peer| !unfinished.contains(&peer.span()));
                return (Some(file), mistakes);
            }
            Err(error) => error,
        };
        let span = error.span().unwrap_or(0..0);
        let path = path_to(table.get_ref(), &span).unwrap_or_default();
        let mistake = translate(&error, source, &path);
        if mistake.absence {
            let Some(key) = mistake.message.split('`').nth(1).map(str::to_owned) else { break };
            // The key exists but has a mistake.
            let hidden = removed.iter().any(|(of, name)| *of == path && *name == key);
            if !hidden {
                mistakes.push(mistake);
            }
            if !insert(table.get_mut(), &path, key, &span) {
                break;
            }
            unfinished.push(span);
            continue;
        }
        if let Some((key, parent)) = path.split_last() {
            let meant = mistake.help.as_deref().and_then(|help| help.split('`').nth(1));
            removed.push((parent.to_vec(), meant.unwrap_or(key).to_owned()));
            removed.push((parent.to_vec(), key.clone()));
        }
        mistakes.push(mistake);
        if !remove(table.get_mut(), &path) {
            break;
        }
    }
    (None, mistakes)
}

/// The path to the innermost entry at a span: keys, and positions in arrays.
fn path_to(table: &DeTable<'_>, span: &Range<usize>) -> Option<Vec<String>> {
    // Values added by `insert` have the span of their table as both key and value.
    let written = |(key, value): &(&Spanned<DeString<'_>>, &Spanned<DeValue<'_>>)| {
        !(matches!(value.get_ref(), DeValue::String(_)) && key.span() == value.span())
    };
    table.iter().filter(written).find_map(|(key, value)| {
        let name = key.get_ref().to_string();
        if key.span() == *span {
            return Some(vec![name]);
        }
        path_within(value, span).map(|mut path| {
            path.insert(0, name);
            path
        })
    })
}

fn path_within(value: &Spanned<DeValue<'_>>, span: &Range<usize>) -> Option<Vec<String>> {
    let inner = match value.get_ref() {
        DeValue::Table(table) => path_to(table, span),
        DeValue::Array(array) => array.iter().enumerate().find_map(|(position, value)| {
            path_within(value, span).map(|mut path| {
                path.insert(0, position.to_string());
                path
            })
        }),
        _ => None,
    };
    let whole = value.span();
    inner.or_else(|| (whole.start <= span.start && span.end <= whole.end).then(Vec::new))
}

fn entry<'a, 'i>(table: &'a mut DeTable<'i>, key: &str) -> Option<&'a mut Spanned<DeValue<'i>>> {
    table.iter_mut().find(|(name, _)| name.get_ref() == key).map(|(_, value)| value)
}

fn remove<'i>(table: &mut DeTable<'i>, path: &[String]) -> bool {
    let Some((first, rest)) = path.split_first() else { return false };
    if rest.is_empty() {
        let before = table.len();
        let kept = std::mem::take(table).into_iter();
        *table = kept.filter(|(name, _)| name.get_ref() != first).collect();
        return table.len() < before;
    }
    entry(table, first).is_some_and(|value| remove_within(value.get_mut(), rest))
}

fn remove_within<'i>(value: &mut DeValue<'i>, path: &[String]) -> bool {
    match value {
        DeValue::Table(table) => remove(table, path),
        DeValue::Array(array) => {
            let Some((first, rest)) = path.split_first() else { return false };
            let Some(at) = first.parse().ok().filter(|&at: &usize| at < array.len()) else {
                return false;
            };
            if !rest.is_empty() {
                return array.get_mut(at).is_some_and(|value| remove_within(value.get_mut(), rest));
            }
            let left = array.iter().enumerate().filter(|(position, _)| *position != at);
            let left: DeArray<'i> = left.map(|(_, value)| value.clone()).collect();
            *array = left;
            true
        }
        _ => false,
    }
}

/// Adds a value for a missing key, so that the rest can be read.
fn insert(table: &mut DeTable<'_>, path: &[String], key: String, span: &Range<usize>) -> bool {
    let Some((first, rest)) = path.split_first() else {
        let nothing = DeValue::String(Cow::Borrowed(""));
        let key = Spanned::new(span.clone(), Cow::Owned(key));
        return table.insert(key, Spanned::new(span.clone(), nothing)).is_none();
    };
    match entry(table, first).map(Spanned::get_mut) {
        Some(DeValue::Table(table)) => insert(table, rest, key, span),
        Some(DeValue::Array(array)) => {
            let Some((first, rest)) = rest.split_first() else { return false };
            let element = first.parse().ok().and_then(|at: usize| array.get_mut(at));
            match element.map(Spanned::get_mut) {
                Some(DeValue::Table(table)) => insert(table, rest, key, span),
                _ => false,
            }
        }
        _ => false,
    }
}

/// Reads only `admin_socket`.
pub(super) fn admin_socket(source: &Source<'_>) -> Result<Option<Spanned<String>>, ConfigError> {
    #[derive(Deserialize)]
    struct Only {
        admin_socket: Option<Spanned<String>>,
    }
    toml::from_str::<Only>(source.text)
        .map(|only| only.admin_socket)
        .map_err(|error| source.error(translate(&error, source, &[])))
}

/// Translates an error of serde: keys instead of fields, tables instead of maps, with the nearest
/// valid key and an example. `path` leads to the entry with the error.
fn translate(error: &Error, source: &Source<'_>, path: &[String]) -> Mistake {
    let span = error.span().unwrap_or(0..0);
    let message = error.message();
    let (message, help) = match message.split_once('\n') {
        Some((message, help)) => (message, Some(help.to_owned())),
        None => (message, None),
    };
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let (word, valid) = word_and_list(rest);
        let help = hints::key(word, &valid)
            .or_else(|| elsewhere(word, &valid))
            .unwrap_or_else(|| suggest(word, "the keys here are", valid.iter().copied()));
        return Mistake::new(span, format!("unknown key `{word}`")).help(help);
    }
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        let (word, valid) = word_and_list(rest);
        return Mistake::new(span, format!("unknown value `{word}`"))
            .help(hints::value(word, &valid));
    }
    if let Some(rest) = message.strip_prefix("missing field ") {
        return Mistake::absence(span, format!("missing key {rest}"))
            .help(format!("add {rest} to this table"));
    }
    let array = ["listener", "advice_peer"];
    let slice = source.slice(&span);
    let single_bracket = array.into_iter().find(|name| slice.starts_with(&format!("[{name}]")));
    let message = message
        .replace("invalid type: map", "wrong type: table")
        .replace("invalid type: sequence", "wrong type: array")
        .replace("invalid type: ", "wrong type: ")
        .replace("expected a sequence", "expected an array")
        .replace("expected a map", "expected a table");
    let message = match message.split_once("expected struct ") {
        Some((before, _)) => format!("{before}expected a table"),
        None => message,
    };
    let help = match help {
        None if single_bracket.is_some() => {
            single_bracket.map(|name| format!("write [[{name}]], with two brackets"))
        }
        None if message.starts_with("wrong type") || message.starts_with("must be ") => {
            hints::example(path).map(|example| format!("such as: {example}"))
        }
        help => help,
    };
    Mistake { help, ..Mistake::new(span, message) }
}

/// Splits "`word`, expected one of `a`, `b`".
fn word_and_list(rest: &str) -> (&str, Vec<&str>) {
    let mut quoted = rest.split('`').skip(1).step_by(2);
    let word = quoted.next().unwrap_or_default();
    (word, quoted.collect())
}

/// The right table for a key that is valid in another table.
fn elsewhere(word: &str, here: &[&str]) -> Option<String> {
    tables().into_iter().find(|(_, keys)| keys.contains(&word) && *keys != here).map(
        |(table, _)| match table {
            "" => format!("`{word}` is a top-level key: move it above the first [table]"),
            table => format!("`{word}` belongs in {table}"),
        },
    )
}
