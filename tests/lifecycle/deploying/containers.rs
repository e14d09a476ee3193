//! The section on containers, without an engine: `engine.sh` does the same with namespaces.

use std::net::SocketAddr;

use nix::sys::signal::kill;
use nix::unistd::{Pid, geteuid};
use tempfile::TempDir;

use super::*;

/// Containers that end with the test, however it ends.
struct Containers(TempDir);

impl Containers {
    fn new(address: SocketAddr) -> Containers {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        for name in ["volume", "containers"] {
            std::fs::create_dir(dir.join(name)).unwrap();
        }
        let text = one_pool("").replace("127.0.0.1:0", &address.to_string());
        std::fs::write(dir.join("dispatcher.toml"), text).unwrap();
        program(&dir.join("bin/podman"), include_str!("engine.sh"));
        std::os::unix::fs::symlink(dispatcher_bin(), dir.join("bin/dispatcher")).unwrap();
        Containers(temp)
    }

    /// Runs the commands of a block.
    fn follow(&self, block: &str) {
        let dir = self.0.path();
        let mut command = shell(dir, &BOUNDED, &format!("set -eu\n{block}"));
        command.env("SITE", dir).env("WORKER", example("test-worker"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{block}\n{output:?}\n{}", self.log("dispatcher"));
    }

    fn log(&self, name: &str) -> String {
        let path = self.0.path().join(format!("containers/{name}.log"));
        std::fs::read_to_string(path).unwrap_or_default()
    }

    /// The process of the engine that waits for a container.
    fn outer(&self, name: &str) -> i32 {
        let path = self.0.path().join("containers").join(name);
        std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }

    /// The active workers.
    fn workers(&self) -> Vec<String> {
        let answer = http_get(&self.0.path().join("volume/admin.sock"), "/v1/status");
        let Ok((200, body)) = answer else { return Vec::new() };
        let status: dispatcher::api::status::Status = serde_json::from_str(&body).unwrap();
        let workers = pool(&status, "web").workers.iter().filter(|it| it.state == "active");
        workers.map(|worker| worker.name.clone()).collect()
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.0.path().join("containers")).unwrap().flatten() {
            let Ok(text) = std::fs::read_to_string(entry.path()) else { continue };
            // Its end is that of the container.
            if let Ok(pid) = text.trim().parse()
                && std::fs::read_to_string(format!("/proc/{pid}/comm"))
                    .is_ok_and(|name| name.trim() == "unshare")
            {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

#[test]
fn containers_share_the_socket_and_replace_each_other() {
    let mut possible = Command::new("unshare");
    possible.args(["--mount", "--pid", "--net", "--fork", "--mount-proc", "true"]);
    if !geteuid().is_root() || !possible.output().is_ok_and(|output| output.status.success()) {
        return skip("needs root, unshare and the right to make namespaces");
    }
    let address = free_address();
    let containers = Containers::new(address);
    let [start, server, dispatcher] = blocks("Containers", "sh")[..] else { panic!("blocks") };
    containers.follow(start);
    wait_until("the worker to join", || containers.workers() == ["web-1.4"]);
    let mut old = Client::connect(address).unwrap();
    assert_eq!(old.served_by, "web-1.4");
    let clients = Clients::come_to(address, asks);
    std::thread::scope(|scope| {
        // The stop waits for the last connection.
        let following = scope.spawn(|| containers.follow(server));
        wait_until("the new worker alone", || containers.workers() == ["web-1.5"]);
        old.echo("it is served to its end");
        old.finish();
        following.join().unwrap();
    });
    let mut held = Client::connect(address).unwrap();
    assert_eq!(held.served_by, "web-1.5");
    containers.follow(dispatcher);
    let former = format!("/proc/{}", containers.outer("dispatcher"));
    // Its parent is not this test, and may leave it as a zombie.
    let is_gone = || {
        std::fs::read_to_string(format!("{former}/status")).map_or(true, |status| {
            !status.starts_with("Name:\tunshare\n") || status.contains("State:\tZ")
        })
    };
    wait_until("the end of the former dispatcher", is_gone);
    wait_until("the worker to join the new one", || containers.workers() == ["web-1.5"]);
    assert!(containers.log("dispatcher-0.2").contains("event=taken_over"));
    held.echo("through the upgrade");
    assert_eq!(Client::connect(address).unwrap().served_by, "web-1.5");
    clients.were_served();
}
