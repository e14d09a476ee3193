//! The affinity key of a pool, and the wait for the first bytes that contain it.

use serde::Deserialize;
use toml::Spanned;

use super::error::Mistake;
use super::file::PoolKeys;
use super::hints;
use super::validate::Checked;
use super::value::{Count, Wait, YEAR};
use dispatcher_core::KeySource;
use dispatcher_core::{Affinity, Peek};

/// `[pool.NAME.affinity]`. No key is required here, because `[defaults.affinity]` may contain it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AffinityKeys {
    pub key: Option<Spanned<String>>,
    pub ipv4_prefix: Option<Spanned<Count<1, 32>>>,
    pub ipv6_prefix: Option<Spanned<Count<1, 128>>>,
    pub ttl: Option<Wait<1, YEAR>>,
    pub max_entries: Option<Count<1, 16_777_216>>,
}

/// The settings, and warnings about keys without effect.
pub(super) struct AffinitySettings {
    pub affinity: Option<Affinity>,
    pub peek: Peek,
    pub useless: Vec<Mistake>,
}

/// `awaits_headers`: a listener of the pool has `proxy_protocol`.
pub(super) fn affinity_settings(
    keys: &PoolKeys,
    defaults: &PoolKeys,
    awaits_headers: bool,
) -> Checked<AffinitySettings> {
    let affinity = affinity(keys.affinity.as_ref(), defaults.affinity.as_ref())?;
    let default = Peek::default();
    let peek = Peek {
        timeout: keys
            .peek_timeout
            .as_ref()
            .or(defaults.peek_timeout.as_ref())
            .map_or(default.timeout, |w| w.get_ref().0),
        max_bytes: keys
            .peek_max_bytes
            .as_ref()
            .or(defaults.peek_max_bytes.as_ref())
            .map_or(default.max_bytes, |n| n.get_ref().0),
        max_awaiting: keys
            .max_awaiting
            .as_ref()
            .or(defaults.max_awaiting.as_ref())
            .map_or(default.max_awaiting, |n| n.get_ref().0),
    };
    let useless = useless(keys, affinity.as_ref().map(|affinity| &affinity.key), awaits_headers);
    Ok(AffinitySettings { affinity, peek, useless })
}

fn affinity(
    own: Option<&Spanned<AffinityKeys>>,
    defaults: Option<&Spanned<AffinityKeys>>,
) -> Checked<Option<Affinity>> {
    let tables = [own, defaults].map(|table| table.map(Spanned::get_ref));
    let pick = |get: fn(&AffinityKeys) -> Option<u32>| tables.into_iter().flatten().find_map(get);
    let Some(text) = tables.into_iter().flatten().find_map(|keys| keys.key.as_ref()) else {
        return match own {
            Some(table) => Err(Mistake::absence(table.span(), "missing key `key`")
                .help("set the kind of key, such as key = \"cookie:SESSION\"")),
            None => Ok(None),
        };
    };
    let bits = |bits: Option<u32>, default: u8| {
        bits.and_then(|bits| u8::try_from(bits).ok()).unwrap_or(default)
    };
    let ipv4_prefix = bits(pick(|keys| keys.ipv4_prefix.as_ref().map(|n| n.get_ref().0)), 32);
    let ipv6_prefix = bits(pick(|keys| keys.ipv6_prefix.as_ref().map(|n| n.get_ref().0)), 64);
    Ok(key(text, ipv4_prefix, ipv6_prefix)?.map(|key| Affinity {
        key,
        ttl: tables
            .into_iter()
            .flatten()
            .find_map(|keys| keys.ttl)
            .map_or(Affinity::DEFAULT_TTL, |w| w.0),
        max_entries: pick(|keys| keys.max_entries.map(|n| n.0))
            .unwrap_or(Affinity::DEFAULT_MAX_ENTRIES),
    }))
}

/// Kinds of keys; those with `true` need a name.
const KINDS: [(&str, bool); 7] = [
    ("client-ip", false),
    ("cookie", true),
    ("url", true),
    ("form", true),
    ("header", true),
    ("sni", false),
    ("none", false),
];

fn key(text: &Spanned<String>, ipv4_prefix: u8, ipv6_prefix: u8) -> Checked<Option<KeySource>> {
    let mistake = |message: String| Mistake::new(text.span(), message);
    let word = text.get_ref().as_str();
    let (kind, name) = match word.split_once(':') {
        Some((kind, name)) => (kind, Some(name)),
        None => (word, None),
    };
    let Some((_, has_name)) = KINDS.into_iter().find(|&(known, _)| known == kind) else {
        let all = KINDS.map(|(known, _)| known);
        return Err(mistake(format!("unknown kind of key `{kind}`")).help(hints::value_of(
            kind,
            "the kinds are",
            &all,
        )));
    };
    let name = match (has_name, name) {
        (true, None | Some("")) => {
            return Err(mistake(format!("`{kind}` needs a name"))
                .help(format!("write \"{kind}:NAME\", such as \"{kind}:{}\"", example(kind))));
        }
        (false, Some(_)) => {
            return Err(
                mistake(format!("`{kind}` takes no name")).help(format!("write \"{kind}\" alone"))
            );
        }
        (_, name) => name.unwrap_or_default(),
    };
    let is_token = |byte: u8| byte.is_ascii_graphic() && !b"()<>@,;:\\\"/[]?={}".contains(&byte);
    let good = match kind {
        "cookie" | "header" => name.bytes().all(is_token),
        _ => !name.chars().any(char::is_control),
    };
    if !good {
        return Err(mistake(format!("{name:?} cannot be the name of a {kind}"))
            .help("write it as clients send it, without quotes and spaces"));
    }
    let name = name.to_owned();
    Ok(match kind {
        "client-ip" => Some(KeySource::ClientIp { ipv4_prefix, ipv6_prefix }),
        "cookie" => Some(KeySource::Cookie(name)),
        "url" => Some(KeySource::Url(name)),
        "form" => Some(KeySource::Form(name)),
        "header" => Some(KeySource::Header(name)),
        "sni" => Some(KeySource::Sni),
        _ => None,
    })
}

fn example(kind: &str) -> &'static str {
    match kind {
        "cookie" => "JSESSIONID",
        "url" => "jsessionid",
        "header" => "X-Session",
        _ => "session",
    }
}

/// Keys of the pool that have no effect.
fn useless(keys: &PoolKeys, key: Option<&KeySource>, awaits_headers: bool) -> Vec<Mistake> {
    let mut spans = Vec::new();
    if let Some(table) = &keys.affinity
        && !matches!(key, Some(KeySource::ClientIp { .. }))
    {
        let AffinityKeys { ipv4_prefix, ipv6_prefix, .. } = table.get_ref();
        let without = "this has no effect without key = \"client-ip\"";
        spans.extend(ipv4_prefix.as_ref().map(|n| (n.span(), without)));
        spans.extend(ipv6_prefix.as_ref().map(|n| (n.span(), without)));
    }
    if !key.is_some_and(KeySource::is_peeked) {
        let without =
            "this has no effect without an `affinity.key` that is in a client's first bytes";
        spans.extend(keys.peek_timeout.as_ref().map(|w| (w.span(), without)));
        spans.extend(keys.peek_max_bytes.as_ref().map(|n| (n.span(), without)));
        let max_awaiting = keys.max_awaiting.as_ref().filter(|_| !awaits_headers);
        spans.extend(max_awaiting.map(|n| (n.span(), without)));
    }
    spans.into_iter().map(|(span, message)| Mistake::new(span, message)).collect()
}
