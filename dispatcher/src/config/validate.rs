//! Turns the parsed file into settings: applies defaults, resolves names, and checks across keys.

use std::net::SocketAddr;

use toml::Spanned;

use super::address::{check_distinct, check_distinct_http, same_path, same_source, unix_source};
use super::error::{ConfigError, Mistake, Source, Warning};
use super::file::{File, ListenerKeys, PoolKeys};
use super::listener::set_in_unit;
use super::value::{AMode, AnAccount, Either, TextOrNumber};
use super::{
    Address, Config, DEFAULT_ADMIN_SOCKET, DEFAULT_DISPATCH_SOCKET, Limits, Listener, Pool,
    UnixEndpoint, UnixSource, accounts, advice, affinity, agent, line, relay, scores, spawn, steer,
};
use dispatcher_core::{AllowedAccounts, Peek, PoolSettings};

pub(super) type Checked<T> = Result<T, Mistake>;

/// The configuration, or every mistake in it: the mistakes `found` before and those found here.
pub(super) fn validate(
    file: File,
    found: Vec<Mistake>,
    source: &Source<'_>,
) -> Result<Config, ConfigError> {
    let incomplete = !found.is_empty();
    let mut check =
        Check { source, incomplete, mistakes: found, warnings: Vec::new(), proxied: Vec::new() };
    let config = check.config(file);
    check.warnings.sort_by_key(|warning| (warning.0.line, warning.0.column));
    match config {
        Some(config) if check.mistakes.is_empty() => {
            Ok(Config { warnings: check.warnings, ..config })
        }
        Some(_) | None => Err(source.errors(check.mistakes, check.warnings)),
    }
}

/// The two sockets must differ.
fn check_sockets(file: &File, dispatch: &UnixEndpoint, admin: &UnixEndpoint) -> Checked<()> {
    if !same_source(&dispatch.source, &admin.source) {
        return Ok(());
    }
    let spans = [&file.admin_socket, &file.dispatch_socket];
    let span = spans.into_iter().flatten().map(Spanned::span).next();
    Err(Mistake::new(span.unwrap_or(0..0), "`admin_socket` and `dispatch_socket` are the same")
        .help("use a different path for each"))
}

/// A listener must not use one of the two sockets.
fn check_endpoints(
    listener: &Listener,
    keys: &ListenerKeys,
    dispatch: &UnixEndpoint,
    admin: &UnixEndpoint,
) -> Checked<()> {
    for (endpoint, key) in [(&dispatch.source, "dispatch_socket"), (&admin.source, "admin_socket")]
    {
        let same = match (&listener.address, endpoint) {
            (Address::Unix(a), UnixSource::Path(b)) => same_path(a, b),
            (Address::Systemd(a), UnixSource::Systemd(b)) => a == b,
            (Address::Unix(_) | Address::Systemd(_) | Address::Tcp(_), _) => false,
        };
        if same {
            let message = format!("this is `{key}` already");
            return Err(Mistake::new(keys.address.span(), message));
        }
    }
    Ok(())
}

