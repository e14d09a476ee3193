//! From what the file says to what it means: defaults, names resolved, and everything that only shows across keys.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use toml::Spanned;

use super::error::{Mistake, Source, Warning, suggest};
use super::file::{File, ListenerKeys, PolicyName, PoolKeys, SpawnKeys};
use super::value::{AMode, AnAccount, Either, TextOrNumber};
use super::{
    Address, Config, DEFAULT_ADMIN_SOCKET, DEFAULT_DISPATCH_SOCKET, Limits, Listener,
    ListenerOptions, MAX_UNAVAILABLE_RESPONSE, Pool, Spawn, UnixEndpoint, UnixSource, accounts,
};
use crate::pool::{Access, Policy, PoolSettings};

/// `sun_path` less its terminating zero.
const MAX_SOCKET_PATH: usize = 107;

type Checked<T> = Result<T, Mistake>;

pub(super) fn validate(file: File, source: &Source<'_>) -> Checked<Config> {
    let mut check = Check {
        source,
        warnings: Vec::new(),
    };
    let dispatch_socket = check.endpoint(
        &file.dispatch_socket,
        "dispatch_socket",
        DEFAULT_DISPATCH_SOCKET,
        (&file.dispatch_socket_mode, 0o666),
        &file.dispatch_socket_user,
        &file.dispatch_socket_group,
    )?;
    let admin_socket = check.endpoint(
        &file.admin_socket,
        "admin_socket",
        DEFAULT_ADMIN_SOCKET,
        (&file.admin_socket_mode, 0o600),
        &file.admin_socket_user,
        &file.admin_socket_group,
    )?;
    if dispatch_socket.source == admin_socket.source {
        let span = [&file.admin_socket, &file.dispatch_socket]
            .into_iter()
            .flatten()
            .map(Spanned::span)
            .next();
        return Err(Mistake::new(
            span.unwrap_or(0..0),
            "`admin_socket` and `dispatch_socket` are the same",
        )
        .help("give each a path of its own"));
    }
    let limits = limits(&file);
    let defaults = file.defaults.unwrap_or_default();

    // serde hands tables over sorted by name; people think in the order they wrote.
    let mut tables: Vec<(Spanned<String>, PoolKeys)> = file.pool.into_iter().collect();
    tables.sort_by_key(|(name, _)| name.span().start);
    if tables.is_empty() {
        return Err(Mistake::new(0..0, "no pool is configured")
            .help("add a table [pool.web] and name that pool in a [[listener]]"));
    }
    let mut pools = Vec::with_capacity(tables.len());
    for (name, keys) in &tables {
        check_name(name, "pool")?;
        pools.push(check.pool(name.get_ref(), keys.clone(), &defaults)?);
    }
    if pools.len() > usize::from(u16::MAX) {
        return Err(Mistake::new(0..0, "more than 65535 pools"));
    }

    if file.listener.is_empty() {
        return Err(Mistake::new(0..0, "no listener is configured")
            .help("add a table [[listener]] with `name`, `address` and `pool`"));
    }
    let mut listeners = Vec::with_capacity(file.listener.len());
    for keys in file.listener {
        let listener = check.listener(keys.get_ref(), &pools)?;
        check_distinct(&listener, keys.get_ref(), &listeners)?;
        for (endpoint, key) in [
            (&dispatch_socket.source, "dispatch_socket"),
            (&admin_socket.source, "admin_socket"),
        ] {
            let same = match (&listener.address, endpoint) {
                (Address::Unix(a), UnixSource::Path(b)) => a == b,
                (Address::Systemd(a), UnixSource::Systemd(b)) => a == b,
                (Address::Unix(_) | Address::Systemd(_) | Address::Tcp(_), _) => false,
            };
            if same {
                return Err(Mistake::new(
                    keys.get_ref().address.span(),
                    format!("this is `{key}` already"),
                ));
            }
        }
        listeners.push(listener);
    }
    if listeners.len() > usize::from(u16::MAX) {
        return Err(Mistake::new(0..0, "more than 65535 listeners"));
    }
    for (position, (name, _)) in tables.iter().enumerate() {
        if !listeners
            .iter()
            .any(|listener| usize::from(listener.pool) == position)
        {
            check.warn(
                Mistake::new(
                    name.span(),
                    format!("no listener sends connections to pool `{}`", name.get_ref()),
                )
                .help("name it in a [[listener]], or remove it"),
            );
        }
    }
    Ok(Config {
        dispatch_socket,
        admin_socket,
        listeners,
        pools,
        limits,
        warnings: check.warnings,
    })
}

