//! `dispatcher.toml(5)`: a manual page made from the sample configuration, which explains every
//! key.

use clap_mangen::roff::{Roff, bold, roman};

use crate::config::SAMPLE;

/// The title of the page.
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
    // Some terminals show only ASCII.
    let sample = SAMPLE.replace('…', "...");
    for line in sample.lines().chain([""]) {
        if let Some(title) = line.strip_prefix("# ----") {
            block(&mut roff, &mut comment, &mut keys);
            let title = title.trim_matches(['-', ' ']).to_uppercase();
            roff.control("SH", [title.as_str()]);
        } else if let Some(table) = table(line) {
            // A comment above a table describes that table.
            let above = std::mem::take(&mut comment);
            block(&mut roff, &mut comment, &mut keys);
            let name = table.replace("pool.web", "pool.NAME");
            roff.control("SS", [name.as_str()]);
            comment = above;
            block(&mut roff, &mut comment, &mut keys);
        } else if let Some(key) = key(line) {
            keys.push(key);
        } else if let Some(text) = line.strip_prefix('#') {
            // A comment after keys describes the next keys.
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

/// The header of a table, commented out or not.
fn table(line: &str) -> Option<&str> {
    let line = line.strip_prefix('#').unwrap_or(line);
    (line.starts_with('[') && line.ends_with(']')).then_some(line)
}

/// A setting, commented out or not.
fn key(line: &str) -> Option<&str> {
    let line = line.strip_prefix('#').unwrap_or(line);
    let (name, _) = line.split_once('=')?;
    let name = name.trim_end();
    let good =
        name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte.is_ascii_digit());
    (good && !name.is_empty() && !line.starts_with(' ')).then_some(line)
}

/// Writes settings with their description; without settings, a paragraph.
fn block(roff: &mut Roff, comment: &mut Vec<&str>, keys: &mut Vec<&str>) {
    if keys.is_empty() && !comment.is_empty() {
        roff.control("PP", []);
    }
    for (position, key) in keys.drain(..).enumerate() {
        roff.control(if position == 0 { "TP" } else { "TQ" }, []);
        let (setting, remark) = key.split_once("    #").unwrap_or((key, ""));
        // The file aligns values; the page does not.
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
