//! A machine for tests: a real systemd in private namespaces, with the units of `etc/` and a
//! worker.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use dispatcher::api::status::Status;
use nix::unistd::geteuid;
use tempfile::TempDir;

use crate::{
    assert_conserved, dispatcher_bin, example, http_get, pool, skip, wait_for, wait_until,
};

/// Units that every systemd needs, as empty as possible: nothing of the host is started.
const STUBS: [&str; 9] = [
    "basic.target",
    "default.target",
    "multi-user.target",
    "network-online.target",
    "shutdown.target",
    "sockets.target",
    "sysinit.target",
    "system.slice",
    "umount.target",
];

/// The units under test, unchanged. Drop-ins below contain the changes of the tests.
const UNITS: [&str; 5] = [
    "dispatcher.service",
    "dispatcher-workers.service",
    "dispatcher-steer.service",
    "dispatcher.socket",
    "dispatcher-dispatch.socket",
];

/// Other paths, and a log to read. Everything else is as shipped, including the hardening.
const SERVICE: &str = "\
[Service]
ExecStart=
ExecStart=/run/bin/dispatcher run --config /run/test/dispatcher.toml
ExecReload=
ExecReload=/run/bin/dispatcher reload
Environment=DISPATCHER_LOG=debug
StandardOutput=append:/run/test/log
StandardError=append:/run/test/log
";

const WORKER: &str = "\
[Service]
ExecStart=/run/bin/test-worker blocking
Environment=DISPATCH_SOCKET=/run/dispatcher/dispatch.sock DISPATCH_POOL=web DISPATCH_NAME=%i
StandardError=append:/run/test/worker-log
";

/// Every socket by name, as the comments in the units say.
pub const CONFIG: &str = r#"
dispatch_socket = "systemd:dispatch"

[[listener]]
name = "web"
address = "systemd:web"
pool = "web"

[pool.web]
handoff_timeout = "10m"
"#;

/// A booted systemd. Everything in it is killed when it goes out of scope, or when the test process
/// ends.
pub struct Machine {
    helper: Child,
    stdin: Option<ChildStdin>,
    pid: String,
    dir: TempDir,
    installs: bool,
    /// Where `dispatcher.socket` listens.
    pub address: SocketAddr,
}

impl Machine {
    /// Boots the machine; `None`, after a notice, where that is impossible.
    pub fn boot() -> Option<Machine> {
        Machine::boot_as(false)
    }

    /// Boots an empty machine on which programs can be installed. Its network is separate.
    pub fn boot_to_install() -> Option<Machine> {
        Machine::boot_as(true)
    }

