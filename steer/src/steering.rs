//! Loads the programs, attaches them by links, and has their settings and counts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use aya::maps::{Array, Map, MapData, MapError};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SkLookup, SockOps};
use aya::{Ebpf, EbpfLoader};
use rustix::time::{ClockId, clock_gettime};

use crate::error::Error;
use crate::layout::{
    Address, FULL_SPEED, MAX_WORKERS, Settings, Totals, WorkerCounts, WorkerSettings,
};
use crate::maps::{Addresses, Maps};
use crate::reconcile::Suspicions;
use crate::shared::{Shared, SharedMaps};
use crate::sys::LiveBounds;
use crate::{OBJECT, attach, sink, sys};

/// Insert or replace.
pub(crate) const ANY: u64 = 0;

/// How a pool is steered.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cgroup v2 directory whose processes are the workers; those in its descendants, too.
    pub cgroup: PathBuf,
    /// How long SYNs are dropped, so that clients try again, while no worker is usable; then they
    /// are reset. Zero: they are reset at once.
    pub wait: Duration,
}

/// The programs and maps of one pool.
///
/// Dropping it detaches the programs, unless they were pinned.
#[derive(Debug)]
pub struct Steering {
    pub(crate) maps: Maps,
    pub(crate) links: Links,
    pub(crate) settings: Settings,
    pub(crate) suspicions: Suspicions,
    /// `Some` if the workers share the public ports.
    pub(crate) shared: Option<Shared>,
    /// SYNs are dropped by them; the map of sockets does not keep them open. A shared port has its
    /// own.
    _sinks: Option<(OwnedFd, Option<OwnedFd>)>,
}

/// The programs are attached as long as these exist.
#[derive(Debug)]
#[expect(dead_code, reason = "links are kept, not used")]
pub(crate) enum Links {
    /// They end with their descriptors.
    Own { lookup: Option<FdLink>, events: FdLink },
    /// They end when the files are removed, too.
    Pinned { lookup: Option<PinnedLink>, events: PinnedLink, directory: PathBuf },
}

/// Changes the settings of workers that [`Steering::set_worker`] has added. It never waits.
#[derive(Debug)]
pub struct Writer(Map, Arc<LiveBounds>);

impl Writer {
    /// Changes the settings of a worker, from the next SYN on.
    ///
    /// # Errors
    ///
    /// As [`Steering::set_worker`].
    pub fn set(&mut self, worker: u32, settings: WorkerSettings) -> Result<(), Error> {
        check_worker(worker)?;
        check_settings(&settings)?;
        let map = Array::<&mut MapData, WorkerSettings>::try_from(&mut self.0);
        let written = map.and_then(|mut map| map.set(worker, settings, ANY));
        self.1.remove();
        written.map_err(|error| Error::refused("write the settings of a worker", error))
    }
}

impl Steering {
    /// Loads the programs and attaches them: to the network namespace of the calling thread, and to
    /// the cgroup of the workers. There are no workers and no public addresses yet.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`] if the machine lacks something; [`Error::Path`] if the cgroup is none;
    /// [`Error::Refused`] if the kernel refuses a map, a program or a link.
    pub fn load(options: &Options) -> Result<Steering, Error> {
        let cgroup = attach::usable_cgroup(options)?;
        let (mut ebpf, mut maps) = load_programs()?;
        let sinks = sink::open_for(&maps)?;
        let settings = maps.start(options)?;
        let events = attach::events(program(&mut ebpf, "steer_events")?, cgroup)?;
        let lookup = Some(attach::lookup(program(&mut ebpf, "steer_lookup")?)?);
        let links = Links::Own { lookup, events };
        Ok(Steering { _sinks: Some(sinks), ..Steering::of(maps, links, settings, None) })
    }

    pub(crate) fn of(
        maps: Maps,
        links: Links,
        settings: Settings,
        shared: Option<Shared>,
    ) -> Steering {
        let suspicions = Suspicions::default();
        Steering { maps, links, settings, suspicions, shared, _sinks: None }
    }

