//! Workers that share public ports: a group of listeners (`SO_REUSEPORT`) at each public address,
//! one for each worker, which this process opens and the workers inherit.
//!
//! A duplicate of each listener stays here. So a listener outlives its worker: the next process of
//! the worker inherits it with all connections that wait in it, or they are moved to other workers.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use aya::programs::SockOps;
use rustix::net::sockopt::socket_cookie;

use crate::error::Error;
use crate::layout::{Address, MAX_WORKERS, WorkerSettings};
use crate::maps::Maps;
use crate::sockets::{CONNECTED, Socket};
use crate::steering::{
    ANY, Links, Options, Steering, check_port, check_worker, create_maps, program,
};
use crate::{attach, sys};

mod group;
mod maps;
mod plain;
mod probe;

use group::{Group, Listener};
pub use maps::Moves;
use maps::{Chooser, MAX_GROUPS};
pub(crate) use maps::{SharedMaps, SharedSettings, load_programs};
pub use plain::PlainListener;
pub use probe::{Direct, Probe, Probed};

/// What a pool with shared ports has more than others.
#[derive(Debug)]
pub(crate) struct Shared {
    maps: SharedMaps,
    chooser: Chooser,
    /// The link of the program that keeps the chooser attached; `None` if it is pinned.
    guard: Option<OwnedFd>,
    /// By their number.
    groups: BTreeMap<u32, Group>,
    /// By worker and group.
    listeners: BTreeMap<(u32, u32), Listener>,
    /// By cookie: connections that waited before anything was counted.
    not_counted: HashSet<u64>,
}

impl Steering {
    /// As [`Steering::load`], for workers that share public ports: open their listeners with
    /// [`Steering::open_listener`], and let the workers inherit them.
    ///
    /// `options.cgroup` must contain this process, because it opens the listeners; the cgroups of
    /// the workers do not matter. It should outlive this process, so that a later one can adopt the
    /// listeners.
    ///
    /// # Errors
    ///
    /// As [`Steering::load`].
    pub fn load_shared(options: &Options) -> Result<Steering, Error> {
        let cgroup = attach::usable_cgroup(options)?;
        let (mut ebpf, mut maps) = load_programs()?;
        let shared_maps = SharedMaps::of(&mut ebpf)?;
        let settings = maps.start(options)?;
        let guard = attach::guard(program(&mut ebpf, "steer_guard")?, &cgroup)?;
        let events = attach::events(program(&mut ebpf, "steer_shared_events")?, cgroup)?;
        let links = Links::Own { lookup: None, events };
        let chooser = Chooser::Loaded(Box::new(ebpf));
        let shared = Shared::new(shared_maps, chooser, Some(guard));
        Ok(Steering::of(maps, links, settings, Some(shared)))
    }

    /// From pinned maps and links; the sinks open again.
    pub(crate) fn adopted_shared(
        maps: Maps,
        links: Links,
        mut shared: Shared,
    ) -> Result<Steering, Error> {
        let settings = maps.read_settings()?;
        // Those of a process that was killed.
        shared.maps.direct_none()?;
        shared.maps.forget_closed()?;
        shared.not_counted = shared.maps.not_counted()?;
        let refused = |error| Error::refused("read the public addresses", error);
        for entry in maps.publics().map_err(refused)?.iter() {
            let (address, number) = entry.map_err(refused)?;
            let address = address.socket_addr();
            shared.groups.insert(number, Group { address, sink: None });
            shared.open_sink(number)?;
        }
        Ok(Steering::of(maps, links, settings, Some(shared)))
    }

    /// Adds a public address before there is a worker: the kernel drops SYNs to it, or resets them,
    /// as [`Options::wait`] says.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for port 0, or if there are too many addresses (32); otherwise as
    /// [`Steering::open_listener`].
    pub fn add_group(&mut self, public: SocketAddr) -> Result<(), Error> {
        check_port(public.port())?;
        let number = self.sharing()?.number_of(public)?;
        self.activate(number)
    }

