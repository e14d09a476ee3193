//! Starts the processes of pools, waits for their ends, and stops them. It runs on the side thread,
//! because starting a process takes a fraction of a millisecond, too long for the hot thread.
//!
//! Decides nothing: the core decides when to start, to stop, and whether to restart.

mod book;
mod deploys;
mod group;
mod journal;
mod leader;
mod listeners;
mod memory;
mod output;
mod prefork;
mod ready_check;
pub(crate) mod reaper;
mod start;
mod stops;
mod task;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use dispatch_protocol::wire::Token;
use tokio::sync::{mpsc as tokio_mpsc, watch};
use tokio::task::JoinSet;

use self::book::{Book, GIVEN_UP, report_journal};
pub use self::deploys::{Deploys, RollRecord};
pub use self::journal::Record;
use self::journal::{Journal, LOCK_TIME};
use self::leader::Found;
pub(crate) use self::leader::UNKNOWN;
pub use self::listeners::Listeners;
pub use self::output::{LastOutput, OutputLine, Stream, lost_lines};
pub use self::ready_check::{
    CheckConnection, CheckFate, CheckNeed, CheckRequest, DirectConnection, Reach,
};
use self::reaper::Own;
use self::stops::{Stop, Stops};
use crate::background::service_manager::unit::{self, StopKind, Unit};
use crate::config::{OnDispatcherLoss, ProcessSetup};
use crate::wake::Wake;
use dispatcher_core::{PoolId, ProcessId};

/// Most processes that wait to be started; as many as one pool may have.
const MAX_WAITING: usize = 1024;

/// A process to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpawnRequest {
    /// Identifies the process in every report.
    pub process: ProcessId,
    /// Program and arguments. With placeholders (see [`crate::config::expand`]), like the values of
    /// `environment`, and `directory`.
    pub command: Vec<String>,
    /// Added to the dispatcher's own environment.
    pub environment: Vec<(String, String)>,
    /// Working directory, if not the dispatcher's.
    pub directory: Option<String>,
    /// For `DISPATCH_SOCKET`.
    pub dispatch_socket: PathBuf,
    /// For `DISPATCH_POOL`.
    pub pool: String,
    /// For `DISPATCH_NAME`.
    pub name: String,
    /// For `DISPATCH_TOKEN`.
    pub token: Token,
    /// For the journal.
    pub generation: u32,
    /// For `DISPATCH_ON_LOSS`. A process that serves on is recorded in the journal.
    pub on_dispatcher_loss: OnDispatcherLoss,
    /// How long the remaining processes of the group may take to end once this process has ended.
    pub patience: Duration,
    /// `max_memory` in bytes.
    pub max_memory: Option<u64>,
    /// Limits of open files, soft and hard, if `setup` has none: those with which the dispatcher
    /// was started, if it has raised its own.
    pub descriptors: Option<(u64, u64)>,
    /// Account, permissions, limits and output.
    pub setup: ProcessSetup,
    /// With `fork = true`: how long the parent of the pool may take to fork it.
    pub fork: Option<Duration>,
    /// Where it is to listen, in a steered pool.
    pub address: Option<SocketAddr>,
    /// What it inherits, as from a service manager. Nothing for a process with `fork`.
    pub listeners: Listeners,
}

/// A report about a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The process runs.
    Spawned {
        /// The process.
        process: ProcessId,
        /// Its process id, and the id of its process group.
        pid: i32,
    },
    /// The process could not be started.
    SpawnFailed {
        /// The process.
        process: ProcessId,
        /// The error text.
        error: String,
    },
    /// The process and its process group have ended. Comes once after every `Spawned`.
    Exited {
        /// The process.
        process: ProcessId,
        /// The process id it had.
        pid: i32,
        /// The exit status, for display: `exit status 1`, `signal 9 (SIGKILL)`.
        status_text: String,
    },
    /// The process uses more than `max_memory`. Comes at most once for each process.
    ExceedsMemory {
        /// The process.
        process: ProcessId,
        /// The memory it uses, in bytes.
        bytes: u64,
    },
    /// The result of a [`CheckRequest`], and why the worker is not ready.
    Checked {
        /// The process.
        process: ProcessId,
        /// What is wrong.
        result: Result<(), String>,
    },
    /// Why the service manager stops this dispatcher.
    StopKind(StopKind),
    /// After [`Spawner::stop`]: all processes have ended, `killed` of them by SIGKILL. The last
    /// report.
    Stopped {
        /// How many did not end in time.
        killed: u32,
    },
}

