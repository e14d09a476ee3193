//! System calls that need `unsafe`, in one place. Decides nothing.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::layout::{
    Address, BOUND_CHANGE, BOUND_COST, MAX_WORKERS, Settings, Totals, WorkerCounts, WorkerSettings,
};
use crate::shared::{Moves, SharedSettings};

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
// SAFETY: as above.
unsafe impl aya::Pod for SharedSettings {}
// SAFETY: as above.
unsafe impl aya::Pod for Moves {}

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

/// One element of a map with 32-bit keys; without a value to remove it.
fn element(
    command: libc::c_int,
    map: BorrowedFd<'_>,
    key: u32,
    value: Option<&mut [u64]>,
) -> io::Result<()> {
    let attr = ElementAttr {
        map_fd: map.as_raw_fd() as u32,
        padding: 0,
        key: std::ptr::from_ref(&key) as u64,
        value: value.map_or(0, |value| value.as_mut_ptr() as u64),
        flags: 0,
    };
    // SAFETY: the attributes are valid for their size; key and value live for the call and have the
    // sizes that the map declares.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attr, size_of::<ElementAttr>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The first word of the first entry of an array whose entries have this size.
pub(crate) fn first_word(map: BorrowedFd<'_>, size: u32) -> io::Result<u32> {
    // Whole words, so that it is aligned.
    let mut value = vec![0u64; (size as usize).div_ceil(8).max(1)];
    // The kernel writes `size` bytes.
    element(BPF_MAP_LOOKUP_ELEM, map, 0, Some(&mut value))?;
    Ok(value[0] as u32)
}

/// Puts a socket into a map of sockets. aya has this only for maps with 32-bit values, whose
/// sockets cannot be looked up.
pub(crate) fn set_socket(
    map: BorrowedFd<'_>,
    index: u32,
    socket: BorrowedFd<'_>,
) -> io::Result<()> {
    let value = socket.as_raw_fd() as u64;
    element(BPF_MAP_UPDATE_ELEM, map, index, Some(&mut [value]))
}

/// Removes a socket from a map of sockets; it is no error if there is none.
pub(crate) fn clear_socket(map: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    match element(BPF_MAP_DELETE_ELEM, map, index, None) {
        // The kernel's answers for an empty entry of a map, and of an array for shared ports.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(()),
        answer => answer,
    }
}

/// The cookie of a socket in a map of sockets.
pub(crate) fn socket_cookie(map: BorrowedFd<'_>, index: u32) -> io::Result<Option<u64>> {
    let mut cookie = [0];
    match element(BPF_MAP_LOOKUP_ELEM, map, index, Some(&mut cookie)) {
        Ok(()) => Ok(Some(cookie[0])),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes a worker the owner of a socket. The connections that it accepts from now on have a copy.
pub(crate) fn set_owner(
    owners: BorrowedFd<'_>,
    socket: BorrowedFd<'_>,
    worker: u32,
) -> io::Result<()> {
    // `struct steer_owner`, not counted; the processor is a little-endian one.
    let value = u64::from(worker);
    element(BPF_MAP_UPDATE_ELEM, owners, socket.as_raw_fd() as u32, Some(&mut [value]))
}

/// Removes the owner of a socket.
pub(crate) fn clear_owner(owners: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> io::Result<()> {
    element(BPF_MAP_DELETE_ELEM, owners, socket.as_raw_fd() as u32, None)
}

/// The memory of an array map that allows it. The programs change it at any time.
#[derive(Debug)]
struct Memory<T> {
    at: NonNull<T>,
    entries: usize,
}

// SAFETY: the memory belongs to the value, is not tied to a thread, and every change is atomic.
unsafe impl<T> Send for Memory<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Memory<T> {}

impl<T> Memory<T> {
    /// Maps so many entries, which the map has.
    fn map(map: BorrowedFd<'_>, entries: usize) -> io::Result<Memory<T>> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let size = entries * size_of::<T>();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { mmap(std::ptr::null_mut(), size, protection, MapFlags::SHARED, map, 0) }?;
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Memory { at, entries })
    }

    fn at(&self, entry: usize) -> *mut T {
        assert!(entry < self.entries, "a number that was checked");
        // SAFETY: within the mapping.
        unsafe { self.at.as_ptr().add(entry) }
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this size, and nothing refers to it any more. A failure
        // leaves it mapped.
        let _ = unsafe { munmap(self.at.as_ptr().cast(), self.entries * size_of::<T>()) };
    }
}

/// The memory of the map `bounds`.
#[derive(Debug)]
pub(crate) struct LiveBounds(Memory<u64>);

/// One for each family.
const BOUNDS: usize = 2;

impl LiveBounds {
    /// Maps an array of two words that allows it.
    pub(crate) fn map(map: BorrowedFd<'_>) -> io::Result<LiveBounds> {
        Memory::map(map, BOUNDS).map(LiveBounds)
    }

    /// The next choices look at all workers again. To be called after each change of what the
    /// loader writes.
    pub(crate) fn remove(&self) {
        fence(Ordering::SeqCst);
        for family in 0..BOUNDS {
            // SAFETY: aligned and within the mapping; others change the words only atomically.
            let word = unsafe { AtomicU64::from_ptr(self.0.at(family)) };
            // A scan sets it before it reads anything.
            if word.load(Ordering::SeqCst) == 0 {
                continue;
            }
            word.fetch_add(BOUND_CHANGE, Ordering::SeqCst);
            word.fetch_and(!BOUND_COST, Ordering::SeqCst);
        }
    }
}

/// The memory of the map `counts`. It is only read as a whole and changed by atomic additions, each
/// of which removes the bounds.
#[derive(Debug)]
pub(crate) struct LiveCounts {
    memory: Memory<WorkerCounts>,
    bounds: Arc<LiveBounds>,
}

impl LiveCounts {
    /// Maps an array of [`MAX_WORKERS`] entries that allows it.
    pub(crate) fn map(map: BorrowedFd<'_>, bounds: Arc<LiveBounds>) -> io::Result<LiveCounts> {
        let memory = Memory::map(map, MAX_WORKERS as usize)?;
        Ok(LiveCounts { memory, bounds })
    }

    /// All counts. Those of one worker may be from different moments.
    pub(crate) fn all(&self) -> Vec<WorkerCounts> {
        let worker = |worker| {
            // SAFETY: aligned, within the mapping, and any bytes are valid. Volatile: the kernel
            // changes the words, each of them atomically.
            unsafe { self.at(worker).read_volatile() }
        };
        (0..MAX_WORKERS).map(worker).collect()
    }

    /// Adds to `live`.
    pub(crate) fn change_live(&self, worker: u32, change: i64) {
        // SAFETY: the field is aligned and within the mapping; others change it only atomically.
        let live = unsafe { AtomicI64::from_ptr(&raw mut (*self.at(worker)).live) };
        live.fetch_add(change, Ordering::Relaxed);
        self.bounds.remove();
    }

    /// Adds to the number of listeners. Both counters are one word, as in the program.
    pub(crate) fn change_listeners(&self, worker: u32, is_v6: bool, change: i64) {
        // SAFETY: both counters together are aligned as one word (a constant below checks it), and
        // within the mapping; others change them only atomically.
        let both =
            unsafe { AtomicI64::from_ptr((&raw mut (*self.at(worker)).listeners).cast::<i64>()) };
        both.fetch_add(if is_v6 { change << 32 } else { change }, Ordering::Relaxed);
        self.bounds.remove();
    }

    /// Counts a new listener, as the program does.
    pub(crate) fn add_listener(&self, worker: u32, is_v6: bool) {
        // SAFETY: aligned and within the mapping; others change it only atomically.
        let (refused, listens) = unsafe {
            let at = self.at(worker);
            let refused = AtomicI32::from_ptr(&raw mut (*at).refused);
            (refused, AtomicU32::from_ptr(&raw mut (*at).listens))
        };
        refused.store(0, Ordering::Relaxed);
        listens.fetch_add(1, Ordering::Relaxed);
        self.change_listeners(worker, is_v6, 1);
    }

    fn at(&self, worker: u32) -> *mut WorkerCounts {
        self.memory.at(worker as usize)
    }
}

const _: () = assert!(offset_of!(WorkerCounts, listeners) % 8 == 0);

/// Attaches a program to `setsockopt` of the sockets of a cgroup; the link ends with its
/// descriptor.
pub(crate) fn link_setsockopt(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: libc::c_int = 28;
    const BPF_CGROUP_SETSOCKOPT: u32 = 22;
    let attr = [program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32, BPF_CGROUP_SETSOCKOPT, 0];
    // SAFETY: the attributes are valid for their size and live for the call.
    let answer = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attr, size_of_val(&attr))
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(answer as libc::c_int) })
}

