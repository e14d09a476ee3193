//! Another configuration while everything goes on.
//!
//! Two halves. [`prepare`] runs on the side thread: it reads the file, compares it with what is in force, and binds what is
//! new. Whatever can fail does so there, when nothing has changed yet. `Shell::reload` then puts the result into force, in
//! one turn of the hot thread, without waiting for anything.
//!
//! The shell's tables of pools and listeners are by id, like the core's: entries that were taken out stay until the core uses
//! them for others.

mod fixed;

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::net::SocketType;
use serde::{Deserialize, Serialize};

use self::fixed::fixed;
use super::Shell;
use super::accept::Listener as Door;
use super::error::RunError;
use super::gauges::Gauges;
use super::inherited::Inherited;
use super::leaving::Reusable;
use super::sockets::{self, Listening, Looks};
use super::start::seed;
use crate::admin::command::{CommandError, Problem};
use crate::config::{Address, Config, ConfigError, Limits, Listener, Pool};
use crate::logger::value;
use crate::pool::{ListenerId, ListenerSettings, PoolId, Screen};
use crate::socket_files::SocketFile;

/// What is in force, as the side thread sees it.
#[derive(Debug)]
pub struct InForce {
    /// Counts reloads: a plan is made for one of these.
    generation: u64,
    /// Its pools and listeners by id.
    config: Config,
    /// Files of sockets that it has made.
    files: Vec<(Socket, SocketFile)>,
    /// Those of them that were not taken out.
    pools: Vec<PoolId>,
    listeners: Vec<ListenerId>,
    /// Sockets that were taken out and are still there.
    reusable: Vec<Reusable>,
}

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Socket {
    Dispatch,
    Admin,
    Listener(ListenerId),
}

/// A reload that can be carried out.
#[derive(Debug)]
pub struct Plan {
    generation: u64,
    /// Sockets whose file was removed, made again.
    again: Vec<(Socket, Listening)>,
    /// The admin socket among them: it is served on the side thread.
    admin: Option<UnixListener>,
    pools: Vec<(PoolStep, Pool)>,
    listeners: Vec<(ListenerStep, Rules, Listener)>,
    removed_pools: Vec<PoolId>,
    removed_listeners: Vec<ListenerId>,
    limits: Limits,
    admin_http_hosts: Vec<String>,
    modes: Vec<(PathBuf, u32)>,
    reloaded: Reloaded,
}

#[derive(Debug)]
enum PoolStep {
    Keep(PoolId),
    Change(PoolId),
    Add,
}

#[derive(Debug)]
enum ListenerStep {
    /// The same one, perhaps with other options or other rules.
    Keep(ListenerId),
    /// The socket of this one, under another name or for another pool.
    TakeOver(ListenerId),
    /// A new one.
    Open(Vec<Listening>),
    /// A new one, with a socket that is being taken out.
    TakeBack(Listening),
    /// A new one, with the sockets of this name that a service manager passed and no listener has.
    TakeKept(String),
}

/// Who may come in at a listener.
#[derive(Debug)]
enum Rules {
    /// As before: what is known of clients stays.
    Same,
    /// Its table may take long to make.
    New(Option<Box<Screen>>),
}

/// What a reload did, for people and programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// The file that was read.
    pub file: String,
    /// What is new, by name.
    pub added: Vec<String>,
    /// What is no more.
    pub removed: Vec<String>,
    /// What has changed.
    pub changed: Vec<String>,
    /// What is different in the file and stays as it was until a restart.
    pub needs_restart: Vec<String>,
    /// What the file has that is probably not meant.
    pub warnings: Vec<String>,
}

impl Plan {
    /// What it is going to do.
    pub fn reloaded(&self) -> &Reloaded {
        &self.reloaded
    }

    /// Permission bits of socket files that are to change. Left to the side thread: a file system may be slow.
    pub fn take_modes(&mut self) -> Vec<(PathBuf, u32)> {
        std::mem::take(&mut self.modes)
    }

    /// The admin socket, if it was made again. Left to the side thread, too.
    pub fn take_admin(&mut self) -> Option<UnixListener> {
        self.admin.take()
    }

    /// By which names it may be asked over TCP. Left to the side thread too.
    pub fn admin_http_hosts(&self) -> &[String] {
        &self.admin_http_hosts
    }

