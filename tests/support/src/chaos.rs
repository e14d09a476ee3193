//! What the chaos tests share.

use std::path::Path;

use crate::write_config;

/// A seed that is short enough to type again.
pub fn any_seed() -> u64 {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
    u64::from_ne_bytes(bytes) % 1_000_000_000
}

/// As [`write_config`], atomically: the file may be read at any moment.
pub fn replace_config(directory: &Path, text: &str) {
    let part = directory.join("part");
    std::fs::create_dir_all(&part).unwrap();
    write_config(&part, text);
    let text = std::fs::read_to_string(part.join("dispatcher.toml")).unwrap();
    let text = text.replace(part.to_str().unwrap(), directory.to_str().unwrap());
    std::fs::write(part.join("dispatcher.toml"), text).unwrap();
    std::fs::rename(part.join("dispatcher.toml"), directory.join("dispatcher.toml")).unwrap();
}

/// Runs a closure at the end of a scope, so that threads end even when something panics.
pub struct OnDrop<F: FnMut()>(pub F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Prints the last lines of a file.
pub fn tail(path: &Path, lines: usize) {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    println!("--- the last of {}:", path.display());
    let skip = text.lines().count().saturating_sub(lines);
    text.lines().skip(skip).for_each(|line| println!("{line}"));
}
