//! A process of a test.

use std::path::Path;
use std::process::{Child, Command, ExitStatus};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{wait_for, wait_until};

/// A process that is killed when dropped.
pub struct Process {
    pub child: Child,
    pub name: String,
}

impl Process {
    pub fn start(name: &str, command: &mut Command) -> Process {
        let child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        Process { child, name: name.to_owned() }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Waits until a signal of control finds a handler: a process that has just started would die
    /// of it.
    pub fn signal(&self, signal: Signal) {
        let handled = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1];
        if handled.contains(&signal) || signal == Signal::SIGUSR2 {
            wait_until(&format!("{} to handle {signal}", self.name), || self.handles(signal));
        }
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// True if the signal does not end the process, or if it has ended.
    fn handles(&self, signal: Signal) -> bool {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(path).unwrap_or_default();
        let masks = ["SigBlk:", "SigIgn:", "SigCgt:", "State:\tZ"];
        status.is_empty()
            || status.lines().any(|line| {
                let mask = masks.iter().find_map(|name| line.strip_prefix(name));
                let number = |text: &str| u64::from_str_radix(text.trim(), 16).unwrap_or(u64::MAX);
                mask.map_or(0, number) >> (signal as u32 - 1) & 1 == 1
            })
    }

    /// Sends SIGKILL and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until the process ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let name = self.name.clone();
        wait_for(&format!("the end of {name}"), || self.child.try_wait().unwrap())
    }

    pub fn running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Leaves the process only `spare` more descriptors; `None` restores the limit.
    pub fn limit_descriptors(&self, spare: Option<usize>) {
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        // The limit applies to descriptor numbers, not to their count.
        let free = |number: &u64| !Path::new(&format!("/proc/{}/fd/{number}", self.pid())).exists();
        let lowest_forbidden = spare.and_then(|spare| (0..).filter(free).nth(spare));
        let current = lowest_forbidden.or(most);
        let limit = rustix::process::Rlimit { current, maximum: most };
        // Fails if the process has just ended.
        let pid = rustix::process::Pid::from_raw(self.pid());
        let _ = rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit);
    }

    /// Memory of the process, in KiB.
    pub fn memory(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(path).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    /// Open descriptors of the process.
    pub fn fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A stopped process dies of SIGKILL too.
        self.kill();
    }
}
