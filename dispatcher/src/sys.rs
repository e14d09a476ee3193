//! System calls that need `unsafe`, in one place. Decides nothing.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Whether this number is a descriptor that another program passed to this one when it started it.
///
/// What came that way has survived an `exec`, so it is not close-on-exec; whatever this process opens by itself is. So a
/// wrong number can never name a descriptor of our own, whatever has been opened before this is asked.
///
/// # Errors
/// When it is not open, or one of our own.
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

/// Takes ownership of a file descriptor that a service manager passed to this process, and sets it close-on-exec. So
/// each can be adopted once only.
///
/// # Errors
/// When [`was_passed`] says that it was not.
pub fn adopt_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    was_passed(fd)?;
    // SAFETY: the number is open and nothing in this process has opened it (just checked); the activation protocol
    // gives it to us alone, and the flag set below keeps anybody from adopting it again.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// The supplementary groups of the process behind a Unix socket, as they were when it connected (`SO_PEERGROUPS`).
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
        // ERANGE comes with the size it needs. The kernel allows 65,536 groups.
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

/// A child that has ended and whose end was not collected yet; it stays so.
pub fn ended_child() -> Option<i32> {
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the call writes one `siginfo_t` at most, to memory that is large enough and ours.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), options) };
    // SAFETY: all zeros is a valid `siginfo_t`; without a child that has ended its pid stays zero.
    let pid = unsafe { info.assume_init().si_pid() };
    (result == 0 && pid > 0).then_some(pid)
}

