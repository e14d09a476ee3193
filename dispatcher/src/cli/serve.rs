//! `dispatcher serve`: runs a server as several processes, without a configuration file.
//!
//! The command stands for a configuration ([`ServeArgs::configuration`]), which is checked like
//! every other one.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;

use super::private::{Directory, quoted};
use super::{Exit, Failure, print, print_error, run};
use crate::config::{Config, ConfigError, Diagnostic, has_placeholder};
use crate::plural::count;

pub(super) const EXAMPLES: &str = "\
COMMAND is a server that listens by itself. Each process gets an address of its own as {addr} and {port}, or inherits a
listener, {fd} (also LISTEN_FDS); the kernel sends each new connection at --listen to the process with the fewest connections.
That needs CAP_BPF and CAP_NET_ADMIN: without them the command says how to grant them. Servers with {fd} start nevertheless:
the kernel's hash spreads connections over them, unevenly. Others end with exit code 69. `dispatcher doctor` lists what a
machine needs.

Ctrl-C and SIGTERM stop the processes; SIGHUP replaces them one after the other. A process that ends is started again.

Examples:
  dispatcher serve -- uvicorn app:app --host {addr} --port {port}
  dispatcher serve --listen 0.0.0.0:8000 --workers 4 -- uvicorn app:app --host {addr} --port {port}
  dispatcher serve -- uvicorn app:app --fd {fd}
  dispatcher serve -- gunicorn app:app --bind {addr}:{port}
  dispatcher serve --listen 3000 -- env HOST={addr} PORT={port} node server.js
  dispatcher serve --listen 8000 -- python3 -m http.server --bind {addr} {port}
  dispatcher serve --listen 80 -- sh -c 'sed s/PORT/{port}/ nginx.conf.in > {port}.conf && exec nginx -c $PWD/{port}.conf'
  dispatcher serve --print-config -- redis-server --bind {addr} --port {port} > dispatcher.toml";

/// Most processes: each may have a second one that replaces it.
const MOST: i64 = crate::config::MAX_STEERED_WORKERS as i64 / 2;

/// The policies that make sense for processes that are alike.
const POLICIES: [&str; 5] = ["least-connections", "round-robin", "random", "two-choices", "hash"];

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// The address to which clients connect, or a port of all IPv4 addresses; may be given several
    /// times.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080", value_parser = address)]
    listen: Vec<SocketAddr>,
    /// The number of processes [default: the number of processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MOST))]
    workers: Option<u32>,
    /// The name of the pool [default: the name of the program]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// How the kernel chooses [default: least-connections]
    #[arg(long, value_name = "POLICY", value_parser = POLICIES)]
    policy: Option<String>,
    /// The path of the admin socket [default: in a temporary directory]
    #[arg(long, value_name = "PATH")]
    admin: Option<PathBuf>,
    /// Print the configuration for which this command stands, and end.
    #[arg(long)]
    print_config: bool,
    /// The program and its arguments, with {addr} and {port}, or {fd}.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// `8000` and `:8000` stand for `0.0.0.0:8000`. `[::]:8000` would keep IPv4 clients from servers
/// whose IPv6 listeners refuse them, such as those of asyncio.
fn address(text: &str) -> Result<SocketAddr, String> {
    let port = text.strip_prefix(':').unwrap_or(text);
    if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) {
        let port = port.parse().map_err(|_| format!("there is no port {port}"))?;
        return Ok(SocketAddr::from(([0, 0, 0, 0], port)));
    }
    text.parse().map_err(|_| "write 8000, 127.0.0.1:8000 or [::]:8000".to_owned())
}

