//! What `top` says of the deploys of pools: rolls in progress or stopped, and former generations
//! that still have connections. Pools without any of these have no line.

use crate::api::status::{PoolStatus, ProcessesStatus, Status};
use crate::cli::table::{clean, count, wrap};

/// The generation of a pool whose processes the dispatcher starts.
pub(super) fn generation(pool: &PoolStatus) -> String {
    let processes = pool.processes.as_ref().filter(|processes| processes.generation > 0);
    processes.map_or_else(String::new, |processes| processes.generation.to_string())
}

/// What is not as usual among the processes of a pool, for its row: all but what [`lines`] say.
pub(super) fn changes(pool: &PoolStatus) -> String {
    let Some(processes) = &pool.processes else { return String::new() };
    let rest = ProcessesStatus { roll: None, restart_needed: false, ..processes.clone() };
    let changes = rest.changes();
    if changes.is_empty() { changes } else { changes + "  " }
}

/// A text for each roll that is not done, for settings that need a restart, and for each
/// generation that leaves, in lines of this width; with the name of the state that gives their
/// colour.
pub(super) fn lines(status: &Status, width: u16) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    for (state, text) in texts(status) {
        let wrapped = wrap(&text, "", usize::from(width));
        lines.extend(wrapped.lines().map(|line| (state, line.to_owned())));
    }
    lines
}

fn texts(status: &Status) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    for pool in &status.pools {
        let Some(processes) = &pool.processes else { continue };
        let name = clean(&pool.name);
        if let Some(roll) = processes.roll.as_ref().filter(|roll| roll.state != "done") {
            let what = match (roll.undo, roll.process) {
                (true, _) => "return".to_owned(),
                (false, Some(process)) => format!("roll of process {process}"),
                (false, None) => "roll".to_owned(),
            };
            let all = roll.replaced + roll.remaining;
            let mut text = format!(
                "{name}: {what} to generation {} {}, {} of {all} replaced",
                roll.generation,
                clean(&roll.state),
                roll.replaced
            );
            if let Some(reason) = &roll.reason {
                text.push_str(": ");
                text.push_str(&clean(reason));
            }
            let state = if roll.state == "stopped" { "stopped" } else { "draining" };
            lines.push((state, text));
        }
        if processes.restart_needed
            && processes.roll.as_ref().is_none_or(|roll| roll.state == "done")
        {
            let text = format!("{name}: changed settings need `dispatcher restart {name}`");
            lines.push(("draining", text));
        }
        for old in &processes.leaving_generations {
            let connections = count(old.connections, "connection");
            let workers = count(old.processes.into(), "worker");
            let text =
                format!("{name}: generation {} leaves: {connections} at {workers}", old.generation);
            lines.push(("draining", text));
        }
    }
    lines
}
