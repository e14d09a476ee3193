//! What the tests of shared ports have more: the calling thread opens listeners, in a cgroup of its
//! own, and workers in another cgroup inherit them.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use dispatch_steer::{Options, Steering, WorkerSettings, machine};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_support::{descriptors, wait_until};

use crate::lab::*;

pub const BACKLOG: u32 = 4096;

/// Serves the listeners that it inherits (`LISTEN_FDS`), as the keepers of other tests do.
pub const HEIR: &str = r#"
import os, socket, selectors
assert int(os.environ["LISTEN_PID"]) == os.getpid()
many = int(os.environ["LISTEN_FDS"])
listeners = [socket.socket(fileno=3 + n) for n in range(many)]
kept = []
poll = selectors.DefaultSelector()
for listener in listeners:
    listener.setblocking(False)
    poll.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in poll.select():
        if key.fileobj in listeners:
            # Closed for a moment, or another process was faster.
            try: client, _ = key.fileobj.accept()
            except OSError: continue
            client.sendall(b"hello\n")
            poll.register(client, selectors.EVENT_READ)
            continue
        try: data = key.fileobj.recv(4096)
        except OSError: data = b""
        if data == b"half\n": continue
        if data == b"" and key.data == "stay":
            poll.unregister(key.fileobj); kept.append(key.fileobj); continue
        if data == b"stay\n": poll.modify(key.fileobj, selectors.EVENT_READ, "stay"); continue
        poll.unregister(key.fileobj); key.fileobj.close()
"#;

/// Has its listeners and never accepts.
pub const IDLE: &str = "import time; time.sleep(600)";

/// A cgroup for the calling thread: a process of the tests has many threads, and the cgroup of a
/// socket is that of the thread that makes it.
pub struct Home {
    parent: PathBuf,
    own: PathBuf,
}

impl Home {
    pub fn new() -> Home {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = machine::cgroup2_mount(&mounts).unwrap();
        let parent = root.join(thread_cgroup().trim_start_matches('/'));
        let own = parent.join(format!("dispatch-steer-thread-{}", nix::unistd::gettid()));
        fs::create_dir(&own).unwrap();
        fs::write(own.join("cgroup.type"), "threaded").unwrap();
        fs::write(own.join("cgroup.threads"), "0").unwrap();
        Home { parent, own }
    }

    pub fn path(&self) -> PathBuf {
        self.own.clone()
    }
}

fn thread_cgroup() -> String {
    let all = fs::read_to_string("/proc/thread-self/cgroup").unwrap();
    all.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned()
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::write(self.parent.join("cgroup.threads"), "0");
        // A process that this thread started leaves a moment after it was waited for.
        for _ in 0..400 {
            if fs::remove_dir(&self.own).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Lab {
    /// As [`Lab::with_wait`], with this many workers that share [`V4`].
    pub fn sharing(many: u32) -> Option<Lab> {
        let mut lab = Lab::without_heirs(Duration::ZERO)?;
        for _ in 0..many {
            let worker = lab.enlist();
            lab.inherit(worker, HEIR, &[V4]);
        }
        Some(lab)
    }

    /// A pool with shared ports and without workers.
    pub fn without_heirs(wait: Duration) -> Option<Lab> {
        if !can_steer() || !has(&["ip", "ss", "python3", "sh"]) || !descriptors(8_000) {
            return None;
        }
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        run("ip link set lo up");
        let home = Home::new();
        let steering = Steering::load_shared(&Options { cgroup: home.path(), wait }).unwrap();
        let (files, cgroup) = (tempfile::tempdir().unwrap(), Cgroup::new());
        let home = Some(home);
        Some(Lab { steering: Some(steering), servers: Vec::new(), files, cgroup, home })
    }

    /// Adds a worker without a process and without listeners.
    pub fn enlist(&mut self) -> u32 {
        let worker = self.servers.len() as u32;
        self.steering().set_worker(worker, WorkerSettings::new(1)).unwrap();
        let child = Command::new("true").spawn().unwrap();
        self.servers.push(Server { port: PUBLIC, child });
        worker
    }

    /// Starts a process for a worker that inherits its listeners at these addresses, two at most.
    pub fn inherit(&mut self, worker: u32, code: &str, at: &[SocketAddr]) {
        let open = |address: &SocketAddr| {
            self.steering.as_mut().unwrap().open_listener(worker, *address, BACKLOG).unwrap()
        };
        let listeners = at.iter().map(open).collect();
        self.hand_over(worker, code, listeners);
    }

    pub fn hand_over(&mut self, worker: u32, code: &str, listeners: Vec<OwnedFd>) {
        let many = listeners.len();
        let mut listeners = listeners.into_iter().map(Stdio::from);
        let script = "export LISTEN_PID=$$; exec \"$@\" 3<&0 4<&1 0</dev/null 1>/dev/null";
        let words = ["sh", "-c", script, "sh", "python3", "-c", code];
        let child = self
            .in_cgroup(words.into_iter())
            .env("LISTEN_FDS", many.to_string())
            .stdin(listeners.next().unwrap())
            .stdout(listeners.next().unwrap_or_else(Stdio::null))
            .stderr(File::create(self.log_of(worker)).unwrap())
            .spawn()
            .unwrap();
        let mut old = std::mem::replace(&mut self.servers[worker as usize].child, child);
        let _ = old.kill();
        let _ = old.wait();
    }

    /// Sends a signal to the process of a worker; waits until it has stopped.
    pub fn signal(&mut self, worker: u32, signal: Signal) {
        let pid = self.servers[worker as usize].child.id();
        kill(Pid::from_raw(pid as i32), signal).unwrap();
        if signal == Signal::SIGSTOP {
            wait_until("the process to stop", || {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
                status.contains("State:\tT")
            });
        }
    }

    /// Kills the process of a worker; its listeners stay open.
    pub fn slay(&mut self, worker: u32) {
        let child = &mut self.servers[worker as usize].child;
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
