//! Listeners that were open before the programs were attached.
//!
//! The program registers a listener when it begins to listen. One that listens already is found in
//! the kernel's list of sockets, fetched from its process as a descriptor, and registered from
//! here. The connections that it accepts from then on count as others do. Those that it has
//! accepted before do not: the program watches only sockets that a registered listener made.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::error::Error;
use crate::layout::{Address, WorkerSettings};
use crate::sockets::{self, Socket};
use crate::steering::{Steering, check_worker};
use crate::sys;

/// Descendants of a cgroup that are looked at.
const MAX_CGROUPS: usize = 4096;

const CAPABILITY: &str = "grant CAP_SYS_PTRACE (in the unit: AmbientCapabilities=CAP_SYS_PTRACE), \
                          or restart the server: then its listener registers by itself";

/// The processes of a cgroup and its descendants.
struct Group {
    path: PathBuf,
    /// The identifiers of the cgroups.
    ids: BTreeSet<u64>,
    processes: Vec<u32>,
}

/// Why a process has not given its descriptor.
enum Absent {
    /// It does not have the socket, or has ended.
    Elsewhere,
    /// The kernel does not let this process look.
    Forbidden(u32),
    Failed(io::Error),
}

impl Steering {
    /// Registers the listeners that are open at the addresses of a worker and are not registered,
    /// because they were opened before [`Steering::load`], or the worker was removed and added
    /// again ([`Steering::former_worker`]). `cgroup` is that of the workers. Returns
    /// the addresses of the listeners that are registered now.
    ///
    /// It needs the right to fetch descriptors of the server: CAP_SYS_PTRACE, or the same user if
    /// the kernel allows that (`kernel.yama.ptrace_scope` 0). Connections that the listener has
    /// accepted before are not counted. The end of such a listener is not reported: call
    /// [`Steering::verify_listeners`] about once a second.
    ///
    /// # Errors
    ///
    /// [`Error::Listener`] with the reason if one cannot be registered; those before it are.
    /// [`Error::Invalid`] for a number out of range, [`Error::Path`] if the cgroup cannot be read,
    /// [`Error::System`] if the kernel fails.
    pub fn adopt_listeners(
        &mut self,
        worker: u32,
        cgroup: &Path,
    ) -> Result<Vec<SocketAddr>, Error> {
        check_worker(worker)?;
        let own: Vec<SocketAddr> = self
            .addresses()?
            .into_iter()
            .filter_map(|(address, of)| (of == worker).then_some(address))
            .collect();
        let mut found = Vec::new();
        self.read_sockets(sockets::LISTENING, &mut |socket| {
            let local = Address::from(socket.local).socket_addr();
            if socket.owner.is_none_or(|owner| owner.worker == worker) && own.contains(&local) {
                found.push(socket);
            }
        })?;
        // The worker was removed while it listened, and has come back.
        let given = [false, true].map(|is_v6| self.listener(worker, is_v6));
        let [v4, v6] = given.map(|listener| listener.map(|it| it.is_some()));
        let (v4, v6) = (v4?, v6?);
        found.retain(|it| it.owner.is_none() || !(if it.is_v6 { v6 } else { v4 }));
        if found.is_empty() {
            return Ok(Vec::new());
        }
        let group = Group::read(cgroup)?;
        found.into_iter().map(|socket| self.adopt_listener(worker, &socket, &group)).collect()
    }