pub(super) fn serve(arguments: &ServeArgs) -> Result<(), Failure> {
    let wants = arguments.wants()?;
    if arguments.print_config {
        let text = arguments.configuration(None);
        parsed(&text)?;
        return print(&text);
    }
    let steers = match (steering::possible(), wants) {
        (Ok(()), _) => true,
        (Err(missing), Wants::Address) => return Err(missing),
        // The kernel can always spread connections over listeners of one port.
        (Err(missing), Wants::Listener) if cfg!(feature = "steer") => {
            print_error(&missing.message);
            false
        }
        (Err(missing), Wants::Listener) => return Err(missing),
    };
    let directory = Directory::new("serve").map_err(|error| {
        Failure::new(Exit::CantCreate, format!("the temporary directory: {error}"))
    })?;
    let admin = arguments.admin.clone().unwrap_or_else(|| directory.path.join("admin.sock"));
    let sockets = Sockets { admin: &admin, dispatch: &directory.path.join("dispatch.sock") };
    let config = parsed(&arguments.configuration(Some(&sockets)))?;
    let (pool, workers) = (arguments.pool(), arguments.workers());
    run::serve(config, |addresses| {
        let processes = count(u64::from(workers), "process");
        print_error(&match steers {
            true => format!(
                "steering: the kernel chooses among {processes} for each connection; \
                 this program is not in its path"
            ),
            false => format!(
                "starting on the kernel's hash: it spreads connections over {processes}, unevenly"
            ),
        });
        // It serves even if stdout is closed.
        let _ = print(&what_to_try(addresses, &pool, &admin));
    })
}

/// Where a process gets its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wants {
    /// It listens at `{addr}` and `{port}`.
    Address,
    /// It inherits a listener, `{fd}`.
    Listener,
}

/// The sockets of the dispatcher.
struct Sockets<'a> {
    admin: &'a Path,
    dispatch: &'a Path,
}

impl ServeArgs {
    fn wants(&self) -> Result<Wants, Failure> {
        let has = |name| self.command.iter().any(|word| has_placeholder(word, name));
        match (has("port"), has("fd")) {
            (true, false) => Ok(Wants::Address),
            (false, true) => Ok(Wants::Listener),
            (true, true) => Err(Failure::new(
                Exit::Usage,
                "a process listens at {port} or inherits {fd}, not both\n\
                 help: remove one of the two from the command",
            )),
            (false, false) => {
                let program = self.command.first().map_or("server", String::as_str);
                let program = quoted(program);
                Err(Failure::new(
                    Exit::Usage,
                    format!(
                        "the processes would not know where to listen: no {{port}} in the command\n\
                         help: write {{addr}} and {{port}} where the server reads its address, such as\n  \
                         dispatcher serve -- {program} --host {{addr}} --port {{port}}\n  \
                         dispatcher serve -- env HOST={{addr}} PORT={{port}} {program}\n  \
                         dispatcher serve -- {program} --fd {{fd}}, if it can inherit a listener"
                    ),
                ))
            }
        }
    }

    fn workers(&self) -> u32 {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        self.workers.unwrap_or_else(|| processors().min(MOST as usize) as u32)
    }

    /// The name of the pool.
    fn pool(&self) -> String {
        if let Some(name) = &self.name {
            return name.clone();
        }
        let program = self.command.first().map_or("", String::as_str);
        let file = program.rsplit('/').next().unwrap_or_default();
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
        let name: String = file.chars().map(plain).take(LONGEST).collect();
        if name.is_empty() { "app".to_owned() } else { name }
    }

