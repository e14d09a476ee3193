//! The command line.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::{Args, Parser, Subcommand};

use crate::bare::BareArgs;
use crate::work::{self, Plan, Work};
use crate::worker::WorkerArgs;
use crate::{bare, cgroup, load, machine, worker};

const EXAMPLES: &str = "\
Examples:
  cargo build --release -p dispatcher && cargo run --release -p bench -- --out target/bench
  cargo run --release -p bench -- --quick
  cargo run --release -p bench -- --work short,idle --rounds 7

Figures of different runs do not compare: the table gives ratios within one.";

/// Measures the dispatcher and its alternatives.
#[derive(Debug, Parser)]
#[command(name = "bench", after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    measure: MeasureArgs,
    #[command(subcommand)]
    hidden: Option<Hidden>,
}

#[derive(Debug, Args)]
struct MeasureArgs {
    /// What to measure; several with commas. Default: all.
    #[arg(long, value_enum, value_delimiter = ',')]
    work: Vec<Work>,
    /// Contenders whose name contains one of these; several with commas. Default: all.
    #[arg(long, value_delimiter = ',', value_name = "TEXT")]
    only: Vec<String>,
    /// Small loads, in under a minute: shows that everything works; the figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// Number of rounds; each contender has one turn in each. Default: 5, or 1 with --quick.
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Threads that connect in the work `steer`.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    threads: u8,
    /// Directory for `results.json`, `tables.md` and `chart.svg`; created if it does not exist.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The dispatcher's binary. Default: `dispatcher` beside this program.
    #[arg(long, value_name = "FILE")]
    dispatcher: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Hidden {
    /// A server process.
    #[command(hide = true)]
    Worker(WorkerArgs),
    /// The smallest dispatcher.
    #[command(hide = true)]
    Bare(BareArgs),
    /// The clients.
    #[command(hide = true)]
    Load { request: String },
    /// Runs another program, which ends when the bench does.
    #[command(hide = true)]
    Exec {
        /// A cgroup v2 directory to move to.
        #[arg(long)]
        cgroup: Option<PathBuf>,
        program: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

pub fn run() -> io::Result<()> {
    let cli = Cli::parse();
    match cli.hidden {
        None => measure(cli.measure),
        Some(Hidden::Worker(args)) => worker::run(&args),
        Some(Hidden::Bare(args)) => bare::run(&args),
        Some(Hidden::Load { request }) => load::run(&request),
        Some(Hidden::Exec { cgroup, program, args }) => {
            machine::die_with_parent();
            cgroup.as_deref().map_or(Ok(()), cgroup::join)?;
            machine::raise_descriptors();
            Err(Command::new(program).args(args).exec())
        }
    }
}

fn measure(args: MeasureArgs) -> io::Result<()> {
    let dispatcher = match args.dispatcher {
        Some(path) => path,
        None => std::env::current_exe()?.with_file_name("dispatcher"),
    };
    let mut works = args.work;
    if works.is_empty() {
        works = Work::ALL.to_vec();
    }
    work::run(&Plan {
        works,
        only: args.only,
        quick: args.quick,
        rounds: args.rounds.unwrap_or(if args.quick { 1 } else { 5 }).max(1),
        threads: usize::from(args.threads),
        out: args.out,
        dispatcher,
    })
}
