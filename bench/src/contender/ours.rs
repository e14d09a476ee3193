//! The contenders with the worker of the bench: the dispatcher, pre-fork with and without
//! `SO_REUSEPORT`, the bare loop.

use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Running, Setup, ourselves, program};
use crate::load::{Process, Role};
use crate::worker::Kind;
use crate::{machine, socket};

/// Arguments of a worker; its index follows.
pub(super) fn worker_args(kind: Kind, source: &str, setup: &Setup) -> Vec<String> {
    let round = setup.round.as_micros().to_string();
    ["worker", "--kind", kind.name(), "--source", source, "--serve", setup.serve.name(), "--round"]
        .map(str::to_owned)
        .into_iter()
        .chain([round])
        .collect()
}

fn delayed(command: &mut Command, index: u16, setup: &Setup) {
    if index < setup.workers / 4 && !setup.delay.is_zero() {
        command.arg("--delay").arg(setup.delay.as_micros().to_string());
    }
}

/// The dispatcher's admin socket.
pub(super) const ADMIN: &str = "admin.sock";

/// What the dispatcher says about itself.
pub(super) fn status(running: &Running) -> io::Result<serde_json::Value> {
    let mut stream = UnixStream::connect(running.path(ADMIN))?;
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok(serde_json::from_str(body)?)
}

pub(super) fn dispatcher(
    running: &mut Running,
    kind: Kind,
    setup: &Setup,
    binary: &Path,
    busy_poll: bool,
) -> io::Result<()> {
    let socket = running.path("dispatch.sock");
    let mut config = format!(
        "dispatch_socket = {socket:?}\nadmin_socket = {:?}\nmax_pending_hellos = 4096\n\
         [pool.web]\nmax_workers = 4096\nmax_connections_per_worker = 20000\n",
        running.path(ADMIN)
    );
    if busy_poll {
        // Longer than the pauses of any load that uses it.
        config.insert_str(0, "busy_poll = \"5ms\"\n");
    }
    for (number, address) in socket::free_addresses(setup.listeners)?.into_iter().enumerate() {
        let _ = writeln!(
            config,
            "[[listener]]\nname = \"l{number}\"\naddress = \"{address}\"\npool = \"web\""
        );
        running.addresses.push(address);
    }
    let file = running.path("dispatcher.toml");
    std::fs::write(&file, config)?;
    let child = program(binary)?
        .arg("run")
        .arg("--config")
        .arg(&file)
        .env("DISPATCHER_LOG", "error")
        .spawn()?;
    running.add_child(Role::Front, child)?;

    for index in 0..setup.stuck {
        let mut command = ourselves()?;
        command.args(worker_args(kind, "sdk", setup)).arg("--socket").arg(&socket).arg("--stuck");
        command.arg((setup.workers + index).to_string());
        running.start_ready(Role::Worker, &mut command, 1)?;
    }
    let each = setup.workers / setup.processes;
    for process in 0..setup.processes {
        let first = process * each;
        let count = if process + 1 == setup.processes { setup.workers - first } else { each };
        let mut command = ourselves()?;
        command.args(worker_args(kind, "sdk", setup)).arg("--socket").arg(&socket);
        delayed(&mut command, first, setup);
        command.arg("--count").arg(count.to_string()).arg(first.to_string());
        running.start_ready(Role::Worker, &mut command, 1)?;
    }
    Ok(())
}

pub(super) fn decision(running: &Running) -> io::Result<Option<f64>> {
    let status = status(running)?;
    let decision = &status["meters"]["decision"];
    let counts = decision["counts"].as_array().into_iter().flatten();
    let count: u64 = counts.filter_map(serde_json::Value::as_u64).sum();
    let sum = decision["sum_nanoseconds"].as_f64().unwrap_or(0.0);
    Ok((count > 0).then(|| sum / count as f64 / 1e3))
}

pub(super) fn reuse_port(running: &mut Running, kind: Kind, setup: &Setup) -> io::Result<()> {
    let address = socket::free_address()?;
    running.addresses.push(address);
    for index in 0..setup.workers {
        let mut command = ourselves()?;
        command.args(worker_args(kind, "reuse-port", setup));
        command.arg("--listen").arg(address.to_string());
        delayed(&mut command, index, setup);
        running.start_ready(Role::Worker, command.arg(index.to_string()), 1)?;
    }
    Ok(())
}

pub(super) fn shared(running: &mut Running, kind: Kind, setup: &Setup) -> io::Result<()> {
    let listener = socket::listen(socket::free_address()?, false)?;
    running.addresses.push(listener.local_addr()?);
    for index in 0..setup.workers + setup.stuck {
        let mut command = ourselves()?;
        if index >= setup.workers {
            command.arg("worker").arg("--stuck");
            command.args(&worker_args(kind, "shared", setup)[1..]);
            command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener.try_clone()?)));
            running.start_ready(Role::Worker, command.arg(index.to_string()), 1)?;
            continue;
        }
        command.args(worker_args(kind, "shared", setup));
        command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener.try_clone()?)));
        delayed(&mut command, index, setup);
        running.start_ready(Role::Worker, command.arg(index.to_string()), 1)?;
    }
    Ok(())
}

pub(super) fn bare(running: &mut Running, kind: Kind, setup: &Setup) -> io::Result<()> {
    let address = socket::free_address()?;
    running.addresses.push(address);
    let mut command = ourselves()?;
    command.arg("bare").arg("--listen").arg(address.to_string());
    command.arg("--workers").arg(setup.workers.to_string());
    if !setup.delay.is_zero() {
        let delay = setup.delay.as_micros().to_string();
        command.arg("--slow-delay").arg(delay);
    }
    command.arg("--").args(worker_args(kind, "passed", setup));
    running.start_ready(Role::Front, &mut command, setup.workers)?;
    let front = running.processes.last().map_or(0, |process| process.pid);
    let workers = machine::children(front).into_iter();
    running.processes.extend(workers.map(|pid| Process { role: Role::Worker, pid }));
    Ok(())
}
