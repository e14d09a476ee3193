//! The command line: arguments, output and exit codes. Each command has a module of its own.

mod admin;
mod advice;
mod check;
mod complete;
mod decisions;
#[cfg(feature = "demo")]
mod demo;
mod doctor;
mod drain;
mod exit;
mod log_level;
mod manual;
mod private;
mod relay;
mod reload;
mod restart;
mod rollout;
mod run;
mod scale;
mod serve;
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
  dispatcher serve -- uvicorn app:app --host {addr} --port {port}
                                           a server as several processes, no configuration
  dispatcher check FILE                    check a configuration
  dispatcher run --config FILE             serve
  dispatcher status                        state, load and counters of workers
  dispatcher status --json                 the same as JSON
  dispatcher top                           the same as a live screen
  dispatcher workers                       list the workers
  dispatcher drain web/web-1               no new connections for this worker
  dispatcher weight web/web-1 3            three times the connections of others
  dispatcher scale web +1                  one more process
  dispatcher reload                        reload the configuration
  dispatcher explain web                   which worker gets the next connection, and why
  dispatcher history web --follow          the last decisions, and new ones
  dispatcher advice web                    which host should clients of a pool connect to?
  dispatcher log-level debug               log more until the next reload
  dispatcher relay who alice               which worker holds this client id
  dispatcher doctor                        what this machine supports

Environment:
  DISPATCHER_LOG     what `run`, `serve` and `demo` log: error, warn, info (default), debug, trace
  DISPATCHER_ADMIN   the admin socket of the dispatcher to ask

Exit codes are those of sysexits.h: 0 done, 64 wrong usage, 65 not possible for this worker or pool, 66 no such worker or pool, 69 not running (`run`: running already), 70 a restart stopped, 71 out of a system resource, 73 a socket or file cannot be created, 74 input or output failed, 75 try again, 76 not a dispatcher of this version, 77 not permitted, 78 bad configuration.

With --json a command that fails prints {\"problem\", \"error\", \"hint\"} on stdout, and a message on stderr.";

/// Balances TCP connections across the worker processes of one host.
#[derive(Debug, Parser)]
#[command(name = "dispatcher", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the dispatcher until SIGTERM or SIGINT; SIGHUP reloads the configuration.
    #[command(after_help = "Examples:\n  dispatcher run --config ./dispatcher.toml\n  \
                      dispatcher run --config ./dispatcher.toml --take-over")]
    Run(RunArgs),
    /// Run a server as several processes, balanced by the kernel, without a configuration.
    #[command(after_help = serve::EXAMPLES)]
    Serve(serve::ServeArgs),
    /// Check a configuration: exit code 0 if it is valid, 78 with the position of every mistake if
    /// not.
    #[command(
        after_help = "Examples:\n  dispatcher check\n  dispatcher check ./dispatcher.toml\n  \
                      dispatcher check --json | jq -r '.mistakes[].line'\n  \
                      dispatcher check --unit dispatcher.service\n  \
                      dispatcher check && systemctl restart dispatcher"
    )]
    Check(CheckArgs),
    /// Show the status of a running dispatcher.
    #[command(after_help = status::EXAMPLES)]
    Status(status::StatusArgs),
    /// List workers with state, load and process id.
    #[command(after_help = workers::EXAMPLES)]
    Workers(workers::WorkersArgs),
    /// Show pools and workers on a live screen; drain, resume and scale them.
    #[cfg(feature = "tui")]
    #[command(after_help = top::EXAMPLES)]
    Top(top::TopArgs),
    /// Stop new connections to workers; existing connections go on.
    #[command(after_help = drain::DRAIN_EXAMPLES)]
    Drain(drain::DrainArgs),
    /// Send new connections to drained workers again.
    #[command(after_help = drain::RESUME_EXAMPLES)]
    Resume(drain::ResumeArgs),
    /// Show or set the weight of a worker: its share of new connections.
    #[command(after_help = weight::EXAMPLES)]
    Weight(weight::WeightArgs),
    /// Change the number of processes that the dispatcher runs for a pool.
    #[command(after_help = scale::EXAMPLES)]
    Scale(scale::ScaleArgs),
    /// Replace the processes of a pool, or of one worker, without a refused client.
    #[command(after_help = restart::EXAMPLES)]
    Restart(restart::RestartArgs),
    /// Show how the last restart of a pool went, or return to its former command.
    #[command(after_help = rollout::EXAMPLES)]
    Rollout(rollout::RolloutArgs),
    /// Reload the configuration.
    #[command(after_help = reload::EXAMPLES)]
    Reload(reload::ReloadArgs),
    /// Show or set the log level.
    #[command(after_help = log_level::EXAMPLES)]
    LogLevel(log_level::LogLevelArgs),
    /// Show the last decisions of a pool: the chosen worker, and why the others were not chosen.
    #[command(after_help = decisions::HISTORY_EXAMPLES)]
    History(decisions::HistoryArgs),
    /// Show which worker would get the next connection of a pool, and why.
    #[command(after_help = decisions::EXPLAIN_EXAMPLES)]
    Explain(decisions::ExplainArgs),
    /// Show which addresses clients of a pool are advised, over all hosts, and why.
    #[command(after_help = advice::EXAMPLES)]
    Advice(advice::AdviceArgs),
    /// Run the relay's directory, or ask it: which worker holds an id, which groups there are.
    #[command(after_help = relay::EXAMPLES)]
    Relay(relay::RelayArgs),
    /// Show what this machine supports, what is missing, and how to grant it.
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::DoctorArgs),
    /// Print a shell completion script.
    #[command(after_help = manual::COMPLETIONS_EXAMPLES)]
    Completions(manual::CompletionsArgs),
    /// Print a manual page, or write all of them.
    #[command(after_help = manual::MAN_EXAMPLES)]
    Man(manual::ManArgs),
    /// Run a demo: an HTTP server of several processes, without a configuration.
    #[cfg(feature = "demo")]
    #[command(
        after_help = "Examples:\n  dispatcher demo\n  dispatcher demo --listen '[::]:9000' --workers 8"
    )]
    Demo(DemoArgs),
    /// One worker of the demo, started by the demo.
    #[cfg(feature = "demo")]
    #[command(hide = true)]
    DemoWorker {
        /// The process id of the demo's dispatcher.
        dispatcher: i32,
    },
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The configuration.
    #[arg(long, value_name = "FILE", default_value = crate::config::DEFAULT_FILE)]
    config: PathBuf,
    /// Take the listeners and the waiting connections of the running dispatcher over; it ends then
    #[arg(long)]
    take_over: bool,
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// The configuration [default: /etc/dispatcher/dispatcher.toml]
    #[arg(value_name = "FILE", conflicts_with = "config")]
    file: Option<PathBuf>,
    /// The same as FILE.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print mistakes and warnings as JSON.
    #[arg(long)]
    json: bool,
    /// Check also whether the configuration works in this systemd unit
    #[arg(long, value_name = "NAME")]
    unit: Option<String>,
}

