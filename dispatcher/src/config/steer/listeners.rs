//! What listeners and steered pools have to do with each other: families and addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use toml::Spanned;

use super::super::error::Mistake;
use super::super::file::{ListenerKeys, PoolKeys};
use super::super::spawn::has_placeholder;
use super::super::validate::{Check, Checked};
use super::super::{Address, Config, Listener};
use super::refused::refuse_listener_keys;
use super::{MAX_STEERED_POOLS, Member, Ports, command, shared, texts};

/// What listeners and pools have to do with each other. Sets the addresses of processes.
pub(in crate::config) fn check_steered(
    check: &mut Check<'_>,
    config: &mut Config,
    (tables, defaults): (&[(Spanned<String>, PoolKeys)], &PoolKeys),
    listeners: &[Spanned<ListenerKeys>],
) {
    let mut steered = config.pools.iter().zip(tables).filter(|(pool, _)| pool.steer.is_some());
    if let Some((_, (name, _))) = steered.nth(MAX_STEERED_POOLS) {
        let message = format!("more than {MAX_STEERED_POOLS} steered pools");
        check.mistake(
            Mistake::new(name.span(), message)
                .help("the programs of so many pools fit into a network namespace"),
        );
    }
    for (pool, (name, keys)) in config.pools.iter_mut().zip(tables) {
        let Some(steer) = &mut pool.steer else { continue };
        let shared = steer.ports == Ports::Shared;
        let (mut families, mut addresses) = (Families::default(), 0);
        for listener in listeners.iter().map(Spanned::get_ref) {
            if listener.pool.get_ref() != name.get_ref() {
                continue;
            }
            refuse_listener_keys(check, listener);
            let mut all = config.listeners.iter_mut();
            let Some(known) = all.find(|it| it.name == *listener.name.get_ref()) else { continue };
            if shared {
                shared::listener(check, listener, &mut known.options);
            }
            let address = public_address(&listener.address, &known.address);
            if let Some(address) = check.keep(address) {
                families.add(address, known.options.ipv6_only);
                addresses += 1;
            }
        }
        check_members(check, (&steer.members, keys), &config.listeners, &families);
        if shared && addresses > shared::MAX_ADDRESSES {
            let message = format!("more than {} listeners", shared::MAX_ADDRESSES);
            check.mistake(
                Mistake::new(name.span(), message)
                    .help("each process would inherit them all: use {addr} and {port} instead"),
            );
        }
        steer.address = families.address();
        if let Some(spawn) = &mut pool.spawn {
            spawn.address = Some(steer.address);
        }
        if shared {
            continue;
        }
        check_command(check, keys, defaults, &families);
    }
    check_types(check, config, (tables, defaults));
}

/// Members are where the clients of no listener are, and serve those of the pool.
fn check_members(
    check: &mut Check<'_>,
    (members, keys): (&[Member], &PoolKeys),
    listeners: &[Listener],
    families: &Families,
) {
    for member in members {
        let text = keys.member.iter().map(|entry| &entry.get_ref().address);
        let mut text = text.filter(|text| text.get_ref().parse() == Ok(member.address));
        let Some(text) = text.next() else { continue };
        let other = listeners.iter().find(|listener| {
            let Address::Tcp(address) = listener.address else { return false };
            covers(address, listener.options.ipv6_only, member.address)
                || covers(member.address, false, address)
        });
        if let Some(other) = other {
            let message = format!("clients of listener `{}` connect to this address", other.name);
            check.mistake(
                Mistake::new(text.span(), message).help("let the worker listen at another port"),
            );
        } else if let Some(reason) = families.unserved(member.address.ip()) {
            check.mistake(Mistake::new(text.span(), reason).help(families.help()));
        }
    }
}

/// Whether a listener at `at` leaves no room for one at `other`.
fn covers(at: SocketAddr, ipv6_only: bool, other: SocketAddr) -> bool {
    let any = at.ip().is_unspecified()
        && (at.is_ipv4() == other.is_ipv4() || (at.is_ipv6() && !ipv6_only));
    at.port() == other.port() && (any || at.ip() == other.ip())
}

/// Types of the line protocol whose workers would join a steered pool.
fn check_types(
    check: &mut Check<'_>,
    config: &Config,
    (tables, defaults): (&[(Spanned<String>, PoolKeys)], &PoolKeys),
) {
    let all = std::iter::once(defaults).chain(tables.iter().map(|(_, keys)| keys));
    let maps = all.filter_map(|keys| keys.line_types.as_ref());
    for target in maps.flat_map(|map| map.get_ref().values()) {
        let pools = config.pools.iter().filter(|pool| pool.steer.is_some());
        if pools.into_iter().any(|pool| pool.settings.name == *target.get_ref()) {
            check.mistake(
                Mistake::new(target.span(), "no worker joins this pool: the kernel chooses there")
                    .help("name a pool with mode = \"pass\""),
            );
        }
    }
}

