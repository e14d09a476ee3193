//! System calls that need `unsafe`. This module has every `unsafe` block of the crate and decides
//! nothing.
#![allow(unsafe_code)]

use std::io;
#[cfg(feature = "tokio")]
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

/// Registers a socket with the runtime.
#[cfg(feature = "tokio")]
pub(crate) fn register(
    socket: std::sync::Arc<std::net::TcpStream>,
) -> io::Result<tokio::io::unix::AsyncFd<std::sync::Arc<std::net::TcpStream>>> {
    // SAFETY: the registration shares the socket, which therefore stays open, and always has this
    // one descriptor.
    Ok(unsafe { tokio::io::unix::AsyncFd::register(socket) }?)
}

/// A timer that is readable once, after `time`.
#[cfg(feature = "tokio")]
pub(crate) fn timer(time: std::time::Duration) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    use rustix::time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    };

    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
    let value = Timespec::try_from(time).map_err(|_| io::ErrorKind::InvalidInput)?;
    let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
    let spec = Itimerspec { it_interval, it_value: value };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &spec)?;
    // SAFETY: an owned descriptor is open for as long as it exists, and always has this one number.
    let registered = unsafe {
        tokio::io::unix::AsyncFd::register_with_interest(timer, tokio::io::Interest::READABLE)
    };
    registered.map_err(io::Error::from)
}

/// Receives available bytes, as many as fit, after the filled part of `buffer`. Returns the number;
/// 0 is the end.
#[cfg(feature = "tokio")]
pub(crate) fn receive_into(
    socket: BorrowedFd<'_>,
    buffer: &mut tokio::io::ReadBuf<'_>,
) -> io::Result<usize> {
    // SAFETY: the kernel only writes there, so nothing initialized is made uninitialized.
    let unfilled = unsafe { buffer.unfilled_mut() };
    let (_, count) = rustix::net::recv(socket, unfilled, rustix::net::RecvFlags::empty())?;
    // SAFETY: without MSG_TRUNC the count is that of the bytes written, from the start of the
    // unfilled part.
    unsafe { buffer.assume_init(count) };
    buffer.advance(count);
    Ok(count)
}

/// The worker's readiness descriptor for tokio. It keeps the core, and so the descriptor, alive.
#[cfg(feature = "tokio")]
pub(crate) struct ReadyFd(std::sync::Arc<crate::client::worker_core::WorkerCore>);

#[cfg(feature = "tokio")]
impl std::os::fd::AsRawFd for ReadyFd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.ready_fd().as_raw_fd()
    }
}

#[cfg(feature = "tokio")]
impl ReadyFd {
    /// Panics outside a tokio runtime with I/O enabled.
    pub(crate) fn register(
        core: std::sync::Arc<crate::client::worker_core::WorkerCore>,
    ) -> io::Result<tokio::io::unix::AsyncFd<ReadyFd>> {
        // SAFETY: the core makes its descriptor once, never replaces it, and closes it when it is
        // dropped, which the reference inside prevents for as long as the `AsyncFd` exists.
        let registered = unsafe {
            tokio::io::unix::AsyncFd::register_with_interest(
                ReadyFd(core),
                tokio::io::Interest::READABLE,
            )
        };
        registered.map_err(io::Error::from)
    }
}

/// Registers `count` to be called before every fork that the C library makes; false if that failed.
pub(crate) fn before_every_fork(count: extern "C" fn()) -> bool {
    // SAFETY: the function is there for as long as the program is, and does only what may be done
    // in the middle of a fork: it changes an atomic.
    unsafe { libc::pthread_atfork(Some(count), None, None) == 0 }
}

// The functions below take numbers, not borrowed descriptors, because it is unknown whether a
// number is open and which file it has.

/// Ends both directions of the socket with this number.
pub(crate) fn shut_down(fd: std::os::fd::RawFd) -> io::Result<()> {
    // SAFETY: the call takes any number, reaches no memory of ours, and fails for what is not open
    // or no socket.
    match unsafe { libc::shutdown(fd, libc::SHUT_RDWR) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A duplicate of the file with this number.
pub(crate) fn duplicate(fd: std::os::fd::RawFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;

    // SAFETY: the call takes any number, reaches no memory of ours, and fails for what is not open.
    match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just made it, and no other code knows of it.
        copy => Ok(unsafe { OwnedFd::from_raw_fd(copy) }),
    }
}

/// The unique cookie of the socket with this number; `None` for anything else.
pub(crate) fn socket_cookie(fd: std::os::fd::RawFd) -> Option<u64> {
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into `cookie`, which has as many, and `len`;
    // both live on. It takes any number, and fails for what is not open or no socket.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(cookie)
}

/// Whether the peer of this Unix socket has received everything that was sent; true if the kernel
/// does not tell.
pub(crate) fn all_received(socket: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd;

    let mut unread: libc::c_int = 0;
    // SAFETY: the kernel writes one integer, which lives on; the descriptor is open.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) };
    result != 0 || unread == 0
}

/// Checks that another program passed the file with this number: everything that this process opens
/// itself, or has taken over, is close-on-exec.
fn was_passed(fd: std::os::fd::RawFd) -> io::Result<()> {
    // SAFETY: the call takes any number, and reads a flag or fails.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags == -1 {
        return Err(io::Error::last_os_error());
    }
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::other("this process has opened it, or has taken it over before"));
    }
    Ok(())
}

