//! What the dispatcher and its programs in the kernel do during a load: system calls as strace
//! counts them, and runs of BPF programs as the kernel counts them.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use tempfile::TempDir;

use crate::load::Metrics;
use crate::machine;

/// The switch of the kernel's statistics of BPF programs, for the whole machine.
const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// The reason why nothing can be counted here, if there is one.
pub fn missing() -> Option<String> {
    machine::find_program("strace").is_none().then(|| "strace is not installed".to_owned())
}

/// Counts from its start until [`Calls::finish`]. Clients and workers are not slowed down.
#[derive(Debug)]
pub struct Calls {
    front: i32,
    strace: Child,
    directory: TempDir,
    since: Instant,
    runs: Vec<Runs>,
    switch: Switch,
}

/// The runs of a program so far.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Runs {
    id: u32,
    #[serde(rename = "type")]
    kind: String,
    /// Absent while the kernel does not count.
    #[serde(default, rename = "run_cnt")]
    count: u64,
    #[serde(default, rename = "run_time_ns")]
    nanos: u64,
}

/// Puts the statistics back as they were.
#[derive(Debug)]
struct Switch(Option<String>);

impl Drop for Switch {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = fs::write(SWITCH, before);
        }
    }
}

impl Calls {
    /// Begins to count the calls of all threads of `front`.
    pub fn start(front: i32) -> io::Result<Calls> {
        let directory = TempDir::with_prefix("bench-")?;
        let before = fs::read_to_string(SWITCH).ok().filter(|_| fs::write(SWITCH, "1").is_ok());
        let strace = Command::new("strace")
            .args(["-c", "-f", "-p", &front.to_string(), "-o"])
            .arg(summary(&directory))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let calls = Calls {
            front,
            strace,
            directory,
            since: Instant::now(),
            runs: Vec::new(),
            switch: Switch(before),
        };
        calls.wait_attached()?;
        Ok(Calls { since: Instant::now(), runs: runs(front), ..calls })
    }

    fn wait_attached(&self) -> io::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !threads(self.front)?.iter().all(|thread| is_traced(thread)) {
            if Instant::now() > deadline {
                return Err(io::Error::other("strace did not attach"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Adds the figures; `metrics` has the load's rate.
    pub fn finish(mut self, metrics: &mut Metrics) -> io::Result<()> {
        let seconds = self.since.elapsed().as_secs_f64();
        let after = runs(self.front);
        kill(Pid::from_raw(self.strace.id() as i32), Signal::SIGINT)?;
        self.strace.wait()?;
        drop(self.switch);
        let calls = total(&fs::read_to_string(summary(&self.directory))?) as f64 / seconds;
        let rate = metrics.get("rate").copied().unwrap_or(0.0);
        metrics.insert("calls".to_owned(), calls);
        if rate > 0.0 {
            metrics.insert("calls_each".to_owned(), calls / rate);
        }
        for end in &after {
            let name = match end.kind.as_str() {
                "sk_lookup" | "sk_reuseport" => "lookup",
                "sock_ops" => "events",
                _ => continue,
            };
            let start = self.runs.iter().find(|start| start.id == end.id);
            let (count, nanos) = start.map_or((0, 0), |start| (start.count, start.nanos));
            let (count, nanos) = ((end.count - count) as f64, (end.nanos - nanos) as f64);
            if count > 0.0 && rate > 0.0 {
                metrics.insert(format!("{name}_ns"), nanos / count);
                metrics.insert(format!("{name}_runs"), count / seconds / rate);
            }
        }
        Ok(())
    }
}

fn summary(directory: &TempDir) -> PathBuf {
    directory.path().join("summary")
}

fn threads(pid: i32) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(format!("/proc/{pid}/task"))?.map(|entry| Ok(entry?.path())).collect()
}

fn is_traced(thread: &Path) -> bool {
    let status = fs::read_to_string(thread.join("status")).unwrap_or_default();
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    // A thread that has ended in the meantime need not be traced.
    tracer.is_none_or(|pid| pid.trim() != "0")
}

/// The calls of a summary of `strace -c`: the fourth column of each line of a call.
fn total(summary: &str) -> u64 {
    let calls = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.first()?.parse::<f64>().ok()?;
        (*words.last()? != "total").then(|| words.get(3)?.parse::<u64>().ok())?
    };
    summary.lines().filter_map(calls).sum()
}

/// The programs that a process has, or its links run; none without bpftool.
fn runs(pid: i32) -> Vec<Runs> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let infos = entries.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    let ids: BTreeSet<u32> = infos.filter_map(|info| program(&info)).collect();
    let show = |id: u32| {
        let mut bpftool = Command::new("bpftool");
        let out = bpftool.args(["--json", "prog", "show", "id", &id.to_string()]).output().ok()?;
        serde_json::from_slice(&out.stdout).ok()
    };
    ids.into_iter().filter_map(show).collect()
}

/// The id of the program in the fdinfo of a program or of a link.
fn program(fdinfo: &str) -> Option<u32> {
    fdinfo.lines().find_map(|line| line.strip_prefix("prog_id:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{program, total};

    #[test]
    fn calls_of_a_summary() {
        let summary = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 90.00    0.000900           9       100           bpf
 10.00    0.000100           5        20         3 epoll_wait
------ ----------- ----------- --------- --------- ----------------
100.00    0.001000           8       120         3 total
";
        assert_eq!(total(summary), 120);
        assert_eq!(total(""), 0);
    }

    #[test]
    fn program_of_a_link() {
        let link = "pos:\t0\nlink_type:\tnetns\nlink_id:\t2\nprog_id:\t4857\n";
        assert_eq!(program(link), Some(4857));
        assert_eq!(program("pos:\t0\nflags:\t02\n"), None);
    }
}
