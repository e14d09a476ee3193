//! The file in the form that serde reads: every table and key, before any check across keys.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, Visitor, value};
use toml::Spanned;

use super::advice::{AdviceKeys, PeerKeys};
use super::affinity::AffinityKeys;
use super::relay::DirectoryKey;
use super::scores::ScoreKeys;
use super::spawn::{AJitter, ASurge};
use super::steer::{Fallback, MemberKeys, ModeName, PinsKey, PortsName};
use super::value::{
    ACount, AMask, AMode, ASize, AnAccount, Count, Either, KERNEL_SECONDS, SECOND, Wait, Whole,
    YEAR,
};
use super::{MAX_PROCESSES, OnDispatcherLoss, Output};
use dispatcher_core::Policy;

/// The top level.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub dispatch_socket: Option<Spanned<String>>,
    pub dispatch_socket_mode: Option<Spanned<Either<AMode>>>,
    pub dispatch_socket_user: Option<Spanned<Either<AnAccount>>>,
    pub dispatch_socket_group: Option<Spanned<Either<AnAccount>>>,
    pub admin_socket: Option<Spanned<String>>,
    pub admin_socket_mode: Option<Spanned<Either<AMode>>>,
    pub admin_socket_user: Option<Spanned<Either<AnAccount>>>,
    pub admin_socket_group: Option<Spanned<Either<AnAccount>>>,
    pub admin_http: Option<Spanned<String>>,
    pub admin_http_allow_remote: Option<Spanned<bool>>,
    pub admin_http_hosts: Option<Spanned<Vec<Spanned<String>>>>,
    pub advice_listen: Option<Spanned<String>>,
    pub advice_allow: Option<Spanned<Vec<Spanned<String>>>>,
    pub advice_detail: Option<Spanned<bool>>,
    pub advice: Option<Spanned<AdviceKeys>>,
    #[serde(default)]
    pub advice_peer: Vec<Spanned<PeerKeys>>,
    pub accept_batch: Option<Count<1, 4096>>,
    pub hello_timeout: Option<Wait<1, YEAR>>,
    pub max_pending_hellos: Option<Count<1, 65_536>>,
    pub stop_timeout: Option<Wait<0, YEAR>>,
    pub resource_pause: Option<Wait<1, YEAR>>,
    pub busy_poll: Option<Wait<0, 1000>>,
    pub fault_history: Option<Count<0, 1000>>,
    pub log_level: Option<LogLevel>,
    pub metrics_max_workers: Option<Count<0, 65_536>>,
    pub relay_ticket_key: Option<PathBuf>,
    pub steer_pins: Option<Spanned<PinsKey>>,
    pub relay_directory: Option<Spanned<DirectoryKey>>,
    pub relay_socket: Option<Spanned<String>>,
    pub max_handshakes: Option<Count<1, 65_536>>,
    pub connect_rate: Option<Count<1, 1_000_000>>,
    pub join_rate: Option<Count<1, 1_000_000>>,
    pub join_burst: Option<Count<1, 1_000_000>>,
    pub admin_rate: Option<Count<1, 1_000_000>>,
    pub closing_threads: Option<Count<1, 256>>,
    pub max_closing: Option<Count<16, 1_000_000>>,
    pub defaults: Option<PoolKeys>,
    #[serde(default)]
    pub listener: Vec<Spanned<ListenerKeys>>,
    #[serde(default)]
    pub pool: BTreeMap<Spanned<String>, PoolKeys>,
}

/// The values of `log_level`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> log::LevelFilter {
        match level {
            LogLevel::Off => log::LevelFilter::Off,
            LogLevel::Error => log::LevelFilter::Error,
            LogLevel::Warn => log::LevelFilter::Warn,
            LogLevel::Info => log::LevelFilter::Info,
            LogLevel::Debug => log::LevelFilter::Debug,
            LogLevel::Trace => log::LevelFilter::Trace,
        }
    }
}

