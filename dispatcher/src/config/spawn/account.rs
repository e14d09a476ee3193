//! `user` and `group` of `[pool.NAME.spawn]`, and what the account of a process can reach.

use std::ffi::CString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group, Uid, User, getegid, geteuid, getgrouplist};
use rustix::thread::CapabilitySet;
use toml::Spanned;

use super::super::accounts::{self, Kind};
use super::super::error::Mistake;
use super::super::validate::{Check, Checked};
use super::super::value::{AnAccount, Either, TextOrNumber};
use super::super::{Account, Output, ProcessSetup, UnixEndpoint, UnixSource};

type Key = Spanned<Either<AnAccount>>;

/// The account of a process; `None` for the dispatcher's own, and after a mistake.
pub(super) fn account(
    check: &mut Check<'_>,
    user: Option<&Key>,
    group: Option<&Key>,
) -> Option<Account> {
    let key = user.or(group)?;
    let login = match user.map(find_user) {
        Some(found) => check.keep(found)?,
        None => Login { uid: geteuid(), account: User::from_uid(geteuid()).ok().flatten() },
    };
    let gid = match group.map(find_group) {
        Some(found) => check.keep(found)?,
        // The dispatcher's own group is not the user's.
        None => match &login.account {
            Some(account) => account.gid,
            None => {
                let message = format!("user {} has no account on this machine", login.uid);
                check.mistake(
                    Mistake::new(key.span(), message)
                        .help("its group is not known: add `group`, with a name or a number"),
                );
                return None;
            }
        },
    };
    let (own_uid, own_gid) = (geteuid(), getegid());
    check.keep(permission(user, login.uid != own_uid, Permission::User))?;
    check.keep(permission(group.or(user), gid != own_gid, Permission::Group))?;
    // Without the permission the ids are the dispatcher's own, so its groups may stay.
    let groups = match accounts::has(CapabilitySet::SETGID) {
        true => Some(check.keep(groups(key, login.account.as_ref(), gid))?),
        false => None,
    };
    let variables = match (user, &login.account) {
        (None, _) => Vec::new(),
        (Some(_), account) => variables(account.as_ref()),
    };
    let group_name = Group::from_gid(gid).ok().flatten().map(|group| group.name);
    Some(Account {
        uid: login.uid.as_raw(),
        gid: gid.as_raw(),
        groups,
        user_text: shown(login.uid.as_raw(), login.account.map(|account| account.name)),
        group_text: shown(gid.as_raw(), group_name),
        variables,
    })
}

fn shown(id: u32, name: Option<String>) -> String {
    match name {
        Some(name) => format!("{id} ({name})"),
        None => id.to_string(),
    }
}

struct Login {
    uid: Uid,
    account: Option<User>,
}

fn find_user(key: &Key) -> Checked<Login> {
    let id = match &key.get_ref().0 {
        TextOrNumber::Number(number) => Some(id(key, *number, Kind::User)?),
        TextOrNumber::Text(text) => text.parse().ok().filter(|&id: &u32| id != u32::MAX),
    };
    let account = match (id, &key.get_ref().0) {
        (None, TextOrNumber::Text(name)) => User::from_name(name),
        (id, _) => User::from_uid(Uid::from_raw(id.unwrap_or_default())),
    };
    let account = account.map_err(|error| not_looked_up(key, Kind::User, error))?;
    match (id, account) {
        (Some(id), account) => Ok(Login { uid: Uid::from_raw(id), account }),
        (None, Some(account)) => Ok(Login { uid: account.uid, account: Some(account) }),
        (None, None) => Err(unknown(key, Kind::User)),
    }
}

fn find_group(key: &Key) -> Checked<Gid> {
    match &key.get_ref().0 {
        TextOrNumber::Number(number) => id(key, *number, Kind::Group).map(Gid::from_raw),
        TextOrNumber::Text(text) => match accounts::find(text, Kind::Group) {
            Ok(Some(id)) => Ok(Gid::from_raw(id)),
            Ok(None) => Err(unknown(key, Kind::Group)),
            Err(error) => Err(not_looked_up(key, Kind::Group, error)),
        },
    }
}

fn id(key: &Key, number: i64, kind: Kind) -> Checked<u32> {
    // The kernel uses the largest id for "no change".
    u32::try_from(number)
        .ok()
        .filter(|&id| id != u32::MAX)
        .ok_or_else(|| Mistake::new(key.span(), format!("{number} is not a {} id", kind.name())))
}

fn unknown(key: &Key, kind: Kind) -> Mistake {
    let name = match &key.get_ref().0 {
        TextOrNumber::Text(text) => text.clone(),
        TextOrNumber::Number(number) => number.to_string(),
    };
    Mistake::new(key.span(), format!("unknown {} `{name}`", kind.name())).help(format!(
        "the name does not exist on this machine: create it, or write another{}",
        kind.hint()
    ))
}

fn not_looked_up(key: &Key, kind: Kind, error: nix::Error) -> Mistake {
    Mistake::new(key.span(), format!("the {} cannot be looked up: {error}", kind.name()))
}

/// What the dispatcher may do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Permission {
    User,
    Group,
}

