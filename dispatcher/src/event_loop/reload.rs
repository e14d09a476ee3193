//! Carries out a prepared reload in one turn of the hot thread. It fails only if the plan is out of
//! date.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use dispatcher_core::{ListenerId, ListenerSettings, PoolId};

use super::handshake::HandshakeCommand;
use super::listeners::{ListenerIo, ListenerResources};
use super::{EventLoop, PoolResources};
use crate::api::command::{CommandError, Problem};
use crate::api::reload::Reloaded;
use crate::background::logger::value;
use crate::config::{Address, Config, Listener, Pool};
use crate::listen::bind::{self, Listening};
use crate::listen::files::SocketFile;
use crate::reload::{ListenerStep, Plan, PoolStep, RunningConfig, Socket, seed};

impl EventLoop {
    /// The running configuration, for [`crate::reload::prepare`].
    pub(in crate::event_loop) fn running(&self) -> RunningConfig {
        let pools = (0u16..).map(PoolId).take(self.pools.len());
        let resources = pools.clone().zip(&self.pools);
        let configured = resources
            .filter_map(|(id, rest)| Some(rest.with(self.core.pool_settings(id)?.clone())))
            .collect();
        let ids = (0u16..).map(ListenerId);
        let listeners = ids.zip(&self.listeners.resources).filter_map(|(id, rest)| {
            Some(rest.with(self.core.listener_name(id), self.core.pool_of_listener(id)?))
        });
        RunningConfig {
            generation: self.run.generation,
            config: Config {
                pools: configured,
                listeners: listeners.collect(),
                ..self.config.clone()
            },
            pools: pools.filter(|&id| !self.core.is_pool_retired(id)).collect(),
            listeners: self.core.listeners().collect(),
            files: self.socket_files(),
            kept: self.kept_names(),
            reusable: self.reusable(),
        }
    }

    /// Gives the side thread its copy of what is running now.
    pub(in crate::event_loop) fn publish_running(&self) {
        let running = std::sync::Arc::new(self.running());
        self.side.running.send_replace(Some(running));
    }

    /// The socket files of the dispatcher and of the listeners that are not removed.
    fn socket_files(&self) -> Vec<(Socket, SocketFile)> {
        let dispatch =
            self.endpoints.dispatch_path.iter().map(|path| (Socket::Dispatch, path.file()));
        let admin = self.endpoints.admin_path.iter().map(|path| (Socket::Admin, path.file()));
        // The file of a listener that is being removed may be missing.
        let current = |listener: &&ListenerIo| {
            !listener.is_retiring() && !self.core.is_listener_retired(listener.id)
        };
        let listeners = self.listeners.sockets.iter().filter(current).filter_map(|listener| {
            Some((Socket::Listener(listener.id), listener.listening.as_ref()?.file()?))
        });
        let lines =
            self.lines.sockets.iter().filter_map(|socket| {
                Some((Socket::Line(socket.pool), socket.path.as_ref()?.file()))
            });
        dispatch.chain(admin).chain(listeners).chain(lines).collect()
    }

    /// Passes the socket files to the side thread, which watches them.
    pub(in crate::event_loop) fn watch_socket_files(&self) {
        let named = |(socket, file)| {
            let name = match socket {
                Socket::Dispatch => "dispatch_socket".to_owned(),
                Socket::Admin => "admin_socket".to_owned(),
                Socket::Listener(id) => format!("listener {}", self.core.listener_name(id)),
                Socket::Line(id) => format!("line_socket of pool {}", self.core.pool_name(id)),
            };
            (name, file)
        };
        self.side.files.set(self.socket_files().into_iter().map(named).collect());
    }

