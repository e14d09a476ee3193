//! `dispatcher reload`: the running dispatcher reads its configuration again.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;

use super::admin::AdminEndpoint;
use super::wait::SlowNotice;
use super::{AdminArgs, Exit, Failure, admin, print, print_error, print_json, restart, status};
use crate::api::action::PoolRestarted;
use crate::api::reload::{ReloadRequest, Reloaded};

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher check && dispatcher reload      check the file, then reload it
  dispatcher reload --restart                also replace the processes whose settings have changed
  dispatcher reload --json | jq .needs_restart

The command returns when the new configuration is in force or has been refused. After a refusal nothing has changed, the
mistake is shown as by `dispatcher check`, and the exit code is 78. `systemctl reload dispatcher` and SIGHUP do the same;
the result is also in the log. The dispatcher reads the file that it was started with.

Some keys need a restart: dispatch_socket, admin_socket, admin_http, advice_listen, and the keys that decide how a listener is bound
(ipv6_only, reuse_port, free_bind). If they differ, the command lists them; all other changes are in force. The
dispatcher still listens on its old admin socket: set its path with --admin PATH or DISPATCHER_ADMIN.";

/// Name services and slow disks may delay a reload.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct ReloadArgs {
    /// Also replace the processes of pools whose command or other settings of [pool.NAME.spawn]
    /// have changed: `dispatcher restart` for each of them.
    #[arg(long)]
    restart: bool,
    /// Print the answer as JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn reload(arguments: &ReloadArgs) -> Result<(), Failure> {
    let (answer, endpoint) = ask(&arguments.admin)?;
    let outdated = answer.outdated_pools.iter().filter(|_| arguments.restart);
    let restarted: Result<Vec<PoolRestarted>, Failure> =
        outdated.map(|pool| restart::pool(&endpoint, pool)).collect();
    if arguments.json {
        print_json(&answer)?;
        return restarted.map(drop);
    }
    for warning in texts(&answer.warnings) {
        print_error(&warning);
    }
    print(&summary(&answer, arguments.restart))?;
    for restarted in restarted? {
        print(&restart::summary(&restarted))?;
    }
    Ok(())
}

fn ask(arguments: &AdminArgs) -> Result<(Reloaded, AdminEndpoint), Failure> {
    let _notice = SlowNotice::new("waiting for the dispatcher to read its configuration …");
    let endpoints = admin::endpoints(arguments)?;
    let mut first = None;
    for endpoint in &endpoints {
        match admin::post_within(endpoint, "/v1/reload", &ReloadRequest {}, PATIENCE) {
            Err(failure) if failure.exit == Exit::Unavailable => {
                first.get_or_insert(failure);
            }
            answer => return answer.map(|answer| (answer, endpoint.clone())),
        }
    }
    let mut failure = first.unwrap_or_else(|| {
        Failure::new(Exit::Unavailable, "there is no admin socket to connect to")
    });
    if endpoints.iter().any(AdminEndpoint::is_from_file) {
        failure.message += MOVED;
    }
    Err(failure)
}

/// A running dispatcher listens at the path that the file had when the dispatcher was started.
const MOVED: &str = "\nhelp: if admin_socket in the file has changed since the dispatcher was started, set the old path with --admin PATH";

fn texts(list: &[String]) -> impl Iterator<Item = String> + '_ {
    // `clean` would replace the ends of the lines.
    list.iter().map(|text| text.lines().map(status::clean).collect::<Vec<_>>().join("\n"))
}

fn summary(answer: &Reloaded, restarts: bool) -> String {
    let mut text = format!("{}: in force\n", status::clean(&answer.file));
    let mut quiet = true;
    for (names, word) in
        [(&answer.added, "new"), (&answer.removed, "gone"), (&answer.changed, "changed")]
    {
        for name in texts(names) {
            quiet = false;
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{word}: {name}");
        }
    }
    if quiet {
        text.push_str("nothing has changed\n");
    }
    for what in texts(&answer.needs_restart) {
        let _ = writeln!(text, "needs a restart, not changed: {what}");
    }
    if !restarts {
        for pool in texts(&answer.outdated_pools) {
            let _ = writeln!(
                text,
                "pool {pool}: its processes have the former settings until `dispatcher restart {pool}`"
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reload_summary_has_a_line_per_change() {
        let answer = Reloaded {
            file: "/etc/d.toml".to_owned(),
            added: vec!["pool b".to_owned(), "listener b".to_owned()],
            changed: vec!["limits".to_owned()],
            needs_restart: vec!["admin_http".to_owned()],
            outdated_pools: vec!["web".to_owned()],
            ..Reloaded::default()
        };
        assert!(!summary(&answer, true).contains("web"), "they are being replaced");
        assert_eq!(
            summary(&answer, false),
            "/etc/d.toml: in force\nnew: pool b\nnew: listener b\nchanged: limits\n\
             needs a restart, not changed: admin_http\n\
             pool web: its processes have the former settings until `dispatcher restart web`\n"
        );
        let nothing = Reloaded { file: "f".to_owned(), ..Reloaded::default() };
        assert_eq!(summary(&nothing, true), "f: in force\nnothing has changed\n");
    }
}