/// A process of an earlier dispatcher that has not ended.
#[derive(Debug)]
pub struct Survivor {
    /// Identifies its worker.
    pub token: Token,
    /// Its place.
    pub record: Record,
    /// The process id, and the id of its process group.
    pub pid: i32,
    /// Most lines of output per second that the log takes, if an earlier dispatcher read its
    /// output.
    pub output_rate: u32,
    found: Found,
}

/// The hot thread's handle.
#[derive(Debug)]
pub struct Spawner {
    orders: tokio_mpsc::UnboundedSender<Order>,
    waiting: Arc<tokio::sync::Semaphore>,
    stop: watch::Sender<Stops>,
    last_output: LastOutput,
    check_needs: Receiver<CheckNeed>,
}

/// What the service is to do.
#[derive(Debug)]
enum Order {
    Start(Box<SpawnRequest>, tokio::sync::OwnedSemaphorePermit),
    Watch {
        process: ProcessId,
        survivor: Survivor,
        patience: Duration,
        max_memory: Option<u64>,
    },
    /// Where the journal is, and the journal if there is one.
    Journal(PathBuf, Option<Journal>),
    /// The process gets no more connections (`true`), or gets connections again.
    Leaving(ProcessId, bool),
    AskStopKind(Unit),
    /// The next forked process of the pool comes from a new parent.
    Renew(PoolId),
    Check(CheckRequest),
    /// What a later dispatcher is to know of the deploys of a pool.
    Deploys(Box<Deploys>),
    /// The next dispatcher needs the journal.
    GiveUpJournal,
}

impl Spawner {
    /// Requests a process. `Spawned` or `SpawnFailed` follows.
    ///
    /// # Errors
    ///
    /// Returns the request when too many are waiting or the service has ended: then no report
    /// follows.
    pub fn spawn(&self, request: SpawnRequest) -> Result<(), Box<SpawnRequest>> {
        let request = Box::new(request);
        let Ok(permit) = Arc::clone(&self.waiting).try_acquire_owned() else {
            return Err(request);
        };
        self.orders.send(Order::Start(request, permit)).map_err(|error| match error.0 {
            Order::Start(request, _) => request,
            // This function has sent a start.
            _ => unreachable!("another order comes back"),
        })
    }

    /// Reads the journal of an earlier dispatcher at `path`, and uses the file from now on. To be
    /// called before the first process is started; waits for the lock of the file. Returns the
    /// recorded processes that have not ended, for each of which [`Spawner::watch`] is to follow,
    /// and what is known of the deploys of their pools.
    pub fn recover(&self, path: PathBuf) -> (Vec<Survivor>, Vec<Deploys>) {
        let mut journal = match Journal::open(&path, false, LOCK_TIME) {
            Ok(journal) => journal,
            Err(error) => {
                report_journal(&path, &error);
                None
            }
        };
        let mut survivors = Vec::new();
        if let Some(journal) = &mut journal {
            let records: Vec<(Token, Record)> = journal
                .records()
                .into_iter()
                .map(|(token, record)| (token, record.clone()))
                .collect();
            let mut groups = None;
            for (token, record) in records {
                match leader::find(token, &record, &mut groups) {
                    (_, Found::Nothing) => journal.ended(token),
                    (pid, found) => {
                        let output_rate = ProcessSetup::default().output_rate;
                        survivors.push(Survivor { token, record, pid, output_rate, found });
                    }
                }
            }
        }
        let deploys = journal.as_ref().map_or_else(Vec::new, Journal::all_deploys);
        // Without a service there are no processes, either.
        let _ = self.orders.send(Order::Journal(path, journal));
        (survivors, deploys)
    }

    /// The last lines that a process has written, oldest first; see [`LastOutput`].
    pub fn last_output(&self, process: ProcessId) -> Vec<OutputLine> {
        self.last_output.of(process)
    }

    /// The last lines of the processes that fork the workers of a pool.
    pub fn last_output_of_parents(&self, pool: PoolId) -> Vec<OutputLine> {
        self.last_output.of(prefork::parent_of(pool))
    }

    /// The last lines of all processes, for other threads.
    pub fn last_outputs(&self) -> LastOutput {
        self.last_output.clone()
    }

