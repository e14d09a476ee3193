//! Addresses of listeners and sockets: their syntax, and conflicts between them.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;

use super::error::Mistake;
use super::file::ListenerKeys;
use super::validate::Checked;
use super::{Address, Listener, UnixSource};

/// Size of `sun_path` without the terminating zero.
const MAX_SOCKET_PATH: usize = 107;

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
                    .help(format!("omit `unix:`: \"{path}\"")));
            }
            let path = socket_path(path, span.clone())?;
            // Workers connect by the absolute path, because each has its own working directory.
            let absolute = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
            if key == "dispatch_socket" && absolute.as_os_str().as_encoded_bytes().contains(&b':') {
                let message = "the absolute path of the dispatch socket has a `:`";
                return Err(Mistake::new(span, message).help(
                    "workers separate several sockets by `:`: use another directory or name",
                ));
            }
            if key == "dispatch_socket" && absolute.as_os_str().len() > MAX_SOCKET_PATH {
                return Err(Mistake::new(
                    span,
                    format!(
                        "as an absolute path this has {} bytes; the kernel allows {MAX_SOCKET_PATH} for a socket",
                        absolute.as_os_str().len()
                    ),
                )
                .help("workers connect by the absolute path: use a shorter directory"));
            }
            Ok(UnixSource::Path(path))
        }
    }
}

/// Whether two socket paths are the same file, or one is the lock file of the other, in any
/// spelling.
pub(super) fn same_path(one: &Path, two: &Path) -> bool {
    let locked = |path: &Path| {
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        PathBuf::from(name)
    };
    let (one, two) = (real_path(one), real_path(two));
    one == two || locked(&one) == two || one == locked(&two)
}

pub(super) fn same_source(one: &UnixSource, two: &UnixSource) -> bool {
    match (one, two) {
        (UnixSource::Path(one), UnixSource::Path(two)) => same_path(one, two),
        (UnixSource::Systemd(one), UnixSource::Systemd(two)) => one == two,
        (UnixSource::Path(_) | UnixSource::Systemd(_), _) => false,
    }
}

/// The absolute path, with the links resolved in the part of its directory that exists.
fn real_path(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (absolute.parent().map(Path::canonicalize), absolute.file_name()) {
        (Some(Ok(directory)), Some(name)) => directory.join(name),
        _ => absolute,
    }
}

/// Whether two addresses are the same.
fn same_address(one: &Address, two: &Address) -> bool {
    match (one, two) {
        (Address::Tcp(one), Address::Tcp(two)) => canonical(*one) == canonical(*two),
        (Address::Unix(one), Address::Unix(two)) => same_path(one, two),
        (Address::Systemd(one), Address::Systemd(two)) => one == two,
        (Address::Tcp(_) | Address::Unix(_) | Address::Systemd(_), _) => false,
    }
}

/// The kernel treats an IPv4-mapped IPv6 address (`::ffff:127.0.0.1`) as the IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn socket_path(path: &str, span: Range<usize>) -> Checked<PathBuf> {
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

fn descriptor_name(name: &str, span: Range<usize>) -> Checked<String> {
    // The limits of systemd for FileDescriptorName=.
    let good = (1..=255).contains(&name.len())
        && name.bytes().all(|b| (b.is_ascii_graphic() || b == b' ') && b != b':');
    if good {
        return Ok(name.to_owned());
    }
    Err(Mistake::new(span, "not a name that systemd can give to a socket")
        .help("write \"systemd:NAME\" with the FileDescriptorName= of the .socket unit"))
}

