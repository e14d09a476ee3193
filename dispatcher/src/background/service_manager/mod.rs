//! Notifies the service manager (`NOTIFY_SOCKET`) of start, reload and stop, in this order, and
//! that the dispatcher works (`WATCHDOG_USEC`). The side thread sends the messages without a
//! further thread and without blocking: it waits for room in the socket.
//!
//! The usual crate does not support abstract sockets and blocks on a socket without a reader.

pub(crate) mod unit;
pub(crate) mod watchdog;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::background::logger::quoted;

/// Most messages that wait for a service manager that does not read.
const MAX_WAITING: usize = 64;

/// How long a message is retried: longer than a busy service manager needs, and as long as systemd
/// by default waits for a start.
const PATIENCE: Duration = Duration::from_secs(90);

/// How long a reload or the end of the process waits until its message is sent.
const NOTIFY_TIME: Duration = Duration::from_secs(1);

/// The interval between attempts while the socket has no room.
const RETRY: Duration = Duration::from_millis(20);

/// The notified state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Clients and workers can connect.
    Ready,
    /// The configuration is being read again; `Ready` follows.
    Reloading,
    /// The stop has begun.
    Stopping,
    /// The hot thread works.
    Watchdog,
}

impl State {
    fn message(self) -> String {
        match self {
            State::Ready => "READY=1\n".to_owned(),
            // Newer service managers expect both values in one message.
            State::Reloading => {
                let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
                let microseconds = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
                format!("RELOADING=1\nMONOTONIC_USEC={microseconds}\n")
            }
            State::Stopping => "STOPPING=1\n".to_owned(),
            State::Watchdog => "WATCHDOG=1\n".to_owned(),
        }
    }
}

struct Message {
    text: String,
    /// Dropped once the message is sent or given up.
    done: oneshot::Sender<()>,
}

/// The handle of the other threads.
#[derive(Clone, Debug)]
pub struct ServiceManager {
    messages: mpsc::Sender<Message>,
}

impl ServiceManager {
    /// Queues a message. The returned receiver is closed once the message is sent.
    pub fn tell(&self, state: State) -> oneshot::Receiver<()> {
        let (done, told) = oneshot::channel();
        if self.messages.try_send(Message { text: state.message(), done }).is_err() {
            log::warn!("event=not_notified error=\"it has not read earlier messages\"");
        }
        told
    }

    /// Sends a message and waits for a bounded time, so that the service manager knows before the
    /// client of the admin interface gets its answer.
    pub(crate) async fn tell_now(&self, state: State) {
        let told = self.tell(state);
        let _ = tokio::time::timeout(NOTIFY_TIME, told).await;
    }

    /// Sends `Ready` when the returned guard is dropped: at the end of a reload, whatever its
    /// result.
    pub(crate) fn ready_afterwards(&self) -> ReadyAfterwards<'_> {
        ReadyAfterwards(self)
    }

    /// Waits on this thread until every message is sent: a message still queued would be lost with
    /// the process.
    pub fn finish(&self) {
        let (done, told) = oneshot::channel();
        if self.messages.try_send(Message { text: String::new(), done }).is_err() {
            return;
        }
        let end = std::time::Instant::now() + NOTIFY_TIME;
        let mut told = told;
        while matches!(told.try_recv(), Err(oneshot::error::TryRecvError::Empty))
            && std::time::Instant::now() < end
        {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// See [`ServiceManager::ready_afterwards`].
pub(crate) struct ReadyAfterwards<'a>(&'a ServiceManager);

impl ReadyAfterwards<'_> {
    /// Sends `Ready` now and waits until it is sent.
    pub(crate) async fn now(self) {
        let manager = self.0;
        std::mem::forget(self);
        manager.tell_now(State::Ready).await;
    }
}

impl Drop for ReadyAfterwards<'_> {
    fn drop(&mut self) {
        drop(self.0.tell(State::Ready));
    }
}

/// The side thread's end.
pub(crate) struct Teller {
    messages: mpsc::Receiver<Message>,
    place: Option<Result<SocketAddrUnix, String>>,
    /// Made with the first message and kept, so that later messages need no descriptor.
    socket: Option<OwnedFd>,
}

/// Both ends, for the socket that the environment names.
pub(crate) fn manager() -> (ServiceManager, Teller) {
    let place = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
    manager_at(place)
}

fn manager_at(place: Option<OsString>) -> (ServiceManager, Teller) {
    let (sender, messages) = mpsc::channel(MAX_WAITING);
    let place = place.map(|name| address(&name));
    (ServiceManager { messages: sender }, Teller { messages, place, socket: None })
}