    /// The listener of a worker at a public address: a duplicate for the worker's process to
    /// inherit. It is opened if there is none. `[::]:P` is for IPv4 clients, too.
    ///
    /// All workers should have a listener at each public address of the pool: a worker without one
    /// is left out until it has them all.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the worker was not set, the port is 0, or this process is not in the
    /// cgroup; [`Error::System`] if the address cannot be used; [`Error::Refused`] if the kernel
    /// refuses the listener.
    pub fn open_listener(
        &mut self,
        worker: u32,
        public: SocketAddr,
        backlog: u32,
    ) -> Result<OwnedFd, Error> {
        check_worker(worker)?;
        check_port(public.port())?;
        let shared = self.sharing()?;
        let group = shared.number_of(public)?;
        if let Some(listener) = shared.listeners.get(&(worker, group)) {
            return listener.duplicate();
        }
        if shared.maps.registered(group, worker)?.is_some() {
            let text = format!("worker {worker} has a listener at {public}: take it over");
            return Err(Error::Invalid(text));
        }
        let before = self.counts(worker)?.listens;
        let listener = self.held_back(worker, |steering| {
            steering.activate(group)?;
            let listener = Listener::bind(public, backlog)?;
            let opened = steering.begin(worker, group, &listener, before);
            if opened.is_err() {
                steering.sharing()?.maps.forget(cookie_of(&listener.fd)?)?;
            }
            opened.map(|()| listener)
        })?;
        let duplicate = listener.duplicate()?;
        self.sharing()?.listeners.insert((worker, group), listener);
        Ok(duplicate)
    }

