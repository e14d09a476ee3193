//! `dispatcher status`: prints the status as a table or as JSON.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;

use super::admin::AdminEndpoint;
use super::drain::host_line;
pub(super) use super::table::{Table, clean};
use super::table::{count, width, wrap};
use super::{AdminArgs, Failure, admin, pause, print, print_while_read};
use crate::api::status::{FaultStatus, PoolStatus, Status};

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher status
  dispatcher status --watch                 again every 2 s, until Ctrl-C
  dispatcher status --watch 500ms --json    one line each time
  dispatcher status --faults 50             more of the last faults
  dispatcher status --json | jq '.pools[].workers[].load'
  dispatcher status --admin /tmp/admin.sock";

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Print the status as JSON.
    #[arg(long)]
    pub(super) json: bool,
    /// Repeat at this interval.
    #[arg(long, value_name = "DURATION", num_args = 0..=1, default_missing_value = "2s",
          value_parser = humantime::parse_duration)]
    watch: Option<Duration>,
    /// Show this many of the last faults.
    #[arg(long, value_name = "N", default_value_t = 5)]
    faults: usize,
}

pub(super) fn status(arguments: &StatusArgs) -> Result<(), Failure> {
    let endpoint = admin::find(&arguments.admin)?;
    let Some(pace) = arguments.watch else {
        return print(&once(&endpoint, arguments)?);
    };
    // A shorter interval would load the dispatcher without a benefit for a reader.
    let pace = pace.max(Duration::from_millis(100));
    let terminal = std::io::stdout().is_terminal();
    loop {
        let text = once(&endpoint, arguments)?;
        let text = match (arguments.json, terminal) {
            (true, _) => text,
            // Overwrite the screen from the top, clear the rest of each line, and clear the lines
            // below. This avoids flicker.
            (false, true) => format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")),
            (false, false) => text + "\n",
        };
        if !(print_while_read(&text)? && pause(pace)) {
            // Stdout has no reader any more.
            return Ok(());
        }
    }
}

fn once(endpoint: &AdminEndpoint, arguments: &StatusArgs) -> Result<String, Failure> {
    let body = admin::get(endpoint, "/v1/status")?;
    if arguments.json {
        // The original bytes keep fields that a newer dispatcher has added.
        let mut text = String::from_utf8_lossy(&body).into_owned();
        text.push('\n');
        return Ok(text);
    }
    let status: Status = admin::parse(&body, endpoint)?;
    Ok(table(&status, arguments.faults, width()))
}