    /// Watches a process of an earlier dispatcher. `Exited` follows. `patience` and `max_memory` as
    /// in [`SpawnRequest`].
    pub fn watch(
        &self,
        process: ProcessId,
        survivor: Survivor,
        patience: Duration,
        max_memory: Option<u64>,
    ) {
        let _ = self.orders.send(Order::Watch { process, survivor, patience, max_memory });
    }

    /// The process gets no more connections; a later dispatcher is to know that.
    pub fn leaving(&self, process: ProcessId) {
        let _ = self.orders.send(Order::Leaving(process, true));
    }

    /// The process gets connections again, after [`Spawner::leaving`].
    pub fn stays(&self, process: ProcessId) {
        let _ = self.orders.send(Order::Leaving(process, false));
    }

    /// With `fork = true`, the next process of the pool comes from a new parent, which loads the
    /// application again. The old parent ends with its last worker.
    pub fn renew(&self, pool: PoolId) {
        let _ = self.orders.send(Order::Renew(pool));
    }

    /// Checks the worker of a process. A [`CheckNeed`] may follow several times, and then
    /// `Checked`.
    pub fn check_ready(&self, request: CheckRequest) {
        let _ = self.orders.send(Order::Check(request));
    }

    /// What a check needs next.
    pub fn check_need(&self) -> Option<CheckNeed> {
        self.check_needs.try_recv().ok()
    }

    /// Records the deploys of a pool whose processes outlive the dispatcher.
    pub fn record_deploys(&self, deploys: Deploys) {
        let _ = self.orders.send(Order::Deploys(Box::new(deploys)));
    }

    /// Closes the journal, for another dispatcher that already runs. No process that would outlive
    /// this dispatcher is started any more.
    pub fn give_up_journal(&self) {
        let _ = self.orders.send(Order::GiveUpJournal);
    }

    /// Ends one process. If it has not ended by itself after `wait`, its process group gets
    /// SIGTERM, and SIGKILL after a further `timeout`. `Exited` follows.
    pub fn stop_process(&self, process: ProcessId, wait: Duration, timeout: Duration) {
        self.stop.send_modify(|stops| {
            let earlier = stops.processes.get(&process);
            if earlier.is_none_or(|(before, _)| wait < *before) {
                stops.processes.insert(process, (wait, timeout));
            }
        });
    }

    /// Whether this process was told to end, by [`Spawner::stop_process`].
    pub fn is_ending(&self, process: ProcessId) -> bool {
        self.stop.borrow().processes.contains_key(&process)
    }

    /// Asks the service manager why it stops this dispatcher. `StopKind` follows.
    pub(crate) fn ask_stop_kind(&self, unit: Unit) {
        let _ = self.orders.send(Order::AskStopKind(unit));
    }

    /// A process has ended: forgets that it was to be stopped.
    pub fn forget(&self, process: ProcessId) {
        self.stop.send_if_modified(|stops| {
            stops.processes.remove(&process);
            // No other process waits for this.
            false
        });
    }

    /// Ends all processes: SIGTERM to each process group now, SIGKILL after `timeout`. `Exited` for
    /// each and then `Stopped` follow; no further process is started.
    pub fn stop(&self, timeout: Duration) {
        self.stop.send_modify(|stops| stops.all = Some(timeout));
    }

    /// Every process that is being ended, or will be, gets SIGTERM now and SIGKILL after at most
    /// `most`.
    pub fn hurry(&self, most: Duration) {
        self.stop.send_modify(|stops| stops.most = Some(most));
    }

    /// The processes of one pool run on without this dispatcher. No `Exited` follows for them.
    pub fn leave_pool(&self, pool: PoolId) {
        self.stop.send_modify(|stops| {
            stops.left.insert(pool);
        });
    }
}

/// The service, before it runs.
pub(crate) struct Service {
    orders: tokio_mpsc::UnboundedReceiver<Order>,
    stop: watch::Receiver<Stops>,
    common: Common,
    processes: JoinSet<bool>,
    parents: prefork::Parents,
    checks: ready_check::CheckNeeds,
}

/// What the tasks of all processes share.
#[derive(Clone)]
struct Common {
    reports: Reports,
    own: Own,
    book: Book,
    last_output: LastOutput,
}

/// The destination of reports. The channel is unbounded, but the number is bounded: three reports
/// per request of the hot thread.
#[derive(Clone)]
struct Reports {
    sender: mpsc::Sender<Report>,
    wake: Wake,
}

impl Reports {
    fn send(&self, report: Report) {
        // Sending fails only when the hot thread is gone, and then no report is needed.
        if self.sender.send(report).is_ok() {
            (self.wake)();
        }
    }
}

