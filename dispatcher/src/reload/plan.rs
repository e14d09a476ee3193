//! Plans the steps of a reload and opens its sockets before anything changes.

use super::*;

/// Makes sockets again whose files were removed. A socket that cannot be made again stays as it is
/// and is reported.
pub(super) fn make_again(
    now: &RunningConfig,
    listeners: &Steps,
    reloaded: &mut Reloaded,
) -> Vec<(Socket, Listening)> {
    let mut again = Vec::new();
    for (socket, file) in now.files.iter().filter(|(_, file)| file.is_missing()) {
        let (kind, attributes) = match socket {
            Socket::Dispatch => {
                (SocketType::SEQPACKET, SocketAttributes::of(&now.config.dispatch_socket))
            }
            Socket::Admin => (SocketType::STREAM, SocketAttributes::of(&now.config.admin_socket)),
            // Planned with the pools.
            Socket::Line(_) => continue,
            Socket::Listener(id) => {
                let stays = listeners.iter().find(|(step, _, _)| {
                    matches!(step, ListenerStep::Keep(other) | ListenerStep::TakeOver(other) if other == id)
                });
                let Some((_, _, listener)) = stays else { continue };
                let (backlog, mode) = (listener.options.backlog, listener.options.mode);
                (SocketType::STREAM, SocketAttributes { backlog, mode, user: None, group: None })
            }
        };
        let name = format!("socket file {}", file.path.display());
        match bind::listen_again(file, kind, attributes) {
            Ok(listening) => {
                reloaded.added.push(name);
                again.push((*socket, listening));
            }
            Err(error) => reloaded.needs_restart.push(format!("{name} ({error})")),
        }
    }
    again
}

pub(super) fn plan_pools(
    now: &RunningConfig,
    new: &Config,
    reloaded: &mut Reloaded,
) -> (Vec<(PoolStep, Pool)>, Vec<PoolId>) {
    let mut removed = now.pools.clone();
    let mut pools = Vec::with_capacity(new.pools.len());
    for pool in &new.pools {
        let name = &pool.settings.name;
        let mut pool = pool.clone();
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
                if let Some(key) = other_way(old, &pool) {
                    reloaded.needs_restart.push(format!("{key} of pool {name}"));
                    // Where the kernel could not choose, the pool is passed until the restart.
                    let falls_back = pool.steer.take_if(|steer| steer.passes()).is_some();
                    if !falls_back || old.steer.is_some() {
                        pools.push((PoolStep::Keep(id), old.clone()));
                        continue;
                    }
                    pool.settings.steered = false;
                }
                if *old == pool {
                    PoolStep::Keep(id)
                } else {
                    reloaded.changed.push(format!("pool {name}"));
                    PoolStep::Change(id)
                }
            }
        };
        pools.push((step, pool));
    }
    for id in &removed {
        if let Some(pool) = now.config.pools.get(usize::from(id.0)) {
            reloaded.removed.push(format!("pool {}", pool.settings.name));
        }
    }
    (pools, removed)
}

/// The key whose change gives workers their connections in another way: they are other programs.
fn other_way(old: &Pool, new: &Pool) -> Option<&'static str> {
    match (&old.steer, &new.steer) {
        (None, None) => None,
        (Some(old), Some(new)) => (old.ports != new.ports).then_some("ports"),
        (Some(_), None) | (None, Some(_)) => Some("mode"),
    }
}

/// The pool of this name that runs now.
fn pool_now<'a>(now: &'a RunningConfig, name: &str) -> Option<(PoolId, &'a Pool)> {
    now.pools.iter().find_map(|&id| {
        let pool = now.config.pools.get(usize::from(id.0))?;
        (pool.settings.name == name).then_some((id, pool))
    })
}

/// Opens the new sockets of the line protocol, and those whose files were removed.
pub(super) fn plan_lines(
    now: &RunningConfig,
    new: &Config,
) -> Result<Vec<(usize, Listening)>, CommandError> {
    let mut opened = Vec::new();
    for (position, pool) in new.pools.iter().enumerate() {
        let (name, Some(line)) = (&pool.settings.name, &pool.line) else { continue };
        let before = pool_now(now, name);
        let stays = before.is_some_and(|(_, pool)| {
            pool.line.as_ref().is_some_and(|before| before.path == line.path)
        });
        let file = before.filter(|_| stays).and_then(|(id, _)| {
            let is_it = |(socket, _): &&(Socket, SocketFile)| *socket == Socket::Line(id);
            now.files.iter().find(is_it).map(|(_, file)| file)
        });
        let endpoint = line.endpoint();
        let made = match file {
            Some(file) if !file.is_missing() => continue,
            Some(file) => {
                bind::listen_again(file, SocketType::STREAM, SocketAttributes::of(&endpoint))
            }
            None => bind::listen_endpoint(&endpoint, SocketType::STREAM, &mut Inherited::default()),
        };
        let made = made.map_err(|error| {
            refused(format!("line_socket of pool `{name}`: {error}")).hint("nothing was changed")
        })?;
        opened.push((position, made));
    }
    Ok(opened)
}

