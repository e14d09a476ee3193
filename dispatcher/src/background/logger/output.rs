//! Writes lines, whole or not at all, and reports lines that could not be written.
//!
//! A write may fail (a full disk, a file size limit) or write only a part. The rest of a line is
//! written before anything else, so no line begins in the middle of another. Lost lines are
//! counted, and the count is written as soon as writing works again: with the next line, or after
//! one second.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use log::Level;

use super::{Message, Style, own_line, quoted};

/// How soon after a failure the count is written again if no line comes.
const RETRY: Duration = Duration::from_secs(1);

/// The pause for a writer that would block: stderr may share its settings with another process.
const REST: Duration = Duration::from_millis(10);

/// The state of the `log` thread.
pub(super) struct Output<W> {
    writer: W,
    style: Style,
    /// Lines dropped since the start.
    dropped: Arc<AtomicU64>,
    /// The part of them that the log has reported.
    reported: u64,
    /// The unwritten rest of a line.
    rest: Vec<u8>,
    /// Lines in the queue.
    waiting: Arc<AtomicUsize>,
}

impl<W: Write> Output<W> {
    pub(super) fn new(writer: W, style: Style, dropped: Arc<AtomicU64>) -> Output<W> {
        let waiting = Arc::default();
        Output { writer, style, dropped, reported: 0, rest: Vec::new(), waiting }
    }

    /// The number of lines in the queue. The sender of a line increases it.
    pub(super) fn waiting(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.waiting)
    }

    /// Writes until the queue is closed.
    pub(super) fn run(&mut self, receiver: &Receiver<Message>) {
        let mut works = true;
        loop {
            let owes =
                self.reported < self.dropped.load(Ordering::Relaxed) || !self.rest.is_empty();
            let message = match owes {
                true => receiver.recv_timeout(RETRY),
                false => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            // After a failure the count of lost lines comes before the next line.
            if !works {
                works = self.report();
            }
            match message {
                Ok(Message::Line(line)) => {
                    self.waiting.fetch_sub(1, Ordering::Relaxed);
                    works = self.put(&line);
                    if !works {
                        self.dropped.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Ok(Message::Flush(done)) => {
                    let _ = self.writer.flush();
                    let _ = done.try_send(());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            // The queue has room again right after a write, so this is the earliest moment to
            // report.
            if works {
                works = self.report();
            }
        }
    }

    /// Counts a line that the thread held when it failed.
    pub(super) fn lost_one(&mut self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// Logs that the thread has failed, and continues.
    pub(super) fn failed(&mut self, error: &str) {
        // The unfinished line may be the cause.
        self.rest.clear();
        let text = format!("event=task_failed task=log error={} restart_in=100ms", quoted(error));
        if !self.put(own_line(&text, Level::Error, self.style).as_bytes()) {
            self.lost_one();
        }
    }

    /// Writes how many lines are missing. False if that failed.
    fn report(&mut self) -> bool {
        let now = self.dropped.load(Ordering::Relaxed);
        if now <= self.reported {
            return self.finish_line();
        }
        let text = format!("event=log_lines_dropped count={}", now - self.reported);
        let written = self.put(own_line(&text, Level::Warn, self.style).as_bytes());
        if written {
            self.reported = now;
        }
        written
    }

    /// Writes a line. True if it is written, or begun so that its rest will follow.
    fn put(&mut self, line: &[u8]) -> bool {
        if !self.finish_line() {
            return false;
        }
        self.rest.extend_from_slice(line);
        if self.finish_line() || self.rest.len() < line.len() {
            return true;
        }
        self.rest.clear();
        false
    }

    /// Writes the rest of a line; false if some of it still remains.
    fn finish_line(&mut self) -> bool {
        while !self.rest.is_empty() {
            match self.writer.write(&self.rest) {
                Ok(0) => return false,
                Ok(count) => drop(self.rest.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(REST),
                Err(_) => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::sync_channel;

    use super::*;

    /// A disk: its content and its free space.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(String, usize)>>);

    impl Disk {
        fn room(&self, bytes: usize) {
            self.0.lock().expect("no panic").1 = bytes;
        }

        fn text(&self) -> String {
            self.0.lock().expect("no panic").0.clone()
        }
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut disk = self.0.lock().expect("no panic");
            let count = bytes.len().min(disk.1);
            if count == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            disk.1 -= count;
            disk.0.push_str(&String::from_utf8_lossy(&bytes[..count]));
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lost_lines_are_reported_and_no_line_is_cut() {
        let disk = Disk::default();
        let (sender, receiver) = sync_channel(16);
        let dropped = Arc::new(AtomicU64::new(0));
        let mut output = Output::new(disk.clone(), Style::Journal, Arc::clone(&dropped));
        let thread = std::thread::spawn(move || output.run(&receiver));
        let flush = || {
            let (done, flushed) = sync_channel(1);
            sender.send(Message::Flush(done)).expect("the thread");
            flushed.recv().expect("flushed");
        };
        let line = |text: &str| {
            sender.send(Message::Line(text.as_bytes().into())).expect("the thread");
            flush();
        };
        disk.room(16);
        line("first line\n");
        // Five bytes of the line fit.
        line("second line\n");
        line("third line\n");
        line("fourth line\n");
        assert_eq!(disk.text(), "first line\nsecon");
        assert_eq!(dropped.load(Ordering::Relaxed), 2);
        disk.room(1000);
        // Without another line the count is written by itself.
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        let whole = "first line\nsecond line\n<4>logger: event=log_lines_dropped count=2\n";
        while disk.text() != whole {
            assert!(std::time::Instant::now() < deadline, "{:?}", disk.text());
            std::thread::sleep(Duration::from_millis(5));
        }
        line("fifth line\n");
        assert_eq!(disk.text(), format!("{whole}fifth line\n"));
        // Lines lost a second time are counted from there, and reported before the next line that
        // works.
        disk.room(0);
        line("sixth line\n");
        disk.room(1000);
        line("seventh line\n");
        assert!(
            disk.text().ends_with("event=log_lines_dropped count=1\nseventh line\n"),
            "{:?}",
            disk.text()
        );
        drop(sender);
        thread.join().expect("no panic");
    }
}