impl Check<'_> {
    /// Checks the whole file; `None` if too little of it is left after mistakes.
    fn config(&mut self, file: File) -> Option<Config> {
        let check = self;
        let dispatch_socket = check.endpoint(
            &file.dispatch_socket,
            "dispatch_socket",
            DEFAULT_DISPATCH_SOCKET,
            (&file.dispatch_socket_mode, 0o666),
            &file.dispatch_socket_user,
            &file.dispatch_socket_group,
        );
        let admin_socket = check.endpoint(
            &file.admin_socket,
            "admin_socket",
            DEFAULT_ADMIN_SOCKET,
            (&file.admin_socket_mode, 0o600),
            &file.admin_socket_user,
            &file.admin_socket_group,
        );
        let admin_http = admin_http(check, &file);
        let admin_http = check.keep(admin_http).flatten();
        let admin_http_hosts = admin_http_hosts(check, &file);
        check.keep(check_sockets(&file, &dispatch_socket, &admin_socket));
        let advice = advice::advice(check, &file);
        check.keep(advice::check_http(&file, admin_http, advice.listen));
        let relay = relay::relay(check, &file, &dispatch_socket);
        let limits = limits(&file);
        let steer_pins = steer::pins(check, file.steer_pins.as_ref());
        let defaults = file.defaults.unwrap_or_default();
        agent::check_defaults(check, &defaults);
        line::check_defaults(check, &defaults);
        steer::check_defaults(check, &defaults);

        // serde sorts tables by name; messages and pools follow the order of the file.
        let mut tables: Vec<(Spanned<String>, PoolKeys)> = file.pool.into_iter().collect();
        tables.sort_by_key(|(name, _)| name.span().start);
        if tables.is_empty() {
            check.mistake(
                Mistake::absence(0..0, "no pool is configured")
                    .help("add a table [pool.web] and name that pool in a [[listener]]"),
            );
        }
        let proxied = file
            .listener
            .iter()
            .map(Spanned::get_ref)
            .filter(|keys| keys.proxy_protocol.as_ref().is_some_and(|on| *on.get_ref()));
        check.proxied = proxied.map(|keys| keys.pool.get_ref().clone()).collect();
        let mut pools = Vec::with_capacity(tables.len());
        for (name, keys) in &tables {
            check.keep(check_name(name, "pool"));
            if name.get_ref().contains('/') {
                check.mistake(
                    Mistake::new(name.span(), "a pool cannot have a slash in its name")
                        .help("workers are named POOL/NAME, so a slash would be ambiguous"),
                );
            }
            pools.push(check.pool(
                name.get_ref(),
                keys.clone(),
                &defaults,
                (&dispatch_socket, limits.stop_timeout),
            ));
        }
        relay::tell_processes(&relay, &mut pools);
        if pools.len() > usize::from(u16::MAX) {
            check.mistake(Mistake::new(0..0, "more than 65535 pools"));
            return None;
        }

        // A missing pool is reported first.
        if file.listener.is_empty() && !tables.is_empty() {
            check.mistake(
                Mistake::absence(0..0, "no listener is configured")
                    .help("add a table [[listener]] with `name`, `address` and `pool`"),
            );
        }
        let mut listeners = Vec::with_capacity(file.listener.len());
        for keys in &file.listener {
            let keys = keys.get_ref();
            let Some(listener) = check.listener(keys, &pools) else { continue };
            check.keep(check_distinct(&listener, keys, &listeners));
            for (key, http) in [("admin_http", admin_http), ("advice_listen", advice.listen)] {
                check.keep(check_distinct_http((key, http), &listener, keys));
            }
            check.keep(check_endpoints(&listener, keys, &dispatch_socket, &admin_socket));
            listeners.push(listener);
        }
        if listeners.len() > usize::from(u16::MAX) {
            check.mistake(Mistake::new(0..0, "more than 65535 listeners"));
        }
        let agents = tables.iter().zip(&pools).filter_map(|((name, keys), pool)| {
            let (text, address) = (keys.agent_listen.as_ref()?, pool.agent_listen.clone()?);
            Some((name.get_ref().as_str(), text, address))
        });
        let agents: Vec<_> = agents.collect();
        let http = [("admin_http", admin_http), ("advice_listen", advice.listen)];
        agent::check_distinct(check, &agents, &listeners, http);
        advice::check_advertised(check, &advice, &listeners, &file.listener);
        for (name, _) in &tables {
            let used =
                file.listener.iter().any(|keys| keys.get_ref().pool.get_ref() == name.get_ref());
            // A listener with mistakes may be the one that uses the pool.
            if !used && check.mistakes.is_empty() {
                check.warn(
                    Mistake::new(
                        name.span(),
                        format!("no listener sends connections to pool `{}`", name.get_ref()),
                    )
                    .help("name it in a [[listener]], or remove it"),
                );
            }
        }
        let mut config = Config {
            file: None,
            dispatch_socket,
            admin_socket,
            admin_http,
            admin_http_hosts,
            advice,
            relay,
            listeners,
            pools,
            limits,
            steer_pins,
            warnings: Vec::new(),
        };
        line::check_lines(check, &config, &defaults, &tables);
        steer::check_steered(check, &mut config, (&tables, &defaults), &file.listener);
        Some(config)
    }
}