    /// Takes over the listeners of shared ports that the processes of a worker have from an earlier
    /// process of this program. Returns the number of its worker: after [`Steering::adopt`] the one
    /// that it had, or else `free`, whose connections of before are not counted. `None` if they
    /// have closed all.
    ///
    /// It needs the right to fetch descriptors, as [`Steering::adopt_listeners`]. `cgroup` is the
    /// one to which the programs are attached.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if they have no listener at one of the public addresses, or there
    /// are no such addresses; [`Error::Listener`] if it may not be fetched, or was opened outside
    /// of the cgroup; otherwise as [`Steering::take_listeners`].
    pub fn take_listeners_of(
        &mut self,
        processes: &[u32],
        cgroup: &Path,
        free: u32,
    ) -> Result<Option<u32>, Error> {
        let group = Group::read(cgroup)?;
        let publics = self.public_addresses()?;
        let mut found = Vec::new();
        self.read_sockets(sockets::LISTENING, &mut |socket| {
            if publics.contains(&Address::from(socket.local).socket_addr()) {
                found.push(socket);
            }
        })?;
        let mut listeners = Vec::new();
        for socket in found {
            match descriptor_of_any(processes, &socket) {
                Ok(_) if socket.cgroup.is_some_and(|id| !group.ids.contains(&id)) => {
                    let reason = outside(&group);
                    return Err(Error::Listener { address: socket.local, reason });
                }
                Ok(listener) => listeners.push((socket.owner, listener)),
                Err(Absent::Elsewhere) => {}
                Err(Absent::Forbidden(pid)) => {
                    let reason = format!(
                        "CAP_SYS_PTRACE is missing to fetch it from process {pid}: {CAPABILITY}"
                    );
                    return Err(Error::Listener { address: socket.local, reason });
                }
                Err(Absent::Failed(error)) => {
                    let reason = error.to_string();
                    return Err(Error::Listener { address: socket.local, reason });
                }
            }
        }
        if publics.is_empty() {
            return Err(Error::Invalid("the pool has no public address".to_owned()));
        }
        if listeners.is_empty() {
            return Ok(None);
        }
        if listeners.len() < publics.len() {
            let many = (listeners.len(), publics.len());
            let first = processes.first().copied().unwrap_or(0);
            let text = format!("process {first} has {} of {} listeners", many.0, many.1);
            return Err(Error::Invalid(text));
        }
        let owner = listeners.iter().find_map(|(owner, _)| *owner);
        let worker = owner.map_or(free, |owner| owner.worker);
        if self.worker(worker)?.weight == 0 {
            self.set_worker(worker, WorkerSettings { draining: 1, ..WorkerSettings::new(1) })?;
        }
        let listeners = listeners.into_iter().map(|(_, listener)| listener).collect();
        self.take_listeners(worker, listeners)?;
        Ok(Some(worker))
    }

    /// The number that a removed worker had, if a listener of it is still open at one of these
    /// addresses. Its connections count there, so it is the number to be used again for the server
    /// at this address: [`Steering::is_free`] is false, and [`Steering::adopt_listeners`] gives a
    /// listener to no other number.
    ///
    /// # Errors
    ///
    /// As [`Steering::verify_listeners`].
    pub fn former_worker(&self, own: impl Fn(SocketAddr) -> bool) -> Result<Option<u32>, Error> {
        let mut found = None;
        self.read_sockets(sockets::LISTENING, &mut |socket| {
            let local = Address::from(socket.local).socket_addr();
            found = found.or(socket.owner.filter(|_| own(local)).map(|owner| owner.worker));
        })?;
        let Some(worker) = found else { return Ok(None) };
        let is_removed = self.addresses()?.iter().all(|(_, of)| *of != worker);
        Ok(is_removed.then_some(worker))
    }

    fn adopt_listener(
        &mut self,
        worker: u32,
        socket: &Socket,
        group: &Group,
    ) -> Result<SocketAddr, Error> {
        let failed = |reason: String| Error::Listener { address: socket.local, reason };
        if socket.cgroup.is_some_and(|id| !group.ids.contains(&id)) {
            return Err(failed(outside(group)));
        }
        let listener = group.descriptor(socket).map_err(|absent| {
            failed(match absent {
                Absent::Elsewhere => format!(
                    "no process of {} has it as a TCP socket (MPTCP cannot be steered)",
                    group.path.display()
                ),
                Absent::Forbidden(pid) => format!(
                    "CAP_SYS_PTRACE is missing to fetch it from process {pid}: {CAPABILITY}"
                ),
                Absent::Failed(error) => error.to_string(),
            })
        })?;
        let is_counted = socket.owner.is_some();
        self.register(worker, socket.is_v6, is_counted, &listener).map_err(|error| {
            if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
                return failed("it is no TCP socket that can be steered".to_owned());
            }
            failed(error.to_string())
        })?;
        Ok(socket.local)
    }

    /// What the program does for a listener that begins to listen. `is_counted`: it did.
    fn register(
        &mut self,
        worker: u32,
        is_v6: bool,
        is_counted: bool,
        listener: &OwnedFd,
    ) -> io::Result<()> {
        let owners = self.maps.owners()?;
        let index = 2 * worker + u32::from(is_v6);
        if is_counted {
            return sys::set_socket(self.maps.listeners.fd().as_fd(), index, listener.as_fd());
        }
        sys::set_owner(owners, listener.as_fd(), worker)?;
        if let Err(error) =
            sys::set_socket(self.maps.listeners.fd().as_fd(), index, listener.as_fd())
        {
            // The first error is the one to report.
            let _ = sys::clear_owner(owners, listener.as_fd());
            return Err(error);
        }
        self.maps.live_counts.add_listener(worker, is_v6);
        Ok(())
    }

    /// The kernel's list of sockets of the pool's network namespace.
    pub(crate) fn read_sockets(
        &self,
        states: u32,
        each: &mut dyn FnMut(Socket),
    ) -> Result<(), Error> {
        let failed = |error| Error::System { step: "read the kernel's list of sockets", error };
        if crate::pins::own_namespace()? != self.settings.netns {
            let text = "the pool belongs to another network namespace than this thread";
            return Err(Error::Invalid(text.to_owned()));
        }
        let owners = self.maps.owners().map_err(failed)?;
        sockets::read(Some(owners), states, each).map_err(failed)
    }
}

