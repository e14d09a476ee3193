//! A network namespace of the bench's own: what the kernel does there concerns no other program.

use std::fs::File;
use std::io;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

/// The calling thread, and what it starts, is in a namespace of its own until this is dropped.
#[derive(Debug)]
pub struct Namespace {
    before: File,
}

impl Namespace {
    pub fn enter() -> io::Result<Namespace> {
        let before = File::open("/proc/thread-self/ns/net")?;
        unshare(CloneFlags::CLONE_NEWNET)?;
        let namespace = Namespace { before };
        let status = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
        if !status.success() {
            return Err(io::Error::other("`ip link set lo up` failed"));
        }
        Ok(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.before, CloneFlags::CLONE_NEWNET) {
            eprintln!("bench: the former network namespace: {error}");
        }
    }
}
