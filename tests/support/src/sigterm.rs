//! SIGTERM in the workers of the tests.

use std::sync::Mutex;

use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;

type Action = Box<dyn Fn() + Send>;

static ACTION: Mutex<Option<Action>> = Mutex::new(None);

/// From now on SIGTERM ends the process with status 0, until [`on`] tells what it does.
pub fn catch() {
    let mut signals = Signals::new([SIGTERM]).unwrap();
    let act = || match &*ACTION.lock().unwrap() {
        Some(action) => action(),
        None => std::process::exit(0),
    };
    std::thread::spawn(move || signals.forever().for_each(|_| act()));
}

/// What SIGTERM does once the worker has joined.
pub fn on(action: impl Fn() + Send + 'static) {
    *ACTION.lock().unwrap() = Some(Box::new(action));
}

/// Waits for SIGTERM.
pub fn wait() {
    let (sender, receiver) = std::sync::mpsc::channel();
    on(move || {
        let _ = sender.send(());
    });
    let _ = receiver.recv();
}
