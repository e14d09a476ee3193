//! `[[pool.NAME.member]]`: workers that something else starts.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use toml::Spanned;

use super::super::error::Mistake;
use super::super::file::PoolKeys;
use super::super::validate::{Check, Checked, check_name};
use super::{MAX_STEERED_WORKERS, Member};

pub(super) fn members(check: &mut Check<'_>, pool: &str, keys: &PoolKeys) -> Vec<Member> {
    let mut members: Vec<Member> = Vec::with_capacity(keys.member.len());
    if keys.member.len() > MAX_STEERED_WORKERS as usize {
        let message = format!("a steered pool has at most {MAX_STEERED_WORKERS} members");
        check.mistake(Mistake::new(keys.member[0].span(), message));
    }
    for (number, entry) in (1..).zip(&keys.member) {
        let entry = entry.get_ref();
        let Some(address) = check.keep(member_address(&entry.address)) else { continue };
        let Some(cgroup) = check.keep(member_cgroup(&entry.cgroup)) else { continue };
        let name = match &entry.name {
            Some(name) => {
                check.keep(check_name(name, "worker"));
                name.get_ref().clone()
            }
            None => format!("{pool}-{number}"),
        };
        if members.iter().any(|other| other.address == address) {
            let message = format!("{address} is the address of another member");
            check.mistake(Mistake::new(entry.address.span(), message));
        }
        if members.iter().any(|other| other.name == name) {
            let span = entry.name.as_ref().map_or(entry.address.span(), Spanned::span);
            check.mistake(Mistake::new(span, format!("another member has the name `{name}`")));
        }
        members.push(Member {
            name,
            address,
            cgroup,
            weight: entry.weight.map_or(1, |it| u16::try_from(it.0).unwrap_or(u16::MAX)),
            priority: entry.priority.map_or(0, |it| u16::try_from(it.0).unwrap_or(u16::MAX)),
        });
    }
    members
}

fn member_address(text: &Spanned<String>) -> Checked<SocketAddr> {
    let address: SocketAddr = text.get_ref().parse().map_err(|_| {
        Mistake::new(text.span(), "not an address and a port")
            .help("where the worker listens, such as \"127.0.0.1:8001\" or \"[::1]:8001\"")
    })?;
    if address.port() == 0 {
        return Err(Mistake::new(text.span(), "a worker has a port of its own")
            .help("the one at which it listens"));
    }
    Ok(address)
}

fn member_cgroup(path: &Spanned<PathBuf>) -> Checked<PathBuf> {
    if path.get_ref().is_absolute() {
        return Ok(path.get_ref().clone());
    }
    Err(Mistake::new(path.span(), "the cgroup is an absolute path").help(
        "the cgroup v2 directory of its unit, such as \
         \"/sys/fs/cgroup/system.slice/web@1.service\"",
    ))
}

/// Whether a cgroup exists now, for a warning.
pub(super) fn missing_cgroups(check: &mut Check<'_>, keys: &PoolKeys) {
    for entry in &keys.member {
        let path = &entry.get_ref().cgroup;
        let above = path.get_ref().parent().unwrap_or(Path::new("/"));
        if !above.is_dir() {
            let message = format!("there is no directory `{}`", above.display());
            check.warn(
                Mistake::new(path.span(), message)
                    .help("until it exists, the kernel cannot choose the workers of this pool"),
            );
        }
    }
}
