//! Memory that a held connection costs the process in front of the workers.

use std::io;

use rustix::net::RecvFlags;

use super::{Metrics, Request, Role, client_socket};
use crate::machine;

pub(super) fn run(request: &Request, count: usize) -> io::Result<Metrics> {
    let front = || -> f64 {
        let processes = request.processes.iter().filter(|process| process.role == Role::Front);
        processes.map(|process| machine::resident(process.pid) as f64).sum::<f64>()
            / f64::from(1 << 20)
    };
    let empty = front();
    let mut clients = Vec::with_capacity(count);
    let mut index = [0; 2];
    for number in 0..count {
        let fd = client_socket(false)?;
        let address = &request.addresses[number % request.addresses.len()];
        rustix::net::connect(&fd, address)?;
        // When this byte arrives, the worker has taken the connection.
        rustix::net::recv(&fd, &mut index, RecvFlags::WAITALL)?;
        clients.push(fd);
    }
    let mut metrics = Metrics::new();
    metrics.insert("memory_empty".to_owned(), empty);
    metrics.insert("memory_held".to_owned(), front());
    Ok(metrics)
}
