//! The processes that a pool starts, and the bytes that it sends when there is no worker.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dispatch_protocol::wire::{Fork, MAX_PREFORK_RECORD, Token};
use dispatcher_core::Supervision;
use hyper::Uri;
use nix::unistd::{AccessFlags, access};
use toml::Spanned;

use super::error::Mistake;
use super::file::SpawnKeys;
use super::validate::{Check, Checked};
use super::{
    Account, MAX_UNAVAILABLE_RESPONSE, OnDispatcherLoss, Output, ProcessSetup, ReadyCheck, Spawn,
    UnixEndpoint,
};

mod account;
mod limits;
mod placeholder;
mod supervision;

pub(super) use self::placeholder::has_address;
pub use self::placeholder::{Place, depends_on_process, expand, has_placeholder, literal};
pub(super) use self::supervision::{AJitter, ASurge};

/// The kernel's limit for one argument or variable (`MAX_ARG_STRLEN`), with the terminating zero.
const MAX_STRING: usize = 131_072;

/// Variables that the service manager sets for the dispatcher. Child processes must not inherit
/// them, because they would report in the dispatcher's name.
pub const NOT_INHERITED: [&str; 7] = [
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// `[pool.NAME.spawn]`, merged with `[defaults.spawn]`. Only a pool with the table itself starts
/// processes.
pub(super) fn spawn(
    check: &mut Check<'_>,
    pool: &str,
    (keys, defaults): (&Spanned<SpawnKeys>, Option<&Spanned<SpawnKeys>>),
    dispatch_socket: &UnixEndpoint,
    stop_timeout: Duration,
) -> Option<(Spawn, Supervision)> {
    let own = keys.get_ref();
    let defaults = defaults.map(Spanned::get_ref);
    let environment = own.environment.as_ref().or(defaults.and_then(|d| d.environment.as_ref()));
    let environment = environment.map_or_else(Vec::new, |table| variables(check, table));
    let directory = own.directory.as_ref().or(defaults.and_then(|d| d.directory.as_ref()));
    let command = own.command.as_ref().or(defaults.and_then(|d| d.command.as_ref()));
    let setup = setup(check, own, defaults, dispatch_socket);
    let on_dispatcher_loss =
        own.on_dispatcher_loss.or(defaults.and_then(|d| d.on_dispatcher_loss)).unwrap_or_default();
    if on_dispatcher_loss == OnDispatcherLoss::Serve
        && let Some(key) = own.user.as_ref().or(defaults.and_then(|d| d.user.as_ref()))
        && let Some(warning) = account::unreadable(&setup, key)
    {
        check.warn(warning);
    }
    let place = Place { number: 1, name: &format!("{pool}-1"), pool, address: None, fd: None };
    for text in command.into_iter().flat_map(Spanned::get_ref).chain(directory) {
        check.keep(argument(text));
        let known = placeholder::known(check, text);
        check.keep(known);
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
                Mistake::new(command.span(), "`command` is empty").help(
                    "add a program and its arguments: [\"/usr/bin/my-server\", \"--option\"]",
                ),
            );
        }
        Some(program) if program.get_ref().is_empty() => {
            check.mistake(Mistake::new(program.span(), "the program has no name"));
        }
        Some(program) => {
            let account = setup.account.as_ref();
            if let Some(warning) =
                missing_program(program, directory, &environment, (account, place))
            {
                check.warn(warning);
            }
        }
    }
    let processes = own.processes.or(defaults.and_then(|d| d.processes)).map_or(1, |n| n.0);
    if let Some(directory) = directory
        && let Some(warning) = missing_directory(directory, pool, processes, setup.account.as_ref())
    {
        check.warn(warning);
    }
    let fork = own.fork.as_ref().or(defaults.and_then(|d| d.fork.as_ref()));
    let fork = fork.is_some_and(|fork| *fork.get_ref());
    if fork {
        for text in command.get_ref().iter().chain(directory) {
            check.keep(same_for_all(text));
        }
        check.keep(forked_variables(&environment, keys, (pool, processes)));
    }
    let ready_check = own.ready_check.as_ref().or(defaults.and_then(|d| d.ready_check.as_ref()));
    let ready_check = ready_check.and_then(|key| check.keep(self::ready_check(key)));
    let ready_check = ready_check.unwrap_or_default();
    let (supervision, max_memory) =
        supervision::supervision(check, own, defaults, stop_timeout, &ready_check);
    let spawn = Spawn {
        command: command.get_ref().iter().map(|word| word.get_ref().clone()).collect(),
        processes,
        fork,
        environment,
        directory: directory.map(|directory| directory.get_ref().clone()),
        setup,
        on_dispatcher_loss,
        // Its listeners decide on it.
        address: None,
        max_memory,
        ready_check,
    };
    Some((spawn, supervision))
}

