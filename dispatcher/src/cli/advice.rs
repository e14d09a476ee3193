//! `dispatcher advice`: the addresses that clients of a pool are advised, and the last answers,
//! with the figures behind them.

use std::fmt::Write as _;

use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::admin;
use super::table::{Table, clean, count, width};
use super::{AdminArgs, Failure, complete, print};
use crate::api::advice::{
    AddressRecord, AdviceAnswer, AdviceHistoryAnswer, AdviceRecord, AdviceStatus,
};

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher advice web                 which address is best for a client of pool web, and why?
  dispatcher advice web --history       the last answers to clients
  dispatcher advice web --json | jq -r '.addresses[0].address'

Answers are kept only if the configuration sets their number: history = 100 in [advice]";

#[derive(Debug, Args)]
pub(super) struct AdviceArgs {
    /// The pool.
    #[arg(add = ArgValueCandidates::new(complete::pools))]
    pool: String,
    /// Show the last answers to clients.
    #[arg(long)]
    history: bool,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn advice(arguments: &AdviceArgs) -> Result<(), Failure> {
    let endpoint = admin::find(&arguments.admin)?;
    let mut path = format!("/v1/pools/{}/advice", admin::segment(&arguments.pool));
    if arguments.history {
        path.push_str("/history");
    }
    // In `mode = "fresh"` the dispatcher asks its peers first.
    let body = admin::get_within(&endpoint, &path, admin::LONG)?;
    if arguments.json {
        return print(&format!("{}\n", String::from_utf8_lossy(&body)));
    }
    print(&match arguments.history {
        true => past(&admin::parse(&body, &endpoint)?, width()),
        false => now(&admin::parse(&body, &endpoint)?, width()),
    })
}

fn now(answer: &AdviceAnswer, width: usize) -> String {
    let mut text = String::new();
    if answer.addresses.is_empty() {
        let _ = writeln!(text, "no address of pool {} is known", clean(&answer.pool));
    } else {
        addresses(&mut text, &answer.addresses, "", width);
        let terms =
            answer.multiplier.iter().map(|(name, cost)| format!("{cost} x {}", clean(name)));
        let terms: Vec<String> = terms.collect();
        let _ = writeln!(text, "score: {}; mode {}", terms.join(" + "), clean(&answer.mode));
    }
    for peer in &answer.peers {
        if let Some(error) = &peer.error {
            let _ = writeln!(text, "left out: peer {}: {}", clean(&peer.address), clean(error));
        }
    }
    text
}

fn past(history: &AdviceHistoryAnswer, width: usize) -> String {
    if history.size == 0 {
        return "no answers are kept: set a number, such as history = 100, in [advice]\n"
            .to_owned();
    }
    if history.answers.is_empty() {
        return "no answers yet\n".to_owned();
    }
    let mut text = String::new();
    for answer in &history.answers {
        one(&mut text, answer, width);
    }
    text
}

/// One header line, then a line for each address.
fn one(text: &mut String, answer: &AdviceRecord, width: usize) {
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "#{} {} {} for {} -> {}",
        answer.number,
        clean(&answer.at),
        clean(&answer.asked),
        clean(answer.client.as_deref().unwrap_or("?")),
        clean(answer.chosen.as_deref().unwrap_or("no address")),
    );
    addresses(text, &answer.addresses, "    ", width);
    if answer.left_out > 0 {
        let _ = writeln!(text, "    and {}", count(answer.left_out as u64, "more address"));
    }
}

fn addresses(text: &mut String, addresses: &[AddressRecord], indent: &str, width: usize) {
    let mut shown = String::new();
    let width = width.saturating_sub(indent.len());
    if addresses.iter().all(|one| one.gauges.is_empty()) {
        let mut table = Table::new(&HEADS, 2).optional(&[&["AGE"], &["CAPACITY"]]);
        addresses.iter().for_each(|one| table.row(cells(one)));
        table.show(&mut shown, width);
    } else {
        let [address, state, rest @ ..] = HEADS;
        let [score, load, advised, weight, capacity, age] = rest;
        let heads = [address, state, "GAUGES", score, load, advised, weight, capacity, age];
        let mut table = Table::new(&heads, 3).optional(&[&["AGE"], &["CAPACITY"], &["GAUGES"]]);
        for one in addresses {
            let [address, state, rest @ ..] = cells(one);
            let [score, load, advised, weight, capacity, age] = rest;
            table.row([address, state, gauges(one), score, load, advised, weight, capacity, age]);
        }
        table.show(&mut shown, width);
    }
    for line in shown.lines() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{indent}{line}");
    }
}

const HEADS: [&str; 8] =
    ["ADDRESS", "STATE", "SCORE", "LOAD", "ADVISED", "WEIGHT", "CAPACITY", "AGE"];