fn public_address(text: &Spanned<String>, address: &Address) -> Checked<SocketAddr> {
    match address {
        Address::Tcp(address) if address.port() != 0 => Ok(*address),
        Address::Tcp(_) => {
            Err(Mistake::new(text.span(), "a steered pool has a port that is known")
                .help("write the port to which clients connect"))
        }
        Address::Unix(_) => {
            Err(Mistake::new(text.span(), "the kernel chooses among TCP listeners only")
                .help("write an address and a port, or mode = \"pass\" in the pool"))
        }
        Address::Systemd(_) => Err(Mistake::new(
            text.span(),
            "clients of a steered pool do not come to a socket of systemd",
        )
        .help("write the address and the port, and remove the .socket unit")),
    }
}

/// The families of clients.
#[derive(Default)]
struct Families {
    v4: bool,
    v6: bool,
}

impl Families {
    fn add(&mut self, address: SocketAddr, ipv6_only: bool) {
        self.v4 |= address.is_ipv4() || (address.ip().is_unspecified() && !ipv6_only);
        self.v6 |= address.is_ipv6();
    }

    /// Where a process listens: a listener at `::` serves both families.
    fn address(&self) -> IpAddr {
        match (self.v4, self.v6) {
            (_, false) => Ipv4Addr::LOCALHOST.into(),
            (false, true) => Ipv6Addr::LOCALHOST.into(),
            (true, true) => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    /// Which clients a listener at this address cannot serve.
    fn unserved(&self, ip: IpAddr) -> Option<&'static str> {
        match ip {
            IpAddr::V4(_) if self.v6 => {
                Some("an IPv4 listener cannot serve the IPv6 clients of this pool")
            }
            IpAddr::V6(ip) if self.v4 && !ip.is_unspecified() => {
                Some("a listener at one IPv6 address cannot serve the IPv4 clients of this pool")
            }
            _ => None,
        }
    }

    fn help(&self) -> &'static str {
        match (self.v4, self.v6) {
            (_, false) => "let the worker listen at an IPv4 address, or at [::]",
            (false, true) => "let the worker listen at an IPv6 address, such as [::1]",
            (true, true) => "let the worker listen at [::], for both families",
        }
    }
}

/// An address in the command where the process would listen, although it serves none of the
/// clients, or the kernel does not know it there.
fn check_command(check: &mut Check<'_>, keys: &PoolKeys, defaults: &PoolKeys, families: &Families) {
    let Some(own) = &keys.spawn else { return };
    let (own, defaults) = (own.get_ref(), defaults.spawn.as_ref().map(Spanned::get_ref));
    if texts(own, defaults).any(|text| has_placeholder(text.get_ref(), "addr")) {
        return;
    }
    let words: Vec<&Spanned<String>> = command(own, defaults).collect();
    let with_port = |word: &Spanned<String>| has_placeholder(word.get_ref(), "port");
    for (at, word) in words.iter().enumerate() {
        let Some(ip) = address_in(word.get_ref()) else { continue };
        // As in `--host 127.0.0.1 --port {port}`, in any order. Other addresses may be other
        // things.
        let near = &words[at.saturating_sub(NEAR)..words.len().min(at + NEAR + 1)];
        if !near.iter().any(|other| with_port(other)) {
            continue;
        }
        let elsewhere = !ip.is_loopback() && !ip.is_unspecified() && with_port(word);
        let reason = families.unserved(ip).or(elsewhere
            .then_some("the kernel knows a process at the loopback address and at all addresses"));
        if let Some(reason) = reason {
            check.mistake(Mistake::new(word.span(), reason).help("write {addr} for the address"));
        }
    }
}

/// The words between an address and its port: `--host IP --port PORT`.
const NEAR: usize = 2;

/// The address in `IP`, `--host=IP`, `IP:PORT`, `[IP]:PORT` or `tcp://IP:PORT`.
fn address_in(word: &str) -> Option<IpAddr> {
    let host = word.rsplit(['=', '/']).next().unwrap_or(word);
    if let Some((host, _)) = host.strip_prefix('[').and_then(|host| host.split_once(']')) {
        return host.parse().ok();
    }
    let before = host.rsplit_once(':').and_then(|(host, _)| host.parse().ok());
    host.parse().ok().or(before)
}
