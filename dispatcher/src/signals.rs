//! What signals do to a dispatcher, from the start of `main` on.
//!
//! SIGTERM, SIGINT and SIGQUIT stop the dispatcher: at once while it starts, gracefully afterwards.
//! SIGUSR1 does the same and leaves processes that outlive the dispatcher. SIGUSR2 replaces the
//! processes of all pools; during the start it is kept until the dispatcher serves.
//! SIGHUP reloads the configuration, or does the same as SIGUSR2 if there is no file; during the
//! start it is kept until the dispatcher serves. Other signals whose default ends a process have no
//! effect. Signals that report a fault of the program itself keep their defaults.
//!
//! The processes that the dispatcher starts get the default dispositions: see `spawner`.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::signal::SigSet;
use signal_hook::flag;
use signal_hook_mio::v1_0::Signals;

use crate::sys;

/// Signals that the hot thread handles.
const HANDLED: [i32; 6] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP];

/// Signals that stop the dispatcher.
const STOPPING: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGUSR1];

/// Whether a signal stops the dispatcher.
pub fn stops(signal: i32) -> bool {
    STOPPING.contains(&signal)
}

/// Signals that end a process by default and have no meaning here. The write that causes SIGXFSZ or
/// SIGPIPE also fails, and that error is handled.
const WITHOUT_EFFECT: [i32; 10] = [
    libc::SIGPIPE,
    libc::SIGXFSZ,
    libc::SIGXCPU,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    // Ignored by default as well. A parent may have set it to SIG_IGN, and the kernel would then
    // discard the exit status of children.
    libc::SIGCHLD,
];

/// The result of [`prepare`].
struct Prepared {
    signals: Signals,
    /// While this is set, a stopping signal ends the process at once.
    starting: Arc<AtomicBool>,
}

/// Set by [`prepare`], and never cleared.
static IS_DISPATCHER: AtomicBool = AtomicBool::new(false);

static PREPARED: Mutex<Option<Prepared>> = Mutex::new(None);

/// Call at the very start of a process that becomes a dispatcher.
///
/// # Errors
///
/// When the system has no descriptors left.
pub fn prepare() -> io::Result<()> {
    let seen = Arc::new(AtomicBool::new(false));
    for signal in WITHOUT_EFFECT.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
        flag::register(signal, Arc::clone(&seen))?;
    }
    let starting = Arc::new(AtomicBool::new(true));
    let signals = Signals::new(HANDLED)?;
    for signal in STOPPING {
        // Nothing is served yet, so there is nothing to clean up. The stop was requested, so the
        // exit status is 0.
        flag::register_conditional_shutdown(signal, 0, Arc::clone(&starting))?;
    }
    sys::ignore_signals_of_the_library();
    // The parent may have blocked any signal.
    SigSet::empty().thread_set_mask()?;
    IS_DISPATCHER.store(true, Ordering::SeqCst);
    *PREPARED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Prepared { signals, starting });
    Ok(())
}

/// Whether this process is only a dispatcher, so that every child belongs to the dispatcher. False
/// in a test that runs a dispatcher among other things.
pub fn is_dispatcher() -> bool {
    IS_DISPATCHER.load(Ordering::SeqCst)
}

/// The signals for the event loop, including those that came since [`prepare`]. From here on no
/// signal ends the process at once.
///
/// # Errors
///
/// When the system has no descriptors left.
pub fn take() -> io::Result<Signals> {
    let prepared = PREPARED.lock().unwrap_or_else(PoisonError::into_inner).take();
    match prepared {
        Some(Prepared { signals, starting }) => {
            starting.store(false, Ordering::SeqCst);
            Ok(signals)
        }
        None => Signals::new(HANDLED),
    }
}
