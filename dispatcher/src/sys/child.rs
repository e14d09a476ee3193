//! What a child does between fork and exec, and how it reports which step failed.

use std::ffi::CString;
use std::io;

use rustix::fs::Mode;
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// What the dispatcher may have got for itself, to have the kernel choose workers. A process that
/// has it could change or end that choice.
const OWN: [CapabilitySet; 3] =
    [CapabilitySet::BPF, CapabilitySet::NET_ADMIN, CapabilitySet::SYS_PTRACE];

/// What a child does between fork and exec, in this order.
///
/// The limits come first, because a user without privileges cannot raise them. The directory comes
/// last, so that the child enters only one that its user may enter.
#[derive(Debug, Default)]
pub struct ChildSetup {
    /// Permission bits that new files do not get.
    pub umask: Option<u32>,
    /// Resource limits, with the name of each in errors.
    pub limits: Vec<(Step, Resource, Rlimit)>,
    /// Supplementary groups.
    pub groups: Option<Vec<Gid>>,
    /// Real, effective and saved group.
    pub gid: Option<Gid>,
    /// Real, effective and saved user. A user that is not root has no capabilities.
    pub uid: Option<Uid>,
    /// Working directory.
    pub directory: Option<CString>,
}

/// A step of a [`ChildSetup`] that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The limit of open files.
    OpenFiles = 1,
    /// The limit of core files.
    Core,
    /// The limit of the address space.
    Memory,
    /// The supplementary groups.
    Groups,
    /// The group.
    Group,
    /// The user.
    User,
    /// The end of all capabilities.
    Capabilities,
    /// The working directory.
    Directory,
}

/// The steps by number.
const STEPS: [Step; 8] = [
    Step::OpenFiles,
    Step::Core,
    Step::Memory,
    Step::Groups,
    Step::Group,
    Step::User,
    Step::Capabilities,
    Step::Directory,
];

/// A child can report only one number. The upper half of it is the step, the lower half the error
/// of the kernel, which is at most 4095.
const STEP_SHIFT: u32 = 16;

impl Step {
    /// For a call that failed in this step.
    fn failed(self, errno: rustix::io::Errno) -> io::Error {
        io::Error::from_raw_os_error((self as i32) << STEP_SHIFT | errno.raw_os_error())
    }
}

impl ChildSetup {
    /// Only system calls, without allocation. The calls for users and groups concern the calling
    /// thread, which is the only one of the child.
    pub(super) fn run(&self) -> io::Result<()> {
        if let Some(mask) = self.umask {
            rustix::process::umask(Mode::from_raw_mode(mask));
        }
        for (step, resource, limit) in &self.limits {
            rustix::process::setrlimit(*resource, *limit).map_err(|e| step.failed(e))?;
        }
        if let Some(groups) = &self.groups {
            rustix::thread::set_thread_groups(groups).map_err(|e| Step::Groups.failed(e))?;
        }
        if let Some(gid) = self.gid {
            rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(|e| Step::Group.failed(e))?;
        }
        for capability in OWN {
            match rustix::thread::configure_capability_in_ambient_set(capability, false) {
                // The kernel does not know it, so the process cannot have it.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(Step::Capabilities.failed(error)),
            }
        }
        if let Some(uid) = self.uid {
            rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(|e| Step::User.failed(e))?;
            // The kernel drops them only when root becomes another user. A dispatcher that is not
            // root may have received them from its service manager.
            if !uid.is_root() {
                let none = CapabilitySet::empty();
                let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
                rustix::thread::clear_ambient_capability_set()
                    .and_then(|()| rustix::thread::set_capabilities(None, sets))
                    .map_err(|e| Step::Capabilities.failed(e))?;
            }
        }
        if let Some(directory) = &self.directory {
            rustix::process::chdir(directory.as_c_str()).map_err(|e| Step::Directory.failed(e))?;
        }
        Ok(())
    }
}

/// The step of [`ChildSetup`] that failed, and its error; `None` for an error of another kind.
pub fn failed_step(error: &io::Error) -> Option<(Step, io::Error)> {
    let number = error.raw_os_error()?;
    let step = usize::try_from(number >> STEP_SHIFT).ok()?.checked_sub(1)?;
    let errno = number & ((1 << STEP_SHIFT) - 1);
    Some((*STEPS.get(step)?, io::Error::from_raw_os_error(errno)))
}