    /// How much is to be logged. Left to the side thread too.
    pub fn log_level(&self) -> log::LevelFilter {
        self.limits.log_level
    }
}

fn refused(message: impl Into<String>) -> CommandError {
    CommandError::new(Problem::Config, message)
}

/// Reads the configuration again and gets everything ready. May take its time; changes nothing.
///
/// # Errors
/// When the file has a mistake, or something in it cannot be had.
pub fn prepare(now: &InForce) -> Result<Plan, CommandError> {
    let Some(file) = &now.config.file else {
        return Err(CommandError::new(
            Problem::Conflict,
            "this dispatcher has no configuration file",
        )
        .hint("`dispatcher demo` does without; write one for `dispatcher run`"));
    };
    let new = Config::load(file).map_err(|error| match &error {
        ConfigError::Unreadable { .. } => {
            refused(error.to_string()).hint("nothing was changed; the file must stay where it was")
        }
        ConfigError::Invalid { .. } => refused(error.to_string()),
    })?;
    plan(now, new)
}

fn plan(now: &InForce, new: Config) -> Result<Plan, CommandError> {
    let mut reloaded = Reloaded {
        file: new.file.as_ref().map_or_else(String::new, |file| file.display().to_string()),
        warnings: new.warnings.iter().map(ToString::to_string).collect(),
        needs_restart: fixed(&now.config, &new),
        ..Reloaded::default()
    };
    let room = usize::from(u16::MAX);
    if now.config.pools.len() + new.pools.len() > room
        || now.config.listeners.len() + new.listeners.len() > room
    {
        return Err(CommandError::new(
            Problem::Conflict,
            "too many pools and listeners have come and gone: nothing was changed",
        )
        .hint("restart the dispatcher; connections that workers have stay open"));
    }
    let (pools, removed_pools) = plan_pools(now, &new, &mut reloaded);
    let (listeners, removed_listeners) = plan_listeners(now, &new, &mut reloaded)?;
    if now.config.limits != new.limits {
        reloaded.changed.push("limits".to_owned());
    }
    if now.config.admin_http_hosts != new.admin_http_hosts {
        reloaded.changed.push("admin_http_hosts".to_owned());
    }
    let again = make_again(now, &listeners, &mut reloaded);
    let admin = again.iter().find(|(socket, _)| *socket == Socket::Admin);
    let admin = match admin.map(|(_, listening)| listening.fd.try_clone()) {
        None => None,
        Some(Ok(fd)) => Some(fd.into()),
        Some(Err(error)) => return Err(refused(format!("admin_socket: {error}"))),
    };
    let modes = listeners.iter().filter_map(|(step, _, listener)| new_mode(now, step, listener));
    Ok(Plan {
        generation: now.generation,
        again,
        admin,
        pools,
        modes: modes.collect(),
        listeners,
        removed_pools,
        removed_listeners,
        limits: new.limits,
        admin_http_hosts: new.admin_http_hosts,
        reloaded,
    })
}

/// Makes sockets again whose file was removed. One that cannot be made stays as it is, and is named.
fn make_again(
    now: &InForce,
    listeners: &Steps,
    reloaded: &mut Reloaded,
) -> Vec<(Socket, Listening)> {
    let mut again = Vec::new();
    for (socket, file) in now.files.iter().filter(|(_, file)| file.is_missing()) {
        let (kind, looks) = match socket {
            Socket::Dispatch => (SocketType::SEQPACKET, Looks::of(&now.config.dispatch_socket)),
            Socket::Admin => (SocketType::STREAM, Looks::of(&now.config.admin_socket)),
            Socket::Listener(id) => {
                let stays = listeners.iter().find(|(step, _, _)| {
                    matches!(step, ListenerStep::Keep(other) | ListenerStep::TakeOver(other) if other == id)
                });
                let Some((_, _, listener)) = stays else { continue };
                let (backlog, mode) = (listener.options.backlog, listener.options.mode);
                (SocketType::STREAM, Looks { backlog, mode, user: None, group: None })
            }
        };
        let name = format!("socket file {}", file.path.display());
        match sockets::listen_again(file, kind, looks) {
            Ok(listening) => {
                reloaded.added.push(name);
                again.push((*socket, listening));
            }
            Err(error) => reloaded.needs_restart.push(format!("{name} ({error})")),
        }
    }
    again
}