/// The whole status in lines of at most `width` characters, with the last `faults` faults.
pub(super) fn table(status: &Status, faults: usize, width: usize) -> String {
    let mut text = format!(
        "dispatcher {}  pid {}  instance {}  up {}{}\n{}\n",
        clean(&status.version),
        status.pid,
        clean(&status.instance),
        humantime::format_duration(Duration::from_secs(status.uptime_seconds)),
        if status.stopping { "  stopping" } else { "" },
        status.draining.as_ref().map_or_else(String::new, |host| host_line(host) + "\n"),
    );
    let mut totals = Table::new(&["ACCEPTED", "QUEUED", "INFLIGHT", "TAKEN", "CLOSED"], 0);
    totals.row([
        status.accepted.to_string(),
        status.queued.to_string(),
        status.in_flight.to_string(),
        status.taken.to_string(),
        status.closed.values().sum::<u64>().to_string(),
    ]);
    totals.show(&mut text, width);
    // Writing to a string cannot fail.
    for (reason, count) in status.closed.iter().filter(|(_, count)| **count > 0) {
        let _ = writeln!(text, "closed {}: {count}", clean(reason));
    }
    for file in &status.socket_files_missing {
        let line = format!(
            "socket file missing: {} {} (dispatcher reload creates it again)",
            file.socket, file.path
        );
        text.push_str(&wrap(&clean(&line), "", width));
    }
    if let Some(line) = &status.line {
        let loads = match &line.reason {
            Some(reason) => format!("loads by count, because of: {reason}"),
            None => "loads exact".to_owned(),
        };
        text.push_str(&wrap(&clean(&format!("line protocol: {loads}")), "", width));
    }
    if let Some(advice) = &status.advice {
        text.push_str(&super::advice::summary(advice));
    }
    if let Some(relay) = &status.relay {
        text.push_str(&wrap(&clean(&super::relay::summary(relay)), "", width));
    }
    if status.meters.log_lines_dropped > 0 {
        let _ = writeln!(text, "log lines dropped: {}", status.meters.log_lines_dropped);
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
    listeners.show(&mut text, width);
    for listener in &status.listeners {
        let Some(headers) = &listener.proxy_headers else { continue };
        let from = match headers.from.is_empty() {
            true => String::new(),
            false => format!(" from {}", headers.from.join(", ")),
        };
        let line = format!(
            "PROXY headers of {}{from}: {} read, {} awaited",
            listener.name, headers.read, headers.awaited
        );
        text.push_str(&wrap(&clean(&line), "", width));
    }

    let mut pools = Table::new(&["POOL", "POLICY", "STATE", "WORKERS", "LOAD", "QUEUED"], 3);
    for pool in &status.pools {
        pools.row([
            clean(&pool.name),
            clean(&pool.policy),
            clean(&pool.state),
            pool.workers.len().to_string(),
            pool.workers.iter().map(|w| w.load).sum::<u64>().to_string(),
            pool.queued.to_string(),
        ]);
    }
    text.push('\n');
    pools.show(&mut text, width);
    for pool in &status.pools {
        let Some(agent) = &pool.agent else { continue };
        let line =
            format!("agent of {} at {}: {}", pool.name, agent.listen.join(", "), agent.answer);
        text.push_str(&wrap(&clean(&line), "", width));
    }
    for pool in &status.pools {
        let Some(processes) = &pool.processes else { continue };
        let changes = match processes.changes() {
            changes if changes.is_empty() => changes,
            changes => format!(", {changes}"),
        };
        let line = format!(
            "processes of {}: {} wanted, {} active{changes}",
            pool.name, processes.wanted, processes.active
        );
        text.push_str(&wrap(&clean(&line), "", width));
    }

    for pool in &status.pools {
        for line in steering(pool) {
            text.push_str(&wrap(&clean(&line), "", width));
        }
    }

    let mut workers = Table::new(
        &[
            "POOL", "WORKER", "STATE", "ID", "PID", "WEIGHT", "LOAD", "MAX", "SENT", "TAKEN",
            "FINISHED", "INFLIGHT", "REVOKED",
        ],
        3,
    )
    .optional(&[&["SENT", "FINISHED", "REVOKED"], &["MAX"], &["TAKEN"]]);
    for pool in &status.pools {
        for worker in &pool.workers {
            workers.row([
                clean(&pool.name),
                clean(&worker.name),
                clean(&worker.shown_kind()),
                worker.id.to_string(),
                worker.shown_pid(),
                worker.weight.to_string(),
                worker.shown_load(),
                worker.max_connections.to_string(),
                worker.sent.to_string(),
                worker.taken.to_string(),
                worker.finished.to_string(),
                worker.in_flight.to_string(),
                worker.revoked.to_string(),
            ]);
        }
    }
    text.push('\n');
    if workers.is_empty() {
        text.push_str("no workers\n");
    } else {
        workers.show(&mut text, width);
    }
    last_faults(&mut text, &status.faults, faults, width);
    text
}

/// What the kernel says of a steered pool.
fn steering(pool: &PoolStatus) -> Vec<String> {
    let (name, Some(steer)) = (&pool.name, &pool.steer) else { return Vec::new() };
    if let Some(error) = &steer.hashed {
        let mut lines = vec![format!("steering of {name}: {}: {error}", steer.state())];
        let workers = pool.workers.iter();
        lines.extend(workers.filter_map(|worker| {
            let why = worker.steer.as_ref()?.not_counted.as_ref()?;
            Some(format!("not counted: {name}/{}: {why}", worker.name))
        }));
        lines.extend(steer.error.iter().map(|it| format!("steering of {name} fails: {it}")));
        return lines;
    }
    let mut parts = vec![
        steer.state().to_owned(),
        format!("{} chosen", count(steer.chosen, "connection")),
        format!("{} dropped (workers full)", count(steer.dropped_full, "SYN")),
    ];
    if steer.dropped_no_worker > 0 {
        parts.push(format!("{} dropped (no worker)", count(steer.dropped_no_worker, "SYN")));
    }
    parts.push(format!("{} refused", steer.refused));
    if steer.failed > 0 {
        parts.push(format!("{} failed", steer.failed));
    }
    let mut lines = vec![format!("steering of {name}: {}", parts.join(", "))];
    lines.extend(steer.error.iter().map(|error| format!("steering of {name} fails: {error}")));
    let unpinned = steer.not_pinned.iter();
    lines.extend(unpinned.map(|why| format!("steering of {name} ends with the dispatcher: {why}")));
    let not_steered = steer.not_steered.iter();
    lines.extend(
        not_steered.map(|it| format!("not steered: {} at {}: {}", it.name, it.address, it.problem)),
    );
    lines
}

/// The newest fault is last, as in a log.
fn last_faults(text: &mut String, all: &[FaultStatus], most: usize, width: usize) {
    let shown = &all[all.len().saturating_sub(most)..];
    if shown.is_empty() {
        return;
    }
    // Writing to a string cannot fail.
    let _ = match all.len() {
        number if number == shown.len() => writeln!(text, "\nlast faults"),
        number => writeln!(text, "\nlast faults ({} of {number})", shown.len()),
    };
    for fault in shown {
        let time = fault.time.split('.').next().unwrap_or_default().replacen('T', " ", 1);
        let often = match fault.count {
            0 | 1 => String::new(),
            times => format!(" {}", count(times, "time")),
        };
        let ongoing = if fault.ongoing { ", ongoing" } else { "" };
        let head = format!("{time}Z {} {}{often}{ongoing}", fault.kind, fault.subject);
        text.push_str(&wrap(&clean(&head), "", width));
        text.push_str(&wrap(&clean(&fault.text), "    ", width));
    }
}
