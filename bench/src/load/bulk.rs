//! Bulk data through one connection.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use super::{CpuMeter, Metrics, Request, client_socket};
use crate::worker::CHUNK;

pub(super) fn run(request: &Request, bytes: u64) -> io::Result<Metrics> {
    let fd = client_socket(false)?;
    rustix::net::connect(&fd, &request.addresses[0])?;
    let mut stream = TcpStream::from(fd);
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; CHUNK];
    let mut fetch = |count: u64| -> io::Result<()> {
        for _ in 0..count {
            stream.write_all(b"?")?;
            stream.read_exact(&mut buffer)?;
        }
        Ok(())
    };
    let count = bytes / CHUNK as u64;
    // During the first twentieth, windows and buffers grow.
    fetch(count / 20)?;
    let meter = CpuMeter::start(&request.processes);
    fetch(count)?;
    let used = meter.read();
    let gib = (count * CHUNK as u64) as f64 / f64::from(1 << 30);
    let mut metrics = Metrics::new();
    metrics.insert("rate".to_owned(), gib / used.elapsed.as_secs_f64());
    used.add_to(&mut metrics, gib, 1);
    for role in ["cpu_front", "cpu_workers", "cpu_load"] {
        // Milliseconds per GiB rather than microseconds.
        if let Some(value) = metrics.get_mut(role) {
            *value /= 1e3;
        }
    }
    Ok(metrics)
}
