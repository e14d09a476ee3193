//! Starts the event loop from a configuration, and ends it.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use mio::{Interest, Poll, Waker};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::net::SocketType;
use signal_hook_mio::v1_0::Signals;

use super::connections::Connections;
use super::handshake::Handshakes;
use super::line::Lines;
use super::listeners::{ListenerIo, ListenerResources, Listeners};
use super::observation::Observation;
use super::rolls::Rolls;
use super::steer::Steers;
use super::take_over::{Giver, SharedSockets, TakeOver, Taken};
use super::token::Source;
use super::wakeup::Wakeup;
use super::workers::Workers;
use super::{Background, Endpoints, EventLoop, PoolResources, Run, adopt, agents, clock};
use crate::background::cleaner::Cleaner;
use crate::background::closer::{Bounds, Closers, Owner, Task};
use crate::background::logger::{quoted, value};
use crate::background::service_manager::State;
use crate::background::service_manager::unit::Unit;
use crate::config::{Config, UnixEndpoint, UnixSource};
use crate::listen::bind::{self, Listening};
use crate::listen::error::RunError;
use crate::listen::inherit::Inherited;
use crate::listen::take_over::Kind;
use crate::mailbox::agents::AgentSockets;
use crate::mailbox::{StartSideThread, TcpListeners};
use crate::reload::seed;
use crate::signals;
use dispatcher_core::{AccessControl, Core, ListenerId, ListenerSettings, PoolId, ProxyControl};

/// The listening sockets of the dispatcher.
struct Sockets {
    dispatch: Listening,
    admin: Listening,
    admin_http: Option<Listening>,
    advice: Option<Listening>,
    agents: AgentSockets,
    /// The sockets of the line protocol.
    lines: Vec<(PoolId, Listening)>,
    /// The take-over socket.
    offered: Option<Listening>,
    listeners: Listeners,
    /// Another dispatcher still accepts from them.
    held: bool,
}

/// The socket for a later take-over; `None` where a service manager runs this process.
fn take_over_socket(
    config: &Config,
    listeners: &Listeners,
    taken: Option<&mut Taken>,
) -> Option<Listening> {
    let UnixSource::Path(path) = &config.dispatch_socket.source else { return None };
    let notified = std::env::var_os("NOTIFY_SOCKET").is_some_and(|name| !name.is_empty());
    let passed = listeners.sockets.iter().filter_map(|socket| socket.listening.as_ref());
    if notified || Unit::own().is_some() || passed.into_iter().any(|it| it.inherited) {
        return None;
    }
    if let Some(listening) = taken.and_then(|taken| taken.take_over_socket(path)) {
        return Some(listening);
    }
    let made = Giver::bind(path);
    if let Err(error) = &made {
        log::warn!("event=take_over_not_offered error={}", quoted(error));
    }
    made.ok()
}

impl EventLoop {
    /// Opens all sockets, starts the threads, and notifies the service manager.
    pub(super) fn start(
        config: Config,
        start_side: StartSideThread,
    ) -> Result<EventLoop, RunError> {
        EventLoop::start_with(config, start_side, None)
    }

    /// Like [`EventLoop::start`], with the sockets of a running dispatcher.
    pub(super) fn start_taking_over(
        config: Config,
        start_side: StartSideThread,
    ) -> Result<EventLoop, RunError> {
        let taken = Taken::receive(&config)?;
        EventLoop::start_with(config, start_side, Some(taken))
    }