/// A handle, the service behind it, and its reports.
pub(crate) fn service(wake: Wake) -> (Spawner, Service, Receiver<Report>) {
    let (order_sender, orders) = tokio_mpsc::unbounded_channel();
    let (stop_sender, stop) = watch::channel(Stops::default());
    let (sender, reports) = mpsc::channel();
    let waiting = Arc::new(tokio::sync::Semaphore::new(MAX_WAITING));
    let last_output = LastOutput::default();
    let (checks, check_needs) = mpsc::channel();
    (
        Spawner {
            orders: order_sender,
            waiting,
            stop: stop_sender,
            last_output: last_output.clone(),
            check_needs,
        },
        Service {
            orders,
            stop,
            common: Common {
                reports: Reports { sender, wake },
                own: Own::default(),
                book: Book::default(),
                last_output,
            },
            processes: JoinSet::new(),
            parents: prefork::Parents::default(),
            checks,
        },
        reports,
    )
}

impl Service {
    /// Runs until it was stopped and all processes have ended, or its handle is gone (processes
    /// then stay). After a panic it can run again, with the processes it had.
    pub(crate) async fn run(&mut self) {
        // A process that is only a dispatcher has no children but these and inherited ones.
        let own = self.common.own.clone();
        let reaper = crate::signals::is_dispatcher().then(|| {
            tokio::spawn(crate::background::restart::task("reaper", move || {
                reaper::reap(own.clone())
            }))
        });
        let _ends = AbortOnDrop(reaper);
        loop {
            tokio::select! {
                biased;
                changed = self.stop.changed() => match changed {
                    Ok(()) if self.stop.borrow_and_update().all.is_some() => break,
                    Ok(()) => {}
                    Err(_) => {
                        self.processes.detach_all();
                        return;
                    }
                },
                order = self.orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => {
                        self.processes.detach_all();
                        return;
                    }
                },
                Some(_) = self.processes.join_next() => {}
            }
        }
        self.orders.close();
        while let Some(order) = self.orders.recv().await {
            match order {
                Order::Start(request, _) => self.common.reports.send(Report::SpawnFailed {
                    process: request.process,
                    error: "the dispatcher is stopping".to_owned(),
                }),
                // It is to be ended.
                order => self.obey(order),
            }
        }
        let mut killed = 0;
        while let Some(ended) = self.processes.join_next().await {
            killed += u32::from(ended.unwrap_or(true));
        }
        self.common.reports.send(Report::Stopped { killed });
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Start(request, permit) if let Some(within) = request.fork => {
                let (stop, common) = (self.stop.clone(), self.common.clone());
                let (answer, parent) = self.parents.order(&request, within, &stop, &common);
                if let Some(parent) = parent {
                    self.processes.spawn(parent);
                }
                self.processes.spawn(task::forked(*request, answer, permit, stop, common));
            }
            Order::Start(request, permit) => {
                let task = task::start(*request, self.stop.clone(), self.common.clone());
                self.processes.spawn(async move {
                    // The task starts the process before it waits for the first time.
                    drop(permit);
                    task.await
                });
            }
            Order::Watch { process, survivor, patience, max_memory } => {
                let (stop, common) = (self.stop.clone(), self.common.clone());
                let task = task::watch(process, survivor, patience, max_memory, stop, common);
                self.processes.spawn(task);
            }
            Order::Journal(path, journal) => self.common.book.with(|book| {
                book.path = Some(path);
                book.journal = journal;
            }),
            Order::Leaving(process, leaves) => self.common.book.leaves(process, leaves),
            Order::AskStopKind(unit) => {
                let reports = self.common.reports.clone();
                tokio::spawn(async move {
                    reports.send(Report::StopKind(unit::stop_kind(&unit).await));
                });
            }
            Order::Renew(pool) => self.parents.renew(pool),
            Order::Check(request) => {
                let reports = self.common.reports.clone();
                tokio::spawn(ready_check::run(request, self.checks.clone(), reports));
            }
            Order::Deploys(deploys) => self.common.book.with(|book| {
                if let Some(journal) = book.journal() {
                    journal.records_deploys(*deploys);
                }
            }),
            Order::GiveUpJournal => self.common.book.with(|book| {
                book.given_up = true;
                book.path = None;
                book.journal = None;
            }),
        }
    }
}

/// The reaper, which must not run twice.
struct AbortOnDrop(Option<tokio::task::JoinHandle<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests;