fn plan_pools(
    now: &InForce,
    new: &Config,
    reloaded: &mut Reloaded,
) -> (Vec<(PoolStep, Pool)>, Vec<PoolId>) {
    let mut removed = now.pools.clone();
    let mut pools = Vec::with_capacity(new.pools.len());
    for pool in &new.pools {
        let name = &pool.settings.name;
        let known = |id: &PoolId| {
            now.config.pools.get(usize::from(id.0)).filter(|pool| pool.settings.name == *name)
        };
        let step = match now.pools.iter().find_map(|id| Some((*id, known(id)?))) {
            None => {
                reloaded.added.push(format!("pool {name}"));
                PoolStep::Add
            }
            Some((id, old)) => {
                removed.retain(|other| *other != id);
                if old == pool {
                    PoolStep::Keep(id)
                } else {
                    reloaded.changed.push(format!("pool {name}"));
                    PoolStep::Change(id)
                }
            }
        };
        pools.push((step, pool.clone()));
    }
    for id in &removed {
        if let Some(pool) = now.config.pools.get(usize::from(id.0)) {
            reloaded.removed.push(format!("pool {}", pool.settings.name));
        }
    }
    (pools, removed)
}

type Steps = Vec<(ListenerStep, Rules, Listener)>;

fn plan_listeners(
    now: &InForce,
    new: &Config,
    reloaded: &mut Reloaded,
) -> Result<(Steps, Vec<ListenerId>), CommandError> {
    let mut rest: Vec<(ListenerId, &Listener)> = now
        .listeners
        .iter()
        .filter_map(|id| Some((*id, now.config.listeners.get(usize::from(id.0))?)))
        .collect();
    // By name first: several may have the same address, with port 0.
    let mut found: Vec<Option<(ListenerId, &Listener)>> = Vec::with_capacity(new.listeners.len());
    for wanted in &new.listeners {
        let same = |(_, old): &(ListenerId, &Listener)| {
            old.name == wanted.name && old.address == wanted.address
        };
        found.push(rest.iter().position(same).map(|at| rest.remove(at)));
    }
    let mut steps = Vec::with_capacity(new.listeners.len());
    for (wanted, found) in new.listeners.iter().zip(found) {
        let found = found.or_else(|| {
            let at = rest.iter().position(|(_, old)| {
                old.address == wanted.address && !has_any_port(&wanted.address)
            })?;
            Some(rest.remove(at))
        });
        steps.push(match found {
            Some((id, old)) => plan_known(now, new, (id, old), wanted, reloaded),
            None => {
                reloaded.added.push(format!("listener {}", wanted.name));
                plan_new(now, wanted, reloaded)?
            }
        });
    }
    for (_, old) in &rest {
        reloaded.removed.push(format!("listener {}", old.name));
        if let Address::Systemd(name) = &old.address {
            reloaded.warnings.push(format!(
                "listener {}: systemd keeps the socket of systemd:{name} open, so its clients are turned away until it is \
                 configured again; stop its .socket unit to have them refused",
                old.name
            ));
        }
    }
    // Last, because it is the first thing that anybody could notice.
    for (step, _, listener) in &mut steps {
        if let ListenerStep::Open(made) = step {
            *made = listen(now, listener).map_err(|error| not_opened(now, listener, &error))?;
        }
    }
    Ok((steps, rest.iter().map(|(id, _)| *id).collect()))
}