/// Refuses another user or group if the kernel would refuse it.
fn permission(key: Option<&Key>, changes: bool, what: Permission) -> Checked<()> {
    let Some(key) = key.filter(|_| changes) else { return Ok(()) };
    // A process of another user can be stopped only with CAP_KILL.
    let needed: &[(&str, CapabilitySet)] = match what {
        Permission::User => &[
            ("CAP_SETUID", CapabilitySet::SETUID),
            ("CAP_SETGID", CapabilitySet::SETGID),
            ("CAP_KILL", CapabilitySet::KILL),
        ],
        Permission::Group => &[("CAP_SETGID", CapabilitySet::SETGID)],
    };
    let missing: Vec<&str> =
        needed.iter().filter(|(_, one)| !accounts::has(*one)).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let (what, own) = match what {
        Permission::User => ("user", geteuid().as_raw()),
        Permission::Group => ("group", getegid().as_raw()),
    };
    let message = format!(
        "the dispatcher may not start processes as another {what}: it runs as {what} {own} without {}",
        missing.join(", ")
    );
    Err(Mistake::new(key.span(), message).help(format!(
        "run it (and this check) as root, give it these capabilities (AmbientCapabilities= of its \
         unit), or remove `{what}`"
    )))
}

/// All groups of the process: those of the user, and `gid`.
fn groups(key: &Key, account: Option<&User>, gid: Gid) -> Checked<Vec<u32>> {
    let Some(account) = account else { return Ok(vec![gid.as_raw()]) };
    let name = CString::new(account.name.as_str()).unwrap_or_default();
    let found = getgrouplist(&name, gid).map_err(|error| {
        let message = format!("the groups of user `{}` cannot be looked up: {error}", account.name);
        Mistake::new(key.span(), message)
    })?;
    let mut groups: Vec<u32> = found.into_iter().map(Gid::as_raw).collect();
    groups.sort_unstable();
    groups.dedup();
    Ok(groups)
}

/// The variables that a login sets. Those of the dispatcher's own user would be wrong.
fn variables(account: Option<&User>) -> Vec<(String, Option<String>)> {
    let text = |path: &Path| path.to_str().filter(|path| !path.is_empty()).map(str::to_owned);
    let variables = [
        ("HOME", account.and_then(|account| text(&account.dir))),
        ("USER", account.map(|account| account.name.clone())),
        ("LOGNAME", account.map(|account| account.name.clone())),
        ("SHELL", account.and_then(|account| text(&account.shell))),
    ];
    variables.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A warning if the account cannot connect to the dispatch socket. The kernel decides; access
/// control lists, for example, are not considered here.
pub(super) fn unreachable(account: &Account, key: &Key, socket: &UnixEndpoint) -> Option<Mistake> {
    let UnixSource::Path(path) = &socket.source else { return None };
    let user = &account.user_text;
    if let Some(folder) = closed_folder(account, path) {
        let message =
            format!("user {user} cannot reach the dispatch socket in {}", folder.display());
        return Some(Mistake::new(key.span(), message).help(format!(
            "the processes cannot join: let the user search the directory, for example with \
             `chmod o+x {}`",
            folder.display()
        )));
    }
    let owner = socket.user.unwrap_or_else(|| geteuid().as_raw());
    let group = socket.group.unwrap_or_else(|| getegid().as_raw());
    (!allows(account, (socket.mode, owner, group), 0o2)).then(|| {
        let message = format!(
            "user {user} cannot connect to the dispatch socket: its mode is {:04o}",
            socket.mode
        );
        Mistake::new(key.span(), message).help(
            "the processes cannot join: set `dispatch_socket_mode` to \"0666\", or \
             `dispatch_socket_group` to a group of the user",
        )
    })
}

/// A warning if a dispatcher that adopts a process of this account could not read its output.
pub(super) fn unreadable(setup: &ProcessSetup, key: &Key) -> Option<Mistake> {
    let account = setup.account.as_ref().filter(|_| setup.output == Output::Log)?;
    let readable = account.uid == geteuid().as_raw() || accounts::has(CapabilitySet::SYS_PTRACE);
    (!readable).then(|| {
        let message = format!(
            "after a restart the dispatcher may not read the output of processes of user {}: it \
             lacks CAP_SYS_PTRACE",
            account.user_text
        );
        Mistake::new(key.span(), message).help(
            "such a process waits when its pipe is full: give the dispatcher this capability, too, \
             or set output = \"inherit\"",
        )
    })
}

/// The first directory on the way to `path` that the account may not search.
pub(super) fn closed_folder(account: &Account, path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    let folder = path.parent()?;
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let mut folders: Vec<&Path> = folder.ancestors().collect();
    folders.reverse();
    let closed = folders.into_iter().find(|folder| {
        // A directory that does not exist yet is not known to be closed.
        std::fs::metadata(folder)
            .is_ok_and(|meta| !allows(account, (meta.mode(), meta.uid(), meta.gid()), 0o1))
    });
    closed.map(Path::to_owned)
}

/// Whether the account may execute this file, or search this directory.
pub(super) fn executes(account: &Account, path: &Path) -> bool {
    closed_folder(account, path).is_none()
        && std::fs::metadata(path)
            .is_ok_and(|meta| allows(account, (meta.mode(), meta.uid(), meta.gid()), 0o1))
}

/// Whether permission bits with this owner and group give the account all of `wanted`.
fn allows(account: &Account, (mode, owner, group): (u32, u32, u32), wanted: u32) -> bool {
    let in_group = account.gid == group
        || account.groups.as_ref().is_some_and(|groups| groups.contains(&group));
    let shift = match () {
        () if account.uid == 0 => return true,
        () if account.uid == owner => 6,
        () if in_group => 3,
        () => 0,
    };
    mode >> shift & wanted == wanted
}