    /// Replaces sockets whose files were removed by the new ones.
    fn put_again(&mut self, again: Vec<(Socket, Listening)>) {
        for (socket, listening) in again {
            let old = match socket {
                Socket::Dispatch => {
                    let (fd, _, path) = listening.into_parts();
                    let offered = self.take_over.shared.dispatch.is_some();
                    self.take_over.shared.dispatch = fd.try_clone().ok().filter(|_| offered);
                    self.handshakes.send(HandshakeCommand::Listen(fd));
                    std::mem::replace(&mut self.endpoints.dispatch_path, path)
                }
                Socket::Admin => {
                    // The side thread has a copy.
                    let (fd, _, path) = listening.into_parts();
                    let offered = self.take_over.shared.admin.is_some();
                    self.take_over.shared.admin = offered.then_some(fd);
                    std::mem::replace(&mut self.endpoints.admin_path, path)
                }
                Socket::Listener(id) => {
                    let resources = self.listeners.resources(id);
                    let backlog = resources.map_or(0, |resources| resources.options.backlog);
                    for listener in self.listeners.of_mut(id) {
                        listener.retire();
                    }
                    self.open(id, listening, backlog);
                    None
                }
                // Part of the plan's `lines`.
                Socket::Line(_) => None,
            };
            // A file system may be slow.
            if let Some(old) = old {
                self.background.cleaner.clean(old);
            }
        }
    }

