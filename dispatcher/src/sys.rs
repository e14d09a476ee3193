//! System calls that need `unsafe`, in one place. Decides nothing.
#![allow(unsafe_code)]

mod child;
mod inherit;

pub use self::child::{ChildSetup, Step, failed_step};
pub use self::inherit::{FIRST_INHERITED, keep_numbers, run_with_descriptors};

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Checks that this number is a descriptor that another program passed to this process.
///
/// A passed descriptor has survived an `exec`, so it is not close-on-exec; every descriptor that
/// this process opens is. So a wrong number never names a descriptor of the dispatcher, whatever
/// was opened before.
///
/// # Errors
///
/// When the number is not open, or is a descriptor of this process.
pub fn was_passed(fd: RawFd) -> io::Result<()> {
    // SAFETY: F_GETFD on any number is harmless: it reads a flag or answers EBADF.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if fd < 0 || flags < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::other("it is one that this process has opened by itself"));
    }
    Ok(())
}

/// Takes ownership of a file descriptor that a service manager passed to this process, and sets it
/// close-on-exec, so that it cannot be adopted twice.
///
/// # Errors
///
/// When [`was_passed`] fails.
pub fn adopt_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    was_passed(fd)?;
    // SAFETY: the number is open and nothing in this process has opened it (just checked); the
    // activation protocol passes it to this process alone, and the flag set below prevents a second
    // adoption.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// The supplementary groups of the process behind a Unix socket, as they were when it connected
