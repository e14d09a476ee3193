//! The configuration of `dispatcher demo`, which has no file.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::{
    Address, Config, HANDOFF_TIMEOUT, Limits, Listener, ListenerOptions, PROBATION, Pool, Spawn,
    UnixEndpoint, UnixSource, WAIT_FOR_WORKER, accounts,
};
use crate::pool::{Access, Policy, PoolSettings, Screening};

impl Config {
    /// One listener `web`, one pool `web`, `workers` processes of `command`; everything else as by default,
    /// and both sockets only for ourselves.
    pub fn demo(
        listen: SocketAddr,
        workers: u32,
        admin_socket: PathBuf,
        dispatch_socket: PathBuf,
        command: Vec<String>,
    ) -> Config {
        let private = |path: PathBuf| UnixEndpoint {
            source: UnixSource::Path(path),
            mode: 0o600,
            user: None,
            group: None,
        };
        Config {
            dispatch_socket: private(dispatch_socket),
            admin_socket: private(admin_socket),
            listeners: vec![Listener {
                name: "web".to_owned(),
                address_text: listen.to_string(),
                address: Address::Tcp(listen),
                pool: 0,
                options: ListenerOptions::default(),
                screening: Screening::default(),
            }],
            pools: vec![Pool {
                settings: PoolSettings {
                    name: "web".to_owned(),
                    policy: Policy::LeastConnections,
                    max_connections_per_worker: 10_000,
                    max_untaken: 256,
                    max_workers: 4096,
                    handoff_timeout: HANDOFF_TIMEOUT,
                    probation: PROBATION,
                    wait_for_worker: WAIT_FOR_WORKER,
                    access: Access { users: accounts::own_and_root(), groups: Vec::new() },
                    processes: workers,
                },
                unavailable_response: None,
                spawn: Some(Spawn {
                    command,
                    processes: workers,
                    environment: Vec::new(),
                    directory: None,
                }),
            }],
            limits: Limits::default(),
            warnings: Vec::new(),
        }
    }
}