    /// From pinned maps and links; the sinks open again.
    pub(crate) fn adopted(maps: Maps, links: Links) -> Result<Steering, Error> {
        let settings = maps.read_settings()?;
        let sinks = Some(sink::open_for(&maps)?);
        Ok(Steering { _sinks: sinks, ..Steering::of(maps, links, settings, None) })
    }

    /// Adds a public address: SYNs to it go to workers. `[::]:P` stands for IPv4, too.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for port 0, [`Error::Refused`] if there are too many (256).
    pub fn add_public(&mut self, address: SocketAddr) -> Result<(), Error> {
        self.check_own_ports()?;
        check_port(address.port())?;
        for address in public_forms(address) {
            let inserted = self.publics()?.insert(Address::from(address), 1, ANY);
            inserted.map_err(|error| Error::refused("add a public address", error))?;
        }
        Ok(())
    }

    /// Adds an IPv6 address: `[::]:P` does not stand for IPv4.
    ///
    /// # Errors
    ///
    /// As [`Steering::add_public`], and [`Error::Invalid`] for an IPv4 address.
    pub fn add_public_ipv6(&mut self, address: SocketAddr) -> Result<(), Error> {
        check_port(address.port())?;
        if address.is_ipv4() {
            return Err(Error::Invalid(format!("{address} is an IPv4 address")));
        }
        self.check_own_ports()?;
        let inserted = self.publics()?.insert(Address::from(address), 1, ANY);
        inserted.map_err(|error| Error::refused("add a public address", error))
    }

    /// Removes every public address that is not to stay. IPv4 and IPv6 are asked for separately,
    /// also where `[::]:P` stands for both.
    ///
    /// # Errors
    ///
    /// As [`Steering::public_addresses`], and [`Error::Invalid`] with shared ports.
    pub fn retain_publics(&mut self, stays: impl Fn(SocketAddr) -> bool) -> Result<(), Error> {
        self.check_own_ports()?;
        for address in self.public_addresses()?.into_iter().filter(|&address| !stays(address)) {
            absent_is_fine(self.publics()?.remove(&Address::from(address)))
                .map_err(|error| Error::refused("remove a public address", error))?;
        }
        Ok(())
    }

