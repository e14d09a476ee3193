//! The dispatcher with `mode = "steer"`: it starts the workers, each listens at an address of its
//! own or inherits a listener of the public one, and the kernel chooses among them.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{PATIENCE, Ports, Running, Setup, ours, ourselves};
use serde_json::Value;

use crate::load::{Process, Role};
use crate::socket;
use crate::worker::Kind;

/// The reason why the kernel of this machine cannot choose, if there is one.
pub(super) fn missing(binary: &Path) -> Option<String> {
    let report = Command::new(binary).args(["doctor", "--json"]).output().map(|out| out.stdout);
    let report = report.and_then(|json| Ok(serde_json::from_slice::<Value>(&json)?));
    match report {
        Ok(report) if report["steer"]["ok"] == true => None,
        Ok(_) => Some("the kernel cannot choose here; `dispatcher doctor` says why".to_owned()),
        Err(error) => Some(format!("`dispatcher doctor` says nothing: {error}")),
    }
}

pub(super) fn dispatcher(
    running: &mut Running,
    kind: Kind,
    setup: &Setup,
    binary: &Path,
    ports: Ports,
) -> io::Result<()> {
    let address = socket::free_address()?;
    running.addresses.push(address);
    let itself = std::env::current_exe()?.to_string_lossy().into_owned();
    // The server is the one of the other contenders: it knows nothing of the dispatcher.
    let mut command = vec![itself];
    let (source, argument, place) = match ports {
        Ports::Own => ("reuse-port", "--listen", "{addr}:{port}"),
        Ports::Shared => ("inherited", "--descriptor", "{fd}"),
    };
    command.extend(ours::worker_args(kind, source, setup));
    command.extend([argument, place, "0"].map(str::to_owned));
    let config = format!(
        "dispatch_socket = {:?}\nadmin_socket = {:?}\n\
         [[listener]]\nname = \"web\"\naddress = \"{address}\"\npool = \"web\"\n\
         [pool.web]\nmode = \"steer\"\nmax_connections_per_worker = 20000\n\
         [pool.web.spawn]\nprocesses = {}\ncommand = {command:?}\n",
        running.path("dispatch.sock"),
        running.path(ours::ADMIN),
        setup.workers,
    );
    let file = running.path("dispatcher.toml");
    std::fs::write(&file, config)?;
    let cgroup = running.cgroup.as_ref().ok_or_else(|| io::Error::other("it has no cgroup"))?;
    let mut front = ourselves()?;
    front.arg("exec").arg("--cgroup").arg(cgroup.path()).arg(binary);
    front.arg("run").arg("--config").arg(&file).env("DISPATCHER_LOG", "error");
    // The workers have its standard output and say there that they are ready.
    running.add_child(Role::Front, front.stdout(Stdio::null()).spawn()?)?;

    let deadline = Instant::now() + PATIENCE;
    loop {
        let pids = active(running).unwrap_or_default();
        if pids.len() >= usize::from(setup.workers) {
            let worker = |pid| Process { role: Role::Worker, pid };
            running.processes.extend(pids.into_iter().map(worker));
            return Ok(());
        }
        running.check_alive()?;
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("only {} workers listen", pids.len())));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The processes of the workers that the kernel can choose.
fn active(running: &Running) -> io::Result<Vec<i32>> {
    let status = ours::status(running)?;
    let workers = status["pools"][0]["workers"].as_array().into_iter().flatten();
    let active = workers.filter(|worker| worker["state"] == "active");
    Ok(active.filter_map(|worker| i32::try_from(worker["pid"].as_i64()?).ok()).collect())
}
