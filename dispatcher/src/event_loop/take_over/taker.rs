//! The side of the new dispatcher: receives the listening sockets before it binds the others, and
//! waits for the commit after everything has started. Until then it accepts nothing.

use std::collections::HashMap;
use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dispatch_protocol::ClientAddr;
use dispatch_protocol::wire::ProxyHeader;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::super::connections::Conn;
use super::super::control::{Peer, process_of};
use super::super::handshake::HandshakeCommand;
use super::super::{EventLoop, PoolResources, adopt, clock};
use crate::background::logger::quoted;
use crate::background::service_manager::unit::Unit;
use crate::config::{Address, Config, Listener, UnixEndpoint, UnixSource};
use crate::listen::bind::{self, Listening, OwnedPath, identity, identity_of_path};
use crate::listen::error::RunError;
use crate::listen::files::{PathLock, SocketFile};
use crate::listen::take_over::{
    About, Broken, Channel, Kind, PassedClient, PassedHeader, Record, VERSION, path_of,
};
use crate::sys;
use dispatcher_core::{Client, HeaderRead, ListenerId, ProcessId, Time};

/// How long the running dispatcher may take to answer. It may have another take-over under way.
const WELCOME: Duration = Duration::from_secs(60);

/// How long any further record may take.
const RECORD: Duration = Duration::from_secs(30);

/// How long a process may take to end after it has closed its connection.
const ENDING: Duration = Duration::from_secs(2);

/// The serial number that no worker has: a worker of the former dispatcher.
const FORMER_WORKER: u64 = 0;

/// What the running dispatcher has passed.
pub(in crate::event_loop) struct Taken {
    channel: Channel,
    /// Readable once the process of the running dispatcher has ended.
    process: Option<OwnedFd>,
    pid: i32,
    /// By number; `None` once it is used.
    sockets: Vec<Option<(About, Listening)>>,
    /// The listeners of this dispatcher, by the numbers of their sockets.
    listeners: HashMap<u32, ListenerId>,
    /// The locks of the used sockets.
    locks: Vec<Arc<PathLock>>,
}

fn failed(error: impl std::fmt::Display) -> RunError {
    RunError::TakeOver(error.to_string())
}

impl Taken {
    /// Connects to the running dispatcher and receives its listening sockets.
    pub(in crate::event_loop) fn receive(config: &Config) -> Result<Taken, RunError> {
        let notified = std::env::var_os("NOTIFY_SOCKET").is_some_and(|name| !name.is_empty());
        if notified || Unit::own().is_some() {
            return Err(failed(
                "a service manager runs this process and would take it for another service; \
                 use systemctl restart: a socket unit keeps the clients waiting meanwhile",
            ));
        }
        let UnixSource::Path(path) = &config.dispatch_socket.source else {
            return Err(failed(
                "dispatch_socket is passed by a service manager: use systemctl restart",
            ));
        };
        let path = path_of(path);
        let deadline = Instant::now() + WELCOME;
        let channel = Channel::connect(&path, deadline).map_err(|errno| match errno {
            Errno::NOENT | Errno::CONNREFUSED => failed(format!(
                "no running dispatcher offers a take-over at {} ({errno}); without one, start \
                 without --take-over",
                path.display()
            )),
            errno => failed(format!("{}: {errno}", path.display())),
        })?;
        // After a take-over the process at this socket is not the one that made it; it has listened
        // anew, so the kernel knows it.
        let peer = Peer::of(channel.socket()).map_err(failed)?;
        let process = process_of(channel.socket(), &peer);
        let (sockets, listeners, locks) = (Vec::new(), HashMap::new(), Vec::new());
        let mut taken = Taken { channel, process, pid: peer.pid, sockets, listeners, locks };
        match taken.receive_sockets(deadline) {
            Ok(()) => Ok(taken),
            // What was not received is free now.
            Err(Broken::Ended) if taken.has_ended() => Ok(taken),
            Err(broken) => Err(failed(broken)),
        }
    }

    fn receive_sockets(&mut self, deadline: Instant) -> Result<(), Broken> {
        let program = env!("CARGO_PKG_VERSION").to_owned();
        self.channel.send(&Record::Hello { version: VERSION, program }, &[], deadline)?;
        match self.channel.receive(deadline)?.0 {
            Record::Welcome { pid } => {
                self.pid = pid;
                let opened = rustix::process::Pid::from_raw(pid).and_then(|pid| {
                    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
                });
                self.process = opened.or(self.process.take());
            }
            record => return Err(Broken::Other(format!("unexpected: {record:?}"))),
        }
        loop {
            let (record, fds) = self.channel.receive(Instant::now() + RECORD)?;
            match record {
                Record::Socket { about } => {
                    let mut fds = fds.into_iter();
                    let (Some(fd), lock) = (fds.next(), fds.next()) else {
                        return Err(Broken::Other("a socket record without a socket".to_owned()));
                    };
                    let path = about.file.clone().zip(lock).map(|(file, lock)| {
                        let lock = Arc::new(PathLock::passed(File::from(lock)));
                        let (device, inode) = (file.device, file.inode);
                        OwnedPath::new(SocketFile { path: file.path, device, inode, lock })
                    });
                    let address = about.address.clone();
                    let listening = Listening { fd, address, inherited: false, name: None, path };
                    self.sockets.push(Some((about, listening)));
                }
                Record::End { sockets } if sockets as usize == self.sockets.len() => return Ok(()),
                record => return Err(Broken::Other(format!("unexpected: {record:?}"))),
            }
        }
    }

