//! Reads what processes write to stdout and stderr (`output = "log"`) and logs it as whole lines.
//!
//! A process is always read, so it never blocks for long, however slow the log is. Lines beyond the
//! bounds below are counted and not logged. Every bound holds for one process, so a process that
//! writes much costs other processes and the dispatcher nothing.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dispatch_protocol::wire::is_hidden;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::watch;

use crate::background::logger::{has_room, quoted, value};
use crate::config::Account;
use dispatcher_core::ProcessId;

/// Most bytes of a line in the log, escape sequences included; the rest is cut off. The line of the
/// log has room for the other values.
const MAX_LINE: usize = 3_584;

/// Bytes that a pipe holds while no dispatcher reads it; the most that the kernel allows by default.
const PIPE: usize = 1 << 20;

/// Most bytes per read.
const READ: usize = 16 * 1024;

/// Most bytes that are read of one process in one [`PERIOD`]; then the process may have to wait for
/// the rest of the period. More would only take processor time from others: the log takes much
/// less.
const BUDGET: usize = 512 * 1024;
const PERIOD: Duration = Duration::from_millis(100);

/// How long the pipes stay open after the end of the process and its group. A process that has left
/// the group may still hold them.
const AFTER_END: Duration = Duration::from_secs(2);

/// How often lost lines are reported.
const REPORT: Duration = Duration::from_secs(1);

/// Lines of each process that are kept in memory, and the bytes of each.
const LAST_LINES: usize = 20;
const LAST_LINE: usize = 512;

/// Ended processes whose last lines are kept.
const ENDED_PROCESSES: usize = 1024;

/// Lines that were not logged, of all processes since the start.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Lines of processes that were not logged, since the start.
pub fn lost_lines() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// A stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// The name of the stream in the log.
    pub fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        }
    }
}

const STREAMS: [Stream; 2] = [Stream::Stdout, Stream::Stderr];

/// A line that a process has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputLine {
    /// The process.
    pub pid: i32,
    /// Where it wrote the line.
    pub stream: Stream,
    /// The line, not escaped; at most 512 bytes.
    pub text: String,
}

type Kept = Arc<Mutex<VecDeque<OutputLine>>>;

/// The last lines of each process, also of those that have ended. Without output in the log there
/// are none.
#[derive(Clone, Debug, Default)]
pub struct LastOutput(Arc<Mutex<AllKept>>);

#[derive(Debug, Default)]
struct AllKept {
    /// With the number of its start among all processes.
    processes: HashMap<ProcessId, (u64, Kept)>,
    started: u64,
}

impl LastOutput {
    /// The last 20 lines, oldest first.
    pub fn of(&self, process: ProcessId) -> Vec<OutputLine> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = all.processes.get(&process).map(|(_, kept)| Arc::clone(kept));
        drop(all);
        let kept = kept.unwrap_or_default();
        let lines = kept.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().cloned().collect()
    }

    /// The place for the lines of a process that starts.
    fn keep(&self, process: ProcessId) -> Kept {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let AllKept { processes, started } = &mut *all;
        if processes.len() >= ENDED_PROCESSES {
            // A reader holds the lines of each process that has not ended.
            let ended = processes.iter().filter(|(_, (_, kept))| Arc::strong_count(kept) == 1);
            let oldest =
                ended.min_by_key(|(_, (started, _))| *started).map(|(process, _)| *process);
            if let Some(oldest) = oldest {
                processes.remove(&oldest);
            }
        }
        *started += 1;
        let (_, kept) = processes.entry(process).or_insert_with(|| (*started, Kept::default()));
        Arc::clone(kept)
    }
}

/// The ends of the pipes of a process that the dispatcher reads.
pub(super) struct Pipes {
    read: [Option<Receiver>; 2],
}

