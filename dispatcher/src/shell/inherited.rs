//! Sockets passed by a service manager (`LISTEN_FDS`), found by their `FileDescriptorName=`.

use std::os::fd::OwnedFd;

use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};

use super::error::RunError;
use crate::sys;

/// The sockets passed to this process and not yet claimed by a listener.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    sockets: Vec<(String, OwnedFd)>,
}

impl Inherited {
    /// Takes what `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` announce for this very process.
    ///
    /// Variables meant for another process, or that make no sense, mean that nothing was passed.
    pub(super) fn from_environment() -> Inherited {
        let fds = match sd_notify::listen_fds_with_names() {
            Ok(fds) => fds,
            Err(error) => {
                log::warn!("event=sockets_not_inherited error=\"{error}\"");
                return Inherited::default();
            }
        };
        let mut sockets = Vec::new();
        for (fd, name) in fds {
            match sys::adopt_inherited(fd) {
                Ok(fd) => sockets.push((name, fd)),
                Err(error) => {
                    log::warn!("event=socket_not_inherited fd={fd} name={name} error=\"{error}\"");
                }
            }
        }
        Inherited { sockets }
    }

    /// Takes every listening socket of this name; there is at least one, and all are of the type wanted.
    pub(super) fn take(
        &mut self,
        name: &str,
        wanted: SocketType,
    ) -> Result<Vec<OwnedFd>, RunError> {
        let (found, rest) =
            std::mem::take(&mut self.sockets).into_iter().partition(|(other, _)| other == name);
        self.sockets = rest;
        let found: Vec<(String, OwnedFd)> = found;
        if found.is_empty() {
            let mut names: Vec<&str> = self.sockets.iter().map(|(name, _)| name.as_str()).collect();
            names.dedup();
            let passed = if names.is_empty() {
                "no other sockets were passed to this process".to_owned()
            } else {
                format!("passed were: {}", names.join(", "))
            };
            return Err(RunError::Inherited(format!(
                "systemd:{name}: no socket of this name; {passed}. \
                 Set FileDescriptorName={name} in the .socket unit"
            )));
        }
        found.into_iter().map(|(_, fd)| check(name, fd, wanted)).collect()
    }

    /// What nobody asked for; said once, because it is most often a misspelt name. The sockets are closed.
    pub(super) fn finish(self) {
        for (name, _) in &self.sockets {
            log::warn!(
                "event=socket_unused name={name} hint=\"no listener has address = systemd:{name}\""
            );
        }
    }
}

fn check(name: &str, fd: OwnedFd, wanted: SocketType) -> Result<OwnedFd, RunError> {
    let refuse = |text: String| Err(RunError::Inherited(format!("systemd:{name}: {text}")));
    match socket_type(&fd) {
        Ok(kind) if kind == wanted => {}
        Ok(_) if wanted == SocketType::SEQPACKET => {
            return refuse(
                "wrong type; use ListenSequentialPacket= in its .socket unit".to_owned(),
            );
        }
        Ok(_) => return refuse("wrong type; use ListenStream= in its .socket unit".to_owned()),
        Err(error) => return refuse(format!("not a socket ({error})")),
    }
    if !socket_acceptconn(&fd).unwrap_or(false) {
        return refuse("not a listening socket; use Accept=no in its .socket unit".to_owned());
    }
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)
        .and_then(|()| rustix::io::ioctl_fionbio(&fd, true))
        .map_err(RunError::system("inherited socket"))?;
    Ok(fd)
}
