//! Shutdown of a blocking server: at SIGTERM it says goodbye, serves its connections, and after two
//! seconds ends the rest.

use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use worker_sdk::{Worker, WorkerConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    // First of all, so that no signal meets the default action.
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let worker = Worker::connect(WorkerConfig::from_env()?)?;
    let closing = worker.clone();
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            closing.close();
        }
    });
    while let Some(mut connection) = worker.accept()? {
        thread::spawn(move || {
            let mut byte = [0];
            while let Ok(1) = connection.read(&mut byte) {
                if connection.write_all(&byte).is_err() {
                    break;
                }
            }
        });
    }
    // The worker is closed or drained.
    let ended = worker.shutdown(Duration::from_secs(2));
    println!("ended {ended}");
    // The threads get an error or the end of file, and drop their connections.
    worker.wait_until_idle_timeout(Duration::from_secs(2));
    Ok(())
}