fn cells(one: &AddressRecord) -> [String; 8] {
    [
        clean(&one.address),
        clean(&one.state),
        format!("{:.2}", one.score),
        one.load.to_string(),
        one.advised.to_string(),
        format!("{:.2}", one.weight).trim_end_matches(".00").to_owned(),
        one.capacity.map_or_else(|| "-".to_owned(), |capacity| capacity.to_string()),
        format!("{} ms", one.age_ms),
    ]
}

fn gauges(one: &AddressRecord) -> String {
    let gauges = one.gauges.iter().map(|(name, value)| match value {
        Some(value) => format!("{name} {value:.2}"),
        None => format!("{name} ?"),
    });
    clean(&gauges.collect::<Vec<_>>().join(", "))
}

/// The lines of `dispatcher status` about advice.
pub(super) fn summary(advice: &AdviceStatus) -> String {
    let asked = |name: &str| advice.requests.get(name).copied().unwrap_or_default();
    let refused: u64 = advice.refused.values().sum();
    let mut text = format!(
        "advice at {} ({}): {}, {refused} without advice\n",
        clean(&advice.listen),
        clean(&advice.mode),
        count(asked("best") + asked("addresses"), "request"),
    );
    if let Some(addresses) = advice.left_out.get("addresses").filter(|count| **count > 0) {
        let _ =
            writeln!(text, "lists for clients had no room for {}", count(*addresses, "address"));
    }
    for peer in &advice.peers {
        let error = peer.error.as_deref().map(|error| format!(": {}", clean(error)));
        let (address, state) = (clean(&peer.address), clean(&peer.state));
        let _ = writeln!(text, "advice peer {address} {state}{}", error.unwrap_or_default());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::advice::PeerStatus;

    fn address(address: &str, state: &str, gauge: Option<f64>) -> AddressRecord {
        AddressRecord {
            address: address.to_owned(),
            state: state.to_owned(),
            load: 12,
            advised: 3,
            capacity: Some(1000),
            score: 4.125,
            weight: 4.0,
            age_ms: 70,
            gauges: [("queue_wait".to_owned(), gauge)].into(),
            workers: Vec::new(),
        }
    }

    #[test]
    fn addresses_with_their_figures() {
        let answer = AdviceAnswer {
            pool: "web".to_owned(),
            mode: "interval".to_owned(),
            multiplier: [("connections".to_owned(), 1.0), ("queue_wait".to_owned(), -2.5)].into(),
            addresses: vec![
                address("10.0.0.1:80", "ok", Some(0.5)),
                AddressRecord { capacity: None, ..address("10.0.0.2:80", "draining", None) },
            ],
            peers: vec![PeerStatus {
                address: "10.0.0.3:9901".to_owned(),
                error: Some("it did not answer within 1s".to_owned()),
                ..PeerStatus::default()
            }],
        };
        assert_eq!(
            now(&answer, 100),
            "ADDRESS      STATE     GAUGES           SCORE  LOAD  ADVISED  WEIGHT  CAPACITY    AGE\n\
             10.0.0.1:80  ok        queue_wait 0.50   4.12    12        3       4      1000  70 ms\n\
             10.0.0.2:80  draining  queue_wait ?      4.12    12        3       4         -  70 ms\n\
             score: 1 x connections + -2.5 x queue_wait; mode interval\n\
             left out: peer 10.0.0.3:9901: it did not answer within 1s\n"
        );
        let none = AdviceAnswer { addresses: Vec::new(), peers: Vec::new(), ..answer };
        assert_eq!(now(&none, 80), "no address of pool web is known\n");
    }

    #[test]
    fn the_last_answers() {
        let mut history =
            AdviceHistoryAnswer { pool: "web".to_owned(), size: 0, answers: Vec::new() };
        assert!(past(&history, 80).contains("history = 100, in [advice]"));
        history.size = 5;
        assert_eq!(past(&history, 80), "no answers yet\n");
        history.answers = vec![AdviceRecord {
            number: 7,
            at: "2026-01-02T03:04:05.678Z".to_owned(),
            asked: "best".to_owned(),
            client: Some("192.0.2.7".to_owned()),
            chosen: None,
            addresses: vec![address("10.0.0.1:80", "full", Some(0.5))],
            left_out: 2,
        }];
        assert_eq!(
            past(&history, 80),
            "#7 2026-01-02T03:04:05.678Z best for 192.0.2.7 -> no address\n    \
             ADDRESS      STATE  GAUGES           SCORE  LOAD  ADVISED  WEIGHT  CAPACITY\n    \
             10.0.0.1:80  full   queue_wait 0.50   4.12    12        3       4      1000\n    \
             and 2 more addresses\n"
        );
    }
}