    /// Lets a new listener get connections. `before`: the listeners of its worker counted so far.
    fn begin(
        &mut self,
        worker: u32,
        group: u32,
        listener: &Listener,
        before: u32,
    ) -> Result<(), Error> {
        self.own(&listener.fd, worker)?;
        listener.listen()?;
        self.sharing()?.maps.register(group, worker, &listener.fd)?;
        listener.lock()?;
        if self.counts(worker)?.listens == before {
            return Err(Error::Invalid(
                "nothing counts the listeners of this process: give a cgroup that contains it"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// Takes over all listeners of a worker that an earlier process opened, one for each public
    /// address: they come from the file descriptor store of systemd, or from a process of the
    /// worker (`pidfd_getfd`). After [`Steering::adopt`] the counts go on. After
    /// [`Steering::load_shared`] the connections that the worker has already are not counted.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the worker was not set, a socket is no listener of its, or only some
    /// of its listeners are given; otherwise as [`Steering::open_listener`].
    pub fn take_listeners(&mut self, worker: u32, sockets: Vec<OwnedFd>) -> Result<(), Error> {
        check_worker(worker)?;
        let mut found = Vec::new();
        for socket in sockets {
            let (public, listener) = Listener::from_socket(socket)?;
            let shared = self.sharing()?;
            let group = shared.number_of(public)?;
            let registered = shared.maps.registered(group, worker)?;
            if registered.is_some_and(|cookie| Ok(cookie) != socket_cookie(&listener.fd)) {
                let text = format!("worker {worker} has another listener at {public}");
                return Err(Error::Invalid(text));
            }
            found.push((group, listener, registered.is_some()));
        }
        let open = || found.iter().filter(|(_, listener, _)| listener.is_open);
        let new = open().filter(|(.., registered)| !registered).count();
        if new > 0 && (new < open().count() || !self.is_free(worker)?) {
            let text = format!("worker {worker} has other listeners or connections: give all");
            return Err(Error::Invalid(text));
        }
        let taken = self.held_back(worker, |steering| {
            for (group, listener, registered) in &found {
                let shared = steering.sharing()?;
                if !shared.is_active(*group) {
                    // The program of the earlier process keeps its maps, and they keep the sockets.
                    listener.detach_program();
                }
                if listener.is_open && !registered {
                    shared.maps.register(*group, worker, &listener.fd)?;
                    steering.maps.live_counts.add_listener(worker, listener.is_v6);
                }
                steering.own(&listener.fd, worker)?;
            }
            // What comes from now on is counted.
            let mut queues = found.iter().map(|(_, listener, _)| listener.queue_len());
            if new > 0 && queues.any(|queued| !matches!(queued, Ok(0))) {
                steering.note_what_waits();
            }
            found.iter().try_for_each(|(group, ..)| steering.activate(*group))
        });
        if let Err(error) = taken {
            for (_, listener, registered) in &found {
                if !registered {
                    self.sharing()?.maps.forget(cookie_of(&listener.fd)?)?;
                }
            }
            return Err(error);
        }
        let shared = self.sharing()?;
        let found = found.into_iter().map(|(group, listener, _)| ((worker, group), listener));
        shared.listeners.extend(found);
        Ok(())
    }

    /// Closes the queues of a worker whose process is gone or hangs: the connections that wait in
    /// them go to other workers, and so do handshakes under way. A process of the worker that still
    /// runs sees its listeners closed (`accept` fails with `EINVAL`) until [`Steering::restore`].
    ///
    /// A maximum or a drain of the other workers is no reason to lose connections.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if no other worker has a listener at the same address: then nothing is
    /// closed. [`Error::System`] if the kernel fails.
    pub fn evict(&mut self, worker: u32) -> Result<(), Error> {
        check_worker(worker)?;
        let shared = self.sharing()?;
        let own: Vec<u32> = shared.groups_of(worker).collect();
        let others: Vec<(u32, u32)> = shared.open_beside(worker).collect();
        for group in own {
            let serves = |&(other, at): &(u32, u32)| {
                Ok::<bool, Error>(at == group && self.worker(other)?.weight != 0)
            };
            if !others.iter().map(serves).collect::<Result<Vec<_>, _>>()?.contains(&true) {
                let text = format!("no other worker can take the connections of worker {worker}");
                return Err(Error::Invalid(text));
            }
        }
        self.held_back(worker, |steering| {
            steering.sharing()?.listeners_of(worker).try_for_each(Listener::close)
        })
    }

    /// Opens the queues of a worker again, after [`Steering::evict`].
    ///
    /// # Errors
    ///
    /// [`Error::System`] if the kernel fails.
    pub fn restore(&mut self, worker: u32) -> Result<(), Error> {
        check_worker(worker)?;
        self.held_back(worker, |steering| {
            let shared = steering.sharing()?;
            let groups: Vec<u32> = shared.groups_of(worker).collect();
            for group in groups {
                let Some(listener) = shared.listeners.get_mut(&(worker, group)) else { continue };
                if !listener.is_open {
                    listener.listen()?;
                    listener.is_open = true;
                    shared.maps.register(group, worker, &listener.fd)?;
                }
            }
            Ok(())
        })
    }

    /// Moves the connections that wait in the queues of a worker to other workers. Its process,
    /// which does not accept, finds its listeners as before: they are closed for a moment only.
    ///
    /// # Errors
    ///
    /// As [`Steering::evict`].
    pub fn move_queue(&mut self, worker: u32) -> Result<(), Error> {
        self.evict(worker)?;
        self.restore(worker)
    }

    /// Connections that wait in the queues of a worker until its process accepts them.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if the kernel fails.
    pub fn queue_len(&self, worker: u32) -> Result<u32, Error> {
        check_worker(worker)?;
        let Some(shared) = &self.shared else { return Ok(0) };
        let own = shared.listeners.range((worker, 0)..=(worker, u32::MAX));
        own.map(|(_, listener)| listener.queue_len()).sum()
    }

    /// The inodes of the listeners of a worker, as in `/proc/PID/fd`.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if the kernel fails.
    pub fn listener_inodes(&self, worker: u32) -> Result<Vec<u64>, Error> {
        check_worker(worker)?;
        let failed = |error: rustix::io::Errno| Error::System {
            step: "look at a listener",
            error: error.into(),
        };
        let Some(shared) = &self.shared else { return Ok(Vec::new()) };
        let own = shared.listeners.range((worker, 0)..=(worker, u32::MAX));
        own.map(|(_, listener)| Ok(rustix::fs::fstat(&listener.fd).map_err(failed)?.st_ino))
            .collect()
    }

    /// Connections that went from the queue of one worker to another one.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    pub fn moves(&self) -> Result<Moves, Error> {
        self.shared.as_ref().map_or(Ok(Moves::default()), |shared| shared.maps.moves())
    }

    /// Attaches the program to the listeners of every public address again. A process of this
    /// user can detach it through a listener of its own at the address, and the kernel tells
    /// nothing of that.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the kernel fails.
    pub fn attach_again(&mut self) -> Result<(), Error> {
        let shared = self.sharing()?;
        let mut sinks = shared.groups.values().filter_map(|group| group.sink.as_ref());
        sinks.try_for_each(|sink| shared.chooser.attach(sink))
    }

    /// Connections that came to a listener before it had an owner, and are not accepted yet, do not
    /// count: neither where they wait, nor where they are moved. Without a list, or room for all, a
    /// comparison with the kernel's list corrects the counts.
    fn note_what_waits(&mut self) {
        let Some(shared) = &self.shared else { return };
        let ports: Vec<u16> = shared.groups.values().map(|group| group.address.port()).collect();
        let mut waiting = Vec::new();
        let read = self.read_sockets(CONNECTED, &mut |socket| {
            let waits = socket.inode == 0 && ports.contains(&socket.local.port());
            // A handshake under way has no cgroup: its connection will have an owner.
            if waits && socket.owner.is_none() && socket.cgroup.is_some() {
                waiting.push(socket.cookie);
            }
        });
        let Some(shared) = self.shared.as_mut().filter(|_| read.is_ok()) else { return };
        for cookie in waiting {
            if shared.maps.is_not_counted(cookie).is_err() {
                return;
            }
            shared.not_counted.insert(cookie);
        }
    }

    /// Whether a connection waits that does not count.
    pub(crate) fn is_waiting_uncounted(&self, socket: &Socket) -> bool {
        let shared = self.shared.as_ref();
        socket.inode == 0 && shared.is_some_and(|it| it.not_counted.contains(&socket.cookie))
    }

    /// Of the connections that do not count, only these wait still.
    pub(crate) fn keep_uncounted(&mut self, waiting: &HashSet<u64>) -> Result<(), Error> {
        let Some(shared) = &mut self.shared else { return Ok(()) };
        let over: Vec<u64> = shared.not_counted.difference(waiting).copied().collect();
        for cookie in over {
            shared.maps.forget_not_counted(cookie)?;
            shared.not_counted.remove(&cookie);
        }
        Ok(())
    }

    fn sharing(&mut self) -> Result<&mut Shared, Error> {
        let text = "each worker of this pool has a port of its own: it opens its listener itself";
        self.shared.as_mut().ok_or_else(|| Error::Invalid(text.to_owned()))
    }

    /// Makes the worker the owner of a listener, and so of the connections that it will accept.
    fn own(&self, listener: &OwnedFd, worker: u32) -> Result<(), Error> {
        let owners = self.maps.owners();
        owners
            .and_then(|owners| sys::set_owner(owners, listener.as_fd(), worker))
            .map_err(|error| Error::System { step: "give a listener its owner", error })
    }

    /// The worker that a connection counts for now, by the cookie and the first worker.
    pub(crate) fn present_worker(&self, cookie: u64, first: u32) -> u32 {
        let shared = self.shared.as_ref();
        shared.and_then(|shared| shared.maps.moved_to(cookie)).unwrap_or(first)
    }

    /// From now on the program chooses in this group.
    fn activate(&mut self, number: u32) -> Result<(), Error> {
        let shared = self.sharing()?;
        if shared.is_active(number) {
            return Ok(());
        }
        let Some(address) = shared.open_sink(number)? else { return Ok(()) };
        let inserted = self.publics()?.insert(Address::from(address), number, ANY);
        inserted.map_err(|error| Error::refused("add a public address", error))
    }

    /// Changes listeners of a worker while it gets no new connections, so that none of them looks
    /// for a listener that is not registered.
    fn held_back<T>(
        &mut self,
        worker: u32,
        change: impl FnOnce(&mut Steering) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let settings = self.worker(worker)?;
        if settings.weight == 0 {
            return Err(Error::Invalid(format!("there is no worker {worker}: set it first")));
        }
        self.write_worker(worker, WorkerSettings { draining: 1, ..settings })?;
        let changed = change(self);
        self.write_worker(worker, settings)?;
        changed
    }
}

impl Shared {
    fn new(maps: SharedMaps, chooser: Chooser, guard: Option<OwnedFd>) -> Shared {
        let (groups, listeners) = (BTreeMap::new(), BTreeMap::new());
        Shared { maps, chooser, guard, groups, listeners, not_counted: HashSet::new() }
    }

    /// The number of the group at this address: one that exists, or a new one.
    fn number_of(&mut self, address: SocketAddr) -> Result<u32, Error> {
        if let Some((&number, _)) = self.groups.iter().find(|(_, g)| g.address == address) {
            return Ok(number);
        }
        let free = (0..MAX_GROUPS).find(|number| !self.groups.contains_key(number));
        let number = free.ok_or_else(|| {
            Error::Invalid(format!("too many public addresses: at most {MAX_GROUPS}"))
        })?;
        self.groups.insert(number, Group { address, sink: None });
        Ok(number)
    }

    fn is_active(&self, number: u32) -> bool {
        self.groups.get(&number).is_some_and(|group| group.sink.is_some())
    }

    /// Opens the sink of a group, which makes or joins the listeners at its address, and attaches
    /// the program to them.
    fn open_sink(&mut self, number: u32) -> Result<Option<SocketAddr>, Error> {
        let Some(group) = self.groups.get_mut(&number) else { return Ok(None) };
        let sink = group::open_sink(group.address)?;
        self.chooser.attach(&sink)?;
        self.maps.register(number, MAX_WORKERS, &sink)?;
        group.sink = Some(sink);
        Ok(Some(group.address))
    }

    /// Leaves the listeners at this address to the workers and to the kernel's choice.
    pub(crate) fn close_group(&mut self, address: SocketAddr) -> Result<(), Error> {
        let Some((&number, _)) = self.groups.iter().find(|(_, g)| g.address == address) else {
            return Ok(());
        };
        self.groups.remove(&number);
        for ((worker, _), listener) in self.listeners.iter().filter(|(at, _)| at.1 == number) {
            self.maps.clear(number, *worker)?;
            self.maps.forget(cookie_of(&listener.fd)?)?;
        }
        self.listeners.retain(|&(_, group), _| group != number);
        Ok(())
    }

    /// Closes the listeners of a worker; other workers get the connections that wait in them.
    pub(crate) fn close_worker(&mut self, worker: u32) -> Result<(), Error> {
        self.listeners_of(worker).try_for_each(Listener::close)?;
        for (_, listener) in self.listeners.range((worker, 0)..=(worker, u32::MAX)) {
            self.maps.forget(cookie_of(&listener.fd)?)?;
        }
        self.listeners.retain(|&(of, _), _| of != worker);
        Ok(())
    }

    fn listeners_of(&mut self, worker: u32) -> impl Iterator<Item = &mut Listener> {
        let own = self.listeners.range_mut((worker, 0)..=(worker, u32::MAX));
        own.map(|(_, listener)| listener)
    }

    fn groups_of(&self, worker: u32) -> impl Iterator<Item = u32> {
        self.listeners.range((worker, 0)..=(worker, u32::MAX)).map(|(&(_, group), _)| group)
    }

    /// Worker and group of the open listeners of others.
    fn open_beside(&self, worker: u32) -> impl Iterator<Item = (u32, u32)> {
        let open = self.listeners.iter().filter(|(_, listener)| listener.is_open);
        open.map(|(&at, _)| at).filter(move |&(other, _)| other != worker)
    }
}

/// The kernel's number of a socket.
fn cookie_of(socket: &OwnedFd) -> Result<u64, Error> {
    socket_cookie(socket)
        .map_err(|error| Error::System { step: "look at a listener", error: error.into() })
}
