//! Reports: Markdown tables, and JSON.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde_json::json;

use crate::load::Metrics;
use crate::machine::Machine;
use crate::stats::{median, range};
use crate::svg;
use crate::work::{Case, Column, Plan, Work};

/// Everything of one run.
#[derive(Debug)]
pub struct Report {
    machine: Machine,
    command: String,
    rounds: usize,
    quick: bool,
    cases: Vec<(Work, Case, Vec<Vec<Metrics>>)>,
    skipped: Vec<Skipped>,
}

#[derive(Debug, Serialize)]
struct Skipped {
    case: String,
    contender: String,
    reason: String,
}

/// A ratio of one of the main figures, taken round by round.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ratio {
    pub to: &'static str,
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Report {
    pub fn new(plan: &Plan) -> Report {
        let args: Vec<String> = std::env::args().skip(1).collect();
        Report {
            machine: Machine::this(),
            command: format!("bench {}", args.join(" ")).trim().to_owned(),
            rounds: plan.rounds,
            quick: plan.quick,
            cases: Vec::new(),
            skipped: Vec::new(),
        }
    }

    pub fn heading(&self) -> String {
        let Machine { cores, cpu, kernel, memory_gib, load_average } = &self.machine;
        let mut text = format!(
            "{cores} cores ({cpu}), Linux {kernel}, {memory_gib} GiB; load average at the start {load_average}.\n\
             {} round(s) in alternation; medians, with smallest and largest in brackets. CPU per connection \
             unless said otherwise;\n`client busy` is the load generator's share of one core.\n",
            self.rounds
        );
        if self.quick {
            text.push_str("A quick run: it shows that everything works, not how fast.\n");
        }
        text
    }

    pub fn skip(&mut self, case: &str, contender: &str, reason: &str) {
        self.skipped.push(Skipped {
            case: case.to_owned(),
            contender: contender.to_owned(),
            reason: reason.to_owned(),
        });
    }

    /// Contenders that were skipped, with the reason; each once for each reason.
    pub fn skipped(&self) -> String {
        let mut text = String::new();
        let mut told: Vec<(&str, &str)> = Vec::new();
        for Skipped { case, contender, reason } in &self.skipped {
            if !told.contains(&(contender, reason)) {
                told.push((contender, reason));
                let _ = writeln!(text, "Skipped: {contender}: {reason} (first in: {case})");
            }
        }
        text
    }

    pub fn add(&mut self, work: Work, case: Case, results: Vec<Vec<Metrics>>) {
        self.cases.push((work, case, results));
    }

    pub fn write(&self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        let cases: Vec<_> = self
            .cases
            .iter()
            .map(|(work, case, results)| {
                let rows = case
                    .variants
                    .iter()
                    .enumerate()
                    .zip(results)
                    .filter(|(_, rounds)| !rounds.is_empty());
                json!({
                    "work": format!("{work:?}").to_lowercase(),
                    "title": case.title,
                    "main": case.main.key,
                    "others": case.others.iter().map(|other| other.key).collect::<Vec<_>>(),
                    "rows": rows.map(|((at, variant), rounds)| json!({
                        "label": variant.label,
                        "ratios": ratios(case, case.main, results, at),
                        "other_ratios": case.others.iter()
                            .map(|&other| ratios(case, other, results, at)).collect::<Vec<_>>(),
                        "rounds": rounds,
                    })).collect::<Vec<_>>(),
                })
            })
            .collect();
        let whole = json!({
            "command": self.command,
            "machine": self.machine,
            "rounds": self.rounds,
            "quick": self.quick,
            "cases": cases,
            "skipped": self.skipped,
        });
        fs::write(directory.join("results.json"), serde_json::to_string_pretty(&whole)? + "\n")?;
        let tables = self.cases.iter().map(|(_, case, results)| table(case, results));
        let tables = tables.collect::<Vec<_>>().join("\n");
        let text = format!("{}\n{tables}\n{}", self.heading(), self.skipped());
        fs::write(directory.join("tables.md"), text)?;
        let cases = self.cases.iter().map(|(_, case, results)| (case, results.as_slice()));
        fs::write(directory.join("chart.svg"), svg::chart(cases))
    }
}

/// The ratios of one variant to each of its baselines, round by round: neighbouring rounds compare
/// best.
pub fn ratios(case: &Case, column: Column, results: &[Vec<Metrics>], at: usize) -> Vec<Ratio> {
    let own = &case.variants[at];
    let mut list = Vec::new();
    for &baseline in case.baselines() {
        let Some(other) = baseline.of(own, &case.variants) else { continue };
        let values: Vec<f64> = results[at]
            .iter()
            .zip(&results[other])
            .filter_map(|(a, b)| Some(a.get(column.key)? / b.get(column.key)?))
            .filter(|ratio| ratio.is_finite())
            .collect();
        if !values.is_empty() {
            let (min, max) = range(&values);
            list.push(Ratio { to: baseline.label(), median: median(&values), min, max });
        }
    }
    list
}

fn values(rounds: &[Metrics], column: Column) -> Vec<f64> {
    rounds.iter().filter_map(|round| round.get(column.key).copied()).collect()
}

/// A case as a Markdown table.
pub fn table(case: &Case, results: &[Vec<Metrics>]) -> String {
    let mains = || std::iter::once(case.main).chain(case.others.iter().copied());
    let mut header = vec![String::new()];
    for column in mains() {
        header.push(column.label.to_owned());
        header.extend(case.baselines().iter().map(|baseline| baseline.label().to_owned()));
    }
    header.extend(case.columns.iter().map(|column| column.label.to_owned()));
    let mut rows = vec![header];
    for (at, variant) in case.variants.iter().enumerate() {
        let rounds = &results[at];
        if rounds.is_empty() {
            continue;
        }
        let mut row = vec![variant.label.clone()];
        for column in mains() {
            let decimals = column.decimals;
            let figures = values(rounds, column);
            let (low, high) = range(&figures);
            row.push(format!(
                "{:.decimals$} [{low:.decimals$}–{high:.decimals$}]",
                median(&figures)
            ));
            let ratios = ratios(case, column, results, at);
            row.extend(case.baselines().iter().map(|baseline| {
                let ratio = ratios.iter().find(|ratio| ratio.to == baseline.label());
                ratio.map_or("–".to_owned(), |ratio| {
                    format!("{:.3} [{:.3}–{:.3}]", ratio.median, ratio.min, ratio.max)
                })
            }));
        }
        row.extend(case.columns.iter().map(|&column| {
            let values = values(rounds, column);
            let decimals = column.decimals;
            if values.is_empty() {
                "–".to_owned()
            } else {
                format!("{:.decimals$}", median(&values))
            }
        }));
        rows.push(row);
    }
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = format!("### {}\n\n", case.title);
    for (number, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "| {cell:<width$} ");
        }
        text.push_str("|\n");
        if number == 0 {
            for (at, width) in widths.iter().enumerate() {
                let line = "-".repeat(width + 1);
                let _ = write!(text, "|{line}{}", if at == 0 { "-" } else { ":" });
            }
            text.push_str("|\n");
        }
    }
    text
}