    fn start_with(
        config: Config,
        start_side: StartSideThread,
        mut taken: Option<Taken>,
    ) -> Result<EventLoop, RunError> {
        let descriptors = raise_descriptor_limit();
        // First, so that the passed numbers cannot be descriptors of this process.
        let mut inherited = Inherited::from_environment();
        let signals = signals::take().map_err(RunError::system("signal handlers"))?;
        let mut endpoint = |kind, at: &UnixEndpoint, of: SocketType| match taken
            .as_mut()
            .and_then(|taken| taken.endpoint(kind, at))
        {
            Some(listening) => Ok(listening),
            None => bind::listen_endpoint(at, of, &mut inherited),
        };
        let dispatch = endpoint(Kind::Dispatch, &config.dispatch_socket, SocketType::SEQPACKET)?;
        let admin = endpoint(Kind::Admin, &config.admin_socket, SocketType::STREAM)?;
        let mut lines = Vec::new();
        for (id, pool) in (0u16..).map(PoolId).zip(&config.pools) {
            if let Some(line) = &pool.line {
                lines.push((id, endpoint(Kind::Line, &line.endpoint(), SocketType::STREAM)?));
            }
        }
        let mut listeners = Vec::new();
        let mut settings = Vec::new();
        for (position, listener) in (0u16..).zip(&config.listeners) {
            let id = ListenerId(position);
            let made = match taken.as_mut().and_then(|taken| taken.listener(id, listener)) {
                Some(listening) => vec![listening],
                None => bind::listen(&listener.address, &listener.options, &mut inherited)?,
            };
            let addresses: Vec<&str> = made.iter().map(|l| l.address.as_str()).collect();
            settings.push(ListenerSettings {
                name: listener.name.clone(),
                address: addresses.join(", "),
                pool: PoolId(listener.pool),
            });
            for listening in made {
                let place = listeners.len();
                listeners.push(ListenerIo::new(id, listening, place, listener.options.backlog));
            }
        }
        let agents = agents::open(&config, &mut inherited, |pool, address| {
            taken.as_mut()?.agent(pool, address)
        })?;
        let listeners = Listeners::new(listeners, inherited.finish());
        let mut http = |kind, address: Option<SocketAddr>| {
            let Some(address) = address else { return Ok(None) };
            match taken.as_mut().and_then(|it| it.at(kind, &address.to_string())) {
                Some(listening) => Ok(Some(listening)),
                None => bind::listen_here(address).map(Some),
            }
        };
        let admin_http = http(Kind::AdminHttp, config.admin_http)?;
        let advice = http(Kind::Advice, config.advice.listen)?;
        let passed = agents.iter().any(|socket| socket.listening.inherited);
        let offered = match passed {
            true => None,
            false => take_over_socket(&config, &listeners, taken.as_mut()),
        };
        let held = taken.is_some();
        let sockets = Sockets {
            dispatch,
            admin,
            admin_http,
            advice,
            agents,
            lines,
            offered,
            listeners,
            held,
        };
        let mut event_loop = EventLoop::assemble(config, start_side, signals, sockets, settings)?;
        event_loop.run.descriptors = descriptors;
        if let Some(taken) = taken {
            event_loop.take_over(taken)?;
        }
        event_loop.start_giver();
        log::info!(
            "event=ready version={} pid={} instance={} dispatch_socket={}",
            env!("CARGO_PKG_VERSION"),
            std::process::id(),
            event_loop.run.instance,
            value(&event_loop.endpoints.dispatch_address)
        );
        event_loop.watch_socket_files();
        event_loop.publish_running();
        event_loop.publish_agents();
        drop(event_loop.side.manager.tell(State::Ready));
        Ok(event_loop)
    }