    /// Removes a public address: the kernel looks up its listeners as without steering.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    pub fn remove_public(&mut self, address: SocketAddr) -> Result<(), Error> {
        if let Some(shared) = &mut self.shared {
            shared.close_group(address)?;
        }
        for address in public_forms(address) {
            absent_is_fine(self.publics()?.remove(&Address::from(address)))
                .map_err(|error| Error::refused("remove a public address", error))?;
        }
        Ok(())
    }

    /// The public addresses, in no order. `[::]:P` is there as `0.0.0.0:P`, too.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    pub fn public_addresses(&self) -> Result<Vec<SocketAddr>, Error> {
        let address = |key: Result<Address, MapError>| key.map(|key| key.socket_addr());
        let all = self.maps.publics().and_then(|map| map.keys().map(address).collect());
        all.map_err(|error| Error::refused("read the public addresses", error))
    }

    /// Adds a worker, or changes its settings. The change applies to the next SYN.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if a value is out of range, or if the number is that of a removed worker
    /// that still has listeners or connections.
    pub fn set_worker(&mut self, worker: u32, settings: WorkerSettings) -> Result<(), Error> {
        check_worker(worker)?;
        check_settings(&settings)?;
        if self.worker(worker)?.weight == 0 && !self.is_free(worker)? {
            return Err(Error::Invalid(format!(
                "worker number {worker} still has listeners or connections of a removed worker"
            )));
        }
        self.set_former_worker(worker, settings)
    }

    /// As [`Steering::set_worker`], for a removed worker that returns: its number may have
    /// listeners and connections, which are its own ([`Steering::former_worker`]).
    ///
    /// # Errors
    ///
    /// As [`Steering::set_worker`].
    pub fn set_former_worker(
        &mut self,
        worker: u32,
        settings: WorkerSettings,
    ) -> Result<(), Error> {
        check_worker(worker)?;
        check_settings(&settings)?;
        self.write_worker(worker, settings)?;
        if worker >= self.settings.workers {
            self.write_settings(Settings { workers: worker + 1, ..self.settings })?;
        }
        Ok(())
    }

    /// Removes a worker and its addresses. Its connections go on and count; the number can be used
    /// again when [`Steering::is_free`] is true.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a number out of range, [`Error::Refused`] if the kernel fails.
    pub fn remove_worker(&mut self, worker: u32) -> Result<(), Error> {
        check_worker(worker)?;
        self.write_worker(worker, WorkerSettings::default())?;
        if let Some(shared) = &mut self.shared {
            shared.close_worker(worker)?;
        }
        let refused = |error| Error::refused("read the addresses of workers", error);
        let mut own = Vec::new();
        for entry in self.maps.members().map_err(refused)?.iter() {
            let (address, of) = entry.map_err(refused)?;
            if of == worker {
                own.push(address);
            }
        }
        for address in own {
            absent_is_fine(self.members()?.remove(&address))
                .map_err(|error| Error::refused("remove the address of a worker", error))?;
        }
        for is_v6 in 0..2 {
            sys::clear_socket(self.maps.listeners.fd().as_fd(), 2 * worker + is_v6)
                .map_err(|error| Error::System { step: "remove a listener", error })?;
        }
        self.forget_last_workers()
    }

    /// Registers listeners at exactly this address as the worker's. Add it before the worker
    /// listens.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for port 0, a number out of range, or an address of another worker.
    pub fn add_address(&mut self, worker: u32, address: SocketAddr) -> Result<(), Error> {
        self.check_own_ports()?;
        check_worker(worker)?;
        check_port(address.port())?;
        let key = Address::from(address);
        if let Ok(other) = self.members()?.get(&key, 0)
            && other != worker
        {
            return Err(Error::Invalid(format!("{address} is the address of worker {other}")));
        }
        let inserted = self.members()?.insert(key, worker, ANY);
        inserted.map_err(|error| Error::refused("add the address of a worker", error))
    }

    /// Registers listeners at this port as the worker's, at the loopback addresses or at all
    /// addresses, IPv4 and IPv6.
    ///
    /// # Errors
    ///
    /// As [`Steering::add_address`].
    pub fn add_port(&mut self, worker: u32, port: u16) -> Result<(), Error> {
        let all: [IpAddr; 4] = [
            Ipv4Addr::LOCALHOST.into(),
            Ipv4Addr::UNSPECIFIED.into(),
            Ipv6Addr::LOCALHOST.into(),
            Ipv6Addr::UNSPECIFIED.into(),
        ];
        all.into_iter().try_for_each(|ip| self.add_address(worker, SocketAddr::new(ip, port)))
    }

    /// The addresses of workers, in no order.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    pub fn addresses(&self) -> Result<Vec<(SocketAddr, u32)>, Error> {
        let entry = |entry: Result<(Address, u32), MapError>| {
            entry.map(|(address, worker)| (address.socket_addr(), worker))
        };
        let all = self.maps.members().and_then(|map| map.iter().map(entry).collect());
        all.map_err(|error| Error::refused("read the addresses of workers", error))
    }

    /// The settings of a worker; the weight is 0 if there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a number out of range, [`Error::Refused`] if the kernel fails.
    pub fn worker(&self, worker: u32) -> Result<WorkerSettings, Error> {
        check_worker(worker)?;
        let settings = self.maps.workers().and_then(|map| map.get(&worker, 0));
        settings.map_err(|error| Error::refused("read the settings of a worker", error))
    }

    /// A handle that changes settings of workers, for another thread. Each worker is to have one
    /// writer at a time.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if there is no descriptor for it.
    pub fn writer(&self) -> Result<Writer, Error> {
        let step = "share the settings of workers";
        let Map::Array(workers) = &self.maps.workers else {
            return Err(absent("`workers` is no array".to_owned()));
        };
        let fd = workers.fd().as_fd().try_clone_to_owned();
        let fd = fd.map_err(|error| Error::System { step, error })?;
        let data = MapData::from_fd(fd).map_err(|error| Error::refused(step, error))?;
        Ok(Writer(Map::Array(data), Arc::clone(&self.maps.live_bounds)))
    }

    /// What the programs count for a worker.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a number out of range, [`Error::Refused`] if the kernel fails.
    pub fn counts(&self, worker: u32) -> Result<WorkerCounts, Error> {
        check_worker(worker)?;
        let counts = self.maps.counts().and_then(|map| map.get(&worker, 0));
        counts.map_err(|error| Error::refused("read the counts of a worker", error))
    }

    /// What the programs count for the pool.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    pub fn totals(&self) -> Result<Totals, Error> {
        let totals = self.maps.state().and_then(|map| map.get(&0, 0));
        totals.map_err(|error| Error::refused("read the totals", error))
    }

    /// The cookie of the worker's registered listener (`SO_COOKIE`), IPv4 or IPv6.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a number out of range, [`Error::System`] if the kernel fails.
    pub fn listener(&self, worker: u32, is_v6: bool) -> Result<Option<u64>, Error> {
        check_worker(worker)?;
        let index = 2 * worker + u32::from(is_v6);
        sys::socket_cookie(self.maps.listeners.fd().as_fd(), index)
            .map_err(|error| Error::System { step: "look a listener up", error })
    }

    /// Whether no listener and no connection refers to this number.
    ///
    /// # Errors
    ///
    /// As [`Steering::counts`].
    pub fn is_free(&self, worker: u32) -> Result<bool, Error> {
        let counts = self.counts(worker)?;
        Ok(counts.listeners == [0, 0] && counts.live == 0)
    }

    /// The number of handshakes that the programs remember: those under way, and those that were
    /// not completed, until newer ones need the room (65,536). Reads them all.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    pub fn handshakes(&self) -> Result<usize, Error> {
        let count = self
            .maps
            .remotes()
            .and_then(|map| map.keys().try_fold(0, |count, key| key.map(|_| count + 1)));
        count.map_err(|error| Error::refused("read the handshakes", error))
    }

    /// Sets how long SYNs are dropped while no worker is usable, before they are reset.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    pub fn set_wait(&mut self, wait: Duration) -> Result<(), Error> {
        self.write_settings(Settings { wait_ns: nanos(wait), ..self.settings })
    }

    /// Detaches the programs and removes the pins. Connections go on; nothing counts them.
    ///
    /// # Errors
    ///
    /// [`Error::Path`] if a pin cannot be removed; then the programs may still be attached.
    pub fn detach(self) -> Result<(), Error> {
        match self.links {
            Links::Own { .. } => Ok(()),
            Links::Pinned { directory, .. } => crate::pins::remove(&directory),
        }
    }

    pub(crate) fn publics(&mut self) -> Result<Addresses<&mut MapData>, Error> {
        self.maps.publics_mut().map_err(|error| Error::refused("use the public addresses", error))
    }

    fn check_own_ports(&self) -> Result<(), Error> {
        let text = "the workers of this pool share public ports: open listeners for them";
        if self.shared.is_none() { Ok(()) } else { Err(Error::Invalid(text.to_owned())) }
    }

    fn members(&mut self) -> Result<Addresses<&mut MapData>, Error> {
        self.maps
            .members_mut()
            .map_err(|error| Error::refused("use the addresses of workers", error))
    }

    /// Ends the scan after the last worker that exists.
    fn forget_last_workers(&mut self) -> Result<(), Error> {
        let mut workers = self.settings.workers;
        while workers > 0 && self.worker(workers - 1)?.weight == 0 {
            workers -= 1;
        }
        self.write_settings(Settings { workers, ..self.settings })
    }

    pub(crate) fn write_worker(
        &mut self,
        worker: u32,
        settings: WorkerSettings,
    ) -> Result<(), Error> {
        let written = self.maps.workers_mut().and_then(|mut map| map.set(worker, settings, ANY));
        self.maps.live_bounds.remove();
        written.map_err(|error| Error::refused("write the settings of a worker", error))
    }

    pub(crate) fn write_settings(&mut self, settings: Settings) -> Result<(), Error> {
        let written = self.maps.settings_mut().and_then(|mut map| map.set(0, settings, ANY));
        self.maps.live_bounds.remove();
        written.map_err(|error| Error::refused("write settings", error))?;
        self.settings = settings;
        Ok(())
    }
}

