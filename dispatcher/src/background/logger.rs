//! The log: lines to stderr, from a thread of its own, so that no other thread waits for stderr.
//!
//! Lines go through a bounded queue to the `log` thread. When the queue is full (a paused terminal,
//! a pipe without a reader), lines are dropped and counted, and the count is logged as soon as
//! there is room. `DISPATCHER_LOG` selects what is logged at the start, in the syntax of
//! `env_logger`; `log_level` of the configuration applies to all that the variable does not name.
//! Both can change at run time: see [`set_level`].
//!
//! Values in log lines go through [`value`] or [`quoted`].

mod filter;
mod output;
mod repeats;
mod value;

pub use self::value::{Quoted, Value, quoted, value};

use self::output::Output;

use std::fmt::Write as _;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use dispatch_protocol::wire::is_hidden;
use log::{Level, LevelFilter, Record};

/// The variable that selects what is logged.
pub const VARIABLE: &str = "DISPATCHER_LOG";

/// Most lines that wait to be written.
const MAX_LINES: usize = 8192;

/// The longest line; the rest is cut off, so that the queue is bounded in bytes too.
const MAX_LINE: usize = 4096;

static QUEUE: OnceLock<Queue> = OnceLock::new();

static REPEATS: repeats::Repeats = repeats::Repeats::new();

static SWITCH: OnceLock<Switch> = OnceLock::new();

/// Starts the `log` thread and makes it the destination of the `log` macros. A second call does
/// nothing. `level` comes from the configuration.
///
/// # Errors
///
/// When the system has no thread left.
pub fn init(level: LevelFilter) -> io::Result<()> {
    let style = if stderr_is_journal() { Style::Journal } else { Style::Plain };
    let queue = Queue::start(io::stderr(), MAX_LINES, style)?;
    if QUEUE.set(queue.clone()).is_err() {
        return Ok(());
    }
    let (selected, mistakes) = match environment() {
        Some(text) => {
            let filter = filter::parse(&text, level);
            (filter.directives, filter.mistakes)
        }
        None => (name(level).to_owned(), Vec::new()),
    };
    let switch = SWITCH.get_or_init(|| {
        let current = Current { logger: build(&queue, style, &selected), selected };
        Switch { queue: queue.clone(), style, current: RwLock::new(current) }
    });
    // Written whatever the level is.
    for mistake in mistakes {
        let text = format!(
            "event=log_filter_ignored mistake={} hint={}",
            quoted(format_args!("{VARIABLE}: {mistake}")),
            quoted(filter::hint())
        );
        let _ = queue.clone().write(own_line(&text, Level::Warn, style).as_bytes());
    }
    // An error means that another logger is set already, for example by a test; that logger stays.
    if log::set_logger(switch).is_ok() {
        log::set_max_level(switch.read().logger.filter());
    }
    Ok(())
}

/// The selection of the environment; it overrides the configuration. Text that is not UTF-8 becomes
/// a mistake that [`filter::parse`] reports.
fn environment() -> Option<String> {
    let text = std::env::var_os(VARIABLE)?;
    Some(text.to_string_lossy().into_owned()).filter(|text| !text.trim().is_empty())
}

fn build(queue: &Queue, style: Style, selected: &str) -> env_logger::Logger {
    let all = selected.split([',', '/']).next().and_then(|level| level.parse().ok());
    let loud = all.unwrap_or(LevelFilter::Warn).min(LevelFilter::Warn);
    let mut builder = env_logger::Builder::new();
    for target in filter::LOUD {
        builder.filter_module(target, loud);
    }
    builder
        .parse_filters(selected)
        .target(env_logger::Target::Pipe(Box::new(queue.clone())))
        .write_style(env_logger::WriteStyle::Never)
        .format(move |out, record| {
            out.write_all(line(record, style, std::time::SystemTime::now()).as_bytes())
        })
        .build()
}