fn limits(file: &File) -> Limits {
    let default = Limits::default();
    Limits {
        accept_batch: file.accept_batch.map_or(default.accept_batch, |n| n.0),
        hello_timeout: file.hello_timeout.map_or(default.hello_timeout, |w| w.0),
        max_pending_hellos: file
            .max_pending_hellos
            .map_or(default.max_pending_hellos, |n| n.0),
        stop_timeout: file.stop_timeout.map_or(default.stop_timeout, |w| w.0),
        resource_pause: file.resource_pause.map_or(default.resource_pause, |w| w.0),
    }
}

/// Names go into logs, environment variables and the wire: nothing that could be mistaken for something else there.
fn check_name(name: &Spanned<String>, what: &str) -> Checked<()> {
    let bytes = name.get_ref().as_bytes();
    let good = (1..=worker_sdk::wire::MAX_NAME).contains(&bytes.len())
        && bytes.iter().all(u8::is_ascii_graphic);
    if good {
        return Ok(());
    }
    Err(
        Mistake::new(name.span(), format!("not a good name for a {what}"))
            .help("a name is 1 to 64 printable ASCII characters, without spaces"),
    )
}

/// Two listeners cannot share a name, nor a place to listen on.
fn check_distinct(new: &Listener, keys: &ListenerKeys, before: &[Listener]) -> Checked<()> {
    if let Some(other) = before.iter().find(|other| other.name == new.name) {
        return Err(Mistake::new(
            keys.name.span(),
            format!("there is a listener `{}` already", other.name),
        )
        .help("every listener needs a name of its own"));
    }
    for other in before {
        if other.address == new.address && !any_port(&new.address) {
            return Err(Mistake::new(
                keys.address.span(),
                format!("listener `{}` has this address already", other.name),
            ));
        }
        let shared = new.options.reuse_port && other.options.reuse_port;
        if !shared && (takes(other, new) || takes(new, other)) {
            return Err(Mistake::new(
                keys.address.span(),
                format!(
                    "listener `{}` at {} takes this IPv4 port as well",
                    other.name, other.address_text
                ),
            )
            .help("set `ipv6_only = true` for the IPv6 one, or keep only that one"));
        }
    }
    Ok(())
}

fn any_port(address: &Address) -> bool {
    matches!(address, Address::Tcp(address) if address.port() == 0)
}

/// Whether a dual-stack `[::]:PORT` also occupies the other's IPv4 port.
fn takes(wide: &Listener, narrow: &Listener) -> bool {
    match (&wide.address, &narrow.address) {
        (Address::Tcp(SocketAddr::V6(wide_addr)), Address::Tcp(SocketAddr::V4(narrow_addr))) => {
            wide_addr.ip().is_unspecified()
                && !wide.options.ipv6_only
                && wide_addr.port() == narrow_addr.port()
                && wide_addr.port() != 0
        }
        _ => false,
    }
}

/// A socket path or `systemd:NAME`.
pub(super) fn unix_source(
    text: Option<Spanned<String>>,
    default: &str,
    key: &str,
) -> Checked<UnixSource> {
    let Some(text) = text else {
        return Ok(UnixSource::Path(PathBuf::from(default)));
    };
    let span = text.span();
    match text.get_ref().strip_prefix("systemd:") {
        Some(name) => Ok(UnixSource::Systemd(descriptor_name(name, span)?)),
        None => {
            let path = text.get_ref();
            if let Some(path) = path.strip_prefix("unix:") {
                return Err(Mistake::new(span, format!("`{key}` is a path"))
                    .help(format!("leave out `unix:`: \"{path}\"")));
            }
            Ok(UnixSource::Path(socket_path(path, span)?))
        }
    }
}