/// The second of CLOCK_MONOTONIC, as the programs count it.
pub fn second() -> u32 {
    // Wraps after 136 years.
    clock_gettime(ClockId::Monotonic).tv_sec as u32
}

/// Loads maps, and the programs for workers with ports of their own, without attaching them.
///
/// # Errors
///
/// [`Error::Refused`] with the kernel's reason.
pub(crate) fn load_programs() -> Result<(Ebpf, Maps), Error> {
    let (mut ebpf, maps) = create_maps(&SharedMaps::LARGE)?;
    let refused = |error| Error::refused("load the programs", error);
    program::<SockOps>(&mut ebpf, "steer_events")?.load().map_err(refused)?;
    program::<SkLookup>(&mut ebpf, "steer_lookup")?.load().map_err(refused)?;
    Ok((ebpf, maps))
}

/// Creates the maps; those that are not used have the least size.
pub(crate) fn create_maps(unused: &[&'static str]) -> Result<(Ebpf, Maps), Error> {
    let mut loader = EbpfLoader::new();
    for name in unused {
        loader.map_max_entries(name, 1);
    }
    let loaded = loader.load(OBJECT);
    let mut ebpf = loaded.map_err(|error| Error::refused("create the maps", error))?;
    let maps = Maps::from_source(|name| take_map(&mut ebpf, name))?;
    Ok((ebpf, maps))
}

pub(crate) fn take_map(ebpf: &mut Ebpf, name: &str) -> Result<Map, Error> {
    ebpf.take_map(name).ok_or_else(|| absent(format!("the object has no map `{name}`")))
}

pub(crate) fn program<'a, P>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut P, Error>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program>,
{
    let found = ebpf.program_mut(name).and_then(|program| program.try_into().ok());
    found.ok_or_else(|| absent(format!("the object has no program `{name}`")))
}

pub(crate) fn absent(reason: String) -> Error {
    Error::Refused { step: "use the compiled programs", reason }
}

fn public_forms(address: SocketAddr) -> impl Iterator<Item = SocketAddr> {
    let any_v6 = address.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED);
    let v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
    std::iter::once(address).chain(any_v6.then_some(v4))
}

