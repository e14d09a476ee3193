//! The command line. Owns arguments, what people read, and exit codes; each command is a module of its own.

mod admin;
mod check;
mod complete;
mod decisions;
#[cfg(feature = "demo")]
mod demo;
mod drain;
mod exit;
mod log_level;
mod manual;
mod reload;
mod run;
mod scale;
mod status;
mod table;
#[cfg(feature = "tui")]
mod top;
mod wait;
mod weight;
mod workers;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use serde::Serialize;

pub use exit::Exit;

use crate::api::command::CommandError;

const EXAMPLES: &str = "\
Examples:
  dispatcher demo                          four workers on http://127.0.0.1:8080/, no configuration
  dispatcher check FILE                    is this configuration good?
  dispatcher run --config FILE             serve
  dispatcher status                        who has how many connections?
  dispatcher status --json                 the same for programs
  dispatcher top                           the same as a live screen
  dispatcher workers                       who is there?
  dispatcher drain web/web-1               no new connections for this worker
  dispatcher weight web/web-1 3            it gets three times what others get
  dispatcher scale web +1                  one more of the processes that it starts
  dispatcher reload                        the configuration has changed
  dispatcher explain web                   who gets the next connection, and why?
  dispatcher history web --follow          who got the last ones, and why?
  dispatcher log-level debug               log more, for now

Environment:
  DISPATCHER_LOG     what `run` and `demo` log: error, warn, info (default), debug, trace
  DISPATCHER_ADMIN   the admin socket of the dispatcher to ask

Exit codes are those of sysexits.h: 0 done, 64 wrong usage, 65 not possible for this one, 66 no such worker or pool, 69 not running (`run`: running already), 71 the system is short of something, 73 a socket or file cannot be made, 74 input or output failed, 75 try again, 76 not a dispatcher of this version, 77 not permitted, 78 bad configuration.

With --json a command that fails prints {\"problem\", \"error\", \"hint\"} on stdout, and the same for people on stderr.";

/// Accepts TCP connections and passes each one to the worker process that the policy chooses.
#[derive(Debug, Parser)]
#[command(name = "dispatcher", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve, until SIGTERM or SIGINT; SIGHUP has the configuration read again.
    #[command(after_help = "Example:\n  dispatcher run --config ./dispatcher.toml")]
    Run(FileArgs),
    /// Check a configuration: exit code 0 if it is good, 78 with the place of every mistake if not.
    #[command(
        after_help = "Examples:\n  dispatcher check\n  dispatcher check ./dispatcher.toml\n  \
                      dispatcher check --json | jq -r '.mistakes[].line'\n  \
                      dispatcher check && systemctl restart dispatcher"
    )]
    Check(CheckArgs),
    /// Show what a running dispatcher is doing.
    #[command(after_help = status::EXAMPLES)]
    Status(status::StatusArgs),
    /// List the workers: who they are, how they are, what they have.
    #[command(after_help = workers::EXAMPLES)]
    Workers(workers::WorkersArgs),
    /// Watch pools and workers, drain and resume them, on a live screen.
    #[cfg(feature = "tui")]
    #[command(after_help = top::EXAMPLES)]
    Top(top::TopArgs),
    /// Give workers no new connections; what they have goes on.
    #[command(after_help = drain::DRAIN_EXAMPLES)]
    Drain(drain::DrainArgs),
    /// Give drained workers connections again.
    #[command(after_help = drain::RESUME_EXAMPLES)]
    Resume(drain::ResumeArgs),
    /// Give a worker another share of new connections.
    #[command(after_help = weight::EXAMPLES)]
    Weight(weight::WeightArgs),
    /// Run more or fewer processes of a pool that the dispatcher starts.
    #[command(after_help = scale::EXAMPLES)]
    Scale(scale::ScaleArgs),
    /// Read the configuration again and put it into force.
    #[command(after_help = reload::EXAMPLES)]
    Reload(reload::ReloadArgs),
    /// Show how much is logged, or log more or less for now.
    #[command(after_help = log_level::EXAMPLES)]
    LogLevel(log_level::LogLevelArgs),
    /// Show a pool's last decisions: who was chosen, and why the others were passed over.
    #[command(after_help = decisions::HISTORY_EXAMPLES)]
    History(decisions::HistoryArgs),
    /// Show to whom a pool's next connection would go, and why.
    #[command(after_help = decisions::EXPLAIN_EXAMPLES)]
    Explain(decisions::ExplainArgs),
    /// Print the script that completes commands and options in a shell.
    #[command(after_help = manual::COMPLETIONS_EXAMPLES)]
    Completions(manual::CompletionsArgs),
    /// Print a manual page, or write all of them.
    #[command(after_help = manual::MAN_EXAMPLES)]
    Man(manual::ManArgs),
    /// Try it out: an HTTP server of several processes, without any configuration.
    #[cfg(feature = "demo")]
    #[command(
        after_help = "Examples:\n  dispatcher demo\n  dispatcher demo --listen '[::]:9000' --workers 8"
    )]
    Demo(DemoArgs),
    /// One worker of the demo, started by it.
    #[cfg(feature = "demo")]
    #[command(hide = true)]
    DemoWorker {
        /// The process id of the demo's dispatcher.
        dispatcher: i32,
    },
}

