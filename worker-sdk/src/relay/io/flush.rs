//! Sending what the sockets have room for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::{CONTROL, Control, GATEWAY, Inner, RECEIVE, RETRY};

impl Inner {
    /// Sends what can be sent without waiting.
    pub(super) fn flush(&mut self, poll: &OwnedFd, now: u64) {
        self.flush_gateway(poll, now);
        while let Some(member) = self.engine.dirty.pop() {
            if self.engine.is_forwarded(member) {
                if let Some(gateway) = &mut self.gateway {
                    self.engine.list_forward(member, &mut gateway.members);
                    self.flush_gateway(poll, now);
                } else {
                    self.engine.link_down(now, member);
                }
                continue;
            }
            let Some(&token) = self.tokens.get(&member) else { continue };
            let (Some(link), Some(peer)) =
                (self.links.get_mut(&token), self.engine.peers.get_mut(&member))
            else {
                continue;
            };
            if !peer.is(link.generation) {
                continue;
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let sent = loop {
                if peer.unsent().is_empty() {
                    break Ok(true);
                }
                match send(&link.fd, peer.unsent(), flags) {
                    Ok(count) => peer.advance(count),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break Ok(false),
                    Err(error) => break Err(error),
                }
            };
            match sent {
                Ok(all) => {
                    if link.waits == all {
                        link.waits = !all;
                        wait_for_room(poll, link.fd.as_fd(), token, !all);
                    }
                }
                Err(_) => self.drop_link(token, now),
            }
        }
        self.flush_control(poll, now);
    }

    fn flush_gateway(&mut self, poll: &OwnedFd, now: u64) {
        let Some(gateway) = &mut self.gateway else { return };
        self.engine.take_resets(&mut gateway.out);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = loop {
            let engine = &mut self.engine;
            let out = &mut gateway.out;
            gateway.members.retain(|member| !engine.take_forwards(*member, out, RECEIVE));
            if gateway.head == gateway.out.len() {
                gateway.out.clear();
                gateway.head = 0;
                break Ok(true);
            }
            match send(&gateway.fd, &gateway.out[gateway.head..], flags) {
                Ok(count) => {
                    gateway.head += count;
                    if gateway.head == gateway.out.len() {
                        gateway.out.clear();
                        gateway.head = 0;
                    } else if gateway.head > gateway.out.len() / 2 {
                        gateway.out.drain(..gateway.head);
                        gateway.head = 0;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break Ok(false),
                Err(error) => break Err(error),
            }
        };
        match sent {
            Ok(all) => {
                if gateway.waits == all {
                    gateway.waits = !all;
                    wait_for_room(poll, gateway.fd.as_fd(), GATEWAY, !all);
                }
            }
            Err(_) => self.lose_control(now, RETRY),
        }
    }

    fn flush_control(&mut self, poll: &OwnedFd, now: u64) {
        let Control::Joined { fd, waits } = &mut self.control else { return };
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = loop {
            let Some(record) = self.engine.record() else { break Ok(true) };
            match send(&*fd, record, flags) {
                Ok(_) => self.engine.record_sent(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break Ok(false),
                Err(error) => break Err(error),
            }
        };
        match sent {
            Ok(_) if self.engine.has_too_many_records() => {
                log::warn!("event=relay_directory_error reason=\"it does not read\"");
                self.lose_control(now, RETRY);
            }
            Ok(all) => {
                if *waits == all {
                    *waits = !all;
                    wait_for_room(poll, fd.as_fd(), CONTROL, !all);
                }
            }
            Err(_) => self.lose_control(now, RETRY),
        }
    }
}

fn wait_for_room(poll: &OwnedFd, fd: BorrowedFd<'_>, token: u64, wait: bool) {
    let flags = if wait { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
    if let Err(error) = epoll::modify(poll, fd, EventData::new_u64(token), flags) {
        log::error!("event=relay_poll_failed error=\"{error}\"");
    }
}