/// A path, or an abstract name: `@` stands for its leading zero byte.
fn address(name: &OsString) -> Result<SocketAddrUnix, String> {
    let bytes = name.as_bytes();
    let address = match bytes.first() {
        Some(b'/') => SocketAddrUnix::new(bytes),
        Some(b'@') => SocketAddrUnix::new_abstract_name(bytes.get(1..).unwrap_or_default()),
        _ => return Err("it is neither a path nor an abstract name".to_owned()),
    };
    address.map_err(|error| error.to_string())
}

impl Teller {
    /// Sends the queued messages until every handle is gone.
    pub(crate) async fn run(&mut self) {
        while let Some(message) = self.messages.recv().await {
            if let Err(error) = self.send(&message.text).await {
                log::warn!(
                    "event=not_notified error={} hint=\"is NOTIFY_SOCKET alive?\"",
                    quoted(error)
                );
            }
            drop(message.done);
        }
    }

    async fn send(&mut self, text: &str) -> Result<(), String> {
        let Some(place) = &self.place else { return Ok(()) };
        if text.is_empty() {
            return Ok(());
        }
        let place = place.as_ref().map_err(|error| format!("NOTIFY_SOCKET: {error}"))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match attempt(&mut self.socket, place, text) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error @ (Errno::AGAIN | Errno::NOBUFS | Errno::MFILE | Errno::NFILE)) => {
                    if Instant::now() >= deadline {
                        return Err(error.to_string());
                    }
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

fn attempt(
    socket: &mut Option<OwnedFd>,
    place: &SocketAddrUnix,
    text: &str,
) -> rustix::io::Result<()> {
    let socket = match socket {
        Some(socket) => socket,
        None => {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            socket.insert(rustix::net::socket_with(
                AddressFamily::UNIX,
                SocketType::DGRAM,
                flags,
                None,
            )?)
        }
    };
    rustix::net::sendto(&*socket, text.as_bytes(), SendFlags::NOSIGNAL, place)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    use super::*;

    fn received(listener: &UnixDatagram) -> String {
        let mut bytes = [0; 256];
        listener.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        let count = listener.recv(&mut bytes).expect("a message");
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    }

    /// Sends every state to the socket of this name.
    fn told_all(name: &str) {
        let (manager, mut teller) = manager_at(Some(name.into()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime").block_on(async move {
            tokio::spawn(async move { teller.run().await });
            manager.tell_now(State::Ready).await;
            manager.tell_now(State::Reloading).await;
            drop(manager.ready_afterwards());
            manager.tell_now(State::Stopping).await;
        });
    }

    #[test]
    fn paths_and_abstract_names() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("notify");
        let by_path = UnixDatagram::bind(&path).expect("a socket");
        let name = format!("dispatcher-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let abstract_one = UnixDatagram::bind_addr(&address).expect("a socket");
        for (listener, name) in
            [(by_path, path.display().to_string()), (abstract_one, format!("@{name}"))]
        {
            told_all(&name);
            assert_eq!(received(&listener), "READY=1\n", "{name}");
            let reloading = received(&listener);
            assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
            assert_eq!(received(&listener), "READY=1\n", "{name}");
            assert_eq!(received(&listener), "STOPPING=1\n", "{name}");
        }
    }

    #[test]
    fn a_manager_that_does_not_read_delays_only_its_messages() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("notify");
        let listener = UnixDatagram::bind(&path).expect("a socket");
        // Fills the socket's buffer.
        let other = UnixDatagram::unbound().expect("a socket");
        other.set_nonblocking(true).expect("not blocking");
        let mut waiting = 0;
        while other.send_to(b"x", &path).is_ok() {
            waiting += 1;
        }
        let (manager, mut teller) = manager_at(Some(path.into()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("a runtime").block_on(async move {
            tokio::spawn(async move { teller.run().await });
            let began = Instant::now();
            manager.tell_now(State::Ready).await;
            assert!(began.elapsed() >= NOTIFY_TIME, "there was no room");
            let told = manager.tell(State::Stopping);
            let read = std::thread::spawn(move || {
                (0..waiting).for_each(|_| drop(received(&listener)));
                [received(&listener), received(&listener)]
            });
            assert!(told.await.is_err(), "hung up");
            assert_eq!(read.join().expect("no panic"), ["READY=1\n", "STOPPING=1\n"]);
        });
    }

    #[test]
    fn what_is_no_address_is_said() {
        for name in ["notify", "vsock:2:1", "@", ""] {
            let address = address(&name.into());
            assert!(address.is_err() || name == "@", "{name}");
        }
    }
}
