//! Hints for wrong values: terms of other load balancers, and examples of valid keys.

use super::error::nearest;
use dispatcher_core::Policy;

/// The sample configuration contains every key with its default or an example.
pub(crate) const SAMPLE: &str = include_str!("../../../etc/dispatcher.toml");

/// Names of policies in other programs, and the equivalent here.
const POLICIES: [(&str, &[&str], &str); 8] = [
    ("HAProxy", &["leastconn"], "\"least-connections\""),
    ("nginx", &["least_conn"], "\"least-connections\""),
    ("HAProxy", &["roundrobin", "static-rr"], "\"round-robin\""),
    ("HAProxy", &["first"], "\"failover\", with a priority for each worker"),
    ("HAProxy", &["source"], "\"hash\", which uses the client's address"),
    ("nginx", &["ip_hash", "hash"], "\"hash\", which uses the client's address"),
    ("nginx", &["least_time"], "\"least-score\", with a gauge for the response time"),
    ("nginx", &["two"], "\"two-choices\""),
];

/// Names of affinity keys in HAProxy, and the equivalent here.
const KEYS: [(&str, &str); 5] = [
    ("url_param", "url:NAME"),
    ("uri", "url:NAME"),
    ("hdr", "header:NAME"),
    ("rdp-cookie", "cookie:NAME"),
    ("sticky", "cookie:NAME"),
];

/// Keys of other programs, and the equivalent here.
const SETTINGS: [(&str, &str); 31] = [
    ("balance", "policy"),
    ("lb_policy", "policy"),
    ("bind", "address"),
    ("listen", "address"),
    ("maxconn", "max_connections_per_worker"),
    ("max_conns", "max_connections_per_worker"),
    ("default_backend", "pool"),
    ("chdir", "directory"),
    ("cwd", "directory"),
    ("working_directory", "directory"),
    ("env", "environment"),
    ("uid", "user"),
    ("gid", "group"),
    ("numprocs", "processes"),
    ("workers", "processes"),
    // Kubernetes and Compose.
    ("replicas", "processes"),
    ("minReadySeconds", "min_ready"),
    ("readinessProbe", "ready_check"),
    ("readiness_probe", "ready_check"),
    ("healthcheck", "ready_check"),
    ("health_check", "ready_check"),
    ("maxSurge", "max_surge"),
    ("progressDeadlineSeconds", "ready_timeout"),
    ("terminationGracePeriodSeconds", "stop_timeout"),
    ("failure_action", "on_failure"),
    // puma, nginx.
    ("worker_boot_timeout", "start_timeout"),
    ("worker_timeout", "kill_hung_after"),
    ("worker_shutdown_timeout", "drain_timeout"),
    // systemd.
    ("ExecStart", "command"),
    ("TimeoutStartSec", "start_timeout"),
    ("TimeoutStopSec", "stop_timeout"),
];

/// The hint for an invalid value: the intended one, if it can be guessed, and all valid ones.
pub(super) fn value(word: &str, valid: &[&str]) -> String {
    value_of(word, "the values are", valid)
}

/// The same, with a name for the kind of value.
pub(super) fn value_of(word: &str, what: &str, valid: &[&str]) -> String {
    let all = format!("{what}: {}", valid.join(", "));
    let policies = valid.contains(&Policy::LeastConnections.name());
    let meant = policies.then(|| policy(word)).flatten().or_else(|| {
        nearest(word, valid.iter().copied()).map(|near| format!("did you mean `{near}`?"))
    });
    match meant {
        Some(meant) => format!("{meant} {}{}", all[..1].to_uppercase(), &all[1..]),
        None => all,
    }
}

fn policy(word: &str) -> Option<String> {
    // Such as "hash $remote_addr consistent", "random two least_conn", "hdr(host)".
    let lower = word.to_ascii_lowercase();
    let mut words = lower.split([' ', '(']);
    let first = words.next().unwrap_or_default();
    if first == "random" {
        let two = words.any(|word| word.starts_with("two") || word.starts_with('2'));
        let ours = if two { "two-choices" } else { "random" };
        return Some(format!("`{word}` is \"{ours}\" here."));
    }
    if let Some((_, key)) = KEYS.into_iter().find(|(theirs, _)| *theirs == first) {
        return Some(format!("`{word}` is policy = \"hash\" with affinity.key = \"{key}\" here."));
    }
    let found = POLICIES.into_iter().find(|(_, theirs, _)| theirs.contains(&first));
    found.map(|(program, _, ours)| format!("`{word}` of {program} is {ours} here."))
}

/// The hint for a key of another program.
pub(super) fn key(word: &str, valid: &[&str]) -> Option<String> {
    let (_, ours) = SETTINGS.into_iter().find(|(theirs, _)| *theirs == word)?;
    valid.contains(&ours).then(|| format!("did you mean `{ours}`?"))
}

/// The line of the sample configuration that sets the key at the end of this path.
pub(super) fn example(path: &[String]) -> Option<String> {
    // Examples of arrays apply to their elements.
    let names: Vec<&str> = path.iter().map(String::as_str).collect();
    let names: Vec<&str> = match names[..] {
        ["listener", _, ..] => {
            std::iter::once("listener").chain(names[2..].iter().copied()).collect()
        }
        ["defaults", ..] => ["pool", "web"].into_iter().chain(names[1..].iter().copied()).collect(),
        ["pool", _, ..] => ["pool", "web"].into_iter().chain(names[2..].iter().copied()).collect(),
        _ => names,
    };
    let names: Vec<&str> =
        names.into_iter().filter(|name| name.parse::<usize>().is_err()).collect();
    let (key, table) = names.split_last()?;
    let table = table.join(".");
    let mut here = String::new();
    for line in SAMPLE.lines() {
        let line = line.strip_prefix('#').unwrap_or(line);
        if let Some(header) = line.strip_prefix('[') {
            here = header.trim_matches(['[', ']']).to_owned();
        } else if here == table
            && let Some((name, value)) = line.split_once('=')
            && name.trim() == *key
        {
            let value = value.split("    #").next().unwrap_or_default().trim();
            return Some(format!("{key} = {value}"));
        }
    }
    header(path)
}

/// The header of the table at this path.
fn header(path: &[String]) -> Option<String> {
    let names: Vec<&str> = path.iter().map(String::as_str).collect();
    match names[..] {
        ["listener"] => Some("[[listener]]".to_owned()),
        ["advice"] => Some("[advice]".to_owned()),
        ["advice_peer"] => Some("[[advice_peer]]".to_owned()),
        ["defaults"] => Some("[defaults]".to_owned()),
        ["pool"] => Some("[pool.web]".to_owned()),
        ["pool", name] => Some(format!("[pool.{name}]")),
        ["pool", name, "member"] => Some(format!("[[pool.{name}.member]]")),
        ["pool", name, ref tables @ ..] => {
            let tables = tables.join(".");
            let sample = format!("[pool.web.{tables}]");
            let known = SAMPLE.lines().any(|line| line.trim_start_matches('#') == sample);
            known.then(|| format!("[pool.{name}.{tables}]"))
        }
        _ => None,
    }
}
