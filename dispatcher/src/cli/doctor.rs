//! `dispatcher doctor`: what this machine supports, what is missing, and how it is granted.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use clap::Args;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{PidfdFlags, Resource, getpid, getrlimit, pidfd_open};
use serde::Serialize;

use super::{Exit, Failure, print, print_json};

pub(super) const EXAMPLES: &str = "\
Examples:
  dispatcher doctor                          what this machine supports, and what is missing
  dispatcher doctor --json | jq -e .steer.ok   can connections be steered in the kernel?

Run it as the user and in the unit or container of the dispatcher: capabilities differ. It changes nothing. Steering is
for pools with mode = \"steer\".
Exit code 0 if connections can be passed, 69 if not.";

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Print the findings as JSON.
    #[arg(long)]
    pub(super) json: bool,
    /// Look for the type information of the kernel here (for tests).
    #[arg(long, value_name = "FILE", hide = true)]
    btf: Option<PathBuf>,
    /// Look for bpffs here (for tests).
    #[arg(long, value_name = "DIR", hide = true)]
    bpffs: Option<PathBuf>,
    /// Look for mounted file systems here (for tests).
    #[arg(long, value_name = "FILE", hide = true)]
    mounts: Option<PathBuf>,
}

/// What `doctor --json` prints.
#[derive(Serialize)]
struct Report {
    /// Passing connections to workers: what the dispatcher does without further settings.
    pass: Section,
    /// Choosing the worker in the kernel.
    steer: Section,
}

#[derive(Serialize)]
struct Section {
    /// Everything is there that is not optional.
    ok: bool,
    findings: Vec<Finding>,
}

#[derive(Serialize)]
struct Finding {
    name: &'static str,
    ok: bool,
    /// What is lost without it is stated in `found`.
    optional: bool,
    found: String,
    remedy: Option<String>,
}

impl Finding {
    fn of(name: &'static str, result: Result<String, (String, &str)>) -> Finding {
        let (ok, found, remedy) = match result {
            Ok(found) => (true, found, None),
            Err((found, remedy)) => (false, found, Some(remedy.to_owned())),
        };
        Finding { name, ok, optional: false, found, remedy }
    }
}

impl Section {
    fn of(findings: Vec<Finding>) -> Section {
        Section { ok: findings.iter().all(|it| it.ok || it.optional), findings }
    }
}

pub(super) fn doctor(arguments: &DoctorArgs) -> Result<(), Failure> {
    let report =
        Report { pass: Section::of(passing()), steer: Section::of(steering::findings(arguments)) };
    if arguments.json {
        print_json(&report)?;
    } else {
        print(&text(&report))?;
    }
    if report.pass.ok {
        return Ok(());
    }
    // The findings are printed; a second JSON document would be one too many.
    Err(Failure::new(Exit::Unavailable, "connections cannot be passed on this machine"))
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let sections = [
        ("Passing connections to workers", &report.pass),
        ("Choosing the worker in the kernel (steering)", &report.steer),
    ];
    for (title, section) in sections {
        let verdict = if section.ok { "possible" } else { "not possible" };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{title}: {verdict}");
        for Finding { name, ok, optional, found, remedy } in &section.findings {
            let state = match (ok, optional) {
                (true, _) => "ok",
                (false, true) => "note",
                (false, false) => "missing",
            };
            let _ = writeln!(text, "  {state:8}{name:16}{found}");
            if let Some(remedy) = remedy {
                let _ = writeln!(text, "  {:24}help: {remedy}", "");
            }
        }
    }
    text
}

/// What passing needs. Each is tried.
fn passing() -> Vec<Finding> {
    let failed = |error: rustix::io::Errno| io::Error::from(error).to_string();
    let channel =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let channel = channel.map(|_| "packets between processes".to_owned());
    let memory =
        rustix::fs::memfd_create("doctor", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .and_then(|memory| rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK))
            .map(|()| "sealed shared memory".to_owned());
    let process = pidfd_open(getpid(), PidfdFlags::empty());
    let process = process.map(|_| "processes as descriptors".to_owned());
    let kernel = "update the kernel to Linux 5.3 or later";
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.map_or("no limit".to_owned(), |most| most.to_string());
    vec![
        Finding::of("channel", channel.map_err(|error| (failed(error), "allow AF_UNIX sockets"))),
        Finding::of("memfd", memory.map_err(|error| (failed(error), kernel))),
        Finding::of("pidfd", process.map_err(|error| (failed(error), kernel))),
        Finding::of("descriptors", Ok(format!("{most} in a process (RLIMIT_NOFILE)"))),
    ]
}

#[cfg(feature = "steer")]
mod steering {
    use dispatch_steer::machine::{self, Places};

    use super::{DoctorArgs, Finding};

    pub(super) fn findings(arguments: &DoctorArgs) -> Vec<Finding> {
        let mut places = Places::default();
        let given = [
            (&arguments.btf, &mut places.btf),
            (&arguments.bpffs, &mut places.bpffs),
            (&arguments.mounts, &mut places.mounts),
        ];
        for (path, place) in given {
            if let Some(path) = path {
                place.clone_from(path);
            }
        }
        let mut all = machine::findings(&places);
        // Where something is missing the kernel's answer would only be more obscure.
        if all.iter().all(|finding| finding.ok || finding.optional) {
            all.push(machine::trial());
        }
        let own = |found: machine::Finding| Finding {
            name: found.name,
            ok: found.ok,
            optional: found.optional,
            found: found.found,
            remedy: found.remedy,
        };
        all.into_iter().map(own).collect()
    }
}

#[cfg(not(feature = "steer"))]
mod steering {
    use super::{DoctorArgs, Finding};

    pub(super) fn findings(_: &DoctorArgs) -> Vec<Finding> {
        let found = "this program was built without it".to_owned();
        let remedy = "build it with: cargo build --release -p dispatcher --features steer";
        vec![Finding::of("feature", Err((found, remedy)))]
    }
}