/// Stops this process like Ctrl-Z at a terminal does, until it is continued; with `group` its whole process group. Does
/// nothing where no shell could continue it. From a thread that no signal is blocked for.
///
/// # Errors
/// What `sigaction` answers.
#[cfg(feature = "tui")]
pub fn stop_like_a_job(group: bool) -> io::Result<()> {
    let mut before = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: all zeros is a valid `sigaction`, with the default disposition; both structures live across the call.
    let result = unsafe {
        let default = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
        libc::sigaction(libc::SIGTSTP, default.as_ptr(), before.as_mut_ptr())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if group {
        // SAFETY: plain numbers. Zero is our own group.
        unsafe { libc::kill(0, libc::SIGTSTP) };
    } else {
        // SAFETY: a plain number. The thread itself gets it, so it has stopped before this returns.
        unsafe { libc::raise(libc::SIGTSTP) };
    }
    // SAFETY: the structure was filled by the kernel above.
    unsafe { libc::sigaction(libc::SIGTSTP, before.as_ptr(), std::ptr::null_mut()) };
    Ok(())
}

/// The number of the kernel's last signal.
const LAST_SIGNAL: i32 = 64;

/// The two that the C library keeps for itself, and keeps programs from touching.
const OF_THE_LIBRARY: [i32; 2] = [32, 33];

/// What the kernel does with a signal: the handler first, then flags, which stay zero, and what goes with a handler of one's
/// own.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Disposition([usize; 4]);

/// The kernel's own call, for the signals that the C library does not let through. Gives what it was; with `new` it is that
/// from now on. Safe to call between fork and exec.
fn disposition(signal: i32, new: Option<libc::sighandler_t>) -> Option<libc::sighandler_t> {
    let mut old = Disposition::default();
    let new = new.map(|handler| Disposition([handler, 0, 0, 0]));
    let new = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: both structures are as large as the kernel's, or larger, and live across the call; no handler of ours is set.
    let result = unsafe {
        libc::syscall(libc::SYS_rt_sigaction, signal, new, &raw mut old, size_of::<u64>())
    };
    (result == 0).then_some(old.0[0])
}

/// Lets the two signals that the C library keeps for itself end nothing, unless it uses them.
pub fn ignore_signals_of_the_library() {
    for signal in OF_THE_LIBRARY {
        if disposition(signal, None) == Some(libc::SIG_DFL) {
            disposition(signal, Some(libc::SIG_IGN));
        }
    }
}

/// Makes the process that `command` will start have the default disposition for every signal, and none blocked, whatever
/// this process has.
pub fn start_with_default_signals(command: &mut Command) {
    let reset = || {
        for signal in 1..=LAST_SIGNAL {
            if disposition(signal, None) != Some(libc::SIG_DFL) {
                disposition(signal, Some(libc::SIG_DFL));
            }
        }
        Ok(SigSet::empty().thread_set_mask()?)
    };
    // SAFETY: between fork and exec only async-signal-safe things may happen: these are system calls, and the conversion of
    // their errors does not allocate.
    unsafe { command.pre_exec(reset) };
}

/// Makes a listening TCP socket drop every segment that would begin a connection. Handshakes that are under way go on, and
/// clients that try to connect are refused when they try again after the socket was closed.
///
/// # Errors
/// What `setsockopt` answers.
pub fn drop_new_connections(socket: impl AsFd) -> io::Result<()> {
    const FLAGS: u32 = 13;
    const SYN_ACK: u32 = 0x12;
    const SYN: u32 = 0x02;
    let code = |code: u32| code as u16;
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // A classic filter; of a TCP socket it sees the segment from its header on. Whatever is a SYN and no ACK goes.
    let mut program = [
        instruction(code(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS), 0, 0, FLAGS),
        instruction(code(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K), 0, 0, SYN_ACK),
        instruction(code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K), 0, 1, SYN),
        instruction(code(libc::BPF_RET | libc::BPF_K), 0, 0, 0),
        instruction(code(libc::BPF_RET | libc::BPF_K), 0, 0, u32::MAX),
    ];
    let len = program.len() as u16;
    let filter = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // SAFETY: `filter` and the program it points at live across the call, and `len` is the number of its instructions; the
    // kernel copies both.
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

/// Takes that back.
///
/// # Errors
/// What `setsockopt` answers: that there was nothing to take back, for one.
pub fn let_new_connections_in(socket: impl AsFd) -> io::Result<()> {
    let nothing: libc::c_int = 0;
    // SAFETY: `nothing` lives across the call and has as many readable bytes as is said.
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

/// Makes the process that `command` will start have these limits of open files, from its first instruction on.
///
/// Setting them from here once it runs would be too late: it may have read them by then, or raised them itself.
pub fn start_with_descriptor_limit(command: &mut Command, soft: u64, hard: u64) {
    let limit = move || Ok(setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?);
    // SAFETY: between fork and exec only async-signal-safe things may happen: this is one system call, and the
    // conversion of its error does not allocate.
    unsafe { command.pre_exec(limit) };
}

/// The signal of [`interrupt`]. Its default is to be ignored, so one that meets a program we start does nothing there.
const INTERRUPT: Signal = Signal::SIGURG;

/// Makes [`interrupt`] end system calls that wait: the signal needs a handler for that, and one without `SA_RESTART`.
///
/// # Errors
/// What `sigaction` answers.
pub fn handle_interrupts() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, so it may run at any time on any thread.
    unsafe { sigaction(INTERRUPT, &action) }?;
    Ok(())
}

/// Ends what this thread of our own process waits for, as far as a signal can.
pub fn interrupt(thread: rustix::thread::Pid) {
    let own = std::process::id();
    // SAFETY: the call takes three numbers. A thread that has ended is not found; should another of this process have its
    // number by now, that one runs a handler that does nothing.
    unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            own,
            thread.as_raw_nonzero().get(),
            INTERRUPT as libc::c_int,
        )
    };
}

/// Has the kernel refuse descriptors that come with records to this socket, and to what is accepted from it, at their
/// sender (`SO_PASSRIGHTS`, Linux 6.16).
///
/// # Errors
/// `ENOPROTOOPT` on a kernel that does not know it.
pub fn refuse_descriptors(socket: impl AsFd) -> io::Result<()> {
    // The same number on every architecture that Rust's standard library runs on, but for these.
    const SO_PASSRIGHTS: libc::c_int =
        if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) { 0x005c } else { 83 };
    let off: libc::c_int = 0;
    // SAFETY: `off` lives across the call and has as many readable bytes as said.
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
