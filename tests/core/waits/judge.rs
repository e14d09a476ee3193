//! Runs a row and checks its requirements.

use std::time::Duration;

use simulator::waits::{Change, Client, Contender, Outcome, percentile, run};

use super::rows::{Need, Row};

/// With fewer clients than this, percentiles and shares have no meaning.
const ENOUGH: usize = 20_000;

/// The head of the table.
pub const HEADING: &str = "scenario                                        | shared p50/p99     | never p50/p99      | core p50/p99       longest  | moves %  | suspects | first   | verdict";

/// The additional time of a dispatcher's turn before a handoff, in seconds; the references have
/// none.
const HANDING_OVER: f64 = 0.000_2;

/// The results of the contenders with one seed, several runs each.
struct Played {
    shared: Vec<Outcome>,
    never: Vec<Outcome>,
    core: Vec<Outcome>,
}

/// Whether a requirement holds.
pub struct Verdict {
    pub holds: bool,
    pub text: String,
}

/// Runs a row with every seed; returns its line of the table and the verdicts.
pub fn row(row: &Row, seeds: &[u64], most: u32) -> (String, Vec<Verdict>) {
    let results: Vec<(u64, Played)> =
        seeds.iter().map(|&seed| (seed, play(row, seed, most))).collect();
    let verdicts: Vec<Verdict> =
        results.iter().flat_map(|(seed, it)| verdicts(row, *seed, it)).collect();
    (line(row, &results, &verdicts), verdicts)
}

/// Runs a row with all contenders; `most` clients count.
fn play(row: &Row, seed: u64, most: u32) -> Played {
    let scenario = &mut row.scenario.clone();
    // Additional clients: those of the warm-up, and those that arrive until 20 s after the last
    // change.
    let last_change = scenario.changes.iter().map(|&(at, ..)| at).max();
    let until = last_change.map_or(Duration::ZERO, |at| at + Duration::from_secs(20));
    let before = |time: Duration| (scenario.rate * time.as_secs_f64()) as u32;
    let clients = if most < 30_000 { scenario.clients.min(most) } else { scenario.clients };
    scenario.clients = (clients + before(scenario.warm)).max(before(until));
    let undisturbed = scenario.undisturbed();
    let stops = scenario.changes.iter().any(|(_, _, change)| *change == Change::Stop);
    let never = if stops { &undisturbed } else { &*scenario };
    let mut played = Played { shared: Vec::new(), never: Vec::new(), core: Vec::new() };
    // A short test runs each row once.
    let runs = row.runs.min(1 + most / 1_000);
    for number in 0..u64::from(runs) {
        let seed = seed * 1_000 + number;
        played.shared.push(run(scenario, Contender::Shared, seed));
        played.never.push(run(never, Contender::Never, seed));
        played.core.push(run(scenario, Contender::Core, seed));
    }
    played
}

fn waits(outcomes: &[Outcome]) -> Vec<u64> {
    let mut all: Vec<u64> = outcomes.iter().flat_map(Outcome::waits).collect();
    all.sort_unstable();
    all
}

