//! A child process per connection, with the connection as its standard input and output, as inetd
//! does: `inetd COMMAND ARGUMENTS…`

use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::thread;

use worker_sdk::{Connection, Worker, WorkerConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let command: Vec<String> = std::env::args().skip(1).collect();
    let mut worker = Worker::connect(WorkerConfig::from_env()?)?;
    for connection in worker.incoming() {
        let command = command.clone();
        thread::spawn(move || {
            let peer = connection.peer_addr();
            if let Err(error) = serve(&connection, &command) {
                eprintln!("{peer}: {error}");
            }
        });
    }
    worker.close();
    worker.wait_until_idle();
    Ok(())
}

/// The child gets duplicates, so the SDK's own handle does not end the connection. The parent keeps
/// the handle until the child has ended: until then the connection counts for this worker, and the
/// deadline of a drain can end it.
fn serve(connection: &Connection, command: &[String]) -> std::io::Result<()> {
    let (program, arguments) = command.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
    let copy = || connection.as_fd().try_clone_to_owned().map(Stdio::from);
    let mut child = Command::new(program)
        .args(arguments)
        .env("REMOTE_ADDR", connection.peer_addr().to_string())
        .stdin(copy()?)
        .stdout(copy()?)
        .spawn()?;
    child.wait().map(drop)
}
