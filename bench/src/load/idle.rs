//! One client at a time, with pauses: the time from the connect until the application of a sleeping
//! server has it.

use std::io;
use std::time::Duration;

use rustix::net::RecvFlags;

use super::{CpuMeter, Metrics, Request, add_percentiles, client_socket};
use crate::machine;

pub(super) fn run(request: &Request, count: usize, pause: Duration) -> io::Result<Metrics> {
    let (mut latencies, mut fins) = (Vec::with_capacity(count), Vec::with_capacity(count));
    let meter = CpuMeter::start(&request.processes);
    for number in 0..count + count / 10 {
        std::thread::sleep(pause);
        let fd = client_socket(false)?;
        let began = machine::now_ns();
        rustix::net::connect(&fd, &request.addresses[0])?;
        let mut stamp = [0; 8];
        let (_, received) = rustix::net::recv(&fd, &mut stamp, RecvFlags::WAITALL)?;
        if received != stamp.len() {
            return Err(io::Error::other("a client got no time stamp"));
        }
        let stamp = u64::from_le_bytes(stamp);
        let (_, rest) = rustix::net::recv(&fd, &mut [0; 8], RecvFlags::empty())?;
        let ended = machine::now_ns();
        // The first tenth warms up.
        if number >= count / 10 && rest == 0 {
            latencies.push(stamp.saturating_sub(began));
            fins.push(ended.saturating_sub(stamp));
        }
    }
    let used = meter.read();
    let mut metrics = Metrics::new();
    used.add_to(&mut metrics, (count + count / 10) as f64, 1);
    add_percentiles(&mut metrics, "", latencies);
    add_percentiles(&mut metrics, "fin_", fins);
    Ok(metrics)
}
