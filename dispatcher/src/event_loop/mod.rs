//! The hot thread: a mio loop that turns readiness into inputs of the core and performs its
//! effects.
//!
//! It owns the descriptors of the dispatcher and reads the clock. It decides nothing: the core
//! chooses workers, gives up connections and says whether to accept. It waits only in the poll:
//! logs, HTTP, starting processes and closes that may block happen on other threads.

mod accept;
mod adopt;
mod agents;
mod command;
mod conditions;
mod connections;
mod control;
mod doorbell_limit;
mod event_kind;
mod event_order;
mod events;
mod fault_kind;
mod fault_list;
mod faults;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod gauges;
mod handoff_check;
mod handshake;
mod join;
mod leaving;
mod line;
mod listeners;
mod loads;
mod meters;
mod observation;
mod peek;
mod peer_thread;
mod perform;
mod proxy;
mod queued;
mod rate_limit;
pub mod reload;
mod rolls;
mod scan;
mod start;
mod status;
mod steer;
mod take_over;
mod time;
mod token;
mod wakeup;
mod worker_io;
mod workers;
mod yield_backoff;

use std::collections::HashSet;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use mio::Events;
use signal_hook_mio::v1_0::Signals;

use self::connections::Connections;
use self::handshake::Handshakes;
use self::line::Lines;
use self::listeners::Listeners;
use self::observation::Observation;
use self::rolls::Rolls;
use self::steer::Steers;
use self::take_over::TakeOver;
use self::time::{clock, realtime};
use self::token::Source;
use self::wakeup::Wakeup;
use self::workers::Workers;
use crate::background::cleaner::Cleaner;
use crate::background::closer::Closers;
use crate::background::service_manager::State;
use crate::background::service_manager::unit::{StopKind, Unit};
use crate::config::{Address, Config, LineSocket, Pool, Spawn, Steer};
use crate::listen::bind::OwnedPath;
use crate::mailbox::agents::AgentSockets;
use crate::mailbox::{SideThread, StartSideThread};
use crate::wake::Wake;
use dispatcher_core::{Core, PoolSettings, Time};

pub use crate::listen::error::RunError;

/// Serves until a signal ends the dispatcher. Calls `ready` once, with the bound addresses of the
/// listeners, as soon as clients and workers can connect.
///
/// # Errors
/// [`RunError`] when the dispatcher cannot start, or when the poll fails.
pub fn run(
    config: Config,
    start_side: StartSideThread,
    ready: impl FnOnce(&[String]),
) -> Result<(), RunError> {
    serve(EventLoop::start(config, start_side)?, ready)
}

/// Like [`run`], and takes the listeners and the waiting connections of a running dispatcher over.
///
/// # Errors
/// [`RunError`] like [`run`], and when the running dispatcher refuses or fails; it then serves on.
pub fn run_taking_over(
    config: Config,
    start_side: StartSideThread,
    ready: impl FnOnce(&[String]),
) -> Result<(), RunError> {
    serve(EventLoop::start_taking_over(config, start_side)?, ready)
}

fn serve(mut event_loop: EventLoop, ready: impl FnOnce(&[String])) -> Result<(), RunError> {
    ready(&event_loop.addresses());
    let served = event_loop.serve();
    event_loop.finish();
    served
}

/// The state of the hot thread. Its tables use the indices of the core.
struct EventLoop {
    /// The running configuration without pools and listeners: the core has their settings, `pools`
    /// and `listeners` the rest.
    config: Config,
    /// By `PoolId`; removed pools keep their entries.
    pools: Vec<PoolResources>,
    rolls: Rolls,
    run: Run,
    core: Core,
    signals: Signals,
    /// The time at which this turn began.
    now: Time,
    wakeup: Wakeup,
    listeners: Listeners,
    endpoints: Endpoints,
    handshakes: Handshakes,
    workers: Workers,
    lines: Lines,
    steers: Steers,
    /// Wakes this thread; for threads that are started later.
    wake: Wake,
    connections: Connections,
    background: Background,
    side: SideThread,
    take_over: TakeOver,
    /// The sockets for HAProxy's agent check.
    agents: AgentSockets,
    observation: Observation,
}

/// The part of a pool's configuration that the core does not have.
#[derive(Clone)]
struct PoolResources {
    unavailable_response: Option<Arc<[u8]>>,
    spawn: Option<Spawn>,
    agent_listen: Option<Address>,
    line: Option<LineSocket>,
    steer: Option<Steer>,
}

