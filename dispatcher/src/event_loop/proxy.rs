//! Reads PROXY headers: looks at the first bytes of a connection, and takes exactly the header out
//! of the socket, so that the worker receives the connection at the byte after it.
//!
//! `crate::preface::proxy` parses the bytes; the core decides whose header counts and what follows.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use dispatch_protocol::ClientAddr;
use dispatch_protocol::wire::ProxyHeader;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::EventLoop;
use super::connections::Conn;
use crate::background::closer::{Owner, Task};
use crate::preface::proxy::{Header, read};
use dispatcher_core::{ConnId, HeaderSeen};

/// Most descriptors that come with bytes of a Unix socket: `SCM_MAX_FD`.
const MOST_FDS: usize = 253;

impl EventLoop {
    /// Looks for the PROXY header of a connection that awaits it; with `end`, no more bytes can
    /// come. Once the header is read, the first bytes after it may be awaited.
    pub(super) fn look_for_header(&mut self, id: ConnId, end: bool) {
        let connections = &mut self.connections;
        let Some(Some(conn)) = connections.table.get_mut(id.index as usize) else { return };
        let max = self.core.max_header(conn.listener) as usize;
        if connections.first_bytes.len() < max {
            connections.first_bytes.resize(max, 0);
        }
        let most = &mut connections.first_bytes[..max];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let received = loop {
            match rustix::net::recv(&conn.fd, &mut *most, flags) {
                Err(Errno::INTR) => {}
                other => break other.map(|(_, received)| received.min(max)),
            }
        };
        let count = match received {
            Err(Errno::AGAIN) if !end => return self.watch_header(id),
            // The end without a byte, as of a check whether the port is open.
            Ok(0) | Err(_) => return self.core.client_gone(self.now, id),
            Ok(count) => count,
        };
        let seen = match read(connections.first_bytes.get(..count).unwrap_or_default(), max) {
            Header::Unknown if !end => return self.watch_header(id),
            Header::Unknown | Header::Nothing => HeaderSeen::Nothing,
            Header::Begun if !end => HeaderSeen::Begun,
            Header::Begun | Header::Malformed => HeaderSeen::Malformed,
            Header::TooLong => HeaderSeen::TooLong,
            Header::Whole { len, client, tlvs } => {
                let header = Box::new(ProxyHeader {
                    address: conn.peer,
                    local: client.is_none(),
                    tlvs: tlvs.to_vec(),
                });
                match take(conn, &mut connections.first_bytes[..len]) {
                    Ok(fds) if fds.is_empty() => {
                        conn.peer = client.unwrap_or(conn.peer);
                        conn.proxy = Some(header);
                        conn.header_len = len as u32;
                        HeaderSeen::Whole(client)
                    }
                    Ok(fds) => {
                        // Their closes may linger.
                        self.background.closers.task(Task::Drop(Owner::Other, Box::new(fds)));
                        HeaderSeen::Malformed
                    }
                    Err(_) => return self.core.client_gone(self.now, id),
                }
            }
        };
        self.core.header(self.now, id, seen);
        if self.core.awaits_header(id) {
            self.watch_header(id);
        } else {
            self.peek(id, end);
        }
    }

    /// Puts the connection into the poll, for the rest of its header. If the poll has no memory for
    /// it, the wait ends with its timeout.
    fn watch_header(&mut self, id: ConnId) {
        let _ = self.watch_for_bytes(id);
    }
}

/// Takes these bytes, which are there, out of the socket. Returns descriptors that came with them.
fn take(conn: &Conn, mut bytes: &mut [u8]) -> Result<Vec<OwnedFd>, Errno> {
    let unix = conn.peer == ClientAddr::Unix;
    let mut fds = Vec::new();
    while !bytes.is_empty() {
        let received = if unix {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let mut parts = [IoSliceMut::new(bytes)];
            let received = rustix::net::recvmsg(&conn.fd, &mut parts, &mut ancillary, flags);
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            received.map(|message| message.bytes)
        } else {
            rustix::net::recv(&conn.fd, &mut *bytes, RecvFlags::DONTWAIT).map(|(_, count)| count)
        };
        match received {
            Ok(0) => return Err(Errno::PIPE),
            Ok(count) => bytes = bytes.get_mut(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(fds)
}