/// The socket files of the line protocol that stay, and their new permission bits.
pub(super) fn line_modes<'a>(
    now: &'a RunningConfig,
    new: &'a Config,
) -> impl Iterator<Item = (PathBuf, u32)> + 'a {
    new.pools.iter().filter_map(|pool| {
        let line = pool.line.as_ref()?;
        let before = pool_now(now, &pool.settings.name)?.1.line.as_ref()?;
        let changed = before.path == line.path && before.mode != line.mode;
        changed.then(|| (line.path.clone(), line.mode))
    })
}

type Steps = Vec<(ListenerStep, Rules, Listener)>;

pub(super) fn plan_listeners(
    now: &RunningConfig,
    new: &Config,
    reloaded: &mut Reloaded,
) -> Result<(Steps, Vec<ListenerId>), CommandError> {
    shared_ports_stay(now, new)?;
    let mut rest: Vec<(ListenerId, &Listener)> = now
        .listeners
        .iter()
        .filter_map(|id| Some((*id, now.config.listeners.get(usize::from(id.0))?)))
        .collect();
    // By name first: several listeners may have the same address, with port 0.
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
            Some((_, old)) if old.options.bind_only != wanted.options.bind_only => {
                return Err(shared_port(&wanted.name));
            }
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
    // Last, because clients could notice it.
    for (step, _, listener) in &mut steps {
        if let ListenerStep::Open(made) = step {
            let opened = bind_when_free(now, &listener.address, &listener.options);
            *made = opened.map_err(|error| not_opened(now, listener, &error))?;
        }
    }
    Ok((steps, rest.iter().map(|(id, _)| *id).collect()))
}

/// The processes of a pool that share its ports have inherited them: they cannot get others.
fn shared_ports_stay(now: &RunningConfig, new: &Config) -> Result<(), CommandError> {
    let old = now.pools.iter().filter_map(|id| now.config.pools.get(usize::from(id.0)));
    for old in old {
        let Some(wanted) = new.pools.iter().position(|pool| shares_ports(old, pool)) else {
            continue;
        };
        let of_old = |listener: &&Listener| {
            let pool = now.config.pools.get(usize::from(listener.pool));
            pool.is_some_and(|pool| pool.settings.name == old.settings.name)
        };
        let running = now.listeners.iter();
        let running = running.filter_map(|id| now.config.listeners.get(usize::from(id.0)));
        let running: Vec<&Listener> = running.filter(of_old).collect();
        let of_new = |listener: &&Listener| usize::from(listener.pool) == wanted;
        let wanted: Vec<&Listener> = new.listeners.iter().filter(of_new).collect();
        let is_in = |all: &[&Listener], one: &Listener| {
            all.iter().any(|other| other.address == one.address)
        };
        let added = wanted.iter().find(|listener| !is_in(&running, listener));
        let removed = running.iter().find(|listener| !is_in(&wanted, listener));
        if let Some(listener) = added.or(removed) {
            return Err(shared_port(&listener.name));
        }
    }
    Ok(())
}

/// Whether both are the same pool, whose processes inherit its listeners.
fn shares_ports(old: &Pool, new: &Pool) -> bool {
    let shared = |pool: &Pool| pool.steer.as_ref().is_some_and(|it| it.ports == Ports::Shared);
    old.settings.name == new.settings.name && shared(old) && shared(new)
}

fn shared_port(listener: &str) -> CommandError {
    refused(format!(
        "listener `{listener}`: processes inherit the listeners of their pool, so a reload cannot \
         add, remove or move them: nothing was changed"
    ))
    .hint("restart the dispatcher")
}

/// Plans a listener that does not exist yet. Its socket may exist: a removed listener may still
/// have it.
pub(super) fn plan_new(
    now: &RunningConfig,
    wanted: &Listener,
    reloaded: &mut Reloaded,
) -> Result<(ListenerStep, Rules, Listener), CommandError> {
    let rules = new_rules(wanted);
    if let Address::Systemd(name) = &wanted.address {
        return match now.kept.contains(name) {
            true => Ok((ListenerStep::TakeKept(name.clone()), rules, wanted.clone())),
            false => Err(not_inherited(&format!("listener `{}`", wanted.name), name)),
        };
    }
    let there = now.reusable().find(|there| there.address == wanted.address);
    match (&wanted.address, there) {
        (Address::Tcp(_), Some(there)) if !has_any_port(&wanted.address) => {
            let Reusable { listening, options, .. } = &*there;
            if options.bind_only != wanted.options.bind_only {
                return Err(shared_port(&wanted.name));
            }
            let fd = listening.fd.try_clone();
            let fd = fd.map_err(|error| refused(format!("listener `{}`: {error}", wanted.name)))?;
            let (options, fixed) = bind::changeable(options, &wanted.options);
            for option in fixed {
                reloaded.needs_restart.push(format!("{option} of listener {}", wanted.name));
            }
            if let Err(error) = bind::change_options(fd.as_fd(), true, &options) {
                let left = format!("options of listener {} ({error})", wanted.name);
                reloaded.needs_restart.push(left);
            }
            let step = ListenerStep::TakeBack(listening.duplicate(fd));
            Ok((step, rules, Listener { options, ..wanted.clone() }))
        }
        _ => Ok((ListenerStep::Open(Vec::new()), rules, wanted.clone())),
    }
}