impl PoolResources {
    /// Splits a pool's configuration into the core's part and this one.
    fn split(pool: Pool) -> (PoolSettings, PoolResources) {
        let Pool { settings, unavailable_response, spawn, agent_listen, line, steer } = pool;
        (settings, PoolResources { unavailable_response, spawn, agent_listen, line, steer })
    }

    /// The whole configuration of a pool.
    fn with(&self, settings: PoolSettings) -> Pool {
        let PoolResources { unavailable_response, spawn, agent_listen, line, steer } = self.clone();
        Pool { settings, unavailable_response, spawn, agent_listen, line, steer }
    }
}

/// This run of the dispatcher, from its start to its end.
struct Run {
    /// Identifies this run to operators and programs.
    instance: String,
    started: Time,
    /// The number of reloads.
    generation: u64,
    /// Set once a stop has begun.
    stop_deadline: Option<Time>,
    /// This stop leaves the processes of pools with `on_dispatcher_loss = "serve"`.
    leaves: bool,
    /// The stop was to leave them, and then the unit was stopped for good.
    recalled: bool,
    /// A second signal has come: the processes have little time to end.
    hurries: bool,
    /// The signal of a stop whose reason the service manager is being asked for.
    stop_asked: Option<i32>,
    /// The unit of systemd that this process is.
    unit: Option<Unit>,
    /// The limits of open files, soft and hard, before the dispatcher raised them: its processes
    /// get these.
    descriptors: Option<(u64, u64)>,
    /// It was started at a terminal.
    terminal: bool,
}

/// The sockets of workers and of the admin interface. The paths remove the socket files when they
/// are dropped.
struct Endpoints {
    dispatch_address: String,
    dispatch_path: Option<OwnedPath>,
    admin_path: Option<OwnedPath>,
}

/// Threads that close and drop what could block the hot thread.
struct Background {
    closers: Closers,
    /// The closers' queue was locked at the end of the turn: when to hand over again.
    closing_due: Option<Time>,
    cleaner: Cleaner,
}

impl EventLoop {
    fn serve(&mut self) -> Result<(), RunError> {
        let mut events = Events::with_capacity(1024);
        loop {
            self.perform();
            self.hand_over();
            if self.is_over() {
                return Ok(());
            }
            let timeout = self.before_sleep();
            self.observation.turn_ended(clock() - self.now);
            self.wakeup.wait(&mut events, timeout, self.config.limits.busy_poll)?;
            self.now = clock();
            self.connections.to_realtime = realtime().wrapping_sub(self.now.0);
            // The scan comes first: a connection that was taken may make room for one that waits.
            self.read_gauges();
            self.scan_all();
            self.handle_all(&events);
            self.core.tick(self.now);
            self.perform();
            self.accept_all();
            self.observation.seconds.note(self.now, self.core.totals().accepted);
        }
    }

    /// Handles the events of the poll, and the work that earlier turns left.
    fn handle_all(&mut self, events: &Events) {
        for event in events {
            match Source::of(event.token()) {
                Some(Source::Queued(key)) => self.queued_event(key, event),
                Some(source) => self.handle(source),
                None => {}
            }
        }
        self.handle_leftovers();
    }