fn outside(group: &Group) -> String {
    format!(
        "it was opened outside of {}, so its connections could not be counted: start its server \
         there",
        group.path.display()
    )
}

impl Group {
    fn read(path: &Path) -> Result<Group, Error> {
        let mut group = Group { path: path.into(), ids: BTreeSet::new(), processes: Vec::new() };
        let mut folders = vec![path.to_path_buf()];
        while let Some(folder) = folders.pop() {
            let read = group.add(&folder, &mut folders);
            let gone = folder != path;
            match read {
                // A descendant that was removed meanwhile.
                Err(error) if gone && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    let step = "read the cgroup of the workers";
                    return Err(Error::Path { step, path: folder, error, help: None });
                }
                Ok(()) if group.ids.len() > MAX_CGROUPS => {
                    let path = path.display();
                    return Err(Error::Invalid(format!("{path}: more than {MAX_CGROUPS} cgroups")));
                }
                Ok(()) => {}
            }
        }
        Ok(group)
    }

    fn add(&mut self, folder: &Path, folders: &mut Vec<PathBuf>) -> io::Result<()> {
        // The identifier of a cgroup is the number of its directory.
        self.ids.insert(fs::metadata(folder)?.ino());
        let processes = match fs::read_to_string(folder.join("cgroup.procs")) {
            // A threaded cgroup: its processes are listed above it.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
            processes => processes?,
        };
        self.processes.extend(processes.lines().filter_map(|line| line.parse::<u32>().ok()));
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            }
        }
        Ok(())
    }

    /// The descriptor of a socket, from any process of the group that has it.
    fn descriptor(&self, socket: &Socket) -> Result<OwnedFd, Absent> {
        descriptor_of_any(&self.processes, socket)
    }
}

fn descriptor_of_any(processes: &[u32], socket: &Socket) -> Result<OwnedFd, Absent> {
    let mut worst = Absent::Elsewhere;
    for &pid in processes {
        match descriptor_of(pid, socket) {
            Ok(descriptor) => return Ok(descriptor),
            Err(Absent::Elsewhere) => {}
            Err(absent) => worst = absent,
        }
    }
    Err(worst)
}

fn descriptor_of(pid: u32, socket: &Socket) -> Result<OwnedFd, Absent> {
    let absent = |error: io::Error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH | libc::EBADF) => Absent::Elsewhere,
        Some(libc::EACCES | libc::EPERM) => Absent::Forbidden(pid),
        _ => Absent::Failed(error),
    };
    // `fdinfo` instead of `fd`: CAP_SYS_PTRACE is enough for descriptors of another user.
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).map_err(absent)? {
        let entry = entry.map_err(absent)?;
        // A descriptor that was closed meanwhile has none.
        let Ok(info) = fs::read_to_string(entry.path()) else { continue };
        if inode_of(&info) != Some(socket.inode.into()) {
            continue;
        }
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Some(pid_number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { continue };
        let process = pidfd_open(pid_number, PidfdFlags::empty()).map_err(|e| absent(e.into()))?;
        let descriptor = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())
            .map_err(|error| absent(error.into()))?;
        // Inode numbers are unique among sockets only, and the descriptor may be another by now.
        if rustix::net::sockopt::socket_cookie(&descriptor).is_ok_and(|is| is == socket.cookie) {
            return Ok(descriptor);
        }
    }
    Err(Absent::Elsewhere)
}

/// The inode number in a file of `/proc/PID/fdinfo`.
fn inode_of(info: &str) -> Option<u64> {
    info.lines().find_map(|line| line.strip_prefix("ino:")?.trim().parse().ok())
}
