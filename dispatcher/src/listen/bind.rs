//! Makes the sockets that the dispatcher listens on: options, permissions, the lock file beside a
//! Unix socket, and the removal of the socket file. Does not read from the sockets.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::net::sockopt;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::error::{Holder, RunError};
use super::inherit::Inherited;
use crate::background::cleaner::Cleaner;
use crate::background::closer::{Closers, Owner, Task};
use crate::background::logger::value;
use crate::config::{Address, ListenerOptions, UnixEndpoint, UnixSource};
use crate::listen::files::{PathLock, SocketFile};
use crate::sys;

/// A listening socket, and the file and lock to remove with it.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) fd: OwnedFd,
    /// The bound address, for display.
    pub(crate) address: String,
    /// Whether a service manager also keeps this socket open: its queue then outlives the
    /// dispatcher.
    pub(crate) inherited: bool,
    /// The name by which a service manager passed the socket.
    pub(crate) name: Option<String>,
    pub(crate) path: Option<OwnedPath>,
}

impl Listening {
    /// The same socket with another descriptor.
    pub(crate) fn duplicate(&self, fd: OwnedFd) -> Listening {
        let address = self.address.clone();
        Listening { fd, address, inherited: false, name: None, path: None }
    }

    /// Splits the dispatch socket into descriptor, address and file.
    pub(crate) fn into_parts(self) -> (OwnedFd, String, Option<OwnedPath>) {
        (self.fd, self.address, self.path)
    }

    /// The Unix socket for another thread to serve, and the file to remove at the end.
    pub(crate) fn into_listener(self) -> (UnixListener, Option<OwnedPath>) {
        (self.fd.into(), self.path)
    }

    /// Closes a TCP socket at once, so that no client can connect any more. Clients of a Unix
    /// socket that were not accepted may have sent descriptors, and the last close of such a
    /// descriptor may block: the closers close that socket, and the cleaner removes its file.
    pub(crate) fn close(self, cleaner: &mut Cleaner, closers: &mut Closers) {
        if self.address.starts_with("unix:") {
            closers.task(Task::Drop(Owner::Other, Box::new(self.fd)));
        }
        if let Some(path) = self.path {
            cleaner.clean(path);
        }
    }

    /// The socket file, if the dispatcher has made one.
    pub(crate) fn file(&self) -> Option<SocketFile> {
        self.path.as_ref().map(OwnedPath::file)
    }

    pub(crate) fn inherited(fd: OwnedFd, name: &str) -> Listening {
        let address = local_address(&fd);
        Listening { fd, address, inherited: true, name: Some(name.to_owned()), path: None }
    }

    /// Whether this is a Unix socket.
    pub(crate) fn is_unix(&self) -> bool {
        self.address.starts_with("unix:")
    }
}

/// A socket file that the dispatcher made. Dropping it removes the file, unless the file has been
/// replaced, or another dispatcher uses it. The lock keeps a second dispatcher away.
#[derive(Debug)]
pub(crate) struct OwnedPath(SocketFile);

impl OwnedPath {
    pub(crate) fn new(file: SocketFile) -> OwnedPath {
        OwnedPath(file)
    }

    /// A description of the file, for other threads.
    pub(crate) fn file(&self) -> SocketFile {
        self.0.clone()
    }
}

