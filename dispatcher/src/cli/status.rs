//! `dispatcher status`: the JSON as it came, or a table for people.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;

use super::admin::Place;
use super::{AdminArgs, Failure, admin, feed, print, rest};
use crate::status::Status;

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher status
  dispatcher status --watch                 again every 2 s, until Ctrl-C
  dispatcher status --watch 500ms --json    one line each time
  dispatcher status --json | jq '.pools[].workers[].load'
  dispatcher status --admin /tmp/admin.sock";

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// The status as JSON.
    #[arg(long)]
    pub(super) json: bool,
    /// Show it again and again, this often.
    #[arg(long, value_name = "DURATION", num_args = 0..=1, default_missing_value = "2s",
          value_parser = humantime::parse_duration)]
    watch: Option<Duration>,
}

pub(super) fn status(arguments: &StatusArgs) -> Result<(), Failure> {
    let place = admin::find(&arguments.admin)?;
    let Some(pace) = arguments.watch else {
        return print(&once(&place, arguments.json)?);
    };
    // Shorter would only ask the dispatcher for what nobody can read.
    let pace = pace.max(Duration::from_millis(100));
    let terminal = std::io::stdout().is_terminal();
    loop {
        let text = once(&place, arguments.json)?;
        let text = match (arguments.json, terminal) {
            (true, _) => text,
            // From the top, each line to its end, and nothing of the last one below.
            (false, true) => format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")),
            (false, false) => text + "\n",
        };
        if !(feed(&text)? && rest(pace)) {
            // The reader has seen enough.
            return Ok(());
        }
    }
}

fn once(place: &Place, json: bool) -> Result<String, Failure> {
    let body = admin::get(place, "/v1/status")?;
    if json {
        // As it came, so that what a newer dispatcher adds is not lost.
        let mut text = String::from_utf8_lossy(&body).into_owned();
        text.push('\n');
        return Ok(text);
    }
    let status: Status = admin::parse(&body, place)?;
    Ok(table(&status))
}

pub(super) fn table(status: &Status) -> String {
    let mut text = format!(
        "dispatcher {}  pid {}  instance {}  up {}{}\n\n",
        clean(&status.version),
        status.pid,
        clean(&status.instance),
        humantime::format_duration(Duration::from_secs(status.uptime_seconds)),
        if status.stopping { "  stopping" } else { "" },
    );
    let mut totals = Table::new(&["ACCEPTED", "HELD", "CUSTODY", "TAKEN", "CLOSED"], 0);
    totals.row([
        status.accepted.to_string(),
        status.held.to_string(),
        status.custody.to_string(),
        status.taken.to_string(),
        status.closed.values().sum::<u64>().to_string(),
    ]);
    totals.show(&mut text);
    // Writing to a string cannot fail.
    for (reason, count) in status.closed.iter().filter(|(_, count)| **count > 0) {
        let _ = writeln!(text, "closed {}: {count}", clean(reason));
    }
    if status.meters.log_lines_dropped > 0 {
        let _ = writeln!(text, "log lines left out: {}", status.meters.log_lines_dropped);
    }

    let mut listeners = Table::new(&["LISTENER", "ADDRESS", "POOL", "STATE", "ACCEPTED"], 4);
    for listener in &status.listeners {
        listeners.row([
            clean(&listener.name),
            clean(&listener.address),
            clean(&listener.pool),
            clean(&listener.state),
            listener.accepted.to_string(),
        ]);
    }
    text.push('\n');
    listeners.show(&mut text);

    let mut pools = Table::new(&["POOL", "POLICY", "STATE", "WORKERS", "LOAD", "HELD"], 3);
    for pool in &status.pools {
        pools.row([
            clean(&pool.name),
            clean(&pool.policy),
            clean(&pool.state),
            pool.workers.len().to_string(),
            pool.workers.iter().map(|w| w.load).sum::<u64>().to_string(),
            pool.held.to_string(),
        ]);
    }
    text.push('\n');
    pools.show(&mut text);

    let mut workers = Table::new(
        &[
            "POOL", "WORKER", "STATE", "ID", "PID", "WEIGHT", "LOAD", "MAX", "SENT", "TAKEN",
            "FINISHED", "CUSTODY", "REVOKED",
        ],
        3,
    );
    for pool in &status.pools {
        for worker in &pool.workers {
            workers.row([
                clean(&pool.name),
                clean(&worker.name),
                clean(&worker.state),
                worker.id.to_string(),
                worker.pid.to_string(),
                worker.weight.to_string(),
                worker.load.to_string(),
                worker.max_connections.to_string(),
                worker.sent.to_string(),
                worker.taken.to_string(),
                worker.finished.to_string(),
                worker.custody.to_string(),
                worker.revoked.to_string(),
            ]);
        }
    }
    text.push('\n');
    if workers.rows.is_empty() {
        text.push_str("no workers\n");
    } else {
        workers.show(&mut text);
    }
    text
}

/// A worker names itself: its name must not move the cursor.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Columns wide enough for what is in them: the first `left` ones to the left, numbers to the right.
pub(super) struct Table<const N: usize> {
    head: [&'static str; N],
    left: usize,
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new(head: &[&'static str; N], left: usize) -> Table<N> {
        Table { head: *head, left, rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells);
    }

    pub(super) fn show(&self, text: &mut String) {
        let width = |column: usize| {
            self.rows
                .iter()
                .map(|row| row[column].chars().count())
                .chain([self.head[column].len()])
                .max()
                .unwrap_or(0)
        };
        let widths: [usize; N] = std::array::from_fn(width);
        let heads = self.head.map(str::to_owned);
        for row in std::iter::once(&heads).chain(&self.rows) {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let gap = if column == 0 { "" } else { "  " };
                let width = widths[column];
                let _ = if column < self.left {
                    write!(line, "{gap}{cell:<width$}")
                } else {
                    write!(line, "{gap}{cell:>width$}")
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
    }
}