impl Pipes {
    /// Pipes, and the ends of them for stdout and stderr of a process that is about to start. With
    /// `outlive`, a write of the process does not fail once the dispatcher is gone: what it writes
    /// waits in the pipe, as much as fits, for [`Pipes::of_running`].
    ///
    /// # Errors
    ///
    /// When the system has no descriptors left.
    pub(super) fn new(account: Option<&Account>, outlive: bool) -> io::Result<(Pipes, [Stdio; 2])> {
        let one = || -> io::Result<(Option<Receiver>, OwnedFd)> {
            let (read, mut write) = pipe_with(PipeFlags::CLOEXEC)?;
            if outlive {
                // More time until the next dispatcher. The kernel may refuse it.
                let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE);
                // A pipe that its writer could read, too, is never without a reader.
                let path = format!("/proc/self/fd/{}", write.as_raw_fd());
                let both = OFlags::RDWR | OFlags::CLOEXEC;
                write = rustix::fs::open(path, both, Mode::empty()).unwrap_or(write);
            }
            if let Some(account) = account {
                // The process may open `/dev/stdout` by name. Without the permission to change the
                // owner it cannot, which is all that would fail.
                let owner = (
                    rustix::fs::Uid::from_raw(account.uid),
                    rustix::fs::Gid::from_raw(account.gid),
                );
                let _ = rustix::fs::fchown(&write, Some(owner.0), Some(owner.1));
            }
            Ok((Some(Receiver::from_owned_fd(read)?), write))
        };
        let (stdout, stderr) = (one()?, one()?);
        Ok((Pipes { read: [stdout.0, stderr.0] }, [stdout.1.into(), stderr.1.into()]))
    }

    /// The pipes of a process that an earlier dispatcher started with `outlive`; `None` if it has
    /// none of them.
    ///
    /// # Errors
    ///
    /// When the system does not let the dispatcher open them.
    pub(super) fn of_running(pid: i32) -> io::Result<Option<Pipes>> {
        let file = |fd: u8| PathBuf::from(format!("/proc/{pid}/fd/{fd}"));
        let pipe = |fd: u8| -> Option<PathBuf> {
            let pipe = std::fs::read_link(file(fd)).ok()?;
            // No other pipe is open for both on its writer's side.
            let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim();
            let both =
                u32::from_str_radix(flags, 8).ok()? & OFlags::RWMODE.bits() == OFlags::RDWR.bits();
            (both && pipe.to_string_lossy().starts_with("pipe:")).then_some(pipe)
        };
        let open = |fd| -> io::Result<Receiver> {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            Receiver::from_owned_fd(rustix::fs::open(file(fd), flags, Mode::empty())?)
        };
        let (stdout, stderr) = (pipe(1), pipe(2));
        let stderr_differs = stderr != stdout;
        let stdout = stdout.map(|_| open(1)).transpose()?;
        let stderr = stderr.filter(|_| stderr_differs).map(|_| open(2)).transpose()?;
        let any = stdout.is_some() || stderr.is_some();
        Ok(any.then_some(Pipes { read: [stdout, stderr] }))
    }

    /// Reads them from now on, on a task of its own.
    pub(super) fn read(self, source: Source, process: ProcessId, last: &LastOutput) -> Reading {
        let state = State {
            lines: Default::default(),
            open: [0, 1].map(|stream: usize| self.read[stream].is_some()),
            limit: LineLimit::new(source.rate, Instant::now()),
            last: last.keep(process),
        };
        let reader = Arc::new(Reader { fds: self.read, source, state: Mutex::new(state) });
        let (ended, end) = watch::channel(());
        tokio::spawn(run(Arc::clone(&reader), end));
        Reading { reader, _ended: ended }
    }
}

/// Reads on what a process of an earlier dispatcher writes, if that dispatcher has read it.
pub(super) fn of_survivor(
    source: Source,
    process: ProcessId,
    last: &LastOutput,
) -> Option<Reading> {
    match Pipes::of_running(source.pid) {
        Ok(pipes) => pipes.map(|pipes| pipes.read(source, process, last)),
        Err(error) => {
            log::warn!(
                "event=process_output_not_read pool={pool} name={name} pid={pid} error={error}",
                pool = value(&source.pool),
                name = value(&source.name),
                pid = source.pid,
                error = quoted(error)
            );
            None
        }
    }
}

/// The process as the log names it.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) pool: String,
    pub(super) name: String,
    pub(super) pid: i32,
    /// Most lines per second.
    pub(super) rate: u32,
}

/// The output of a running process. After this is dropped, which is when the process and its group
/// have ended, the pipes are read for at most [`AFTER_END`].
pub(super) struct Reading {
    reader: Arc<Reader>,
    _ended: watch::Sender<()>,
}

