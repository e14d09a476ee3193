//! Replaces the configuration of a running dispatcher, in two steps.
//!
//! [`prepare`] runs on the side thread: it reads the file, compares it with the side thread's copy
//! of the running configuration, and binds new sockets. Everything that can fail happens there,
//! before anything has changed. `EventLoop::reload` then puts the result into force in one turn of
//! the hot thread, without waiting.
//!
//! The event loop's tables of pools and listeners are by id, like the core's: removed entries stay
//! until the core uses their ids again.

mod agents;
mod fixed;
mod plan;

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::net::SocketType;

use self::agents::plan_agents;
pub(crate) use self::agents::{AgentPlan, AgentStep};
use self::fixed::fixed;
use self::plan::{line_modes, make_again, new_mode, plan_lines, plan_listeners, plan_pools};
use crate::api::command::{CommandError, Problem};
use crate::api::reload::Reloaded;
use crate::config::{
    Address, AdviceSettings, Config, ConfigError, Limits, Listener, ListenerOptions, Pool, Ports,
};
use crate::listen::bind::{self, Listening, SocketAttributes};
use crate::listen::error::RunError;
use crate::listen::files::SocketFile;
use crate::listen::inherit::Inherited;
use dispatcher_core::{AccessControl, ListenerId, PoolId, ProxyControl};

/// The side thread's copy of the running configuration. The event loop replaces it at the start and
/// in each reload, so a reload needs no request before its plan.
#[derive(Debug)]
pub struct RunningConfig {
    /// The number of reloads so far: a plan is valid for exactly this number.
    pub(crate) generation: u64,
    /// Pools and listeners by id.
    pub(crate) config: Config,
    /// The socket files of the dispatcher and of the listeners that are not removed.
    pub(crate) files: Vec<(Socket, SocketFile)>,
    /// The pools that are not removed.
    pub(crate) pools: Vec<PoolId>,
    pub(crate) listeners: Vec<ListenerId>,
    /// Sockets without a listener that a service manager keeps open, by name.
    pub(crate) kept: Vec<String>,
    /// Sockets of removed listeners. The event loop drops an entry when it closes the socket.
    pub(crate) reusable: Vec<Weak<Reusable>>,
}

impl RunningConfig {
    /// The sockets of removed listeners that are still open.
    fn reusable(&self) -> impl Iterator<Item = Arc<Reusable>> + '_ {
        self.reusable.iter().filter_map(Weak::upgrade)
    }
}

/// The purpose of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Socket {
    Dispatch,
    Admin,
    Listener(ListenerId),
    Line(PoolId),
}

/// The socket of a removed listener, which a reload may use again.
#[derive(Debug)]
pub(crate) struct Reusable {
    /// The configured address.
    pub(crate) address: Address,
    pub(crate) options: ListenerOptions,
    /// A duplicate: it stays valid while a plan is prepared, even if the event loop closes the
    /// socket meanwhile.
    pub(crate) listening: Listening,
}

/// A reload that is ready to be carried out.
#[derive(Debug)]
pub struct Plan {
    pub(crate) generation: u64,
    /// Sockets made again because their files were removed.
    pub(crate) again: Vec<(Socket, Listening)>,
    /// The admin socket among them: the side thread serves it.
    pub(crate) admin: Option<UnixListener>,
    pub(crate) pools: Vec<(PoolStep, Pool)>,
    /// New sockets of the line protocol, by the position of the pool.
    pub(crate) lines: Vec<(usize, Listening)>,
    pub(crate) listeners: Vec<(ListenerStep, Rules, Listener)>,
    pub(crate) removed_pools: Vec<PoolId>,
    pub(crate) removed_listeners: Vec<ListenerId>,
    pub(crate) limits: Limits,
    pub(crate) admin_http_hosts: Vec<String>,
    pub(crate) advice: AdviceSettings,
    pub(crate) agents: Vec<AgentPlan>,
    pub(crate) modes: Vec<(PathBuf, u32)>,
    pub(crate) reloaded: Reloaded,
}

#[derive(Debug)]
pub(crate) enum PoolStep {
    Keep(PoolId),
    Change(PoolId),
    Add,
}

#[derive(Debug)]
pub(crate) enum ListenerStep {
    /// The same listener, perhaps with other options or rules.
    Keep(ListenerId),
    /// The socket of this listener, under another name or for another pool.
    TakeOver(ListenerId),
    /// A new listener.
    Open(Vec<Listening>),
    /// A new listener with the socket of a listener that is being removed.
    TakeBack(Listening),
    /// A new listener with the sockets of this name that a service manager passed and no listener
    /// uses.
    TakeKept(String),
}

