//! `mode = "steer"`: the kernel chooses the worker of each connection.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// How a pool is steered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steer {
    /// Workers that others start: `[[pool.NAME.member]]`. Empty if the pool starts processes.
    pub members: Vec<Member>,
    /// Where the processes listen.
    pub ports: Ports,
    /// The address of the processes, `{addr}`.
    pub address: IpAddr,
    /// `fallback = "pass"`: where the kernel cannot choose, connections are passed to workers with
    /// the SDK.
    pub fallback: bool,
}

/// Where the processes of a steered pool listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Each at an address of its own: `{addr}` and `{port}`.
    Own,
    /// All at the public address, with inherited listeners: `{fd}`, `LISTEN_FDS`.
    Shared,
}

/// A worker of a steered pool that others start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its cgroup v2 directory.
    pub cgroup: PathBuf,
    /// Its share relative to others.
    pub weight: u16,
    /// For `failover`.
    pub priority: u16,
}
