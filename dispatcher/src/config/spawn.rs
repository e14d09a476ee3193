//! What a pool has besides numbers: the processes it starts, and the bytes it sends when there is no worker.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};
use toml::Spanned;

use super::error::Mistake;
use super::file::SpawnKeys;
use super::validate::{Check, Checked};
use super::{MAX_UNAVAILABLE_RESPONSE, Spawn};

/// What the kernel takes as one argument or variable (`MAX_ARG_STRLEN`), with its terminating zero.
const MAX_STRING: usize = 131_072;

/// What our own supervisor told us is not for our processes: they would answer in our name.
pub const NOT_INHERITED: [&str; 7] = [
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// `[pool.NAME.spawn]`, with what `[defaults.spawn]` adds. Only a pool with the table itself starts processes.
pub(super) fn spawn(
    check: &mut Check<'_>,
    keys: &Spanned<SpawnKeys>,
    defaults: Option<&Spanned<SpawnKeys>>,
) -> Option<Spawn> {
    let own = keys.get_ref();
    let defaults = defaults.map(Spanned::get_ref);
    let environment = own.environment.as_ref().or(defaults.and_then(|d| d.environment.as_ref()));
    let environment = environment.map_or_else(Vec::new, |table| variables(check, table));
    let directory = own.directory.as_ref().or(defaults.and_then(|d| d.directory.as_ref()));
    let command = own.command.as_ref().or(defaults.and_then(|d| d.command.as_ref()));
    for text in command.into_iter().flat_map(Spanned::get_ref).chain(directory) {
        check.keep(argument(text));
    }
    let Some(command) = command else {
        check.mistake(
            Mistake::absence(keys.span(), "missing key `command`")
                .help("add the program and its arguments: command = [\"/usr/bin/my-server\"]"),
        );
        return None;
    };
    match command.get_ref().first() {
        None => {
            check.mistake(
                Mistake::new(command.span(), "`command` is empty")
                    .help("it starts with a program: [\"/usr/bin/my-server\", \"--option\"]"),
            );
        }
        Some(program) if program.get_ref().is_empty() => {
            check.mistake(Mistake::new(program.span(), "the program has no name"));
        }
        Some(program) => {
            if let Some(warning) = missing_program(program, directory, &environment) {
                check.warn(warning);
            }
        }
    }
    if let Some(directory) = directory
        && !Path::new(directory.get_ref()).is_dir()
    {
        let message = format!("there is no directory `{}`", directory.get_ref());
        check.warn(Mistake::new(directory.span(), message).help(NOT_NOW));
    }
    Some(Spawn {
        command: command.get_ref().iter().map(|word| word.get_ref().clone()).collect(),
        processes: own.processes.or(defaults.and_then(|d| d.processes)).map_or(1, |n| n.0),
        environment,
        directory: directory.map(|directory| PathBuf::from(directory.get_ref())),
    })
}

/// What is missing may come before it is wanted; so that is only a warning.
const NOT_NOW: &str = "until there is, its processes cannot be started";

/// A warning if no such program can be started now.
fn missing_program(
    program: &Spanned<String>,
    directory: Option<&Spanned<String>>,
    environment: &[(String, String)],
) -> Option<Mistake> {
    let name = program.get_ref().as_str();
    let runs = |path: &Path| path.is_file() && access(path, AccessFlags::X_OK).is_ok();
    let span = program.span();
    if !name.contains('/') {
        // Where the child looks: its own PATH, if it is given one.
        let own = environment.iter().find(|(variable, _)| variable == "PATH");
        let paths = own.map(|(_, value)| value.into()).or_else(|| std::env::var_os("PATH"));
        let paths = paths.unwrap_or_else(|| "/bin:/usr/bin".into());
        let found = std::env::split_paths(&paths).any(|folder| runs(&folder.join(name)));
        let message = format!("there is no program `{name}` in PATH ({})", paths.display());
        return (!found).then(|| {
            Mistake::new(span, message).help("write its whole path, such as \"/usr/bin/my-server\"")
        });
    }
    // A relative path is relative to the directory in which the process starts.
    let path = match directory {
        Some(directory) => Path::new(directory.get_ref()).join(name),
        None => PathBuf::from(name),
    };
    match std::fs::metadata(&path) {
        Err(error) => {
            Some(Mistake::new(span, format!("`{}`: {error}", path.display())).help(NOT_NOW))
        }
        Ok(_) if !runs(&path) => {
            let message = format!("`{}` is not an executable file", path.display());
            Some(Mistake::new(span, message).help(NOT_NOW))
        }
        Ok(_) => None,
    }
}

fn argument(text: &Spanned<String>) -> Checked<()> {
    if text.get_ref().len() + 1 > MAX_STRING {
        return Err(Mistake::new(text.span(), "this is too long")
            .help("the kernel allows 131072 bytes for an argument"));
    }
    no_zero_byte(text)
}

fn no_zero_byte(text: &Spanned<String>) -> Checked<()> {
    if text.get_ref().contains('\0') {
        return Err(Mistake::new(text.span(), "this cannot contain a zero byte"));
    }
    Ok(())
}

fn variables(
    check: &mut Check<'_>,
    environment: &BTreeMap<Spanned<String>, Spanned<String>>,
) -> Vec<(String, String)> {
    let mut variables = Vec::with_capacity(environment.len());
    for (name, value) in environment {
        check.keep(variable(name, value));
        check.keep(no_zero_byte(value));
        variables.push((name.get_ref().clone(), value.get_ref().clone()));
    }
    variables
}

fn variable(name: &Spanned<String>, value: &Spanned<String>) -> Checked<()> {
    if name.get_ref().is_empty() || name.get_ref().contains(['=', '\0']) {
        return Err(Mistake::new(name.span(), "not a name for an environment variable"));
    }
    if super::RESERVED_VARIABLES.contains(&name.get_ref().as_str()) {
        let message = format!("the dispatcher itself sets `{}`", name.get_ref());
        return Err(Mistake::new(name.span(), message)
            .help("it tells the worker where and as whom to join"));
    }
    if NOT_INHERITED.contains(&name.get_ref().as_str()) {
        let message = format!("`{}` cannot be set here", name.get_ref());
        return Err(Mistake::new(name.span(), message).help(
            "it is how a service manager speaks to the dispatcher: its processes start without it",
        ));
    }
    // With the sign between them and the zero at the end.
    if name.get_ref().len() + value.get_ref().len() + 2 > MAX_STRING {
        return Err(Mistake::new(value.span(), format!("`{}` is too long", name.get_ref()))
            .help("the kernel allows 131072 bytes for a variable, with its name"));
    }
    Ok(())
}

pub(super) fn unavailable_response(path: &Spanned<String>) -> Checked<Vec<u8>> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;

    let unreadable = |error: std::io::Error| {
        Mistake::new(path.span(), format!("`{}` cannot be read: {error}", path.get_ref()))
            .help("it holds the bytes a client gets before it is closed because there is no worker")
    };
    // Without waiting: a pipe would be waited for until somebody writes to it.
    let mut options = std::fs::File::options();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path.get_ref());
    let file = file.map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(unreadable(std::io::Error::other("not a regular file")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_UNAVAILABLE_RESPONSE as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > MAX_UNAVAILABLE_RESPONSE {
        return Err(Mistake::new(
            path.span(),
            format!("`{}` is longer than 64 KiB", path.get_ref()),
        )
        .help("it has to fit into the client's socket buffer at once"));
    }
    Ok(bytes)
}
