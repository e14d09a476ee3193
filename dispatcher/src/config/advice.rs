//! Advice: `advice_listen` with its access list, `[advice]`, `[[advice_peer]]`, and `advertise` of
//! listeners.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::GaugeName;
use dispatcher_core::advice::Terms;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Deserialize;
use toml::Spanned;

use super::access_rules::networks;
use super::error::Mistake;
use super::file::{File, ListenerKeys};
use super::scores::{CONNECTIONS, Mode, Multiplier};
use super::validate::{Check, Checked};
use super::value::{Count, Wait, YEAR};
use super::{Address, Listener};

/// Most `[[advice_peer]]`s.
pub const MAX_ADVICE_PEERS: usize = 64;

/// Most gauges with a multiplier.
const MOST_GAUGES: usize = 24;

/// Longest `advertise`: a host name of 253 bytes, a colon and a port.
const MAX_ADVERTISE: usize = 259;

/// Advice to clients: top-level keys, `[advice]` and `[[advice_peer]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct AdviceSettings {
    /// `advice_listen`: where clients and peers ask; `None` for not at all.
    pub listen: Option<SocketAddr>,
    /// `advice_allow`: the networks that may ask. Peers always may.
    pub allow: Vec<IpNet>,
    /// `advice_detail`: whether answers name workers and processes. Default false.
    pub detail: bool,
    /// The `address`es of `[[advice_peer]]`, in file order.
    pub peers: Vec<SocketAddr>,
    /// How often peers are asked; `None` (`mode = "fresh"`) for with each request.
    pub interval: Option<Duration>,
    /// Longest wait for the whole answer of a peer. Default 1 s.
    pub request_timeout: Duration,
    /// Greatest age of the figures in an answer. Default 3 s.
    pub valid_for: Duration,
    /// `multiplier.connections`, if set.
    pub connections: Option<f64>,
    /// The other multipliers, in file order; 0 disables a gauge.
    pub multipliers: Vec<(GaugeName, f64)>,
    /// Answers kept of each pool. Default 0.
    pub history: u32,
}

impl Default for AdviceSettings {
    fn default() -> AdviceSettings {
        AdviceSettings {
            listen: None,
            allow: private_networks(),
            detail: false,
            peers: Vec::new(),
            interval: Some(Duration::from_secs(1)),
            request_timeout: Duration::from_secs(1),
            valid_for: Duration::from_secs(3),
            connections: None,
            multipliers: Vec::new(),
            history: 0,
        }
    }
}

impl AdviceSettings {
    /// Whether a client at this address may ask.
    pub fn allows(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        self.allow.iter().any(|net| net.contains(&client))
            || self.peers.iter().any(|peer| peer.ip().to_canonical() == client)
    }

    /// The gauges that workers are asked for: those of their pool's policy, and those of advice.
    pub fn wanted_gauges(&self, scored: impl Iterator<Item = GaugeName>) -> Vec<GaugeName> {
        let mut wanted: Vec<GaugeName> = scored.collect();
        let advised = self.multipliers.iter().filter(|_| self.listen.is_some());
        for &(name, multiplier) in advised {
            if multiplier != 0.0 && !wanted.contains(&name) {
                wanted.push(name);
            }
        }
        wanted
    }

    /// The terms of the score: those of the pool's policy, changed by the multipliers.
    pub fn terms(&self, mut terms: Terms) -> Terms {
        if let Some(connections) = self.connections {
            terms.connections = connections;
        }
        for &(gauge, multiplier) in &self.multipliers {
            terms.set(gauge, multiplier);
        }
        terms
    }
}

