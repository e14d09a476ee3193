//! Configurations for the chaos test: every policy, every kind of affinity key, a listener that is
//! added and removed, processes of the dispatcher.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use simulator::Random;

use super::nemesis::{HANDOFF_TIMEOUT, WAIT_FOR_WORKER};

const POLICIES: [&str; 7] = [
    "least-connections",
    "round-robin",
    "random",
    "two-choices",
    "hash",
    "failover",
    "least-score",
];

const KEYS: [&str; 7] =
    ["none", "client-ip", "cookie:sid", "url:sid", "form:sid", "header:X-Key", "sni"];

fn listener(name: &str, address: &str) -> String {
    format!("[[listener]]\nname = \"{name}\"\naddress = \"{address}\"\npool = \"web\"\n\n")
}

fn pool() -> String {
    format!(
        "[pool.web]\nhandoff_timeout = \"{}ms\"\nwait_for_worker = \"{}ms\"\n\
         peek_timeout = \"300ms\"\n",
        HANDOFF_TIMEOUT.as_millis(),
        WAIT_FOR_WORKER.as_millis()
    )
}

/// The first and last configuration.
pub fn plain() -> String {
    listener("web", "systemd:web") + &pool()
}

/// A random configuration.
pub fn any(random: &mut Random, extra: SocketAddr, worker: &Path, directory: &Path) -> String {
    let mut text = listener("web", "systemd:web");
    if random.below(3) > 0 {
        // Sometimes under another name, so that a new listener takes over the socket.
        let name = if random.below(2) == 0 { "extra" } else { "other" };
        text.push_str(&listener(name, &extra.to_string()));
    }
    text.push_str(&pool());
    let policy = POLICIES[random.below(7) as usize];
    let history = random.below(3) * 10;
    // Writing to a string cannot fail.
    let _ = writeln!(text, "policy = \"{policy}\"\nhistory = {history}");
    let _ = writeln!(text, "max_connections_per_worker = {}", 20 + random.below(200));
    if random.below(4) == 0 {
        text.push_str("slow_start = \"1s\"\n");
    }
    if policy == "least-score" {
        text.push_str("[pool.web.scores]\nmultipliers = { connections = 1 }\n");
    }
    let key = KEYS[random.below(7) as usize];
    let _ = writeln!(text, "[pool.web.affinity]\nkey = \"{key}\"");
    if random.below(3) > 0 {
        // "stop" would end connections of clients.
        let action = ["serve", "drain"][random.below(2) as usize];
        let _ = writeln!(
            text,
            "[pool.web.spawn]\ncommand = [{worker:?}]\nprocesses = {}\n\
             on_dispatcher_loss = {action:?}\nenvironment = {{ CHAOS_ROLE = \"spawned\", CHAOS_TAKEN = {:?} }}",
            1 + random.below(3),
            directory.join("taken")
        );
    }
    text
}
