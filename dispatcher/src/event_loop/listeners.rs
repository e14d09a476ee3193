//! The listening sockets, and which of them the poll watches.
//!
//! A listener has one socket, or several that a service manager passed under its name. `Listeners`
//! keeps the position of every socket: it is part of the socket's token.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use dispatch_protocol::ClientAddr;
use mio::unix::SourceFd;
use mio::{Interest, Registry};
use rustix::io::Errno;
use rustix::net::{SocketFlags, sockopt};

use super::leaving::Leaving;
use super::token::Source;
use crate::background::cleaner::Cleaner;
use crate::background::closer::Closers;
use crate::config::{Address, Listener, ListenerOptions};
use crate::listen::bind::Listening;
use crate::reload::Reusable;
use dispatcher_core::{AccessRules, ListenerId, PoolId, ProxyRules, Time};

/// One listening socket. A configured listener has one, or several when a service manager passed
/// several under its name.
#[derive(Debug)]
pub(super) struct ListenerIo {
    pub(super) id: ListenerId,
    /// `None` after a stop or a reload has closed it.
    pub(super) listening: Option<Listening>,
    /// Position in `Listeners`; part of its token.
    position: usize,
    /// Clients may be waiting. Set by an edge, cleared only by EAGAIN.
    pub(super) ready: bool,
    /// Whether the socket is in the poll. It is not while the core wants no clients: each arrival
    /// would cause a useless wake-up.
    watched: bool,
    /// The end of a pause after EMFILE and similar errors.
    pub(super) paused_until: Option<Time>,
    /// Another socket has taken its place: this socket is emptied and closed.
    pub(super) retiring: bool,
    /// No client has been accepted since the last such pause.
    pub(super) short: bool,
    /// Pauses in a row for a descriptor that was about to be closed.
    pub(super) waits: u32,
    /// The number of clients still to be accepted from this socket once it is being removed.
    pub(super) last: u32,
    /// `Some` once the socket is being removed.
    pub(super) leaving: Option<Leaving>,
    /// The entry for the next reload, which may use the socket of a removed listener again. Dropped
    /// before the socket is closed, so that this duplicate is never its last descriptor here.
    pub(super) reusable: Option<Arc<Reusable>>,
    /// Clients turned away because the socket has no listener.
    pub(super) turned_away: u64,
}

/// The result of one attempt to accept.
pub(super) enum Attempt {
    Client(OwnedFd, ClientAddr),
    /// The client has already gone, or a signal came: try the next client.
    Again,
    Empty,
    /// No descriptor or memory is available.
    Short(Errno),
}

/// The part of a listener's configuration that the core does not have.
#[derive(Clone, Debug)]
pub(super) struct ListenerResources {
    address_text: String,
    pub(super) address: Address,
    pub(super) options: ListenerOptions,
    /// As configured, for the comparison with the next configuration. The core has the tables that
    /// were made from them.
    access_rules: AccessRules,
    /// The address that advice gives to clients, if not the bound one.
    pub(super) advertise: Option<String>,
    proxy: Option<ProxyRules>,
}

impl ListenerResources {
    /// The networks whose PROXY headers are trusted.
    pub(super) fn trusted_proxies(&self) -> Vec<String> {
        let rules = self.proxy.iter().flat_map(|rules| &rules.from);
        rules.map(ToString::to_string).collect()
    }

    /// Splits off the core's part of a listener's configuration: name and pool.
    pub(super) fn split(listener: Listener) -> (String, PoolId, ListenerResources) {
        let Listener { name, address_text, address, pool, advertise, options, access_rules, proxy } =
            listener;
        let resources =
            ListenerResources { address_text, address, options, access_rules, advertise, proxy };
        (name, PoolId(pool), resources)
    }

    /// The whole configuration of a listener.
    pub(super) fn with(&self, name: &str, pool: PoolId) -> Listener {
        let ListenerResources { address_text, address, options, access_rules, advertise, proxy } =
            self.clone();
        Listener {
            name: name.to_owned(),
            address_text,
            address,
            pool: pool.0,
            advertise,
            options,
            access_rules,
            proxy,
        }
    }
}

/// All listening sockets of the dispatcher.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    /// By position. A closed socket leaves its entry for the next socket that opens.
    pub(super) sockets: Vec<ListenerIo>,
    /// By `ListenerId`; removed listeners keep their entries.
    pub(super) resources: Vec<ListenerResources>,
    /// The position that the next turn accepts from first.
    next: usize,
    /// Sockets that a service manager passed and no listener of the configuration uses.
    pub(super) unused: Vec<Listening>,
}

impl Listeners {
    pub(super) fn new(sockets: Vec<ListenerIo>, unused: Vec<Listening>) -> Listeners {
        Listeners { sockets, resources: Vec::new(), next: 0, unused }
    }

    pub(super) fn resources(&self, id: ListenerId) -> Option<&ListenerResources> {
        self.resources.get(usize::from(id.0))
    }

    /// The sockets of one listener.
    pub(super) fn of(&self, id: ListenerId) -> impl Iterator<Item = &ListenerIo> + Clone {
        self.sockets.iter().filter(move |socket| socket.id == id)
    }