/// One that is not there yet. Its socket may be: of a listener that was taken out before.
fn plan_new(
    now: &InForce,
    wanted: &Listener,
    reloaded: &mut Reloaded,
) -> Result<(ListenerStep, Rules, Listener), CommandError> {
    let rules = new_rules(wanted);
    let there = now.reusable.iter().find(|there| there.address == wanted.address);
    match (&wanted.address, there) {
        (Address::Systemd(name), Some(_)) => {
            Ok((ListenerStep::TakeKept(name.clone()), rules, wanted.clone()))
        }
        (Address::Systemd(name), None) => Err(not_inherited(&wanted.name, name)),
        (Address::Tcp(_), Some(Reusable { listening: Some(listening), options, .. }))
            if !has_any_port(&wanted.address) =>
        {
            let fd = listening.fd.try_clone();
            let fd = fd.map_err(|error| refused(format!("listener `{}`: {error}", wanted.name)))?;
            let (options, fixed) = sockets::changeable(options, &wanted.options);
            for option in fixed {
                reloaded.needs_restart.push(format!("{option} of listener {}", wanted.name));
            }
            if let Err(error) = sockets::change_options(fd.as_fd(), true, &options) {
                let left = format!("options of listener {} ({error})", wanted.name);
                reloaded.needs_restart.push(left);
            }
            let step = ListenerStep::TakeBack(listening.duplicate(fd));
            Ok((step, rules, Listener { options, ..wanted.clone() }))
        }
        _ => Ok((ListenerStep::Open(Vec::new()), rules, wanted.clone())),
    }
}

/// How long the address of a listener that was taken out may still be in use, and how long the lock of its socket file.
const ADDRESS_KEPT: Duration = Duration::from_secs(3);
const LOCK_KEPT: Duration = Duration::from_millis(500);

/// Opens a listener's address. What had it before may be just about to let go of it.
fn listen(now: &InForce, listener: &Listener) -> Result<Vec<Listening>, RunError> {
    let began = Instant::now();
    let patience = if now.reusable.is_empty() { LOCK_KEPT } else { ADDRESS_KEPT };
    loop {
        match sockets::listen(&listener.address, &listener.options, &mut Inherited::default()) {
            Err(error) if error.is_in_use() && began.elapsed() < patience => {
                std::thread::sleep(Duration::from_millis(20));
            }
            outcome => return outcome,
        }
    }
}

/// One whose socket is there already.
fn plan_known(
    now: &InForce,
    new: &Config,
    (id, old): (ListenerId, &Listener),
    wanted: &Listener,
    reloaded: &mut Reloaded,
) -> (ListenerStep, Rules, Listener) {
    let (options, fixed) = match &wanted.address {
        Address::Tcp(_) => sockets::changeable(&old.options, &wanted.options),
        // What else there is changes at any time, or is systemd's business.
        Address::Unix(_) | Address::Systemd(_) => (wanted.options.clone(), Vec::new()),
    };
    let name = &wanted.name;
    for option in fixed {
        reloaded.needs_restart.push(format!("{option} of listener {name}"));
    }
    let pool_of = |config: &Config, listener: &Listener| {
        config.pools.get(usize::from(listener.pool)).map(|pool| pool.settings.name.clone())
    };
    let moved = old.name != *name || pool_of(&now.config, old) != pool_of(new, wanted);
    if moved || old.options != options || old.screening != wanted.screening {
        reloaded.changed.push(match old.name == *name {
            true => format!("listener {name}"),
            false => format!("listener {name} (was {})", old.name),
        });
    }
    let step = if moved { ListenerStep::TakeOver(id) } else { ListenerStep::Keep(id) };
    let same = !moved && old.screening == wanted.screening;
    let rules = if same { Rules::Same } else { new_rules(wanted) };
    (step, rules, Listener { options, ..wanted.clone() })
}

fn new_rules(listener: &Listener) -> Rules {
    Rules::New(Screen::new(listener.screening.clone(), seed()))
}

/// The socket file of one that stays, and its permission bits if they are to be others.
fn new_mode(now: &InForce, step: &ListenerStep, listener: &Listener) -> Option<(PathBuf, u32)> {
    let (ListenerStep::Keep(id) | ListenerStep::TakeOver(id)) = step else { return None };
    let (Address::Unix(path), mode) = (&listener.address, listener.options.mode) else {
        return None;
    };
    let old = now.config.listeners.get(usize::from(id.0))?;
    (old.options.mode != mode).then(|| (path.clone(), mode))
}

fn not_inherited(listener: &str, name: &str) -> CommandError {
    let message = format!(
        "listener `{listener}`: systemd:{name} is new, and systemd passes sockets only when it starts a service: \
         nothing was changed"
    );
    refused(message).hint("restart the dispatcher; connections that workers have stay open")
}

