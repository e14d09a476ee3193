//! `/metrics` of a running dispatcher, compared with the dashboard, the alert rules and the
//! documentation.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use test_support::*;

/// Labels that Prometheus adds to every series.
const FROM_PROMETHEUS: [&str; 2] = ["instance", "job"];

fn etc(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../etc").join(file)
}

/// promtool, or `None` after a notice.
fn promtool() -> Option<Command> {
    let found = Command::new("promtool").arg("--version").output().is_ok();
    if !found {
        skip("needs promtool, of Debian's package prometheus");
    }
    found.then(|| Command::new("promtool"))
}

#[track_caller]
fn succeeds(command: &mut Command, input: &str) {
    use std::process::Stdio;
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    // A remark of the linter is a failure as well.
    assert!(output.status.success(), "{command:?}: {}", text.concat());
}

fn openmetrics(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\
         Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5\r\n\r\n"
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.to_lowercase().contains("content-type: application/openmetrics-text"), "{head}");
    body.to_owned()
}

fn plain(socket: &Path) -> String {
    let (code, body) = http_get(socket, "/metrics").unwrap();
    assert_eq!(code, 200, "{body}");
    body
}

/// One sample: name, labels, value.
type Sample = (String, BTreeMap<String, String>, f64);

fn samples(text: &str) -> Vec<Sample> {
    let sample = |line: &str| {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let labels = labels.strip_suffix('}').unwrap();
        // No value in these tests contains a comma or a quote.
        let pairs = labels.split(',').filter(|pair| !pair.is_empty()).map(|pair| {
            let (label, value) = pair.split_once('=').unwrap();
            (label.to_owned(), value.trim_matches('"').to_owned())
        });
        (name.to_owned(), pairs.collect(), value.parse().unwrap())
    };
    text.lines().filter(|line| !line.starts_with('#')).map(sample).collect()
}

fn sum(samples: &[Sample], name: &str) -> f64 {
    let of_name = samples.iter().filter(|(other, ..)| other == name);
    let values: Vec<f64> = of_name.map(|&(_, _, value)| value).collect();
    assert!(!values.is_empty(), "{name}");
    values.iter().sum()
}

/// The number of connections in all states, independent of reloads.
fn total(samples: &[Sample]) -> f64 {
    let places = ["queued", "in_flight", "taken_total", "closed_total"];
    let of = |place| sum(samples, &format!("dispatcher_connections_{place}"));
    places.into_iter().map(of).sum()
}

/// Every metric with its labels.
fn exposed(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut names: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, labels, _) in samples(text) {
        names.entry(name).or_default().extend(labels.into_keys());
    }
    names
}

const POOLS: &str = r#"
advice_listen = "127.0.0.1:0"
relay_directory = true

[[advice_peer]]
address = "127.0.0.1:9"

[[listener]]
name = "http"
address = "127.0.0.1:0"
pool = "web"

[[listener]]
name = "closed"
address = "127.0.0.1:0"
pool = "web"
deny = ["127.0.0.0/8"]

[[listener]]
name = "chat"
address = "127.0.0.1:0"
pool = "chat"
max_queued_per_client = 1000

[[listener]]
name = "shop"
address = "127.0.0.1:0"
pool = "shop"
proxy_protocol = true
proxy_protocol_from = ["10.0.0.0/8"]

[pool.shop]
policy = "least-score"
affinity.key = "client-ip"

[pool.web]
handoff_timeout = "10m"
agent_listen = "127.0.0.1:0"

[pool.chat]
handoff_timeout = "10m"
line_socket = "DIR/line.sock"
"#;