/// How long the address of a removed listener may still be in use, and the lock of its socket file.
const ADDRESS_KEPT: Duration = Duration::from_secs(3);
const LOCK_KEPT: Duration = Duration::from_millis(500);

/// Opens an address. Its former owner may be about to release it.
pub(super) fn bind_when_free(
    now: &RunningConfig,
    address: &Address,
    options: &ListenerOptions,
) -> Result<Vec<Listening>, RunError> {
    let began = Instant::now();
    let patience = if now.reusable().next().is_none() { LOCK_KEPT } else { ADDRESS_KEPT };
    loop {
        match bind::listen(address, options, &mut Inherited::default()) {
            Err(error) if error.is_in_use() && began.elapsed() < patience => {
                std::thread::sleep(Duration::from_millis(20));
            }
            outcome => return outcome,
        }
    }
}

/// Plans a listener whose socket exists.
pub(super) fn plan_known(
    now: &RunningConfig,
    new: &Config,
    (id, old): (ListenerId, &Listener),
    wanted: &Listener,
    reloaded: &mut Reloaded,
) -> (ListenerStep, Rules, Listener) {
    let (options, fixed) = match &wanted.address {
        Address::Tcp(_) => bind::changeable(&old.options, &wanted.options),
        // The other options can change at any time, or are set by systemd.
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
    let same_access = !moved && old.access_rules == wanted.access_rules;
    let same_proxy = !moved && old.proxy == wanted.proxy;
    let same_advertise = old.advertise == wanted.advertise;
    if old.options != options || !same_access || !same_proxy || !same_advertise {
        reloaded.changed.push(match old.name == *name {
            true => format!("listener {name}"),
            false => format!("listener {name} (was {})", old.name),
        });
    }
    let step = if moved { ListenerStep::TakeOver(id) } else { ListenerStep::Keep(id) };
    let rules = Rules {
        access: (!same_access).then(|| access_control(wanted)),
        proxy: (!same_proxy).then(|| proxy_control(wanted)),
    };
    (step, rules, Listener { options, ..wanted.clone() })
}

pub(super) fn new_rules(listener: &Listener) -> Rules {
    Rules { access: Some(access_control(listener)), proxy: Some(proxy_control(listener)) }
}

fn access_control(listener: &Listener) -> Option<Box<AccessControl>> {
    AccessControl::new(listener.access_rules.clone(), seed())
}

fn proxy_control(listener: &Listener) -> Option<Box<ProxyControl>> {
    listener.proxy.clone().map(ProxyControl::new)
}

/// The socket file of a listener that stays, and its new permission bits if they change.
pub(super) fn new_mode(
    now: &RunningConfig,
    step: &ListenerStep,
    listener: &Listener,
) -> Option<(PathBuf, u32)> {
    let (ListenerStep::Keep(id) | ListenerStep::TakeOver(id)) = step else { return None };
    let (Address::Unix(path), mode) = (&listener.address, listener.options.mode) else {
        return None;
    };
    let old = now.config.listeners.get(usize::from(id.0))?;
    (old.options.mode != mode).then(|| (path.clone(), mode))
}

pub(super) fn not_inherited(what: &str, name: &str) -> CommandError {
    let message = format!(
        "{what}: systemd:{name} is new, and systemd passes sockets only when it starts a service: \
         nothing was changed"
    );
    refused(message).hint("restart the dispatcher; connections that workers have stay open")
}

fn not_opened(now: &RunningConfig, listener: &Listener, error: &RunError) -> CommandError {
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

/// Which listener of the dispatcher has an address.
pub(super) fn own_listener(now: &RunningConfig, wanted: std::net::SocketAddr) -> Option<String> {
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
    let advice = now.config.advice.listen.filter(overlaps);
    let pools = now.pools.iter().filter_map(|id| now.config.pools.get(usize::from(id.0)));
    let agents = pools.filter_map(|pool| match &pool.agent_listen {
        Some(Address::Tcp(address)) if overlaps(address) => {
            Some(format!("the agent of pool `{}`", pool.settings.name))
        }
        _ => None,
    });
    own.chain(admin).chain(agents).chain(advice.map(|_| "`advice_listen`".to_owned())).next()
}

pub(super) fn has_any_port(address: &Address) -> bool {
    matches!(address, Address::Tcp(address) if address.port() == 0)
}