impl Drop for OwnedPath {
    fn drop(&mut self) {
        if !self.0.lock.is_shared() && !self.0.is_missing() {
            let _ = std::fs::remove_file(&self.0.path);
        }
    }
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Opens a client listener: one socket, or all sockets that a service manager passed under its
/// name.
pub(crate) fn listen(
    address: &Address,
    options: &ListenerOptions,
    inherited: &mut Inherited,
) -> Result<Vec<Listening>, RunError> {
    match address {
        Address::Tcp(addr) => {
            not_passed(inherited, address, "address")?;
            let listening = listen_tcp(*addr, options).map_err(|error| RunError::Bind {
                what: addr.to_string(),
                error: explain(error, addr.port()),
            })?;
            Ok(vec![listening])
        }
        Address::Unix(path) => {
            not_passed(inherited, address, "address")?;
            let attributes = SocketAttributes {
                backlog: options.backlog,
                mode: options.mode,
                user: None,
                group: None,
            };
            listen_unix(path, SocketType::STREAM, attributes, None).map(|l| vec![l])
        }
        // The service manager has set the options of these sockets.
        Address::Systemd(name) => {
            let fds = inherited.take(name, SocketType::STREAM)?;
            Ok(fds.into_iter().map(|fd| Listening::inherited(fd, name)).collect())
        }
    }
}

/// The address as it identifies a listener in a take-over; `None` for a socket of a service
/// manager.
pub(crate) fn identity(address: &Address) -> Option<String> {
    match address {
        Address::Tcp(address) => Some(address.to_string()),
        Address::Unix(path) => Some(identity_of_path(path)),
        Address::Systemd(_) => None,
    }
}

/// The same for a Unix socket.
pub(crate) fn identity_of_path(path: &Path) -> String {
    format!("unix:{}", std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display())
}

/// Refuses an address that a service manager has passed a socket for. To bind it a second time
/// would fail with an error that seems to concern another process.
fn not_passed(inherited: &Inherited, address: &Address, key: &str) -> Result<(), RunError> {
    let Some(wanted) = identity(address) else { return Ok(()) };
    match inherited.names().find(|(_, fd)| local_address(fd) == wanted) {
        None => Ok(()),
        Some((name, _)) => Err(RunError::Inherited(format!(
            "{wanted} was passed by systemd already, as `{name}`; write {key} = \"systemd:{name}\""
        ))),
    }
}

/// The attributes of a Unix socket file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SocketAttributes {
    pub(crate) backlog: u32,
    pub(crate) mode: u32,
    pub(crate) user: Option<u32>,
    pub(crate) group: Option<u32>,
}

impl SocketAttributes {
    pub(crate) fn of(endpoint: &UnixEndpoint) -> SocketAttributes {
        let UnixEndpoint { mode, user, group, .. } = *endpoint;
        SocketAttributes { backlog: 4096, mode, user, group }
    }
}

/// Makes a socket again after its file was removed. The lock for the old file stays in use.
pub(crate) fn listen_again(
    file: &SocketFile,
    kind: SocketType,
    attributes: SocketAttributes,
) -> Result<Listening, RunError> {
    listen_unix(&file.path, kind, attributes, Some(file))
}

/// Opens a TCP address with the usual options.
pub(crate) fn listen_here(address: SocketAddr) -> Result<Listening, RunError> {
    listen_tcp(address, &ListenerOptions::default()).map_err(|error| RunError::Bind {
        what: address.to_string(),
        error: explain(error, address.port()),
    })
}

/// Opens the dispatch socket (SEQPACKET) or the admin socket (STREAM).
pub(crate) fn listen_endpoint(
    endpoint: &UnixEndpoint,
    kind: SocketType,
    inherited: &mut Inherited,
) -> Result<Listening, RunError> {
    let listening = match &endpoint.source {
        UnixSource::Path(path) => {
            let key = match kind {
                SocketType::SEQPACKET => "dispatch_socket",
                _ => "admin_socket",
            };
            not_passed(inherited, &Address::Unix(path.clone()), key)?;
            listen_unix(path, kind, SocketAttributes::of(endpoint), None)
        }
        UnixSource::Systemd(name) => {
            let mut fds = inherited.take(name, kind)?;
            match (fds.pop(), fds.is_empty()) {
                (Some(fd), true) => Ok(Listening::inherited(fd, name)),
                _ => Err(RunError::Inherited(format!(
                    "systemd:{name}: several sockets of this name; exactly one is wanted here"
                ))),
            }
        }
    };
    if let Ok(listening) = &listening {
        // No client has a reason to send descriptors. Kernels before 6.16 leave them to the
        // receiving threads.
        let _ = sys::refuse_descriptors(&listening.fd);
    }
    listening
}

