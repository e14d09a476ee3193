//! The way of messages between members of different hosts: member, directory, NATS, directory,
//! member. A directory looks at the address of a frame, and at its length: a frame that the other
//! host would not accept is not sent, and ends nothing but that exchange.
//!
//! What waits here is counted for the user of the member, in both directions.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use dispatch_protocol::relay::Name;
use dispatch_protocol::relay::frame::{self, Frame, MAX_OVERHEAD};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::{Cluster, FORWARD, PIECE, UNREACHABLE};
use crate::server::budget::Share;

/// Bytes that wait for one member of this host, or one longest forward. What exceeds it is lost,
/// which the members notice.
const MAX_WAITING: usize = 32 * 1024 * 1024;

thread_local! {
    /// For one receive, of whatever member: no use of it waits.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; 128 * 1024]);
}

/// Members of other hosts of which a part of a frame is held, for one member of this host.
const MAX_PIECES: usize = 4096;

/// A member's link to this directory.
pub(super) struct Gateway {
    out: RefCell<Vec<u8>>,
    /// The bytes in `out`, and those received from the member.
    waiting: Share,
    received: Share,
    changed: Notify,
    ended: Cell<bool>,
    /// Frames of members of other hosts that have not arrived whole: by host and member.
    pieces: RefCell<HashMap<(u64, u64), Pieces>>,
}

struct Pieces {
    serial: u64,
    next: u32,
    bytes: Vec<u8>,
    share: Share,
}

impl Gateway {
    fn push(&self, bytes: &[u8]) {
        let mut out = self.out.borrow_mut();
        let fits = out.is_empty() || out.len() + bytes.len() <= MAX_WAITING;
        if fits && self.waiting.grow(bytes.len()).is_ok() {
            out.extend_from_slice(bytes);
            self.changed.notify_one();
        }
    }
}

impl Gateway {
    /// Adds a piece to those of its frame. Returns the frame if it is whole, and `None` if it is
    /// longer than a member of this host accepts, or there is no room.
    fn collect(
        &self,
        cluster: &Cluster,
        from: (u64, u64),
        (serial, index): (u64, u32),
        more: bool,
        bytes: &[u8],
    ) -> Option<Option<Vec<u8>>> {
        let mut all = self.pieces.borrow_mut();
        let before = all.remove(&from).filter(|p| p.serial == serial && p.next == index);
        let mut pieces = match before {
            Some(pieces) => pieces,
            None if index == 0 => {
                let share = cluster.waiting.share(self.waiting.user());
                Pieces { serial, next: 0, bytes: Vec::new(), share }
            }
            // Its beginning was lost, which the members notice.
            None => return Some(None),
        };
        let longest = frame::longest_forward(cluster.max_message);
        let fits = !bytes.is_empty() && pieces.bytes.len() + bytes.len() <= longest;
        if !fits || all.len() >= MAX_PIECES || pieces.share.grow(bytes.len()).is_err() {
            return None;
        }
        pieces.next = pieces.next.checked_add(1)?;
        pieces.bytes.extend_from_slice(bytes);
        if more {
            all.insert(from, pieces);
            return Some(None);
        }
        Some(Some(pieces.bytes))
    }
}

pub(super) fn open(
    cluster: &Rc<Cluster>,
    namespace: &Name,
    member: u64,
    user: u32,
) -> Option<OwnedFd> {
    let (own, theirs) = crate::server::socket::link().ok()?;
    let own = crate::sys::watch(own).ok()?;
    let gateway = Rc::new(Gateway {
        out: RefCell::default(),
        waiting: cluster.waiting.share(user),
        received: cluster.waiting.share(user),
        changed: Notify::new(),
        ended: Cell::new(false),
        pieces: RefCell::default(),
    });
    let key = (namespace.clone(), member);
    if let Some(old) = cluster.gateways.borrow_mut().insert(key.clone(), Rc::clone(&gateway)) {
        old.ended.set(true);
        old.changed.notify_one();
    }
    let cluster = Rc::clone(cluster);
    tokio::task::spawn_local(async move {
        if let Err(error) = serve(&cluster, &key, &gateway, &own).await {
            log::warn!("event=gateway_closed error=\"{error}\"");
        }
        let mut gateways = cluster.gateways.borrow_mut();
        if gateways.get(&key).is_some_and(|current| Rc::ptr_eq(current, &gateway)) {
            gateways.remove(&key);
        }
    });
    Some(theirs)
}

