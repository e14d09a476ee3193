//! The terminal of `dispatcher top`: taken, given back, and taken again after the program was stopped and continued.
//!
//! A terminal that is gone (a connection that broke, a window that was closed) fails every write. That is noted and no
//! error: the libraries underneath would report it on a stderr that is gone as well, which ends a program by a panic.

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

/// Who stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suspend {
    /// This process, because a signal said so.
    Alone,
    /// The whole job, as a terminal does for Ctrl-Z: a script may have started this, and its shell waits for all of it.
    Job,
}

/// A terminal in raw mode that shows another screen. Dropped, it is as it was.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<Out>>,
    gone: Arc<AtomicBool>,
}

/// Stdout. It notes that it is gone, and then takes everything.
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

/// What writing to a terminal that is gone gives.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EPIPE | libc::ENXIO | libc::ENODEV | libc::EBADF)
    ) || error.kind() == io::ErrorKind::WriteZero
}

impl Screen {
    /// Takes the terminal. From here on a panic gives it back, before it says what happened.
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

    /// Takes the terminal, whatever was done to it meanwhile, and draws everything anew.
    pub(super) fn take(&mut self) -> io::Result<()> {
        // The library remembers that it is in raw mode, and would do nothing.
        disable_raw_mode()?;
        enable_raw_mode()?;
        execute!(self.terminal.backend_mut(), EnterAlternateScreen, Clear(ClearType::All))?;
        // A new one knows nothing of what was drawn. Its `clear` would ask the terminal where the cursor is, and the answer
        // would be read as keys.
        let out = Out { stdout: io::stdout(), gone: Arc::clone(&self.gone) };
        self.terminal = Terminal::new(CrosstermBackend::new(out))?;
        Ok(())
    }

    pub(super) fn draw(&mut self, draw: impl FnOnce(&mut ratatui::Frame<'_>)) -> io::Result<()> {
        self.terminal.draw(draw).map(drop)
    }

    /// Gives the terminal back, stops until the program is continued, and takes the terminal again.
    pub(super) fn suspend(&mut self, who: Suspend) -> io::Result<()> {
        self.terminal.show_cursor()?;
        give_back(self.terminal.backend_mut());
        sys::stop_like_a_job(who == Suspend::Job)?;
        self.take()
    }

    /// Whether the terminal is gone: nothing is seen any more, and no signal need have said so.
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

/// Back to what it was. A terminal that is gone needs nothing.
fn give_back(out: &mut impl Write) {
    let _ = disable_raw_mode();
    let _ = execute!(out, LeaveAlternateScreen);
}