fn explain(error: io::Error, port: u16) -> io::Error {
    let hint = match error.kind() {
        io::ErrorKind::PermissionDenied if port < 1024 => {
            "ports below 1024 need CAP_NET_BIND_SERVICE, or let systemd listen (address = \"systemd:NAME\")"
        }
        io::ErrorKind::AddrInUse => "another process listens there; see it with: ss -ltnp",
        io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address; free_bind = true binds it all the same"
        }
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{error} ({hint})"))
}

fn listen_tcp(addr: SocketAddr, options: &ListenerOptions) -> io::Result<Listening> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = rustix::net::socket_with(family, SocketType::STREAM, FLAGS, None)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    if options.reuse_port {
        sockopt::set_socket_reuseport(&fd, true)?;
    }
    if addr.is_ipv6() {
        sockopt::set_ipv6_v6only(&fd, options.ipv6_only)?;
    }
    if options.free_bind {
        if addr.is_ipv4() {
            sockopt::set_ip_freebind(&fd, true)?;
        } else {
            sockopt::set_ipv6_freebind(&fd, true)?;
        }
    }
    set_tcp_options(fd.as_fd(), options)?;
    rustix::net::bind(&fd, &addr)?;
    if !options.bind_only {
        rustix::net::listen(&fd, i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
    }
    let address = local_address(&fd);
    Ok(Listening { fd, address, inherited: false, name: None, path: None })
}

/// Sets the options that accepted connections inherit from the listening socket: they cost nothing
/// per connection.
fn set_tcp_options(fd: BorrowedFd<'_>, options: &ListenerOptions) -> io::Result<()> {
    sockopt::set_tcp_nodelay(fd, options.nodelay)?;
    if let Some(idle) = options.keepalive {
        sockopt::set_socket_keepalive(fd, true)?;
        sockopt::set_tcp_keepidle(fd, idle)?;
    }
    if let Some(interval) = options.keepalive_interval {
        sockopt::set_tcp_keepintvl(fd, interval)?;
    }
    if let Some(count) = options.keepalive_count {
        sockopt::set_tcp_keepcnt(fd, count)?;
    }
    if let Some(timeout) = options.user_timeout {
        let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(fd, millis)?;
    }
    if let Some(wait) = options.defer_accept {
        let seconds = u32::try_from(wait.as_secs().max(1)).unwrap_or(u32::MAX);
        sys::set_tcp_option(fd, libc::TCP_DEFER_ACCEPT, seconds)?;
    }
    if let Some(queue) = options.fast_open {
        sys::set_tcp_option(fd, libc::TCP_FASTOPEN, queue)?;
    }
    if let Some(bytes) = options.receive_buffer {
        sockopt::set_socket_recv_buffer_size(fd, bytes as usize)?;
    }
    if let Some(bytes) = options.send_buffer {
        sockopt::set_socket_send_buffer_size(fd, bytes as usize)?;
    }
    Ok(())
}

/// The part of `wanted` that an open socket with `old` can still get, and the names of the other
/// options.
pub(crate) fn changeable(
    old: &ListenerOptions,
    wanted: &ListenerOptions,
) -> (ListenerOptions, Vec<&'static str>) {
    let mut options = wanted.clone();
    let mut fixed = Vec::new();
    for (name, place, was) in [
        // These options determine how the address is bound.
        ("ipv6_only", &mut options.ipv6_only, old.ipv6_only),
        ("reuse_port", &mut options.reuse_port, old.reuse_port),
        ("pool", &mut options.bind_only, old.bind_only),
        ("free_bind", &mut options.free_bind, old.free_bind),
    ] {
        if std::mem::replace(place, was) != was {
            fixed.push(name);
        }
    }
    // The kernel has no way back to its own default.
    for (name, place, was) in [
        ("receive_buffer", &mut options.receive_buffer, old.receive_buffer),
        ("send_buffer", &mut options.send_buffer, old.send_buffer),
        ("keepalive_count", &mut options.keepalive_count, old.keepalive_count),
    ] {
        if place.is_none() && was.is_some() {
            *place = was;
            fixed.push(name);
        }
    }
    if options.keepalive_interval.is_none() && old.keepalive_interval.is_some() {
        options.keepalive_interval = old.keepalive_interval;
        fixed.push("keepalive_interval");
    }
    (options, fixed)
}