fn not_opened(now: &InForce, listener: &Listener, error: &RunError) -> CommandError {
    let name = &listener.name;
    if let (RunError::Bind { error, .. }, Address::Tcp(address)) = (error, &listener.address)
        && error.kind() == std::io::ErrorKind::AddrInUse
        && let Some(own) = own_listener(now, *address)
    {
        return refused(format!(
            "listener `{name}`: cannot listen on {address}: this dispatcher itself listens there, as {own}"
        ))
        .hint(
            "nothing was changed; a new socket is opened before old ones are closed: take the old one \
             out first, reload, and put the new one in with a second reload",
        );
    }
    refused(format!("listener `{name}`: {error}")).hint("nothing was changed")
}

/// Which socket of ours keeps an address.
fn own_listener(now: &InForce, wanted: std::net::SocketAddr) -> Option<String> {
    let overlaps = |own: &std::net::SocketAddr| {
        let (own_ip, ip) = (own.ip().to_canonical(), wanted.ip().to_canonical());
        own.port() == wanted.port()
            && (own_ip == ip || own_ip.is_unspecified() || ip.is_unspecified())
    };
    let known = now.listeners.iter().filter_map(|id| now.config.listeners.get(usize::from(id.0)));
    let own = known.filter_map(|listener| match &listener.address {
        Address::Tcp(address) if overlaps(address) => Some(format!("listener `{}`", listener.name)),
        Address::Tcp(_) | Address::Unix(_) | Address::Systemd(_) => None,
    });
    let admin = now.config.admin_http.filter(overlaps).map(|_| "`admin_http`".to_owned());
    own.chain(admin).next()
}

fn has_any_port(address: &Address) -> bool {
    matches!(address, Address::Tcp(address) if address.port() == 0)
}

impl Shell {
    /// What is in force, for [`prepare`].
    pub(super) fn in_force(&self) -> InForce {
        let pools = (0u16..).map(PoolId).take(self.config.pools.len());
        InForce {
            generation: self.generation,
            config: self.config.clone(),
            pools: pools.filter(|&id| !self.core.is_pool_retired(id)).collect(),
            listeners: self.core.listeners().collect(),
            files: self.socket_files(),
            reusable: self.reusable(),
        }
    }

    /// Files of sockets that were made here.
    fn socket_files(&self) -> Vec<(Socket, SocketFile)> {
        let dispatch = self.dispatch_path.iter().map(|path| (Socket::Dispatch, path.file()));
        let admin = self.admin_path.iter().map(|path| (Socket::Admin, path.file()));
        let listeners =
            self.listeners.iter().filter(|door| !door.is_retiring()).filter_map(|door| {
                Some((Socket::Listener(door.id), door.listening.as_ref()?.file()?))
            });
        dispatch.chain(admin).chain(listeners).collect()
    }

    /// Has them looked at, under the names that people know.
    pub(super) fn watch_socket_files(&self) {
        let named = |(socket, file)| {
            let name = match socket {
                Socket::Dispatch => "dispatch_socket".to_owned(),
                Socket::Admin => "admin_socket".to_owned(),
                Socket::Listener(id) => format!("listener {}", self.core.listener_name(id)),
            };
            (name, file)
        };
        // One that is being emptied is not to be found, on purpose.
        let files = self.socket_files().into_iter().filter(|(socket, _)| match socket {
            Socket::Listener(id) => !self.core.is_listener_retired(*id),
            Socket::Dispatch | Socket::Admin => true,
        });
        self.side.files.set(files.map(named).collect());
    }

    /// Puts sockets that were made again into the places of those that nobody can find.
    fn put_again(&mut self, again: Vec<(Socket, Listening)>) {
        for (socket, listening) in again {
            let old = match socket {
                Socket::Dispatch => {
                    let (fd, _, path) = listening.into_parts();
                    self.door.order(super::door::Order::Listen(fd));
                    std::mem::replace(&mut self.dispatch_path, path)
                }
                Socket::Admin => {
                    let (_, _, path) = listening.into_parts();
                    std::mem::replace(&mut self.admin_path, path)
                }
                Socket::Listener(id) => {
                    let backlog = self.config.listeners.get(usize::from(id.0));
                    let backlog = backlog.map_or(0, |listener| listener.options.backlog);
                    for door in self.listeners.iter_mut().filter(|door| door.id == id) {
                        door.retire();
                    }
                    self.open(id, listening, backlog);
                    None
                }
            };
            // A file system may be slow.
            if let Some(old) = old {
                self.cleaner.clean(old);
            }
        }
    }

