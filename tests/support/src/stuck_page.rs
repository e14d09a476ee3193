//! A page of memory that is missing until it is released: a system call that reads or writes it
//! blocks inside the kernel and keeps the locks that it holds.
#![allow(unsafe_code, reason = "userfaultfd has no safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::event::{PollFd, PollFlags, Timespec};

/// The length of the page and of the data sent from it.
const LENGTH: usize = 4096;

/// `UFFDIO_API` and its argument.
const API: libc::c_ulong = 0xc018_aa3f;

#[repr(C)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `UFFDIO_REGISTER` and its argument.
const REGISTER: libc::c_ulong = 0xc020_aa00;

/// `UFFDIO_REGISTER_MODE_MISSING`.
const MISSING: u64 = 1;

#[repr(C)]
struct RegisterRequest {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// Released when it is dropped.
pub struct StuckPage {
    /// The userfaultfd: once it is closed, the page behaves like any other.
    faults: OwnedFd,
    place: Place,
}

/// The address of the page. It is never unmapped, so this value may outlive the page.
#[derive(Clone, Copy)]
pub struct Place(usize);

impl StuckPage {
    /// # Errors
    ///
    /// When this process may not use userfaultfd: it needs root or a setting.
    pub fn new() -> io::Result<StuckPage> {
        // A blocking userfaultfd cannot be polled.
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes flags and returns a descriptor or an error.
        let number = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let number = i32::try_from(number).map_err(io::Error::other)?;
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nothing else has it.
        let faults = unsafe { OwnedFd::from_raw_fd(number) };
        let mut api = ApiRequest { api: 0xaa, features: 0, ioctls: 0 };
        // SAFETY: this request reads and writes `api`, which lives across the call.
        check(unsafe { libc::ioctl(faults.as_raw_fd(), API, &raw mut api) })?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let page = unsafe { libc::mmap(ptr::null_mut(), LENGTH, access, kind, -1, 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = page as u64;
        let mut range = RegisterRequest { start, length: LENGTH as u64, mode: MISSING, ioctls: 0 };
        // SAFETY: this request reads and writes `range`; the mapping belongs to this function.
        check(unsafe { libc::ioctl(faults.as_raw_fd(), REGISTER, &raw mut range) })?;
        Ok(StuckPage { faults, place: Place(page as usize) })
    }

    pub fn place(&self) -> Place {
        self.place
    }

    /// Waits until a call is blocked on the page.
    pub fn wait_touched(&self) {
        let mut ready = [PollFd::new(&self.faults, PollFlags::IN)];
        let patience = Timespec::try_from(crate::PATIENCE).unwrap();
        rustix::event::poll(&mut ready, Some(&patience)).unwrap();
        assert_eq!(ready[0].revents(), PollFlags::IN, "no call has touched the page");
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Place {
    /// Sends the page. The call holds the lock of a TCP socket while the page is missing.
    pub fn send(self, socket: impl AsFd) -> isize {
        let flags = libc::MSG_NOSIGNAL;
        let socket = socket.as_fd().as_raw_fd();
        // SAFETY: the page stays mapped, nothing in this program reads or writes it.
        unsafe { libc::send(socket, self.0 as *const libc::c_void, LENGTH, flags) }
    }

    /// Receives into the page. On a Unix socket the call blocks every other receive while the page
    /// is missing.
    pub fn receive(self, socket: impl AsFd) -> isize {
        let socket = socket.as_fd().as_raw_fd();
        // SAFETY: as above.
        unsafe { libc::recv(socket, self.0 as *mut libc::c_void, LENGTH, libc::MSG_DONTWAIT) }
    }
}
