//! The table `docs/INTEGRATIONS.md`.

use std::fmt::Write;
use std::process::Command;

use super::catalogue::Server;
use super::examine::{Numbers, Results};
use super::websockets::{AT_ONCE, CLIENTS, Counts, Distribution, evenness};

/// What came of a server.
pub enum Outcome {
    Passed(Results),
    Failed,
    /// A program that is not installed.
    Missing(String),
}

fn said(command: &[&str]) -> String {
    let out = Command::new(command[0]).args(&command[1..]).output().unwrap();
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// 12345 as 12,345.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn row(server: &Server, outcome: &Outcome) -> String {
    let start = format!("| {} | {}", server.name, server.version_found());
    match outcome {
        Outcome::Passed(results) => format!(
            "{start} | {} | {}: {} | {:.3} | yes | yes | yes | yes | {}, none refused |\n",
            results.sequential.iter().map(u64::to_string).collect::<Vec<_>>().join(" "),
            grouped(results.held as u64),
            results.spread,
            results.evenness,
            grouped(results.restarted)
        ),
        Outcome::Failed => format!("{start} | **failed** | | | | | | | |\n"),
        Outcome::Missing(program) => {
            format!("| {} | {program} not installed | | | | | | | | |\n", server.name)
        }
    }
}

pub fn report(
    numbers: Numbers,
    servers: &[(Server, Outcome)],
    websockets: &[Distribution],
) -> String {
    let kernel = said(&["uname", "-r"]);
    let kernel = kernel.split('-').next().unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let (held, churn) = (grouped(numbers.held as u64), grouped(numbers.churn as u64));
    let mut text = format!(
        "# Servers that are not changed\n\n\
         Each of these runs as four processes in a [steered pool](STEER.md), as it is installed: \
         the kernel\nchooses the process of each connection. `just integrations` installs the \
         servers from PyPI and npm in\n`target/integrations`, examines all of them, and **writes \
         this page**; it needs root, Python, Node, nginx, redis and\nHAProxy. `.ci/run` examines \
         uvicorn, Node, nginx, redis and Python's http.server with smaller numbers.\n\n\
         Linux {kernel}, {cores} cores, {}. Each server has a network namespace of its own.\n\n\
         ## Results\n\n\
         | server | version | 200 one after the other | {held} held: spread | {churn} events: \
         max/mean | drain | kill | stop | scale | rolling restart |\n\
         |---|---|---|---|---:|---|---|---|---|---|\n",
        said(&["date", "-u", "+%-d %B %Y"])
    );
    for (server, outcome) in servers {
        text.push_str(&row(server, outcome));
    }
    let _ = write!(
        text,
        "\n| | |\n|---|---|\n\
         | 200 one after the other | connections of each process; each client is served and \
         ends its connection |\n\
         | held | {held} clients that have been served and stay: the largest minus the smallest \
         number of a process |\n\
         | events | {churn} times a client comes or a random one ends, around that number \
         and with the same random numbers for each server; max/mean at the end. \
         The counts equal the kernel's own list of sockets (`ss`), by process |\n\
         | drain | no new connection for a drained process, and it keeps those that it has |\n\
         | kill | `kill -9` of a process: it is replaced, clients of the others keep their \
         connections, the new one is filled up |\n\
         | stop | SIGSTOP: the process is suspect, other clients are served; SIGCONT: it is \
         trusted, and what waited in its accept queue is served |\n\
         | scale | to 6 processes, to 2, to 4; clients of surplus processes are served until they \
         go |\n\
         | rolling restart | all processes are replaced while four clients connect without a \
         pause: how many were served |\n\n\
         ## How each gets its port, and remarks\n\n\
         | server | port | remarks |\n|---|---|---|\n"
    );
    for (server, _) in servers {
        let _ = writeln!(text, "| {} | {} | {} |", server.name, server.port, server.remarks);
    }
    text.push_str(
        "| programs in Go | as they do | listeners of Go since 1.24 are MPTCP, which cannot be \
         steered: `GODEBUG=multipathtcp=0`. Not examined here |\n\n\
         - **Keep-alive.** A client that keeps its connection keeps its process: a drained or \
         replaced process ends when its\n  last connection does. With `drain_timeout` it gets \
         SIGTERM then, at which all of these end with idle connections open.\n\
         - **Several processes in one place** (gunicorn, hypercorn, granian, Node cluster, nginx \
         with `worker_processes`): the\n  kernel balances the places, the server what is inside. \
         One worker in each place is exact.\n\
         - **Backlog.** A short one drops SYNs in a burst; they come again after 1 s.\n\n",
    );
    text.push_str(&websocket_section(websockets));
    text
}

fn websocket_section(all: &[Distribution]) -> String {
    let clients = grouped(CLIENTS as u64);
    let [first, second] = AT_ONCE;
    assert_eq!(first, 1, "the text says so");
    let mut text = format!(
        "## {clients} WebSockets\n\nA Starlette application that says its process id, on four \
         processes. In the first row the kernel chooses by count; in the\nothers all workers \
         accept from one listener. Clients come one after the other, and in a second round {second} \
         at a time,\nand stay until all {clients} are connected. The evenness of a shared listener \
         varies from run to run.\n\n\
         | | connections of each process, one after the other | max/mean | {second} at a time | \
         max/mean |\n|---|---|---:|---|---:|\n"
    );
    let said = |counts: &Counts| {
        let all: Vec<String> = counts.iter().map(u64::to_string).collect();
        format!("{} | {:.2}", all.join(", "), evenness(counts))
    };
    for it in all {
        let [first, second] = &it.rounds;
        let _ = writeln!(
            text,
            "| {} (`{}`) | {} | {} |",
            it.name,
            it.command,
            said(first),
            said(second)
        );
    }
    text.push_str(
        "\n![Bars: how many connections each process has, steered and with a shared listener](\
         steer-websockets.svg)\n",
    );
    text
}