// Options of the client commands that locate the dispatcher. No doc comment: clap would use it as
// the description of every command without one.
#[derive(Debug, Default, Args)]
struct AdminArgs {
    /// The admin socket of the dispatcher [default: $DISPATCHER_ADMIN, or as in the configuration]
    #[arg(long, value_name = "PATH")]
    admin: Option<PathBuf>,
    /// The configuration to read `admin_socket` from [default: /etc/dispatcher/dispatcher.toml, if
    /// it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[cfg(feature = "demo")]
#[derive(Debug, Args)]
struct DemoArgs {
    /// The address to serve HTTP on.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    listen: std::net::SocketAddr,
    /// The number of worker processes.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=i64::from(crate::config::MAX_PROCESSES)))]
    workers: u32,
    /// The path of the admin socket [default: in a temporary directory]
    #[arg(long, value_name = "PATH")]
    admin: Option<PathBuf>,
}

/// A failed command: message and exit code.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    message: String,
    /// The dispatcher's answer, if the dispatcher refused the command.
    refused: Option<CommandError>,
}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into(), refused: None }
    }

    /// Prints `{"problem", "error", "hint"}`, the same JSON as over HTTP.
    fn print_json(&self) -> Result<(), Failure> {
        match &self.refused {
            Some(refused) => print_json(refused),
            None => print_json(&FailureJson { problem: self.exit.problem(), error: &self.message }),
        }
    }
}

/// A failure that the dispatcher did not report itself.
#[derive(Serialize)]
struct FailureJson<'a> {
    problem: &'static str,
    error: &'a str,
}

