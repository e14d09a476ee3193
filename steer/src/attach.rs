//! Where programs are attached: the cgroup of the workers and the network namespace of the calling
//! thread.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockopt, SkLookup, SockOps};
use rustix::fs::{Mode, OFlags};

use crate::error::Error;
use crate::machine::{self, Places};
use crate::steering::Options;
use crate::sys;

/// The cgroup of the options, on a machine that has all that steering needs.
pub(crate) fn usable_cgroup(options: &Options) -> Result<OwnedFd, Error> {
    let missing = machine::missing(&Places::default());
    if missing.is_empty() { open_cgroup(&options.cgroup) } else { Err(Error::Missing(missing)) }
}

/// Attaches a program to the cgroup.
pub(crate) fn events(program: &mut SockOps, cgroup: OwnedFd) -> Result<FdLink, Error> {
    let refused = |error| Error::refused("count connections of the cgroup", error);
    // No flags: programs attached by links always allow others beside them.
    let id = program.attach(cgroup, CgroupAttachMode::Single).map_err(refused)?;
    let link = program.take_link(id).map_err(refused)?;
    FdLink::try_from(link).map_err(|error| Error::refused("keep a link", error))
}

/// Attaches a program to the cgroup. aya does not give the link of such a program away.
pub(crate) fn guard(program: &CgroupSockopt, cgroup: &OwnedFd) -> Result<OwnedFd, Error> {
    let step = "guard the listeners of the cgroup";
    let program = program.fd().map_err(|error| Error::refused(step, error))?;
    sys::link_setsockopt(program.as_fd(), cgroup.as_fd())
        .map_err(|error| Error::System { step, error })
}

/// Attaches a program to the network namespace of the calling thread.
pub(crate) fn lookup(program: &mut SkLookup) -> Result<FdLink, Error> {
    let refused = |error| Error::refused("attach to the network namespace", error);
    let id = program.attach(open_namespace()?).map_err(refused)?;
    Ok(FdLink::from(program.take_link(id).map_err(refused)?))
}

fn open_cgroup(path: &Path) -> Result<OwnedFd, Error> {
    let step = "use the cgroup of the workers";
    let failed = |error: std::io::Error, help| Error::Path { step, path: path.into(), error, help };
    let opened =
        rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let cgroup = opened.map_err(|error| failed(error.into(), None))?;
    if !machine::is_cgroup2(&cgroup) {
        let error = std::io::Error::other("not a directory of cgroup v2");
        return Err(failed(error, Some("give one below the mount point of cgroup2".to_owned())));
    }
    Ok(cgroup)
}

fn open_namespace() -> Result<OwnedFd, Error> {
    // Of the thread: its namespace can differ from that of the process.
    let path = "/proc/thread-self/ns/net";
    let opened = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|error| Error::Path {
        step: "open the network namespace",
        path: path.into(),
        error: error.into(),
        help: Some("mount /proc".to_owned()),
    })
}
