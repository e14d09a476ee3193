//! One forked process per connection, as in classic servers. The process has one thread, because a
//! fork copies only the calling thread.
#![allow(unsafe_code, reason = "fork is unsafe")]

use std::io::Write;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use worker_sdk::{Connection, Worker, WorkerConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    // The parent has joined and stays the worker; its children only serve.
    let worker = Worker::connect(WorkerConfig::from_env()?)?;
    // The parent's handles, kept while their children live, so that the dispatcher counts the
    // connections.
    let mut served: Vec<(Pid, Connection)> = Vec::new();
    loop {
        match worker.accept_timeout(std::time::Duration::from_millis(100)) {
            Ok(Some(connection)) => {
                // SAFETY: the process has one thread, so the child may do what its parent may.
                match unsafe { fork() }? {
                    ForkResult::Child => {
                        let result = serve(&connection);
                        // Not `return`, because the child must not drop the parent's handles.
                        std::process::exit(i32::from(result.is_err()));
                    }
                    ForkResult::Parent { child } => served.push((child, connection)),
                }
            }
            Ok(None) => break,
            Err(worker_sdk::Error::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
        reap(&mut served, WaitPidFlag::WNOHANG)?;
    }
    // The worker is closed or drained: the children finish their connections.
    worker.close();
    while !served.is_empty() {
        reap(&mut served, WaitPidFlag::empty())?;
    }
    Ok(())
}

/// After the fork, dropping the parent's handle only closes it; the end of the child has ended the
/// connection.
fn reap(served: &mut Vec<(Pid, Connection)>, flags: WaitPidFlag) -> Result<(), Errno> {
    while !served.is_empty() {
        match waitpid(None, Some(flags)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(status) => served.retain(|(child, _)| Some(*child) != status.pid()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn serve(mut connection: &Connection) -> std::io::Result<()> {
    writeln!(connection, "process {} serves {}", std::process::id(), connection.peer_addr())
}