/// `[[listener]]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ListenerKeys {
    pub name: Spanned<String>,
    pub address: Spanned<String>,
    pub pool: Spanned<String>,
    pub advertise: Option<Spanned<String>>,
    pub backlog: Option<Spanned<Count<1, 1_000_000>>>,
    pub ipv6_only: Option<Spanned<bool>>,
    pub nodelay: Option<Spanned<bool>>,
    pub keepalive: Option<Spanned<Whole<SECOND, 1000, KERNEL_SECONDS>>>,
    pub keepalive_interval: Option<Spanned<Whole<SECOND, 1000, KERNEL_SECONDS>>>,
    pub keepalive_count: Option<Spanned<Count<1, 127>>>,
    pub user_timeout: Option<Spanned<Whole<1, 1, 2_147_483_647>>>,
    pub defer_accept: Option<Spanned<Whole<SECOND, 1000, KERNEL_SECONDS>>>,
    pub fast_open: Option<Spanned<Count<1, 65_535>>>,
    pub receive_buffer: Option<Spanned<Count<1, 1_073_741_823>>>,
    pub send_buffer: Option<Spanned<Count<1, 1_073_741_823>>>,
    pub reuse_port: Option<Spanned<bool>>,
    pub free_bind: Option<Spanned<bool>>,
    pub mode: Option<Spanned<Either<AMode>>>,
    pub allow: Option<Vec<Spanned<String>>>,
    pub deny: Option<Vec<Spanned<String>>>,
    pub rate_limit: Option<Spanned<String>>,
    pub rate_burst: Option<Spanned<Count<1, 1_000_000>>>,
    pub max_queued_per_client: Option<Spanned<Count<1, 1_000_000>>>,
    pub client_prefix_ipv4: Option<Spanned<Count<0, 32>>>,
    pub client_prefix_ipv6: Option<Spanned<Count<0, 128>>>,
    pub max_tracked_clients: Option<Spanned<Count<1, 16_777_216>>>,
    pub proxy_protocol: Option<Spanned<bool>>,
    pub proxy_protocol_from: Option<Spanned<Vec<Spanned<String>>>>,
    pub proxy_timeout: Option<Spanned<Wait<1, YEAR>>>,
    pub proxy_max_header: Option<Spanned<Count<232, 16_384>>>,
}

/// The names of the policies. They are repeated here because the core does not use serde.
#[derive(Deserialize)]
#[serde(remote = "Policy", rename_all = "kebab-case")]
enum PolicyName {
    LeastConnections,
    RoundRobin,
    Random,
    TwoChoices,
    Hash,
    Failover,
    LeastScore,
}

/// The value of `policy`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(transparent)]
pub(super) struct PolicyKey(#[serde(with = "PolicyName")] pub Policy);

/// `[pool.NAME]` and `[defaults]`, which have the same keys.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PoolKeys {
    pub policy: Option<Spanned<PolicyKey>>,
    pub mode: Option<Spanned<ModeName>>,
    pub fallback: Option<Spanned<Fallback>>,
    pub ports: Option<Spanned<PortsName>>,
    #[serde(default)]
    pub member: Vec<Spanned<MemberKeys>>,
    pub max_connections_per_worker: Option<Count<1, 10_000_000>>,
    pub max_untaken: Option<Spanned<Count<1, 4096>>>,
    pub max_workers: Option<Count<1, 65_536>>,
    pub handoff_timeout: Option<Wait<1, YEAR>>,
    pub max_handoff_timeout: Option<Wait<1, YEAR>>,
    pub wait_for_worker: Option<Wait<0, YEAR>>,
    pub scores: Option<Spanned<ScoreKeys>>,
    pub slow_start: Option<Wait<0, YEAR>>,
    pub history: Option<Spanned<Count<0, 10_000>>>,
    pub history_candidates: Option<Spanned<Count<1, 1024>>>,
    pub affinity: Option<Spanned<AffinityKeys>>,
    pub peek_timeout: Option<Spanned<Wait<1, YEAR>>>,
    pub peek_max_bytes: Option<Spanned<Count<256, 65_536>>>,
    pub max_awaiting: Option<Spanned<Count<1, 1_000_000>>>,
    pub agent_listen: Option<Spanned<String>>,
    pub agent_workers: Option<Spanned<Count<1, 65_536>>>,
    pub allow_users: Option<Vec<Spanned<Either<AnAccount>>>>,
    pub allow_groups: Option<Vec<Spanned<Either<AnAccount>>>>,
    pub unavailable_response: Option<Spanned<String>>,
    pub line_socket: Option<Spanned<String>>,
    pub line_socket_mode: Option<Spanned<Either<AMode>>>,
    pub line_types: Option<Spanned<BTreeMap<Spanned<String>, Spanned<String>>>>,
    pub spawn: Option<Spanned<SpawnKeys>>,
}

