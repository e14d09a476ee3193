//! The processes that fork workers (`fork = true`): one for each pool, started at the first
//! request.
//!
//! Guarantees: every order is answered, with a worker that waits at its gate or with an error;
//! a parent that does not answer in time is killed; the workers of a parent that ends are not
//! touched. A change of the command, the account and so on leads to a new parent, and the old one
//! ends with its last worker.

mod channel;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use dispatch_protocol::wire::{Fork, MAX_PREFORK_RECORD, Prefork, Token};
use nix::sys::signal::Signal;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use self::channel::{channel, identify, receive, send};
use super::leader::{Leader, Status};
use super::output::Pipes;
use super::start::{Started, start as start_process};
use super::task::{KILLED, ordered};
use super::{Common, Listeners, SpawnRequest, Stop, Stops, group};
use crate::background::logger::{quoted, value};
use crate::config::{Account, OnDispatcherLoss, Output, Place, depends_on_process, expand};
use crate::sys;
use dispatcher_core::{PoolId, ProcessId};

/// A parent without workers and orders is ended after this time. A pool without wanted processes
/// then has no parent, and a pool in a crash loop gets a new one.
const IDLE: Duration = Duration::from_secs(10);

/// How long a parent may take to report workers that were killed at a stop.
const REPORTS: Duration = Duration::from_millis(500);

/// Most orders that the parent has not answered; further ones wait here.
const UNANSWERED: usize = 64;

/// The parents that take orders, by pool.
#[derive(Default)]
pub(super) struct Parents(HashMap<PoolId, Handle>);

struct Handle {
    template: SpawnRequest,
    orders: UnboundedSender<Order>,
}

