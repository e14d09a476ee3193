//! Clients that connect at random moments, whether or not earlier ones still wait: how long until
//! the application has each of them.

use std::io;
use std::time::{Duration, Instant};

use rustix::net::RecvFlags;

use super::{Metrics, Request, client_socket};
use crate::machine;
use crate::stats::{Random, percentile};

/// A client that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// The same moments for every contender.
const SEED: u64 = 7;

pub(super) fn run(request: &Request, count: usize, rate: f64) -> io::Result<Metrics> {
    let address = request.addresses[0];
    let mut random = Random(SEED);
    let mut next = Instant::now();
    let mut clients = Vec::with_capacity(count);
    for _ in 0..count {
        next += Duration::from_secs_f64(-random.unit().ln() / rate);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        let client = std::thread::Builder::new().stack_size(64 * 1024);
        clients.push(client.spawn(move || wait(address))?);
    }
    let waits = clients.into_iter().map(|client| client.join().ok()?.ok());
    let mut waits: Vec<f64> = waits.flatten().map(|nanos| nanos as f64 / 1e6).collect();
    waits.sort_unstable_by(f64::total_cmp);
    let mut metrics = Metrics::new();
    for (name, quantile) in [("wait_p50", 0.5), ("wait_p99", 0.99), ("wait_max", 1.0)] {
        metrics.insert(name.to_owned(), percentile(&waits, quantile));
    }
    metrics.insert("failed".to_owned(), (count - waits.len()) as f64);
    Ok(metrics)
}

/// From before the connect until the worker's application has the connection.
fn wait(address: std::net::SocketAddr) -> io::Result<u64> {
    let fd = client_socket(false)?;
    rustix::net::sockopt::set_socket_timeout(
        &fd,
        rustix::net::sockopt::Timeout::Recv,
        Some(PATIENCE),
    )?;
    let began = machine::now_ns();
    rustix::net::connect(&fd, &address)?;
    let mut stamp = [0; 8];
    let (_, received) = rustix::net::recv(&fd, &mut stamp, RecvFlags::WAITALL)?;
    if received != stamp.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(u64::from_le_bytes(stamp).saturating_sub(began))
}