    /// Puts a prepared configuration into force.
    pub(super) fn reload(&mut self, plan: Plan) -> Result<Reloaded, CommandError> {
        if self.stop_deadline.is_some() {
            return Err(CommandError::new(Problem::Conflict, "the dispatcher is stopping"));
        }
        if self.cleaner.is_full() {
            let message = "what earlier reloads have removed is still being put away";
            return Err(CommandError::new(Problem::Unavailable, message).hint("try again"));
        }
        if plan.generation != self.generation {
            let message = "another reload came in between: nothing was changed";
            return Err(CommandError::new(Problem::Conflict, message).hint("try again"));
        }
        self.generation += 1;
        // What was decided before is done before names mean something else.
        self.perform();
        let mut reloaded = plan.reloaded;
        self.put_again(plan.again);
        let mut ids = Vec::with_capacity(plan.pools.len());
        for (step, pool) in plan.pools {
            ids.push(self.put_pool(step, pool, &mut reloaded));
        }
        for (step, rules, listener) in plan.listeners {
            let pool = ids.get(usize::from(listener.pool)).copied().unwrap_or(PoolId(0));
            let listener = Listener { pool: pool.0, ..listener };
            let id = self.put_listener(step, listener, &mut reloaded);
            if let Rules::New(screen) = rules {
                self.core.set_screen(id, screen);
            }
        }
        for id in plan.removed_listeners {
            self.core.retire_listener(id);
            self.drain_listener(id);
        }
        for id in plan.removed_pools {
            self.core.retire_pool(self.now, id);
        }
        self.core.set_resource_pause(plan.limits.resource_pause);
        let most = plan.limits.metrics_max_workers;
        self.side.metrics_max_workers.store(most, Ordering::Relaxed);
        self.side.admin_rate.store(plan.limits.admin_rate, Ordering::Relaxed);
        self.closers.set_bounds(super::start::bounds(&plan.limits));
        self.config.limits = plan.limits;
        let settings = Shell::door_settings(&self.config);
        self.door.order(super::door::Order::Settings(settings));
        self.config.admin_http_hosts = plan.admin_http_hosts;
        self.watch_socket_files();
        Ok(reloaded)
    }

    fn put_pool(&mut self, step: PoolStep, pool: Pool, reloaded: &mut Reloaded) -> PoolId {
        match step {
            PoolStep::Keep(id) => {
                let wanted = pool.settings.processes;
                let now = self.core.pool_settings(id).map_or(wanted, |settings| settings.processes);
                if now != wanted {
                    // An operator has scaled it meanwhile.
                    self.core.scale(self.now, id, wanted);
                    reloaded.changed.push(format!("pool {}", pool.settings.name));
                }
                id
            }
            PoolStep::Change(id) => {
                let mut starts_anew = false;
                if let Some(entry) = self.config.pools.get_mut(usize::from(id.0)) {
                    starts_anew = entry.spawn != pool.spawn;
                    *entry = pool.clone();
                }
                self.core.change_pool(self.now, id, pool.settings, seed());
                if starts_anew {
                    self.core.retry_processes(self.now, id);
                }
                self.score_anew(id);
                id
            }
            PoolStep::Add => {
                let id = self.core.add_pool(self.now, pool.settings.clone(), seed());
                match self.config.pools.get_mut(usize::from(id.0)) {
                    Some(entry) => {
                        if entry.settings.name != pool.settings.name {
                            // Another had its place. What was given to that one's processes opens nothing here.
                            self.tokens.retain(|_, process| process.pool != id);
                        }
                        *entry = pool;
                    }
                    None => self.config.pools.push(pool),
                }
                self.score_anew(id);
                id
            }
        }
    }

    /// The gauges that its workers are scored by may be others now.
    fn score_anew(&mut self, pool: PoolId) {
        for io in self.workers.iter_mut().flatten() {
            if self.core.pool_of_worker(io.id) == Some(pool) {
                io.gauges = Gauges::new(&self.core, pool);
            }
        }
        self.gauge_readers = self.workers.iter().flatten().filter(|io| io.gauges.is_some()).count();
    }