    fn boot_as(installs: bool) -> Option<Machine> {
        if let Err(reason) = possible() {
            skip(&format!("a real systemd: {reason}"));
            return None;
        }
        let address = free_address();
        let dir = tempfile::tempdir().unwrap();
        let units = dir.path().join("units");
        write_stubs(&units);
        if !installs {
            write_units(&units, address);
        }
        std::fs::write(dir.path().join("dispatcher.toml"), CONFIG).unwrap();
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).to_owned();
        let log = File::create(dir.path().join("boot-log")).unwrap();
        let mut helper = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh"])
            .args([&tests.join("boot-systemd"), dir.path(), Path::new(dispatcher_bin())])
            .arg(example("test-worker"))
            .envs(installs.then_some(("MACHINE_INSTALLS", "1")))
            // Ctrl-C is for the test; the machine is then still cleaned up.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let stdin = helper.stdin.take();
        let mut machine = Machine { helper, stdin, pid: String::new(), dir, address, installs };
        machine.pid = wait_for("systemd", || {
            machine.assert_up();
            std::fs::read_to_string(machine.dir.path().join("pid")).ok()
        });
        machine.pid.truncate(machine.pid.trim_end().len());
        wait_until("systemd's own socket", || {
            machine.assert_up();
            machine.inside("/run/systemd/private").exists()
        });
        machine.systemctl(&["is-system-running", "--wait"]);
        Some(machine)
    }

    fn assert_up(&mut self) {
        let ended = self.helper.try_wait().unwrap();
        let log = || std::fs::read_to_string(self.dir.path().join("boot-log")).unwrap_or_default();
        assert!(ended.is_none(), "no systemd, {ended:?}: {}", log());
    }

    /// The path inside the machine.
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.pid))
    }

    /// Runs a command in the machine.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut known = "/run/test/units".to_owned();
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.pid, "-m", "-p", "-i", "-u"]);
        if self.installs {
            command.arg("-n");
            known.insert_str(0, "/etc/systemd/system:");
        }
        command
            .arg(program)
            .args(arguments)
            .env("SYSTEMD_UNIT_PATH", known)
            .env("LANG", "C")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// `systemctl`: what it printed, and whether it succeeded.
    pub fn systemctl(&self, arguments: &[&str]) -> (String, bool) {
        let output = self.run("systemctl", arguments);
        assert_eq!(output.status.signal(), None);
        let mut text = String::from_utf8(output.stdout).unwrap();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        (text.trim_end().to_owned(), output.status.success())
    }

    /// Runs `systemctl`, which must succeed.
    pub fn order(&self, arguments: &[&str]) {
        let (text, success) = self.systemctl(arguments);
        assert!(success, "systemctl {arguments:?}: {text}\n{}", self.log());
    }

    /// One property of a unit.
    pub fn show(&self, unit: &str, property: &str) -> String {
        self.systemctl(&["show", "--value", "-p", property, unit]).0
    }

    /// `active`, `inactive`, `failed`, …
    pub fn state(&self, unit: &str) -> String {
        self.systemctl(&["is-active", unit]).0
    }

    /// A directory of this test, which is /run/test inside.
    pub fn shared(&self) -> &Path {
        self.dir.path()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn configure(&self, text: &str) {
        std::fs::write(self.dir.path().join("dispatcher.toml"), text).unwrap();
    }

    /// Changes a unit, from the next `daemon-reload` on.
    pub fn write_drop_in(&self, unit: &str, name: &str, text: &str) {
        write_drop_in(&self.dir.path().join("units"), unit, name, text);
    }

    /// The sockets start this unit instead of `dispatcher.service`.
    pub fn sockets_start(&self, unit: &str) {
        for socket in ["dispatcher.socket", "dispatcher-dispatch.socket"] {
            self.write_drop_in(socket, "workers", &format!("[Socket]\nService={unit}\n"));
        }
        self.order(&["daemon-reload"]);
    }

    /// Starts workers of these names and waits until they have joined.
    pub fn workers(&self, names: &[&str]) {
        for name in names {
            self.order(&["start", &format!("worker@{name}.service")]);
        }
        self.wait_joined(names.len());
    }

    pub fn wait_joined(&self, count: usize) -> Status {
        wait_for("the workers to join", || {
            let status = self.status()?;
            let active = pool(&status, "web").workers.iter().filter(|w| w.state == "active");
            (active.count() == count).then_some(status)
        })
    }

    /// `None` while no dispatcher is there.
    pub fn status(&self) -> Option<Status> {
        let (code, body) =
            http_get(&self.inside("/run/dispatcher/admin.sock"), "/v1/status").ok()?;
        assert_eq!(code, 200, "{body}");
        let status: Status = serde_json::from_str(&body).unwrap();
        assert_conserved(&status);
        Some(status)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the dispatcher's log:\n{}", self.log());
        }
        drop(self.stdin.take());
        let _ = self.helper.wait();
    }
}

fn possible() -> Result<(), String> {
    if !geteuid().is_root() {
        return Err("needs root".to_owned());
    }
    let systemd = ["/lib/systemd/systemd", "/usr/lib/systemd/systemd"];
    if !systemd.iter().any(|path| Path::new(path).exists()) {
        return Err("needs systemd to be installed".to_owned());
    }
    // Everything that the helper needs and that a container may forbid.
    let attempt = "mount -t tmpfs tmpfs /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && \
                   test -w \"/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/cgroup.procs\"";
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--pid", "--fork", "sh", "-c", attempt])
        .output()
        .map_err(|error| format!("needs unshare: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn write_stubs(units: &Path) {
    std::fs::create_dir(units).unwrap();
    for name in STUBS {
        std::fs::write(units.join(name), "[Unit]\nDefaultDependencies=no\n").unwrap();
    }
}

fn write_drop_in(units: &Path, unit: &str, name: &str, text: &str) {
    let directory = units.join(format!("{unit}.d"));
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join(format!("{name}.conf")), text).unwrap();
}

fn write_units(units: &Path, address: SocketAddr) {
    let etc = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../etc");
    for name in UNITS {
        std::fs::copy(etc.join(name), units.join(name)).unwrap();
    }
    let socket = format!("[Socket]\nListenStream=\nListenStream={address}\n");
    for (unit, text) in [
        ("dispatcher.service", SERVICE),
        ("dispatcher-workers.service", SERVICE),
        ("dispatcher-steer.service", SERVICE),
        ("dispatcher.socket", &socket),
    ] {
        write_drop_in(units, unit, "test", text);
    }
    std::fs::write(units.join("worker@.service"), WORKER).unwrap();
}

/// A free port. systemd cannot choose one, so the port is chosen on an address that only this
/// machine uses: no other test can take it meanwhile.
fn free_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let machine = NEXT.fetch_add(1, Ordering::Relaxed);
    // The last byte is never 0.
    let [_, a, b, c] = (std::process::id() * 16 + 1 + machine % 15).to_be_bytes();
    // The other tests use 127.0.x.x.
    let ip = [127, a | 0x80, b, c];
    TcpListener::bind((std::net::Ipv4Addr::from(ip), 0)).unwrap().local_addr().unwrap()
}
