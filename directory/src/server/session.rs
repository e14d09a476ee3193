//! One connection to the directory: hello, access, records in, a bounded queue out.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use dispatch_protocol::relay::{FromDirectory, MAX_RECORD, ToDirectory, VERSION, readable, text};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::budget::{Full, Share};
use super::{Handle, MAX_PENDING, MAX_PENDING_PER_USER, access, socket};
use crate::registry::{Entry, MemberIndex};

/// Records that wait for one member, their bytes, and the descriptors among them.
const MAX_QUEUED: usize = 262_144;
const MAX_QUEUED_BYTES: usize = 16 * 1024 * 1024;
const MAX_QUEUED_FDS: usize = 128;

/// Bytes that a record takes besides its own.
const RECORD_OVERHEAD: usize = 48;

/// Reports of changes are dropped when this many records wait.
const MANY_QUEUED: usize = 4096;

/// Records of one member that are handled before others have their turn.
const BATCH: usize = 64;

thread_local! {
    /// For one record, of whatever member: no use of it waits.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_RECORD]);
}

/// What waits to be sent to one member.
pub(crate) struct Queue {
    records: RefCell<VecDeque<(Vec<u8>, Option<OwnedFd>)>>,
    share: Share,
    fds: Cell<usize>,
    missed: RefCell<Option<FromDirectory>>,
    cut: Cell<Option<&'static str>>,
    changed: Notify,
}

/// Why a record was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    /// The queue is full.
    Queue,
    /// All queues together are.
    Budget(Full),
    /// The connection is ending.
    Ended,
}

impl Queue {
    pub(super) fn new(share: Share) -> Queue {
        Queue {
            records: RefCell::default(),
            share,
            fds: Cell::new(0),
            missed: RefCell::default(),
            cut: Cell::new(None),
            changed: Notify::new(),
        }
    }

    /// Queues a record.
    ///
    /// # Errors
    /// There is no room; with the descriptor.
    pub(super) fn push(
        &self,
        record: &FromDirectory,
        fd: Option<OwnedFd>,
    ) -> Result<(), (Pushed, Option<OwnedFd>)> {
        if self.cut.get().is_some() {
            return Err((Pushed::Ended, fd));
        }
        let mut records = self.records.borrow_mut();
        let report = matches!(record, FromDirectory::Changed { .. });
        let full = records.len() >= if report { MANY_QUEUED } else { MAX_QUEUED };
        if full
            || self.share.bytes() >= MAX_QUEUED_BYTES
            || (fd.is_some() && !self.has_room_for_fd())
        {
            return Err((Pushed::Queue, fd));
        }
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        if let Err(full) = self.share.grow(bytes.len() + RECORD_OVERHEAD) {
            return Err((Pushed::Budget(full), fd));
        }
        self.fds.set(self.fds.get() + usize::from(fd.is_some()));
        records.push_back((bytes, fd));
        self.changed.notify_one();
        Ok(())
    }

    pub(super) fn has_room_for_fd(&self) -> bool {
        self.fds.get() < MAX_QUEUED_FDS
    }

    pub(super) fn missed(&self, record: FromDirectory) {
        *self.missed.borrow_mut() = Some(record);
    }

    /// Ends the connection and gives its memory back; false if it was ending before.
    pub(super) fn cut(&self, reason: &'static str) -> bool {
        let first = self.cut.get().is_none();
        if first {
            self.cut.set(Some(reason));
            self.records.borrow_mut().clear();
            self.share.shrink(self.share.bytes());
            self.changed.notify_one();
        }
        first
    }

    pub(super) fn bytes(&self) -> usize {
        self.share.bytes()
    }

    pub(super) fn user(&self) -> u32 {
        self.share.user()
    }