fn secs(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

fn counted(outcomes: &[Outcome]) -> usize {
    outcomes.iter().map(|outcome| outcome.counted().len()).sum()
}

/// Checks every requirement.
fn verdicts(row: &Row, seed: u64, played: &Played) -> Vec<Verdict> {
    let core = &played.core;
    // A shared queue serves all clients as long as one worker runs.
    let lost: usize = played.shared.iter().map(Outcome::lost).sum();
    let text = format!("{} (seed {seed}): the shared queue loses {lost}", row.name);
    let mut found = vec![Verdict { holds: lost == 0, text }];
    let mut say = |holds: bool, text: String| {
        let text = format!("{} (seed {seed}): {text}", row.name);
        found.push(Verdict { holds, text });
    };
    let lost: usize = core.iter().map(Outcome::lost).sum();
    say(lost == 0, format!("{lost} clients not served"));
    let waited = waits(core);
    let p = |part| percentile(&waited, part);
    for need in &row.needs {
        if is_statistical(*need) && counted(core) < ENOUGH {
            continue;
        }
        match *need {
            Need::OfNever(most) => {
                let never = percentile(&waits(&played.never), 0.99);
                say(
                    p(0.99) <= most * never + HANDING_OVER,
                    format!("p99 {:.4} never {never:.4}", p(0.99)),
                );
            }
            Need::AsNever(more) => {
                let never = percentile(&waits(&played.never), 0.99);
                say(
                    p(0.99) <= never + more.as_secs_f64(),
                    format!("p99 {:.4} never {never:.4}", p(0.99)),
                );
            }
            Need::OfShared(most) => {
                let shared = waits(&played.shared);
                for part in [0.5, 0.99] {
                    let of = percentile(&shared, part);
                    say(
                        p(part) <= most * of + HANDING_OVER,
                        format!(
                            "p{} {:.4} shared {of:.4} ({:.2})",
                            part * 100.0,
                            p(part),
                            p(part) / of
                        ),
                    );
                }
            }
            Need::Moves(most) => {
                let moves: u64 = core.iter().map(Outcome::moves).sum();
                let part = moves as f64 / counted(core).max(1) as f64;
                say(part <= most, format!("{moves} moves, {:.2} %", part * 100.0));
            }
            Need::Settled => {
                let again: u32 = core.iter().map(|outcome| outcome.alternations).sum();
                say(again == 0, format!("{again} times a worker is suspect again"));
            }
            Need::Stop(rounds) => {
                for outcome in core {
                    let usual =
                        3 * outcome.usual.max(row.scenario.handoff_timeout.as_nanos() as u64 / 3);
                    let most = usual + rounds * outcome.longest_round + 10_000_000;
                    let waits = outcome.clients.iter().filter(|client| client.met_a_stop);
                    let longest = waits.filter_map(|client| client.wait).max().unwrap_or(0);
                    say(
                        longest <= most,
                        format!(
                            "clients of the stopped worker wait {:.3}, usual {:.3}, round {:.3}",
                            secs(longest),
                            secs(outcome.usual),
                            secs(outcome.longest_round)
                        ),
                    );
                }
            }
            Need::Longest(most) => {
                say(
                    p(1.0) <= most.as_secs_f64(),
                    format!("longest {:.4}, allowed {most:?}", p(1.0)),
                );
            }
            Need::First(most) => {
                let first = first(core);
                // Plus the delivery and the turn that notices it.
                say(
                    first <= most.as_secs_f64() + 0.001,
                    format!("first {first:.4}, allowed {most:?}"),
                );
            }
            Need::Tests { hostile, round } => {
                for outcome in core {
                    if let Some(text) = tests(outcome, hostile, round) {
                        say(false, text);
                        break;
                    }
                }
            }
            Need::Share { worker, from, to, part } => {
                let workers = row.scenario.workers.len();
                for outcome in core {
                    let share = outcome.share(worker, from, to) * workers as f64;
                    say(share >= part, format!("worker {worker} has {share:.2} of an equal share"));
                }
            }
            Need::Even(most) => {
                let unevenness = core.iter().map(|outcome| outcome.unevenness).max().unwrap_or(0);
                say(unevenness <= most, format!("loads differ by {unevenness}"));
            }
        }
    }
    found
}

fn is_statistical(need: Need) -> bool {
    match need {
        Need::OfNever(_)
        | Need::AsNever(_)
        | Need::OfShared(_)
        | Need::Moves(_)
        | Need::Settled
        | Need::Share { .. } => true,
        Need::Stop(_) | Need::Longest(_) | Need::First(_) | Need::Tests { .. } | Need::Even(_) => {
            false
        }
    }
}

fn first(core: &[Outcome]) -> f64 {
    let waits = core.iter().filter_map(|outcome| outcome.clients.first()?.wait);
    waits.max().map_or(f64::INFINITY, secs)
}

/// Checks the delays caused by trials of hostile workers; returns the violation, if any. A client
/// without such a delay waits up to `round`.
fn tests(outcome: &Outcome, hostile: u32, round: Duration) -> Option<String> {
    const MS: u64 = 1_000_000;
    let round = round.as_nanos() as u64;
    // Its delivery and one or two turns.
    let usual = round + MS;
    let delay = |client: &Client| client.wait.unwrap_or(u64::MAX).saturating_sub(usual);
    // While the first client waits, the next ones do too, because no worker has taken a connection.
    let served = outcome.clients.iter().map(|client| client.at + client.wait.unwrap_or(0)).min();
    let served = served.unwrap_or(0);
    let delays: Vec<u64> =
        outcome.clients.iter().filter(|client| client.at > served).map(delay).collect();
    let longest = delays.iter().max().copied().unwrap_or(0);
    if longest > 20 * MS + round {
        return Some(format!("a test delays a client by {:.4}", secs(longest)));
    }
    let by_first = delays.iter().filter(|&&delay| delay > 5 * MS).count();
    if by_first > hostile as usize {
        return Some(format!("{by_first} clients are delayed as if by a first test"));
    }
    // Each hostile worker's first test, then one per second.
    let delayed = delays.iter().filter(|&&delay| delay > 0).count() as u64;
    let span = outcome.clients.last().map_or(0, |client| client.at) / 1_000_000_000;
    if delayed > u64::from(hostile) + span + 1 {
        return Some(format!("{delayed} clients are delayed in {span} s"));
    }
    None
}

/// The row of the table.
fn line(row: &Row, results: &[(u64, Played)], verdicts: &[Verdict]) -> String {
    let all = |of: fn(&Played) -> &Vec<Outcome>| {
        let mut waits: Vec<u64> = results.iter().flat_map(|(_, it)| waits(of(it))).collect();
        waits.sort_unstable();
        waits
    };
    let (shared, never, core) = (all(|it| &it.shared), all(|it| &it.never), all(|it| &it.core));
    let sum = |of: fn(&Outcome) -> u64| -> u64 {
        results.iter().flat_map(|(_, it)| &it.core).map(of).sum()
    };
    let clients = sum(|outcome| outcome.counted().len() as u64);
    let moves = sum(Outcome::moves) as f64 / clients.max(1) as f64 * 100.0;
    let suspicions = sum(|outcome| u64::from(outcome.suspicions));
    let first = results.iter().map(|(_, it)| first(&it.core)).fold(0.0, f64::max);
    let failed = verdicts.iter().filter(|verdict| !verdict.holds).count();
    let verdict = if failed == 0 { "holds".to_owned() } else { format!("{failed} fail") };
    let pair =
        |waits: &[u64]| format!("{:.5} / {:.5}", percentile(waits, 0.5), percentile(waits, 0.99));
    format!(
        "{:47} | {:18} | {:18} | {:18} {:8.4} | {moves:8.3} | {suspicions:8} | {first:7.4} | {verdict}",
        row.name,
        pair(&shared),
        pair(&never),
        pair(&core),
        percentile(&core, 1.0),
    )
}