/// Default of `advice_allow`: this machine and private networks.
fn private_networks() -> Vec<IpNet> {
    let v4 = |a, b, length| Ipv4Net::new(Ipv4Addr::new(a, b, 0, 0), length).map(IpNet::from);
    let v6 = |first, length| {
        Ipv6Net::new(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), length).map(IpNet::from)
    };
    let own = Ipv6Net::new(Ipv6Addr::LOCALHOST, 128).map(IpNet::from);
    [
        v4(127, 0, 8),
        v4(10, 0, 8),
        v4(172, 16, 12),
        v4(192, 168, 16),
        v4(169, 254, 16),
        own,
        v6(0xfc00, 7),
        v6(0xfe80, 10),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// `[advice]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AdviceKeys {
    pub mode: Option<Spanned<Mode>>,
    pub interval: Option<Spanned<Wait<10, YEAR>>>,
    pub request_timeout: Option<Spanned<Wait<1, 10_000>>>,
    pub valid_for: Option<Spanned<Wait<1, YEAR>>>,
    pub multiplier: Option<Spanned<BTreeMap<Spanned<String>, Spanned<Multiplier>>>>,
    pub history: Option<Spanned<Count<0, 1_000>>>,
}

/// `[[advice_peer]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PeerKeys {
    pub address: Spanned<String>,
}

/// All keys but `advertise`.
pub(super) fn advice(check: &mut Check<'_>, file: &File) -> AdviceSettings {
    let mut settings = AdviceSettings::default();
    if let Some(text) = &file.advice_listen {
        let address = text.get_ref().parse().map_err(|_| {
            Mistake::new(text.span(), "not an address and a port")
                .help("write \"0.0.0.0:9901\", \"[::]:9901\", or one address of this machine")
        });
        settings.listen = check.keep(address);
    } else {
        let spans = [
            file.advice_allow.as_ref().map(Spanned::span),
            file.advice_detail.as_ref().map(Spanned::span),
            file.advice.as_ref().map(Spanned::span),
            file.advice_peer.first().map(Spanned::span),
        ];
        for span in spans.into_iter().flatten() {
            check.warn(Mistake::new(span, "this has no effect without `advice_listen`"));
        }
    }
    if let Some(list) = &file.advice_allow {
        settings.allow = networks(check, Some(list.get_ref()));
    }
    settings.detail = file.advice_detail.as_ref().is_some_and(|flag| *flag.get_ref());
    for keys in &file.advice_peer {
        let text = &keys.get_ref().address;
        let peer = peer(text);
        let Some(peer) = check.keep(peer) else { continue };
        if settings.peers.contains(&peer) {
            let message = format!("there is an advice peer {peer} already");
            check.mistake(Mistake::new(text.span(), message));
        } else if settings.peers.len() == MAX_ADVICE_PEERS {
            let message = format!("more than {MAX_ADVICE_PEERS} advice peers");
            check.mistake(Mistake::new(text.span(), message));
            break;
        } else {
            settings.peers.push(peer);
        }
    }
    if let Some(keys) = &file.advice {
        table(check, keys.get_ref(), &mut settings);
    }
    settings
}

fn table(check: &mut Check<'_>, keys: &AdviceKeys, settings: &mut AdviceSettings) {
    if let Some(timeout) = &keys.request_timeout {
        settings.request_timeout = timeout.get_ref().0;
    }
    if let Some(valid_for) = &keys.valid_for {
        settings.valid_for = valid_for.get_ref().0;
    }
    settings.history = keys.history.as_ref().map_or(0, |history| history.get_ref().0);
    if keys.mode.as_ref().is_some_and(|mode| *mode.get_ref() == Mode::Fresh) {
        settings.interval = None;
        if let Some(interval) = &keys.interval {
            check.warn(
                Mistake::new(interval.span(), "`interval` has no effect in this mode")
                    .help("set mode = \"interval\""),
            );
        }
    } else if let Some(interval) = &keys.interval {
        settings.interval = Some(interval.get_ref().0);
    }
    if settings.interval.is_some_and(|interval| interval >= settings.valid_for) {
        let spans =
            [keys.valid_for.as_ref().map(Spanned::span), keys.interval.as_ref().map(Spanned::span)];
        let span = spans.into_iter().flatten().next().unwrap_or(0..0);
        check.mistake(
            Mistake::new(span, "`valid_for` must be longer than `interval`")
                .help("otherwise figures are too old before they are collected again"),
        );
    }
    if settings.interval.is_none() && settings.request_timeout >= settings.valid_for {
        check.mistake(fresh_too_late(keys, settings));
    }
    if let Some(multipliers) = &keys.multiplier {
        read_multipliers(check, multipliers.get_ref(), settings);
    }
}

