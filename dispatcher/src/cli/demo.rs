//! `dispatcher demo`: runs without a configuration file, in a temporary directory.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::{DemoArgs, Exit, Failure, print, run};
use crate::config::Config;

pub(super) fn demo(arguments: &DemoArgs) -> Result<(), Failure> {
    let directory = Directory::new().map_err(|error| {
        Failure::new(Exit::CantCreate, format!("the temporary directory: {error}"))
    })?;
    let admin = match &arguments.admin {
        Some(path) => path.clone(),
        None => directory.path.join("admin.sock"),
    };
    let program = std::env::current_exe()
        .map_err(|error| Failure::new(Exit::OsErr, format!("the path of this program: {error}")))?;
    let program = program.to_str().map(str::to_owned).ok_or_else(|| {
        Failure::new(
            Exit::OsErr,
            format!("the path of this program is not UTF-8: {}", program.display()),
        )
    })?;
    let relay = directory.path.join("relay.sock");
    let config = Config::demo(
        arguments.listen,
        arguments.workers,
        admin.clone(),
        directory.path.join("dispatch.sock"),
        relay.clone(),
        vec![program.clone(), "demo-worker".to_owned(), std::process::id().to_string()],
    );
    let workers = arguments.workers;
    run::serve(config, |addresses| {
        // The demo serves even if stdout is closed.
        let _ = print(&what_to_try(&program, addresses, workers, &admin, &relay));
    })
}

fn what_to_try(
    program: &str,
    addresses: &[String],
    workers: u32,
    admin: &Path,
    relay: &Path,
) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    for address in addresses {
        let _ = writeln!(
            text,
            "{} http://{address}/   (Ctrl-C stops everything)\n\n\
             Try, in another terminal:\n  \
             curl http://{address}/",
            if workers == 1 {
                "1 worker serves".to_owned()
            } else {
                format!("{workers} workers serve")
            }
        );
    }
    let admin = admin.display().to_string();
    let relay = relay.display().to_string();
    let (program, admin) = (quoted(program), quoted(&admin));
    for command in ["status", "top", "drain web/web-1"] {
        let _ = writeln!(text, "  {program} {command} --admin {admin}");
    }
    let _ = writeln!(text, "  {program} relay stats --socket {}", quoted(&relay));
    text
}

/// Quotes a word for a shell, so that the line can be copied.
fn quoted(word: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%=".contains(c);
    if word.chars().all(plain) {
        return word.into();
    }
    format!("'{}'", word.replace('\'', "'\\''")).into()
}

/// A private directory, removed on drop together with the sockets in it.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
}

impl Directory {
    fn new() -> io::Result<Directory> {
        let parent = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            // Socket paths are limited in length, so a long path cannot be used.
            .filter(|path| path.is_dir() && path.as_os_str().len() < 64)
            .unwrap_or_else(std::env::temp_dir);
        let pid = std::process::id();
        let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
        // `mkdir` fails if the name exists, so a directory of another process is never used.
        for number in 0..16 {
            let path = parent.join(format!("dispatcher-demo-{pid}-{number}"));
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
