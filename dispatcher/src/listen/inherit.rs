//! Sockets passed by a service manager (`LISTEN_FDS`), found by their `FileDescriptorName=`.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};

use super::bind::Listening;
use super::error::RunError;
use crate::background::logger::{quoted, value};
use crate::sys;

/// The sockets passed to this process and not yet claimed by a listener.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    sockets: Vec<(String, OwnedFd)>,
}

/// The variables of the activation protocol; `None` for a variable that is not set or not UTF-8.
#[derive(Debug, Default)]
pub(crate) struct Variables {
    /// `LISTEN_PID`: the process that the other variables are meant for.
    pub(crate) pid: Option<String>,
    /// `LISTEN_FDS`: the number of descriptors.
    pub(crate) count: Option<String>,
    /// `LISTEN_FDNAMES`: a name for each descriptor, separated by colons.
    pub(crate) names: Option<String>,
}

/// The number of the first descriptor that is passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

impl Variables {
    fn of_this_process() -> Variables {
        let value = |name| std::env::var(name).ok();
        Variables {
            pid: value("LISTEN_PID"),
            count: value("LISTEN_FDS"),
            names: value("LISTEN_FDNAMES"),
        }
    }

    /// The descriptors announced to the process `own`: all of them, or an error if any announcement
    /// cannot be true.
    ///
    /// `passed` says whether a number is a descriptor that another program passed. The first number
    /// that is not ends the search, so its time is bounded by the number of descriptors, whatever
    /// the variables contain.
    pub(crate) fn announced(
        &self,
        own: u32,
        passed: impl Fn(RawFd) -> io::Result<()>,
    ) -> Result<Vec<(RawFd, String)>, String> {
        let (Some(pid), Some(count)) = (&self.pid, &self.count) else {
            return Ok(Vec::new());
        };
        let pid: u32 = pid.parse().map_err(|_| "LISTEN_PID is not a number".to_owned())?;
        if pid != own {
            return Ok(Vec::new());
        }
        let count: RawFd = count.parse().map_err(|_| "LISTEN_FDS is not a number".to_owned())?;
        let numbers = match FIRST.checked_add(count) {
            // Names without descriptors have no meaning.
            Some(end) if end == FIRST => return Ok(Vec::new()),
            Some(end) if end > FIRST => FIRST..end,
            Some(_) | None => return Err("LISTEN_FDS is not a number of descriptors".to_owned()),
        };
        if let Some(names) = &self.names
            && names.split(':').count() != numbers.len()
        {
            return Err(format!("LISTEN_FDNAMES does not have {count} names"));
        }
        let mut names = self.names.as_ref().map(|names| names.split(':'));
        let mut found = Vec::new();
        for number in numbers {
            passed(number).map_err(|error| {
                format!("LISTEN_FDS={count}, but descriptor {number} was not passed: {error}")
            })?;
            // systemd gives this name to descriptors without a name.
            let name = names.as_mut().map_or(Some("unknown"), Iterator::next).unwrap_or_default();
            found.push((number, name.to_owned()));
        }
        Ok(found)
    }
}

impl Inherited {
    /// Takes the descriptors that `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` announce for this
    /// process.
    ///
    /// Variables that are meant for another process or cannot be true announce nothing.
    pub(crate) fn from_environment() -> Inherited {
        let announced = Variables::of_this_process().announced(std::process::id(), sys::was_passed);
        let announced = match announced {
            Ok(announced) => announced,
            Err(error) => {
                log::warn!("event=sockets_not_inherited error={error}", error = quoted(&error));
                return Inherited::default();
            }
        };
        let mut sockets = Vec::new();
        for (fd, name) in announced {
            match sys::adopt_inherited(fd) {
                Ok(fd) => sockets.push((name, fd)),
                Err(error) => {
                    log::warn!(
                        "event=socket_not_inherited fd={fd} name={name} error={error}",
                        name = value(&name),
                        error = quoted(&error)
                    );
                }
            }
        }
        Inherited { sockets }
    }

    /// The names of the sockets that no listener has claimed.
    pub(crate) fn names(&self) -> impl Iterator<Item = (&str, &OwnedFd)> {
        self.sockets.iter().map(|(name, fd)| (name.as_str(), fd))
    }

    /// Takes all listening sockets of this name: at least one, and all of the wanted type.
    pub(crate) fn take(
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

    /// The sockets that no listener has claimed, logged once, because the usual cause is a misspelt
    /// name. Sockets that clients can connect to are kept: a reload may claim them.
    pub(crate) fn finish(self) -> Vec<Listening> {
        let mut unused = Vec::new();
        for (name, fd) in self.sockets {
            log::warn!(
                "event=socket_unused name={} hint={}",
                value(&name),
                quoted(format_args!("no listener has address = systemd:{name}"))
            );
            if let Ok(fd) = check(&name, fd, SocketType::STREAM) {
                unused.push(Listening::inherited(fd, &name));
            }
        }
        unused
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
    rustix::io::ioctl_fionbio(&fd, true).map_err(RunError::system("inherited socket"))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u32 = 7;

    /// A process that was passed 3 and 4, and that has opened 5 itself.
    fn passed(number: RawFd) -> io::Result<()> {
        match number {
            3 | 4 => Ok(()),
            5 => Err(io::Error::other("our own")),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn announced(pid: &str, count: &str, names: Option<&str>) -> Result<Vec<String>, String> {
        let text = |text: &str| Some(text.to_owned());
        let names = names.and_then(text);
        let variables = Variables { pid: text(pid), count: text(count), names };
        let found = variables.announced(OWN, passed)?;
        Ok(found.into_iter().map(|(number, name)| format!("{number}={name}")).collect())
    }

    #[test]
    fn what_was_passed_is_found_by_its_name() {
        assert_eq!(announced("7", "2", Some("web:admin")).unwrap(), ["3=web", "4=admin"]);
        assert_eq!(announced("7", "2", Some("web:web")).unwrap(), ["3=web", "4=web"]);
        assert_eq!(announced("7", "2", Some(":")).unwrap(), ["3=", "4="]);
        assert_eq!(announced("7", "1", None).unwrap(), ["3=unknown"]);
    }

    #[test]
    fn what_is_meant_for_another_or_for_nobody_is_left_alone() {
        let nothing = Vec::<String>::new();
        assert_eq!(announced("8", "2", Some("web:admin")).unwrap(), nothing);
        assert_eq!(announced("8", "nonsense", None).unwrap(), nothing);
        assert_eq!(announced("7", "0", Some("web:admin")).unwrap(), nothing);
        let variables = Variables { count: Some("2".to_owned()), ..Variables::default() };
        assert_eq!(variables.announced(OWN, passed), Ok(Vec::new()));
    }

    #[test]
    fn what_was_not_passed_is_never_taken() {
        // One more than was passed is a descriptor of the process itself: the whole announcement is
        // wrong.
        assert!(announced("7", "3", None).unwrap_err().contains("descriptor 5"));
        for count in ["100000", "2147483644", "2147483645", "4294967293", "-1", "", " 2", "2.0"] {
            assert!(announced("7", count, None).is_err(), "{count}");
        }
        for (count, names) in [("2", "web"), ("1", "web:admin"), ("2", "")] {
            assert!(announced("7", count, Some(names)).is_err(), "{count} {names}");
        }
        assert!(announced("", "2", None).is_err());
    }
}
