//! The maps of one pool, each with the type of its entries.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use aya::maps::{Array, HashMap, Map, MapData, MapError};

use crate::error::Error;
use crate::layout::{Address, Settings, Totals, VERSION, WorkerCounts, WorkerSettings};
use crate::pins;
use crate::steering::{ANY, Options, absent, nanos, seed};
use crate::sys::{LiveBounds, LiveCounts};

/// The maps, by the names that they have in the object and as pins.
#[derive(Debug)]
pub(crate) struct Maps {
    settings: Map,
    pub workers: Map,
    counts: Map,
    state: Map,
    bounds: Map,
    members: Map,
    publics: Map,
    remotes: Map,
    owners: Map,
    pub listeners: MapData,
    /// The memory of `counts`, which the programs change meanwhile.
    pub live_counts: LiveCounts,
    /// The memory of `bounds`, as well.
    pub live_bounds: Arc<LiveBounds>,
}

pub(crate) type Addresses<T> = HashMap<T, Address, u32>;

impl Maps {
    /// Names of the maps that have pins. `undecided` is used by the programs only, which keep it.
    pub const NAMES: [&str; 10] = [
        "settings",
        "workers",
        "counts",
        "state",
        "bounds",
        "members",
        "publics",
        "remotes",
        "owners",
        "listeners",
    ];

    /// Takes each map from a source by its name and checks the sizes of its entries.
    pub fn from_source(
        mut source: impl FnMut(&'static str) -> Result<Map, Error>,
    ) -> Result<Maps, Error> {
        let Map::SockMap(listeners) = source("listeners")? else {
            return Err(absent("`listeners` is no map of sockets".to_owned()));
        };
        let counts = source("counts")?;
        let bounds = source("bounds")?;
        let live_bounds = Arc::new(live(&bounds, LiveBounds::map)?);
        let live_counts = live(&counts, |map| LiveCounts::map(map, Arc::clone(&live_bounds)))?;
        let maps = Maps {
            settings: source("settings")?,
            workers: source("workers")?,
            counts,
            state: source("state")?,
            bounds,
            members: source("members")?,
            publics: source("publics")?,
            remotes: source("remotes")?,
            owners: source("owners")?,
            listeners,
            live_counts,
            live_bounds,
        };
        let check = || {
            maps.settings()?;
            maps.workers()?;
            maps.counts()?;
            maps.state()?;
            maps.members()?;
            Addresses::try_from(&maps.publics)?;
            maps.remotes().map(drop)
        };
        check().map_err(|error: MapError| Error::refused("use a map", error))?;
        Ok(maps)
    }

    /// Writes the settings of a new pool.
    pub fn start(&mut self, options: &Options) -> Result<Settings, Error> {
        let netns = pins::own_namespace()?;
        let wait_ns = nanos(options.wait);
        let (version, seed) = (VERSION, seed()?);
        let settings = Settings { version, netns, wait_ns, seed, ..Default::default() };
        self.settings_mut()
            .and_then(|mut map| map.set(0, settings, ANY))
            .map_err(|error| Error::refused("write settings", error))?;
        Ok(settings)
    }

    pub fn read_settings(&self) -> Result<Settings, Error> {
        let settings = self.settings().and_then(|map| map.get(&0, 0));
        settings.map_err(|error| Error::refused("read settings", error))
    }

    /// Each map with its name, except `listeners`, which is no [`Map`].
    pub fn named(&self) -> [(&'static str, &Map); 9] {
        [
            ("settings", &self.settings),
            ("workers", &self.workers),
            ("counts", &self.counts),
            ("state", &self.state),
            ("bounds", &self.bounds),
            ("members", &self.members),
            ("publics", &self.publics),
            ("remotes", &self.remotes),
            ("owners", &self.owners),
        ]
    }

    pub fn settings(&self) -> Result<Array<&MapData, Settings>, MapError> {
        Array::try_from(&self.settings)
    }

    pub fn settings_mut(&mut self) -> Result<Array<&mut MapData, Settings>, MapError> {
        Array::try_from(&mut self.settings)
    }

    pub fn workers(&self) -> Result<Array<&MapData, WorkerSettings>, MapError> {
        Array::try_from(&self.workers)
    }

    pub fn workers_mut(&mut self) -> Result<Array<&mut MapData, WorkerSettings>, MapError> {
        Array::try_from(&mut self.workers)
    }

    pub fn counts(&self) -> Result<Array<&MapData, WorkerCounts>, MapError> {
        Array::try_from(&self.counts)
    }

    /// Only for tests: the programs are the writers.
    #[cfg(test)]
    pub fn counts_mut(&mut self) -> Result<Array<&mut MapData, WorkerCounts>, MapError> {
        Array::try_from(&mut self.counts)
    }

    pub fn state(&self) -> Result<Array<&MapData, Totals>, MapError> {
        Array::try_from(&self.state)
    }

    /// Only for tests: the programs are the writers.
    #[cfg(test)]
    pub fn state_mut(&mut self) -> Result<Array<&mut MapData, Totals>, MapError> {
        Array::try_from(&mut self.state)
    }

    pub fn members(&self) -> Result<Addresses<&MapData>, MapError> {
        HashMap::try_from(&self.members)
    }

    pub fn members_mut(&mut self) -> Result<Addresses<&mut MapData>, MapError> {
        HashMap::try_from(&mut self.members)
    }

    pub fn publics(&self) -> Result<Addresses<&MapData>, MapError> {
        HashMap::try_from(&self.publics)
    }

    pub fn publics_mut(&mut self) -> Result<Addresses<&mut MapData>, MapError> {
        HashMap::try_from(&mut self.publics)
    }

    /// Only for tests: the programs are the writers.
    #[cfg(test)]
    pub fn remotes_mut(&mut self) -> Result<HashMap<&mut MapData, [u8; 20], [u8; 16]>, MapError> {
        HashMap::try_from(&mut self.remotes)
    }

    /// The storage of sockets.
    pub fn owners(&self) -> std::io::Result<BorrowedFd<'_>> {
        match &self.owners {
            Map::SkStorage(map) => Ok(map.fd().as_fd()),
            _ => Err(std::io::Error::other("`owners` is no storage of sockets")),
        }
    }

    pub fn remotes(&self) -> Result<HashMap<&MapData, [u8; 20], [u8; 16]>, MapError> {
        HashMap::try_from(&self.remotes)
    }
}

/// The memory of an array.
fn live<T>(
    map: &Map,
    memory: impl FnOnce(BorrowedFd<'_>) -> std::io::Result<T>,
) -> Result<T, Error> {
    let Map::Array(data) = map else {
        return Err(absent("a map with shared memory is no array".to_owned()));
    };
    memory(data.fd().as_fd()).map_err(|error| Error::System { step: "map an array", error })
}