/// Takes over the TCP listeners with these numbers, which another program passed to this one, and
/// sets them close-on-exec. All or none: the error has the first number that is none. The caller
/// prevents that two threads do this at the same time.
pub(crate) fn adopt_listeners(
    numbers: std::ops::Range<std::os::fd::RawFd>,
) -> Result<Vec<std::net::TcpListener>, (std::os::fd::RawFd, io::Error)> {
    use rustix::net::{AddressFamily, SocketType, sockopt};
    use std::os::fd::{BorrowedFd, FromRawFd};

    let check = |fd| {
        was_passed(fd)?;
        // SAFETY: the number is open. Another program passed it to this one, and no code of this
        // process has an owner for it that would close it meanwhile.
        let socket = unsafe { BorrowedFd::borrow_raw(fd) };
        let internet = [AddressFamily::INET, AddressFamily::INET6];
        if sockopt::socket_type(socket)? != SocketType::STREAM
            || !internet.contains(&sockopt::socket_domain(socket)?)
        {
            return Err(io::Error::other("it is a socket of another type"));
        }
        if !sockopt::socket_acceptconn(socket)? {
            return Err(io::Error::other("it does not listen"));
        }
        Ok(())
    };
    for fd in numbers.clone() {
        check(fd).map_err(|error| (fd, error))?;
    }
    let adopt = |fd| {
        // SAFETY: the number is open and was passed to this program (just checked); the flag set
        // below prevents a second owner.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)
            .map_err(|error| (fd, error.into()))?;
        Ok(socket.into())
    };
    numbers.map(adopt).collect()
}

/// Takes over the socket with this number, which the dispatcher passed to this program, and sets it
/// close-on-exec.
pub(crate) fn adopt_channel(fd: std::os::fd::RawFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;

    was_passed(fd)?;
    let mut kind: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into `kind`, which has as many, and `len`; both
    // live on. It takes any number, and fails for what is not open or no socket.
    let result = unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &raw mut len)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if kind != libc::SOCK_SEQPACKET {
        return Err(io::Error::other("it is a socket of another type"));
    }
    // SAFETY: the number is open. Everything that this process opens itself is close-on-exec, so
    // the dispatcher has passed it to this program; the flag set below prevents a second owner.
    let channel = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&channel, rustix::io::FdFlags::CLOEXEC)?;
    Ok(channel)
}

/// Forks; `None` in the child. Fails if this process has another thread.
pub(crate) fn fork_alone() -> io::Result<Option<rustix::process::Pid>> {
    let threads = std::fs::read_dir("/proc/self/task")
        .map_err(|error| {
            io::Error::new(error.kind(), format!("/proc/self/task has the threads: {error}"))
        })?
        .count();
    if threads != 1 {
        return Err(io::Error::other(format!(
            "the parent has {threads} threads; a process that forks workers must have one: start \
             threads and runtimes in the closure of prefork"
        )));
    }
    // SAFETY: the calling thread is the only one, so no other thread holds a lock or changes memory
    // in the middle of the fork, and the child may do what this process may do.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(rustix::process::Pid::from_raw(pid)),
    }
}

/// Makes these files stdout and stderr.
pub(crate) fn replace_output(stdout: OwnedFd, stderr: OwnedFd) -> io::Result<()> {
    use std::os::fd::AsRawFd;

    for (file, number) in [(stdout, libc::STDOUT_FILENO), (stderr, libc::STDERR_FILENO)] {
        // SAFETY: the descriptor is open. Standard output and error have no owner, and remain
        // open.
        if unsafe { libc::dup2(file.as_raw_fd(), number) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Sets or removes environment variables. For a child that has just been forked.
pub(crate) fn set_variables(variables: &[(&str, Option<&str>)]) {
    for (name, value) in variables {
        match value {
            // SAFETY: a child that was just forked has one thread, so no other thread reads the
            // environment.
            Some(value) => unsafe { std::env::set_var(name, value) },
            // SAFETY: as above.
            None => unsafe { std::env::remove_var(name) },
        }
    }
}

/// Ends the process without running anything.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: the call takes a number and does not return.
    unsafe { libc::_exit(code) }
}