/// `ready_check`: `none`, `tcp`, or an HTTP path.
fn ready_check(key: &Spanned<String>) -> Checked<ReadyCheck> {
    let text = key.get_ref();
    match text.as_str() {
        "none" => Ok(ReadyCheck::None),
        "tcp" => Ok(ReadyCheck::Tcp),
        path if path.starts_with('/') && path.len() <= MAX_PATH && path.parse::<Uri>().is_ok() => {
            Ok(ReadyCheck::Http(text.clone()))
        }
        _ => Err(Mistake::new(key.span(), format!("`{text}` is no ready check")).help(
            "write \"none\", \"tcp\" (the worker takes a connection), or the path of an HTTP request \
             that is answered with 200 to 399, such as \"/health\"",
        )),
    }
}

/// The longest path of a ready check.
const MAX_PATH: usize = 1024;

/// Account, permissions, limits and output.
fn setup(
    check: &mut Check<'_>,
    own: &SpawnKeys,
    defaults: Option<&SpawnKeys>,
    dispatch_socket: &UnixEndpoint,
) -> ProcessSetup {
    let user = own.user.as_ref().or(defaults.and_then(|d| d.user.as_ref()));
    let group = own.group.as_ref().or(defaults.and_then(|d| d.group.as_ref()));
    let account = account::account(check, user, group);
    if let (Some(account), Some(key)) = (&account, user.or(group))
        && let Some(warning) = account::unreachable(account, key, dispatch_socket)
    {
        check.warn(warning);
    }
    let umask = own.umask.as_ref().or(defaults.and_then(|d| d.umask.as_ref()));
    let umask = umask.map(|mask| check.octal(mask, "\"0027\": no permission for others"));
    let limits =
        limits::limits(check, own.limits.as_ref(), defaults.and_then(|d| d.limits.as_ref()));
    let default = ProcessSetup::default();
    let output = own.output.or(defaults.and_then(|d| d.output)).map_or(default.output, Into::into);
    if let (Output::Inherit, Some(rate)) = (output, &own.output_rate) {
        check.warn(Mistake::new(rate.span(), "this has no effect without output = \"log\""));
    }
    let output_rate = own.output_rate.as_ref().or(defaults.and_then(|d| d.output_rate.as_ref()));
    ProcessSetup {
        account,
        umask: umask.and_then(|mask| check.keep(mask)),
        limits,
        output,
        output_rate: output_rate.map_or(default.output_rate, |rate| rate.get_ref().0),
    }
}

/// A warning if the directory of a process does not exist, or its account cannot enter it.
fn missing_directory(
    directory: &Spanned<String>,
    pool: &str,
    processes: u32,
    account: Option<&Account>,
) -> Option<Mistake> {
    let text = directory.get_ref();
    if has_address(text) {
        // It is known when the process starts.
        return None;
    }
    let processes = if placeholder::varies(text) { processes } else { 1 };
    (1..=processes).find_map(|number| {
        let name = format!("{pool}-{number}");
        let path = expand(text, Place { number, name: &name, pool, address: None, fd: None });
        if !Path::new(&path).is_dir() {
            let message = format!("there is no directory `{path}`");
            return Some(Mistake::new(directory.span(), message).help(NOT_NOW));
        }
        let account = account.filter(|account| !account::executes(account, Path::new(&path)))?;
        let message = format!("user {} cannot enter the directory `{path}`", account.user_text);
        Some(Mistake::new(directory.span(), message).help(NOT_ALLOWED))
    })
}

/// The program may be installed before it is needed, so this is only a warning.
const NOT_NOW: &str = "until it exists, the processes cannot be started";

/// Permissions may change before the program is needed, too.
const NOT_ALLOWED: &str = "until it may, the processes cannot be started";