/// A dispatcher with taken, untaken and denied clients, and with workers that joined and left.
fn busy() -> (Dispatcher, Vec<Process>, Vec<Client>, Vec<TcpStream>) {
    let dispatcher = Dispatcher::start(POOLS);
    dispatcher.wait_status("the directory", |status| {
        status.relay.as_ref().is_some_and(|relay| relay.state == "up")
    });
    let mut workers = dispatcher.workers("blocking", "web", 2);
    let lazy = [("TEST_WORKER", "never-take")];
    workers.push(dispatcher.worker_with("blocking", "chat", "lazy", &lazy));
    let mut passing = dispatcher.worker("blocking", "web", "passing");
    dispatcher.wait_joined("web", 3);
    dispatcher.wait_joined("chat", 1);
    passing.kill();
    dispatcher.wait_status("one to go", |s| worker(s, "passing").is_none());
    let http = dispatcher.address("http");
    let mut clients: Vec<Client> = (0..200).map(|_| Client::connect(http).unwrap()).collect();
    clients.drain(..50).for_each(Client::finish);
    let chat = dispatcher.address("chat");
    let waiting = (0..7).map(|_| connect(chat)).collect();
    let denied = dispatcher.address("closed");
    (0..3).for_each(|_| drop(connect(denied)));
    dispatcher.wait_status("all to be where they belong", |s| {
        s.in_flight == 7 && s.closed["denied"] == 3 && pool(s, "web").workers.len() == 2
    });
    (dispatcher, workers, clients, waiting)
}

#[test]
fn the_metrics_text_is_valid_and_correct() {
    let (dispatcher, _workers, _clients, _waiting) = busy();
    let before = dispatcher.status();
    let text = plain(&dispatcher.admin());
    let open = openmetrics(&dispatcher.admin());
    let found = samples(&text);

    let accepted = sum(&found, "dispatcher_listener_accepted_connections_total");
    let placed = sum(&found, "dispatcher_pool_queued_connections")
        + sum(&found, "dispatcher_pool_in_flight_connections")
        + sum(&found, "dispatcher_pool_taken_connections_total")
        + sum(&found, "dispatcher_listener_closed_connections_total");
    assert_eq!((accepted, placed), (210.0, 210.0));
    assert_eq!(sum(&found, "dispatcher_conservation_residual"), 0.0);
    let all = sum(&found, "dispatcher_connections_accepted_total");
    assert_eq!((all, total(&found)), (accepted, accepted));
    assert_eq!(sum(&found, "dispatcher_pool_taken_connections_total"), before.taken as f64);
    assert_eq!(sum(&found, "dispatcher_workers_joined_total"), 4.0);
    assert_eq!(sum(&found, "dispatcher_workers_gone_total"), 1.0);
    let live: u64 = before.pools.iter().flat_map(|p| &p.workers).map(|w| w.load).sum();
    assert_eq!(sum(&found, "dispatcher_live_connections"), live as f64);
    assert_eq!(sum(&found, "dispatcher_worker_live_connections"), live as f64);

    // Every taken connection has a latency, every 64th has a decision time, and every turn is
    // counted.
    assert_eq!(sum(&found, "dispatcher_handoff_latency_seconds_count"), 200.0);
    assert!(sum(&found, "dispatcher_handoff_latency_seconds_sum") > 0.0);
    assert_eq!(sum(&found, "dispatcher_decision_seconds_count"), 3.0);
    assert!(sum(&found, "dispatcher_turn_seconds_count") > 200.0);
    for (name, labels, _) in &found {
        if name == "dispatcher_listener_closed_connections_total" {
            assert!(before.closed.contains_key(&labels["reason"]), "{labels:?}");
        }
    }
    assert_eq!(exposed(&text), exposed(&open), "both formats have the same");

    let Some(mut promtool) = promtool() else { return };
    succeeds(promtool.args(["check", "metrics"]), &text);
    // The parser of OpenMetrics requires timestamps, which a scrape does not contain.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let dated: String = open
        .lines()
        .map(|line| match line.starts_with('#') {
            true => format!("{line}\n"),
            false => format!("{line} {now}\n"),
        })
        .collect();
    let file = dispatcher.dir.join("metrics");
    std::fs::write(&file, dated).unwrap();
    succeeds(
        Command::new("promtool")
            .args(["tsdb", "create-blocks-from", "openmetrics"])
            .arg(&file)
            .arg(dispatcher.dir.join("blocks")),
        "",
    );
}