/// (`SO_PEERGROUPS`).
///
/// # Errors
/// What `getsockopt` answers; kernels before 4.13 do not know the option.
pub fn peer_groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    let mut groups: Vec<u32> = vec![0; 64];
    loop {
        let mut len = libc::socklen_t::try_from(groups.len() * size_of::<u32>())
            .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        // SAFETY: the buffer has `len` writable bytes, and the kernel writes at most that many.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let count = len as usize / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // The kernel returns the needed size with ERANGE. It allows 65,536 groups.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > 65_536 {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

/// Sets an integer option of level `IPPROTO_TCP` for which no library has a name.
///
/// # Errors
/// What `setsockopt` answers.
pub fn set_tcp_option(socket: impl AsFd, option: libc::c_int, value: u32) -> io::Result<()> {
    let len = size_of::<u32>() as libc::socklen_t;
    // SAFETY: `value` lives across the call and has `len` readable bytes.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            len,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A child that has ended and is not reaped yet; this call does not reap it.
pub fn ended_child() -> Option<i32> {
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the call writes at most one `siginfo_t`, to memory of this function that is large
    // enough.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), options) };
    // SAFETY: all zeros is a valid `siginfo_t`; its pid stays zero if no child has ended.
    let pid = unsafe { info.assume_init().si_pid() };
    (result == 0 && pid > 0).then_some(pid)
}

/// Stops this process until it is continued, as Ctrl-Z at a terminal does; with `group` its whole
/// process group. Does nothing where no shell could continue it. The calling thread must not block
/// the signal.
///
/// # Errors
///
/// What `sigaction` answers.
#[cfg(feature = "tui")]
pub fn stop_like_a_job(group: bool) -> io::Result<()> {
    let mut before = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: all zeros is a valid `sigaction`, with the default disposition; both structures live
    // across the call.
    let result = unsafe {
        let default = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
        libc::sigaction(libc::SIGTSTP, default.as_ptr(), before.as_mut_ptr())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if group {
        // SAFETY: the arguments are plain numbers. Zero means the process group of this process.
        unsafe { libc::kill(0, libc::SIGTSTP) };
    } else {
        // SAFETY: the argument is a plain number. The signal goes to this thread, so the process
        // has stopped before the call returns.
        unsafe { libc::raise(libc::SIGTSTP) };
    }
    // SAFETY: the structure was filled by the kernel above.
    unsafe { libc::sigaction(libc::SIGTSTP, before.as_ptr(), std::ptr::null_mut()) };
    Ok(())
}

/// The highest signal number of the kernel.
const LAST_SIGNAL: i32 = 64;

/// Two signals that the C library reserves for itself and does not let programs change.
const OF_THE_LIBRARY: [i32; 2] = [32, 33];

/// The kernel's `sigaction`: the handler, then flags and the fields of a custom handler, which stay
/// zero.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Disposition([usize; 4]);

/// Calls the kernel directly, for signals that the C library rejects. Returns the old disposition;
/// sets `new` if given. Safe between fork and exec.
fn disposition(signal: i32, new: Option<libc::sighandler_t>) -> Option<libc::sighandler_t> {
    let mut old = Disposition::default();
    let new = new.map(|handler| Disposition([handler, 0, 0, 0]));
    let new = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: both structures are at least as large as the kernel's and live across the call; no
    // custom handler is set.
    let result = unsafe {
        libc::syscall(libc::SYS_rt_sigaction, signal, new, &raw mut old, size_of::<u64>())
    };
    (result == 0).then_some(old.0[0])
}

/// Ignores the two signals that the C library reserves, unless the library uses them.
pub fn ignore_signals_of_the_library() {
    for signal in OF_THE_LIBRARY {
        if disposition(signal, None) == Some(libc::SIG_DFL) {
            disposition(signal, Some(libc::SIG_IGN));
        }
    }
}

/// Gives the process that `command` starts the default disposition for every signal and an empty
/// signal mask, whatever this process has.
pub fn start_with_default_signals(command: &mut Command) {
    let reset = || {
        for signal in 1..=LAST_SIGNAL {
            if disposition(signal, None) != Some(libc::SIG_DFL) {
                disposition(signal, Some(libc::SIG_DFL));
            }
        }
        Ok(SigSet::empty().thread_set_mask()?)
    };
    // SAFETY: between fork and exec only async-signal-safe operations are allowed: these are system
    // calls, and the conversion of their errors does not allocate.
    unsafe { command.pre_exec(reset) };
}

/// Makes a listening TCP socket drop every segment that would begin a connection. Handshakes under
/// way continue, and clients that try to connect are refused when they try again after the socket
/// was closed.
///
/// # Errors
///
/// What `setsockopt` answers.
pub fn drop_new_connections(socket: impl AsFd) -> io::Result<()> {
    const FLAGS: u32 = 13;
    const SYN_ACK: u32 = 0x12;
    const SYN: u32 = 0x02;
    let code = |code: u32| code as u16;
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // A classic BPF filter; for a TCP socket it sees the segment from the TCP header on. It drops
    // every SYN without ACK.
    let mut program = [
        instruction(code(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS), 0, 0, FLAGS),
        instruction(code(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K), 0, 0, SYN_ACK),
        instruction(code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K), 0, 1, SYN),
        instruction(code(libc::BPF_RET | libc::BPF_K), 0, 0, 0),
        instruction(code(libc::BPF_RET | libc::BPF_K), 0, 0, u32::MAX),
    ];
    let len = program.len() as u16;
    let filter = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // SAFETY: `filter` and the program it points at live across the call, and `len` is the number
    // of its instructions; the kernel copies both.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Removes the filter of [`drop_new_connections`].
///
/// # Errors
///
/// What `setsockopt` answers, for example that there was no filter.
pub fn let_new_connections_in(socket: impl AsFd) -> io::Result<()> {
    let nothing: libc::c_int = 0;
    // SAFETY: `nothing` lives across the call and has as many readable bytes as stated.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            (&raw const nothing).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes the process that `command` starts carry out a [`ChildSetup`] before its program runs.
pub fn set_up_child(command: &mut Command, setup: ChildSetup) {
    // SAFETY: between fork and exec only async-signal-safe operations are allowed: `run` makes
    // system calls without allocation or locks, and so do the conversions of its errors.
    unsafe { command.pre_exec(move || setup.run()) };
}

/// Makes the process that `command` starts write a line to the descriptor `file` before it runs its
/// program: `line`, its process id in decimal, and a newline. `file` must stay open until the
/// process was started.
///
/// The child writes the line, because this process may be killed before it knows the id.
pub fn start_with_recorded_id(command: &mut Command, file: RawFd, mut line: Vec<u8>) {
    let prefix = line.len();
    // Room for every process id, so that the child allocates nothing.
    line.resize(prefix + MAX_DIGITS + 1, 0);
    let record = move || {
        let length = write_own_id(&mut line[prefix..]);
        line[prefix + length] = b'\n';
        let bytes = &line[..=prefix + length];
        // SAFETY: the slice has as many readable bytes as stated. The caller keeps the descriptor
        // open in the parent, so the child has a copy of it.
        let written = unsafe { libc::write(file, bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(written) {
            Ok(count) if count == bytes.len() => Ok(()),
            Ok(_) => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            Err(_) => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec only async-signal-safe operations are allowed: this is one
    // system call on memory that was allocated before; errors are made of numbers.
    unsafe { command.pre_exec(record) };
}

/// Writes the id of this process in decimal, where there is room for [`MAX_DIGITS`]. Returns the
/// number of digits. Safe between fork and exec.
fn write_own_id(to: &mut [u8]) -> usize {
    let mut digits = [0; MAX_DIGITS];
    let mut first = MAX_DIGITS;
    let mut rest = std::process::id();
    loop {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let length = MAX_DIGITS - first;
    to[..length].copy_from_slice(&digits[first..]);
    length
}

/// Makes the kernel send `signal` to the program that `command` starts when the calling thread
/// ends, and so at the latest when this process ends. Does not apply to what the program forks. A
/// change of the user would undo it, so this comes after [`set_up_child`].
pub fn end_with_this_thread(command: &mut Command, signal: rustix::process::Signal) {
    let own = rustix::process::getpid();
    let bind = move || {
        rustix::process::set_parent_process_death_signal(Some(signal))?;
        // This process may have ended before the call.
        match rustix::process::getppid() {
            Some(parent) if parent == own => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    };
    // SAFETY: between fork and exec only async-signal-safe operations are allowed: these are two
    // system calls, and errors are made of numbers.
    unsafe { command.pre_exec(bind) };
}

/// A descriptor that a task can wait for until it is readable. Must be called inside a runtime.
///
/// # Errors
///
/// What `epoll_ctl` answers.
pub fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and names the same file description until it is dropped.
    let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    Ok(watched?)
}

/// A socket that a task can wait for until it is readable or writable. Must be called inside a
/// runtime.
///
/// # Errors
///
/// What `epoll_ctl` answers.
pub fn readable_and_writable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let interest = Interest::READABLE | Interest::WRITABLE;
    // SAFETY: an `OwnedFd` is open and names the same file description until it is dropped.
    let watched = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(watched?)
}

/// Makes the program that `command` starts inherit the descriptor with this number, which must stay
/// open until the process was started.
pub fn pass_descriptor(command: &mut Command, fd: RawFd) {
    let pass = move || {
        // SAFETY: the call takes two numbers. The caller keeps the descriptor open in the parent,
        // so the child has a copy of it.
        match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: between fork and exec only async-signal-safe operations are allowed: this is one
    // system call, and its error is made of a number.
    unsafe { command.pre_exec(pass) };
}

/// The digits of the largest process id.
const MAX_DIGITS: usize = 10;

/// The exit status of a process that is not a child, as `wait` would return it. `None` if the
/// kernel keeps none: the process runs, or was never reaped.
///
/// # Errors
///
/// What `ioctl` answers; kernels before 6.15 do not know this request.
pub fn pidfd_exit_status(pidfd: impl AsFd) -> io::Result<Option<i32>> {
    /// `struct pidfd_info` of the kernel, in its first version.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const EXIT: u64 = 1 << 3;
    // _IOWR(0xFF, 11, struct pidfd_info)
    const GET_INFO: u32 = (3 << 30) | ((size_of::<Info>() as u32) << 16) | (0xFF << 8) | 11;
    let mut info = Info { mask: EXIT, ..Info::default() };
    // SAFETY: the request reads and writes as many bytes as its number encodes: those of `info`.
    let result =
        unsafe { libc::ioctl(pidfd.as_fd().as_raw_fd(), GET_INFO as libc::Ioctl, &raw mut info) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((info.mask & EXIT != 0).then_some(info.exit_code))
}

/// The signal of [`interrupt`]. It is ignored by default, so it has no effect on a program that the
/// dispatcher starts.
const INTERRUPT: Signal = Signal::SIGURG;

/// Makes [`interrupt`] end blocking system calls: the signal needs a handler without `SA_RESTART`
/// for that.
///
/// # Errors
///
/// What `sigaction` answers.
pub fn handle_interrupts() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, so it may run at any time on any thread.
    unsafe { sigaction(INTERRUPT, &action) }?;
    Ok(())
}

/// Ends the blocking system call of a thread of this process, as far as a signal can.
pub fn interrupt(thread: rustix::thread::Pid) {
    let own = std::process::id();
    // SAFETY: the call takes three numbers. A thread that has ended is not found; if another thread
    // of this process has its number by now, that thread runs a handler that does nothing.
    unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            own,
            thread.as_raw_nonzero().get(),
            INTERRUPT as libc::c_int,
        )
    };
}

/// Makes the kernel refuse descriptors sent to this socket and to the sockets accepted from it: the
/// sender gets the error (`SO_PASSRIGHTS`, Linux 6.16).
///
/// # Errors
///
/// `ENOPROTOOPT` on a kernel that does not know the option.
pub fn refuse_descriptors(socket: impl AsFd) -> io::Result<()> {
    // The number is the same on every architecture that Rust's standard library supports, except
    // these.
    const SO_PASSRIGHTS: libc::c_int =
        if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) { 0x005c } else { 83 };
    let off: libc::c_int = 0;
    // SAFETY: `off` lives across the call and has as many readable bytes as stated.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const off).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bytes of memory that the peer of a Unix stream socket has not read yet (`SIOCOUTQ`): the sizes
/// of its buffers, not of the data. Takes no lock.
///
/// # Errors
/// What `ioctl` answers.
pub fn unread_by_peer(socket: impl AsFd) -> io::Result<u64> {
    let mut unread: libc::c_int = 0;
    // SAFETY: the request writes one `int`, which lives across the call.
    let result =
        unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(unread).unwrap_or(0))
}

/// Identifies the network namespace of a socket (`SO_NETNS_COOKIE`, Linux 5.14). Takes no lock.
///
/// # Errors
/// What `getsockopt` answers.
pub fn network_namespace(socket: impl AsFd) -> io::Result<u64> {
    // The number is the same on every architecture that Rust's standard library supports, except
    // these.
    const SO_NETNS_COOKIE: libc::c_int =
        if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) { 0x0050 } else { 71 };
    let mut cookie: u64 = 0;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the buffer has `len` writable bytes, and the kernel writes at most that many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// The part of `TCP_INFO` that shows whether a program has used a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpUse {
    /// The state: `TCP_ESTABLISHED` is 1, `TCP_CLOSE_WAIT` is 8.
    pub state: u8,
    /// Payload that has arrived; one more for the end of the stream.
    pub received: u64,
    /// Payload sent, and payload that waits to be sent.
    pub sent: u64,
}

/// Reads [`TcpUse`]. Takes the lock of the socket, which a process that has it may hold.
///
/// # Errors
/// What `getsockopt` answers, for example that this is no TCP socket; `EOPNOTSUPP` before Linux
/// 4.19.
pub fn tcp_use(socket: impl AsFd) -> io::Result<TcpUse> {
    // The kernel's `struct tcp_info`, which only grows at its end.
    const BYTES_RECEIVED: usize = 128;
    const NOT_SENT: usize = 144;
    const BYTES_SENT: usize = 200;
    let mut info = [0u8; BYTES_SENT + size_of::<u64>()];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: the buffer has `len` writable bytes, and the kernel writes at most that many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if (len as usize) < info.len() {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    let word = |at: usize| info[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
    let long = |at: usize| info[at..at + 8].try_into().map_or(0, u64::from_ne_bytes);
    Ok(TcpUse {
        state: info[0],
        received: long(BYTES_RECEIVED),
        sent: long(BYTES_SENT).saturating_add(u64::from(word(NOT_SENT))),
    })
}