/// A request that waits for a silent peer would find the figures of all others too old.
fn fresh_too_late(keys: &AdviceKeys, settings: &AdviceSettings) -> Mistake {
    let spans = [
        keys.request_timeout.as_ref().map(Spanned::span),
        keys.valid_for.as_ref().map(Spanned::span),
        keys.mode.as_ref().map(Spanned::span),
    ];
    let span = spans.into_iter().flatten().next().unwrap_or(0..0);
    let shown = |time: Duration| humantime::format_duration(time).to_string();
    let (timeout, valid_for) = (shown(settings.request_timeout), shown(settings.valid_for));
    Mistake::new(span, "`request_timeout` must be shorter than `valid_for` with mode = \"fresh\"")
        .help(format!(
            "a silent peer delays an answer by request_timeout ({timeout}), and figures older than \
             valid_for ({valid_for}) are left out: make valid_for longer or request_timeout shorter"
        ))
}

fn read_multipliers(
    check: &mut Check<'_>,
    multipliers: &BTreeMap<Spanned<String>, Spanned<Multiplier>>,
    settings: &mut AdviceSettings,
) {
    let mut multipliers: Vec<_> = multipliers.iter().collect();
    multipliers.sort_by_key(|(name, _)| name.span().start);
    for (name, multiplier) in multipliers {
        let (text, multiplier) = (name.get_ref().as_str(), multiplier.get_ref().0);
        if text == CONNECTIONS {
            settings.connections = Some(multiplier);
            continue;
        }
        let Some(gauge) = super::scores::gauge(check, name) else { continue };
        if settings.multipliers.len() == MOST_GAUGES {
            let message = format!("more than {MOST_GAUGES} gauges");
            check.mistake(Mistake::new(name.span(), message));
            return;
        }
        settings.multipliers.push((gauge, multiplier));
    }
}

/// The address of a peer.
fn peer(text: &Spanned<String>) -> Checked<SocketAddr> {
    let word = text.get_ref().as_str();
    let Ok(address) = word.parse::<SocketAddr>() else {
        let help = match word.parse::<IpAddr>() {
            Ok(ip) => {
                format!("add the port of its advice_listen: \"{}\"", SocketAddr::new(ip, 9901))
            }
            Err(_) => {
                "write its advice_listen, such as \"10.0.0.2:9901\": host names are not resolved"
                    .to_owned()
            }
        };
        return Err(Mistake::new(text.span(), format!("`{word}` is not an address")).help(help));
    };
    specific(address.ip(), address.port(), text.span())?;
    Ok(address)
}

/// Refuses addresses that no client can connect to.
fn specific(ip: IpAddr, port: u16, span: Range<usize>) -> Checked<()> {
    if ip.to_canonical().is_unspecified() {
        return Err(Mistake::new(
            span,
            format!("`{ip}` stands for all addresses: no client can connect to it"),
        )
        .help("write the one address that others connect to"));
    }
    if ip.is_multicast() {
        return Err(Mistake::new(span, format!("`{ip}` is a multicast address")));
    }
    if port == 0 {
        return Err(Mistake::new(span, "port 0 stands for any port: no client can connect to it"));
    }
    Ok(())
}