    fn put_listener(
        &mut self,
        step: ListenerStep,
        listener: Listener,
        reloaded: &mut Reloaded,
    ) -> ListenerId {
        let id = match step {
            ListenerStep::Keep(id) => id,
            ListenerStep::TakeOver(old) => {
                let had = self.config.listeners.get(usize::from(old.0));
                let options = had.map_or_else(|| listener.options.clone(), |l| l.options.clone());
                let as_it_is = Listener { options, ..listener.clone() };
                let id = self.add_listener(&as_it_is, self.addresses_of(old));
                for door in self.listeners.iter_mut().filter(|door| door.id == old) {
                    door.id = id;
                }
                self.core.retire_listener(old);
                self.core.listener_closed(self.now, old);
                id
            }
            ListenerStep::Open(made) => {
                let addresses: Vec<&str> = made.iter().map(|l| l.address.as_str()).collect();
                let id = self.add_listener(&listener, addresses.join(", "));
                for listening in made {
                    self.open(id, listening, listener.options.backlog);
                }
                id
            }
            ListenerStep::TakeBack(listening) => {
                self.take_back(&listening);
                let id = self.add_listener(&listener, listening.address.clone());
                self.open(id, listening, listener.options.backlog);
                id
            }
            ListenerStep::TakeKept(name) => {
                let made = self.take_kept(&name);
                let addresses: Vec<&str> = made.iter().map(|l| l.address.as_str()).collect();
                let id = self.add_listener(&listener, addresses.join(", "));
                for listening in made {
                    self.open(id, listening, listener.options.backlog);
                }
                id
            }
        };
        if let Some(entry) = self.config.listeners.get_mut(usize::from(id.0)) {
            let before = std::mem::replace(entry, listener);
            self.set_options(id, &before, reloaded);
        }
        id
    }

    /// In the tables; its sockets follow.
    fn add_listener(&mut self, listener: &Listener, address: String) -> ListenerId {
        let (name, pool) = (listener.name.clone(), PoolId(listener.pool));
        let id = self.core.add_listener(ListenerSettings { name, address, pool });
        match self.config.listeners.get_mut(usize::from(id.0)) {
            Some(entry) => *entry = listener.clone(),
            None => self.config.listeners.push(listener.clone()),
        }
        id
    }

    fn addresses_of(&self, id: ListenerId) -> String {
        let doors = self.listeners.iter().filter(|door| door.id == id);
        let listening = doors.filter_map(|door| door.listening.as_ref());
        let addresses: Vec<&str> = listening.map(|listening| listening.address.as_str()).collect();
        addresses.join(", ")
    }

    fn open(&mut self, id: ListenerId, listening: Listening, backlog: u32) {
        log::info!(
            "event=listening listener={} address={} pool={}",
            self.core.listener_name(id),
            value(&listening.address),
            self.core.pool_of_listener(id).map_or("", |pool| self.core.pool_name(pool)),
        );
        // The place of one that is closed: it is out of the poll, and an event for it that is still to be handled does no
        // more than have the new one's queue looked at.
        let free = self.listeners.iter().position(|door| door.listening.is_none());
        let place = free.unwrap_or(self.listeners.len());
        let door = Door::new(id, listening, place, backlog);
        match self.listeners.get_mut(place) {
            Some(entry) => *entry = door,
            None => self.listeners.push(door),
        }
    }

    /// Options of sockets that stay. One that the kernel will not have stays as it was, too.
    fn set_options(&mut self, id: ListenerId, before: &Listener, reloaded: &mut Reloaded) {
        let Some(listener) = self.config.listeners.get(usize::from(id.0)) else { return };
        if before.options == listener.options {
            return;
        }
        let tcp = matches!(listener.address, Address::Tcp(_));
        for door in self.listeners.iter_mut().filter(|door| door.id == id) {
            let Some(listening) = &door.listening else { continue };
            if listening.inherited {
                continue;
            }
            door.last = listener.options.backlog;
            let set = sockets::change_options(listening.fd.as_fd(), tcp, &listener.options);
            if let Err(error) = set {
                let left = format!("options of listener {} ({error})", listener.name);
                reloaded.needs_restart.push(left);
            }
        }
    }
}