#[test]
fn revoked_connections_are_counted() {
    let (dispatcher, address) = start_one_pool("handoff_timeout = \"100ms\"");
    let workers = dispatcher.workers("tokio", "web", 2);
    dispatcher.prove_all(address);
    workers[0].signal(Signal::SIGSTOP);
    let streams: Vec<TcpStream> = (0..20).map(|_| connect(address)).collect();
    let clients = all_greeted(streams);
    let status = dispatcher.wait_status("suspicion", |s| pool(s, "web").suspects == 1);
    let web = pool(&status, "web");
    let stopped = worker(&status, "w0").unwrap();
    assert_eq!((stopped.state.as_str(), stopped.in_flight), ("suspect", 0));
    assert!(web.revoked > 0 && web.revoked == stopped.revoked, "{web:?}");
    let revoked = web.revoked as f64;
    for (name, value) in [
        ("suspects_total", 1.0),
        ("revoked_connections_total", revoked),
        ("worker_revoked_connections_total", revoked),
        ("pool_in_flight_connections", 0.0),
        ("workers{pool=\"web\",state=\"suspect\"}", 1.0),
    ] {
        assert_eq!(dispatcher.metric(&format!("dispatcher_{name}")), value, "{name}");
    }
    drop(clients);
}

#[test]
fn totals_include_removed_listeners_and_pools() {
    let (dispatcher, _workers, clients, waiting) = busy();
    drop(waiting);
    let chat = POOLS.find("[[listener]]\nname = \"chat\"").unwrap();
    let shop = POOLS.find("[[listener]]\nname = \"shop\"").unwrap();
    let (before, rest) = (&POOLS[..chat], &POOLS[shop..]);
    write_config(
        &dispatcher.dir,
        &format!("{before}{}", rest.split("[pool.chat]").next().unwrap()),
    );
    let mut command = Command::new(dispatcher_bin());
    command.args(["reload", "--json"]).env("DISPATCHER_ADMIN", dispatcher.admin());
    let output = command.output().unwrap();
    let done = String::from_utf8(output.stdout).unwrap();
    assert!(done.contains("\"removed\":[\"pool chat\",\"listener chat\"]"), "{done}");
    dispatcher.wait_status("its listener to be gone", |s| s.listeners.len() == 3);
    let found = samples(&plain(&dispatcher.admin()));
    // The removed listener has no series of its own any more.
    assert_eq!(sum(&found, "dispatcher_listener_accepted_connections_total"), 203.0);
    assert_eq!(sum(&found, "dispatcher_connections_accepted_total"), 210.0);
    assert_eq!((total(&found), sum(&found, "dispatcher_conservation_residual")), (210.0, 0.0));
    drop(clients);
}

#[test]
fn affinity_is_counted() {
    let dispatcher = Dispatcher::start(&one_pool(
        "affinity.key = \"client-ip\"\npolicy = \"least-score\"\nscores.multipliers = { queue_wait = 1 }",
    ));
    let _workers = dispatcher.workers("blocking", "web", 2);
    let address = dispatcher.address("web");
    (0..5).for_each(|_| Client::connect(address).unwrap().finish());
    dispatcher.wait_status("all to be taken", |s| s.taken == 5);
    let found = samples(&plain(&dispatcher.admin()));
    let by = |label: &str| {
        let of = |(name, labels, value): &Sample| {
            (name == "dispatcher_affinity_connections_total" && labels["result"] == label)
                .then_some(*value)
        };
        found.iter().find_map(of)
    };
    assert_eq!((by("miss"), by("hit"), by("moved")), (Some(1.0), Some(4.0), Some(0.0)));
    assert_eq!(sum(&found, "dispatcher_affinity_entries"), 1.0);
    assert_eq!(sum(&found, "dispatcher_awaited_connections"), 0.0);
    assert_eq!(sum(&found, "dispatcher_workers_not_scored"), 2.0, "no worker set the gauge");
}

