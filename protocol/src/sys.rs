//! Shared memory. This module has every `unsafe` block of the crate.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// The access of every mapping.
const ACCESS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// A shared, writable mapping of a memfd. Dropping it unmaps the memory.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is only reached through atomics, lives until drop, and is not tied to a
// thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out nothing but `&AtomicU32` and `&AtomicU64`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes. The file must be sealed against shrinking, or an access may
    /// fault.
    pub fn shared(fd: BorrowedFd<'_>, len: usize) -> io::Result<Mapping> {
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let start = unsafe { mmap(null_mut(), len, ACCESS, MapFlags::SHARED, fd, 0) }?;
        Mapping::new(start.cast(), len)
    }

    /// Private memory that reads as zero in every forked child, however it was forked.
    pub fn wiped_on_fork() -> io::Result<Mapping> {
        let len = 4096;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing of ours.
        let start = unsafe { mmap_anonymous(null_mut(), len, ACCESS, MapFlags::PRIVATE) }?;
        let mapping = Mapping::new(start.cast(), len)?;
        // SAFETY: the advice concerns only the mapping just made, and what a child sees of it is
        // valid: zeros.
        unsafe { madvise(mapping.start.as_ptr().cast(), mapping.len, Advice::LinuxWipeOnFork) }?;
        Ok(mapping)
    }

    fn new(start: *mut u8, len: usize) -> io::Result<Mapping> {
        // The kernel maps nothing at address zero unless it is asked for that address.
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { start, len })
    }

    /// The 8 bytes at `offset`, which is a multiple of 8 within the mapping.
    #[inline]
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: in bounds and aligned (asserted; a mapping starts on a page), and valid as long
        // as `self`; every access of this process is atomic, and another process can only change
        // the value.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// The 4 bytes at `offset`, which is a multiple of 4 within the mapping.
    #[inline]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.len);
        // SAFETY: as for `u64`.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping, and nothing borrowed from it outlives `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A memfd of `len` zero bytes with a sealed size.
pub(crate) fn sealed_memfd(name: &CStr, len: usize) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, len as u64)?;
    rustix::fs::fcntl_add_seals(&fd, SEALS)?;
    Ok(fd)
}

/// Whether the size of the memory behind `fd` can no longer change.
pub(crate) fn is_sealed(fd: BorrowedFd<'_>) -> io::Result<bool> {
    match rustix::fs::fcntl_get_seals(fd) {
        Ok(seals) => Ok(seals.contains(SEALS)),
        // The file is not a memfd.
        Err(rustix::io::Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn file_size(fd: impl AsFd) -> io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0))
}
