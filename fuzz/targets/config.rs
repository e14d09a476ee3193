//! Any text as a configuration: an error has a position within the text, and can be displayed.

use dispatcher::config::{Config, Diagnostic};

const FILE: &str = "fuzz.toml";

pub fn config(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    match Config::parse(text, FILE) {
        Ok(config) => {
            assert!(!config.pools.is_empty() && !config.listeners.is_empty());
            for listener in &config.listeners {
                assert!(usize::from(listener.pool) < config.pools.len());
            }
            for warning in &config.warnings {
                located(&warning.0, text);
                shown(&warning.0, &warning.to_string());
            }
        }
        Err(error) => {
            let diagnostic = error.diagnostic().expect("there is no file to be unreadable");
            located(diagnostic, text);
            shown(diagnostic, &error.to_string());
        }
    }
}

fn located(diagnostic: &Diagnostic, text: &str) {
    let Diagnostic { line, column, width, .. } = *diagnostic;
    assert!(line >= 1 && column >= 1 && width >= 1, "{diagnostic:?}");
    let found = text.split('\n').nth(line - 1).expect("a line of the text");
    assert_eq!(diagnostic.text, found.strip_suffix('\r').unwrap_or(found));
    // The caret may be right behind the line, if something is missing there.
    let length = diagnostic.text.chars().count();
    assert!(column <= length + 1, "{diagnostic:?}");
    assert!(column - 1 + width <= length.max(column), "{diagnostic:?}");
    assert!(!diagnostic.message.is_empty());
}

fn shown(diagnostic: &Diagnostic, shown: &str) {
    let place = format!("{FILE}:{}:{}: ", diagnostic.line, diagnostic.column);
    assert!(shown.starts_with(&place), "{shown}");
    assert!(shown.contains(&diagnostic.message), "{shown}");
}
