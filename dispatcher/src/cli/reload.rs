//! `dispatcher reload`: the running dispatcher reads its configuration again.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::wait::Patience;
use super::{AdminArgs, Exit, Failure, admin, complain, print, status};

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher check && dispatcher reload      look first, then put it into force
  dispatcher reload --json | jq .needs_restart

It returns once the new configuration is in force, or has been refused: then nothing has changed, the mistake is shown
as by `dispatcher check`, and the exit code is 78. `systemctl reload dispatcher` and SIGHUP do the same; what came of
it is in the log too. The file is the one the dispatcher was started with.

dispatch_socket, admin_socket and admin_http, and how a listener's address is bound (ipv6_only, reuse_port, free_bind),
stay as they are until a restart; if they differ it says so, and everything else is put into force. The dispatcher then
still listens on its old admin socket: --admin PATH or DISPATCHER_ADMIN name it.";

/// Name services and slow disks may take their time.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct ReloadArgs {
    /// The answer as JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn reload(arguments: &ReloadArgs) -> Result<(), Failure> {
    let answer = ask(&arguments.admin)?;
    if arguments.json {
        return print(&format!("{answer}\n"));
    }
    for warning in texts(&answer["warnings"]) {
        complain(&warning);
    }
    print(&summary(&answer))
}

fn ask(arguments: &AdminArgs) -> Result<Value, Failure> {
    let _patience = Patience::new("waiting for the dispatcher to read its configuration …");
    let places = admin::places(arguments)?;
    let mut first = None;
    for place in &places {
        match admin::post_within(place, "/v1/reload", &json!({}), PATIENCE) {
            Err(failure) if failure.exit == Exit::Unavailable => {
                first.get_or_insert(failure);
            }
            answer => return answer,
        }
    }
    let mut failure = first.unwrap_or_else(|| Failure::new(Exit::Unavailable, "nowhere to ask"));
    if places.iter().any(admin::Place::is_of_a_file) {
        failure.message += MOVED;
    }
    Err(failure)
}

/// A running dispatcher listens where the file said when it was started.
const MOVED: &str = "\nhelp: if admin_socket was changed in the file since it was started, give the old one with --admin PATH";

fn texts(list: &Value) -> impl Iterator<Item = String> + '_ {
    let texts = list.as_array().into_iter().flatten().filter_map(Value::as_str);
    // Lines stay lines.
    texts.map(|text| text.lines().map(status::clean).collect::<Vec<_>>().join("\n"))
}

fn summary(answer: &Value) -> String {
    let mut text = format!("{}: in force\n", status::clean(answer["file"].as_str().unwrap_or("?")));
    let mut quiet = true;
    for (key, word) in [("added", "new"), ("removed", "gone"), ("changed", "changed")] {
        for name in texts(&answer[key]) {
            quiet = false;
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{word}: {name}");
        }
    }
    if quiet {
        text.push_str("nothing has changed\n");
    }
    for what in texts(&answer["needs_restart"]) {
        let _ = writeln!(text, "needs a restart, and is as before: {what}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_said_line_by_line() {
        let answer = json!({
            "file": "/etc/d.toml", "added": ["pool b", "listener b"], "removed": [], "changed": ["limits"],
            "needs_restart": ["admin_http"], "warnings": [],
        });
        assert_eq!(
            summary(&answer),
            "/etc/d.toml: in force\nnew: pool b\nnew: listener b\nchanged: limits\n\
             needs a restart, and is as before: admin_http\n"
        );
        let nothing = json!({ "file": "f" });
        assert_eq!(summary(&nothing), "f: in force\nnothing has changed\n");
    }
}
