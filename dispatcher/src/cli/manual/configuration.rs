//! `dispatcher.toml(5)`: the sample configuration, which explains every key, as a manual page.

use clap_mangen::roff::{Roff, bold, roman};

use crate::config::SAMPLE;

/// What the page is called.
pub(super) const TITLE: &str = "dispatcher.toml";

/// The page.
pub(super) fn page() -> String {
    let mut roff = Roff::new();
    let source = concat!("dispatcher ", env!("CARGO_PKG_VERSION"));
    roff.control("TH", ["DISPATCHER.TOML", "5", "", source, "dispatcher"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("dispatcher.toml - the configuration of dispatcher")]);
    roff.control("SH", ["DESCRIPTION"]);
    let mut comment: Vec<&str> = Vec::new();
    let mut keys: Vec<&str> = Vec::new();
    // Not every terminal that shows the page knows more than ASCII.
    let sample = SAMPLE.replace('…', "...");
    for line in sample.lines().chain([""]) {
        if let Some(title) = line.strip_prefix("# ----") {
            block(&mut roff, &mut comment, &mut keys);
            let title = title.trim_matches(['-', ' ']).to_uppercase();
            roff.control("SH", [title.as_str()]);
        } else if let Some(table) = table(line) {
            // What is written above a table is about it.
            let above = std::mem::take(&mut comment);
            block(&mut roff, &mut comment, &mut keys);
            let name = table.replace("pool.web", "pool.NAME");
            roff.control("SS", [name.as_str()]);
            comment = above;
            block(&mut roff, &mut comment, &mut keys);
        } else if let Some(key) = key(line) {
            keys.push(key);
        } else if let Some(text) = line.strip_prefix('#') {
            // A new comment after keys is about the next ones.
            if !keys.is_empty() {
                block(&mut roff, &mut comment, &mut keys);
            }
            comment.push(text.strip_prefix(' ').unwrap_or(text));
        } else {
            block(&mut roff, &mut comment, &mut keys);
        }
    }
    roff.control("SH", ["FILES"]);
    roff.text([
        bold("/etc/dispatcher/dispatcher.toml"),
        roman(": what is read unless --config names another file"),
    ]);
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman("dispatcher(1), dispatcher-check(1), dispatcher-reload(1)")]);
    roff.to_roff()
}

/// A table's head, switched on or not.
fn table(line: &str) -> Option<&str> {
    let line = line.strip_prefix('#').unwrap_or(line);
    (line.starts_with('[') && line.ends_with(']')).then_some(line)
}

/// A setting, switched on or not.
fn key(line: &str) -> Option<&str> {
    let line = line.strip_prefix('#').unwrap_or(line);
    let (name, _) = line.split_once('=')?;
    let name = name.trim_end();
    let good =
        name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte.is_ascii_digit());
    (good && !name.is_empty() && !line.starts_with(' ')).then_some(line)
}

/// Settings with what is said about them; or a paragraph, if there are none.
fn block(roff: &mut Roff, comment: &mut Vec<&str>, keys: &mut Vec<&str>) {
    if keys.is_empty() && !comment.is_empty() {
        roff.control("PP", []);
    }
    for (position, key) in keys.drain(..).enumerate() {
        roff.control(if position == 0 { "TP" } else { "TQ" }, []);
        let (setting, remark) = key.split_once("    #").unwrap_or((key, ""));
        // Aligned in the file, for its readers.
        let setting: Vec<&str> = setting.split_whitespace().collect();
        let remark = match remark.trim() {
            "" => String::new(),
            remark => format!("  ({remark})"),
        };
        roff.text([bold(setting.join(" ")), roman(remark)]);
    }
    let mut literal = false;
    for line in comment.drain(..) {
        if line.starts_with("  ") != literal {
            roff.control(if literal { "fi" } else { "nf" }, []);
            literal = !literal;
        }
        if !line.trim().is_empty() {
            roff.text([roman(line.trim_end())]);
        }
    }
    if literal {
        roff.control("fi", []);
    }
}