    /// Whether the process of the running dispatcher has ended. Waits a moment for it.
    fn has_ended(&self) -> bool {
        let Some(process) = &self.process else { return false };
        let timeout = Timespec::try_from(ENDING).ok();
        let mut ended = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
        poll(&mut ended, timeout.as_ref()).is_ok_and(|ended| ended > 0)
    }

    fn take(&mut self, wanted: impl Fn(&About) -> bool) -> Option<(u32, Listening)> {
        let is_it = |entry: &Option<(About, Listening)>| {
            entry.as_ref().is_some_and(|(about, _)| wanted(about))
        };
        let number = self.sockets.iter().position(is_it)?;
        let (_, listening) = self.sockets.get_mut(number)?.take()?;
        self.locks.extend(listening.file().map(|file| file.lock));
        Some((number as u32, listening))
    }

    /// The dispatch socket or the admin socket, if it is at this path.
    pub(in crate::event_loop) fn endpoint(
        &mut self,
        kind: Kind,
        endpoint: &UnixEndpoint,
    ) -> Option<Listening> {
        let UnixSource::Path(path) = &endpoint.source else { return None };
        self.at(kind, &identity_of_path(path))
    }

    /// The socket for the agent check of a pool, or of another one at the same address.
    pub(in crate::event_loop) fn agent(
        &mut self,
        pool: &str,
        configured: &Address,
    ) -> Option<Listening> {
        let address = configured.to_string();
        let same = |about: &About| about.kind == Kind::Agent && about.configured == address;
        let found = self.take(|about| same(about) && about.name == pool);
        // The kernel has chosen the port: another pool has another one.
        let found = match found {
            None if !address.ends_with(":0") => self.take(same),
            found => found,
        };
        found.map(|(_, listening)| listening)
    }

    /// The socket of this kind at this address.
    pub(in crate::event_loop) fn at(&mut self, kind: Kind, configured: &str) -> Option<Listening> {
        let is_it = |about: &About| about.kind == kind && about.configured == configured;
        self.take(is_it).map(|(_, listening)| listening)
    }

    /// The take-over socket.
    pub(in crate::event_loop) fn take_over_socket(&mut self, path: &Path) -> Option<Listening> {
        self.at(Kind::TakeOver, &identity_of_path(&path_of(path)))
    }

    /// The socket of a listener: the one with the same address, and if there are several, with the
    /// same name.
    pub(in crate::event_loop) fn listener(
        &mut self,
        id: ListenerId,
        listener: &Listener,
    ) -> Option<Listening> {
        let address = identity(&listener.address)?;
        let same = |about: &About| about.kind == Kind::Listener && about.configured == address;
        let named = |about: &About| same(about) && about.name == listener.name;
        let any_port = address.ends_with(":0");
        let found = self.take(named);
        // The kernel has chosen the port: another listener has another one.
        let (number, listening) = match found {
            None if !any_port => self.take(same)?,
            found => found?,
        };
        self.listeners.insert(number, id);
        Some(listening)
    }

    /// Says that everything is bound and started, and waits for the commit. Returns the connections
    /// that were passed.
    fn commit(&mut self) -> Result<Vec<(PassedClient, OwnedFd)>, RunError> {
        let mut clients = Vec::new();
        match self.wait_for_commit(&mut clients) {
            Ok(()) => {}
            Err(Broken::Ended) if self.has_ended() => {
                log::warn!(
                    "event=take_over_after_end pid={} hint=\"the former dispatcher has ended in the \
                     middle of the take-over; this one serves\"",
                    self.pid
                );
            }
            Err(broken) => return Err(failed(broken)),
        }
        Ok(clients)
    }

    fn wait_for_commit(
        &mut self,
        clients: &mut Vec<(PassedClient, OwnedFd)>,
    ) -> Result<(), Broken> {
        let soon = || Instant::now() + RECORD;
        for (number, socket) in (0..).zip(&self.sockets) {
            if socket.is_some() {
                self.channel.send(&Record::Unused { socket: number }, &[], soon())?;
            }
        }
        self.channel.send(&Record::Ready, &[], soon())?;
        loop {
            match self.channel.receive(soon())? {
                (Record::Clients { clients: part }, fds) if part.len() == fds.len() => {
                    let count = part.len() as u32;
                    clients.extend(part.into_iter().zip(fds));
                    self.channel.send(&Record::Received { clients: count }, &[], soon())?;
                }
                (Record::Commit, _) => {
                    // If this cannot be sent, the former dispatcher has ended.
                    let _ = self.channel.send(&Record::Committed, &[], soon());
                    return Ok(());
                }
                (record, _) => return Err(Broken::Other(format!("unexpected: {record:?}"))),
            }
        }
    }
}

