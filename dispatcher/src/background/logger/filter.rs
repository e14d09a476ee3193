//! Parses `DISPATCHER_LOG`. A directive with a mistake is skipped and reported, and the
//! configuration's level applies to all that no directive names: a typing error must not silence
//! the log.

use log::LevelFilter;

use super::{VARIABLE, name};

/// Other crates that log.
const CRATES: [&str; 10] = [
    "worker_sdk",
    "axum",
    "aya",
    "aya_obj",
    "hyper",
    "hyper_util",
    "mio",
    "rustls",
    "tokio",
    "signal_hook",
];

/// They write hundreds of lines for each program that they load. At most warnings of them are
/// logged, unless they are named.
pub(super) const LOUD: [&str; 2] = ["aya", "aya_obj"];

/// The top-level modules of this crate. Log lines show them without the crate's name, so a
/// directive may name them in the same way.
const MODULES: [&str; 15] = [
    "admin",
    "api",
    "background",
    "cli",
    "config",
    "demo",
    "event_loop",
    "listen",
    "mailbox",
    "plural",
    "preface",
    "reload",
    "signals",
    "sys",
    "wake",
];

/// The valid directives, and the mistakes in the others.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// In the syntax of `env_logger`; the first directive is for everything.
    pub(super) directives: String,
    pub(super) mistakes: Vec<String>,
}

/// Parses `text`; `level` applies to everything that `text` does not name.
pub(super) fn parse(text: &str, level: LevelFilter) -> Filter {
    let (directives, pattern) = match text.split_once('/') {
        Some((directives, pattern)) => (directives, Some(pattern)),
        None => (text, None),
    };
    let mut all = level;
    let mut rest = Vec::new();
    let mut mistakes = Vec::new();
    for word in directives.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        match word.split_once('=') {
            None => match (level_of(word), target_of(word)) {
                (Some(level), _) => all = level,
                (None, Some(target)) => rest.push(target),
                (None, None) => mistakes.push(format!("`{word}` is neither a level nor a target")),
            },
            Some((target, level)) => {
                let (target, level) = (target.trim(), level.trim());
                match (target_of(target), level_of(level)) {
                    (None, _) => mistakes.push(format!("unknown target `{target}`")),
                    (_, None) => mistakes.push(format!("unknown level `{level}`")),
                    (Some(target), Some(level)) => rest.push(format!("{target}={}", name(level))),
                }
            }
        }
    }
    let mut directives = name(all).to_owned();
    for directive in rest {
        directives.push(',');
        directives.push_str(&directive);
    }
    if let Some(pattern) = pattern {
        directives.push('/');
        directives.push_str(pattern);
    }
    Filter { directives, mistakes }
}

/// A hint for a mistake.
pub(super) fn hint() -> String {
    format!(
        "levels are off, error, warn, info, debug, trace; {VARIABLE}=debug, or {VARIABLE}=info,event_loop=debug"
    )
}

fn level_of(word: &str) -> Option<LevelFilter> {
    word.parse().ok()
}

/// The full path of a module that may log.
fn target_of(word: &str) -> Option<String> {
    let (first, rest) = match word.split_once("::") {
        Some((first, rest)) => (first, Some(rest)),
        None => (word, None),
    };
    if first == "dispatcher" {
        let module = rest.map(|rest| rest.split("::").next().unwrap_or(rest));
        return module.is_none_or(|module| MODULES.contains(&module)).then(|| word.to_owned());
    }
    if MODULES.contains(&first) {
        return Some(format!("dispatcher::{word}"));
    }
    CRATES.contains(&first).then(|| word.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, usize) {
        let filter = parse(text, LevelFilter::Warn);
        (filter.directives, filter.mistakes.len())
    }

    #[test]
    fn what_is_right_counts_and_what_is_wrong_is_named() {
        for (text, directives, mistakes) in [
            ("debug", "debug", 0),
            ("DEBUG", "debug", 0),
            ("trace,aya=debug", "trace,aya=debug", 0),
            ("off", "off", 0),
            ("", "warn", 0),
            ("warning", "warn", 1),
            ("verbose", "warn", 1),
            ("info,event_loop=debug", "info,dispatcher::event_loop=debug", 0),
            ("dispatcher::event_loop::join=trace", "warn,dispatcher::event_loop::join=trace", 0),
            ("dispatcher", "warn,dispatcher", 0),
            ("event_lop=debug", "warn", 1),
            ("dispatcher::event_lop=debug", "warn", 1),
            ("event_loop=loud , hyper=info", "warn,hyper=info", 1),
            ("debug,nonsense=1,event_loop=7", "debug", 2),
            ("info/worker_joined", "info/worker_joined", 0),
        ] {
            assert_eq!(parsed(text), (directives.to_owned(), mistakes), "{text}");
        }
    }

    #[test]
    fn the_modules_are_those_there_are() {
        let text = include_str!("../../lib.rs");
        let declared = text.lines().filter_map(|line| {
            let line = line.strip_prefix("pub ").unwrap_or(line);
            line.strip_prefix("mod ")?.strip_suffix(';')
        });
        assert_eq!(declared.collect::<Vec<_>>(), MODULES);
    }
}
