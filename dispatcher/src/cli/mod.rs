//! The command line. Owns arguments, what people read, and exit codes; each command is a module of its own.

mod admin;
mod check;
mod decisions;
#[cfg(feature = "demo")]
mod demo;
mod drain;
mod exit;
mod manual;
mod reload;
mod run;
mod scale;
mod status;
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

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};

pub use exit::Exit;

const EXAMPLES: &str = "\
Examples:
  dispatcher demo                          four workers on http://127.0.0.1:8080/, no configuration
  dispatcher check --config FILE           is this configuration good?
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

Environment:
  DISPATCHER_LOG     what `run` and `demo` log: error, warn, info (default), debug, trace
  DISPATCHER_ADMIN   the admin socket of the dispatcher to ask

Exit codes are those of sysexits.h: 64 wrong usage, 65 not possible for this one, 66 no such worker or pool, 69 not running (`run`: running already), 77 not permitted, 78 bad configuration.";

/// Accepts TCP connections and passes each one to the least-loaded worker process.
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
    /// Check a configuration: exit code 0 if it is good, 78 with the place of the first mistake if not.
    #[command(after_help = "Examples:\n  dispatcher check --config ./dispatcher.toml\n  \
                      dispatcher check --json | jq -r '.mistake.line'")]
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
    #[command(after_help = scale::EXAMPLES)]
    Scale(scale::ScaleArgs),
    #[command(after_help = weight::EXAMPLES)]
    Weight(weight::WeightArgs),
    /// Read the configuration again and put it into force.
    #[command(after_help = reload::EXAMPLES)]
    Reload(reload::ReloadArgs),
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
    #[command(flatten)]
    file: FileArgs,
    /// What was found, as JSON.
    #[arg(long)]
    json: bool,
}

/// Where client commands find the dispatcher.
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
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
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
}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into() }
    }
}

/// The whole program: arguments from the process, exit code to it.
pub fn main() -> ExitCode {
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
        Command::Check(arguments) => check::check(&arguments.file.config, arguments.json),
        #[cfg(feature = "tui")]
        Command::Top(arguments) => top::top(arguments),
        Command::Completions(arguments) => manual::completions(arguments),
        Command::Man(arguments) => manual::man(arguments),
        Command::Drain(arguments) => drain::drain(arguments),
        Command::Resume(arguments) => drain::resume(arguments),
        Command::Scale(arguments) => scale::scale(arguments),
        Command::Weight(arguments) => weight::weight(arguments),
        Command::Reload(arguments) => reload::reload(arguments),
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
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::IoErr, format!("stdout: {error}")))
        }
        _ => Ok(()),
    }
}
