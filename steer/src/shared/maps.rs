//! The maps and the program of shared ports. `bpf/shared.h` has their entries; a test compares
//! sizes and offsets.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use aya::programs::{CgroupSockopt, ProgramError, SkReuseport, SkReuseportAttachType};

use super::*;
use crate::steering::{absent, absent_is_fine, take_map};

/// Most public addresses of a pool.
pub(super) const MAX_GROUPS: u32 = 32;
/// How long a listener of an earlier process is waited for; longer means that the process runs.
const HANDOVER: Duration = Duration::from_secs(2);
const CHOOSER: &str = "chooser";
const GUARD: &str = "guard";
const PROGRAM: &str = "steer_shared";

/// In `moved`: the connection does not count.
const NOT_COUNTED: u32 = u32::MAX;

/// The other end of a connection, a key of `directed`: its address as IPv6 or IPv4-mapped IPv6, and
/// both ports.
pub(super) type Remote = [u8; 20];

/// The one entry of `shared`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SharedSettings {
    /// Not 0: connections are counted although no process has the sinks.
    pub pinned: u32,
    /// Not 0: `directed` may have entries.
    pub directs: u32,
}

/// What the programs count of migration: connections, and handshakes under way, whose listener
/// closed before they were accepted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// Those that went to another worker.
    pub migrated: u64,
    /// Those that were reset, because no other listener was open.
    pub lost: u64,
    /// Connections that are open and count for another worker than their first.
    pub open: u64,
}

/// The maps, by the names that they have in the object and as pins.
#[derive(Debug)]
pub(crate) struct SharedMaps {
    group_listeners: MapData,
    listener_workers: Map,
    shared: Map,
    moves: Map,
    moved: Map,
    directed: Map,
}

/// The program that chooses.
#[derive(Debug)]
pub(super) enum Chooser {
    Loaded(Box<Ebpf>),
    Pinned(Box<SkReuseport>),
}

/// Loads maps, and the programs for shared ports, without attaching them.
pub(crate) fn load_programs() -> Result<(Ebpf, Maps), Error> {
    let (mut ebpf, maps) = create_maps(&[])?;
    let refused = |error| Error::refused("load the programs of a shared port", error);
    program::<SockOps>(&mut ebpf, "steer_shared_events")?.load().map_err(refused)?;
    program::<SkReuseport>(&mut ebpf, PROGRAM)?.load().map_err(refused)?;
    program::<CgroupSockopt>(&mut ebpf, "steer_guard")?.load().map_err(refused)?;
    Ok((ebpf, maps))
}

impl SharedMaps {
    /// Maps whose size matters; a pool without shared ports does not use them.
    pub const LARGE: [&str; 2] = ["group_listeners", "listener_workers"];

    pub fn of(ebpf: &mut Ebpf) -> Result<SharedMaps, Error> {
        SharedMaps::from_source(|name| take_map(ebpf, name))
    }