/// Pins a link, which then ends when the file is removed and all descriptors are closed.
pub(crate) fn pin(link: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    const BPF_OBJ_PIN: libc::c_int = 6;
    /// The part of `union bpf_attr` for pins.
    #[repr(C)]
    struct PinAttr {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = PinAttr { path: path.as_ptr() as u64, fd: link.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the attributes are valid for their size; they and the path live for the call.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_PIN, &raw const attr, size_of::<PinAttr>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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

/// From now on no process can change the filters of the socket, or attach a program to its group
/// through it.
pub(crate) fn lock_filters(socket: impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option is an integer, which lives for the call.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LOCK_FILTER,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The queue of a listener: connections that wait in it, and the backlog. `None` if the socket does
/// not listen.
pub(crate) fn accept_queue(socket: impl AsFd) -> io::Result<Option<(u32, u32)>> {
    /// The beginning of `struct tcp_info`.
    #[repr(C)]
    #[derive(Default)]
    struct TcpInfo {
        state: u8,
        bytes: [u8; 7],
        times: [u32; 4],
        /// Of a listener: connections in its queue.
        unacked: u32,
        /// Of a listener: its backlog.
        sacked: u32,
    }
    const TCP_LISTEN: u8 = 10;
    let mut info = TcpInfo::default();
    let mut size = size_of::<TcpInfo>() as libc::socklen_t;
    // SAFETY: the kernel writes at most the `size` bytes that `info` has.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut size,
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((info.state == TCP_LISTEN).then_some((info.unacked, info.sacked)))
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

/// Runs the look-up program for a SYN of an IPv4 client, without a packet: its verdict, and the
/// cookie of the socket that it chose or 0.
#[cfg(test)]
pub(crate) fn run_lookup(
    program: BorrowedFd<'_>,
    ip: std::net::Ipv4Addr,
    remote_port: u16,
    local_port: u16,
) -> io::Result<(u32, u64)> {
    const BPF_PROG_TEST_RUN: libc::c_int = 10;

    /// `struct bpf_sk_lookup`.
    #[repr(C)]
    #[derive(Default)]
    struct Context {
        cookie: u64,
        family: u32,
        protocol: u32,
        remote_ip4: u32,
        remote_ip6: [u32; 4],
        remote_port: u16,
        padding: u16,
        local_ip4: u32,
        local_ip6: [u32; 4],
        local_port: u32,
        ingress_ifindex: u32,
        /// The kernel wants it to be zero.
        tail: u32,
    }

    /// The part of `union bpf_attr` for test runs.
    #[repr(C)]
    #[derive(Default)]
    struct RunAttr {
        program: u32,
        verdict: u32,
        data: [u32; 2],
        pointers: [u64; 2],
        repeat: u32,
        duration: u32,
        context_size_in: u32,
        context_size_out: u32,
        context_in: u64,
        context_out: u64,
    }

    let ip4 = u32::from_ne_bytes(ip.octets());
    let mut context = Context {
        family: libc::AF_INET as u32,
        protocol: libc::IPPROTO_TCP as u32,
        remote_ip4: ip4,
        remote_port: remote_port.to_be(),
        local_ip4: ip4,
        local_port: local_port.into(),
        ..Default::default()
    };
    let size = size_of::<Context>() as u32;
    let at = std::ptr::from_mut(&mut context) as u64;
    let mut attr = RunAttr {
        program: program.as_raw_fd() as u32,
        repeat: 1,
        context_size_in: size,
        context_size_out: size,
        context_in: at,
        context_out: at,
        ..Default::default()
    };
    let bytes = size_of::<RunAttr>();
    // SAFETY: the attributes and the context, both of the sizes stated, live for the call.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attr, bytes) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok((attr.verdict, context.cookie)) }
}
