//! The terminal of `dispatcher top`: takes it, restores it, and takes it again after a stop.
//!
//! When the terminal is gone (a lost connection, a closed window), every write fails. This is
//! recorded and is not an error: the libraries would report it on stderr, which is gone as well,
//! and panic.

use std::io::{self, Stdout, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};

use crate::sys;

/// The processes to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suspend {
    /// This process, after a signal.
    Alone,
    /// The whole process group, as the terminal does for Ctrl-Z: a script may have started `top`,
    /// and its shell waits for all of the group.
    Job,
}

/// A terminal in raw mode with the alternate screen. Dropping it restores the terminal.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<Out>>,
    gone: Arc<AtomicBool>,
}

/// Stdout. After a write fails because the terminal is gone, all further writes succeed without
/// effect.
#[derive(Debug)]
struct Out {
    stdout: Stdout,
    gone: Arc<AtomicBool>,
}

impl Out {
    fn noted<T>(&self, result: io::Result<T>, instead: T) -> io::Result<T> {
        match result {
            Err(error) if is_end(&error) => {
                self.gone.store(true, Ordering::SeqCst);
                Ok(instead)
            }
            result => result,
        }
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.stdout.write(bytes);
        self.noted(written, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.stdout.flush();
        self.noted(flushed, ())
    }
}

/// Whether the error means that the terminal is gone.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EPIPE | libc::ENXIO | libc::ENODEV | libc::EBADF)
    ) || error.kind() == io::ErrorKind::WriteZero
}

impl Screen {
    /// Takes the terminal. From here on a panic restores it before its message is printed.
    pub(super) fn open() -> io::Result<Screen> {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            give_back(&mut io::stdout());
            hook(info);
        }));
        let gone = Arc::new(AtomicBool::new(false));
        let out = Out { stdout: io::stdout(), gone: Arc::clone(&gone) };
        enable_raw_mode()?;
        let opened = Terminal::new(CrosstermBackend::new(out));
        let terminal = match opened {
            Ok(terminal) => terminal,
            Err(error) => {
                give_back(&mut io::stdout());
                return Err(error);
            }
        };
        let mut screen = Screen { terminal, gone };
        screen.take()?;
        Ok(screen)
    }

    /// Takes the terminal in any state and draws everything again.
    pub(super) fn take(&mut self) -> io::Result<()> {
        // Otherwise the library assumes that raw mode is still active and does nothing.
        disable_raw_mode()?;
        enable_raw_mode()?;
        execute!(self.terminal.backend_mut(), EnterAlternateScreen, Clear(ClearType::All))?;
        // A new terminal object has no memory of the screen. Its `clear` would query the cursor
        // position, and the reply would be read as keys.
        let out = Out { stdout: io::stdout(), gone: Arc::clone(&self.gone) };
        self.terminal = Terminal::new(CrosstermBackend::new(out))?;
        Ok(())
    }

    pub(super) fn draw(&mut self, draw: impl FnOnce(&mut ratatui::Frame<'_>)) -> io::Result<()> {
        self.terminal.draw(draw).map(drop)
    }

    /// Restores the terminal, stops until SIGCONT, and takes the terminal again.
    pub(super) fn suspend(&mut self, scope: Suspend) -> io::Result<()> {
        self.terminal.show_cursor()?;
        give_back(self.terminal.backend_mut());
        sys::stop_like_a_job(scope == Suspend::Job)?;
        self.take()
    }

    /// Whether the terminal is gone. There need not have been a signal.
    pub(super) fn is_gone(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};

        let stdin = io::stdin();
        let mut terminal = [PollFd::new(&stdin, PollFlags::empty())];
        let now = Timespec::default();
        let hung_up = poll(&mut terminal, Some(&now)).is_ok_and(|ready| ready > 0)
            && terminal[0].revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
        hung_up || self.gone.load(Ordering::SeqCst)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.terminal.show_cursor();
        give_back(self.terminal.backend_mut());
    }
}

/// Restores the terminal, unless it is gone.
fn give_back(out: &mut impl Write) {
    let _ = disable_raw_mode();
    let _ = execute!(out, LeaveAlternateScreen);
}