impl Command {
    /// Whether the command's output is JSON. `check` and `doctor` are excluded: their output
    /// contains the mistakes.
    fn for_programs(&self) -> bool {
        match self {
            Command::Status(arguments) => arguments.json,
            Command::Workers(arguments) => arguments.json,
            Command::Drain(arguments) => arguments.json,
            Command::Resume(arguments) => arguments.json,
            Command::Weight(arguments) => arguments.json,
            Command::Scale(arguments) => arguments.json,
            Command::Restart(arguments) => arguments.json,
            Command::Rollout(arguments) => arguments.json(),
            Command::Reload(arguments) => arguments.json,
            Command::LogLevel(arguments) => arguments.json,
            Command::History(arguments) => arguments.json,
            Command::Explain(arguments) => arguments.json,
            Command::Advice(arguments) => arguments.json,
            Command::Relay(arguments) => arguments.json(),
            // They print what they found themselves.
            Command::Run(_)
            | Command::Serve(_)
            | Command::Check(_)
            | Command::Doctor(_)
            | Command::Completions(_)
            | Command::Man(_) => false,
            #[cfg(feature = "tui")]
            Command::Top(_) => false,
            #[cfg(feature = "demo")]
            Command::Demo(_) | Command::DemoWorker { .. } => false,
        }
    }
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    if let Some(shell) = std::env::var_os(complete::VARIABLE).filter(|shell| !shell.is_empty()) {
        return complete::complete(&shell, std::env::args_os().collect()).into();
    }
    // Signal handlers are set before any step that may block. Client commands keep the default
    // actions.
    let command = std::env::args_os().nth(1);
    let serves = command.is_some_and(|word| word == "run" || word == "serve" || word == "demo");
    if serves && let Err(error) = crate::signals::prepare() {
        print_error(&format!("signal handlers: {error}"));
        return Exit::OsErr.into();
    }
    execute(std::env::args_os()).into()
}

fn execute(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Clap reports help and version as errors and prints them to the right stream.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::Ok,
                _ => Exit::Usage,
            };
        }
    };
    let result = match &cli.command {
        Command::Run(arguments) => run::run(arguments),
        Command::Serve(arguments) => serve::serve(arguments),
        Command::Check(arguments) => check::check(arguments),
        #[cfg(feature = "tui")]
        Command::Top(arguments) => top::top(arguments),
        Command::Doctor(arguments) => doctor::doctor(arguments),
        Command::Completions(arguments) => manual::completions(arguments),
        Command::Man(arguments) => manual::man(arguments),
        Command::Drain(arguments) => drain::drain(arguments),
        Command::Resume(arguments) => drain::resume(arguments),
        Command::Scale(arguments) => scale::scale(arguments),
        Command::Restart(arguments) => restart::restart(arguments),
        Command::Rollout(arguments) => rollout::rollout(arguments),
        Command::Weight(arguments) => weight::weight(arguments),
        Command::Reload(arguments) => reload::reload(arguments),
        Command::LogLevel(arguments) => log_level::log_level(arguments),
        Command::History(arguments) => decisions::history(arguments),
        Command::Explain(arguments) => decisions::explain(arguments),
        Command::Advice(arguments) => advice::advice(arguments),
        Command::Status(arguments) => status::status(arguments),
        Command::Workers(arguments) => workers::workers(arguments),
        Command::Relay(arguments) => relay::relay(arguments),
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
                // Without a reader, the exit code is all that is left.
                let _ = failure.print_json();
            }
            print_error(&failure.message);
            failure.exit
        }
    }
}

/// Prints to stderr, with the program's name.
fn print_error(message: &str) {
    // A closed stderr cannot be reported.
    let _ = writeln!(std::io::stderr(), "dispatcher: {message}");
}

/// Prints to stdout. A closed pipe (`| head`) is not an error.
fn print(text: &str) -> Result<(), Failure> {
    print_while_read(text).map(drop)
}

/// JSON on one line, with the fields in alphabetical order.
fn print_json(answer: &impl Serialize) -> Result<(), Failure> {
    let answer = serde_json::to_value(answer)
        .map_err(|error| Failure::new(Exit::IoErr, format!("JSON: {error}")))?;
    print(&format!("{answer}\n"))
}

/// Like [`print`]; the answer is false if stdout has no reader any more.
fn print_while_read(text: &str) -> Result<bool, Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::new(Exit::IoErr, format!("stdout: {error}"))),
    }
}

/// Sleeps; the answer is false if stdout has lost its reader. Nothing is written to find out.
fn pause(pace: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    std::thread::sleep(pace);
    let out = std::io::stdout();
    // With no requested events, `poll` reports only error conditions: here, a pipe without a
    // reader.
    let mut reader = [PollFd::new(&out, PollFlags::empty())];
    let found = poll(&mut reader, Some(&Timespec::default()));
    !(found.is_ok_and(|found| found > 0) && reader[0].revents().contains(PollFlags::ERR))
}
