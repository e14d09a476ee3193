//! The directory of a dispatcher without a configuration: `demo` and `serve`.

use std::borrow::Cow;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

/// A directory for the own user only, removed on drop together with the sockets in it.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
}

impl Directory {
    /// `dispatcher-COMMAND-PID-N` in the user's runtime directory, or where temporary files are.
    pub(super) fn new(command: &str) -> io::Result<Directory> {
        let parent = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            // Socket paths are limited in length, so a long path cannot be used.
            .filter(|path| path.is_dir() && path.as_os_str().len() < 64)
            .unwrap_or_else(std::env::temp_dir);
        let pid = std::process::id();
        let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
        // `mkdir` fails if the name exists, so a directory of another process is never used.
        for number in 0..16 {
            let path = parent.join(format!("dispatcher-{command}-{pid}-{number}"));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Directory { path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        for name in [
            "admin.sock",
            "admin.sock.lock",
            "dispatch.sock",
            "dispatch.sock.lock",
            "dispatch.sock.take-over",
            "dispatch.sock.take-over.lock",
            "relay.sock",
            "relay.sock.lock",
        ] {
            let _ = std::fs::remove_file(self.path.join(name));
        }
        // If other files are in it, the directory stays.
        let _ = std::fs::remove_dir(&self.path);
    }
}

/// Quotes a word for a shell, so that the line can be copied.
pub(super) fn quoted(word: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%=".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into();
    }
    format!("'{}'", word.replace('\'', "'\\''")).into()
}