    fn from_source(
        mut source: impl FnMut(&'static str) -> Result<Map, Error>,
    ) -> Result<SharedMaps, Error> {
        let Map::ReusePortSockArray(group_listeners) = source("group_listeners")? else {
            return Err(absent("`group_listeners` is no array of sockets".to_owned()));
        };
        let (shared, moves) = (source("shared")?, source("moves")?);
        let (moved, directed) = (source("moved")?, source("directed")?);
        let listener_workers = source("listener_workers")?;
        let maps = SharedMaps { group_listeners, listener_workers, shared, moves, moved, directed };
        let check = || {
            Array::<_, SharedSettings>::try_from(&maps.shared)?;
            Array::<_, Moves>::try_from(&maps.moves)?;
            HashMap::<_, u64, u32>::try_from(&maps.moved)?;
            HashMap::<_, u64, u32>::try_from(&maps.listener_workers)?;
            HashMap::<_, Remote, u32>::try_from(&maps.directed).map(drop)
        };
        check().map_err(|error: MapError| Error::refused("use a map of a shared port", error))?;
        Ok(maps)
    }

    /// Lets the program choose this listener. A listener can be registered once: the kernel needs
    /// some milliseconds to drop the maps of an earlier process.
    pub fn register(&mut self, group: u32, worker: u32, socket: &OwnedFd) -> Result<(), Error> {
        let (map, index) = (self.group_listeners.fd().as_fd(), index(group, worker));
        let until = Instant::now() + HANDOVER;
        loop {
            let error = match sys::set_socket(map, index, socket.as_fd()) {
                Ok(()) => return self.note_worker(worker, socket),
                Err(error) => error,
            };
            if error.raw_os_error() != Some(libc::EBUSY) || Instant::now() > until {
                return Err(Error::System { step: "register a listener", error });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes a listener from the program; it is no error if there is none.
    pub fn clear(&self, group: u32, worker: u32) -> Result<(), Error> {
        sys::clear_socket(self.group_listeners.fd().as_fd(), index(group, worker))
            .map_err(|error| Error::System { step: "remove a listener", error })
    }

    fn note_worker(&mut self, worker: u32, listener: &OwnedFd) -> Result<(), Error> {
        if worker == MAX_WORKERS {
            // A sink.
            return Ok(());
        }
        let cookie = cookie_of(listener)?;
        HashMap::try_from(&mut self.listener_workers)
            .and_then(|mut map: HashMap<&mut MapData, u64, u32>| map.insert(cookie, worker, ANY))
            .map_err(|error| Error::refused("note the worker of a listener", error))
    }

    /// Forgets which worker a listener had, after it was closed.
    pub fn forget(&mut self, cookie: u64) -> Result<(), Error> {
        let map = HashMap::<&mut MapData, u64, u32>::try_from(&mut self.listener_workers);
        absent_is_fine(map.and_then(|mut map| map.remove(&cookie)))
            .map_err(|error| Error::refused("forget the worker of a listener", error))
    }

    /// Forgets listeners that were closed while no process looked after them.
    pub fn forget_closed(&mut self) -> Result<(), Error> {
        let refused = |error| Error::refused("read the workers of listeners", error);
        let map = HashMap::<&MapData, u64, u32>::try_from(&self.listener_workers);
        let all: Vec<(u64, u32)> =
            map.map_err(refused)?.iter().collect::<Result<_, _>>().map_err(refused)?;
        for (cookie, worker) in all {
            let mut is_open = false;
            for group in 0..MAX_GROUPS {
                is_open |= self.registered(group, worker)? == Some(cookie);
            }
            if !is_open {
                self.forget(cookie)?;
            }
        }
        Ok(())
    }

    /// The cookie of a listener that the program can choose.
    pub fn registered(&self, group: u32, worker: u32) -> Result<Option<u64>, Error> {
        sys::socket_cookie(self.group_listeners.fd().as_fd(), index(group, worker))
            .map_err(|error| Error::System { step: "look a listener up", error })
    }

    /// The present worker of a connection that was moved, by its cookie.
    pub fn moved_to(&self, cookie: u64) -> Option<u32> {
        let map = HashMap::<&MapData, u64, u32>::try_from(&self.moved);
        map.and_then(|map| map.get(&cookie, 0)).ok().filter(|&worker| worker != NOT_COUNTED)
    }

    /// Keeps the program from moving the count of a connection that does not count.
    pub fn is_not_counted(&mut self, cookie: u64) -> Result<(), Error> {
        HashMap::try_from(&mut self.moved)
            .and_then(|mut map: HashMap<&mut MapData, u64, u32>| {
                map.insert(cookie, NOT_COUNTED, ANY)
            })
            .map_err(|error| Error::refused("note a connection that does not count", error))
    }

    /// The connections that do not count, by cookie.
    pub fn not_counted(&self) -> Result<HashSet<u64>, Error> {
        let refused = |error| Error::refused("read the connections that do not count", error);
        let map = HashMap::<&MapData, u64, u32>::try_from(&self.moved).map_err(refused)?;
        let all: Vec<(u64, u32)> = map.iter().collect::<Result<_, _>>().map_err(refused)?;
        Ok(all.into_iter().filter(|it| it.1 == NOT_COUNTED).map(|it| it.0).collect())
    }

    /// Forgets a connection that does not count.
    pub fn forget_not_counted(&mut self, cookie: u64) -> Result<(), Error> {
        let map = HashMap::<&mut MapData, u64, u32>::try_from(&mut self.moved);
        absent_is_fine(map.and_then(|mut map| map.remove(&cookie)))
            .map_err(|error| Error::refused("forget a connection that does not count", error))
    }

    /// Has the program give the connection from this end to a worker, whatever the policy.
    pub fn direct(&mut self, remote: &Remote, worker: u32) -> Result<(), Error> {
        HashMap::try_from(&mut self.directed)
            .and_then(|mut map: HashMap<&mut MapData, Remote, u32>| map.insert(remote, worker, ANY))
            .map_err(|error| Error::refused("direct a connection to a worker", error))?;
        change(&mut self.shared, |settings| settings.directs = 1)
    }

    /// Forgets it; it is no error if there is none.
    pub fn direct_no_more(&mut self, remote: &Remote) -> Result<(), Error> {
        let map = HashMap::<&mut MapData, Remote, u32>::try_from(&mut self.directed);
        absent_is_fine(map.and_then(|mut map| map.remove(remote)))
            .map_err(|error| Error::refused("forget a connection of this process", error))?;
        let map = HashMap::<&MapData, Remote, u32>::try_from(&self.directed);
        if map.is_ok_and(|map| map.keys().next().is_none()) {
            change(&mut self.shared, |settings| settings.directs = 0)?;
        }
        Ok(())
    }

    /// Forgets all of them.
    pub fn direct_none(&mut self) -> Result<(), Error> {
        let refused = |error| Error::refused("read the connections of this process", error);
        let map = HashMap::<&MapData, Remote, u32>::try_from(&self.directed).map_err(refused)?;
        let all: Vec<Remote> = map.keys().collect::<Result<_, _>>().map_err(refused)?;
        all.iter().try_for_each(|remote| self.direct_no_more(remote))?;
        change(&mut self.shared, |settings| settings.directs = 0)
    }

    pub fn moves(&self) -> Result<Moves, Error> {
        Array::try_from(&self.moves)
            .and_then(|map: Array<&MapData, Moves>| map.get(&0, 0))
            .map_err(|error| Error::refused("read the moves", error))
    }
}

fn index(group: u32, worker: u32) -> u32 {
    group * (MAX_WORKERS + 1) + worker
}

impl Chooser {
    /// Attaches the program to the group of a listener.
    pub fn attach(&mut self, socket: &OwnedFd) -> Result<(), Error> {
        self.program()?
            .attach(socket)
            .map_err(|error| Error::refused("attach to the listeners of an address", error))
    }

    fn program(&mut self) -> Result<&mut SkReuseport, Error> {
        match self {
            Chooser::Loaded(ebpf) => program(ebpf, PROGRAM),
            Chooser::Pinned(program) => Ok(program),
        }
    }
}

/// Pins.
impl Shared {
    /// Files of a directory with pins, beside those of all pools.
    pub const PINS: [&str; 8] = [
        CHOOSER,
        GUARD,
        "group_listeners",
        "listener_workers",
        "shared",
        "moves",
        "moved",
        "directed",
    ];

    /// Whether a directory has the pins of a pool with shared ports.
    pub fn is_pinned(directory: &Path) -> bool {
        directory.join(CHOOSER).exists()
    }

    /// Connections are counted from now on although this process may end.
    pub fn pin(&mut self, directory: &Path) -> Result<(), Error> {
        let refused = |error| Error::refused("pin a map", error);
        let maps = &self.maps;
        maps.group_listeners.pin(directory.join("group_listeners")).map_err(refused)?;
        for (name, map) in [
            ("listener_workers", &maps.listener_workers),
            ("shared", &maps.shared),
            ("moves", &maps.moves),
            ("moved", &maps.moved),
            ("directed", &maps.directed),
        ] {
            map.pin(directory.join(name)).map_err(refused)?;
        }
        change(&mut self.maps.shared, |settings| settings.pinned = 1)?;
        let refused = |error| Error::refused("pin a program", error);
        self.chooser.program()?.pin(directory.join(CHOOSER)).map_err(refused)?;
        if let Some(link) = self.guard.take() {
            sys::pin(link.as_fd(), &directory.join(GUARD))
                .map_err(|error| Error::System { step: "pin a link", error })?;
        }
        Ok(())
    }

    /// From now on the kernel chooses alone when no process has the sinks.
    pub fn unpin(directory: &Path) -> Result<(), Error> {
        let path = directory.join("shared");
        if !path.exists() {
            return Ok(());
        }
        change(&mut pinned_map(&path)?, |settings| settings.pinned = 0)
    }

    pub fn from_pins(directory: &Path) -> Result<Shared, Error> {
        let maps = SharedMaps::from_source(|name| pinned_map(&directory.join(name)))?;
        let kind = SkReuseportAttachType::SelectOrMigrate;
        let chooser = SkReuseport::from_pin(directory.join(CHOOSER), kind)
            .map_err(|error: ProgramError| Error::refused("open a pinned program", error))?;
        Ok(Shared::new(maps, Chooser::Pinned(Box::new(chooser)), None))
    }
}

fn pinned_map(path: &Path) -> Result<Map, Error> {
    let refused = |error| Error::refused("open a pinned map", error);
    let data = MapData::from_pin(path).map_err(refused)?;
    Map::from_map_data(data).map_err(refused)
}

/// Changes what the loader tells the programs.
fn change(map: &mut Map, change: impl FnOnce(&mut SharedSettings)) -> Result<(), Error> {
    Array::try_from(map)
        .and_then(|mut map: Array<&mut MapData, SharedSettings>| {
            let before = map.get(&0, 0)?;
            let mut settings = before;
            change(&mut settings);
            if settings == before { Ok(()) } else { map.set(0, settings, ANY) }
        })
        .map_err(|error| Error::refused("write settings", error))
}
