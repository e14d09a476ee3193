//! What a pool has besides numbers: the processes it starts, and the bytes it sends when there is no worker.

use std::collections::BTreeMap;
use std::path::PathBuf;

use toml::Spanned;

use super::error::Mistake;
use super::file::SpawnKeys;
use super::validate::Checked;
use super::{MAX_UNAVAILABLE_RESPONSE, Spawn};

/// `[pool.NAME.spawn]`, with what `[defaults.spawn]` adds. Only a pool with the table itself starts processes.
pub(super) fn spawn(
    keys: &Spanned<SpawnKeys>,
    defaults: Option<&Spanned<SpawnKeys>>,
) -> Checked<Spawn> {
    let own = keys.get_ref();
    let defaults = defaults.map(Spanned::get_ref);
    let command =
        own.command.as_ref().or(defaults.and_then(|d| d.command.as_ref())).ok_or_else(|| {
            Mistake::new(keys.span(), "missing key `command`")
                .help("add the program and its arguments: command = [\"/usr/bin/my-server\"]")
        })?;
    match command.get_ref().first() {
        None => {
            return Err(Mistake::new(command.span(), "`command` is empty")
                .help("it starts with a program: [\"/usr/bin/my-server\", \"--option\"]"));
        }
        Some(program) if program.get_ref().is_empty() => {
            return Err(Mistake::new(program.span(), "the program has no name"));
        }
        Some(_) => {}
    }
    let environment = own.environment.as_ref().or(defaults.and_then(|d| d.environment.as_ref()));
    let directory = own.directory.as_ref().or(defaults.and_then(|d| d.directory.as_ref()));
    for text in command.get_ref().iter().chain(directory) {
        no_zero_byte(text)?;
    }
    Ok(Spawn {
        command: command.get_ref().iter().map(|word| word.get_ref().clone()).collect(),
        processes: own.processes.or(defaults.and_then(|d| d.processes)).map_or(1, |n| n.0),
        environment: environment.map_or(Ok(Vec::new()), variables)?,
        directory: directory.map(|directory| PathBuf::from(directory.get_ref())),
    })
}

fn no_zero_byte(text: &Spanned<String>) -> Checked<()> {
    if text.get_ref().contains('\0') {
        return Err(Mistake::new(text.span(), "this cannot contain a zero byte"));
    }
    Ok(())
}

fn variables(
    environment: &BTreeMap<Spanned<String>, Spanned<String>>,
) -> Checked<Vec<(String, String)>> {
    let mut variables = Vec::with_capacity(environment.len());
    for (name, value) in environment {
        if name.get_ref().is_empty() || name.get_ref().contains(['=', '\0']) {
            return Err(Mistake::new(name.span(), "not a name for an environment variable"));
        }
        if super::RESERVED_VARIABLES.contains(&name.get_ref().as_str()) {
            return Err(Mistake::new(
                name.span(),
                format!("the dispatcher itself sets `{}`", name.get_ref()),
            )
            .help("it tells the worker where and as whom to join"));
        }
        no_zero_byte(value)?;
        variables.push((name.get_ref().clone(), value.get_ref().clone()));
    }
    Ok(variables)
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
