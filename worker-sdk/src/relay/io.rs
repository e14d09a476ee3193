//! Sockets and the thread: the connection to the directory, the links, and the doorbell.
//!
//! One thread of the process receives everything and sends what did not fit at once; a call of the
//! application sends by itself if the socket has room. The state is behind one lock, which no
//! thread holds while it waits. Results are set and queues are woken after it is released.
//!
//! The thread sleeps until something is due. A call after which something is due earlier rings the
//! doorbell, whatever it was that the call has changed.

mod flush;
mod receive;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dispatch_protocol::relay::frame;
use dispatch_protocol::relay::{FromDirectory, MAX_RECORD, ToDirectory, VERSION, readable};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with,
};

use self::receive::{read_frames, receive_record};
use super::config::Checked;
use super::engine::Engine;
use super::message::ReplyTo;
use super::queue::Budget;
use super::slot::Slot;
use super::{Error, ReplyError};
use crate::client::process::Process;

/// Between two attempts to connect to the directory.
const RETRY: Duration = Duration::from_millis(100);

/// After a refusal that a changed configuration may lift.
const RETRY_REFUSED: Duration = Duration::from_secs(1);

/// How long the directory may take for its answer to hello.
const GREETING: Duration = Duration::from_secs(10);

/// How often deadlines are looked at, and how long after the last one.
const TICK: Duration = Duration::from_millis(20);
const TICK_ON: Duration = Duration::from_secs(1);

/// Bytes that one receive takes.
const RECEIVE: usize = 256 * 1024;

/// Records of the directory in one turn.
const RECORDS: usize = 256;

const DOORBELL: u64 = 0;
const CONTROL: u64 = 1;
const GATEWAY: u64 = 2;
const FIRST_LINK: u64 = 3;

struct Link {
    fd: OwnedFd,
    member: u64,
    generation: u64,
    /// The start of a frame that has not arrived whole.
    partial: Vec<u8>,
    /// Whether the kernel reports when there is room.
    waits: bool,
}

enum Control {
    None {
        retry: Instant,
    },
    /// Hello was sent.
    Greeted {
        fd: OwnedFd,
        until: Instant,
    },
    Joined {
        fd: OwnedFd,
        waits: bool,
    },
}

struct Gateway {
    fd: OwnedFd,
    partial: Vec<u8>,
    out: Vec<u8>,
    head: usize,
    waits: bool,
    /// Members whose bytes did not fit.
    members: Vec<u64>,
}

/// What the thread does.
#[derive(Clone, Copy, Debug)]
enum Sleep {
    Awake,
    Until(Instant),
    Forever,
}

struct Inner {
    engine: Engine,
    links: HashMap<u64, Link>,
    tokens: HashMap<u64, u64>,
    next_token: u64,
    control: Control,
    gateway: Option<Gateway>,
    sleep: Sleep,
    /// Deadlines are looked at for a while after the last one, so that a steady flow of messages
    /// need not ring the doorbell for each.
    tick_until: Instant,
    closed: bool,
    start: Option<Arc<Slot<Result<(), Error>>>>,
    start_deadline: Instant,
}

/// What handles and thread share.
pub(crate) struct Shared {
    inner: Mutex<Inner>,
    epoll: OwnedFd,
    doorbell: OwnedFd,
    pub(super) config: Checked,
    /// The bytes in all queues of the application.
    pub(super) budget: Arc<Budget>,
    started: Instant,
    /// A fork has copies of the descriptors, but not the thread, and perhaps a taken lock.
    process: Process,
}

/// This process is a fork of the one that has the relay.
#[derive(Clone, Copy, Debug)]
pub(super) struct Forked;

fn broken(error: Errno) -> Error {
    Error::Io(io::Error::from(error))
}