    /// Sends what the socket has room for; true if all is sent.
    fn flush(&self, socket: &OwnedFd) -> io::Result<bool> {
        loop {
            let mut records = self.records.borrow_mut();
            let Some((bytes, fd)) = records.front() else {
                drop(records);
                let Some(missed) = self.missed.borrow_mut().take() else { return Ok(true) };
                // Without room it is told later.
                if self.push(&missed, None).is_err() {
                    self.missed(missed);
                    return Ok(true);
                }
                continue;
            };
            match socket::send(socket, bytes, fd.as_ref()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
            if let Some((bytes, fd)) = records.pop_front() {
                self.share.shrink(bytes.len() + RECORD_OVERHEAD);
                self.fds.set(self.fds.get() - usize::from(fd.is_some()));
            }
        }
    }
}

/// A member's connection.
pub(crate) struct Session {
    pub(crate) queue: Queue,
}

/// Why a connection has ended.
enum End {
    Closed,
    Broken(String),
}

/// Serves a new connection with a task of its own.
pub(super) fn start(state: &Handle, connection: OwnedFd) {
    let user = match socket::user_of(&connection) {
        Ok(user) => user,
        Err(error) => return log::warn!("event=no_credentials error=\"{error}\""),
    };
    {
        let mut state = state.borrow_mut();
        let of_user = state.pending_of.get(&user).copied().unwrap_or(0);
        if state.pending >= MAX_PENDING || of_user >= MAX_PENDING_PER_USER {
            state.refused += 1;
            return;
        }
        state.pending += 1;
        *state.pending_of.entry(user).or_default() += 1;
    }
    let state = Rc::clone(state);
    tokio::task::spawn_local(async move {
        let pending = Pending { state: Rc::clone(&state), user };
        let Ok(connection) = crate::sys::watch(connection) else { return };
        let timeout = state.borrow().config.hello_timeout;
        let hello = tokio::time::timeout(timeout, first_record(&connection)).await;
        let Ok(Ok(Some(hello))) = hello else { return };
        let admitted = admit(&state, user, hello);
        drop(pending);
        match admitted {
            Ok(member) => serve(&state, &connection, member, user).await,
            Err(refused) => {
                state.borrow_mut().refused += 1;
                let mut record = Vec::new();
                refused.encode(&mut record);
                let _ = socket::send(connection.get_ref(), &record, None);
            }
        }
    });
}

/// Counts a connection that has not said hello.
struct Pending {
    state: Handle,
    user: u32,
}

impl Drop for Pending {
    fn drop(&mut self) {
        let mut state = self.state.borrow_mut();
        state.pending -= 1;
        if let Some(of_user) = state.pending_of.get_mut(&self.user) {
            *of_user -= 1;
            if *of_user == 0 {
                state.pending_of.remove(&self.user);
            }
        }
    }
}

async fn first_record(connection: &AsyncFd<OwnedFd>) -> io::Result<Option<ToDirectory>> {
    let mut buffer = [0; 4096];
    loop {
        let mut ready = connection.readable().await?;
        match receive(connection, &mut buffer) {
            Ok(0) => return Ok(None),
            Ok(len) => return Ok(ToDirectory::decode(&buffer[..len]).ok()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            Err(error) => return Err(error),
        }
    }
}

/// Receives a record. Descriptors are an error, and closed where a close may take its time.
fn receive(connection: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    let (len, unasked) = socket::receive(connection.get_ref(), buffer)?;
    if unasked.is_empty() {
        return Ok(len);
    }
    tokio::task::spawn_blocking(move || drop(unasked));
    Err(io::Error::other("it sent file descriptors"))
}

/// Lets a member in, and queues its welcome.
fn admit(state: &Handle, user: u32, hello: ToDirectory) -> Result<MemberIndex, FromDirectory> {
    let refused = |transient, reason: &str| {
        log::warn!("event=member_refused uid={user} reason={reason:?}");
        FromDirectory::Refused { transient, reason: text(reason) }
    };
    let ToDirectory::Hello { version, namespace, member, worker, ticket } = hello else {
        return Err(refused(false, "the first record must be hello"));
    };
    if version != VERSION {
        let reason = format!("it speaks version {version}, this directory speaks {VERSION}");
        return Err(refused(false, &reason));
    }
    let observes = member == 0;
    let mut state = state.borrow_mut();
    let state = &mut *state;
    let spaces = &state.config.namespaces;
    let index = access::check(spaces, state.key.as_ref(), &namespace, user, &ticket, observes)
        .map_err(|reason| refused(false, &reason))?;
    // An observer is a member that registers nothing, with a number of its own.
    let number = if observes { observer_number() } else { member };
    let entry = Entry { namespace: index, number, worker: worker.clone(), user, observes };
    let index = state.registry.enter(entry).map_err(|reason| refused(true, reason))?;
    let session = Rc::new(Session { queue: Queue::new(state.queued.share(user)) });
    #[cfg(feature = "nats")]
    let gateway = match &state.cluster {
        Some(cluster) if !observes => cluster.gateway(&namespace, number, user),
        _ => None,
    };
    #[cfg(not(feature = "nats"))]
    let gateway: Option<OwnedFd> = None;
    let welcome = FromDirectory::Welcome {
        version: VERSION,
        host: state.registry.host(),
        max_message: state.config.max_message,
        gateway: gateway.is_some(),
    };
    if session.queue.push(&welcome, gateway).is_err() {
        let now = state.now();
        state.registry.leave(now, index);
        state.perform();
        return Err(refused(true, "max_queued_bytes or max_queued_bytes_per_user is reached"));
    }
    state.sessions.insert(index, session);
    log::info!("event=member_entered namespace={namespace} worker={worker} uid={user}");
    state.perform();
    Ok(index)
}

fn observer_number() -> u64 {
    use std::hash::{BuildHasher, RandomState};

    RandomState::new().hash_one(0) | 1
}

async fn serve(state: &Handle, connection: &AsyncFd<OwnedFd>, member: MemberIndex, user: u32) {
    let session = state.borrow().sessions.get(&member).map(Rc::clone);
    let Some(session) = session else { return };
    let end = exchange(state, connection, member, &session).await;
    let mut state = state.borrow_mut();
    let namespace = state.registry.namespace_of(member);
    let namespace = namespace.and_then(|index| state.config.namespaces.get(usize::from(index)));
    let namespace = namespace.map(|space| space.name.to_string()).unwrap_or_default();
    match end {
        End::Closed => log::info!("event=member_left namespace={namespace} uid={user}"),
        End::Broken(reason) => log::warn!(
            "event=member_cut namespace={namespace} uid={user} reason={:?}",
            readable(reason.as_bytes())
        ),
    }
    state.sessions.remove(&member);
    let now = state.now();
    state.registry.leave(now, member);
    state.perform();
}

async fn exchange(
    state: &Handle,
    connection: &AsyncFd<OwnedFd>,
    member: MemberIndex,
    session: &Session,
) -> End {
    loop {
        let sent = match session.queue.flush(connection.get_ref()) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return End::Closed,
            Err(error) => return End::Broken(error.to_string()),
        };
        if let Some(reason) = session.queue.cut.get() {
            return End::Broken(reason.to_owned());
        }
        let interest =
            if sent { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
        let mut ready = tokio::select! {
            ready = connection.ready(interest) => match ready {
                Ok(ready) => ready,
                Err(error) => return End::Broken(error.to_string()),
            },
            () = session.queue.changed.notified() => continue,
        };
        if ready.ready().is_writable() && !sent {
            match session.queue.flush(connection.get_ref()) {
                Ok(false) => ready.clear_ready_matching(tokio::io::Ready::WRITABLE),
                Ok(true) => {}
                Err(_) => return End::Closed,
            }
        }
        if !ready.ready().is_readable() {
            continue;
        }
        for _ in 0..BATCH {
            let record: io::Result<_> = BUFFER.with_borrow_mut(|buffer| {
                let len = receive(connection, buffer)?;
                Ok((len > 0).then(|| ToDirectory::decode(&buffer[..len])))
            });
            match record {
                Ok(None) => return End::Closed,
                Ok(Some(Ok(record))) => {
                    handle(state, member, record);
                    if session.queue.cut.get().is_some() {
                        break;
                    }
                }
                Ok(Some(Err(error))) => return End::Broken(error.to_string()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready.clear_ready_matching(tokio::io::Ready::READABLE);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return End::Closed,
                Err(error) => return End::Broken(error.to_string()),
            }
        }
        tokio::task::yield_now().await;
    }
}

fn handle(state: &Handle, member: MemberIndex, record: ToDirectory) {
    let mut state = state.borrow_mut();
    let now = state.now();
    if let ToDirectory::Stats { request } = record {
        let counts = state.counts();
        return state.send(member, FromDirectory::Counts { request, counts }, None);
    }
    state.registry.handle(now, member, record);
    state.perform();
}
