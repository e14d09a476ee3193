//! Samples of the machine and this process, for the gauges of the SDK.
//!
//! This module owns the sampling thread, its interval, and the values from `/proc`. The formats are
//! part of the kernel's stable interface, so it reads them without a library.

use std::fs::File;
use std::io::{self, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::param::page_size;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::clock::after;
use super::gauges::{Gauge, Gauges};
use super::log_queue::log_now;
use dispatch_protocol::scoreboard::gauge::{GaugeName, names};

/// When to sample the machine and this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampling {
    /// The gauges that the pool uses for scores, from the first join that names them.
    #[default]
    Auto,
    /// All four gauges.
    Always,
    /// No gauge. The application may set these gauges itself.
    Never,
}

/// The gauges that the SDK can measure.
const MEASURED: [&str; 4] =
    [names::SYSTEM_CPU, names::FREE_MEMORY, names::PROCESS_CPU, names::PROCESS_RSS];

/// The interval between the first two samples.
const FIRST_INTERVAL: Duration = Duration::from_millis(100);

/// The sampling thread, if there is one. Dropping this ends it.
pub(super) struct Sampler {
    sampling: Sampling,
    interval: Duration,
    /// The gauges measured so far, and the sender to the thread.
    thread: Mutex<(Vec<&'static str>, Option<Sender<Meter>>)>,
}

impl Sampler {
    pub(super) fn new(sampling: Sampling, interval: Duration) -> Sampler {
        Sampler { sampling, interval, thread: Mutex::new((Vec::new(), None)) }
    }

    /// Starts the gauges that are measured from the start.
    pub(super) fn start(&self, gauges: &Arc<Gauges>) {
        if self.sampling == Sampling::Always {
            self.measure(gauges, &MEASURED);
        }
    }

    /// Starts the gauges that the pool uses for scores.
    pub(super) fn wanted(&self, gauges: &Arc<Gauges>, wanted: &[GaugeName]) {
        if self.sampling == Sampling::Auto {
            let here = |name: &&str| wanted.iter().any(|wanted| wanted.as_str() == *name);
            let names: Vec<&str> = MEASURED.into_iter().filter(here).collect();
            self.measure(gauges, &names);
        }
    }

