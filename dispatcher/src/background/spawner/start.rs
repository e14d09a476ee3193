//! Starts one process: its program, environment, and what the child sets before it runs the program.

use std::process::Stdio;

use nix::unistd::Pid;
use tokio::process::Child;

use super::SpawnRequest;
use crate::config::NOT_INHERITED;
use crate::sys;

/// Starts the process as the leader of a process group of its own.
///
/// # Errors
///
/// What failed, with the program's name.
pub(super) fn start(request: &SpawnRequest) -> Result<(Child, Pid), String> {
    let (program, arguments) = request.command.split_first().ok_or("no command")?;
    let mut command = tokio::process::Command::new(program);
    command
        .args(arguments)
        .envs(request.environment.iter().map(|(name, value)| (name, value)))
        .env("DISPATCH_SOCKET", &request.dispatch_socket)
        .env("DISPATCH_POOL", &request.pool)
        .env("DISPATCH_NAME", &request.name)
        .env("DISPATCH_TOKEN", request.token.to_string())
        .stdin(Stdio::null())
        // A process group of its own: Ctrl-C at a terminal reaches only the dispatcher, which then
        // stops its processes in order.
        .process_group(0);
    for name in NOT_INHERITED {
        command.env_remove(name);
    }
    if let Some(directory) = &request.directory {
        command.current_dir(directory);
    }
    sys::start_with_default_signals(command.as_std_mut());
    if let Some((soft, hard)) = request.descriptors {
        sys::start_with_descriptor_limit(command.as_std_mut(), soft, hard);
    }
    let child = command.spawn().map_err(|error| match &request.directory {
        // The error does not say which of the two paths is wrong: name both.
        Some(directory) if !directory.is_dir() => {
            format!("{program} in {}: {error}", directory.display())
        }
        _ => format!("{program}: {error}"),
    })?;
    let pid = child
        .id()
        .and_then(|pid| i32::try_from(pid).ok())
        .ok_or_else(|| format!("{program}: no process id"))?;
    Ok((child, Pid::from_raw(pid)))
}