/// `[pool.NAME.spawn]`. No key is required here, because `[defaults.spawn]` may contain it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SpawnKeys {
    pub command: Option<Spanned<Vec<Spanned<String>>>>,
    pub processes: Option<Count<1, MAX_PROCESSES>>,
    pub fork: Option<Spanned<bool>>,
    pub environment: Option<BTreeMap<Spanned<String>, Spanned<String>>>,
    pub directory: Option<Spanned<String>>,
    pub on_dispatcher_loss: Option<OnDispatcherLoss>,
    pub user: Option<Spanned<Either<AnAccount>>>,
    pub group: Option<Spanned<Either<AnAccount>>>,
    pub umask: Option<Spanned<Either<AMask>>>,
    pub limits: Option<LimitKeys>,
    pub output: Option<OutputName>,
    pub output_rate: Option<Spanned<Count<1, 1_000_000>>>,
    pub start_timeout: Option<Wait<1, YEAR>>,
    pub stop_timeout: Option<Wait<0, YEAR>>,
    pub drain_timeout: Option<Wait<0, YEAR>>,
    pub kill_hung_after: Option<Wait<100, YEAR>>,
    pub max_age: Option<Wait<1000, YEAR>>,
    pub max_connections_served: Option<Count<1, { u32::MAX }>>,
    pub max_memory: Option<Spanned<Either<ASize>>>,
    pub jitter: Option<AJitter>,
    pub max_surge: Option<ASurge>,
    pub crash_loop_after: Option<Count<1, 1_000_000>>,
    pub max_restart_delay: Option<Wait<100, YEAR>>,
    pub ready_check: Option<Spanned<String>>,
    pub ready_timeout: Option<Wait<1, YEAR>>,
    pub min_ready: Option<Wait<0, YEAR>>,
    pub max_leaving_generations: Option<Count<0, 1024>>,
    pub on_failure: Option<OnFailure>,
}

/// The values of `on_failure`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum OnFailure {
    Stop,
    Undo,
}

/// `[pool.NAME.spawn.limits]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitKeys {
    pub nofile: Option<Spanned<Either<ACount>>>,
    pub core: Option<Spanned<Either<ASize>>>,
    pub memory: Option<Spanned<Either<ASize>>>,
}

/// The values of `output`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum OutputName {
    Inherit,
    Log,
}

impl From<OutputName> for Output {
    fn from(name: OutputName) -> Output {
        match name {
            OutputName::Inherit => Output::Inherit,
            OutputName::Log => Output::Log,
        }
    }
}

/// All tables with their keys, from the types above.
pub(super) fn tables() -> [(&'static str, &'static [&'static str]); 10] {
    [
        ("", keys_of::<File>()),
        ("[[listener]]", keys_of::<ListenerKeys>()),
        ("[advice]", keys_of::<AdviceKeys>()),
        ("[[advice_peer]]", keys_of::<PeerKeys>()),
        ("[pool.NAME]", keys_of::<PoolKeys>()),
        ("[[pool.NAME.member]]", keys_of::<MemberKeys>()),
        ("[pool.NAME.scores]", keys_of::<ScoreKeys>()),
        ("[pool.NAME.affinity]", keys_of::<AffinityKeys>()),
        ("[pool.NAME.spawn]", keys_of::<SpawnKeys>()),
        ("[pool.NAME.spawn.limits]", keys_of::<LimitKeys>()),
    ]
}

/// The keys of a table as serde knows them: the deserializer only records the list of fields.
fn keys_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    struct Listen<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Listen<'_> {
        type Error = value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, value::Error> {
            Err(value::Error::custom("not a table"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, value::Error> {
            *self.0 = fields;
            Err(value::Error::custom("only listening"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
            unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut keys: &'static [&'static str] = &[];
    // The error ends the deserialization.
    let _ = T::deserialize(Listen(&mut keys));
    keys
}