impl Parents {
    /// Orders a worker from the parent of its pool. Returns the task of a new parent if there is
    /// none that was started from the same settings.
    pub(super) fn order(
        &mut self,
        request: &SpawnRequest,
        within: Duration,
        stop: &watch::Receiver<Stops>,
        common: &Common,
    ) -> (oneshot::Receiver<Answer>, Option<impl Future<Output = bool> + Send + 'static + use<>>)
    {
        let (reply, answer) = oneshot::channel();
        let mut order = Order::new(request, within, reply);
        let template = template(request);
        let pool = request.process.pool;
        if let Some(parent) = self.0.get(&pool).filter(|parent| parent.template == template) {
            match parent.orders.send(order) {
                Ok(()) => return (answer, None),
                // It has ended.
                Err(back) => order = back.0,
            }
        }
        let (orders, receiver) = unbounded_channel();
        // The receiver is there.
        let _ = orders.send(order);
        self.0.insert(pool, Handle { template: template.clone(), orders });
        (answer, Some(run(template, receiver, stop.clone(), common.clone())))
    }

    /// The next worker of this pool comes from a new parent.
    pub(super) fn renew(&mut self, pool: PoolId) {
        self.0.remove(&pool);
    }
}

/// Stands for every parent of a pool where a process is expected.
pub(super) fn parent_of(pool: PoolId) -> ProcessId {
    ProcessId { pool, place: u32::MAX, start: u32::MAX }
}

/// The part of a request that the workers of one parent have in common.
fn template(request: &SpawnRequest) -> SpawnRequest {
    let process = parent_of(request.process.pool);
    SpawnRequest {
        process,
        name: format!("{}-parent", request.pool),
        token: Token([0; 16]),
        max_memory: None,
        patience: Duration::ZERO,
        fork: None,
        address: None,
        listeners: Listeners::default(),
        ..request.clone()
    }
}

/// A worker to fork.
struct Order {
    name: String,
    token: Token,
    variables: Vec<(String, String)>,
    output: bool,
    /// When the parent is killed without an answer.
    deadline: Instant,
    within: Duration,
    reply: oneshot::Sender<Answer>,
}

/// A worker, or the reason why there is none.
pub(super) type Answer = Result<Forked, String>;

/// A worker that waits at its gate.
pub(super) struct Forked {
    pub(super) pid: nix::unistd::Pid,
    pub(super) leader: Leader,
    pub(super) gate: Gate,
    pub(super) pipes: Option<Pipes>,
}

/// Where a worker waits. Without [`Gate::open`] the worker exits.
pub(super) struct Gate(OwnedFd);

impl Gate {
    /// Lets the worker run. A worker that has ended meanwhile needs nothing.
    pub(super) fn open(self) {
        let _ = rustix::io::write(&self.0, &[1]);
    }
}

impl Order {
    fn new(request: &SpawnRequest, within: Duration, reply: oneshot::Sender<Answer>) -> Order {
        let number = request.process.place + 1;
        let place =
            Place { number, name: &request.name, pool: &request.pool, address: None, fd: None };
        let own = request.environment.iter().filter(|(_, value)| depends_on_process(value));
        Order {
            name: request.name.clone(),
            token: request.token,
            variables: own.map(|(name, value)| (name.clone(), expand(value, place))).collect(),
            output: request.setup.output == Output::Log,
            deadline: Instant::now() + within,
            within,
            reply,
        }
    }
}

/// An order that the parent has, or is about to get.
struct Asked {
    order: Order,
    gate: Gate,
    pipes: Option<Pipes>,
}

struct Parent {
    channel: AsyncFd<OwnedFd>,
    process: ProcessId,
    /// Its process group, and the process id of its leader.
    group: nix::unistd::Pid,
    /// The process that forks, if a wrapper has started it. The wrapper holds the channel, too, so
    /// the end of this process does not end the channel.
    forks: Option<AsyncFd<OwnedFd>>,
    next_id: u64,
    /// Orders that do not fit into the channel.
    waiting: VecDeque<Order>,
    asked: HashMap<u64, Asked>,
    /// Where to report the end of each worker.
    workers: HashMap<u32, oneshot::Sender<i32>>,
    account: Option<Account>,
    /// Its workers may outlive the dispatcher.
    outlive: bool,
}

/// Why a parent is to be ended.
enum Reason {
    /// It is not needed any more.
    Unneeded,
    /// A stop.
    Stop,
    /// It does not do what it should.
    Fault(String),
    /// It has closed the channel.
    Closed,
}

/// The life of a parent. Returns whether it had to be killed.
async fn run(
    template: SpawnRequest,
    mut orders: UnboundedReceiver<Order>,
    mut stop: watch::Receiver<Stops>,
    common: Common,
) -> bool {
    let (mut parent, started) = match start(&template, &common) {
        Ok(started) => started,
        Err(error) => {
            refuse(&mut orders, &error);
            return false;
        }
    };
    let Started { mut child, pid, output } = started;
    common.own.add(pid.as_raw());
    let pool = value(&template.pool).to_string();
    log::info!("event=prefork_parent_started pool={pool} pid={pid}");
    let process = parent.process;
    let mut ended = None;
    let reason = tokio::select! {
        biased;
        stop = ordered(&mut stop, process) => match stop {
            Stop::End { wait, timeout } => {
                refuse(&mut orders, "the pool is stopping");
                parent.fail_all("the pool is stopping");
                let _ = tokio::time::timeout(wait + timeout + REPORTS, parent.until_no_workers()).await;
                Some(Reason::Stop)
            }
            // It ends when the channel does, and its workers run on.
            Stop::Leave => None,
        },
        status = child.wait() => {
            ended = Some(status.map_or_else(|error| error.to_string(), super::leader::describe));
            Some(Reason::Closed)
        }
        reason = parent.serve(&mut orders) => Some(reason),
    };
    // What it has sent before its end counts.
    while let Ok(true) = parent.receive() {}
    let error = match (&reason, &ended) {
        (Some(Reason::Fault(error)), _) => error.clone(),
        (_, Some(status)) => {
            format!("the process that forks the workers of the pool has ended: {status}")
        }
        _ => "the process that forks the workers of the pool has ended".to_owned(),
    };
    let Some(reason) = reason else {
        common.own.remove(pid.as_raw());
        return false;
    };
    parent.fail_all(&error);
    // It may have ended before it got its first order.
    refuse(&mut orders, &error);
    drop(parent);
    let mut killed = false;
    if ended.is_none() {
        let fault = matches!(reason, Reason::Fault(_));
        group::signal(pid, if fault { Signal::SIGKILL } else { Signal::SIGTERM });
        let status = match tokio::time::timeout(KILLED, child.wait()).await {
            Ok(status) => Some(status),
            Err(_) => {
                killed = true;
                group::signal(pid, Signal::SIGKILL);
                tokio::time::timeout(KILLED, child.wait()).await.ok()
            }
        };
        ended = status.map(|status| status.map_or_else(|e| e.to_string(), super::leader::describe));
    }
    // A wrapper may have left processes; the workers have groups of their own.
    if !group::is_empty(pid) {
        group::signal(pid, Signal::SIGKILL);
    }
    common.own.remove(pid.as_raw());
    drop(output);
    let status = ended.unwrap_or_else(|| "unknown: it does not end".to_owned());
    let status = quoted(&status);
    match reason {
        Reason::Unneeded | Reason::Stop => {
            log::info!("event=prefork_parent_ended pool={pool} pid={pid} status={status}");
        }
        Reason::Fault(error) => log::warn!(
            "event=prefork_parent_ended pool={pool} pid={pid} status={status} error={}",
            quoted(&error)
        ),
        Reason::Closed => {
            log::warn!("event=prefork_parent_ended pool={pool} pid={pid} status={status}");
        }
    }
    refuse(&mut orders, &error);
    killed
}

/// Refuses the orders that are there, and every later one.
fn refuse(orders: &mut UnboundedReceiver<Order>, error: &str) {
    orders.close();
    while let Ok(order) = orders.try_recv() {
        let _ = order.reply.send(Err(error.to_owned()));
    }
}

fn start(template: &SpawnRequest, common: &Common) -> Result<(Parent, Started), String> {
    let failed = |error: io::Error| format!("no channel to the process that forks: {error}");
    let (own, its) = channel().map_err(failed)?;
    let started = start_process(template, &common.last_output, None, Some(its.as_fd()))?;
    let channel = sys::readable_and_writable(own).map_err(failed)?;
    let parent = Parent {
        channel,
        process: template.process,
        group: started.pid,
        forks: None,
        next_id: 1,
        waiting: VecDeque::new(),
        asked: HashMap::new(),
        workers: HashMap::new(),
        account: template.setup.account.clone(),
        outlive: template.on_dispatcher_loss != OnDispatcherLoss::Stop,
    };
    Ok((parent, started))
}

impl Parent {
    /// Passes on orders and answers until the parent is to be ended.
    async fn serve(&mut self, orders: &mut UnboundedReceiver<Order>) -> Reason {
        let mut no_more = false;
        let mut idle_since = None;
        loop {
            while self.asked.len() < UNANSWERED
                && let Some(order) = self.waiting.pop_front()
            {
                match self.ask(order) {
                    Ok(None) => {}
                    Ok(Some(back)) => {
                        self.waiting.push_front(back);
                        break;
                    }
                    Err(_) => return Reason::Closed,
                }
            }
            let idle = self.asked.is_empty() && self.waiting.is_empty() && self.workers.is_empty();
            if idle && no_more {
                return Reason::Unneeded;
            }
            idle_since = idle.then(|| idle_since.unwrap_or_else(Instant::now));
            let deadline = self.asked.values().map(|asked| asked.order.deadline).min();
            let full = !self.waiting.is_empty() && self.asked.len() < UNANSWERED;
            tokio::select! {
                ready = self.channel.readable() => {
                    match ready {
                        Ok(mut ready) => ready.clear_ready(),
                        Err(error) => return Reason::Fault(error.to_string()),
                    }
                    loop {
                        match self.receive() {
                            Ok(true) => {}
                            Ok(false) => break,
                            Err(reason) => return reason,
                        }
                    }
                }
                ready = self.channel.writable(), if full => match ready {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(error) => return Reason::Fault(error.to_string()),
                },
                order = orders.recv(), if !no_more => match order {
                    Some(order) => self.waiting.push_back(order),
                    None => no_more = true,
                },
                // An order that was sent meanwhile is still received.
                () = until(idle_since.map(|since| since + IDLE)) => orders.close(),
                () = end_of(self.forks.as_ref()) => return Reason::Closed,
                () = until(deadline) => return Reason::Fault(self.overdue()),
            }
        }
    }