/// The rules of a listener about its clients, where they are new; what is known of clients by other
/// rules stays. Making their tables may take long.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) access: Option<Option<Box<AccessControl>>>,
    pub(crate) proxy: Option<Option<Box<ProxyControl>>>,
}

impl Plan {
    /// The tables of the new configuration's pools whose processes serve on without the dispatcher.
    pub fn serving_pools(&self) -> Vec<String> {
        self.pools
            .iter()
            .filter(|(_, pool)| pool.serves_without_dispatcher())
            .map(|(_, pool)| format!("[pool.{}.spawn]", pool.settings.name))
            .collect()
    }

    /// The changes that this plan makes.
    pub fn reloaded(&self) -> &Reloaded {
        &self.reloaded
    }

    /// Permission bits of socket files to change. The side thread does it: a file system may be
    /// slow.
    pub fn take_modes(&mut self) -> Vec<(PathBuf, u32)> {
        std::mem::take(&mut self.modes)
    }

    /// The admin socket, if it was made again. The side thread serves it.
    pub fn take_admin(&mut self) -> Option<UnixListener> {
        self.admin.take()
    }

    /// The host names under which the admin interface may be requested over TCP, for the side
    /// thread.
    pub fn admin_http_hosts(&self) -> &[String] {
        &self.admin_http_hosts
    }

    /// The log level, for the side thread.
    pub fn log_level(&self) -> log::LevelFilter {
        self.limits.log_level
    }
}

fn refused(message: impl Into<String>) -> CommandError {
    CommandError::new(Problem::Config, message)
}

/// Reads the configuration again and prepares everything. May block; changes nothing.
///
/// # Errors
///
/// When the file has a mistake, or a resource is not available.
pub fn prepare(now: &RunningConfig) -> Result<Plan, CommandError> {
    let Some(file) = &now.config.file else {
        return Err(CommandError::new(
            Problem::Conflict,
            "this dispatcher has no configuration file",
        )
        .hint("`dispatcher serve --print-config` prints one for `dispatcher run`"));
    };
    let new = Config::load(file).map_err(|error| match &error {
        ConfigError::Unreadable { .. } => {
            refused(error.to_string()).hint("nothing was changed; the file must stay where it was")
        }
        ConfigError::Invalid { .. } => refused(error.to_string()),
    })?;
    plan(now, new)
}

fn plan(now: &RunningConfig, new: Config) -> Result<Plan, CommandError> {
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
            "too many removed pools and listeners are still in use: nothing was changed",
        )
        .hint("restart the dispatcher; connections that workers have stay open"));
    }
    let (pools, removed_pools) = plan_pools(now, &new, &mut reloaded);
    let (listeners, removed_listeners) = plan_listeners(now, &new, &mut reloaded)?;
    let agents = plan_agents(now, &new)?;
    let lines = plan_lines(now, &new)?;
    let line_modes: Vec<(PathBuf, u32)> = line_modes(now, &new).collect();
    if now.config.limits != new.limits {
        reloaded.changed.push("limits".to_owned());
    }
    if now.config.admin_http_hosts != new.admin_http_hosts {
        reloaded.changed.push("admin_http_hosts".to_owned());
    }
    // The socket stays as it is.
    let advice = AdviceSettings { listen: now.config.advice.listen, ..new.advice };
    if now.config.advice != advice {
        reloaded.changed.push("advice".to_owned());
    }
    let again = make_again(now, &listeners, &mut reloaded);
    let admin = again.iter().find(|(socket, _)| *socket == Socket::Admin);
    let admin = match admin.map(|(_, listening)| listening.fd.try_clone()) {
        None => None,
        Some(Ok(fd)) => Some(fd.into()),
        Some(Err(error)) => return Err(refused(format!("admin_socket: {error}"))),
    };
    let modes = listeners.iter().filter_map(|(step, _, listener)| new_mode(now, step, listener));
    let modes = modes.chain(line_modes);
    Ok(Plan {
        generation: now.generation,
        again,
        admin,
        pools,
        lines,
        modes: modes.collect(),
        listeners,
        removed_pools,
        removed_listeners,
        limits: new.limits,
        admin_http_hosts: new.admin_http_hosts,
        advice,
        agents,
        reloaded,
    })
}

/// A random seed: dispatchers that start at the same time must not all choose the same workers.
pub(crate) fn seed() -> u64 {
    let mut bytes = [0; 8];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(_) => u64::from_ne_bytes(bytes),
        // The time makes the seed different.
        Err(_) => {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            now.tv_nsec.unsigned_abs()
        }
    }
}
