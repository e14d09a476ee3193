//! `dispatcher history` and `dispatcher explain`: past and next placement decisions with their
//! reasons.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::admin::{self, AdminEndpoint};
use super::table::{clean, count, cut, width};
use super::{AdminArgs, Failure, complete, pause, print, print_while_read};
use crate::api::decisions::{CandidateRecord, DecisionRecord, ExplainAnswer, HistoryAnswer};

pub(super) const HISTORY_EXAMPLES: &str = "\
Examples:
  dispatcher history web                  the last decisions of pool web
  dispatcher history web --follow         the same and all new ones, until Ctrl-C
  dispatcher history web --json | jq '.decisions[-1].candidates'

A pool keeps decisions only if the configuration sets their number: history = 100";

pub(super) const EXPLAIN_EXAMPLES: &str = "\
Examples:
  dispatcher explain web                        which worker gets the next connection of pool web?
  dispatcher explain web --from 192.0.2.7       from a client at this address
  dispatcher explain web --json | jq .chosen";

/// Names are not cut to fewer characters than this.
const SHORT_NAME: usize = 16;

/// Interval between two requests of `--follow`.
const FOLLOW: Duration = Duration::from_millis(250);

#[derive(Debug, Args)]
pub(super) struct HistoryArgs {
    /// The pool.
    #[arg(add = ArgValueCandidates::new(complete::pools))]
    pool: String,
    /// Print new decisions as they are made, until interrupted.
    #[arg(long)]
    follow: bool,
    /// Print JSON; with --follow, one decision per line.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// The pool.
    #[arg(add = ArgValueCandidates::new(complete::pools))]
    pool: String,
    /// The IP address of the client.
    #[arg(long, value_name = "IP")]
    from: Option<IpAddr>,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn history(arguments: &HistoryArgs) -> Result<(), Failure> {
    let endpoint = admin::find(&arguments.admin)?;
    let path = format!("/v1/pools/{}/history", admin::segment(&arguments.pool));
    if !arguments.follow {
        let body = admin::get(&endpoint, &path)?;
        if arguments.json {
            return print(&format!("{}\n", String::from_utf8_lossy(&body)));
        }
        return print(&past(&admin::parse(&body, &endpoint)?));
    }
    follow(&endpoint, &path, arguments.json)
}

/// Ends when it is interrupted, when stdout has no reader, or when the dispatcher ends.
fn follow(endpoint: &AdminEndpoint, path: &str, json: bool) -> Result<(), Failure> {
    let mut after = 0;
    // Decisions that were discarded before the first answer are not reported as missed.
    let mut first = true;
    loop {
        let body = admin::get(endpoint, &format!("{path}?after={after}"))?;
        let history: HistoryAnswer = admin::parse(&body, endpoint)?;
        if history.size == 0 || history.steered {
            return print(&past(&history));
        }
        for decided in &history.decisions {
            let number = decided.number.unwrap_or_default();
            let missed = number.saturating_sub(after + 1);
            let text = if json {
                serde_json::to_string(decided).unwrap_or_default() + "\n"
            } else if missed > 0 && !first {
                format!(
                    "({missed} were discarded before they could be read)\n{}",
                    decision(decided)
                )
            } else {
                decision(decided)
            };
            if !print_while_read(&text)? {
                return Ok(());
            }
            after = number;
            first = false;
        }
        if !pause(FOLLOW) {
            return Ok(());
        }
    }
}

fn past(history: &HistoryAnswer) -> String {
    if history.steered {
        return format!(
            "the kernel chooses the workers of pool {pool}, and keeps no decisions: \
             dispatcher explain {pool} says what it would choose next\n",
            pool = clean(&history.pool)
        );
    }
    if history.size == 0 {
        return format!(
            "pool {pool} keeps no decisions: set a number, such as history = 100, in [pool.{pool}]\n",
            pool = clean(&history.pool)
        );
    }
    if history.decisions.is_empty() {
        return "no decisions yet\n".to_owned();
    }
    history.decisions.iter().map(decision).collect()
}

/// One header line, then one line for each worker.
fn decision(decided: &DecisionRecord) -> String {
    let mut text = format!(
        "#{} {} {} from {}{}{} -> {}\n",
        decided.number.unwrap_or_default(),
        clean(&decided.at),
        clean(decided.listener.as_deref().unwrap_or("?")),
        clean(&decided.from),
        key(decided),
        if decided.resent { " (resent)" } else { "" },
        chosen(decided),
    );
    text.push_str(&candidates(decided, width()));
    text
}

fn key(decided: &DecisionRecord) -> String {
    decided.key.as_deref().map(|key| format!(" key {}", clean(key))).unwrap_or_default()
}

fn chosen(decided: &DecisionRecord) -> String {
    let worker = |c: &&CandidateRecord| Some(c.id) == decided.chosen;
    match decided.candidates.iter().find(worker) {
        Some(worker) => format!("worker {} ({})", worker.id, clean(&worker.name)),
        None => "no worker".to_owned(),
    }
}

fn candidates(decided: &DecisionRecord, line_width: usize) -> String {
    let name = |c: &CandidateRecord| format!("{} ({})", c.id, clean(&c.name));
    let rest = |c: &CandidateRecord| {
        let score = c.score.map_or_else(|| "-".to_owned(), |score| format!("{score:.2}"));
        format!(
            "load {:>5}  weight {:>6}  score {score:>8}  {}{}",
            c.load,
            weight(c.weight),
            clean(&c.why),
            c.gauge.as_ref().map(|gauge| format!(" ({})", clean(gauge))).unwrap_or_default()
        )
    };
    let longest = |text: &dyn Fn(&CandidateRecord) -> String| {
        decided.candidates.iter().map(|c| text(c).chars().count()).max().unwrap_or(0)
    };
    // Indentation and gap take six columns.
    let room = line_width.saturating_sub(longest(&rest) + 6).max(SHORT_NAME);
    let width = longest(&name).min(room);
    let mut text = String::new();
    for c in &decided.candidates {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "    {:width$}  {}", cut(&name(c), width), rest(c));
    }
    if decided.left_out > 0 {
        let _ = writeln!(text, "    and {}", count(decided.left_out as u64, "more worker"));
    }
    text
}

