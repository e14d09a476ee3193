//! Shell completion: commands, options, and the names of workers and pools of the running
//! dispatcher.
//!
//! The script that `dispatcher completions` prints runs the program with [`VARIABLE`] set and with
//! the words of the command line after `--`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use clap_complete::engine::CompletionCandidate;
use clap_complete::env::Shells;

use super::table::{clean, count};
use super::{AdminArgs, Exit, admin, manual, print};
use crate::admin::client;
use crate::api::status::{Status, WorkerStatus};

/// Set to the name of the shell that requests completions.
pub(super) const VARIABLE: &str = "_DISPATCHER_COMPLETE";

/// Longest wait for the dispatcher: completion must not block the shell.
const PATIENCE: Duration = Duration::from_millis(700);

/// Prints completions for a shell.
pub(super) fn complete(shell: &OsStr, arguments: Vec<OsString>) -> Exit {
    let words = words(arguments);
    let shells = Shells::builtins();
    let Some(shell) = shells.completer(&shell.to_string_lossy()).filter(|_| !words.is_empty())
    else {
        return Exit::Usage;
    };
    let mut bytes = Vec::new();
    let here = std::env::current_dir().ok();
    let done = shell.write_complete(&mut manual::visible(), words, here.as_deref(), &mut bytes);
    match done.map(|()| print(&String::from_utf8_lossy(&bytes))) {
        Ok(Ok(())) => Exit::Ok,
        Ok(Err(_)) | Err(_) => Exit::IoErr,
    }
}

/// The words of the command line to complete.
fn words(arguments: Vec<OsString>) -> Vec<OsString> {
    let mut arguments = arguments.into_iter();
    arguments.by_ref().find(|argument| argument == "--");
    arguments.collect()
}

/// `POOL/NAME` of every worker. A worker whose name is not plain or not unique is offered by its
/// id.
pub(super) fn workers() -> Vec<CompletionCandidate> {
    let Some(status) = ask() else { return Vec::new() };
    let all: Vec<(String, &WorkerStatus)> = status
        .pools
        .iter()
        .flat_map(|pool| pool.workers.iter().map(|w| (format!("{}/{}", pool.name, w.name), w)))
        .collect();
    let offered = all.iter().map(|(name, worker)| {
        let alone = all.iter().filter(|(other, _)| other == name).count() == 1;
        let (load, state) = (count(worker.load, "connection"), &worker.state);
        if alone && is_plain(name) {
            CompletionCandidate::new(name)
                .help(Some(format!("id {}, {state}, {load}", worker.id).into()))
        } else {
            CompletionCandidate::new(worker.id.to_string())
                .help(Some(format!("{}, {state}, {load}", clean(name)).into()))
        }
    });
    offered.collect()
}

/// Pools, and then workers.
pub(super) fn pools_and_workers() -> Vec<CompletionCandidate> {
    let mut all = pools();
    all.extend(workers());
    all
}

/// The names of all pools.
pub(super) fn pools() -> Vec<CompletionCandidate> {
    let Some(status) = ask() else { return Vec::new() };
    let plain = status.pools.iter().filter(|pool| is_plain(&pool.name));
    let offered = plain.map(|pool| {
        let workers = count(pool.workers.len() as u64, "worker");
        let help = format!("{}, {}, {workers}", pool.policy, pool.state);
        CompletionCandidate::new(&pool.name).help(Some(help.into()))
    });
    offered.collect()
}

/// All log levels.
pub(super) fn levels() -> Vec<CompletionCandidate> {
    ["off", "error", "warn", "info", "debug", "trace"].map(CompletionCandidate::new).into()
}

/// Whether a worker's name has no character with a meaning in a shell. Workers choose their names,
/// and the shell inserts them into a command line.
fn is_plain(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-+@%,".contains(&byte))
        && !name.starts_with('-')
}

/// The status of the dispatcher that the command line refers to; `None` if the dispatcher does not
/// answer at once.
fn ask() -> Option<Status> {
    let words = words(std::env::args_os().collect());
    let endpoint = admin::find(&endpoint(&words)).ok()?;
    let body = client::get(&endpoint.path, "/v1/status", PATIENCE).ok()?;
    serde_json::from_slice(&body).ok()
}

/// The values of `--admin` and `--config` in these words.
fn endpoint(words: &[OsString]) -> AdminArgs {
    let value = |option: &str| -> Option<PathBuf> {
        words.iter().enumerate().find_map(|(position, word)| {
            let word = word.to_str()?;
            if word == option {
                return words.get(position + 1).map(PathBuf::from);
            }
            word.strip_prefix(option)?.strip_prefix('=').map(PathBuf::from)
        })
    };
    AdminArgs { admin: value("--admin"), config: value("--config") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completion_uses_the_options_of_the_command_line() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let found = endpoint(&words("dispatcher drain --admin /a --config=/b w"));
        assert_eq!((found.admin, found.config), (Some("/a".into()), Some("/b".into())));
        let found = endpoint(&words("dispatcher drain --admin"));
        assert_eq!((found.admin, found.config), (None, None));
    }

    #[test]
    fn completion_offers_only_plain_words() {
        for name in ["web/web-1", "a.b/c_d", "x/+@%,"] {
            assert!(is_plain(name), "{name}");
        }
        for name in ["web/$(x)", "web/a b", "a;b", "-x/y", "web/*", "a'b", "web/ü", "a:b", "a\nb"]
        {
            assert!(!is_plain(name), "{name}");
        }
    }
}