    /// The configuration for which the command stands. `None`: with the usual sockets.
    fn configuration(&self, sockets: Option<&Sockets<'_>>) -> String {
        let mut text = String::new();
        let pool = toml_string(&self.pool());
        // Writing to a string cannot fail.
        if let Some(Sockets { admin, dispatch }) = sockets {
            let path = |path: &Path| toml_string(&path.to_string_lossy());
            let _ = writeln!(text, "admin_socket = {}", path(admin));
            let _ = writeln!(text, "dispatch_socket = {}", path(dispatch));
            let _ = writeln!(text, "dispatch_socket_mode = \"0600\"\n");
        }
        for (number, address) in (1..).zip(&self.listen) {
            let name = match number {
                1 => self.pool(),
                number => format!("{}-{number}", self.pool()),
            };
            let (name, at) = (toml_string(&name), toml_string(&address.to_string()));
            let _ = writeln!(text, "[[listener]]\nname = {name}\naddress = {at}\npool = {pool}");
            // 0.0.0.0:80 and [::]:80 are two listeners then.
            let same = |other: &SocketAddr| other.is_ipv4() && other.port() == address.port();
            if address.is_ipv6() && self.listen.iter().any(same) {
                let _ = writeln!(text, "ipv6_only = true");
            }
            text.push('\n');
        }
        let _ = writeln!(text, "[pool.{pool}]\nmode = \"steer\"");
        // Where the kernel's programs cannot be loaded.
        if matches!(self.wants(), Ok(Wants::Listener)) {
            text.push_str("fallback = \"hash\"\n");
        }
        if let Some(policy) = &self.policy {
            let _ = writeln!(text, "policy = {}", toml_string(policy));
        }
        text.push('\n');
        let command: Vec<String> = self.command.iter().map(|word| toml_string(word)).collect();
        let _ = writeln!(text, "[pool.{pool}.spawn]\ncommand = [{}]", command.join(", "));
        let _ = writeln!(text, "processes = {}", self.workers());
        text
    }
}

/// The longest name made of a program: a number and dashes follow it in names of workers.
const LONGEST: usize = 48;