/// Starts the thread. The slot gets the result of the first join.
pub(super) fn start(
    config: Checked,
    slot: Arc<Slot<Result<(), Error>>>,
) -> Result<Arc<Shared>, Error> {
    let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(broken)?;
    let doorbell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(broken)?;
    let data = EventData::new_u64(DOORBELL);
    epoll::add(&epoll, &doorbell, data, EventFlags::IN).map_err(broken)?;
    let mut number = [0; 8];
    let mut filled = 0;
    while filled < number.len() {
        let rest = &mut number[filled..];
        filled +=
            rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()).map_err(broken)?;
    }
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let wall = u64::try_from(wall.as_micros()).unwrap_or(0);
    let engine = Engine::new(config.settings.clone(), u64::from_ne_bytes(number).max(1), wall);
    let now = Instant::now();
    let inner = Inner {
        engine,
        links: HashMap::new(),
        tokens: HashMap::new(),
        next_token: FIRST_LINK,
        control: Control::None { retry: now },
        gateway: None,
        sleep: Sleep::Awake,
        tick_until: now,
        closed: false,
        start: Some(slot),
        start_deadline: now + config.join_timeout,
    };
    let shared = Arc::new(Shared {
        inner: Mutex::new(inner),
        epoll,
        doorbell,
        budget: Arc::new(Budget::new(config.queues_bytes)),
        config,
        started: now,
        process: Process::current(),
    });
    let thread = Arc::clone(&shared);
    std::thread::Builder::new()
        .name("relay".to_owned())
        .spawn(move || thread.run())
        .map_err(Error::Io)?;
    Ok(shared)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Changes the state, sends what results from it, and then tells what waits.
    ///
    /// # Errors
    /// [`Forked`]: nothing was changed.
    pub(super) fn with<T>(&self, change: impl FnOnce(&mut Engine, u64) -> T) -> Result<T, Forked> {
        if !self.process.is_current() {
            return Err(Forked);
        }
        let now = self.now();
        let mut inner = self.lock();
        let result = change(&mut inner.engine, now);
        inner.flush(&self.epoll, now);
        let ring = inner.sleeps_too_long(self.started);
        if ring {
            inner.sleep = Sleep::Awake;
        }
        let fired = std::mem::take(&mut inner.engine.fired);
        drop(inner);
        if ring {
            self.ring();
        }
        fired.into_iter().for_each(super::engine::Fired::fire);
        Ok(result)
    }

    pub(super) fn reply(&self, to: &ReplyTo, payload: Option<&[u8]>) -> Result<(), ReplyError> {
        self.with(|engine, _| engine.reply(to, payload)).unwrap_or(Err(ReplyError::Forked))
    }

    /// Ends everything; the thread ends, too. In a fork it does nothing.
    pub(super) fn close(&self) {
        if self.with(|engine, now| engine.close(now)).is_ok() {
            self.lock().closed = true;
            self.ring();
        }
    }

    fn ring(&self) {
        // It fails only if the counter is full; then the thread is awake.
        let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(64);
        let mut scratch = vec![0; RECEIVE];
        let mut next_tick = 0;
        loop {
            let timeout = {
                let mut inner = self.lock();
                if inner.closed {
                    return;
                }
                let now = Instant::now();
                if inner.engine.has_deadlines() {
                    inner.tick_until = now + TICK_ON;
                }
                let due = inner.due(now, self.started);
                inner.sleep = due.map_or(Sleep::Forever, Sleep::Until);
                due.map(|due| due.saturating_duration_since(now))
            };
            events.clear();
            let limit = timeout.and_then(|timeout| rustix::time::Timespec::try_from(timeout).ok());
            match epoll::wait(&self.epoll, spare_capacity(&mut events), limit.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    // Not expected; without a pause it would be a busy loop.
                    log::error!("event=relay_poll_failed error=\"{error}\"");
                    std::thread::sleep(RETRY);
                }
            }
            let now = self.now();
            let mut inner = self.lock();
            inner.sleep = Sleep::Awake;
            inner.turn(self, &events, &mut scratch, now);
            // It looks at everything that waits, so not in every turn.
            if now >= next_tick {
                next_tick = now + TICK.as_millis() as u64;
                inner.engine.tick(now);
            }
            inner.flush(&self.epoll, now);
            let fired = std::mem::take(&mut inner.engine.fired);
            drop(inner);
            fired.into_iter().for_each(super::engine::Fired::fire);
        }
    }
}

impl Inner {
    /// When the thread has something to do without an event.
    fn due(&self, now: Instant, started: Instant) -> Option<Instant> {
        let control = match &self.control {
            Control::None { retry } => Some(*retry),
            Control::Greeted { until, .. } => Some(*until),
            Control::Joined { .. } => None,
        };
        let start = self.start.is_some().then_some(self.start_deadline);
        let tick = (self.engine.has_deadlines() || now < self.tick_until).then(|| now + TICK);
        let sweep = self.engine.sweep_at().and_then(|at| {
            // At most once in a tick, also when it is late.
            Some(started.checked_add(Duration::from_millis(at))?.max(now + TICK))
        });
        [control, start, tick, sweep].into_iter().flatten().min()
    }

