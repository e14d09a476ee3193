//! Reads what processes write to stdout and stderr (`output = "log"`) and logs it as whole lines.
//!
//! A process is always read, so it never blocks for long, however slow the log is. Lines beyond the
//! bounds below are counted and not logged. Every bound holds for one process, so a process that
//! writes much costs other processes and the dispatcher nothing.

mod last;
mod lines;

pub use self::last::{LastOutput, OutputLine, Stream};

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::watch;

use self::last::{Kept, LAST_LINE, LAST_LINES, STREAMS};
use self::lines::{LineLimit, Lines, MAX_LINE, Pace, REPORT, shortened};
use crate::background::logger::{has_room, quoted, value};
use crate::config::Account;
use dispatcher_core::ProcessId;

/// Bytes that a pipe holds while no dispatcher reads it. The kernel limits the memory in all pipes
/// of a user, so more would leave less for others.
const PIPE: usize = 256 * 1024;

/// Most bytes per read.
const READ: usize = 16 * 1024;

/// How long the pipes stay open after the end of the process and its group. A process that has left
/// the group may still hold them.
const AFTER_END: Duration = Duration::from_secs(2);

/// Lines that were not logged, of all processes since the start.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Lines of processes that were not logged, since the start.
pub fn lost_lines() -> u64 {
    LOST.load(Ordering::Relaxed)
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
    pub(super) fn new(
        account: Option<&Account>,
        outlive: bool,
    ) -> io::Result<(Pipes, [OwnedFd; 2])> {
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
        Ok((Pipes { read: [stdout.0, stderr.0] }, [stdout.1, stderr.1]))
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
            // Another process may hold the pipe still, but this one ends its line no more.
            self.reader.end_line(stream);
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
        // A flood is many short lines: only what is needed is done for each.
        let mut left = bytes.iter().filter(|&&byte| byte == b'\n').count();
        lines[stream].feed(bytes, |line, cut| {
            left = left.saturating_sub(1);
            let line = Line { stream: STREAMS[stream], bytes: line, cut };
            if left < LAST_LINES {
                self.keep(last, line);
            }
            self.log(line, limit, now);
        });
        drop(state);
        self.report(now);
    }

    fn keep(&self, last: &Kept, line: Line<'_>) {
        let (text, _) = shortened(&line.text(), LAST_LINE, line.cut > 0);
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() >= LAST_LINES {
            last.pop_front();
        }
        last.push_back(OutputLine { pid: self.source.pid, stream: line.stream, text });
    }

    /// Logs a line, unless the process has had its share.
    fn log(&self, line: Line<'_>, limit: &mut LineLimit, now: Instant) {
        if !limit.allow(now) || !has_room(limit.many()) {
            limit.lost(now);
            return;
        }
        let Source { pool, name, pid, .. } = &self.source;
        let (text, more) = shortened(&line.text(), MAX_LINE, line.cut > 0);
        let cut = line.cut + more;
        let stream = line.stream.name();
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
        self.end_line(stream);
        self.state().open[stream] = false;
    }

    /// Logs a line that has no end.
    fn end_line(&self, stream: usize) {
        let mut state = self.state();
        let State { lines, limit, last, .. } = &mut *state;
        lines[stream].end(|line, cut| {
            let line = Line { stream: STREAMS[stream], bytes: line, cut };
            self.keep(last, line);
            self.log(line, limit, Instant::now());
        });
    }
}

/// A line of a stream.
#[derive(Clone, Copy)]
struct Line<'a> {
    stream: Stream,
    bytes: &'a [u8],
    /// Bytes that are missing at its end.
    cut: u64,
}

impl Line<'_> {
    fn text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(self.bytes.strip_suffix(b"\r").unwrap_or(self.bytes))
    }
}

#[cfg(test)]
mod tests;