    /// Whether a stop is complete: the listeners are empty and closed, or the time is over.
    fn is_over(&self) -> bool {
        let Some(deadline) = self.run.stop_deadline else { return false };
        self.core.stopped() && (self.listeners.all_closed() || deadline <= self.now)
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Signals => self.handle_signals(),
            Source::Waker => {
                self.wakeup.side_ready = true;
                self.handshakes.ready = true;
                self.lines.ready = true;
                self.steers.ready = true;
            }
            Source::Listener(position) => {
                if let Some(listener) = self.listeners.sockets.get_mut(position) {
                    listener.edge();
                }
            }
            // Only the handshake thread's poll has these.
            Source::Dispatch | Source::Pending(_) | Source::Control(_) | Source::Process(_) => {}
            // The scan has already read the worker's scoreboard.
            Source::Doorbell(key) => self.rang(key),
            Source::LineRoom(key) => self.line_room(key),
            // `handle_all` handles these.
            Source::Queued(_) => {}
        }
    }

    /// Handles what earlier turns did not finish, and what is due without an event.
    fn handle_leftovers(&mut self) {
        if self.handshakes.ready {
            self.handle_handshakes();
        }
        self.handle_lines();
        self.handle_steering();
        if std::mem::take(&mut self.wakeup.side_ready) {
            self.handle_side();
            self.handle_take_over();
        }
        while let Ok(worker) = self.workers.purged.try_recv() {
            self.purged(worker);
        }
        self.workers.unmute(self.wakeup.registry(), self.now);
        if self.observation.suppressed_due.is_some_and(|due| due <= self.now) {
            self.write_suppressed();
        }
        if let Some(discarded) = self.core.discarded() {
            self.background.cleaner.clean(discarded);
        }
    }

    fn handle_signals(&mut self) {
        let received: Vec<i32> = self.signals.pending().collect();
        for signal in received {
            match signal {
                libc::SIGHUP if self.config.file.is_none() => self.hang_up(),
                // Reading files could block: the side thread does it.
                libc::SIGHUP => self.side.reload.notify_one(),
                libc::SIGUSR1 => self.begin_stop(signal, true),
                libc::SIGUSR2 => self.restart_all(),
                _ => self.stop_signal(signal),
            }
        }
    }

    /// SIGHUP where there is no file to read: an order to replace the processes, or the end of the
    /// terminal at which `serve` or `demo` was started.
    fn hang_up(&mut self) {
        match self.run.terminal && !std::io::stderr().is_terminal() {
            true => self.stop_signal(libc::SIGHUP),
            false => self.restart_all(),
        }
    }

    /// A signal stops the dispatcher. If processes could outlive it, the service manager first
    /// tells whether it stops or restarts the dispatcher; a second signal does not wait for that.
    fn stop_signal(&mut self, signal: i32) {
        let asks = self.run.stop_deadline.is_none() && self.run.stop_asked.is_none();
        if asks
            && self.any_survives()
            && let Some(unit) = &self.run.unit
        {
            self.side.spawner.ask_stop_kind(unit.clone());
            self.run.stop_asked = Some(signal);
            return;
        }
        // A signal that only ends the wait of a restart does not make a stop of it.
        let leaves = self.run.leaves && self.run.unit.is_some();
        self.begin_stop(signal, leaves);
    }

    /// The service manager has said why it stops the dispatcher.
    fn stop_kind(&mut self, kind: StopKind) {
        let Some(signal) = self.run.stop_asked.take() else { return };
        match kind {
            StopKind::Restart => self.begin_stop(signal, true),
            StopKind::Stop | StopKind::NoJob => self.begin_stop(signal, false),
            // A restart must not cut connections off. After a stop the unit can be stopped again.
            StopKind::Unknown => self.begin_stop(signal, true),
        }
    }

    /// The first signal begins a graceful stop; a second signal ends the dispatcher at once.
    /// `leaves`: processes with `on_dispatcher_loss = "serve"` are not ended.
    fn begin_stop(&mut self, signal: i32, leaves: bool) {
        self.run.stop_asked = None;
        self.run.leaves = leaves && self.any_survives();
        let patience = match self.run.stop_deadline {
            None => self.config.limits.stop_timeout,
            Some(_) => Duration::ZERO,
        };
        self.run.hurries = self.run.stop_deadline.is_some();
        let name = match signal {
            libc::SIGINT => "SIGINT",
            libc::SIGQUIT => "SIGQUIT",
            libc::SIGUSR1 => "SIGUSR1",
            _ => "SIGTERM",
        };
        self.take_over.refuse();
        self.log_stop(name, patience);
        if self.run.stop_deadline.is_none() {
            drop(self.side.manager.tell(State::Stopping));
            self.stop_steering();
            self.finish_listeners();
        }
        self.stop_within(patience);
    }

    /// Another dispatcher has the sockets at these positions, and serves.
    fn begin_handed_over_stop(&mut self, patience: Duration, positions: &HashSet<usize>) {
        self.run.leaves = self.any_survives();
        let patience = patience.min(self.config.limits.stop_timeout);
        self.log_stop("none", patience);
        self.stop_within(patience);
        self.stop_steering();
        self.give_listeners_away(positions);
    }

    fn stop_within(&mut self, patience: Duration) {
        let deadline = self.now + patience;
        self.run.stop_deadline = Some(deadline);
        self.core.stop(self.now, deadline);
    }

    fn log_stop(&self, signal: &str, patience: Duration) {
        let totals = self.core.totals();
        log::info!(
            "event=stopping signal={signal} queued={} in_flight={} within={} leaves_processes={}",
            totals.queued,
            totals.in_flight,
            events::span(patience),
            self.run.leaves
        );
    }
}

#[cfg(test)]
mod tests;