#[derive(Debug, Args)]
struct FileArgs {
    /// The configuration.
    #[arg(long, value_name = "FILE", default_value = crate::config::DEFAULT_FILE)]
    config: PathBuf,
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// The configuration [default: /etc/dispatcher/dispatcher.toml]
    #[arg(value_name = "FILE", conflicts_with = "config")]
    file: Option<PathBuf>,
    /// The same.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What was found, as JSON.
    #[arg(long)]
    json: bool,
}

// Where client commands find the dispatcher. No doc comment: clap would make it the description of every command that
// has none of its own.
#[derive(Debug, Default, Args)]
struct AdminArgs {
    /// The dispatcher's admin socket [default: $DISPATCHER_ADMIN, or what the configuration says]
    #[arg(long, value_name = "PATH")]
    admin: Option<PathBuf>,
    /// A configuration to read `admin_socket` from [default: /etc/dispatcher/dispatcher.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[cfg(feature = "demo")]
#[derive(Debug, Args)]
struct DemoArgs {
    /// Where to serve HTTP.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    listen: std::net::SocketAddr,
    /// How many worker processes.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=i64::from(crate::config::MAX_PROCESSES)))]
    workers: u32,
    /// Where to put the admin socket [default: in a directory of its own]
    #[arg(long, value_name = "PATH")]
    admin: Option<PathBuf>,
}

/// A command that failed: what to say, and the exit code.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    message: String,
    /// What the dispatcher said, where it was the dispatcher that refused.
    refused: Option<CommandError>,
}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into(), refused: None }
    }

    /// For programs: `{"problem", "error", "hint"}`, as over HTTP.
    fn print_json(&self) -> Result<(), Failure> {
        match &self.refused {
            Some(refused) => print_json(refused),
            None => print_json(&FailureJson { problem: self.exit.problem(), error: &self.message }),
        }
    }
}

/// A failure that the dispatcher has not reported itself.
#[derive(Serialize)]
struct FailureJson<'a> {
    problem: &'static str,
    error: &'a str,
}

impl Command {
    /// Whether what it prints is for a program. `check` is not here: its answer has the mistake in it.
    fn for_programs(&self) -> bool {
        match self {
            Command::Status(arguments) => arguments.json,
            Command::Workers(arguments) => arguments.json,
            Command::Drain(arguments) => arguments.json,
            Command::Resume(arguments) => arguments.json,
            Command::Weight(arguments) => arguments.json,
            Command::Scale(arguments) => arguments.json,
            Command::Reload(arguments) => arguments.json,
            Command::LogLevel(arguments) => arguments.json,
            Command::History(arguments) => arguments.json,
            Command::Explain(arguments) => arguments.json,
            Command::Run(_) | Command::Check(_) | Command::Completions(_) | Command::Man(_) => {
                false
            }
            #[cfg(feature = "tui")]
            Command::Top(_) => false,
            #[cfg(feature = "demo")]
            Command::Demo(_) | Command::DemoWorker { .. } => false,
        }
    }
}

