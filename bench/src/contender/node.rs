//! Node's cluster module: a master that accepts and passes connections to its workers in turn.

use std::io;

use super::{Running, Setup, program};
use crate::load::{Process, Role};
use crate::{machine, socket};

pub(super) fn cluster(running: &mut Running, setup: &Setup) -> io::Result<()> {
    let node = machine::find_program("node").ok_or(io::ErrorKind::NotFound)?;
    let address = socket::free_address()?;
    running.addresses.push(address);
    let script = running.path("cluster.js");
    std::fs::write(&script, include_str!("cluster.js"))?;
    let mut command = program(&node)?;
    command.arg(&script).arg(address.port().to_string()).arg(setup.workers.to_string());
    command.arg(setup.serve.name()).arg(socket::BACKLOG.to_string());
    running.start_ready(Role::Front, &mut command, setup.workers)?;
    let master = running.processes.last().map_or(0, |process| process.pid);
    let workers = machine::children(master).into_iter();
    running.processes.extend(workers.map(|pid| Process { role: Role::Worker, pid }));
    Ok(())
}