impl EventLoop {
    /// Everything has started: waits for the commit, and serves from then on.
    pub(in crate::event_loop) fn take_over(&mut self, mut taken: Taken) -> Result<(), RunError> {
        let clients = taken.commit()?;
        // From here on the sockets belong to this dispatcher.
        taken.locks.iter().for_each(|lock| lock.own());
        self.now = clock();
        self.listen_anew();
        let listening = self.adopt_processes();
        self.begin_steering(&listening)?;
        let connections = clients.len();
        for (client, fd) in clients {
            self.take_client(&taken, client, fd);
        }
        log::info!(
            "event=taken_over from={} listeners={} connections={connections}",
            taken.pid,
            taken.listeners.len()
        );
        self.hold(false);
        Ok(())
    }

    /// Sets the options of this configuration. To listen again also makes this process the one that
    /// clients of Unix sockets see (`SO_PEERCRED`).
    fn listen_anew(&self) {
        let shared = &self.take_over.shared;
        let offered = self.take_over.offered.as_ref().map(|listening| &listening.fd);
        for fd in [&shared.dispatch, &shared.admin].into_iter().flatten().chain(offered) {
            let _ = rustix::net::listen(fd, 4096);
        }
        for socket in &self.listeners.sockets {
            let Some(listening) = &socket.listening else { continue };
            let Some(resources) = self.listeners.resources(socket.id) else { continue };
            let tcp = !listening.is_unix();
            if tcp {
                // A dispatcher that has ended may have begun to close it.
                let _ = sys::let_new_connections_in(listening.fd.as_fd());
            }
            let options = &resources.options;
            if let Err(error) = bind::change_options(listening.fd.as_fd(), tcp, options) {
                log::warn!(
                    "event=options_not_set listener={} error={}",
                    self.core.listener_name(socket.id),
                    quoted(error)
                );
            }
            if let Some(file) = listening.file() {
                let mode = std::os::unix::fs::PermissionsExt::from_mode(options.mode);
                let _ = std::fs::set_permissions(&file.path, mode);
            }
        }
    }

    /// Adopts the processes that the former dispatcher leaves. It gives the journal up when it has
    /// committed. Returns those of steered pools.
    fn adopt_processes(&mut self) -> Vec<(ProcessId, i32, SocketAddr)> {
        let path = adopt::journal_path(&self.endpoints.dispatch_address);
        // The configuration of the pools is in the core already.
        let mut config = Config { pools: Vec::new(), ..self.config.clone() };
        for pool in self.core.pool_names().filter_map(|name| self.core.pool_named(name)) {
            let resources = self.pools.get(usize::from(pool.0));
            let settings = self.core.pool_settings(pool).cloned();
            config.pools.extend(resources.zip(settings).map(|(rest, it)| rest.with(it)));
        }
        let known = config.pools.len();
        let survivors = adopt::find(&self.side.spawner, &mut config, path);
        for pool in config.pools.drain(known..) {
            let (settings, resources) = PoolResources::split(pool);
            self.core.add_pool(self.now, settings, crate::reload::seed());
            self.pools.push(resources);
        }
        let (core, spawner) = (&mut self.core, &self.side.spawner);
        let adopted = survivors.adopt(self.now, core, spawner, &self.pools, &mut self.rolls);
        self.workers.tokens.extend(adopted.tokens);
        let pools = (0..self.pools.len() as u16).map(dispatcher_core::PoolId);
        let settings = pools.filter_map(|pool| self.core.pool_settings(pool));
        let settings = EventLoop::handshake_settings(&self.config.limits, settings);
        self.handshakes.send(HandshakeCommand::Settings(settings));
        adopted.listening
    }

    /// A connection that the former dispatcher had accepted.
    fn take_client(&mut self, taken: &Taken, client: PassedClient, fd: OwnedFd) {
        let PassedClient { socket, peer, waited, resent, awaits_header, proxy } = client;
        let Some(&listener) = taken.listeners.get(&socket) else { return };
        let peer = peer.map_or(ClientAddr::Unix, ClientAddr::from);
        let header = match &proxy {
            None if awaits_header => HeaderRead::No,
            None => HeaderRead::Absent,
            Some(header) if header.local => HeaderRead::Local,
            Some(_) => HeaderRead::Client,
        };
        let client = Client { header, ..Client::new(listener, peer) };
        let conn = self.core.accepted(self.now, client);
        let waited = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        self.connections.insert(
            conn.index,
            Conn {
                fd,
                peer,
                accepted: Time(self.now.0.saturating_sub(waited)),
                listener,
                serial: conn.serial,
                watched: false,
                at_worker: resent.then_some(FORMER_WORKER),
                search_cost: 0,
                header_len: 0,
                proxy: proxy.map(|PassedHeader { address, local, tlvs }| {
                    let address = address.map_or(ClientAddr::Unix, ClientAddr::from);
                    Box::new(ProxyHeader { address, local, tlvs })
                }),
            },
        );
        self.peek(conn, false);
        self.perform();
    }
}
