//! The receiving process: what it measures, and how it is started.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use super::{END_FLOOD, END_TIMED, FLOOD, TIMED, now};

/// Measures until it is told to stop: prints p50 and p99 in µs after the timed messages, and
/// messages a second after the others.
pub fn measure(mut next: impl FnMut(&mut Vec<u8>)) {
    let mut bytes = Vec::new();
    let (mut times, mut count, mut first, mut last) = (Vec::new(), 0u64, 0, 0);
    loop {
        next(&mut bytes);
        match bytes[0] {
            TIMED => {
                let sent = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
                times.push(now().saturating_sub(sent));
            }
            END_TIMED => {
                times.sort_unstable();
                let at = |part: usize| times[times.len() * part / 100] as f64 / 1000.0;
                println!("{} {}", at(50), at(99));
                times.clear();
            }
            FLOOD => {
                last = now();
                first = if count == 0 { last } else { first };
                count += 1;
            }
            END_FLOOD => {
                println!("{}", count as f64 * 1e9 / (last - first).max(1) as f64);
                count = 0;
            }
            _ => return,
        }
    }
}

/// A receiving process.
pub struct Receiver {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Receiver {
    /// Starts this program with these arguments, and waits until it is ready.
    pub fn start(arguments: &[&str]) -> Receiver {
        Receiver::start_with(arguments, Stdio::null())
    }

    /// The same with a descriptor as standard input.
    pub fn start_on(arguments: &[&str], input: OwnedFd) -> Receiver {
        Receiver::start_with(arguments, Stdio::from(input))
    }

    fn start_with(arguments: &[&str], input: Stdio) -> Receiver {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(arguments).stdin(input).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut receiver = Receiver { child, lines };
        assert_eq!(receiver.line(), "ready");
        receiver
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// The next line that it prints.
    pub fn numbers<const N: usize>(&mut self) -> [f64; N] {
        let line = self.line();
        let numbers: Vec<f64> = line.split(' ').map(|word| word.parse().expect(&line)).collect();
        numbers.try_into().unwrap()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