/// Changes the options of an open socket, for connections accepted from now on.
pub(crate) fn change_options(
    fd: BorrowedFd<'_>,
    tcp: bool,
    options: &ListenerOptions,
) -> io::Result<()> {
    if tcp {
        if options.keepalive.is_none() {
            sockopt::set_socket_keepalive(fd, false)?;
        }
        if options.user_timeout.is_none() {
            sockopt::set_tcp_user_timeout(fd, 0)?;
        }
        if options.defer_accept.is_none() {
            sys::set_tcp_option(fd, libc::TCP_DEFER_ACCEPT, 0)?;
        }
        if options.fast_open.is_none() {
            sys::set_tcp_option(fd, libc::TCP_FASTOPEN, 0)?;
        }
        set_tcp_options(fd, options)?;
    }
    if !options.bind_only {
        rustix::net::listen(fd, i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
    }
    Ok(())
}

pub(crate) fn listen_unix(
    path: &Path,
    kind: SocketType,
    attributes: SocketAttributes,
    before: Option<&SocketFile>,
) -> Result<Listening, RunError> {
    let bind_error = |error: io::Error| RunError::Bind {
        what: format!("unix:{}", path.display()),
        error: explain_path(error, path),
    };
    let lock_path = beside(path);
    let held = before.filter(|before| before.is_locked(&lock_path));
    let lock = match held {
        Some(before) => Arc::clone(&before.lock),
        None => Arc::new(lock(&lock_path).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => {
                RunError::InUse { path: path.to_owned(), holder: Holder::of_lock(&lock_path) }
            }
            _ => match owner(&lock_path) {
                Some(owner) => RunError::Lock { lock: lock_path.clone(), owner, error },
                // The directory is missing and cannot be made: the error about the socket describes
                // this too.
                None => bind_error(error),
            },
        })?),
    };
    remove_stale(path, kind, bind_error)?;
    let make = || -> io::Result<(OwnedFd, std::fs::Metadata)> {
        let fd = rustix::net::socket_with(AddressFamily::UNIX, kind, FLAGS, None)?;
        rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
        std::os::unix::fs::chown(path, attributes.user, attributes.group)?;
        std::fs::set_permissions(
            path,
            std::os::unix::fs::PermissionsExt::from_mode(attributes.mode),
        )?;
        let made = std::fs::symlink_metadata(path)?;
        // Clients can connect only from here on, so they find the final permissions.
        rustix::net::listen(&fd, i32::try_from(attributes.backlog).unwrap_or(i32::MAX))?;
        Ok((fd, made))
    };
    let (fd, made) = make().map_err(bind_error)?;
    Ok(Listening {
        fd,
        address: format!("unix:{}", path.display()),
        inherited: false,
        name: None,
        path: Some(OwnedPath(SocketFile {
            path: path.to_owned(),
            device: made.dev(),
            inode: made.ino(),
            lock,
        })),
    })
}

/// The path of the lock file of a socket.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

/// Takes the lock that decides between two dispatchers that start at the same moment. The lock file
/// stays: removing it would let a third dispatcher take a new lock.
fn lock(path: &Path) -> io::Result<PathLock> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    PathLock::lock(file)
}

/// Removes a stale socket file. Refuses a socket that is in use, and a file that is no socket.
fn remove_stale(
    path: &Path,
    kind: SocketType,
    bind_error: impl Fn(io::Error) -> RunError,
) -> Result<(), RunError> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(bind_error(error)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(RunError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    let connect = || -> rustix::io::Result<OwnedFd> {
        let probe = rustix::net::socket_with(AddressFamily::UNIX, kind, FLAGS, None)?;
        rustix::net::connect(&probe, &SocketAddrUnix::new(path)?)?;
        Ok(probe)
    };
    let in_use = |holder| Err(RunError::InUse { path: path.to_owned(), holder });
    match connect() {
        // The program that serves the socket may be another kind of program, without this lock.
        Ok(probe) => in_use(Holder::of_socket(&probe)),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::PROTOTYPE) => in_use(Holder::Unknown),
        Err(rustix::io::Errno::CONNREFUSED) => {
            std::fs::remove_file(path).map_err(|error| {
                let about = owner(path).map_or(String::new(), |owner| format!(", which belongs to {owner}"));
                let error = explain_path(error, path);
                bind_error(io::Error::new(
                    error.kind(),
                    format!("{error}: the socket file that an earlier process left there{about}, cannot be removed"),
                ))
            })?;
            log::info!("event=stale_socket_removed path={}", value(path.display()));
            Ok(())
        }
        Err(error) => Err(bind_error(error.into())),
    }
}