fn admin_http(check: &mut Check<'_>, file: &File) -> Checked<Option<SocketAddr>> {
    let allow_remote = file.admin_http_allow_remote.as_ref();
    let Some(text) = &file.admin_http else {
        if let Some(useless) = allow_remote {
            check.warn(Mistake::new(useless.span(), "this has no effect without `admin_http`"));
        }
        return Ok(None);
    };
    let address: SocketAddr = text.get_ref().parse().map_err(|_| {
        Mistake::new(text.span(), "not an address and a port")
            .help("write \"127.0.0.1:9900\" or \"[::1]:9900\"")
    })?;
    if !address.ip().to_canonical().is_loopback()
        && !allow_remote.is_some_and(|flag| *flag.get_ref())
    {
        return Err(Mistake::new(text.span(), "other machines could read the admin interface")
            .help("write \"127.0.0.1:PORT\", or set admin_http_allow_remote = true to allow it"));
    }
    Ok(Some(address))
}

/// Names in the form of a `Host` header, without a port.
fn admin_http_hosts(check: &mut Check<'_>, file: &File) -> Vec<String> {
    let Some(list) = &file.admin_http_hosts else { return Vec::new() };
    if file.admin_http.is_none() {
        check.warn(Mistake::new(list.span(), "this has no effect without `admin_http`"));
    }
    let mut hosts = Vec::with_capacity(list.get_ref().len());
    for host in list.get_ref() {
        let name = host.get_ref().strip_suffix('.').unwrap_or(host.get_ref());
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        if name.len() > 253 || !name.split('.').all(label) {
            check.mistake(Mistake::new(host.span(), "not a host name").help(
                "write it as browsers send it, without a scheme or a port: \"status.example.org\"",
            ));
        }
        hosts.push(name.to_ascii_lowercase());
    }
    hosts
}

fn limits(file: &File) -> Limits {
    let default = Limits::default();
    Limits {
        accept_batch: file.accept_batch.map_or(default.accept_batch, |n| n.0),
        hello_timeout: file.hello_timeout.map_or(default.hello_timeout, |w| w.0),
        max_pending_hellos: file.max_pending_hellos.map_or(default.max_pending_hellos, |n| n.0),
        stop_timeout: file.stop_timeout.map_or(default.stop_timeout, |w| w.0),
        resource_pause: file.resource_pause.map_or(default.resource_pause, |w| w.0),
        busy_poll: file.busy_poll.map_or(default.busy_poll, |w| w.0),
        fault_history: file.fault_history.map_or(default.fault_history, |n| n.0),
        log_level: file.log_level.map_or(default.log_level, Into::into),
        metrics_max_workers: file.metrics_max_workers.map_or(default.metrics_max_workers, |n| n.0),
        relay_ticket_key: file.relay_ticket_key.clone(),
        max_handshakes: file.max_handshakes.map_or(default.max_handshakes, |n| n.0),
        connect_rate: file.connect_rate.map_or(default.connect_rate, |n| n.0),
        join_rate: file.join_rate.map_or(default.join_rate, |n| n.0),
        join_burst: file.join_burst.map_or(default.join_burst, |n| n.0),
        admin_rate: file.admin_rate.map_or(default.admin_rate, |n| n.0),
        closing_threads: file.closing_threads.map_or(default.closing_threads, |n| n.0),
        max_closing: file.max_closing.map_or(default.max_closing, |n| n.0),
    }
}

