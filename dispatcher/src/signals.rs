//! What signals do to a dispatcher, from the start of `main` on.
//!
//! SIGTERM, SIGINT and SIGQUIT stop it: at once while it starts, in order afterwards. SIGHUP has the configuration read
//! again, and while it starts is kept until there is something to read again. A signal that would end a process and has
//! no meaning here does nothing. What is left to the kernel is what a fault of the program itself raises.
//!
//! The processes that the dispatcher starts have the default dispositions, whatever is here: see `spawner`.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::signal::SigSet;
use signal_hook::flag;
use signal_hook_mio::v1_0::Signals;

use crate::sys;

/// Those that the hot thread acts on.
const HANDLED: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];

/// Those that stop it.
const STOPPING: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT];

/// Those that end a process by default and mean nothing to this one. A write that SIGXFSZ or SIGPIPE is about fails, too,
/// and is handled as a failed write.
const WITHOUT_EFFECT: [i32; 12] = [
    libc::SIGPIPE,
    libc::SIGXFSZ,
    libc::SIGXCPU,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    // Has no effect by default either; here for a parent that had it ignored, which would keep the ends of processes from us.
    libc::SIGCHLD,
];

/// What [`prepare`] made.
struct Prepared {
    signals: Signals,
    /// While this is set, a signal that stops it ends the process at once.
    starting: Arc<AtomicBool>,
}

/// Set once by [`prepare`], for good.
static IS_DISPATCHER: AtomicBool = AtomicBool::new(false);

static PREPARED: Mutex<Option<Prepared>> = Mutex::new(None);

/// For the very start of a process that is to be a dispatcher.
///
/// # Errors
/// When the system has no descriptors left.
pub fn prepare() -> io::Result<()> {
    let seen = Arc::new(AtomicBool::new(false));
    for signal in WITHOUT_EFFECT.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
        flag::register(signal, Arc::clone(&seen))?;
    }
    let starting = Arc::new(AtomicBool::new(true));
    let signals = Signals::new(HANDLED)?;
    for signal in STOPPING {
        // Nothing is served yet, so nothing has to be put away. It was ordered, so it is no failure.
        flag::register_conditional_shutdown(signal, 0, Arc::clone(&starting))?;
    }
    sys::ignore_signals_of_the_library();
    // A parent may have blocked any of them.
    SigSet::empty().thread_set_mask()?;
    IS_DISPATCHER.store(true, Ordering::SeqCst);
    *PREPARED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Prepared { signals, starting });
    Ok(())
}

/// Whether this process is a dispatcher and nothing else, so that every child of it is the dispatcher's. Not so in a test
/// that runs one among other things.
pub fn is_dispatcher() -> bool {
    IS_DISPATCHER.load(Ordering::SeqCst)
}

/// The signals for the loop that handles them: those that came since [`prepare`], if there was one. From here on none ends
/// the process at once.
///
/// # Errors
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
