//! Starts one process: its program and environment, and what the child sets before it runs the
//! program.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::Stdio;

use nix::unistd::Pid;
use rustix::process::{Gid, Resource, Rlimit, Signal, Uid};
use tokio::process::Child;

use super::output::{LastOutput, Pipes, Reading, Source};
use super::{Listeners, SpawnRequest};
use crate::config::{
    Limit, NOT_INHERITED, OnDispatcherLoss, Output, Place, UNLIMITED, depends_on_process, expand,
};
use crate::sys::{self, ChildSetup, Step};

/// A process that runs.
pub(super) struct Started {
    pub(super) child: Child,
    pub(super) pid: Pid,
    /// Its output, if that goes to the log. To be dropped at the end of the process.
    pub(super) output: Option<Reading>,
}

/// Starts the process as the leader of a process group of its own. It writes its process id to
/// `journal` before it runs the program. With `prefork`, the channel for its orders, it forks
/// workers and is none itself: it has no name and no token.
///
/// # Errors
///
/// What failed.
pub(super) fn start(
    request: &SpawnRequest,
    last: &LastOutput,
    journal: Option<BorrowedFd<'_>>,
    prefork: Option<BorrowedFd<'_>>,
) -> Result<Started, String> {
    let number = request.process.place.saturating_add(1);
    // A process that forks others cannot be the one that listens.
    let listeners =
        if prefork.is_some() { Listeners::default() } else { request.listeners.clone() };
    let place = Place {
        number,
        name: &request.name,
        pool: &request.pool,
        address: request.address,
        fd: listeners.first(),
    };
    let words: Vec<String> = request.command.iter().map(|word| expand(word, place)).collect();
    let (program, arguments) = words.split_first().ok_or("no command")?;
    let directory = request.directory.as_ref().map(|directory| expand(directory, place));
    let mut command = tokio::process::Command::new(program);
    let account = request.setup.account.as_ref();
    for (name, value) in account.into_iter().flat_map(|account| &account.variables) {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let environment = request.environment.iter();
    let environment =
        environment.filter(|(_, value)| prefork.is_none() || !depends_on_process(value));
    command
        .args(arguments)
        .envs(environment.map(|(name, value)| (name, expand(value, place))))
        .env("DISPATCH_SOCKET", &request.dispatch_socket)
        .env("DISPATCH_POOL", &request.pool)
        .env("DISPATCH_NAME", &request.name)
        .env("DISPATCH_TOKEN", request.token.to_string())
        .env("DISPATCH_ON_LOSS", request.on_dispatcher_loss.name())
        .stdin(Stdio::null())
        // A process group of its own: Ctrl-C at a terminal reaches only the dispatcher, which then
        // stops its processes in order.
        .process_group(0);
    for name in NOT_INHERITED {
        command.env_remove(name);
    }
    if !listeners.is_empty() {
        command.env("LISTEN_FDS", listeners.len().to_string());
        command.env("LISTEN_FDNAMES", listeners.names());
    }
    match prefork {
        None => command.env_remove("DISPATCH_PREFORK_FD"),
        Some(channel) => {
            sys::pass_descriptor(command.as_std_mut(), channel.as_raw_fd());
            command
                .env_remove("DISPATCH_NAME")
                .env_remove("DISPATCH_TOKEN")
                .env("DISPATCH_PREFORK_FD", channel.as_raw_fd().to_string())
        }
    };
    let pipes = match request.setup.output {
        Output::Inherit => None,
        Output::Log => {
            let outlive = request.on_dispatcher_loss != OnDispatcherLoss::Stop;
            let (pipes, [stdout, stderr]) = Pipes::new(account, outlive)
                .map_err(|error| format!("no pipe for the output of {program}: {error}"))?;
            command.stdout(stdout).stderr(stderr);
            Some(pipes)
        }
    };
    let setup = child_setup(request, directory.as_deref())?;
    let kept =
        (!listeners.is_empty()).then(|| sys::keep_numbers(command.as_std_mut(), listeners.len()));
    sys::start_with_default_signals(command.as_std_mut());
    if let Some(journal) = journal {
        let line = format!("pid {} ", request.token).into_bytes();
        sys::start_with_recorded_id(command.as_std_mut(), journal.as_raw_fd(), line);
    }
    sys::set_up_child(command.as_std_mut(), setup);
    // Processes are started on a thread that lasts as long as the dispatcher.
    if prefork.is_some() {
        // Until it serves its channel, it would not notice the end of the dispatcher.
        sys::end_with_this_thread(command.as_std_mut(), Signal::KILL);
    } else if (request.address.is_some() || !listeners.is_empty())
        && request.on_dispatcher_loss != OnDispatcherLoss::Serve
    {
        // It knows nothing of the dispatcher.
        sys::end_with_this_thread(command.as_std_mut(), Signal::TERM);
    }
    let inherits = kept.map_or(Ok(()), |kept| {
        sys::run_with_descriptors(command.as_std_mut(), &listeners.descriptors(), kept)
    });
    let child = inherits
        .and_then(|()| command.spawn())
        .map_err(|error| explain(&error, request, (program, directory.as_deref())))?;
    let pid = child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .ok_or_else(|| format!("{program}: no process id"))?;
    let source = || Source {
        pool: request.pool.clone(),
        name: request.name.clone(),
        pid,
        rate: request.setup.output_rate,
    };
    let output = pipes.map(|pipes| pipes.read(source(), request.process, last));
    Ok(Started { child, pid: Pid::from_raw(pid), output })
}

fn child_setup(request: &SpawnRequest, directory: Option<&str>) -> Result<ChildSetup, String> {
    let setup = &request.setup;
    let files = open_files(request);
    let limits = [
        (Step::OpenFiles, Resource::Nofile, files),
        (Step::Core, Resource::Core, setup.limits.core),
        (Step::Memory, Resource::As, setup.limits.memory),
    ];
    let account = setup.account.as_ref();
    let directory = directory.map(CString::new).transpose();
    Ok(ChildSetup {
        umask: setup.umask,
        limits: limits
            .into_iter()
            .filter_map(|(step, resource, limit)| Some((step, resource, rlimit(limit?))))
            .collect(),
        groups: account
            .and_then(|account| account.groups.as_ref())
            .map(|groups| groups.iter().map(|&group| Gid::from_raw(group)).collect()),
        gid: account.map(|account| Gid::from_raw(account.gid)),
        uid: account.map(|account| Uid::from_raw(account.uid)),
        directory: directory.map_err(|_| "the directory has a zero byte in its name")?,
    })
}

fn open_files(request: &SpawnRequest) -> Option<Limit> {
    let of_start = request.descriptors.map(|(soft, hard)| Limit { soft, hard });
    request.setup.limits.open_files.or(of_start)
}

fn rlimit(limit: Limit) -> Rlimit {
    let value = |value| (value != UNLIMITED).then_some(value);
    Rlimit { current: value(limit.soft), maximum: value(limit.hard) }
}

/// What failed: a step of the child, or the program itself.
fn explain(
    error: &io::Error,
    request: &SpawnRequest,
    (program, directory): (&str, Option<&str>),
) -> String {
    let limits = &request.setup.limits;
    let account = request.setup.account.as_ref();
    let user =
        account.map_or_else(String::new, |account| format!(" as user {}", account.user_text));
    let shown = |limit: Option<Limit>| limit.map_or_else(String::new, |limit| limit.to_string());
    let Some((step, error)) = sys::failed_step(error) else {
        return format!("{program}{user}: {error}");
    };
    let what = match step {
        Step::OpenFiles => {
            format!("set the limit of open files to {}", shown(open_files(request)))
        }
        Step::Core => format!("set the limit of core files to {}", shown(limits.core)),
        Step::Memory => format!("set the limit of memory to {}", shown(limits.memory)),
        Step::Groups => {
            let groups = account.and_then(|account| account.groups.as_ref());
            let groups: Vec<String> = groups.into_iter().flatten().map(u32::to_string).collect();
            format!("set the groups {}", groups.join(", "))
        }
        Step::Group => {
            format!("become group {}", account.map_or("", |account| &account.group_text))
        }
        Step::User => format!("become user {}", account.map_or("", |account| &account.user_text)),
        Step::Capabilities => format!("drop the capabilities{user}"),
        Step::Directory => {
            format!("enter the directory {}{user}", directory.unwrap_or_default())
        }
    };
    format!("cannot {what}: {error}")
}