/// Names appear in logs, environment variables and the protocol, so they must not contain special
/// characters.
pub(super) fn check_name(name: &Spanned<String>, what: &str) -> Checked<()> {
    let bytes = name.get_ref().as_bytes();
    let good = (1..=dispatch_protocol::wire::MAX_NAME).contains(&bytes.len())
        && bytes.iter().all(u8::is_ascii_graphic);
    if good {
        return Ok(());
    }
    Err(Mistake::new(name.span(), format!("not a valid name for a {what}"))
        .help("a name is 1 to 64 printable ASCII characters, without spaces"))
}

/// The state of a check: the text, mistakes and warnings.
pub(super) struct Check<'a> {
    source: &'a Source<'a>,
    /// Parts of the file with mistakes were removed when it was read.
    incomplete: bool,
    mistakes: Vec<Mistake>,
    warnings: Vec<Warning>,
    /// The pools whose listeners have `proxy_protocol`.
    proxied: Vec<String>,
}

impl Check<'_> {
    pub(super) fn mistake(&mut self, mistake: Mistake) {
        if !(mistake.absence && self.incomplete) {
            self.mistakes.push(mistake);
        }
    }

    /// The value, or `None` after recording a mistake, so that the check continues.
    pub(super) fn keep<T>(&mut self, checked: Checked<T>) -> Option<T> {
        checked.map_err(|mistake| self.mistake(mistake)).ok()
    }

    pub(super) fn warn(&mut self, mistake: Mistake) {
        let warning = self.source.warning(mistake);
        // A default is checked once for every pool but reported once.
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    fn endpoint(
        &mut self,
        text: &Option<Spanned<String>>,
        key: &str,
        default: &str,
        (mode, default_mode): (&Option<Spanned<Either<AMode>>>, u32),
        user: &Option<Spanned<Either<AnAccount>>>,
        group: &Option<Spanned<Either<AnAccount>>>,
    ) -> UnixEndpoint {
        let source = self.keep(unix_source(text.clone(), default, key));
        // The default could cause a second mistake.
        let source = source.unwrap_or_else(|| UnixSource::Systemd(key.to_owned()));
        if let UnixSource::Systemd(_) = source {
            let spans = [
                mode.as_ref().map(Spanned::span),
                user.as_ref().map(Spanned::span),
                group.as_ref().map(Spanned::span),
            ];
            for (span, option) in spans.into_iter().zip(["mode", "user", "group"]) {
                let Some(span) = span else { continue };
                let there = match option {
                    "mode" => "SocketMode=",
                    "user" => "SocketUser=",
                    _ => "SocketGroup=",
                };
                let message =
                    format!("`{key}_{option}` has no effect on a socket created by systemd");
                self.warn(Mistake::new(span, message).help(set_in_unit(there)));
            }
        }
        let mode = self.mode(mode, default_mode);
        UnixEndpoint {
            source,
            mode: self.keep(mode).unwrap_or(default_mode),
            user: self.account(user.as_ref(), accounts::Kind::User),
            group: self.account(group.as_ref(), accounts::Kind::Group),
        }
    }

    /// The marked part of the file.
    pub(super) fn slice(&self, span: &std::ops::Range<usize>) -> &str {
        self.source.slice(span)
    }

    pub(super) fn mode(&self, mode: &Option<Spanned<Either<AMode>>>, default: u32) -> Checked<u32> {
        let Some(mode) = mode else {
            return Ok(default);
        };
        self.octal(mode, "\"0660\": owner and group may connect")
    }

    /// Permission bits; `example` is for hints.
    pub(super) fn octal<W>(&self, mode: &Spanned<Either<W>>, example: &str) -> Checked<u32> {
        let bits = match &mode.get_ref().0 {
            TextOrNumber::Text(text) => {
                let digits = text.strip_prefix("0o").unwrap_or(text);
                let octal =
                    !digits.is_empty() && digits.bytes().all(|b| (b'0'..=b'7').contains(&b));
                octal.then(|| u32::from_str_radix(digits, 8).unwrap_or(u32::MAX))
            }
            // The decimal number 660 means other bits than intended; only octal notation is
            // accepted.
            TextOrNumber::Number(number) => self
                .source
                .slice(&mode.span())
                .starts_with("0o")
                .then(|| u32::try_from(*number).unwrap_or(u32::MAX)),
        };
        match bits {
            Some(bits) if bits <= 0o777 => Ok(bits),
            Some(_) => {
                Err(Mistake::new(mode.span(), "permission bits must be from \"0000\" to \"0777\"")
                    .help(format!("such as {example}")))
            }
            None => Err(Mistake::new(mode.span(), "permission bits must be written in octal")
                .help(match example.split('"').nth(1) {
                    Some(digits) => format!(
                        "such as \"{digits}\" (text), or 0o{}",
                        digits.trim_start_matches('0')
                    ),
                    None => format!("such as {example}"),
                })),
        }
    }

    /// The id of a name; `None` and a warning if the name is unknown.
    fn account(
        &mut self,
        account: Option<&Spanned<Either<AnAccount>>>,
        kind: accounts::Kind,
    ) -> Option<u32> {
        let account = account?;
        match &account.get_ref().0 {
            TextOrNumber::Number(number) => match u32::try_from(*number) {
                // The kernel uses the largest id for "no change".
                Ok(id) if id != u32::MAX => Some(id),
                _ => {
                    let message = format!("{number} is not a {} id", kind.name());
                    self.mistake(Mistake::new(account.span(), message));
                    None
                }
            },
            TextOrNumber::Text(text) => match accounts::find(text, kind) {
                Ok(Some(id)) => Some(id),
                Ok(None) => {
                    self.warn(
                        Mistake::new(account.span(), format!("unknown {} `{text}`", kind.name()))
                            .help(format!(
                                "the name does not exist on this machine: until it does and the dispatcher \
                                 is reloaded, this entry has no effect{}",
                                kind.hint()
                            )),
                    );
                    None
                }
                Err(error) => {
                    self.warn(Mistake::new(
                        account.span(),
                        format!("{} `{text}` cannot be looked up: {error}", kind.name()),
                    ));
                    None
                }
            },
        }
    }

    fn accounts(&mut self, list: &[Spanned<Either<AnAccount>>], kind: accounts::Kind) -> Vec<u32> {
        list.iter().filter_map(|entry| self.account(Some(entry), kind)).collect()
    }

    fn pool(
        &mut self,
        name: &str,
        keys: PoolKeys,
        defaults: &PoolKeys,
        (dispatch_socket, stop_timeout): (&UnixEndpoint, std::time::Duration),
    ) -> Pool {
        let spawn = keys.spawn.as_ref().and_then(|spawn| {
            let keys = (spawn, defaults.spawn.as_ref());
            spawn::spawn(self, name, keys, dispatch_socket, stop_timeout)
        });
        let (spawn, supervision) = spawn.unzip();
        let response =
            keys.unavailable_response.as_ref().or(defaults.unavailable_response.as_ref());
        let unavailable_response =
            response.and_then(|path| self.keep(spawn::unavailable_response(path))).map(Into::into);
        let users = match keys.allow_users.as_ref().or(defaults.allow_users.as_ref()) {
            Some(list) => self.accounts(list, accounts::Kind::User),
            None => accounts::own_and_root(),
        };
        let groups = match keys.allow_groups.as_ref().or(defaults.allow_groups.as_ref()) {
            Some(list) => self.accounts(list, accounts::Kind::Group),
            None => Vec::new(),
        };
        let policy = keys.policy.as_ref().or(defaults.policy.as_ref());
        let policy = policy.map(|policy| policy.get_ref().0).unwrap_or_default();
        let scores = scores::scores(self, keys.scores.as_ref(), defaults.scores.as_ref(), policy);
        let awaits_headers = self.proxied.iter().any(|pool| pool == name);
        let known = affinity::affinity_settings(&keys, defaults, awaits_headers);
        let (affinity, peek) = match self.keep(known) {
            Some(known) => {
                known.useless.into_iter().for_each(|mistake| self.warn(mistake));
                (known.affinity, known.peek)
            }
            None => (None, Peek::default()),
        };
        let agent_listen = agent::agent_listen(self, &keys);
        // The core owns the defaults.
        let core = PoolSettings::default();
        let history_candidates = keys
            .history_candidates
            .as_ref()
            .or(defaults.history_candidates.as_ref())
            .map_or(core.history_candidates, |n| n.get_ref().0);
        let history = history(&keys, defaults, (core.history, history_candidates));
        let settings = PoolSettings {
            policy,
            scores,
            max_connections_per_worker: keys
                .max_connections_per_worker
                .or(defaults.max_connections_per_worker)
                .map_or(core.max_connections_per_worker, |n| n.0),
            max_untaken: keys
                .max_untaken
                .as_ref()
                .or(defaults.max_untaken.as_ref())
                .map_or(core.max_untaken, |n| n.get_ref().0),
            max_workers: keys
                .max_workers
                .or(defaults.max_workers)
                .map_or(core.max_workers, |n| n.0),
            handoff_timeout: keys
                .handoff_timeout
                .or(defaults.handoff_timeout)
                .map_or(core.handoff_timeout, |w| w.0),
            max_handoff_timeout: keys
                .max_handoff_timeout
                .or(defaults.max_handoff_timeout)
                .map_or(core.max_handoff_timeout, |w| w.0),
            wait_for_worker: keys
                .wait_for_worker
                .or(defaults.wait_for_worker)
                .map_or(core.wait_for_worker, |w| w.0),
            slow_start: keys.slow_start.or(defaults.slow_start).map_or(core.slow_start, |w| w.0),
            history: self.keep(history).unwrap_or(core.history),
            history_candidates,
            affinity,
            peek,
            access: AllowedAccounts { users, groups },
            processes: spawn.as_ref().map_or(0, |spawn| spawn.processes),
            agent_workers: keys
                .agent_workers
                .as_ref()
                .or(defaults.agent_workers.as_ref())
                .map(|n| n.get_ref().0),
            supervision: supervision.unwrap_or_default(),
            steered: false,
            queues_move: false,
            name: name.to_owned(),
        };
        let steer = steer::steer(self, (name, &keys, defaults), &settings, spawn.as_ref());
        let queues_move = steer.as_ref().is_some_and(|steer| steer.ports == super::Ports::Shared);
        let settings = PoolSettings { steered: steer.is_some(), queues_move, ..settings };
        let line = line::line_socket(self, &keys, defaults, &settings);
        Pool { settings, unavailable_response, spawn, agent_listen, line, steer }
    }
}

/// A bound on the memory for decisions with their candidates.
const MOST_HISTORY: u32 = 500_000;

/// `history`, checked against the number of candidates; `default` is the default and that number.
fn history(keys: &PoolKeys, defaults: &PoolKeys, default: (u32, u32)) -> Checked<u32> {
    let (default, workers) = default;
    let Some(history) = keys.history.as_ref().or(defaults.history.as_ref()) else {
        return Ok(default);
    };
    let decisions = history.get_ref().0;
    if decisions * workers > MOST_HISTORY {
        let message = format!("{decisions} decisions with {workers} workers each are too many");
        let most = format!("`history` times `history_candidates` may be {MOST_HISTORY} at most");
        return Err(Mistake::new(history.span(), message).help(most));
    }
    Ok(decisions)
}