/// Explains an error about a path, and what to do.
fn explain_path(error: io::Error, path: &Path) -> io::Error {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let hint = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            format!(
                "does its directory {} exist? systemd makes it with RuntimeDirectory=",
                directory.display()
            )
        }
        io::ErrorKind::PermissionDenied if !path.exists() => match owner(directory) {
            Some(owner) => format!(
                "its directory {} belongs to {owner}; this process is {}",
                directory.display(),
                user(nix::unistd::geteuid().as_raw())
            ),
            None => return error,
        },
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{error} ({hint})"))
}

/// The owner and the permissions of a file, for an error message.
fn owner(path: &Path) -> Option<String> {
    let found = std::fs::symlink_metadata(path).ok()?;
    Some(format!("{}, mode {:04o}", user(found.uid()), found.mode() & 0o7777))
}

/// A user's name or number, for an error message.
fn user(uid: u32) -> String {
    match nix::unistd::User::from_uid(uid.into()) {
        Ok(Some(user)) => format!("user {}", user.name),
        _ => format!("user {uid}"),
    }
}

/// The address a socket is bound to, in the syntax of the configuration.
fn local_address(fd: impl AsFd) -> String {
    match rustix::net::getsockname(fd) {
        Err(_) => String::new(),
        Ok(any) => match SocketAddr::try_from(any.clone()) {
            Ok(addr) => addr.to_string(),
            Err(_) => match SocketAddrUnix::try_from(any) {
                Ok(unix) => match unix.path() {
                    Some(path) => format!("unix:{}", path.to_string_lossy()),
                    None => "unix:".to_owned(),
                },
                Err(_) => String::new(),
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn tuned() -> ListenerOptions {
        ListenerOptions {
            nodelay: false,
            keepalive: Some(Duration::from_secs(60)),
            keepalive_interval: Some(Duration::from_secs(7)),
            user_timeout: Some(Duration::from_secs(9)),
            defer_accept: Some(Duration::from_secs(3)),
            send_buffer: Some(65_536),
            reuse_port: true,
            ..ListenerOptions::default()
        }
    }

    #[test]
    fn options_of_an_open_socket_change_there_and_back() {
        let made = listen_here("127.0.0.1:0".parse().unwrap()).unwrap();
        let fd = made.fd.as_fd();
        let plain = ListenerOptions::default();
        let (options, fixed) = changeable(&plain, &tuned());
        assert_eq!(fixed, ["reuse_port"]);
        assert_eq!(options, ListenerOptions { reuse_port: false, ..tuned() });
        change_options(fd, true, &options).unwrap();
        assert!(!sockopt::tcp_nodelay(fd).unwrap());
        assert!(sockopt::socket_keepalive(fd).unwrap());
        assert_eq!(sockopt::tcp_keepidle(fd).unwrap(), Duration::from_secs(60));
        assert_eq!(sockopt::tcp_user_timeout(fd).unwrap(), 9_000);

        let (back, fixed) = changeable(&options, &plain);
        assert_eq!(fixed, ["send_buffer", "keepalive_interval"], "the kernel has no way back");
        change_options(fd, true, &back).unwrap();
        assert!(sockopt::tcp_nodelay(fd).unwrap());
        assert!(!sockopt::socket_keepalive(fd).unwrap());
        assert_eq!(sockopt::tcp_user_timeout(fd).unwrap(), 0);
        assert!(std::net::TcpStream::connect(&made.address).is_ok(), "it listens all the while");
    }
}