impl Drop for Reading {
    /// Logs what the process has written before its end, so that the lines are in the log and in
    /// [`LastOutput`] before the end is reported.
    fn drop(&mut self) {
        let mut buffer = [0; READ];
        for (stream, fd) in self.reader.fds.iter().enumerate() {
            let Some(fd) = fd else { continue };
            // So often: more than a pipe holds. The runtime may not know yet that there is
            // something to read, so it is not asked.
            for _ in 0..=PIPE / READ {
                let Ok(count) = rustix::io::read(fd, &mut buffer) else { break };
                self.reader.take(stream, &buffer[..count]);
                if count == 0 {
                    break;
                }
            }
        }
    }
}

struct Reader {
    fds: [Option<Receiver>; 2],
    source: Source,
    state: Mutex<State>,
}

struct State {
    lines: [Lines; 2],
    open: [bool; 2],
    limit: LineLimit,
    last: Kept,
}

async fn run(reader: Arc<Reader>, mut ended: watch::Receiver<()>) {
    let over = async {
        // The sender sends nothing: it is dropped.
        let _ = ended.changed().await;
        tokio::time::sleep(AFTER_END).await;
    };
    tokio::pin!(over);
    let mut pace = Pace { since: Instant::now(), bytes: 0 };
    loop {
        let (open, due) = reader.waiting();
        if open == [false; 2] {
            break;
        }
        let (stream, ready) = tokio::select! {
            () = &mut over => break,
            () = until(due) => {
                reader.report(Instant::now());
                continue;
            }
            ready = readable(&reader.fds[0]), if open[0] => (0, ready),
            ready = readable(&reader.fds[1]), if open[1] => (1, ready),
        };
        if ready.is_err() {
            break;
        }
        let Some(count) = reader.read(stream) else { continue };
        match pace.rest(count, Instant::now()) {
            Some(rest) => tokio::time::sleep(rest).await,
            // The other tasks of this thread come in between.
            None => tokio::task::yield_now().await,
        }
    }
    reader.close(0);
    reader.close(1);
    reader.report(Instant::now() + REPORT);
}