/// A warning if the program cannot be started now.
fn missing_program(
    program: &Spanned<String>,
    directory: Option<&Spanned<String>>,
    environment: &[(String, String)],
    (account, place): (Option<&Account>, Place<'_>),
) -> Option<Mistake> {
    let known = |text: &str| !has_address(text);
    if !known(program.get_ref()) || !directory.is_none_or(|it| known(it.get_ref())) {
        return None;
    }
    let name = expand(program.get_ref(), place);
    let name = name.as_str();
    let runs = |path: &Path| {
        path.is_file()
            && match account {
                None => access(path, AccessFlags::X_OK).is_ok(),
                Some(account) => account::executes(account, path),
            }
    };
    let span = program.span();
    if !name.contains('/') {
        // The child searches its own PATH, if the configuration sets one.
        let own = environment.iter().find(|(variable, _)| variable == "PATH");
        let paths =
            own.map(|(_, value)| expand(value, place).into()).or_else(|| std::env::var_os("PATH"));
        let paths = paths.unwrap_or_else(|| "/bin:/usr/bin".into());
        let found = std::env::split_paths(&paths).any(|folder| runs(&folder.join(name)));
        let message = format!("there is no program `{name}` in PATH ({})", paths.display());
        return (!found).then(|| {
            Mistake::new(span, message).help("write the full path, such as \"/usr/bin/my-server\"")
        });
    }
    // A relative path is relative to the working directory of the process.
    let path = match directory {
        Some(directory) => Path::new(&expand(directory.get_ref(), place)).join(name),
        None => PathBuf::from(name),
    };
    match std::fs::metadata(&path) {
        Err(error) => {
            Some(Mistake::new(span, format!("`{}`: {error}", path.display())).help(NOT_NOW))
        }
        Ok(_) if !runs(&path) => {
            let message = match account {
                None => format!("`{}` is not an executable file", path.display()),
                Some(account) => {
                    format!("user {} cannot execute `{}`", account.user_text, path.display())
                }
            };
            Some(Mistake::new(span, message).help(NOT_NOW))
        }
        Ok(_) => None,
    }
}

/// Refuses what differs between processes that have one parent.
fn same_for_all(text: &Spanned<String>) -> Checked<()> {
    if !depends_on_process(text.get_ref()) {
        return Ok(());
    }
    let message = "`{n}` and `{name}` have no value here with `fork = true`";
    Err(Mistake::new(text.span(), message).help(
        "one process forks all processes of the pool, so they have one command and directory: use \
         the placeholders in `environment`, or start each process by itself with `fork = false`",
    ))
}

/// The variables that differ between forked processes are sent in one record.
fn forked_variables(
    environment: &[(String, String)],
    keys: &Spanned<SpawnKeys>,
    (pool, processes): (&str, u32),
) -> Checked<()> {
    let name = format!("{pool}-{processes}");
    let place = Place { number: processes, name: &name, pool, address: None, fd: None };
    let own = environment.iter().filter(|(_, value)| depends_on_process(value));
    let fork = Fork {
        id: 0,
        name: name.clone(),
        token: Token([0; 16]),
        variables: own.map(|(name, value)| (name.clone(), expand(value, place))).collect(),
    };
    let longest =
        fork.variables.iter().map(|(name, value)| name.len() + value.len() + 1).max().unwrap_or(0);
    let mut record = Vec::new();
    fork.encode(&mut record);
    if record.len() <= MAX_PREFORK_RECORD && longest <= usize::from(u16::MAX) {
        return Ok(());
    }
    let message =
        "the values of `environment` with `{n}` or `{name}` are too long for `fork = true`";
    Err(Mistake::new(keys.span(), message).help(
        "together they have at most 65000 bytes; values without these placeholders do not count",
    ))
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
        let known = placeholder::known(check, value);
        check.keep(known);
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
            .help("the variable tells the worker where to join, and with which name"));
    }
    if NOT_INHERITED.contains(&name.get_ref().as_str()) {
        let message = format!("`{}` cannot be set here", name.get_ref());
        return Err(Mistake::new(name.span(), message)
            .help("the service manager sets it for the dispatcher; processes start without it"));
    }
    // Includes the equals sign and the terminating zero.
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
            .help("the file contains the bytes that a client gets when there is no worker")
    };
    // Non-blocking: opening a pipe without a writer would block.
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
        .help("it must fit into the client's socket buffer"));
    }
    Ok(bytes)
}