    /// Whether something is due before the thread wakes.
    fn sleeps_too_long(&self, started: Instant) -> bool {
        let until = match self.sleep {
            Sleep::Awake => return false,
            Sleep::Until(until) => Some(until),
            Sleep::Forever => None,
        };
        let now = Instant::now();
        // Soon enough for anything; the usual case while messages flow.
        if until.is_some_and(|until| until <= now + TICK) {
            return false;
        }
        let due = self.due(now, started);
        due.is_some_and(|due| until.is_none_or(|until| due < until))
    }

    fn turn(&mut self, shared: &Shared, events: &[epoll::Event], scratch: &mut [u8], now: u64) {
        for event in events {
            if event.data.u64() == DOORBELL {
                let _ = rustix::io::read(&shared.doorbell, &mut [0; 8]);
            }
        }
        match self.control {
            Control::None { retry } if retry <= Instant::now() => self.connect(shared),
            Control::Greeted { until, .. } if until <= Instant::now() => {
                log::warn!("event=relay_directory_error reason=\"no answer to hello\"");
                self.lose_control(now, RETRY);
            }
            Control::None { .. } | Control::Greeted { .. } | Control::Joined { .. } => {}
        }
        // The directory first, and always: what it says of registrations that have ended must be
        // known before messages that were sent later.
        self.read_control(shared, scratch, now);
        for event in events {
            let token = event.data.u64();
            if token == GATEWAY {
                self.read_gateway(scratch, now);
            } else if token >= FIRST_LINK {
                let flags = event.flags;
                if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
                    self.read_link(token, scratch, now);
                }
                if flags.contains(EventFlags::OUT)
                    && let Some(link) = self.links.get_mut(&token)
                {
                    let member = link.member;
                    self.engine.dirty.push(member);
                }
            }
        }
        if self.start.is_some() && Instant::now() >= self.start_deadline {
            let path = shared.config.socket.clone();
            self.started(Err(Error::JoinTimeout(path)));
        }
    }

    fn started(&mut self, result: Result<(), Error>) {
        if let Some(slot) = self.start.take() {
            slot.set(result);
        }
    }

    /// Connects and says hello.
    fn connect(&mut self, shared: &Shared) {
        let config = &shared.config;
        let greet = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            connect(&fd, &SocketAddrUnix::new(&config.socket)?)?;
            let mut record = Vec::new();
            ToDirectory::Hello {
                version: VERSION,
                namespace: config.namespace.clone(),
                member: self.engine.own_number(),
                worker: config.name.clone(),
                ticket: config.ticket.clone(),
            }
            .encode(&mut record);
            send(&fd, &record, SendFlags::NOSIGNAL)?;
            epoll::add(&shared.epoll, &fd, EventData::new_u64(CONTROL), EventFlags::IN)?;
            Ok::<_, Errno>(fd)
        };
        self.control = match greet() {
            Ok(fd) => Control::Greeted { fd, until: Instant::now() + GREETING },
            Err(_) => Control::None { retry: Instant::now() + RETRY },
        };
    }

    fn lose_control(&mut self, now: u64, after: Duration) {
        self.control = Control::None { retry: Instant::now() + after };
        self.gateway = None;
        self.engine.directory_lost(now);
    }

    fn read_control(&mut self, shared: &Shared, scratch: &mut [u8], now: u64) {
        for _ in 0..RECORDS {
            let fd = match &self.control {
                Control::None { .. } => return,
                Control::Greeted { fd, .. } | Control::Joined { fd, .. } => fd,
            };
            let (len, fds) = match receive_record(fd, &mut scratch[..MAX_RECORD]) {
                Ok((0, _)) => return self.lose_control(now, RETRY),
                Ok(received) => received,
                Err(Errno::AGAIN | Errno::INTR) => return,
                Err(_) => return self.lose_control(now, RETRY),
            };
            let record = match FromDirectory::decode(&scratch[..len]) {
                Ok(record) if record.fds() == fds.len() => record,
                Ok(FromDirectory::Link { member, number, .. }) => {
                    // This process has no descriptor left. It asks again for as long as messages
                    // wait.
                    log::error!("event=relay_link_lost reason=\"no file descriptor\"");
                    self.engine.link_missed(now, member, number);
                    continue;
                }
                Ok(_) | Err(_) => {
                    log::error!("event=relay_directory_error reason=\"a record is malformed\"");
                    return self.lose_control(now, RETRY_REFUSED);
                }
            };
            self.record(shared, record, fds, now);
        }
    }

    fn record(&mut self, shared: &Shared, record: FromDirectory, mut fds: Vec<OwnedFd>, now: u64) {
        match record {
            FromDirectory::Welcome { version, host, max_message, gateway } => {
                let control = std::mem::replace(
                    &mut self.control,
                    Control::None { retry: Instant::now() + RETRY_REFUSED },
                );
                let Control::Greeted { fd, .. } = control else { return };
                if version != VERSION {
                    log::error!("event=relay_directory_error reason=\"version {version}\"");
                    return;
                }
                self.control = Control::Joined { fd, waits: false };
                self.gateway = fds.pop().and_then(|fd| {
                    let data = EventData::new_u64(GATEWAY);
                    epoll::add(&shared.epoll, &fd, data, EventFlags::IN).ok()?;
                    let (partial, out, members) = (Vec::new(), Vec::new(), Vec::new());
                    Some(Gateway { fd, partial, out, head: 0, waits: false, members })
                });
                self.engine.welcomed(now, host, max_message as usize, gateway);
                self.started(Ok(()));
            }
            FromDirectory::Refused { transient, reason } => {
                let reason = readable(&reason);
                let after = if transient { RETRY } else { RETRY_REFUSED };
                self.lose_control(now, after);
                if !transient {
                    log::error!("event=relay_refused reason={reason:?}");
                    self.started(Err(Error::Refused(reason)));
                }
            }
            FromDirectory::Link { member, number, max_message } => {
                let Some(fd) = fds.pop() else { return };
                let generation = self.engine.link_up(now, member, number, max_message as usize);
                let token = self.next_token;
                self.next_token += 1;
                let data = EventData::new_u64(token);
                if let Err(error) = epoll::add(&shared.epoll, &fd, data, EventFlags::IN) {
                    log::error!("event=relay_link_lost reason=\"{error}\"");
                    return self.engine.link_down(now, member);
                }
                if let Some(old) = self.tokens.insert(member, token) {
                    self.links.remove(&old);
                }
                let link = Link { fd, member, generation, partial: Vec::new(), waits: false };
                self.links.insert(token, link);
                self.engine.stats.links = self.links.len() as u64;
            }
            other => self.engine.directory_record(now, other),
        }
    }

    fn drop_link(&mut self, token: u64, now: u64) {
        let Some(link) = self.links.remove(&token) else { return };
        if self.tokens.get(&link.member) == Some(&token) {
            self.tokens.remove(&link.member);
        }
        self.engine.stats.links = self.links.len() as u64;
        if self.engine.has_link(link.member, link.generation) {
            self.engine.link_down(now, link.member);
        }
    }

    fn read_link(&mut self, token: u64, scratch: &mut [u8], now: u64) {
        let Some(link) = self.links.get_mut(&token) else { return };
        let member = link.member;
        let peer = self.engine.peers.get(&member);
        let Some(peer) = peer.filter(|peer| peer.is(link.generation)) else {
            return self.drop_link(token, now);
        };
        let most = peer.longest_frame();
        let engine = &mut self.engine;
        let read = read_frames(&link.fd, &mut link.partial, scratch, most, |frame| {
            engine.frame(now, member, frame).map_err(|error| error.to_string())
        });
        self.engine.end_batch(member);
        match read {
            Ok(true) => {}
            Ok(false) => self.drop_link(token, now),
            Err(reason) => {
                log::warn!("event=relay_link_closed reason={reason:?}");
                self.drop_link(token, now);
            }
        }
    }

    fn read_gateway(&mut self, scratch: &mut [u8], now: u64) {
        let Some(gateway) = &mut self.gateway else { return };
        let most = frame::longest_forward(self.engine.max_message);
        let engine = &mut self.engine;
        let read = read_frames(&gateway.fd, &mut gateway.partial, scratch, most, |frame| {
            engine.gateway_frame(now, frame).map_err(|error| error.to_string())
        });
        if !matches!(read, Ok(true)) {
            // The directory has ended, or speaks another language: join again.
            self.lose_control(now, RETRY);
        }
    }
}

#[cfg(test)]
mod tests;