    /// Puts a prepared configuration into force.
    pub(in crate::event_loop) fn reload(&mut self, plan: Plan) -> Result<Reloaded, CommandError> {
        if self.run.stop_deadline.is_some() {
            return Err(CommandError::new(Problem::Conflict, "the dispatcher is stopping"));
        }
        if self.background.cleaner.is_full() {
            let message = "the objects that earlier reloads removed are still being freed";
            return Err(CommandError::new(Problem::Unavailable, message).hint("try again"));
        }
        if plan.generation != self.run.generation {
            let message = "another reload was carried out meanwhile: nothing was changed";
            return Err(CommandError::new(Problem::Conflict, message).hint("try again"));
        }
        self.run.generation += 1;
        // Performs earlier decisions before names and ids change.
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
            if let Some(access_control) = rules.access {
                self.core.set_access_control(id, access_control);
            }
            if let Some(control) = rules.proxy {
                self.core.set_proxy_control(id, control);
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
        self.background.closers.set_bounds(crate::event_loop::start::bounds(&plan.limits));
        self.config.limits = plan.limits;
        let names = self.core.pool_names().filter_map(|name| self.core.pool_named(name));
        let pools = names.filter_map(|id| self.core.pool_settings(id));
        let settings = EventLoop::handshake_settings(&self.config.limits, pools);
        self.handshakes.send(HandshakeCommand::Settings(settings));
        self.config.admin_http_hosts = plan.admin_http_hosts;
        self.config.advice = plan.advice;
        self.put_agents(plan.agents);
        let lines = plan.lines.into_iter();
        let lines = lines.filter_map(|(at, made)| Some((ids.get(at).copied()?, made))).collect();
        if let Err(error) = self.serve_lines(lines, false) {
            reloaded.needs_restart.push(format!("line_socket ({error})"));
        }
        self.change_steered();
        if let Err(error) = self.serve_steered(&[]) {
            reloaded.needs_restart.push(format!("mode of new pools ({error})"));
        }
        self.watch_socket_files();
        self.publish_running();
        Ok(reloaded)
    }

    fn put_pool(&mut self, step: PoolStep, pool: Pool, reloaded: &mut Reloaded) -> PoolId {
        match step {
            PoolStep::Keep(id) => {
                let wanted = pool.settings.processes;
                let now = self.core.pool_settings(id).map_or(wanted, |settings| settings.processes);
                if now != wanted {
                    // An operator has scaled the pool meanwhile.
                    self.core.scale(self.now, id, wanted);
                    reloaded.changed.push(format!("pool {}", pool.settings.name));
                }
                id
            }
            PoolStep::Change(id) => {
                let (settings, resources) = PoolResources::split(pool);
                let name = settings.name.clone();
                let mut renewed = false;
                if let Some(entry) = self.pools.get_mut(usize::from(id.0)) {
                    let (old, new) = (entry.spawn.as_ref(), resources.spawn.as_ref());
                    renewed = new.is_some_and(|new| !old.is_some_and(|old| old.starts_like(new)));
                    *entry = resources;
                }
                if renewed && self.renew_version(id) {
                    reloaded.outdated_pools.push(name);
                }
                self.core.change_pool(self.now, id, settings, seed());
                self.workers.replace_gauges(&self.core, id);
                id
            }
            PoolStep::Add => {
                let (settings, resources) = PoolResources::split(pool);
                let restored = (0u16..).map(PoolId).take(self.pools.len()).find(|&id| {
                    self.core.is_pool_retired(id) && self.core.pool_name(id) == settings.name
                });
                // Before the pool wants processes.
                let renewed = restored.zip(resources.spawn.clone()).and_then(|(id, spawn)| {
                    self.renew_restored(id, &spawn).map(|generation| (generation, spawn))
                });
                let id = self.core.add_pool(self.now, settings, seed());
                match self.pools.get_mut(usize::from(id.0)) {
                    Some(entry) => {
                        if restored.is_none() {
                            // The entry belonged to another pool. Tokens of that pool's processes
                            // must not be valid for this one.
                            self.workers.tokens.retain(|_, process| process.pool != id);
                        }
                        *entry = resources;
                    }
                    None => self.pools.push(resources),
                }
                let spawn = self.pools.get(usize::from(id.0)).and_then(|it| it.spawn.as_ref());
                if restored.is_none() {
                    self.rolls.add(id, self.core.generation(id), spawn);
                } else if let Some((generation, spawn)) = renewed {
                    self.roll_renewed(id, generation, spawn);
                }
                self.workers.replace_gauges(&self.core, id);
                id
            }
        }
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
                let had = self.listeners.resources(old);
                let options = had.map_or_else(|| listener.options.clone(), |it| it.options.clone());
                let as_it_is = Listener { options, ..listener.clone() };
                let id = self.add_listener(&as_it_is, self.addresses_of(old));
                for listener in self.listeners.of_mut(old) {
                    listener.id = id;
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
        let (.., resources) = ListenerResources::split(listener);
        if let Some(entry) = self.listeners.resources.get_mut(usize::from(id.0)) {
            let before = std::mem::replace(entry, resources);
            self.set_options(id, &before, reloaded);
        }
        id
    }

    /// Adds a listener to the tables; its sockets follow.
    fn add_listener(&mut self, listener: &Listener, address: String) -> ListenerId {
        let (name, pool, resources) = ListenerResources::split(listener.clone());
        let id = self.core.add_listener(ListenerSettings { name, address, pool });
        match self.listeners.resources.get_mut(usize::from(id.0)) {
            Some(entry) => *entry = resources,
            None => self.listeners.resources.push(resources),
        }
        id
    }

    fn addresses_of(&self, id: ListenerId) -> String {
        let listening = self.listeners.of(id).filter_map(|listener| listener.listening.as_ref());
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
        self.listeners.add(id, listening, backlog);
    }

    /// Changes the options of sockets that stay. An option that the kernel refuses stays as it was.
    fn set_options(&mut self, id: ListenerId, before: &ListenerResources, reloaded: &mut Reloaded) {
        let Some(resources) = self.listeners.resources(id) else { return };
        if before.options == resources.options {
            return;
        }
        let tcp = matches!(resources.address, Address::Tcp(_));
        let options = resources.options.clone();
        for io in self.listeners.of_mut(id) {
            let Some(listening) = &io.listening else { continue };
            if listening.inherited {
                continue;
            }
            io.last = options.backlog;
            let set = bind::change_options(listening.fd.as_fd(), tcp, &options);
            if let Err(error) = set {
                let left = format!("options of listener {} ({error})", self.core.listener_name(id));
                reloaded.needs_restart.push(left);
            }
        }
    }
}