fn socket_path(path: &str, span: std::ops::Range<usize>) -> Checked<PathBuf> {
    if path.is_empty() {
        return Err(Mistake::new(span, "a socket needs a path")
            .help("such as \"/run/dispatcher/app.sock\""));
    }
    if path.len() > MAX_SOCKET_PATH {
        return Err(Mistake::new(
            span,
            format!(
                "this path has {} bytes; the kernel allows {MAX_SOCKET_PATH} for a socket",
                path.len()
            ),
        ));
    }
    if path.contains('\0') {
        return Err(Mistake::new(span, "a path cannot contain a zero byte"));
    }
    Ok(PathBuf::from(path))
}

fn descriptor_name(name: &str, span: std::ops::Range<usize>) -> Checked<String> {
    // What systemd itself allows for FileDescriptorName=.
    let good = (1..=255).contains(&name.len())
        && name
            .bytes()
            .all(|b| (b.is_ascii_graphic() || b == b' ') && b != b':');
    if good {
        return Ok(name.to_owned());
    }
    Err(
        Mistake::new(span, "not a name that systemd can give to a socket")
            .help("write \"systemd:NAME\" with the FileDescriptorName= of the .socket unit"),
    )
}

/// `IP:PORT`, `unix:PATH` or `systemd:NAME`.
fn address(text: &Spanned<String>) -> Checked<Address> {
    let span = text.span();
    let text = text.get_ref().as_str();
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(Address::Unix(socket_path(path, span)?));
    }
    if let Some(name) = text.strip_prefix("systemd:") {
        return Ok(Address::Systemd(descriptor_name(name, span)?));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(Address::Tcp(address));
    }
    let help = if text.starts_with('/') {
        format!("for a Unix socket write \"unix:{text}\"")
    } else if let Ok(ip) = text.parse::<std::net::IpAddr>() {
        format!(
            "add a port: \"{}\"",
            SocketAddr::new(ip, 8080).to_string().as_str()
        )
    } else if let Ok(port) = text.trim_start_matches(['*', ':']).parse::<u16>() {
        format!("name the address too: \"0.0.0.0:{port}\", or \"[::]:{port}\" for IPv4 and IPv6")
    } else {
        match text.rsplit_once(':') {
            Some((host, port)) if host.contains(':') && !host.starts_with('[') => {
                format!("put the IPv6 address in brackets: \"[{host}]:{port}\"")
            }
            Some(("localhost", port)) => {
                format!(
                    "host names are not looked up: write \"127.0.0.1:{port}\" or \"[::1]:{port}\""
                )
            }
            Some((_, port)) if port.parse::<u16>().is_err() => {
                "a port is a number from 0 to 65535".to_owned()
            }
            _ => {
                "write \"0.0.0.0:8080\", \"[::]:8080\", \"unix:/run/app.sock\" or \"systemd:NAME\""
                    .to_owned()
            }
        }
    };
    Err(Mistake::new(span, format!("`{text}` is not an address")).help(help))
}

/// What goes through the whole check: the text, to look at how something was written, and what to warn about.
struct Check<'a> {
    source: &'a Source<'a>,
    warnings: Vec<Warning>,
}