    fn measure(&self, gauges: &Arc<Gauges>, names: &[&'static str]) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let (measured, sender) = &mut *thread;
        for &name in names {
            if measured.contains(&name) {
                continue;
            }
            let gauge = match gauges.gauge(name) {
                Ok(gauge) => gauge,
                Err(error) => {
                    gauges.log_queue.push(log::Level::Warn, || {
                        format!("cannot show {name} to the dispatcher: {error}")
                    });
                    continue;
                }
            };
            let sender = match sender {
                Some(sender) => sender,
                None => match start(self.interval) {
                    Ok(started) => sender.insert(started),
                    Err(error) => {
                        let line = || format!("cannot start a thread to measure: {error}");
                        return gauges.log_queue.push(log::Level::Warn, line);
                    }
                },
            };
            measured.push(name);
            // The thread ends only after this sender is dropped.
            let _ = sender.send(Meter { name, gauge, before: None, complained: false });
        }
    }
}

fn start(interval: Duration) -> io::Result<Sender<Meter>> {
    let (sender, receiver) = channel();
    let thread = std::thread::Builder::new().name("gauges".to_owned()).stack_size(256 * 1024);
    thread.spawn(move || sample(interval, &receiver))?;
    Ok(sender)
}

fn sample(interval: Duration, receiver: &Receiver<Meter>) {
    let mut meters: Vec<Meter> = Vec::new();
    let mut next = after(interval);
    loop {
        match receiver.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(mut meter) => {
                // The first sample comes immediately, and the second soon, so that a new worker
                // soon has all scores.
                meter.measure();
                meters.push(meter);
                next = next.min(after(FIRST_INTERVAL));
            }
            Err(RecvTimeoutError::Timeout) => {
                meters.iter_mut().for_each(Meter::measure);
                next = after(interval);
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// One gauge and its last sample.
struct Meter {
    name: &'static str,
    gauge: Gauge,
    /// Busy and total time at the last sample.
    before: Option<(f64, f64)>,
    complained: bool,
}

impl Meter {
    fn measure(&mut self) {
        match self.value() {
            Ok(Some(value)) => self.gauge.set(value),
            Ok(None) => {}
            Err(error) => {
                if !std::mem::replace(&mut self.complained, true) {
                    let line = format_args!("cannot measure {}: {error}", self.name);
                    log_now(log::Level::Warn, line);
                }
            }
        }
    }

    /// `None` for the first of two samples.
    fn value(&mut self) -> io::Result<Option<f64>> {
        let odd = || io::Error::other("it is not as expected");
        match self.name {
            names::SYSTEM_CPU => {
                let text = read("/proc/stat")?;
                let (busy, whole) = processor_time(&text).ok_or_else(odd)?;
                Ok(self.share(busy, whole))
            }
            names::PROCESS_CPU => {
                let seconds = |clock| {
                    let time = clock_gettime(clock);
                    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
                };
                Ok(self.rate(seconds(ClockId::ProcessCPUTime), seconds(ClockId::Monotonic)))
            }
            names::FREE_MEMORY => {
                mib(&read("/proc/meminfo")?, "MemAvailable:").ok_or_else(odd).map(Some)
            }
            names::PROCESS_RSS => {
                // Not `status`: its first line has the process name, which may be any bytes.
                resident(&read("/proc/self/statm")?, page_size()).ok_or_else(odd).map(Some)
            }
            _ => Err(odd()),
        }
    }

    /// The busy share of the time since the last sample.
    fn rate(&mut self, busy: f64, whole: f64) -> Option<f64> {
        let (busy_before, whole_before) = self.before.replace((busy, whole))?;
        let passed = whole - whole_before;
        // A counter may decrease slightly: the kernel's idle time does.
        (passed > 0.0).then(|| ((busy - busy_before) / passed).max(0.0))
    }

    /// As [`rate`](Meter::rate), at most 1: the iowait time may decrease, and the rest would exceed
    /// the total.
    fn share(&mut self, busy: f64, whole: f64) -> Option<f64> {
        self.rate(busy, whole).map(|rate| rate.min(1.0))
    }
}

/// The start of a file in `/proc`, which contains the needed values.
fn read(path: &str) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(4096).read_to_string(&mut text)?;
    Ok(text)
}

/// Busy and total processor time since boot, from the first line of `/proc/stat`: `cpu user nice
/// system idle iowait irq softirq steal guest guest_nice`. Guest times are part of user and nice.
fn processor_time(text: &str) -> Option<(f64, f64)> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let times: Option<Vec<f64>> =
        line.split_whitespace().take(8).map(|word| word.parse().ok()).collect();
    let times = times.filter(|times| times.len() >= 4)?;
    let whole: f64 = times.iter().sum();
    let idle: f64 = times.iter().skip(3).take(2).sum();
    Some((whole - idle, whole))
}

/// A line `KEY: NUMBER kB`, in MiB.
fn mib(text: &str, key: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: f64 = rest.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib / 1024.0)
}

/// The second number of `/proc/self/statm`, pages in RAM, in MiB.
fn resident(text: &str, page_size: usize) -> Option<f64> {
    let pages: f64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * page_size as f64 / (1024.0 * 1024.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_processor_time_but_idle_counts_as_busy() {
        let text = "cpu  100 20 30 800 50 1 2 3 40 5\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(processor_time(text), Some((156.0, 1006.0)));
        // From an old kernel.
        assert_eq!(processor_time("cpu 1 2 3 4\n"), Some((6.0, 10.0)));
        for bad in ["", "cpu\n", "cpu 1 2 3\n", "cpu0 1 2 3 4\n", "cpu 1 2 x 4\n"] {
            assert_eq!(processor_time(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn memory_is_in_mib() {
        let text =
            "MemTotal: 8000000 kB\nMemFree: 1 kB\nMemAvailable:    2097152 kB\nBuffers: 3 kB\n";
        assert_eq!(mib(text, "MemAvailable:"), Some(2048.0));
        for bad in ["", "VmRSS: kB\n", "VmRSS: 5 MB\n", "VmSize: 1 kB\n"] {
            assert_eq!(mib(bad, "VmRSS:"), None, "{bad:?}");
        }
    }

    #[test]
    fn a_rate_is_of_the_time_since_the_last_sample() {
        let gauges = Gauges::new(Arc::default());
        let gauge = gauges.gauge("x").unwrap();
        let mut meter = Meter { name: "x", gauge, before: None, complained: false };
        assert_eq!(meter.rate(500.0, 1000.0), None, "the first sample");
        assert_eq!(meter.rate(505.0, 1020.0), Some(0.25));
        assert_eq!(meter.rate(505.0, 1020.0), None, "no time has passed");
        assert_eq!(meter.rate(504.0, 1021.0), Some(0.0), "the counter decreased");
        assert_eq!(meter.share(514.0, 1025.0), Some(1.0), "the idle time decreased");
    }

    #[test]
    fn this_machine_and_this_process_can_be_measured() {
        let gauges = Gauges::new(Arc::default());
        for name in MEASURED {
            let gauge = gauges.gauge(name).unwrap();
            let mut meter = Meter { name, gauge, before: None, complained: false };
            let needs_two = [names::SYSTEM_CPU, names::PROCESS_CPU].contains(&name);
            assert_eq!(meter.value().unwrap().is_none(), needs_two, "{name}");
            // The machine's counter advances in steps.
            let end = Instant::now() + Duration::from_secs(20);
            let value = loop {
                match meter.value().unwrap() {
                    Some(value) => break value,
                    None => assert!(Instant::now() < end, "{name} does not advance"),
                }
            };
            let most = if name == names::SYSTEM_CPU { 1.0 } else { 1e9 };
            assert!((0.0..=most).contains(&value), "{name}: {value}");
        }
    }

    #[test]
    fn memory_is_found_whatever_the_process_is_called() {
        let name = std::fs::read("/proc/self/comm").unwrap();
        // The kernel keeps 15 bytes, so half of the last character is cut.
        std::fs::write("/proc/self/comm", "fourteen-bytes\u{e9}").unwrap();
        let gauges = Gauges::new(Arc::default());
        let rss = names::PROCESS_RSS;
        let gauge = gauges.gauge(rss).unwrap();
        let mut meter = Meter { name: rss, gauge, before: None, complained: false };
        let value = meter.value();
        std::fs::write("/proc/self/comm", name.trim_ascii_end()).unwrap();
        let value = value.unwrap().unwrap();
        assert!(value > 0.4 && value < 65_536.0, "a test of 400 KiB at least: {value} MiB");
    }

    #[test]
    fn what_is_in_memory_is_counted_in_pages() {
        assert_eq!(resident("1000 512 3 4 0 6 0\n", 4096), Some(2.0));
        assert_eq!(resident("1000 512 3 4 0 6 0\n", 65536), Some(32.0));
        assert_eq!(resident("1000\n", 4096), None);
    }

    #[test]
    fn no_interval_is_too_long() {
        assert!(after(Duration::MAX) > Instant::now() + Duration::from_secs(3600));
        let gauge = Gauges::new(Arc::default()).gauge(names::FREE_MEMORY).unwrap();
        let (sender, receiver) = channel();
        let name = names::FREE_MEMORY;
        sender.send(Meter { name, gauge, before: None, complained: false }).unwrap();
        drop(sender);
        // Ends because the sender is gone.
        sample(Duration::MAX, &receiver);
    }
}