/// Fractions only while the weight grows during slow start.
fn weight(weight: f64) -> String {
    if weight.fract() == 0.0 { format!("{weight:.0}") } else { format!("{weight:.2}") }
}

pub(super) fn explain(arguments: &ExplainArgs) -> Result<(), Failure> {
    let endpoint = admin::find(&arguments.admin)?;
    let mut path = format!("/v1/pools/{}/explain", admin::segment(&arguments.pool));
    if let Some(from) = arguments.from {
        // An address has no characters with a meaning in a query.
        let _ = write!(path, "?from={from}");
    }
    let body = admin::get(&endpoint, &path)?;
    if arguments.json {
        return print(&format!("{}\n", String::from_utf8_lossy(&body)));
    }
    print(&next(&admin::parse(&body, &endpoint)?))
}

fn next(explained: &ExplainAnswer) -> String {
    let ExplainAnswer { pool, policy, steered, obstacle, decision } = explained;
    let again = "the client's kernel tries again";
    let mut text = match obstacle.as_deref() {
        None if *steered => format!("goes to {}, if the kernel counts the same", chosen(decision)),
        None => format!("goes to {}", chosen(decision)),
        Some("refusing") => {
            "is refused: there has been no usable worker for wait_for_worker".to_owned()
        }
        Some("stopping") => "is not accepted any more: the dispatcher is stopping".to_owned(),
        Some("no-worker") if *steered => format!("is dropped, and {again}: there is no worker"),
        Some("back-pressure") if *steered => {
            match decision.candidates.iter().any(|worker| worker.why == "suspect") {
                true => "goes to a suspect worker: no other has room".to_owned(),
                false => format!("is dropped, and {again}: no worker has room"),
            }
        }
        Some("no-worker") => "waits: there is no worker".to_owned(),
        Some("back-pressure") => "waits: no worker has room".to_owned(),
        Some("queue") => format!("waits in the queue, then goes to {}", chosen(decision)),
        Some(other) => format!("waits: {}", clean(other)),
    };
    text = format!(
        "the next connection of pool {}{} {text}, by {}\n",
        clean(pool),
        key(decision),
        clean(policy)
    );
    if *steered {
        text.push_str("(the kernel chooses: equal workers take turns, and counts are 0.1 s old)\n");
    }
    if policy == "hash" && decision.key.is_none() {
        text.push_str("(for a client without a key; --from IP sets the client)\n");
    }
    text.push_str(&candidates(decision, width()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn considered(id: u64, name: &str, score: Option<f64>, why: &str) -> CandidateRecord {
        let name = name.to_owned();
        CandidateRecord { id, name, load: 4, weight: 1.0, score, why: why.to_owned(), gauge: None }
    }

    fn decided() -> DecisionRecord {
        DecisionRecord {
            number: Some(12),
            at: "2026-01-02T03:04:05.678Z".to_owned(),
            connection: Some(99),
            listener: Some("http".to_owned()),
            from: "192.0.2.7:4711".to_owned(),
            key: Some("00000000000000ff".to_owned()),
            resent: true,
            chosen: Some(3),
            candidates: vec![
                considered(3, "web-1", Some(5.0), "chosen"),
                considered(10, "web\u{1b}2", None, "full"),
            ],
            left_out: 7,
        }
    }

    #[test]
    fn a_decision_has_a_header_and_a_line_per_worker() {
        assert_eq!(
            decision(&decided()),
            "#12 2026-01-02T03:04:05.678Z http from 192.0.2.7:4711 key 00000000000000ff (resent) -> worker 3 (web-1)\n    \
             3 (web-1)   load     4  weight      1  score     5.00  chosen\n    \
             10 (web\u{fffd}2)  load     4  weight      1  score        -  full\n    \
             and 7 more workers\n"
        );
    }

    #[test]
    fn an_empty_history_explains_the_setting() {
        let mut history = HistoryAnswer {
            pool: "web".to_owned(),
            policy: String::new(),
            steered: false,
            size: 0,
            decisions: vec![],
        };
        assert!(past(&history).contains("set a number, such as history = 100, in [pool.web]"));
        history.size = 5;
        assert_eq!(past(&history), "no decisions yet\n");
        history.steered = true;
        assert!(
            past(&history).starts_with("the kernel chooses the workers of pool web, and keeps")
        );
    }

    #[test]
    fn every_obstacle_is_a_sentence() {
        let mut explained = ExplainAnswer {
            pool: "web".to_owned(),
            policy: "hash".to_owned(),
            steered: false,
            obstacle: None,
            decision: decided(),
        };
        let head = |explained: &ExplainAnswer| next(explained).lines().next().map(str::to_owned);
        assert_eq!(
            head(&explained).as_deref(),
            Some(
                "the next connection of pool web key 00000000000000ff goes to worker 3 (web-1), by hash"
            )
        );
        explained.decision.key = None;
        assert!(next(&explained).contains("--from IP sets the client"));
        explained.obstacle = Some("back-pressure".to_owned());
        assert!(head(&explained).is_some_and(|head| head.contains("waits: no worker has room")));
        explained.obstacle = Some("short-of-resources".to_owned());
        assert!(head(&explained).is_some_and(|head| head.contains("waits: short-of-resources")));
        explained.steered = true;
        assert!(next(&explained).contains("(the kernel chooses: equal workers take turns"));
        for (obstacle, words) in [
            (None, "goes to worker 3 (web-1), if the kernel counts the same, by hash"),
            (Some("no-worker"), "is dropped, and the client's kernel tries again: there is no"),
            (
                Some("back-pressure"),
                "is dropped, and the client's kernel tries again: no worker has",
            ),
            (Some("refusing"), "is refused: there has been no usable worker"),
        ] {
            explained.obstacle = obstacle.map(str::to_owned);
            assert!(next(&explained).contains(words), "{}", next(&explained));
        }
        explained.obstacle = Some("back-pressure".to_owned());
        explained.decision.candidates[1].why = "suspect".to_owned();
        assert!(next(&explained).contains("goes to a suspect worker: no other has room"));
    }
}
