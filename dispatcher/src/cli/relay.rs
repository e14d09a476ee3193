//! `dispatcher relay`: asks the relay's directory, not the dispatcher.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use dispatch_directory::Query;
use dispatch_directory::config::{Config, DEFAULT_SOCKET};
use dispatch_protocol::relay::{Id, Name, Place};
use serde_json::json;

use super::table::{Table, width};
use super::{Exit, Failure, print, print_json, print_while_read};
use crate::api::status::RelayStatus;

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher relay who alice
  dispatcher relay who --namespace chat
  dispatcher relay groups --namespace chat
  dispatcher relay serve --socket ./relay.sock
  dispatcher relay stats --json | jq .ids
  dispatcher relay stats --openmetrics > /var/lib/node_exporter/relay.prom";

#[derive(Debug, Args)]
pub(super) struct RelayArgs {
    #[command(subcommand)]
    question: Question,
}

#[derive(Debug, Subcommand)]
enum Question {
    /// Run a directory for this host until SIGTERM or SIGINT, like the program dispatch-directory.
    Serve(ServeArgs),
    /// Show which worker holds an id, or list all registered ids.
    Who {
        /// The id.
        id: Option<String>,
        #[command(flatten)]
        ask: AskArgs,
    },
    /// List groups with the number of their members.
    Groups {
        #[command(flatten)]
        ask: AskArgs,
    },
    /// Show the numbers of the directory.
    Stats {
        #[command(flatten)]
        ask: AskArgs,
        /// Print the OpenMetrics format.
        #[arg(long, conflicts_with = "json")]
        openmetrics: bool,
    },
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// The configuration of the directory; without it the defaults apply.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Its socket, instead of the configured one.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The file with the key of tickets, instead of the configured one.
    #[arg(long, value_name = "FILE")]
    ticket_key: Option<PathBuf>,
    /// End when the standard input ends, too.
    #[arg(long)]
    end_with_stdin: bool,
}

#[derive(Debug, Args)]
struct AskArgs {
    /// The socket of the directory.
    #[arg(long, value_name = "PATH", env = "DISPATCH_RELAY_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// The namespace.
    #[arg(long, value_name = "NAME", default_value = "default")]
    namespace: String,
    /// Print JSON; of lists one object in each line.
    #[arg(long)]
    json: bool,
}

impl RelayArgs {
    pub(super) fn json(&self) -> bool {
        match &self.question {
            Question::Serve(_) => false,
            Question::Who { ask, .. } | Question::Groups { ask } | Question::Stats { ask, .. } => {
                ask.json
            }
        }
    }
}

impl AskArgs {
    fn connect(&self) -> Result<Query, Failure> {
        let namespace = Name::new(&self.namespace)
            .map_err(|error| Failure::new(Exit::Usage, format!("--namespace: {error}")))?;
        Query::connect(&self.socket, &namespace).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &io::Error) -> Failure {
        let path = self.socket.display();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure::new(
                Exit::Unavailable,
                format!("no directory at {path}; start dispatch-directory, or give its --socket"),
            ),
            io::ErrorKind::PermissionDenied => {
                Failure::new(Exit::NoPermission, format!("{path}: {error}"))
            }
            // The directory's own words.
            io::ErrorKind::Other => Failure::new(Exit::NoPermission, error.to_string()),
            _ => Failure::new(Exit::IoErr, format!("{path}: {error}")),
        }
    }
}

/// One line of `dispatcher status`.
pub(super) fn summary(relay: &RelayStatus) -> String {
    let number = |name: &str| relay.numbers.get(name).copied().unwrap_or(0);
    let mut line = format!("relay {} at {}", relay.state, relay.socket);
    if relay.state == "up" {
        let (members, ids, groups) = (number("members"), number("ids"), number("groups"));
        let _ = write!(line, ": {members} members, {ids} ids, {groups} groups");
    }
    if let Some(error) = &relay.error {
        let _ = write!(line, ": {error}");
    }
    line.push('\n');
    line
}

pub(super) fn relay(arguments: &RelayArgs) -> Result<(), Failure> {
    match &arguments.question {
        Question::Serve(serving) => serve(serving),
        Question::Who { id, ask } => who(id.as_deref(), ask),
        Question::Groups { ask } => groups(ask),
        Question::Stats { ask, openmetrics } => stats(ask, *openmetrics),
    }
}

