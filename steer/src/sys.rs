//! System calls that need `unsafe`, in one place. Decides nothing.
#![allow(unsafe_code)]

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::layout::{Address, Settings, Totals, WorkerCounts, WorkerSettings};

// SAFETY: `repr(C)`, integers only, no padding (a test compares with the compiled object).
unsafe impl aya::Pod for Settings {}
// SAFETY: as above.
unsafe impl aya::Pod for WorkerSettings {}
// SAFETY: as above.
unsafe impl aya::Pod for WorkerCounts {}
// SAFETY: as above.
unsafe impl aya::Pod for Totals {}
// SAFETY: as above.
unsafe impl aya::Pod for Address {}

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;

/// The part of `union bpf_attr` for one element of a map.
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// One element of a map with 32-bit keys and 64-bit values; without a value to remove it.
fn element(
    command: libc::c_int,
    map: BorrowedFd<'_>,
    key: u32,
    value: Option<&mut u64>,
) -> io::Result<()> {
    let attr = ElementAttr {
        map_fd: map.as_raw_fd() as u32,
        padding: 0,
        key: std::ptr::from_ref(&key) as u64,
        value: value.map_or(0, |value| std::ptr::from_mut(value) as u64),
        flags: 0,
    };
    // SAFETY: the attributes are valid for their size; key and value live for the call and have the
    // sizes that the map declares.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attr, size_of::<ElementAttr>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Puts a socket into a map of sockets. aya has this only for maps with 32-bit values, whose sockets
/// cannot be looked up.
pub(crate) fn set_socket(
    map: BorrowedFd<'_>,
    index: u32,
    socket: BorrowedFd<'_>,
) -> io::Result<()> {
    let mut value = socket.as_raw_fd() as u64;
    element(BPF_MAP_UPDATE_ELEM, map, index, Some(&mut value))
}

/// Removes a socket from a map of sockets; it is no error if there is none.
pub(crate) fn clear_socket(map: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    match element(BPF_MAP_DELETE_ELEM, map, index, None) {
        // The kernel's answer for an empty entry.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        answer => answer,
    }
}

/// The cookie of a socket in a map of sockets.
pub(crate) fn socket_cookie(map: BorrowedFd<'_>, index: u32) -> io::Result<Option<u64>> {
    let mut cookie = 0;
    match element(BPF_MAP_LOOKUP_ELEM, map, index, Some(&mut cookie)) {
        Ok(()) => Ok(Some(cookie)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The cookie of the network namespace of a socket.
pub(crate) fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option is 64 bits, and `cookie` has room for them.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// Gives a socket a filter that drops every segment.
pub(crate) fn drop_everything(socket: impl AsFd) -> io::Result<()> {
    let mut code =
        [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 }];
    let program = libc::sock_fprog { len: 1, filter: code.as_mut_ptr() };
    // SAFETY: the kernel copies the one instruction during the call.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

// The kernel reads the attributes at these offsets.
const _: () = assert!(offset_of!(ElementAttr, key) == 8 && offset_of!(ElementAttr, flags) == 24);