impl Check<'_> {
    fn warn(&mut self, mistake: Mistake) {
        let warning = self.source.warning(mistake);
        // A default is looked at once for every pool; once is enough to say it.
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
    ) -> Checked<UnixEndpoint> {
        Ok(UnixEndpoint {
            source: unix_source(text.clone(), default, key)?,
            mode: self.mode(mode, default_mode)?,
            user: self.account(user.as_ref(), accounts::Kind::User)?,
            group: self.account(group.as_ref(), accounts::Kind::Group)?,
        })
    }

    fn mode(&self, mode: &Option<Spanned<Either<AMode>>>, default: u32) -> Checked<u32> {
        let Some(mode) = mode else {
            return Ok(default);
        };
        let bits = match &mode.get_ref().0 {
            TextOrNumber::Text(text) => {
                let digits = text.strip_prefix("0o").unwrap_or(text);
                let octal =
                    !digits.is_empty() && digits.bytes().all(|b| (b'0'..=b'7').contains(&b));
                octal.then(|| u32::from_str_radix(digits, 8).unwrap_or(u32::MAX))
            }
            // 660 would be other bits than anybody means: only a number that says it is octal counts.
            TextOrNumber::Number(number) => self
                .source
                .slice(&mode.span())
                .starts_with("0o")
                .then(|| u32::try_from(*number).unwrap_or(u32::MAX)),
        };
        match bits {
            Some(bits) if bits <= 0o777 => Ok(bits),
            Some(_) => Err(Mistake::new(
                mode.span(),
                "permission bits must be from \"0000\" to \"0777\"",
            )
            .help("such as \"0660\": owner and group may connect")),
            None => Err(
                Mistake::new(mode.span(), "permission bits must be written in octal")
                    .help("such as \"0660\" (text), or 0o660"),
            ),
        }
    }

    /// The id behind a name; nothing, and a warning, when this machine does not know it.
    fn account(
        &mut self,
        account: Option<&Spanned<Either<AnAccount>>>,
        kind: accounts::Kind,
    ) -> Checked<Option<u32>> {
        let Some(account) = account else {
            return Ok(None);
        };
        match &account.get_ref().0 {
            TextOrNumber::Number(number) => match u32::try_from(*number) {
                // The kernel uses the largest one for "leave as it is".
                Ok(id) if id != u32::MAX => Ok(Some(id)),
                _ => Err(Mistake::new(
                    account.span(),
                    format!("{number} is not a {} id", kind.name()),
                )),
            },
            TextOrNumber::Text(text) => match accounts::find(text, kind) {
                Ok(Some(id)) => Ok(Some(id)),
                Ok(None) => {
                    self.warn(
                        Mistake::new(account.span(), format!("unknown {} `{text}`", kind.name()))
                            .help(format!(
                                "this machine does not know it: until it does and the dispatcher \
                                 is restarted, this entry has no effect{}",
                                kind.hint()
                            )),
                    );
                    Ok(None)
                }
                Err(error) => {
                    self.warn(Mistake::new(
                        account.span(),
                        format!("{} `{text}` cannot be looked up: {error}", kind.name()),
                    ));
                    Ok(None)
                }
            },
        }
    }

    fn accounts(
        &mut self,
        list: &[Spanned<Either<AnAccount>>],
        kind: accounts::Kind,
    ) -> Checked<Vec<u32>> {
        let mut ids = Vec::with_capacity(list.len());
        for entry in list {
            ids.extend(self.account(Some(entry), kind)?);
        }
        Ok(ids)
    }

    fn listener(&mut self, keys: &ListenerKeys, pools: &[Pool]) -> Checked<Listener> {
        check_name(&keys.name, "listener")?;
        let address = address(&keys.address)?;
        let names = pools.iter().map(|pool| pool.settings.name.as_str());
        let wanted = keys.pool.get_ref();
        let pool =
            names
                .clone()
                .position(|name| name == wanted)
                .and_then(|position| u16::try_from(position).ok())
                .ok_or_else(|| {
                    Mistake::new(keys.pool.span(), format!("unknown pool `{wanted}`"))
                        .help(suggest(wanted, "the pools are", names))
                })?;
        let default = ListenerOptions::default();
        let options = ListenerOptions {
            backlog: keys.backlog.map_or(default.backlog, |n| n.0),
            ipv6_only: keys
                .ipv6_only
                .as_ref()
                .map_or(default.ipv6_only, |flag| *flag.get_ref()),
            nodelay: keys.nodelay.unwrap_or(default.nodelay),
            keepalive: keys.keepalive.map(|w| w.0),
            keepalive_interval: keys.keepalive_interval.as_ref().map(|w| w.get_ref().0),
            keepalive_count: keys.keepalive_count.as_ref().map(|n| n.get_ref().0),
            user_timeout: keys.user_timeout.map(|w| w.0),
            defer_accept: keys.defer_accept.map(|w| w.0),
            fast_open: keys.fast_open.map(|n| n.0),
            receive_buffer: keys.receive_buffer.map(|n| n.0),
            send_buffer: keys.send_buffer.map(|n| n.0),
            reuse_port: keys.reuse_port.unwrap_or(default.reuse_port),
            free_bind: keys.free_bind.unwrap_or(default.free_bind),
            mode: self.mode(&keys.mode, default.mode)?,
        };
        self.useless_options(keys, &address);
        Ok(Listener {
            name: keys.name.get_ref().clone(),
            address_text: keys.address.get_ref().clone(),
            address,
            pool,
            options,
        })
    }

    /// Options that are valid and do nothing where they are.
    fn useless_options(&mut self, keys: &ListenerKeys, address: &Address) {
        if let (Some(mode), Address::Tcp(_)) = (&keys.mode, address) {
            self.warn(Mistake::new(
                mode.span(),
                "`mode` has no effect on a TCP listener",
            ));
        }
        if let (Some(flag), Address::Tcp(SocketAddr::V4(_)) | Address::Unix(_)) =
            (&keys.ipv6_only, address)
        {
            self.warn(Mistake::new(
                flag.span(),
                "`ipv6_only` has no effect without an IPv6 address",
            ));
        }
        if keys.keepalive.is_none() {
            let spans = [
                keys.keepalive_interval.as_ref().map(Spanned::span),
                keys.keepalive_count.as_ref().map(Spanned::span),
            ];
            for span in spans.into_iter().flatten() {
                self.warn(Mistake::new(span, "this has no effect without `keepalive`"));
            }
        }
    }

    fn pool(&mut self, name: &str, keys: PoolKeys, defaults: &PoolKeys) -> Checked<Pool> {
        let spawn = match &keys.spawn {
            Some(spawn) => Some(self.spawn(spawn, defaults.spawn.as_ref())?),
            None => None,
        };
        let response = keys
            .unavailable_response
            .as_ref()
            .or(defaults.unavailable_response.as_ref());
        let unavailable_response = response.map(unavailable_response).transpose()?;
        let users = match keys.allow_users.as_ref().or(defaults.allow_users.as_ref()) {
            Some(list) => self.accounts(list, accounts::Kind::User)?,
            None => accounts::own_and_root(),
        };
        let groups = match keys
            .allow_groups
            .as_ref()
            .or(defaults.allow_groups.as_ref())
        {
            Some(list) => self.accounts(list, accounts::Kind::Group)?,
            None => Vec::new(),
        };
        let policy = match keys.policy.or(defaults.policy) {
            Some(PolicyName::LeastConnections) => Policy::LeastConnections,
            None => Policy::default(),
        };
        let settings = PoolSettings {
            policy,
            max_connections_per_worker: keys
                .max_connections_per_worker
                .or(defaults.max_connections_per_worker)
                .map_or(10_000, |n| n.0),
            max_untaken: keys
                .max_untaken
                .or(defaults.max_untaken)
                .map_or(256, |n| n.0),
            max_workers: keys
                .max_workers
                .or(defaults.max_workers)
                .map_or(4096, |n| n.0),
            handoff_timeout: keys
                .handoff_timeout
                .or(defaults.handoff_timeout)
                .map_or(super::HANDOFF_TIMEOUT, |w| w.0),
            probation: keys
                .probation
                .or(defaults.probation)
                .map_or(super::PROBATION, |w| w.0),
            wait_for_worker: keys
                .wait_for_worker
                .or(defaults.wait_for_worker)
                .map_or(super::WAIT_FOR_WORKER, |w| w.0),
            access: Access { users, groups },
            processes: spawn.as_ref().map_or(0, |spawn| spawn.processes),
            name: name.to_owned(),
        };
        Ok(Pool {
            settings,
            unavailable_response,
            spawn,
        })
    }

    /// `[pool.NAME.spawn]`, with what `[defaults.spawn]` adds. Only a pool with the table itself starts processes.
    fn spawn(
        &mut self,
        keys: &Spanned<SpawnKeys>,
        defaults: Option<&Spanned<SpawnKeys>>,
    ) -> Checked<Spawn> {
        let own = keys.get_ref();
        let defaults = defaults.map(Spanned::get_ref);
        let command = own
            .command
            .as_ref()
            .or(defaults.and_then(|d| d.command.as_ref()))
            .ok_or_else(|| {
                Mistake::new(keys.span(), "missing key `command`")
                    .help("add the program and its arguments: command = [\"/usr/bin/my-server\"]")
            })?;
        match command.get_ref().first() {
            None => {
                return Err(Mistake::new(command.span(), "`command` is empty")
                    .help("it starts with a program: [\"/usr/bin/my-server\", \"--option\"]"));
            }
            Some(program) if program.get_ref().is_empty() => {
                return Err(Mistake::new(program.span(), "the program has no name"));
            }
            Some(_) => {}
        }
        let environment = own
            .environment
            .as_ref()
            .or(defaults.and_then(|d| d.environment.as_ref()));
        let directory = own
            .directory
            .as_ref()
            .or(defaults.and_then(|d| d.directory.as_ref()));
        for text in command.get_ref().iter().chain(directory) {
            no_zero_byte(text)?;
        }
        Ok(Spawn {
            command: command
                .get_ref()
                .iter()
                .map(|word| word.get_ref().clone())
                .collect(),
            processes: own
                .processes
                .or(defaults.and_then(|d| d.processes))
                .map_or(1, |n| n.0),
            environment: environment.map_or(Ok(Vec::new()), variables)?,
            directory: directory.map(|directory| PathBuf::from(directory.get_ref())),
        })
    }
}