pub(crate) fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        other => other,
    }
}

pub(crate) fn check_worker(worker: u32) -> Result<(), Error> {
    if worker < MAX_WORKERS {
        return Ok(());
    }
    Err(Error::Invalid(format!("worker number {worker}: 0 to {}", MAX_WORKERS - 1)))
}

fn check_settings(settings: &WorkerSettings) -> Result<(), Error> {
    if !(1..=65_535).contains(&settings.weight) {
        return Err(Error::Invalid(format!("weight {}: 1 to 65535", settings.weight)));
    }
    if !(1..=FULL_SPEED).contains(&settings.slow_start) {
        let text = format!("slow start {}: 1 to {FULL_SPEED}", settings.slow_start);
        return Err(Error::Invalid(text));
    }
    Ok(())
}

pub(crate) fn check_port(port: u16) -> Result<(), Error> {
    if port != 0 { Ok(()) } else { Err(Error::Invalid("port 0: 1 to 65535".to_owned())) }
}

pub(crate) fn seed() -> Result<u64, Error> {
    let mut seed = [0; 8];
    let got = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
    got.map_err(|error| Error::System { step: "draw a random number", error: error.into() })?;
    Ok(u64::from_ne_bytes(seed))
}

pub(crate) fn nanos(wait: Duration) -> u64 {
    u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX)
}