/// The current second. The epoch does not matter: it only separates one second from the next.
fn second() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// The name of a level.
fn name(level: LevelFilter) -> &'static str {
    match level {
        LevelFilter::Off => "off",
        LevelFilter::Error => "error",
        LevelFilter::Warn => "warn",
        LevelFilter::Info => "info",
        LevelFilter::Debug => "debug",
        LevelFilter::Trace => "trace",
    }
}

/// The current selection: a level, or the text of `DISPATCHER_LOG`.
pub fn selected() -> String {
    SWITCH.get().map_or_else(String::new, |switch| switch.read().selected.clone())
}

/// Sets the level from now on, whatever was selected before; returns the old selection. Not for the
/// hot thread: it allocates, and waits for lines that are being written into the queue.
pub fn set_level(level: LevelFilter) -> String {
    let Some(switch) = SWITCH.get() else { return String::new() };
    let current = Current {
        logger: build(&switch.queue, switch.style, name(level)),
        selected: name(level).to_owned(),
    };
    let before = {
        let mut place = switch.current.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *place, current).selected
    };
    // Written whatever the level is now.
    let text = format!("event=log_level from={} to={}", quoted(&before), name(level));
    let mut record = Record::builder();
    let record = record.target(module_path!()).file_static(Some(file!())).line(Some(line!()));
    if REPEATS.allow(&record.build(), second()) {
        let _ = switch.queue.clone().write(own_line(&text, Level::Info, switch.style).as_bytes());
    }
    log::set_max_level(level);
    before
}

/// Applies the level of a configuration that was read again. Does nothing when `DISPATCHER_LOG` is
/// set.
pub fn configure(level: LevelFilter) {
    if environment().is_none() && selected() != name(level) {
        set_level(level);
    }
}

/// The current logger. A thread that logs never waits for a thread that changes the logger.
struct Switch {
    queue: Queue,
    style: Style,
    current: RwLock<Current>,
}

struct Current {
    logger: env_logger::Logger,
    selected: String,
}

impl Switch {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Current> {
        self.current.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl log::Log for Switch {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        self.current.try_read().is_ok_and(|current| current.logger.enabled(metadata))
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) && !REPEATS.allow(record, second()) {
            return;
        }
        match self.current.try_read() {
            Ok(current) => current.logger.log(record),
            // The logger is being changed: one line too many is better than one too few.
            Err(_) => {
                let text = line(record, self.style, std::time::SystemTime::now());
                let _ = self.queue.clone().write(text.as_bytes());
            }
        }
    }

    fn flush(&self) {}
}

/// Lines dropped since the start.
pub fn dropped_lines() -> u64 {
    QUEUE.get().map_or(0, Queue::dropped)
}

/// Whether the queue has room for a line of a process. Half of it is for the dispatcher's own
/// lines. A process with `many` lines gets only an eighth, so the rest is for processes with few.
pub fn has_room(many: bool) -> bool {
    let share = if many { MAX_LINES / 8 } else { MAX_LINES / 2 };
    QUEUE.get().is_none_or(|queue| queue.waiting.load(Ordering::Relaxed) < share)
}

/// Lines dropped since the start because one place in the program had too many.
pub fn repeated_lines() -> u64 {
    REPEATS.left_out()
}

/// Waits until every line logged so far is written, for at most `timeout`; returns whether it is.
/// For the end of the process.
pub fn flush(timeout: Duration) -> bool {
    QUEUE.get().is_none_or(|queue| queue.flush(timeout))
}

/// The start of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// Time and level.
    Plain,
    /// The journal adds the time and reads the level from `<N>`.
    Journal,
}

/// Whether stderr is the journal's socket: `JOURNAL_STREAM` names its device and inode, because the
/// variable stays set after a redirection.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    rustix::fs::fstat(io::stderr().as_fd())
        .is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// One line: `2026-01-31T12:00:00.000Z info shell: event=worker_joined worker=3 pool=web`.
