//! The directory of a dispatcher without a configuration: `demo` and `serve`.

use std::borrow::Cow;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// A directory for the own user only, removed on drop together with the sockets in it.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
}

impl Directory {
    /// `dispatcher-COMMAND-PID-N` in the user's runtime directory, or where temporary files are.
    pub(super) fn new(command: &str) -> io::Result<Directory> {
        let parent = parent();
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

/// The user's runtime directory, or where temporary files are.
fn parent() -> PathBuf {
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        // Socket paths are limited in length, so a long path cannot be used.
        .filter(|path| path.is_dir() && path.as_os_str().len() < 64)
        .unwrap_or_else(std::env::temp_dir)
}

/// The admin sockets of this user's running `dispatcher COMMAND`, in order.
pub(super) fn running(command: &str) -> Vec<PathBuf> {
    running_in(&parent(), command)
}

/// Only sockets in directories that no other user can have made or changed.
fn running_in(parent: &Path, command: &str) -> Vec<PathBuf> {
    let own = rustix::process::geteuid().as_raw();
    let prefix = format!("dispatcher-{command}-");
    let is_own = |entry: &std::fs::DirEntry| {
        // Of the entry itself, not of what a link names.
        let found = entry.metadata();
        let private =
            found.is_ok_and(|it| it.is_dir() && it.uid() == own && it.mode() & 0o077 == 0);
        private && entry.file_name().to_string_lossy().starts_with(&prefix)
    };
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten().filter(is_own);
    let sockets = entries.map(|entry| entry.path().join("admin.sock"));
    // One that was killed has left its socket.
    let mut all: Vec<PathBuf> = sockets.filter(|path| UnixStream::connect(path).is_ok()).collect();
    all.sort();
    all
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_directories_of_the_user_are_searched() {
        use std::os::unix::fs::PermissionsExt;
        use std::os::unix::net::UnixListener;
        let parent = tempfile::tempdir().expect("a directory");
        let mut listeners = Vec::new();
        let mut make = |name: &str, mode: u32| {
            let path = parent.path().join(name);
            std::fs::create_dir(&path).expect("made");
            listeners.push(UnixListener::bind(path.join("admin.sock")).expect("bound"));
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).expect("set");
            path
        };
        let good = make("dispatcher-serve-1-0", 0o700);
        make("dispatcher-serve-2-0", 0o770);
        make("dispatcher-demo-3-0", 0o700);
        let elsewhere = make("elsewhere", 0o700);
        std::os::unix::fs::symlink(elsewhere, parent.path().join("dispatcher-serve-4-0"))
            .expect("linked");
        let dead = parent.path().join("dispatcher-serve-5-0");
        DirBuilder::new().mode(0o700).create(&dead).expect("made");
        drop(UnixListener::bind(dead.join("admin.sock")).expect("bound"));
        assert_eq!(running_in(parent.path(), "serve"), [good.join("admin.sock")]);
        drop(listeners);
        assert_eq!(running_in(parent.path(), "serve"), [] as [PathBuf; 0]);
    }
}