async fn readable(fd: &Option<Receiver>) -> io::Result<()> {
    match fd {
        Some(fd) => fd.readable().await,
        None => std::future::pending().await,
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// The bytes read in this period.
struct Pace {
    since: Instant,
    bytes: usize,
}

impl Pace {
    /// How long to pause after reading so many bytes, if the budget is used up.
    fn rest(&mut self, count: usize, now: Instant) -> Option<Duration> {
        let gone = now.saturating_duration_since(self.since);
        if gone >= PERIOD {
            (self.since, self.bytes) = (now, 0);
        }
        self.bytes += count;
        (self.bytes >= BUDGET).then(|| PERIOD.saturating_sub(gone)).filter(|rest| !rest.is_zero())
    }
}

impl Reader {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open streams, and when a report is due.
    fn waiting(&self) -> ([bool; 2], Option<Instant>) {
        let state = self.state();
        (state.open, state.limit.due)
    }

    /// Reads once; `None` when there is nothing to read now.
    fn read(&self, stream: usize) -> Option<usize> {
        let mut buffer = [0; READ];
        match self.fds[stream].as_ref()?.try_read(&mut buffer) {
            Ok(count) => {
                self.take(stream, &buffer[..count]);
                Some(count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(_) => {
                self.close(stream);
                None
            }
        }
    }

    /// Logs the lines of what was read. Nothing read means that the stream has ended.
    fn take(&self, stream: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return self.close(stream);
        }
        let now = Instant::now();
        let mut state = self.state();
        let State { lines, limit, last, .. } = &mut *state;
        lines[stream].feed(bytes, |line, cut| {
            self.log((stream, line, cut), limit, last, now);
        });
        drop(state);
        self.report(now);
    }

    /// Logs a line, unless the process has had its share.
    fn log(
        &self,
        (stream, line, cut): (usize, &[u8], u64),
        limit: &mut LineLimit,
        last: &Kept,
        now: Instant,
    ) {
        let Source { pool, name, pid, .. } = &self.source;
        let stream = STREAMS[stream];
        let text = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line));
        {
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            if last.len() >= LAST_LINES {
                last.pop_front();
            }
            let text = shortened(&text, LAST_LINE, cut > 0).0;
            last.push_back(OutputLine { pid: *pid, stream, text });
        }
        if !limit.allow(now) || !has_room() {
            limit.lost(now);
            return;
        }
        let (text, more) = shortened(&text, MAX_LINE, cut > 0);
        let cut = cut + more;
        let stream = stream.name();
        let (pool, name, text) = (value(pool), value(name), quoted(text));
        match cut {
            0 => log::info!(
                "event=process_output pool={pool} name={name} pid={pid} stream={stream} line={text}"
            ),
            _ => log::info!(
                "event=process_output pool={pool} name={name} pid={pid} stream={stream} line={text} cut={cut}"
            ),
        }
    }

    /// Reports lost lines, if that is due.
    fn report(&self, now: Instant) {
        let Some(lines) = self.state().limit.report(now) else { return };
        LOST.fetch_add(lines, Ordering::Relaxed);
        let Source { pool, name, pid, .. } = &self.source;
        let (pool, name) = (value(pool), value(name));
        log::warn!("event=process_output_lost pool={pool} name={name} pid={pid} lines={lines}");
    }

    /// The stream has ended: the rest is a line, too.
    fn close(&self, stream: usize) {
        let mut state = self.state();
        let State { lines, open, limit, last, .. } = &mut *state;
        if std::mem::take(&mut open[stream]) {
            lines[stream]
                .end(|line, cut| self.log((stream, line, cut), limit, last, Instant::now()));
        }
    }
}

/// The text with at most `most` bytes in the log, and the number of bytes cut off. `…` at its end
/// shows a cut, here or before.
fn shortened(text: &str, most: usize, is_cut: bool) -> (String, u64) {
    let mark = '…'.len_utf8();
    let plain = |c: char| !matches!(c, '"' | '\\') && !is_hidden(c);
    if text.len() + mark <= most && text.chars().all(plain) {
        return (if is_cut { format!("{text}…") } else { text.to_owned() }, 0);
    }
    let mut shown = 0;
    let end = text.char_indices().find_map(|(at, c)| {
        shown += match c {
            '"' | '\\' | '\n' | '\t' => 2,
            // `\u{10ffff}`
            c if is_hidden(c) => 10,
            c => c.len_utf8(),
        };
        (shown + mark > most).then_some(at)
    });
    let end = end.unwrap_or(text.len());
    let cut = (text.len() - end) as u64;
    let mark = if is_cut || cut > 0 { "…" } else { "" };
    (format!("{}{mark}", &text[..end]), cut)
}

/// Puts pieces of a stream together to lines.
#[derive(Default)]
struct Lines {
    /// The start of a line whose end was not read yet.
    begun: Vec<u8>,
    /// The bytes after `begun` that are cut off.
    cut: u64,
}

impl Lines {
    fn feed(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8], u64)) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (text, whole) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            if whole && self.begun.is_empty() && text.len() <= MAX_LINE {
                line(text, 0);
                continue;
            }
            let taken = text.len().min(MAX_LINE - self.begun.len());
            self.begun.extend_from_slice(&text[..taken]);
            self.cut += (text.len() - taken) as u64;
            if whole {
                line(&self.begun, self.cut);
                self.begun.clear();
                self.cut = 0;
            }
        }
    }

    fn end(&mut self, mut line: impl FnMut(&[u8], u64)) {
        if !self.begun.is_empty() {
            line(&self.begun, self.cut);
            *self = Lines::default();
        }
    }
}

/// Limits the lines of one process in each second, and counts what was lost.
#[derive(Debug)]
struct LineLimit {
    rate: u32,
    since: Instant,
    lines: u32,
    lost: u64,
    /// When the next report is due.
    due: Option<Instant>,
}

impl LineLimit {
    fn new(rate: u32, now: Instant) -> LineLimit {
        LineLimit { rate, since: now, lines: 0, lost: 0, due: None }
    }

    fn allow(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= Duration::from_secs(1) {
            (self.since, self.lines) = (now, 0);
        }
        self.lines = self.lines.saturating_add(1);
        self.lines <= self.rate
    }

    fn lost(&mut self, now: Instant) {
        self.lost += 1;
        self.due.get_or_insert(now + REPORT);
    }

    /// The lost lines since the last report, if one is due.
    fn report(&mut self, now: Instant) -> Option<u64> {
        self.due.take_if(|due| *due <= now)?;
        Some(std::mem::take(&mut self.lost))
    }
}

#[cfg(test)]
mod tests;
