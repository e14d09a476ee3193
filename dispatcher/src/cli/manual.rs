//! `dispatcher completions` and `dispatcher man`. Both are generated from the argument definitions
//! that `--help` uses, so they always agree with it.

mod configuration;

use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use clap_complete::env::Shells;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use super::{Cli, Exit, Failure, complete, print};

pub(super) const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  source <(dispatcher completions bash)          for this shell
  source <(dispatcher completions zsh)
  dispatcher completions fish | source
  dispatcher completions bash > /usr/share/bash-completion/completions/dispatcher
  dispatcher completions zsh > \"${fpath[1]}/_dispatcher\"
  dispatcher completions fish > ~/.config/fish/completions/dispatcher.fish

The script completes commands, options, and the names of workers and pools of the running dispatcher.";

pub(super) const MAN_EXAMPLES: &str = "\
Examples:
  dispatcher man | man -l -                      read it now
  dispatcher man drain | man -l -                one command's page
  dispatcher man dispatcher.toml | man -l -      the page of the configuration
  dispatcher man --out /usr/local/share/man/man1";

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell.
    #[arg(value_name = "SHELL")]
    shell: Shell,
    /// The program that the script runs for completions [default: dispatcher, or this file where
    /// that is not in PATH]
    #[arg(long, value_name = "PROGRAM")]
    program: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// The page of this command, or dispatcher.toml [default: the page of the program]
    #[arg(value_name = "COMMAND", conflicts_with = "out")]
    command: Option<String>,
    /// Write all pages into this directory; dispatcher.toml(5) goes into man5 beside a directory
    /// named man1.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(super) fn completions(arguments: &CompletionsArgs) -> Result<(), Failure> {
    let shells = Shells::builtins();
    let name = arguments.shell.to_string();
    let shell = shells
        .completer(&name)
        .ok_or_else(|| Failure::new(Exit::Usage, format!("no completions for {name}")))?;
    let program = arguments.program.clone().unwrap_or_else(program);
    let mut bytes = Vec::new();
    shell
        .write_registration(complete::VARIABLE, PROGRAM, PROGRAM, &program, &mut bytes)
        .map_err(|error| Failure::new(Exit::IoErr, error.to_string()))?;
    print(&String::from_utf8_lossy(&bytes))
}

/// The program's name in shells.
const PROGRAM: &str = "dispatcher";

/// The program's name if it is in PATH, otherwise its path.
fn program() -> String {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let installed = std::env::split_paths(&paths).any(|folder| folder.join(PROGRAM).is_file());
    let own = std::env::current_exe().ok().filter(|_| !installed);
    own.map_or_else(|| PROGRAM.to_owned(), |path| path.display().to_string())
}

pub(super) fn man(arguments: &ManArgs) -> Result<(), Failure> {
    let pages = pages();
    if let Some(directory) = &arguments.out {
        return write_all(directory, &pages);
    }
    let name = match &arguments.command {
        Some(command) if command == configuration::TITLE => return print(&configuration::page()),
        Some(command) => format!("dispatcher-{command}"),
        None => "dispatcher".to_owned(),
    };
    match pages.iter().find(|(title, _)| *title == name) {
        Some((_, page)) => print(page),
        None => Err(Failure::new(
            Exit::Usage,
            format!(
                "there is no command `{}`; see dispatcher --help",
                name.trim_start_matches("dispatcher-")
            ),
        )),
    }
}

fn write_all(directory: &Path, pages: &[(String, String)]) -> Result<(), Failure> {
    let cannot = |path: &Path, error: std::io::Error| {
        Failure::new(Exit::CantCreate, format!("{}: {error}", path.display()))
    };
    std::fs::create_dir_all(directory).map_err(|error| cannot(directory, error))?;
    for (title, page) in pages {
        let path = directory.join(format!("{title}.1"));
        std::fs::write(&path, page).map_err(|error| cannot(&path, error))?;
    }
    // `man` looks for each section in a directory of its own.
    let beside = directory.file_name().is_some_and(|name| name == "man1");
    let directory = if beside { directory.with_file_name("man5") } else { directory.to_owned() };
    std::fs::create_dir_all(&directory).map_err(|error| cannot(&directory, error))?;
    let path = directory.join(format!("{}.5", configuration::TITLE));
    std::fs::write(&path, configuration::page()).map_err(|error| cannot(&path, error))
}

/// The commands without the hidden ones, which only the program itself uses.
pub(super) fn visible() -> Command {
    let whole = Cli::command();
    let mut command = Command::new("dispatcher").version(env!("CARGO_PKG_VERSION"));
    if let Some(about) = whole.get_about() {
        command = command.about(about.clone());
    }
    if let Some(more) = whole.get_after_help() {
        command = command.after_help(more.clone());
    }
    let shown = whole.get_subcommands().filter(|command| !command.is_hide_set());
    command.subcommands(shown.cloned())
}

/// All pages, by title.
fn pages() -> Vec<(String, String)> {
    let mut root = visible().disable_help_subcommand(true);
    root.build();
    let mut pages = vec![("dispatcher".to_owned(), page("dispatcher", &root))];
    for command in root.get_subcommands() {
        let title = format!("dispatcher-{}", command.get_name());
        pages.push((title.clone(), page(&title, command)));
    }
    pages
}

fn page(title: &str, command: &Command) -> String {
    let more = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    // The text after the options has headings of its own.
    let command = command.clone().after_help("").version(env!("CARGO_PKG_VERSION"));
    let subcommands = command.has_subcommands();
    let page = Man::new(command)
        .title(title.to_uppercase())
        .source(concat!("dispatcher ", env!("CARGO_PKG_VERSION")))
        .manual("dispatcher");
    let mut bytes = Vec::new();
    // Writing to memory cannot fail.
    let _ = page.render_title(&mut bytes);
    let _ = page.render_name_section(&mut bytes);
    let _ = page.render_synopsis_section(&mut bytes);
    let _ = page.render_description_section(&mut bytes);
    let _ = page.render_options_section(&mut bytes);
    if subcommands {
        let _ = page.render_subcommands_section(&mut bytes);
    }
    let _ = sections(&more).to_writer(&mut bytes);
    let mut also = Roff::new();
    also.control("SH", ["SEE ALSO"]);
    let pages = if subcommands {
        "dispatcher-run(1), dispatcher-status(1), dispatcher.toml(5)"
    } else {
        "dispatcher(1), dispatcher.toml(5)"
    };
    also.text([roman(pages)]);
    let _ = also.to_writer(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Makes a section of `Heading:` and the indented lines below it, and a paragraph of any other
/// line.
fn sections(text: &str) -> Roff {
    let mut roff = Roff::new();
    let mut literal = false;
    for line in text.lines() {
        let indented = line.starts_with(' ');
        if literal && !indented {
            roff.control("fi", []);
            literal = false;
        }
        match line.strip_suffix(':') {
            _ if line.is_empty() => {}
            Some(heading) if !indented => {
                roff.control("SH", [heading.to_uppercase().as_str()]);
            }
            _ if indented => {
                if !literal {
                    roff.control("nf", []);
                    literal = true;
                }
                roff.text([roman(line.trim_start())]);
            }
            _ => {
                roff.control("PP", []);
                roff.text([roman(line)]);
            }
        }
    }
    if literal {
        roff.control("fi", []);
    }
    roff
}
