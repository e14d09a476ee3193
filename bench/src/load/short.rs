//! Short connections, a fixed number at a time, as fast as they are served.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::machine;

use super::{CpuMeter, Metrics, Request, add_percentiles, client_socket};

/// A place for one client at a time.
struct Slot {
    fd: OwnedFd,
    began: Instant,
    /// The worker's time stamp, written right before its close.
    answered: Option<u64>,
}

struct Clients<'a> {
    addresses: &'a [SocketAddr],
    epoll: OwnedFd,
    fin: bool,
    next: usize,
    latencies: Vec<u64>,
    fins: Vec<u64>,
    failed: u64,
}

/// What the threads do.
const WARMS_UP: u8 = 0;
const MEASURES: u8 = 1;
const ENDS: u8 = 2;

pub(super) fn run(
    request: &Request,
    (clients, threads): (usize, usize),
    fin: bool,
    warm: Duration,
    time: Duration,
) -> io::Result<Metrics> {
    let phase = AtomicU8::new(WARMS_UP);
    let (used, all) = std::thread::scope(|scope| {
        let (addresses, phase) = (&request.addresses, &phase);
        let each = |thread: usize| {
            let own = clients / threads + usize::from(thread < clients % threads);
            scope.spawn(move || Clients::new(addresses, fin)?.serve(own, phase))
        };
        let running: Vec<_> = (0..threads).map(each).collect();
        std::thread::sleep(warm);
        phase.store(MEASURES, Ordering::Relaxed);
        let meter = CpuMeter::start(&request.processes);
        std::thread::sleep(time);
        phase.store(ENDS, Ordering::Relaxed);
        let used = meter.read();
        let ended = running.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")))
        });
        ended.collect::<io::Result<Vec<Clients<'_>>>>().map(|all| (used, all))
    })?;
    let failed: u64 = all.iter().map(|clients| clients.failed).sum();
    let (mut latencies, mut fins) = (Vec::new(), Vec::new());
    for mut clients in all {
        latencies.append(&mut clients.latencies);
        fins.append(&mut clients.fins);
    }
    let count = latencies.len() as f64;
    let mut metrics = Metrics::new();
    metrics.insert("rate".to_owned(), count / used.elapsed.as_secs_f64());
    metrics.insert("failed".to_owned(), failed as f64);
    used.add_to(&mut metrics, count.max(1.0), threads);
    add_percentiles(&mut metrics, "", latencies);
    if fin {
        add_percentiles(&mut metrics, "fin_", fins);
    }
    Ok(metrics)
}

impl Clients<'_> {
    fn new(addresses: &[SocketAddr], fin: bool) -> io::Result<Clients<'_>> {
        Ok(Clients {
            addresses,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            fin,
            next: 0,
            latencies: Vec::with_capacity(1 << 20),
            fins: Vec::with_capacity(if fin { 1 << 20 } else { 0 }),
            failed: 0,
        })
    }

    /// Runs so many clients, and returns what was measured.
    fn serve(mut self, clients: usize, phase: &AtomicU8) -> io::Result<Self> {
        let mut slots =
            (0..clients).map(|at| self.connect(at)).collect::<io::Result<Vec<Slot>>>()?;
        while phase.load(Ordering::Relaxed) == WARMS_UP {
            self.turn(&mut slots)?;
        }
        self.latencies.clear();
        self.fins.clear();
        self.failed = 0;
        while phase.load(Ordering::Relaxed) == MEASURES {
            self.turn(&mut slots)?;
        }
        Ok(self)
    }

    fn connect(&mut self, at: usize) -> io::Result<Slot> {
        let fd = client_socket(true)?;
        let address = &self.addresses[self.next];
        self.next = (self.next + 1) % self.addresses.len();
        let began = Instant::now();
        match rustix::net::connect(&fd, address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        epoll::add(&self.epoll, &fd, epoll::EventData::new_u64(at as u64), flags)?;
        Ok(Slot { fd, began, answered: None })
    }

    fn turn(&mut self, slots: &mut [Slot]) -> io::Result<()> {
        let mut events = Vec::with_capacity(256);
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout))
        {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &events {
            let at = event.data.u64() as usize;
            if self.is_over(&mut slots[at]) {
                // The assignment drops the old socket, which resets its connection.
                slots[at] = self.connect(at)?;
            }
        }
        Ok(())
    }

    /// Reads what has arrived; true when this client has finished.
    fn is_over(&mut self, slot: &mut Slot) -> bool {
        let mut buffer = [0; 16];
        loop {
            let received = rustix::net::recv(&slot.fd, &mut buffer, RecvFlags::DONTWAIT);
            let now = Instant::now();
            match (received, slot.answered) {
                (Ok((_, 1..)), None) => {
                    self.latencies.push((now - slot.began).as_nanos() as u64);
                    if !self.fin {
                        return true;
                    }
                    let Ok(stamp) = buffer[..8].try_into() else { return true };
                    slot.answered = Some(u64::from_le_bytes(stamp));
                }
                (Ok((_, 0)), Some(answered)) => {
                    self.fins.push(machine::now_ns().saturating_sub(answered));
                    return true;
                }
                (Err(Errno::AGAIN), _) => return false,
                _ => {
                    self.failed += 1;
                    return true;
                }
            }
        }
    }
}
