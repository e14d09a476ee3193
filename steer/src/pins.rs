//! Pins: maps and links as files of bpffs, so that the kernel goes on choosing without the process
//! that loaded the programs, and the next one adopts them.
//!
//! A directory of its own, mode 0700, has all files of one pool.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use aya::maps::{Map, MapData};
use aya::programs::links::{FdLink, PinnedLink};

use crate::error::Error;
use crate::layout::VERSION;
use crate::machine;
use crate::maps::Maps;
use crate::shared::Shared;
use crate::steering::{Links, Steering};
use crate::sys;

const LOOKUP: &str = "lookup";
const EVENTS: &str = "events";

impl Steering {
    /// Pins maps and links to a new directory of bpffs. From now on dropping `self` detaches
    /// nothing; [`Steering::detach`] does.
    ///
    /// # Errors
    ///
    /// [`Error::Path`] if the parent is not on bpffs, or the directory exists (adopt it);
    /// [`Error::Refused`] if the kernel fails. Then nothing is pinned.
    pub fn pin(self, directory: &Path) -> Result<Steering, Error> {
        let step = "pin";
        let failed = |error, help: &str| Error::Path {
            step,
            path: directory.into(),
            error,
            help: Some(help.to_owned()),
        };
        let Links::Own { .. } = self.links else {
            let error = io::Error::other("the programs are pinned already");
            return Err(failed(error, "one directory is enough"));
        };
        let parent = directory.parent().unwrap_or(Path::new("/"));
        if !machine::is_bpffs(parent) {
            let error = io::Error::other("the directory above is not on bpffs");
            return Err(failed(error, machine::MOUNT_BPFFS));
        }
        DirBuilder::new().mode(0o700).create(directory).map_err(|error| {
            let exists = error.kind() == io::ErrorKind::AlreadyExists;
            let help = if exists { "adopt it, or remove it" } else { "give write access" };
            failed(error, help)
        })?;
        let pinned = self.pin_into(directory);
        if pinned.is_err() {
            // The first error is the one to report.
            let _ = remove(directory);
        }
        pinned
    }

    fn pin_into(mut self, directory: &Path) -> Result<Steering, Error> {
        let refused = |error| Error::refused("pin a map", error);
        for (name, map) in self.maps.named() {
            map.pin(directory.join(name)).map_err(refused)?;
        }
        self.maps.listeners.pin(directory.join("listeners")).map_err(refused)?;
        if let Some(shared) = &mut self.shared {
            shared.pin(directory)?;
        }
        if let Links::Own { lookup, events } = self.links {
            let refused = |error| Error::refused("pin a link", error);
            let pin_lookup = |link: FdLink| link.pin(directory.join(LOOKUP)).map_err(refused);
            let lookup = lookup.map(pin_lookup).transpose()?;
            let events = events.pin(directory.join(EVENTS)).map_err(refused)?;
            self.links = Links::Pinned { lookup, events, directory: directory.into() };
        }
        Ok(self)
    }

    /// Adopts what [`Steering::pin`] left: settings, counts and connections go on as they are.
    ///
    /// # Errors
    ///
    /// [`Error::Path`] if the directory does not exist or may be written by others;
    /// [`Error::Version`] if it is of another version; [`Error::Invalid`] if it belongs to another
    /// network namespace than that of the calling thread; [`Error::Refused`] if the kernel fails.
    pub fn adopt(directory: &Path) -> Result<Steering, Error> {
        check_owner(directory)?;
        check_version(directory)?;
        let maps = Maps::from_source(|name| {
            let refused = |error| Error::refused("open a pinned map", error);
            let data = MapData::from_pin(directory.join(name)).map_err(refused)?;
            Map::from_map_data(data).map_err(refused)
        })?;
        let settings = maps.read_settings()?;
        let link = |name| {
            PinnedLink::from_pin(directory.join(name))
                .map_err(|error| Error::refused("open a pinned link", error))
        };
        let shared = Shared::is_pinned(directory);
        let lookup = if shared { None } else { Some(link(LOOKUP)?) };
        let links = Links::Pinned { lookup, events: link(EVENTS)?, directory: directory.into() };
        if settings.netns != own_namespace()? {
            return Err(Error::Invalid(format!(
                "{} belongs to another network namespace: adopt it there",
                directory.display()
            )));
        }
        if shared {
            return Steering::adopted_shared(maps, links, Shared::from_pins(directory)?);
        }
        Steering::adopted(maps, links)
    }
}

/// Removes the pins of a directory, and the directory. The programs are detached when no process
/// has a descriptor of the links either.
///
/// # Errors
///
/// [`Error::Path`] if a file cannot be removed.
pub fn remove(directory: &Path) -> Result<(), Error> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |error| Error::Path { step: "remove a pin", path, error, help: None }
    };
    Shared::unpin(directory)?;
    // The link in the namespace first: no SYN is chosen a worker for that is not counted.
    for name in [LOOKUP, EVENTS].into_iter().chain(Maps::NAMES).chain(Shared::PINS) {
        let path = directory.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.map_err(failed(&path))?,
        }
    }
    fs::remove_dir(directory).map_err(failed(directory))
}

/// Only root or the own user may have made the pins: their programs run in the kernel.
fn check_owner(directory: &Path) -> Result<(), Error> {
    let failed = |error, help: Option<&str>| Error::Path {
        step: "adopt",
        path: directory.into(),
        error,
        help: help.map(str::to_owned),
    };
    let found = fs::metadata(directory).map_err(|error| failed(error, None))?;
    let owner = found.uid();
    let trusted = owner == 0 || owner == rustix::process::geteuid().as_raw();
    if !trusted || found.mode() & 0o022 != 0 {
        let error = io::Error::other("other users can change it");
        return Err(failed(error, Some("remove it: the next start makes a new one")));
    }
    Ok(())
}

/// Before anything else is opened: another version can have other maps and sizes.
fn check_version(directory: &Path) -> Result<(), Error> {
    let step = "read the version of pinned maps";
    let settings = MapData::from_pin(directory.join("settings"));
    let settings = settings.map_err(|error| Error::refused(step, error))?;
    let size = settings.info().map_err(|error| Error::refused(step, error))?.value_size();
    let found = sys::first_word(settings.fd().as_fd(), size)
        .map_err(|error| Error::System { step, error })?;
    if found == VERSION {
        return Ok(());
    }
    Err(Error::Version { path: directory.into(), found })
}

pub(crate) fn own_namespace() -> Result<u64, Error> {
    let step = "identify the network namespace";
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    );
    let socket = socket.map_err(|error| Error::System { step, error: error.into() })?;
    sys::netns_cookie(socket).map_err(|error| Error::System { step, error })
}