    fn assemble(
        mut config: Config,
        start_side: StartSideThread,
        mut signals: Signals,
        sockets: Sockets,
        settings: Vec<ListenerSettings>,
    ) -> Result<EventLoop, RunError> {
        let Sockets {
            dispatch,
            admin,
            admin_http,
            advice,
            agents,
            lines,
            offered,
            mut listeners,
            held,
        } = sockets;
        let poll = Poll::new().map_err(RunError::system("poll"))?;
        let registry = poll.registry();
        registry
            .register(&mut signals, Source::Signals.token(), Interest::READABLE)
            .map_err(RunError::system("poll"))?;
        let waker =
            Waker::new(registry, Source::Waker.token()).map_err(RunError::system("waker"))?;
        let waker = Arc::new(waker);
        let wake = Arc::new(move || {
            // A waker fails only when its eventfd is full, and then it is set.
            let _ = waker.wake();
        });
        let wake_closers = Arc::clone(&wake) as crate::wake::Wake;
        let wake_handshakes = Arc::clone(&wake) as crate::wake::Wake;
        let wake_later = Arc::clone(&wake) as crate::wake::Wake;
        let mut shared = SharedSockets::default();
        if offered.is_some() {
            shared.dispatch = dispatch.fd.try_clone().ok();
            shared.admin = admin.fd.try_clone().ok();
        }
        let (admin, admin_path) = admin.into_listener();
        let shareable = |configured: Option<SocketAddr>, made: &Option<Listening>| {
            let made = made.as_ref().filter(|_| offered.is_some())?;
            Some((configured?.to_string(), made.duplicate(made.fd.try_clone().ok()?)))
        };
        shared.admin_http = shareable(config.admin_http, &admin_http);
        shared.advice = shareable(config.advice.listen, &advice);
        if let Some(made) = &admin_http {
            log::info!("event=admin_http address={}", value(&made.address));
        }
        if let Some(made) = &advice {
            log::info!("event=advice_listen address={}", value(&made.address));
        }
        agents.iter().for_each(|socket| agents::log_opened(socket));
        let tcp = TcpListeners {
            admin_http: admin_http.map(|made| made.fd.into()),
            advice: advice.map(|made| made.fd.into()),
        };
        let take_over = TakeOver::new(shared, offered, Arc::clone(&wake) as crate::wake::Wake);
        let side = start_side(admin, tcp, wake, held).map_err(RunError::system("admin thread"))?;
        let (dispatch, dispatch_address, dispatch_path) = dispatch.into_parts();
        // The former dispatcher has the journal until it has committed.
        let journal = adopt::journal_path(&dispatch_address).filter(|_| !held);
        let survivors = adopt::find(&side.spawner, &mut config, journal);
        side.hosts.set(config.admin_http_hosts.clone());
        side.metrics_max_workers.store(config.limits.metrics_max_workers, Ordering::Relaxed);
        side.admin_rate.store(config.limits.admin_rate, Ordering::Relaxed);
        let (sender, purged) = mpsc::channel();
        let closers = Closers::start(bounds(&config.limits), sender, wake_closers)
            .map_err(RunError::system("closing threads"))?;
        // If the kernel refuses descriptors at their sender, no call of that thread can block.
        let watch = crate::sys::refuse_descriptors(&dispatch).is_err().then(|| closers.watch());
        let (pool_settings, pools): (Vec<_>, Vec<_>) =
            std::mem::take(&mut config.pools).into_iter().map(PoolResources::split).unzip();
        let handshake_settings =
            EventLoop::handshake_settings(&config.limits, pool_settings.iter());
        let handshakes = Handshakes::start(
            (dispatch, held),
            handshake_settings,
            wake_handshakes,
            closers.bin(),
            watch,
        )
        .map_err(RunError::system("handshake thread"))?;
        let cleaner = Cleaner::start().map_err(RunError::system("cleaner thread"))?;
        let connections = Connections::new().map_err(RunError::system("socket pair"))?;
        let wakeup = Wakeup::new(poll);
        let now = clock();
        let mut core = Core::new(pool_settings, settings, now);
        core.set_resource_pause(config.limits.resource_pause);
        core.set_seed(seed());
        let mut rolls = Rolls::default();
        let adopted = survivors.adopt(now, &mut core, &side.spawner, &pools, &mut rolls);
        for (position, listener) in (0u16..).zip(std::mem::take(&mut config.listeners)) {
            core.set_access_control(
                ListenerId(position),
                AccessControl::new(listener.access_rules.clone(), seed()),
            );
            core.set_proxy_control(
                ListenerId(position),
                listener.proxy.clone().map(ProxyControl::new),
            );
            listeners.resources.push(ListenerResources::split(listener).2);
        }
        for listener in &listeners.sockets {
            if let Some(listening) = &listener.listening {
                log::info!(
                    "event=listening listener={} address={} pool={}{}",
                    core.listener_name(listener.id),
                    value(&listening.address),
                    core.pool_of_listener(listener.id).map_or("", |pool| core.pool_name(pool)),
                    if listening.inherited { " inherited=true" } else { "" }
                );
            }
        }
        let mut event_loop = EventLoop {
            config,
            pools,
            rolls,
            run: Run {
                instance: format!("{:016x}", seed()),
                started: now,
                generation: 0,
                stop_deadline: None,
                leaves: false,
                recalled: false,
                terminal: std::io::stderr().is_terminal(),
                hurries: false,
                stop_asked: None,
                unit: Unit::own(),
                descriptors: None,
            },
            core,
            signals,
            now,
            wakeup,
            listeners,
            endpoints: Endpoints { dispatch_address, dispatch_path, admin_path },
            handshakes,
            workers: Workers::new(purged, adopted.tokens),
            lines: Lines::default(),
            steers: Steers::default(),
            wake: wake_later,
            connections,
            background: Background { closers, closing_due: None, cleaner },
            side,
            take_over,
            agents,
            observation: Observation::new(now),
        };
        event_loop.serve_lines(lines, held).map_err(RunError::system("line thread"))?;
        // The former dispatcher decides until it has committed.
        if !held {
            event_loop.begin_steering(&adopted.listening)?;
        }
        Ok(event_loop)
    }