/// The whole program: arguments from the process, exit code to it.
pub fn main() -> ExitCode {
    if let Some(shell) = std::env::var_os(complete::VARIABLE).filter(|shell| !shell.is_empty()) {
        return complete::complete(&shell, std::env::args_os().collect()).into();
    }
    // Before anything that could wait. Other commands end by signals as programs do.
    let serves = std::env::args_os().nth(1).is_some_and(|word| word == "run" || word == "demo");
    if serves && let Err(error) = crate::signals::prepare() {
        complain(&format!("signal handlers: {error}"));
        return Exit::OsErr.into();
    }
    execute(std::env::args_os()).into()
}

fn execute(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; clap prints each where it belongs.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::Ok,
                _ => Exit::Usage,
            };
        }
    };
    let result = match &cli.command {
        Command::Run(arguments) => run::run(&arguments.config),
        Command::Check(arguments) => check::check(arguments),
        #[cfg(feature = "tui")]
        Command::Top(arguments) => top::top(arguments),
        Command::Completions(arguments) => manual::completions(arguments),
        Command::Man(arguments) => manual::man(arguments),
        Command::Drain(arguments) => drain::drain(arguments),
        Command::Resume(arguments) => drain::resume(arguments),
        Command::Scale(arguments) => scale::scale(arguments),
        Command::Weight(arguments) => weight::weight(arguments),
        Command::Reload(arguments) => reload::reload(arguments),
        Command::LogLevel(arguments) => log_level::log_level(arguments),
        Command::History(arguments) => decisions::history(arguments),
        Command::Explain(arguments) => decisions::explain(arguments),
        Command::Status(arguments) => status::status(arguments),
        Command::Workers(arguments) => workers::workers(arguments),
        #[cfg(feature = "demo")]
        Command::Demo(arguments) => demo::demo(arguments),
        #[cfg(feature = "demo")]
        Command::DemoWorker { dispatcher } => {
            crate::demo::worker(*dispatcher).map_err(|error| Failure::new(Exit::Unavailable, error))
        }
    };
    match result {
        Ok(()) => Exit::Ok,
        Err(failure) => {
            if cli.command.for_programs() {
                // Without a reader the exit code has to do.
                let _ = failure.print_json();
            }
            complain(&failure.message);
            failure.exit
        }
    }
}

/// To stderr, as ours.
fn complain(message: &str) {
    // When stderr is gone there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "dispatcher: {message}");
}

/// To stdout. A reader that has had enough (`| head`) is no error.
fn print(text: &str) -> Result<(), Failure> {
    feed(text).map(drop)
}

/// JSON on one line, with the fields in alphabetical order.
fn print_json(answer: &impl Serialize) -> Result<(), Failure> {
    let answer = serde_json::to_value(answer)
        .map_err(|error| Failure::new(Exit::IoErr, format!("JSON: {error}")))?;
    print(&format!("{answer}\n"))
}

/// The same, for whoever goes on: whether anybody still reads.
fn feed(text: &str) -> Result<bool, Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::new(Exit::IoErr, format!("stdout: {error}"))),
    }
}

/// Rests; false if whoever reads stdout has gone meanwhile, which is noticed at the end and without writing.
fn rest(pace: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    std::thread::sleep(pace);
    let out = std::io::stdout();
    // Asked for nothing, the kernel tells of a pipe without a reader, and of nothing that would come by itself.
    let mut reader = [PollFd::new(&out, PollFlags::empty())];
    let found = poll(&mut reader, Some(&Timespec::default()));
    !(found.is_ok_and(|found| found > 0) && reader[0].revents().contains(PollFlags::ERR))
}