    /// The sockets of one listener.
    pub(super) fn of_mut(&mut self, id: ListenerId) -> impl Iterator<Item = &mut ListenerIo> {
        self.sockets.iter_mut().filter(move |socket| socket.id == id)
    }

    /// The positions in the order in which this turn accepts. The order rotates by one with each
    /// turn, so that no listener is always first.
    pub(super) fn rotate(&mut self) -> impl Iterator<Item = usize> + use<> {
        let (first, count) = (self.next, self.sockets.len());
        self.next = (first + 1) % count.max(1);
        (0..count).map(move |step| (first + step) % count)
    }

    /// Adds an open socket, at the position of a closed one if there is one. The closed socket is
    /// out of the poll; a late event for it only makes the loop look at the queue of the new
    /// socket.
    pub(super) fn add(&mut self, id: ListenerId, listening: Listening, backlog: u32) {
        let free = self.sockets.iter().position(ListenerIo::is_closed);
        let position = free.unwrap_or(self.sockets.len());
        let socket = ListenerIo::new(id, listening, position, backlog);
        match self.sockets.get_mut(position) {
            Some(entry) => *entry = socket,
            None => self.sockets.push(socket),
        }
    }

    /// Whether no socket is open.
    pub(super) fn all_closed(&self) -> bool {
        self.sockets.iter().all(ListenerIo::is_closed)
    }

    /// When a pause or the wait of a socket that is taken out ends.
    pub(super) fn deadline(&self) -> Option<Time> {
        let times = self.sockets.iter().flat_map(|socket| [socket.paused_until, socket.due()]);
        times.flatten().min()
    }

    /// The addresses that clients can connect to.
    pub(super) fn addresses(&self) -> impl Iterator<Item = &str> {
        let open = self.sockets.iter().filter_map(|socket| socket.listening.as_ref());
        open.map(|listening| listening.address.as_str())
    }
}

impl ListenerIo {
    /// The id of sockets without a listener. Real ids are smaller: see `reload`.
    pub(super) const NO_LISTENER: ListenerId = ListenerId(u16::MAX);

    pub(super) fn new(
        id: ListenerId,
        listening: Listening,
        position: usize,
        last: u32,
    ) -> ListenerIo {
        ListenerIo {
            id,
            listening: Some(listening),
            position,
            ready: false,
            watched: false,
            paused_until: None,
            retiring: false,
            short: false,
            waits: 0,
            last,
            leaving: None,
            reusable: None,
            turned_away: 0,
        }
    }

    /// Whether the socket is closed.
    pub(super) fn is_closed(&self) -> bool {
        self.listening.is_none()
    }

    /// Whether another socket has taken its place.
    pub(super) fn is_retiring(&self) -> bool {
        self.retiring
    }

    /// Another socket takes its place.
    pub(super) fn retire(&mut self) {
        self.retiring = true;
        // Also without an edge: the last check must read the queue itself.
        self.ready = true;
    }

    /// Notes an edge of the poll.
    pub(super) fn edge(&mut self) {
        self.ready = true;
    }

    /// Puts the socket into the poll or takes it out. Putting it in causes an edge if clients wait.
    pub(super) fn watch(&mut self, registry: &Registry, wanted: bool) -> std::io::Result<()> {
        let Some(listening) = &self.listening else { return Ok(()) };
        if wanted == self.watched {
            return Ok(());
        }
        let raw = listening.fd.as_raw_fd();
        if wanted {
            let token = Source::Listener(self.position).token();
            registry.register(&mut SourceFd(&raw), token, Interest::READABLE)?;
        } else {
            registry.deregister(&mut SourceFd(&raw))?;
            self.ready = false;
        }
        self.watched = wanted;
        Ok(())
    }

    /// Closes the socket and removes its file, both on threads that may block.
    pub(super) fn close(
        &mut self,
        registry: &Registry,
        cleaner: &mut Cleaner,
        closers: &mut Closers,
    ) {
        let _ = self.watch(registry, false);
        self.reusable = None;
        if let Some(listening) = self.listening.take() {
            listening.close(cleaner, closers);
        }
        self.ready = false;
    }

    pub(super) fn attempt(&self) -> Attempt {
        let Some(listening) = &self.listening else { return Attempt::Empty };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::acceptfrom_with(&listening.fd, flags) {
            Ok((fd, address)) => {
                let inet = address.and_then(|any| SocketAddr::try_from(any).ok());
                Attempt::Client(fd, inet.map_or(ClientAddr::Unix, ClientAddr::from))
            }
            Err(Errno::AGAIN) => Attempt::Empty,
            // Bound only.
            Err(Errno::INVAL) if !sockopt::socket_acceptconn(&listening.fd).unwrap_or(true) => {
                Attempt::Empty
            }
            Err(
                errno @ (Errno::MFILE
                | Errno::NFILE
                | Errno::NOBUFS
                | Errno::NOMEM
                | Errno::BADF
                | Errno::INVAL
                | Errno::NOTSOCK),
            ) => Attempt::Short(errno),
            // EINTR, ECONNABORTED, EPERM of a firewall, or a network error of a client that has
            // already gone.
            Err(_) => Attempt::Again,
        }
    }
}