/// `IP:PORT`, `unix:PATH` or `systemd:NAME`.
pub(super) fn address(text: &Spanned<String>) -> Checked<Address> {
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
        format!("add a port: \"{}\"", SocketAddr::new(ip, 8080).to_string().as_str())
    } else if let Ok(port) = text.trim_start_matches(['*', ':']).parse::<u16>() {
        format!("add the address: \"0.0.0.0:{port}\", or \"[::]:{port}\" for IPv4 and IPv6")
    } else {
        match text.rsplit_once(':') {
            Some((host, port)) if host.contains(':') && !host.starts_with('[') => {
                format!("put the IPv6 address in brackets: \"[{host}]:{port}\"")
            }
            Some(("localhost", port)) => {
                format!(
                    "host names are not resolved: write \"127.0.0.1:{port}\" or \"[::1]:{port}\""
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

/// Two listeners must not have the same name or address.
pub(super) fn check_distinct(
    new: &Listener,
    keys: &ListenerKeys,
    before: &[Listener],
) -> Checked<()> {
    if let Some(other) = before.iter().find(|other| other.name == new.name) {
        return Err(Mistake::new(
            keys.name.span(),
            format!("there is a listener `{}` already", other.name),
        )
        .help("use a different name for each listener"));
    }
    for other in before {
        if same_address(&other.address, &new.address) && !any_port(&new.address) {
            return Err(Mistake::new(
                keys.address.span(),
                format!("listener `{}` has this address already", other.name),
            ));
        }
        let shared = new.options.reuse_port && other.options.reuse_port;
        let (one, two) = (tcp(other), tcp(new));
        if !shared && (takes(one, two) || takes(two, one)) {
            let both = one
                .is_some_and(|(one, _)| two.is_some_and(|(two, _)| one.is_ipv4() == two.is_ipv4()));
            let (version, help) = match both {
                true => (
                    "",
                    "keep only the listener on all addresses, or give each listener one address",
                ),
                false => (
                    " IPv4",
                    "set `ipv6_only = true` for the IPv6 listener, or keep only that listener",
                ),
            };
            return Err(Mistake::new(
                keys.address.span(),
                format!(
                    "listener `{}` at {} uses this{version} port already",
                    other.name, other.address_text
                ),
            )
            .help(help));
        }
    }
    Ok(())
}

/// Whether two sockets cannot be bound at once, each with whether it accepts only IPv6.
pub(super) fn collides(one: (&Address, bool), two: (&Address, bool)) -> bool {
    let tcp = |(address, ipv6_only): (&Address, bool)| match address {
        Address::Tcp(address) => Some((canonical(*address), ipv6_only)),
        Address::Unix(_) | Address::Systemd(_) => None,
    };
    (same_address(one.0, two.0) && !any_port(one.0))
        || takes(tcp(one), tcp(two))
        || takes(tcp(two), tcp(one))
}

fn any_port(address: &Address) -> bool {
    matches!(address, Address::Tcp(address) if address.port() == 0)
}

/// The address of a TCP listener, and whether it accepts only IPv6.
fn tcp(listener: &Listener) -> Option<(SocketAddr, bool)> {
    match listener.address {
        Address::Tcp(address) => Some((canonical(address), listener.options.ipv6_only)),
        Address::Unix(_) | Address::Systemd(_) => None,
    }
}

/// Whether a listener on all addresses also occupies the port of the other one: `[::]:PORT`
/// includes IPv4.
fn takes(wide: Option<(SocketAddr, bool)>, narrow: Option<(SocketAddr, bool)>) -> bool {
    let (Some((wide, ipv6_only)), Some((narrow, _))) = (wide, narrow) else { return false };
    wide.ip().is_unspecified()
        && wide.port() == narrow.port()
        && wide.port() != 0
        && (wide.is_ipv4() == narrow.is_ipv4() || (wide.is_ipv6() && !ipv6_only))
}

/// `admin_http` and `advice_listen` must not be the address of a listener.
pub(super) fn check_distinct_http(
    (key, http): (&str, Option<SocketAddr>),
    new: &Listener,
    keys: &ListenerKeys,
) -> Checked<()> {
    // Both are bound like a listener without options.
    let (http, listener) = (http.map(|address| (canonical(address), false)), tcp(new));
    let same =
        |(address, _): (SocketAddr, bool)| listener.is_some_and(|(other, _)| other == address);
    let equal = http.is_some_and(|address| same(address) && address.0.port() != 0);
    if equal || takes(http, listener) || takes(listener, http) {
        return Err(Mistake::new(
            keys.address.span(),
            format!("this is the address of `{key}` already"),
        )
        .help("use a different port for each"));
    }
    Ok(())
}