fn serve(arguments: &ServeArgs) -> Result<(), Failure> {
    let config = match &arguments.config {
        Some(path) => Config::load(path),
        None => Config::parse(""),
    };
    let mut config = config.map_err(|error| Failure::new(Exit::Config, error))?;
    if let Some(socket) = &arguments.socket {
        config.socket.clone_from(socket);
    }
    if let Some(key) = &arguments.ticket_key {
        config.ticket_key = Some(key.clone());
    }
    let level = log::LevelFilter::Info;
    crate::background::logger::init(level)
        .map_err(|error| Failure::new(Exit::OsErr, format!("the log thread: {error}")))?;
    let served = match arguments.end_with_stdin {
        true => dispatch_directory::run_until_end_of(config, io::stdin()),
        false => dispatch_directory::run(config),
    };
    crate::background::logger::flush(Duration::from_secs(1));
    served.map_err(|error| {
        let exit = match error.kind() {
            io::ErrorKind::AddrInUse => Exit::Unavailable,
            io::ErrorKind::PermissionDenied => Exit::NoPermission,
            _ => Exit::CantCreate,
        };
        Failure::new(exit, error.to_string())
    })
}

fn who(id: Option<&str>, ask: &AskArgs) -> Result<(), Failure> {
    let Some(id) = id else { return all(ask) };
    let id = Id::new(id).map_err(|error| Failure::new(Exit::Usage, error.to_string()))?;
    let places = ask.connect()?.who(&id).map_err(|error| ask.failed(&error))?;
    if places.is_empty() && !ask.json {
        return Err(Failure::new(Exit::NoInput, format!("{id} is not registered")));
    }
    show(&places, ask).map(drop)
}

/// Pages are printed as they come, so a long list needs no memory.
fn all(ask: &AskArgs) -> Result<(), Failure> {
    let mut query = ask.connect()?;
    let mut cursor = 0;
    loop {
        let (places, next) = query.online(cursor).map_err(|error| ask.failed(&error))?;
        if !show(&places, ask)? || next == 0 {
            return Ok(());
        }
        cursor = next;
    }
}

fn show(places: &[Place], ask: &AskArgs) -> Result<bool, Failure> {
    let mut text = String::new();
    for place in places {
        let (id, worker, host) = (&place.id, place.worker.as_str(), place.host.as_str());
        if ask.json {
            let line = json!({"id": id.to_string(), "worker": worker, "host": host});
            text.push_str(&format!("{line}\n"));
        } else {
            text.push_str(&format!("{id} {worker} {host}\n"));
        }
    }
    print_while_read(&text)
}

fn groups(ask: &AskArgs) -> Result<(), Failure> {
    let mut query = ask.connect()?;
    let mut after = Vec::new();
    loop {
        let (groups, more) = query.groups(&after).map_err(|error| ask.failed(&error))?;
        let mut text = String::new();
        for group in &groups {
            let (name, members) = (&group.group, group.members);
            if ask.json {
                let line = json!({"group": name.to_string(), "members": members});
                text.push_str(&format!("{line}\n"));
            } else {
                text.push_str(&format!("{name} {members}\n"));
            }
        }
        let read = print_while_read(&text)?;
        let last = groups.last().map(|group| group.group.as_bytes().to_vec());
        match last {
            Some(last) if more && read => after = last,
            _ => return Ok(()),
        }
    }
}

fn stats(ask: &AskArgs, openmetrics: bool) -> Result<(), Failure> {
    let counts = ask.connect()?.stats().map_err(|error| ask.failed(&error))?;
    if ask.json {
        let number = |count: &dispatch_protocol::relay::Count| {
            (count.name.to_string(), serde_json::Value::from(count.value))
        };
        let object: serde_json::Map<_, _> = counts.iter().map(number).collect();
        return print_json(&object);
    }
    if openmetrics {
        let mut text = String::new();
        for count in &counts {
            let (name, value) = (count.name.as_str(), count.value);
            let (family, kind) = match name.strip_suffix("_total") {
                Some(family) => (family, "counter"),
                None => (name, "gauge"),
            };
            text.push_str(&format!("# TYPE dispatch_relay_{family} {kind}\n"));
            text.push_str(&format!("dispatch_relay_{name} {value}\n"));
        }
        text.push_str("# EOF\n");
        return print(&text);
    }
    let mut table = Table::new(&["NUMBER", "VALUE"], 1);
    for count in &counts {
        table.row([count.name.to_string(), count.value.to_string()]);
    }
    let mut text = String::new();
    table.show(&mut text, width());
    print(&text)
}