async fn serve(
    cluster: &Cluster,
    key: &(Name, u64),
    gateway: &Gateway,
    link: &AsyncFd<OwnedFd>,
) -> io::Result<()> {
    let mut partial: Vec<u8> = Vec::new();
    while !gateway.ended.get() {
        let sent = flush(gateway, link)?;
        let interest =
            if sent { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
        let mut ready = tokio::select! {
            ready = link.ready(interest) => ready?,
            () = gateway.changed.notified() => continue,
        };
        if ready.ready().is_writable() && !sent && !flush(gateway, link)? {
            ready.clear_ready_matching(tokio::io::Ready::WRITABLE);
        }
        if !ready.ready().is_readable() {
            continue;
        }
        let received: Result<_, Errno> = BUFFER.with_borrow_mut(|buffer| {
            let (count, _) = recv(link.get_ref(), &mut buffer[..], RecvFlags::DONTWAIT)?;
            let room = gateway.received.grow(count);
            partial.extend_from_slice(&buffer[..count]);
            Ok((count, room))
        });
        match received {
            Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(()),
            Ok((_, Ok(()))) => {}
            Ok((_, Err(_))) => {
                let problem = "max_gateway_bytes or max_gateway_bytes_per_user is reached";
                return Err(io::Error::other(problem));
            }
            Err(Errno::AGAIN | Errno::INTR) => {
                ready.clear_ready_matching(tokio::io::Ready::READABLE);
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        let mut used = 0;
        while let Some(len) = Frame::len_of(&partial[used..]) {
            if len > frame::longest_forward(cluster.max_message) {
                return Err(io::Error::other("its frame is too long"));
            }
            let Some(frame) = partial.get(used..used + len) else { break };
            used += len;
            let Ok(Frame::Forward { host, member, frames, .. }) = Frame::decode(frame) else {
                return Err(io::Error::other("its frame is malformed"));
            };
            let to = (host, member);
            if cluster.accepts(host, frames) {
                forward(cluster, key, gateway, to, frame).await;
            } else {
                unreachable_to(gateway, to);
            }
        }
        partial.drain(..used);
        gateway.received.shrink(used);
        if partial.is_empty() {
            partial.shrink_to(PIECE);
        }
        tokio::task::yield_now().await;
    }
    Ok(())
}

fn flush(gateway: &Gateway, link: &AsyncFd<OwnedFd>) -> io::Result<bool> {
    let mut out = gateway.out.borrow_mut();
    let mut head = 0;
    let sent = loop {
        if head == out.len() {
            break true;
        }
        match send(link.get_ref(), &out[head..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => head += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break false,
            Err(error) => return Err(error.into()),
        }
    };
    out.drain(..head);
    gateway.waiting.shrink(head);
    Ok(sent)
}

/// kind u8 | namespace: length u8, bytes | from host u64, member u64 | to member u64
fn head(kind: u8, namespace: &Name, from: (u64, u64), to: u64) -> Vec<u8> {
    let mut message = vec![kind, namespace.as_str().len() as u8];
    message.extend_from_slice(namespace.as_str().as_bytes());
    for number in [from.0, from.1, to] {
        message.extend_from_slice(&number.to_le_bytes());
    }
    message
}

struct Head<'a> {
    namespace: Name,
    host: u64,
    from: u64,
    to: u64,
    rest: &'a [u8],
}

fn parse(message: &[u8]) -> Option<Head<'_>> {
    let (len, rest) = message.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(*len))?;
    let namespace = Name::new(str::from_utf8(name).ok()?).ok()?;
    let (host, rest) = rest.split_first_chunk::<8>()?;
    let (from, rest) = rest.split_first_chunk::<8>()?;
    let (to, rest) = rest.split_first_chunk::<8>()?;
    let [host, from, to] = [host, from, to].map(|bytes| u64::from_le_bytes(*bytes));
    Some(Head { namespace, host, from, to, rest })
}

/// Tells a member that what it has sent to another host does not arrive.
fn unreachable_to(gateway: &Gateway, (host, to): (u64, u64)) {
    let mut answer = Vec::new();
    frame::unreachable(&mut answer, host, to);
    gateway.push(&answer);
}

/// Sends a member's frame to another host, in pieces: serial u64, index u32, last u8, bytes.
async fn forward(
    cluster: &Cluster,
    (namespace, from): &(Name, u64),
    gateway: &Gateway,
    (host, to): (u64, u64),
    frame: &[u8],
) {
    let now = cluster.steady();
    if !cluster.is_connected() || !cluster.peers.borrow().is_reachable(host, now) {
        return unreachable_to(gateway, (host, to));
    }
    let serial = cluster.next_piece.get() + 1;
    cluster.next_piece.set(serial);
    let pieces = frame.len().div_ceil(PIECE);
    for (index, piece) in frame.chunks(PIECE).enumerate() {
        let mut message = head(FORWARD, namespace, (cluster.number, *from), to);
        message.extend_from_slice(&serial.to_le_bytes());
        message.extend_from_slice(&(index as u32).to_le_bytes());
        message.push(u8::from(index + 1 == pieces));
        message.extend_from_slice(piece);
        cluster.publish_to(host, message).await;
    }
}

/// A piece of a frame from another host.
pub(super) async fn arrived(cluster: &Cluster, message: &[u8]) {
    let Some(Head { namespace, host, from, to, rest }) = parse(message) else { return };
    let key = (namespace, to);
    let gateway = cluster.gateways.borrow().get(&key).cloned();
    let Some(gateway) = gateway else {
        let answer = head(UNREACHABLE, &key.0, (cluster.number, to), from);
        return cluster.publish_to(host, answer).await;
    };
    let Some((serial, rest)) = rest.split_first_chunk::<8>() else { return };
    let Some((index, rest)) = rest.split_first_chunk::<4>() else { return };
    let Some((last, bytes)) = rest.split_first() else { return };
    let (serial, index) = (u64::from_le_bytes(*serial), u32::from_le_bytes(*index));
    let from_host = (host, from);
    let Some(whole) = gateway.collect(cluster, from_host, (serial, index), *last == 0, bytes)
    else {
        let answer = head(UNREACHABLE, &key.0, (cluster.number, to), from);
        return cluster.publish_to(host, answer).await;
    };
    let Some(frame) = whole else { return };
    // The address is that of the sender now.
    if let Ok(Frame::Forward { epoch, other, reset, frames, .. }) = Frame::decode(&frame) {
        let mut out = Vec::with_capacity(frame.len() + MAX_OVERHEAD);
        frame::forward(&mut out, host, from, (epoch, other), reset, frames);
        gateway.push(&out);
    }
}

/// Another host has no such member.
pub(super) fn unreachable(cluster: &Cluster, message: &[u8]) {
    let Some(Head { namespace, host, from, to, .. }) = parse(message) else { return };
    let gateway = cluster.gateways.borrow().get(&(namespace, to)).cloned();
    if let Some(gateway) = gateway {
        let mut out = Vec::new();
        frame::unreachable(&mut out, host, from);
        gateway.push(&out);
    }
}
