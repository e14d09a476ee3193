//! `docs/FAILOVER.md`: its configuration is valid, and its commands answer as it shows.

use std::collections::BTreeSet;

use dispatcher::config::Config;
use serde_json::Value;

use crate::hosts::*;
use test_support::*;

const PAGE: &str = include_str!("../../docs/FAILOVER.md");

/// The blocks of this language in the section about advice.
fn blocks(language: &str) -> Vec<&'static str> {
    let (_, section) = PAGE.split_once("\n## Advice\n").expect("the section");
    let section = section.split("\n## ").next().unwrap();
    let start = format!("```{language}\n");
    let starts = section.split(start.as_str()).skip(1);
    starts.map(|block| block.split("```").next().unwrap()).collect()
}

/// The names of the fields, at every depth.
fn fields(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                found.insert(format!("{path}.{name}"));
                fields(value, &format!("{path}.{name}"), found);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| fields(value, path, found)),
        _ => {}
    }
}

#[test]
fn its_configuration_is_valid_and_works() {
    let blocks = blocks("toml");
    assert_eq!(blocks.len(), 1);
    let config = Config::parse(blocks[0], "FAILOVER.md").unwrap();
    assert_eq!(config.warnings, []);
    assert_eq!((config.advice.peers.len(), config.advice.history), (2, 100));
    // With addresses of this machine.
    let (one, two) = (free_address(), free_address());
    let text = blocks[0]
        .replace("0.0.0.0:9901", &one.to_string())
        .replace("10.0.0.1:9901", &one.to_string())
        .replace("10.0.0.2:9901", &two.to_string())
        .replace("0.0.0.0:8000", &format!("{}:0", one.ip()));
    let host = Host::start_with(&text, one, 1);
    let other = Host::start(two, "interval = \"50ms\"", &[], 1);
    host.wait_addresses(&["10.0.0.1:8000".parse().unwrap(), other.web()]);
    host.wait_peer(one, "itself");

    for command in PAGE.lines().filter_map(|line| line.strip_prefix("$ curl -s http://")) {
        let (_, path) = command.split_once('/').unwrap();
        let (code, answer) = ask(one, &format!("/{path}"));
        assert_eq!(code, 200, "{command}: {answer}");
        let shown = PAGE.split_once(&format!("{command}\n")).unwrap().1.lines().next().unwrap();
        let shown: Value = serde_json::from_str(shown).unwrap();
        let (mut is, mut said) = (BTreeSet::new(), BTreeSet::new());
        fields(&answer, "", &mut is);
        fields(&shown, "", &mut said);
        assert_eq!(is, said, "{command}");
    }
    let shown = reloading::run(&host.dispatcher, &["advice", "web"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let said = PAGE.split_once("$ dispatcher advice web\n").unwrap().1;
    assert_eq!(words(shown.lines().next().unwrap()), words(said.lines().next().unwrap()));
    let line = "score: 1 x connections; mode interval";
    assert!(shown.lines().any(|one| one == line) && said.lines().any(|one| one == line), "{shown}");
}

#[test]
fn its_tables_are_complete() {
    let host = Host::start(free_address(), "", &[free_address()], 0);
    let peer = &host.status().peers[0];
    for reason in peer.failures.keys() {
        assert!(PAGE.contains(&format!("\n| `{reason}` |")), "{reason}");
    }
    for state in dispatcher_core::advice::ServerState::ALL {
        assert!(PAGE.contains(&format!("`{}`", state.name())), "{}", state.name());
    }
    let (_, unknown) = ask(host.advice, "/");
    let paths = unknown["error"].as_str().unwrap().split(" are ").nth(1).unwrap();
    for path in paths.split(", ") {
        assert!(PAGE.contains(&format!("\n| `GET {path}` |")), "{path}");
    }
}

#[test]
fn a_configuration_that_would_make_empty_answers_is_refused_as_shown() {
    let text = "advice_listen = \"0.0.0.0:9901\"\n\n[advice]\nmode = \"fresh\"\n\
                request_timeout = \"3s\"\n\n[[listener]]\nname = \"web\"\n\
                address = \"10.0.0.1:8000\"\npool = \"web\"\n\n[pool.web]\n";
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("dispatcher.toml");
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    for command in [vec!["check", file], vec!["run", "--config", file]] {
        let output = std::process::Command::new(dispatcher_bin()).args(&command).output();
        let output = output.unwrap();
        assert!(!output.status.success(), "{command:?}");
        let said = String::from_utf8_lossy(&output.stderr).replace(file, "etc/dispatcher.toml");
        let lines: Vec<&str> = said.lines().take(4).collect();
        assert!(PAGE.contains(&lines.join("\n")) && lines.len() == 4, "{command:?}: {said}");
    }
}
