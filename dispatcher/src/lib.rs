//! The dispatcher: balances TCP connections across the worker processes of one host.

pub mod admin;
pub mod api;
pub mod background;
pub mod cli;
pub mod config;
#[cfg(feature = "demo")]
pub mod demo;
pub mod event_loop;
pub mod listen;
pub mod mailbox;
mod plural;
pub mod preface;
pub mod reload;
pub mod signals;
mod sys;
pub mod wake;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// The modules in the order of their imports: each module imports only from earlier ones.
    const LAYERS: [&[&str]; 9] = [
        &["sys", "wake", "plural", "preface"],
        &["api", "signals", "config"],
        &["background", "listen"],
        &["reload"],
        &["mailbox"],
        &["admin", "event_loop"],
        &["demo"],
        &["cli"],
        &["tests"],
    ];

    fn layer(module: &str) -> usize {
        let found = LAYERS.iter().position(|layer| layer.contains(&module));
        found.unwrap_or_else(|| panic!("`{module}` has no layer"))
    }

    fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).expect("sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let text = fs::read_to_string(&path).expect("UTF-8");
                found.push((path.display().to_string(), text));
            }
        }
    }

    #[test]
    fn no_module_imports_from_a_later_one() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut found = Vec::new();
        sources(&root, &mut found);
        for (path, text) in &found {
            let below = path.strip_prefix(&root.display().to_string()).unwrap_or(path);
            let module = below.trim_matches('/').split(['/', '.']).next().unwrap_or_default();
            if ["lib", "main"].contains(&module) || below.contains("tests") {
                continue;
            }
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            for line in code {
                for import in line.split("crate::").skip(1) {
                    let end = |c: char| !c.is_ascii_alphanumeric() && c != '_';
                    let other = import.split(end).next().unwrap_or_default();
                    if other.is_empty() || other.starts_with(char::is_uppercase) || other == module
                    {
                        continue;
                    }
                    let known = LAYERS.iter().any(|layer| layer.contains(&other));
                    let later = known && layer(other) >= layer(module);
                    let same = known && layer(other) == layer(module) && layer(module) < 3;
                    assert!(!later || same, "{below} imports from {other}: {line}");
                }
            }
        }
        assert!(found.len() > 50, "the sources were found");
    }
}
