//! The configuration of `dispatcher demo`, which has no file.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::{
    Address, AdviceSettings, Config, Limits, Listener, ListenerOptions, OnDispatcherLoss, Pool,
    ProcessSetup, ReadyCheck, RelaySettings, Spawn, UnixEndpoint, UnixSource, accounts, literal,
};
use dispatcher_core::{AccessRules, AllowedAccounts, PoolSettings};

impl Config {
    /// One listener `web` and one pool `web` with `workers` processes of `command`. Everything else
    /// has its default, except that only the own user can connect to both sockets.
    pub fn demo(
        listen: SocketAddr,
        workers: u32,
        admin_socket: PathBuf,
        dispatch_socket: PathBuf,
        relay_socket: PathBuf,
        command: Vec<String>,
    ) -> Config {
        let private = |path: PathBuf| UnixEndpoint {
            source: UnixSource::Path(path),
            mode: 0o600,
            user: None,
            group: None,
        };
        Config {
            file: None,
            dispatch_socket: private(dispatch_socket),
            admin_socket: private(admin_socket),
            listeners: vec![Listener {
                name: "web".to_owned(),
                address_text: listen.to_string(),
                address: Address::Tcp(listen),
                pool: 0,
                advertise: None,
                options: ListenerOptions::default(),
                access_rules: AccessRules::default(),
                proxy: None,
            }],
            pools: vec![Pool {
                settings: PoolSettings {
                    name: "web".to_owned(),
                    access: AllowedAccounts { users: accounts::own_and_root(), groups: Vec::new() },
                    processes: workers,
                    ..PoolSettings::default()
                },
                unavailable_response: None,
                agent_listen: None,
                steer: None,
                line: None,
                spawn: Some(Spawn {
                    command: command.iter().map(|word| literal(word)).collect(),
                    max_memory: None,
                    setup: ProcessSetup::default(),
                    processes: workers,
                    fork: false,
                    environment: Vec::new(),
                    directory: None,
                    address: None,
                    on_dispatcher_loss: OnDispatcherLoss::default(),
                    ready_check: ReadyCheck::default(),
                }),
            }],
            limits: Limits::default(),
            admin_http: None,
            admin_http_hosts: Vec::new(),
            advice: AdviceSettings::default(),
            relay: RelaySettings::default(),
            steer_pins: None,
            warnings: Vec::new(),
        }
        .with_directory(relay_socket)
    }
}
