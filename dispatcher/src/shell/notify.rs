//! What the service manager is told of start and stop, if there is one. Never on the hot thread: a `NOTIFY_SOCKET`
//! that nobody reads blocks.

use std::convert::Infallible;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use sd_notify::NotifyState;

/// How long the end of the process waits until the last message is sent.
const NOTIFY_TIME: Duration = Duration::from_secs(1);

/// The service manager. Messages reach it in the order in which they were given.
#[derive(Default)]
pub struct ServiceManager {
    /// Hangs up when the last message is sent; `None` before the first.
    told: Option<Receiver<Infallible>>,
}

impl ServiceManager {
    pub fn tell(&mut self, state: NotifyState<'static>) {
        let (sent, told) = channel();
        let before = self.told.replace(told);
        let tell = move || {
            let _sent = sent;
            if let Some(before) = before {
                let _ = before.recv();
            }
            if let Err(error) = sd_notify::notify(&[state]) {
                log::warn!("event=not_notified error=\"{error}\" hint=\"is NOTIFY_SOCKET alive?\"");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("notify".to_owned()).spawn(tell) {
            log::warn!("event=not_notified error=\"{error}\"");
        }
    }

    /// Waits until everything is sent: a message still on its way would be lost with the process.
    pub fn finish(self) {
        if let Some(told) = self.told {
            let _ = told.recv_timeout(NOTIFY_TIME);
        }
    }
}