    /// Ends everything: channels before control connections, so that a worker reads its channel to
    /// the end before it looks for another dispatcher; then the processes of the dispatcher; then
    /// the sockets.
    pub(super) fn finish(mut self) {
        self.confirm_leaving();
        let totals = self.core.totals();
        self.take_over.end();
        for place in &mut self.workers.table {
            if let Some(io) = place.as_mut() {
                io.outbox.clear();
            }
        }
        let workers: Vec<_> = self.workers.table.iter_mut().filter_map(Option::take).collect();
        for io in &workers {
            self.announce_stop(io);
            io.lane.shut();
        }
        for io in workers {
            let owner = Owner::Worker(io.id.serial);
            self.background.closers.task(Task::Drop(owner, Box::new(io.lane)));
        }
        // Connections in flight live on in the workers' channels; the dispatcher's copies are not
        // needed any more.
        for conn in self.connections.table.drain(..).flatten() {
            self.background.closers.task(Task::Drop(Owner::Other, Box::new(conn.fd)));
        }
        self.end_processes();
        let longest_end = self.longest_end();
        self.end_lines(CLOSES_END);
        self.end_steering();
        if let Some(dispatch) = self.handshakes.end(CLOSES_END) {
            self.background.closers.task(Task::Drop(Owner::Other, Box::new(dispatch)));
        }
        self.background.closers.finish(CLOSES_END);
        self.side.manager.finish();
        let mut hurries = self.run.hurries;
        self.side.stop(longest_end, adopt::AFTER_DRAIN, || {
            hurries |= self.signals.pending().any(signals::stops);
            hurries
        });
        drop(self.endpoints.dispatch_path);
        self.background.cleaner.finish();
        log::info!(
            "event=stopped accepted={} taken={} in_flight={} queued={}",
            totals.accepted,
            totals.taken,
            totals.in_flight,
            totals.queued
        );
    }
}

impl EventLoop {
    /// The addresses clients can connect to.
    pub(super) fn addresses(&self) -> Vec<String> {
        self.listeners.addresses().map(str::to_owned).collect()
    }
}

/// How long blocked closes may delay the end. The end of the process closes the rest, without
/// lingering.
const CLOSES_END: Duration = Duration::from_secs(1);

/// The bounds of the closing threads.
pub(super) fn bounds(limits: &crate::config::Limits) -> Bounds {
    Bounds { threads: limits.closing_threads, waiting: limits.max_closing }
}

/// Connections in flight need descriptors: raises the limit to the hard limit. Returns the old
/// limits if they were changed.
fn raise_descriptor_limit() -> Option<(u64, u64)> {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < hard => match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
            Ok(()) => return Some((soft, hard)),
            Err(error) => {
                log::warn!(
                    "event=descriptor_limit_not_raised soft={soft} error={error}",
                    error = quoted(&error)
                );
            }
        },
        Ok(_) => {}
        Err(error) => {
            log::warn!("event=descriptor_limit_unknown error={error}", error = quoted(&error))
        }
    }
    None
}
