//! System calls that need care or `unsafe`. Owns every `unsafe` block of this crate; decides nothing.

use std::ffi::CStr;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

#[cfg(feature = "client")]
use nix::sys::mman::mmap_anonymous;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use rustix::fs::{MemfdFlags, SealFlags};

/// Has the runtime watch a socket.
#[cfg(feature = "tokio")]
pub(crate) fn register(
    socket: std::sync::Arc<std::net::TcpStream>,
) -> io::Result<tokio::io::unix::AsyncFd<std::sync::Arc<std::net::TcpStream>>> {
    // SAFETY: the registration shares the socket, which therefore stays open, and always has this one descriptor.
    Ok(unsafe { tokio::io::unix::AsyncFd::register(socket) }?)
}

/// Readable once, after so much time.
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

/// Receives what there is, or what has room, behind what `buffer` holds already, and says how much; 0 is the end.
#[cfg(feature = "tokio")]
pub(crate) fn receive_into(
    socket: BorrowedFd<'_>,
    buffer: &mut tokio::io::ReadBuf<'_>,
) -> io::Result<usize> {
    // SAFETY: the kernel only writes there, so nothing initialized is made uninitialized.
    let unfilled = unsafe { buffer.unfilled_mut() };
    let (_, count) = rustix::net::recv(socket, unfilled, rustix::net::RecvFlags::empty())?;
    // SAFETY: without MSG_TRUNC the count is that of the bytes written, from the start of the unfilled part.
    unsafe { buffer.assume_init(count) };
    buffer.advance(count);
    Ok(count)
}

/// A shared, writable mapping of a memfd; unmapped when dropped.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is only reached through atomics, lives until drop, and is not tied to a thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out nothing but `&AtomicU32` and `&AtomicU64`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes. The file must be sealed against shrinking, or an access may fault.
    pub(crate) fn shared(fd: BorrowedFd<'_>, len: usize) -> io::Result<Mapping> {
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let start = unsafe {
            mmap(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                fd,
                0,
            )
        }?;
        Ok(Mapping { start: start.cast(), len })
    }

    /// Private memory that reads as zero in every child that is forked off, by whatever means.
    #[cfg(feature = "client")]
    pub(crate) fn wiped_on_fork() -> io::Result<Mapping> {
        let size = NonZeroUsize::MIN.saturating_add(4095);
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let start = unsafe { mmap_anonymous(None, size, access, MapFlags::MAP_PRIVATE) }?;
        let mapping = Mapping { start: start.cast(), len: size.get() };
        // SAFETY: the advice concerns only the mapping just made, and what a child sees of it is valid: zeros.
        unsafe {
            rustix::mm::madvise(
                mapping.start.as_ptr().cast(),
                mapping.len,
                rustix::mm::Advice::LinuxWipeOnFork,
            )
        }?;
        Ok(mapping)
    }

    /// The 8 bytes at `offset`, which is a multiple of 8 within the mapping.
    #[inline]
    pub(crate) fn u64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: in bounds and aligned (asserted; a mapping starts on a page), and valid for as long as
        // `self`; every access by us is atomic, and another process can only change the value.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// The 4 bytes at `offset`, which is a multiple of 4 within the mapping.
    #[inline]
    pub(crate) fn u32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.len);
        // SAFETY: as for `u64`.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: we made this mapping, nothing borrowed from it outlives `self`.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A memfd of `len` zero bytes whose size and seals can no longer change.
pub(crate) fn sealed_memfd(name: &CStr, len: usize) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, len as u64)?;
    rustix::fs::fcntl_add_seals(&fd, SEALS)?;
    Ok(fd)
}

/// Whether the size of the memory behind `fd` is fixed for ever.
pub(crate) fn is_sealed(fd: BorrowedFd<'_>) -> io::Result<bool> {
    match rustix::fs::fcntl_get_seals(fd) {
        Ok(seals) => Ok(seals.contains(SEALS)),
        // Not a memfd at all.
        Err(rustix::io::Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn file_size(fd: impl AsFd) -> io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0))
}

/// The worker's readiness, as tokio wants it: owns what it is a part of.
#[cfg(feature = "tokio")]
pub(crate) struct ReadyFd(std::sync::Arc<crate::client::core::Core>);

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
        core: std::sync::Arc<crate::client::core::Core>,
    ) -> io::Result<tokio::io::unix::AsyncFd<ReadyFd>> {
        // SAFETY: the core makes its descriptor once, never replaces it, and closes it when it is dropped,
        // which the reference inside prevents for as long as the `AsyncFd` exists.
        let registered = unsafe {
            tokio::io::unix::AsyncFd::register_with_interest(
                ReadyFd(core),
                tokio::io::Interest::READABLE,
            )
        };
        registered.map_err(io::Error::from)
    }
}

/// Has `count` called before every fork of this process that the C library makes; false if it cannot.
#[cfg(feature = "client")]
pub(crate) fn before_every_fork(count: extern "C" fn()) -> bool {
    // SAFETY: the function is there for as long as the program is, and does only what may be done in the middle of a fork:
    // it changes an atomic.
    unsafe { libc::pthread_atfork(Some(count), None, None) == 0 }
}

// What follows takes numbers, not borrowed descriptors: whether they are open, and whose, is just what is not known.

/// Ends both directions of the socket with this number.
#[cfg(feature = "client")]
pub(crate) fn shut_down(fd: std::os::fd::RawFd) -> io::Result<()> {
    // SAFETY: the call takes any number, reaches no memory of ours, and fails for what is not open or no socket.
    match unsafe { libc::shutdown(fd, libc::SHUT_RDWR) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A duplicate of whatever has this number now.
#[cfg(feature = "client")]
pub(crate) fn duplicate(fd: std::os::fd::RawFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;

    // SAFETY: the call takes any number, reaches no memory of ours, and fails for what is not open.
    match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just made it for us, and nobody else knows of it.
        copy => Ok(unsafe { OwnedFd::from_raw_fd(copy) }),
    }
}

/// The cookie of the socket that has this number now, which no other socket ever has; `None` for anything else.
#[cfg(feature = "client")]
pub(crate) fn socket_cookie(fd: std::os::fd::RawFd) -> Option<u64> {
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into `cookie`, which has as many, and `len`; both live on. It takes
    // any number, and fails for what is not open or no socket.
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
