//! `[pool.NAME.spawn.limits]`: resource limits of processes.

use nix::sys::resource::{Resource, getrlimit};
use rustix::thread::CapabilitySet;
use toml::Spanned;

use super::super::accounts;
use super::super::error::Mistake;
use super::super::file::LimitKeys;
use super::super::validate::{Check, Checked};
use super::super::value::{ASize, Either, TextOrNumber};
use super::super::{Limit, ProcessLimits, UNLIMITED};

/// Fewer open files are not enough to load a program.
const LEAST_FILES: u64 = 16;

/// A program needs some address space to start.
const LEAST_MEMORY: u64 = 1 << 20;

/// The units of sizes, in bytes.
const UNITS: [(&str, u64); 8] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("K", 1 << 10),
    ("M", 1 << 20),
    ("G", 1 << 30),
    ("T", 1 << 40),
];

/// One of the limits.
struct Kind {
    resource: Resource,
    bytes: bool,
    least: u64,
    /// The option of a unit that raises the dispatcher's own.
    option: &'static str,
}

const OPEN_FILES: Kind = Kind {
    resource: Resource::RLIMIT_NOFILE,
    bytes: false,
    least: LEAST_FILES,
    option: "LimitNOFILE=",
};

const CORE: Kind =
    Kind { resource: Resource::RLIMIT_CORE, bytes: true, least: 0, option: "LimitCORE=" };

const MEMORY: Kind =
    Kind { resource: Resource::RLIMIT_AS, bytes: true, least: LEAST_MEMORY, option: "LimitAS=" };

/// The limits of a pool; each that is missing has its default from `[defaults.spawn.limits]`.
pub(super) fn limits(
    check: &mut Check<'_>,
    own: Option<&LimitKeys>,
    defaults: Option<&LimitKeys>,
) -> ProcessLimits {
    let files = |keys: &'_ LimitKeys| keys.nofile.as_ref().map(value);
    let core = |keys: &'_ LimitKeys| keys.core.as_ref().map(value);
    let memory = |keys: &'_ LimitKeys| keys.memory.as_ref().map(value);
    let mut limit = |kind: &Kind, value: Option<Value>| {
        let value = value?;
        let checked = kind.read(&value).and_then(|limit| kind.permitted(limit, &value));
        check.keep(checked)
    };
    ProcessLimits {
        open_files: limit(&OPEN_FILES, own.and_then(files).or(defaults.and_then(files))),
        core: limit(&CORE, own.and_then(core).or(defaults.and_then(core))),
        memory: limit(&MEMORY, own.and_then(memory).or(defaults.and_then(memory))),
    }
}

/// The key `max_memory`, in bytes.
pub(super) fn bytes(key: &Spanned<Either<ASize>>) -> Checked<u64> {
    let limit = MEMORY.read(&value(key))?;
    if limit.soft != limit.hard || limit.hard == UNLIMITED {
        return Err(Mistake::new(key.span(), "this must be one amount of memory")
            .help("write an amount such as \"512MiB\", or leave the key out"));
    }
    Ok(limit.hard)
}

type Value = Spanned<TextOrNumber>;

fn value<W>(key: &Spanned<Either<W>>) -> Value {
    Spanned::new(key.span(), key.get_ref().0.clone())
}

impl Kind {
    fn read(&self, value: &Value) -> Checked<Limit> {
        let wrong = |what: &str| {
            let help = match self.bytes {
                true => "write bytes, such as 0, \"512MiB\", \"unlimited\", or \"SOFT:HARD\"",
                false => {
                    "write a number, such as 4096, or the soft and the hard limit: \"1024:4096\""
                }
            };
            Mistake::new(value.span(), format!("`{what}` is not a limit")).help(help)
        };
        let limit = match value.get_ref() {
            TextOrNumber::Number(number) => {
                let both = u64::try_from(*number).map_err(|_| wrong(&number.to_string()))?;
                Limit { soft: both, hard: both }
            }
            TextOrNumber::Text(text) => {
                let (soft, hard) = text.split_once(':').unwrap_or((text, text));
                let one = |part| self.amount(part).ok_or_else(|| wrong(part));
                Limit { soft: one(soft)?, hard: one(hard)? }
            }
        };
        if limit.soft > limit.hard {
            return Err(Mistake::new(value.span(), "the soft limit is above the hard limit")
                .help("write the soft limit first: \"1024:4096\""));
        }
        if limit.soft < self.least {
            return Err(Mistake::new(value.span(), "too low for a program to start")
                .help(format!("the least is {}", self.shown(self.least))));
        }
        Ok(limit)
    }

    fn amount(&self, text: &str) -> Option<u64> {
        let text = text.trim();
        if !self.bytes {
            return text.parse().ok();
        }
        if ["unlimited", "infinity"].contains(&text) {
            return Some(UNLIMITED);
        }
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = match unit.trim_start() {
            "" | "B" => 1,
            unit => UNITS.into_iter().find(|(name, _)| *name == unit)?.1,
        };
        number.parse::<u64>().ok()?.checked_mul(unit).filter(|&bytes| bytes != UNLIMITED)
    }

    /// Refuses a hard limit that the kernel would refuse.
    fn permitted(&self, limit: Limit, value: &Value) -> Checked<Limit> {
        if !self.bytes
            && let Some(most) = most_open_files()
            && limit.hard > most
        {
            return Err(Mistake::new(value.span(), format!("the kernel allows {most} open files"))
                .help("raise the sysctl fs.nr_open, or write less"));
        }
        let Ok((_, own)) = getrlimit(self.resource) else { return Ok(limit) };
        if limit.hard > own && !accounts::has(CapabilitySet::SYS_RESOURCE) {
            let message = format!("above the dispatcher's own hard limit, {}", self.shown(own));
            return Err(Mistake::new(value.span(), message).help(format!(
                "raise that limit ({} of its unit), write less, or give the dispatcher CAP_SYS_RESOURCE",
                self.option
            )));
        }
        Ok(limit)
    }

    fn shown(&self, value: u64) -> String {
        let largest = UNITS.iter().rev().find(|(name, unit)| {
            self.bytes && name.ends_with("iB") && value >= *unit && value.is_multiple_of(*unit)
        });
        match largest {
            _ if value == UNLIMITED => "unlimited".to_owned(),
            Some((name, unit)) => format!("{}{name}", value / unit),
            None => value.to_string(),
        }
    }
}

/// The kernel's bound of RLIMIT_NOFILE, which not even root can exceed.
fn most_open_files() -> Option<u64> {
    std::fs::read_to_string("/proc/sys/fs/nr_open").ok()?.trim().parse().ok()
}