/// A basic string of TOML.
fn toml_string(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            // Writing to a string cannot fail.
            c if c.is_control() => drop(write!(out, "\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The configuration. What is wrong is wrong in an argument, so the arguments are named.
fn parsed(text: &str) -> Result<Config, Failure> {
    let config = Config::parse(text, "serve").map_err(|error| match &error {
        ConfigError::Unreadable { .. } => Failure::new(Exit::Usage, error.to_string()),
        ConfigError::Invalid { mistakes, .. } => {
            let all: Vec<String> = mistakes.iter().map(of_argument).collect();
            Failure::new(Exit::Usage, all.join("\n"))
        }
    })?;
    for warning in &config.warnings {
        let message = of_argument(&warning.0);
        // It would be started again and again.
        if warning.0.text.starts_with("command") {
            return Err(Failure::new(Exit::Usage, message));
        }
        print_error(&format!("warning: {message}"));
    }
    Ok(config)
}

/// A mistake without its place in a text that the user has not written.
fn of_argument(found: &Diagnostic) -> String {
    let marked = found.text.chars().skip(found.column - 1).take(found.width);
    let marked: String = marked.collect();
    let help = found.help.as_ref().map(|help| format!("\nhelp: {help}")).unwrap_or_default();
    format!("{marked}: {}{help}", found.message)
}

fn what_to_try(addresses: &[String], pool: &str, admin: &Path) -> String {
    let program = std::env::current_exe();
    let program = program.map_or_else(|_| "dispatcher".to_owned(), |it| it.display().to_string());
    let program = quoted(&program);
    let admin = admin.display().to_string();
    let admin = quoted(&admin);
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{pool} listens at {}", addresses.join(" and "));
    let _ = writeln!(
        text,
        "Ctrl-C stops it; kill -HUP {} replaces its processes one after the other.\n\n\
         Try, in another terminal:",
        std::process::id()
    );
    let pool = quoted(pool);
    for command in ["status".to_owned(), "top".to_owned(), format!("scale {pool} +1")] {
        let _ = writeln!(text, "  {program} {command} --admin {admin}");
    }
    text
}

#[cfg(feature = "steer")]
mod steering {
    use dispatch_steer::machine::{self, Finding, Places};

    use super::{Exit, Failure, quoted};

    /// Whether the kernel can choose on this machine.
    ///
    /// # Errors
    /// What is missing, with the command that grants it.
    pub(super) fn possible() -> Result<(), Failure> {
        let missing = machine::findings(&Places::default()).into_iter();
        let missing: Vec<Finding> = missing.filter(|it| !it.ok && !it.optional).collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(Failure::new(Exit::Unavailable, message(&missing))),
        }
    }

    pub(super) fn message(missing: &[Finding]) -> String {
        let mut text = "the kernel cannot choose the process of a connection here".to_owned();
        let (granted, other): (Vec<&Finding>, Vec<&Finding>) =
            missing.iter().partition(|it| it.name.starts_with("cap_"));
        for finding in other {
            text.push_str(&format!("\nmissing: {}", finding.found));
            if let Some(remedy) = &finding.remedy {
                text.push_str(&format!("\nhelp: {remedy}"));
            }
        }
        for finding in &granted {
            text.push_str(&format!("\nmissing: {}", finding.found));
        }
        if !granted.is_empty() {
            let program = std::env::current_exe();
            let program = program.map_or("FILE".to_owned(), |it| it.display().to_string());
            text.push_str(&format!(
                "\nhelp: sudo setcap cap_bpf,cap_net_admin+ep {}\n      \
                 or run this command with sudo; in a container: --cap-add BPF --cap-add NET_ADMIN",
                quoted(&program)
            ));
        }
        text
    }
}

#[cfg(not(feature = "steer"))]
mod steering {
    use super::{Exit, Failure};

    pub(super) fn possible() -> Result<(), Failure> {
        Err(Failure::new(
            Exit::Unavailable,
            "this program was built without the feature steer, so the kernel cannot choose\n\
             help: build it with: cargo build --release -p dispatcher --features steer",
        ))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn line(words: &[&str]) -> ServeArgs {
        Line::parse_from(std::iter::once(&"serve").chain(words)).serve
    }

    #[test]
    fn the_command_says_where_a_process_gets_its_clients() {
        let wants = |words: &[&str]| {
            let words: Vec<&str> = std::iter::once(&"--").chain(words).copied().collect();
            line(&words).wants().map_err(|failure| (failure.exit, failure.message))
        };
        assert_eq!(wants(&["uvicorn", "--host={addr}", "--port={port}"]), Ok(Wants::Address));
        assert_eq!(wants(&["uvicorn", "--fd", "{fd}"]), Ok(Wants::Listener));
        let (exit, message) = wants(&["a b", "{{port}}"]).expect_err("no address");
        assert_eq!(exit, Exit::Usage);
        assert!(message.contains("no {port} in the command"), "{message}");
        assert!(message.contains("serve -- 'a b' --host {addr} --port {port}"), "{message}");
        let (exit, message) = wants(&["a", "{port}", "{fd}"]).expect_err("two ways");
        assert!(exit == Exit::Usage && message.contains("not both"), "{message}");
    }

    #[test]
    fn a_port_is_one_of_all_ipv4_addresses() {
        let listen = |text: &str| line(&["--listen", text, "--", "x"]).listen[0].to_string();
        assert_eq!([listen("8000"), listen(":8000")], ["0.0.0.0:8000", "0.0.0.0:8000"]);
        assert_eq!([listen("[::]:80"), listen("127.0.0.1:80")], ["[::]:80", "127.0.0.1:80"]);
        for text in ["", ":", "65536", ":x", "host:80", "::1"] {
            assert!(address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_pool_has_the_name_of_the_program() {
        let pool = |program: &str| line(&["--", program]).pool();
        assert_eq!(pool("uvicorn"), "uvicorn");
        assert_eq!(pool("/opt/my server/größe 2.sh"), "gr--e-2.sh");
        assert_eq!(pool(""), "app");
        assert_eq!(pool(&"x".repeat(200)).len(), LONGEST);
        assert_eq!(line(&["--name", "web", "--", "x"]).pool(), "web");
        assert!(line(&["--", "x"]).workers() >= 1);
    }

    #[cfg(feature = "steer")]
    #[test]
    fn the_arguments_stand_for_a_configuration() {
        let words = [
            "--listen",
            "0.0.0.0:8000",
            "--listen",
            "[::]:8000",
            "--workers",
            "3",
            "--",
            "/bin/sh",
            "\"a\\\t\u{7f}ü",
            "{addr}",
            "{port}",
        ];
        let sockets =
            Sockets { admin: Path::new("/tmp/a\"b"), dispatch: Path::new("/tmp/dispatch.sock") };
        let text = line(&words).configuration(Some(&sockets));
        let config = parsed(&text).expect("it is valid");
        assert_eq!(config.admin_socket.source, crate::config::UnixSource::Path("/tmp/a\"b".into()));
        assert_eq!(config.dispatch_socket.mode, 0o600);
        let listeners: Vec<_> = config.listeners.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(listeners, ["sh", "sh-2"]);
        let pool = &config.pools[0];
        let spawn = pool.spawn.as_ref().expect("processes");
        assert_eq!((spawn.command[1].as_str(), spawn.processes), ("\"a\\\t\u{7f}ü", 3));
        assert_eq!(pool.steer.as_ref().map(|it| it.address.to_string()), Some("::".to_owned()));
        for name in POLICIES {
            let words = ["--policy", name, "--", "/bin/sh", "{port}"];
            let config = parsed(&line(&words).configuration(None)).expect("it is valid");
            assert_eq!(config.pools[0].settings.policy.name(), name);
        }
        let printed = line(&words).configuration(None);
        let config = parsed(&printed).expect("it is valid");
        let usual = crate::config::DEFAULT_ADMIN_SOCKET;
        assert_eq!(config.admin_socket.source, crate::config::UnixSource::Path(usual.into()));
    }

    #[cfg(feature = "steer")]
    #[test]
    fn servers_that_inherit_a_listener_can_do_without_steering() {
        use crate::config::Fallback;
        for (word, fallback) in [("{fd}", Some(Fallback::Hash)), ("{port}", None)] {
            let config = parsed(&line(&["--", "/bin/sh", word]).configuration(None));
            let pool = &config.expect("it is valid").pools[0];
            assert_eq!(pool.steer.as_ref().and_then(|it| it.fallback), fallback);
        }
    }

    #[cfg(feature = "steer")]
    #[test]
    fn mistakes_name_the_argument() {
        let refused = |words: &[&str]| {
            let failure = parsed(&line(words).configuration(None)).expect_err("refused");
            assert_eq!(failure.exit, Exit::Usage, "{}", failure.message);
            failure.message
        };
        for (words, expected) in [
            (&["--listen", "127.0.0.1:0", "--", "/bin/sh", "{port}"][..], "\"127.0.0.1:0\": "),
            (&["--", "/bin/sh", "{port}", "{adr}"], "{adr}: unknown placeholder"),
            (&["--", "/no/such", "{port}"], "\"/no/such\": "),
            (&["--name", "a b", "--", "/bin/sh", "{port}"], "not a valid name"),
            (
                &["--listen", "[::1]:80", "--", "/bin/sh", "127.0.0.1:{port}"],
                "cannot serve the IPv6 clients",
            ),
        ] {
            let message = refused(words);
            assert!(message.contains(expected), "{message}");
            assert!(!message.contains("serve:"), "{message}");
        }
    }

    #[cfg(feature = "steer")]
    #[test]
    fn what_is_missing_is_named_with_the_command_that_grants_it() {
        let status = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(status.path(), "CapEff:\t0000000000000000\n").expect("written");
        let places = dispatch_steer::machine::Places {
            status: status.path().to_owned(),
            mounts: "/dev/null".into(),
            ..Default::default()
        };
        let missing = dispatch_steer::machine::findings(&places).into_iter();
        let missing: Vec<_> = missing.filter(|it| !it.ok && !it.optional).collect();
        let message = steering::message(&missing);
        assert!(message.contains("missing: CAP_BPF is missing\n"), "{message}");
        assert!(message.contains("sudo setcap cap_bpf,cap_net_admin+ep /"), "{message}");
        assert!(message.contains("mount -t cgroup2 cgroup2 /sys/fs/cgroup"), "{message}");
    }
}