/// `advertise`: `HOST:PORT` with an IP address or a host name.
pub(super) fn advertise(text: &Spanned<String>) -> Checked<String> {
    let word = text.get_ref().as_str();
    if let Ok(address) = word.parse::<SocketAddr>() {
        specific(address.ip(), address.port(), text.span())?;
        return Ok(address.to_string());
    }
    let mistake = |help: String| {
        Mistake::new(text.span(), format!("`{word}` is not an address to connect to")).help(help)
    };
    let general = || {
        "write what clients connect to: \"203.0.113.5:443\", \"[2001:db8::5]:443\" or \
         \"www1.example.org:443\""
            .to_owned()
    };
    if let Ok(ip) = word.parse::<IpAddr>() {
        return Err(mistake(format!("add a port: \"{}\"", SocketAddr::new(ip, 443))));
    }
    let Some((host, port)) = word.rsplit_once(':') else {
        return Err(mistake(match is_host_name(word) {
            true => format!("add a port: \"{word}:443\""),
            false => general(),
        }));
    };
    if host == "*" {
        let message = "`*` stands for all addresses: no client can connect to it";
        return Err(
            Mistake::new(text.span(), message).help("write the one address that others connect to")
        );
    }
    match port.parse::<u16>() {
        Err(_) => Err(mistake("a port is a number from 1 to 65535".to_owned())),
        Ok(0) => Err(mistake("port 0 stands for any port".to_owned())),
        Ok(_) if !is_host_name(host) || word.len() > MAX_ADVERTISE => Err(mistake(general())),
        Ok(_) => Ok(word.to_owned()),
    }
}

/// Whether clients can resolve this as a host name.
fn is_host_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    // Four numbers are an address, and this one is not valid.
    let numeric = name.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    name.len() <= 253 && name.split('.').all(label) && !numeric
}

/// An address as advice gives it: `HOST:PORT` that is not a wildcard.
pub fn is_advisable(address: &str) -> bool {
    advertise(&Spanned::new(0..0, address.to_owned())).is_ok()
}

/// Warns about listeners that advice cannot name, and about `advertise` without advice.
pub(super) fn check_advertised(
    check: &mut Check<'_>,
    advice: &AdviceSettings,
    listeners: &[Listener],
    keys: &[Spanned<ListenerKeys>],
) {
    let keys_of = |listener: &Listener| {
        keys.iter().map(Spanned::get_ref).find(|keys| *keys.name.get_ref() == listener.name)
    };
    for listener in listeners {
        let Some(keys) = keys_of(listener) else { continue };
        let Some(listen) = advice.listen else {
            if let Some(useless) = &keys.advertise {
                let message = "`advertise` has no effect without `advice_listen`";
                check.warn(Mistake::new(useless.span(), message));
            }
            continue;
        };
        // If one listener of a pool has the key, the others are not advised.
        let same_pool = |other: &&Listener| other.pool == listener.pool;
        if listeners.iter().filter(same_pool).any(|other| other.advertise.is_some()) {
            continue;
        }
        let message = match &listener.address {
            Address::Tcp(address) if address.ip().to_canonical().is_unspecified() => {
                "advice cannot name this listener: it listens on all addresses"
            }
            Address::Tcp(address)
                if address.ip().to_canonical().is_loopback()
                    && !listen.ip().to_canonical().is_loopback() =>
            {
                "advice does not name this listener: other machines cannot connect to it"
            }
            Address::Unix(_) => "advice cannot name this listener: it is a Unix socket",
            // Its addresses are known when it is inherited.
            Address::Tcp(_) | Address::Systemd(_) => continue,
        };
        check.warn(
            Mistake::new(keys.address.span(), message)
                .help("add advertise = \"HOST:PORT\" with the address that clients connect to"),
        );
    }
}

/// `admin_http` and `advice_listen` must differ.
pub(super) fn check_http(
    file: &File,
    admin: Option<SocketAddr>,
    advice: Option<SocketAddr>,
) -> Checked<()> {
    match (admin, advice, &file.advice_listen) {
        (Some(admin), Some(advice), Some(text)) if admin == advice && admin.port() != 0 => {
            Err(Mistake::new(text.span(), "this is the address of `admin_http` already")
                .help("use a different port for each"))
        }
        (_, _, _) => Ok(()),
    }
}