fn no_zero_byte(text: &Spanned<String>) -> Checked<()> {
    if text.get_ref().contains('\0') {
        return Err(Mistake::new(text.span(), "this cannot contain a zero byte"));
    }
    Ok(())
}

fn variables(
    environment: &BTreeMap<Spanned<String>, Spanned<String>>,
) -> Checked<Vec<(String, String)>> {
    let mut variables = Vec::with_capacity(environment.len());
    for (name, value) in environment {
        if name.get_ref().is_empty() || name.get_ref().contains(['=', '\0']) {
            return Err(Mistake::new(
                name.span(),
                "not a name for an environment variable",
            ));
        }
        if super::RESERVED_VARIABLES.contains(&name.get_ref().as_str()) {
            return Err(Mistake::new(
                name.span(),
                format!("the dispatcher itself sets `{}`", name.get_ref()),
            )
            .help("it tells the worker where and as whom to join"));
        }
        no_zero_byte(value)?;
        variables.push((name.get_ref().clone(), value.get_ref().clone()));
    }
    Ok(variables)
}

fn unavailable_response(path: &Spanned<String>) -> Checked<Vec<u8>> {
    use std::io::Read;

    let unreadable = |error: std::io::Error| {
        Mistake::new(
            path.span(),
            format!("`{}` cannot be read: {error}", path.get_ref()),
        )
        .help("it holds the bytes a client gets before it is closed because there is no worker")
    };
    let file = std::fs::File::open(path.get_ref()).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(MAX_UNAVAILABLE_RESPONSE as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() > MAX_UNAVAILABLE_RESPONSE {
        return Err(Mistake::new(
            path.span(),
            format!("`{}` is longer than 64 KiB", path.get_ref()),
        )
        .help("it has to fit into the client's socket buffer at once"));
    }
    Ok(bytes)
}