#[test]
fn workers_over_the_bound_are_only_in_sums() {
    let config = format!("metrics_max_workers = 2\n{}", one_pool(""));
    let dispatcher = Dispatcher::start(&config);
    let _workers = dispatcher.workers("blocking", "web", 4);
    let address = dispatcher.address("web");
    let _clients: Vec<Client> = (0..8).map(|_| Client::connect(address).unwrap()).collect();
    dispatcher.wait_status("all to be taken", |s| s.taken == 8);
    let found = samples(&plain(&dispatcher.admin()));
    let own = found.iter().filter(|(name, ..)| name == "dispatcher_worker_live_connections");
    let ids: Vec<&str> = own.map(|(_, labels, _)| labels["id"].as_str()).collect();
    assert_eq!(ids, ["1", "2"]);
    assert_eq!(sum(&found, "dispatcher_workers_not_shown"), 2.0);
    assert_eq!(sum(&found, "dispatcher_live_connections"), 8.0);
}

#[test]
fn standard_process_metrics_are_present() {
    let dispatcher = Dispatcher::start(&one_pool(""));
    let pid = dispatcher.process.pid();
    let now = || {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.unwrap().as_secs_f64()
    };
    let metric = |name: &str| dispatcher.metric(name);
    let started = metric("process_start_time_seconds");
    assert!((now() - 300.0..=now() + 2.0).contains(&started), "{started} is not lately: {}", now());
    let before = metric("process_cpu_seconds_total");
    wait_until("it to use a processor", || metric("process_cpu_seconds_total") > before);
    let memory = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let kib = |name: &str| -> f64 {
        let line = memory.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    for (metric, name) in
        [("process_resident_memory_bytes", "VmRSS:"), ("process_virtual_memory_bytes", "VmSize:")]
    {
        let (shown, kernel) = (dispatcher.metric(metric), kib(name) * 1024.0);
        assert!((0.5..2.0).contains(&(shown / kernel)), "{metric}: {shown}, not {kernel}");
    }
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as f64;
    assert!((metric("process_open_fds") - open).abs() <= 3.0, "{open}");
    assert!(metric("process_max_fds") >= open);
}

#[test]
fn reloads_and_process_restarts_are_logged() {
    let dispatcher = Dispatcher::start(&format!(
        "{}[pool.web.spawn]\ncommand = [\"/bin/false\"]\n",
        one_pool("")
    ));
    let metric = |name: &str| dispatcher.metric(name);
    assert_eq!(metric("dispatcher_config_last_reload_successful"), 1.0);
    let first = metric("dispatcher_config_last_reload_success_timestamp_seconds");
    assert!(first > 1.6e9, "{first}");
    let reload = || {
        let mut command = Command::new(dispatcher_bin());
        command.arg("reload").env("DISPATCHER_ADMIN", dispatcher.admin());
        command.output().unwrap().status.success()
    };
    write_config(&dispatcher.dir, "nope = 1\n");
    assert!(!reload());
    assert_eq!(metric("dispatcher_config_last_reload_successful"), 0.0);
    assert_eq!(metric("dispatcher_config_last_reload_success_timestamp_seconds"), first);
    write_config(&dispatcher.dir, &one_pool(""));
    assert!(reload());
    assert_eq!(metric("dispatcher_config_last_reload_successful"), 1.0);
    assert!(metric("dispatcher_config_last_reload_success_timestamp_seconds") > first);
    assert!(metric("dispatcher_process_restarts_total{pool=\"web\"}") >= 1.0);
}

/// The metric names in a text, each with its label selectors. Strings end with their quote.
fn selected(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let mut rest = text;
    let next =
        |text: &str| ["dispatcher_", "process_"].iter().filter_map(|start| text.find(start)).min();
    while let Some(at) = next(rest) {
        let before = rest[..at].chars().next_back();
        rest = &rest[at..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let name = rest[..end].to_owned();
        rest = &rest[end..];
        if before.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_' || c == '/' || c == '=') {
            continue;
        }
        let mut labels = Vec::new();
        if let Some(inside) = rest.strip_prefix('{') {
            let mut quoted = false;
            let mut word = String::new();
            for c in inside.chars() {
                match c {
                    '"' => quoted = !quoted,
                    '}' if !quoted => break,
                    '=' | '!' if !quoted && !word.is_empty() => {
                        labels.push(std::mem::take(&mut word));
                    }
                    c if !quoted && (c.is_ascii_alphanumeric() || c == '_') => word.push(c),
                    _ => {}
                }
            }
        }
        found.push((name, labels));
    }
    found
}

/// Labels in `by (…)` and similar clauses.
fn grouped(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for word in ["by", "on", "without", "ignoring"] {
        for part in text.split(&format!("{word} (")).skip(1) {
            let list = part.split(')').next().unwrap();
            found.extend(list.split(',').map(|label| label.trim().to_owned()));
        }
    }
    found
}

/// Labels in `{{label}}` and `{{ $labels.label }}`.
fn templated(text: &str) -> Vec<String> {
    let inside = text.split("{{").skip(1).filter_map(|part| part.split("}}").next());
    inside
        .map(|word| word.split('|').next().unwrap().trim())
        .filter(|word| *word != "$value")
        .filter(|word| !word.starts_with("if ") && !matches!(*word, "else" | "end"))
        .map(|word| word.trim_start_matches("$labels.").to_owned())
        .collect()
}

#[track_caller]
fn check_expression(exposed: &BTreeMap<String, BTreeSet<String>>, expression: &str, shown: &str) {
    let mut all: BTreeSet<String> = FROM_PROMETHEUS.map(str::to_owned).into();
    for (name, labels) in selected(expression) {
        let has = exposed
            .get(&name)
            .unwrap_or_else(|| panic!("{name} does not exist, but is in: {expression}"));
        all.extend(has.iter().cloned());
        for label in labels {
            let known = has.contains(&label) || FROM_PROMETHEUS.contains(&label.as_str());
            assert!(known, "{name} has no label {label}, but: {expression}");
        }
    }
    for label in grouped(expression).iter().chain(&templated(shown)) {
        assert!(all.contains(label), "nothing has the label {label} in: {expression} / {shown}");
    }
}

/// Only with a steered pool, which needs root; a unit test compares them with the documentation.
fn with_steering(
    mut exposed: BTreeMap<String, BTreeSet<String>>,
) -> BTreeMap<String, BTreeSet<String>> {
    let docs = std::fs::read_to_string(etc("../docs/METRICS.md")).unwrap();
    for row in docs.lines().filter(|line| line.starts_with("| `dispatcher_steer_")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let labels = cells[3].split(", ").map(str::to_owned).collect();
        exposed.insert(cells[1].trim_matches('`').to_owned(), labels);
    }
    exposed
}

#[test]
fn the_test_parser_finds_wrong_names() {
    let found = selected("sum(rate(dispatcher_a_total{x=\"}\", y!~\"=\"}[5m])) / dispatcher_b");
    let own = |text: &str| text.to_owned();
    assert_eq!(
        found,
        [(own("dispatcher_a_total"), vec![own("x"), own("y")]), (own("dispatcher_b"), vec![])]
    );
    assert_eq!(grouped("sum by (pool, le) (x) / on (z) y"), ["pool", "le", "z"]);
    assert_eq!(templated("{{pool}} {{ $labels.x | f }} {{ $value }}"), ["pool", "x"]);
}

#[test]
fn dashboard_and_alerts_use_existing_metrics() {
    let (dispatcher, _workers, _clients, _waiting) = busy();
    let exposed = with_steering(exposed(&plain(&dispatcher.admin())));

    let dashboard = std::fs::read_to_string(etc("grafana/dispatcher.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let mut expressions = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().unwrap();
            check_expression(&exposed, expression, target["legendFormat"].as_str().unwrap());
            expressions.push(expression.to_owned());
        }
    }
    // These totals exist only for the equation that `dispatcher_conservation_residual` checks.
    const NOT_SHOWN: [&str; 7] = [
        "dispatcher_connections_accepted_total",
        "dispatcher_connections_returned_total",
        "dispatcher_connections_queued",
        "dispatcher_connections_in_flight",
        "dispatcher_connections_taken_total",
        "dispatcher_connections_closed_total",
        "dispatcher_pool_taken_connections_total",
    ];
    let shown: BTreeSet<String> =
        expressions.iter().flat_map(|text| selected(text)).map(|(name, _)| name).collect();
    let histogram = |name: &str| ["_bucket", "_sum", "_count"].iter().any(|s| name.ends_with(s));
    for metric in exposed.keys().filter(|name| !histogram(name)) {
        let left_out = NOT_SHOWN.contains(&metric.as_str());
        assert!(shown.contains(metric) != left_out, "{metric} and the dashboard");
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        let Some(definition) = variable["definition"].as_str() else { continue };
        let inside = definition.strip_prefix("label_values(").unwrap().strip_suffix(')').unwrap();
        let (metric, label) = inside.split_once(", ").unwrap();
        check_expression(&exposed, &format!("sum by ({label}) ({metric})"), "");
        assert!(exposed.contains_key(metric));
    }

    let rules = std::fs::read_to_string(etc("prometheus/dispatcher.rules.yml")).unwrap();
    let mut alerts = Vec::new();
    for rule in rules.split("- alert: ").skip(1) {
        alerts.push(rule.lines().next().unwrap());
        let expression = rule.split("expr: ").nth(1).unwrap().lines().next().unwrap();
        let rest = rule.split_once("annotations:").unwrap().1;
        check_expression(&exposed, expression, rest);
        // The expressions in annotations use existing metrics.
        check_expression(&exposed, &rest.replace("\\\"", "\""), "");
    }
    assert!(alerts.len() > 10);
    let tests = std::fs::read_to_string(etc("prometheus/dispatcher.rules.test.yml")).unwrap();
    for alert in alerts {
        // Each alert has a test in which it fires and one in which it does not.
        let parts: Vec<&str> = tests.split("- alertname: ").skip(1).collect();
        let cases = parts.iter().filter(|part| part.lines().next() == Some(alert));
        let quiet = cases.clone().filter(|part| part.contains("exp_alerts: []")).count();
        assert!(quiet > 0 && cases.count() > quiet, "{alert} is not tested both ways");
    }

    let Some(mut check) = promtool() else { return };
    succeeds(check.args(["check", "rules"]).arg(etc("prometheus/dispatcher.rules.yml")), "");
    succeeds(
        Command::new("promtool")
            .args(["test", "rules"])
            .arg(etc("prometheus/dispatcher.rules.test.yml")),
        "",
    );
    // Grafana checks the expressions of a dashboard only when it is opened; promtool checks them
    // here as rules.
    let mut text = String::from("groups:\n- name: dashboard\n  rules:\n");
    for (number, expression) in expressions.iter().enumerate() {
        let expression = expression
            .replace("$__rate_interval", "1m")
            .replace("$instance", ".*")
            .replace("$pool", ".*");
        let quoted = serde_json::to_string(&expression).unwrap();
        text += &format!("  - record: panel:{number}\n    expr: {quoted}\n");
    }
    let file = dispatcher.dir.join("dashboard.yml");
    std::fs::write(&file, text).unwrap();
    succeeds(Command::new("promtool").args(["check", "rules"]).arg(&file), "");
}

#[test]
fn the_documentation_names_every_metric_and_its_labels() {
    let (dispatcher, _workers, _clients, _waiting) = busy();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/METRICS.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    let rows: Vec<&str> = docs
        .lines()
        .filter(|line| line.starts_with("| `dispatcher_") || line.starts_with("| `process_"))
        .collect();
    let text = plain(&dispatcher.admin());
    let families: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .map(|rest| rest.split(' ').next().unwrap())
        .collect();
    let exposed = exposed(&text);
    for family in &families {
        let row = rows.iter().find(|row| row.contains(&format!("`{family}`")));
        let row = row.unwrap_or_else(|| panic!("{family} is not in docs/METRICS.md"));
        let labels = exposed.get(*family).or_else(|| exposed.get(&format!("{family}_count")));
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let histogram = !exposed.contains_key(*family);
        let said = cells[if histogram { 2 } else { 3 }];
        let said: BTreeSet<String> =
            said.split(", ").filter(|word| !word.is_empty()).map(str::to_owned).collect();
        assert_eq!(Some(&said), labels, "{row}");
    }
    let names = rows.iter().flat_map(|row| selected(row)).map(|(name, _)| name);
    for name in names.filter(|name| !name.starts_with("dispatcher_steer_")) {
        assert!(families.contains(name.as_str()), "{name} is only in docs/METRICS.md");
    }
}