    /// Notices the end of the process that forks.
    fn watch(&mut self, pid: i32) {
        if pid == self.group.as_raw() || self.forks.is_some() {
            return;
        }
        let pidfd = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK).ok());
        let member = group::stat(pid).is_some_and(|stat| stat.group == self.group.as_raw());
        self.forks = pidfd.filter(|_| member).and_then(|pidfd| sys::readable(pidfd).ok());
    }

    fn overdue(&self) -> String {
        let now = Instant::now();
        let within = self.asked.values().filter(|asked| asked.order.deadline <= now);
        let within = within.map(|asked| asked.order.within).min().unwrap_or_default();
        format!(
            "the parent did not fork within start_timeout ({}): with `fork = true` a program calls \
             worker_sdk::prefork",
            humantime::format_duration(within)
        )
    }

    /// Receives until all workers have ended.
    async fn until_no_workers(&mut self) {
        while !self.workers.is_empty() {
            let Ok(mut ready) = self.channel.readable().await else { return };
            ready.clear_ready();
            loop {
                match self.receive() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(_) => return,
                }
            }
        }
    }

    fn fail_all(&mut self, error: &str) {
        let asked = self.asked.drain().map(|(_, asked)| asked.order);
        for order in asked.chain(self.waiting.drain(..)) {
            // The task of a process waits for it until the dispatcher ends.
            let _ = order.reply.send(Err(error.to_owned()));
        }
    }

    /// Sends an order. Returns it if the channel is full.
    fn ask(&mut self, order: Order) -> io::Result<Option<Order>> {
        let id = self.next_id;
        let Order { name, token, variables, .. } = &order;
        let record = Fork { id, name: name.clone(), token: *token, variables: variables.clone() };
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        let made = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from).and_then(|gate| {
            let pipes = order
                .output
                .then(|| Pipes::new(self.account.as_ref(), self.outlive))
                .transpose()?;
            Ok((gate, pipes))
        });
        let ((its_gate, gate), pipes) = match made {
            Ok(_) if bytes.len() > MAX_PREFORK_RECORD => {
                let error = "the variables with {n} or {name} are too long".to_owned();
                let _ = order.reply.send(Err(error));
                return Ok(None);
            }
            Ok(made) => made,
            Err(error) => {
                let _ = order.reply.send(Err(format!("no pipe for a forked process: {error}")));
                return Ok(None);
            }
        };
        let (pipes, output) = pipes.map_or((None, None), |(pipes, ends)| (Some(pipes), Some(ends)));
        let mut fds: Vec<BorrowedFd<'_>> = vec![its_gate.as_fd()];
        fds.extend(output.iter().flatten().map(AsFd::as_fd));
        match send(self.channel.get_ref().as_fd(), &bytes, &fds) {
            Ok(()) => {
                self.next_id += 1;
                self.asked.insert(id, Asked { order, gate: Gate(gate), pipes });
                Ok(None)
            }
            Err(Errno::AGAIN) => Ok(Some(order)),
            Err(error) => {
                // The parent has ended: this order is answered with the others.
                self.waiting.push_front(order);
                Err(error.into())
            }
        }
    }

    /// Receives one record. False when there is none now.
    fn receive(&mut self) -> Result<bool, Reason> {
        let mut buffer = [0; RECORD];
        let length = match receive(self.channel.get_ref().as_fd(), &mut buffer) {
            Ok(Some(length)) => length,
            Ok(None) => return Ok(false),
            Err(Errno::CONNRESET) => return Err(Reason::Closed),
            Err(error) => return Err(Reason::Fault(format!("cannot receive from it: {error}"))),
        };
        if length == 0 {
            return Err(Reason::Closed);
        }
        let record =
            buffer.get(..length).map_or(Ok(None), |bytes| Prefork::decode(bytes).map(Some));
        match record {
            Ok(Some(Prefork::Forked(forked))) => {
                let Some(Asked { order, gate, pipes }) = self.asked.remove(&forked.id) else {
                    return Err(Reason::Fault(
                        "it answers an order that it did not get".to_owned(),
                    ));
                };
                let (status, its_status) = oneshot::channel();
                let answer = identify(forked.pid, self.group).and_then(|(pidfd, forks)| {
                    self.watch(forks);
                    let leader = Leader::Forked(
                        sys::readable(pidfd).map_err(|error| error.to_string())?,
                        Status::new(its_status),
                    );
                    let pid = nix::unistd::Pid::from_raw(forked.pid.cast_signed());
                    Ok(Forked { pid, leader, gate, pipes })
                });
                self.workers.insert(forked.pid, status);
                let _ = order.reply.send(answer);
            }
            Ok(Some(Prefork::NotForked(refused))) => {
                if let Some(asked) = self.asked.remove(&refused.id) {
                    let _ = asked.order.reply.send(Err(refused.reason));
                }
            }
            Ok(Some(Prefork::Ended(ended))) => {
                if let Some(report) = self.workers.remove(&ended.pid) {
                    let _ = report.send(ended.status.cast_signed());
                }
            }
            Ok(None) | Ok(Some(Prefork::Fork(_))) => {
                return Err(Reason::Fault("it sends a record that is not an answer".to_owned()));
            }
            Err(error) => {
                return Err(Reason::Fault(format!("it sends a bad record: {error}")));
            }
        }
        Ok(true)
    }
}

async fn end_of(process: Option<&AsyncFd<OwnedFd>>) {
    match process {
        // An error means that the end cannot be noticed: the same as the end.
        Some(pidfd) => drop(pidfd.readable().await),
        None => std::future::pending().await,
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The longest answer: a reason of 1,024 bytes, and room for TLVs of a later version.
const RECORD: usize = 4096;