fn line(record: &Record<'_>, style: Style, now: std::time::SystemTime) -> String {
    let (name, priority) = match record.level() {
        Level::Error => ("error", 3),
        Level::Warn => ("warn", 4),
        Level::Info => ("info", 6),
        Level::Debug => ("debug", 7),
        Level::Trace => ("trace", 7),
    };
    let mut text = String::with_capacity(128);
    let target = record.target();
    let target = target.strip_prefix("dispatcher::").unwrap_or(target);
    // Writing to a string cannot fail.
    let _ = match style {
        Style::Plain => write!(text, "{} {name} {target}: ", humantime::format_rfc3339_millis(now)),
        Style::Journal => write!(text, "<{priority}>{target}: "),
    };
    let start = text.len();
    let _ = write!(text, "{}", record.args());
    let _ = record.key_values().visit(&mut Pairs(&mut text));
    // Text of a peer must not look like a line of the dispatcher, nor reach the terminal as an
    // escape sequence.
    if text[start..].contains(is_hidden) {
        let clean: String =
            text[start..].chars().map(|c| if is_hidden(c) { '\u{fffd}' } else { c }).collect();
        text.truncate(start);
        text.push_str(&clean);
    }
    if text.len() >= MAX_LINE {
        let mut end = MAX_LINE - '…'.len_utf8() - 1;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text.push('\n');
    text
}

/// A line of the logger itself; no filter applies.
fn own_line(text: &str, level: Level, style: Style) -> String {
    line(
        &Record::builder()
            .level(level)
            .target("dispatcher::logger")
            .args(format_args!("{text}"))
            .build(),
        style,
        std::time::SystemTime::now(),
    )
}

/// Writes ` key=value` for each pair.
struct Pairs<'a>(&'a mut String);

impl<'kvs> log::kv::VisitSource<'kvs> for Pairs<'_> {
    fn visit_pair(
        &mut self,
        key: log::kv::Key<'kvs>,
        shown: log::kv::Value<'kvs>,
    ) -> Result<(), log::kv::Error> {
        let _ = write!(self.0, " {key}={}", value(shown));
        Ok(())
    }
}

enum Message {
    Line(Box<[u8]>),
    Flush(SyncSender<()>),
}

/// The sending end of the queue. As a writer it takes one whole line per call, which is how
/// `env_logger` calls it.
#[derive(Clone)]
struct Queue {
    sender: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
    /// Lines that wait to be written.
    waiting: Arc<AtomicUsize>,
}

impl Queue {
    fn start(
        writer: impl Write + Send + 'static,
        capacity: usize,
        style: Style,
    ) -> io::Result<Queue> {
        let (sender, receiver) = sync_channel(capacity);
        let dropped = Arc::new(AtomicU64::new(0));
        let output = Output::new(writer, style, Arc::clone(&dropped));
        let waiting = output.waiting();
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_out(&receiver, output))?;
        Ok(Queue { sender, dropped, waiting })
    }

    fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let (done, flushed) = sync_channel(1);
        let mut message = Message::Flush(done);
        loop {
            match self.sender.try_send(message) {
                Ok(()) => break,
                Err(TrySendError::Full(returned)) if Instant::now() < deadline => {
                    message = returned;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => return false,
            }
        }
        flushed.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }
}

impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Before the log thread can receive it.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if self.sender.try_send(Message::Line(line.into())).is_err() {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How long the `log` thread waits after a panic.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// The `log` thread. It continues after a panic, because otherwise nothing would be logged any
/// more.
fn write_out<W: Write>(receiver: &Receiver<Message>, mut output: Output<W>) {
    let mut failure: Option<String> = None;
    loop {
        let run = || {
            if let Some(error) = failure.take() {
                output.failed(&error);
            }
            output.run(receiver);
        };
        let Err(error) = crate::background::restart::caught(run) else { return };
        output.lost_one();
        failure = Some(error);
        std::thread::sleep(AFTER_FAILURE);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// A writer that waits for permission before each write, and passes on what was written.
    struct Gated {
        permits: Receiver<()>,
        written: Sender<String>,
    }

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.permits.recv().map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            let _ = self.written.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn loud_crates_are_quiet_unless_they_are_named() {
        let queue = Queue::start(io::sink(), 8, Style::Plain).expect("a thread");
        for (selected, target, level, shown) in [
            ("debug", "dispatcher::sys", Level::Debug, true),
            ("debug", "aya::maps", Level::Info, false),
            ("debug", "aya_obj", Level::Warn, true),
            ("error", "aya", Level::Warn, false),
            ("warn,aya=debug", "aya::maps", Level::Debug, true),
            ("trace/worker", "aya", Level::Info, false),
        ] {
            let logger = build(&queue, Style::Plain, selected);
            let metadata = log::Metadata::builder().target(target).level(level).build();
            assert_eq!(log::Log::enabled(&logger, &metadata), shown, "{selected} {target} {level}");
        }
    }

    #[test]
    fn a_blocked_writer_blocks_nobody() {
        let (permit, permits) = channel();
        let (written, lines) = channel();
        let mut queue =
            Queue::start(Gated { permits, written }, 4, Style::Plain).expect("a thread");
        let start = Instant::now();
        for number in 0..100 {
            queue.write_all(format!("line {number}\n").as_bytes()).expect("never an error");
        }
        assert!(start.elapsed() < Duration::from_secs(5));
        // Four lines wait, and the writer may hold one.
        let dropped = queue.dropped();
        assert!((95..=96).contains(&dropped), "{dropped}");
        assert!(!queue.flush(Duration::from_millis(20)));

        for _ in 0..16 {
            permit.send(()).expect("the writer");
        }
        assert!(queue.flush(Duration::from_secs(10)));
        let lines: Vec<String> = lines.try_iter().collect();
        assert_eq!(lines[0], "line 0\n");
        assert!(
            lines[1].ends_with(&format!(" warn logger: event=log_lines_dropped count={dropped}\n")),
            "{}",
            lines[1]
        );
        assert_eq!(lines.len() as u64, 100 - dropped + 1);
        assert!(queue.flush(Duration::from_secs(10)), "nothing waits any more");
    }

    /// Panics at the first line.
    struct Defect {
        works: bool,
        written: Sender<String>,
    }

    impl Write for Defect {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            assert!(std::mem::replace(&mut self.works, true), "on purpose");
            let _ = self.written.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_panic_of_the_thread_is_a_line_and_a_count() {
        let (written, lines) = channel();
        let writer = Defect { works: false, written };
        let mut queue = Queue::start(writer, 16, Style::Journal).expect("a thread");
        queue.write_all(b"first\n").expect("never an error");
        queue.write_all(b"second\n").expect("never an error");
        assert!(queue.flush(Duration::from_secs(30)));
        let lines: Vec<String> = lines.try_iter().collect();
        let failed =
            "<3>logger: event=task_failed task=log error=\"on purpose\" restart_in=100ms\n";
        assert!(lines.iter().any(|line| line == failed), "{lines:?}");
        assert!(
            lines.iter().any(|line| line.contains("event=log_lines_dropped count=1")),
            "{lines:?}"
        );
        assert!(lines.iter().any(|line| line == "second\n"), "{lines:?}");
    }

    fn shown(style: Style, text: &str, key_values: &[(&str, &str)]) -> String {
        line(
            &Record::builder()
                .level(Level::Info)
                .target("dispatcher::shell::worker")
                .args(format_args!("{text}"))
                .key_values(&key_values)
                .build(),
            style,
            std::time::UNIX_EPOCH,
        )
    }

    #[test]
    fn lines() {
        assert_eq!(
            shown(Style::Plain, "joined", &[("worker", "3"), ("name", "a b")]),
            "1970-01-01T00:00:00.000Z info shell::worker: joined worker=3 name=\"a b\"\n"
        );
        assert_eq!(shown(Style::Journal, "joined", &[]), "<6>shell::worker: joined\n");
    }

    #[test]
    fn a_line_stays_one_line() {
        assert_eq!(
            shown(Style::Journal, "a\nb\x1b[2J", &[("k", "v\n")]),
            "<6>shell::worker: a\u{fffd}b\u{fffd}[2J k=\"v\\n\"\n"
        );
        let long = shown(Style::Journal, &"é".repeat(MAX_LINE), &[]);
        assert!(long.len() <= MAX_LINE && long.ends_with("…\n"), "{}", long.len());
    }
}
