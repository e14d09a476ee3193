//! The nemesis: kills, stops, starves and restarts processes, from a seed, and keeps enough workers
//! running.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use simulator::Random;

use super::protocol::{SPAWNED, now};
use super::{Run, configuration};
use test_support::chaos::replace_config;
use test_support::{Process, http_post, wait_until};

/// The timeout of handoffs; some stops are shorter, some longer.
pub const HANDOFF_TIMEOUT: Duration = Duration::from_millis(200);
/// Clients are refused after this long without a worker.
pub const WAIT_FOR_WORKER: Duration = Duration::from_secs(1);

/// More of the quick kinds.
const FLAVOURS: [&str; 12] = [
    "blocking", "blocking", "tokio", "tokio", "tokio", "mio", "mio", "mio", "serial", "slow",
    "slow", "nothing",
];

/// One worker process that was ever started; its number is its index in the list and the number in
/// its name.
#[derive(Debug)]
pub struct Record {
    pub name: String,
    pub pid: i32,
    pub killed: Option<u64>,
}

/// One action.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deed {
    pub at: u64,
    pub what: What,
    /// The number of the affected worker.
    pub worker: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    Start,
    Kill,
    StopShort,
    StopLong,
    Goodbye,
    Starve,
    DispatcherStart,
    DispatcherTerm,
    DispatcherKill,
    DispatcherStop,
    Reload,
    Command,
    KillSpawned,
}

struct Worker {
    number: usize,
    process: Process,
    stopped_until: Option<Instant>,
    starved_until: Option<Instant>,
    leaving: bool,
    flavour: &'static str,
}

impl Worker {
    /// A worker that takes nothing.
    fn is_stuck(&self) -> bool {
        self.flavour == "nothing"
    }
}

enum Dispatcher {
    Up {
        process: Process,
        stopped_until: Option<Instant>,
    },
    /// It has been told to end.
    Ending(Process),
    Down {
        until: Instant,
    },
}

pub struct Nemesis<'a> {
    run: &'a Run,
    random: Random,
    workers: Vec<Worker>,
    dispatcher: Dispatcher,
    wanted: usize,
    next_deed: Instant,
    no_starts_until: Instant,
    pub records: Vec<Record>,
    pub deeds: Vec<Deed>,
    pub problems: Vec<String>,
    /// Processes of the dispatcher, by number.
    pub killed: BTreeMap<usize, u64>,
    hostile: Option<Process>,
}

impl<'a> Nemesis<'a> {
    pub fn new(run: &'a Run, seed: u64) -> Nemesis<'a> {
        let now = Instant::now();
        Nemesis {
            run,
            random: Random::new(seed),
            workers: Vec::new(),
            dispatcher: Dispatcher::Down { until: now },
            wanted: 5,
            next_deed: now + Duration::from_secs(1),
            no_starts_until: now,
            records: Vec::new(),
            deeds: Vec::new(),
            problems: Vec::new(),
            killed: BTreeMap::new(),
            hostile: None,
        }
    }

    /// Causes faults until `end`; from `spare` on it leaves the dispatcher running, so that it
    /// lives through some faults.
    pub fn rage(&mut self, spare: Instant, end: Instant) {
        while Instant::now() < end
            && !self.run.clients.stop.load(std::sync::atomic::Ordering::SeqCst)
        {
            self.mend();
            self.watch();
            self.replenish();
            let now = Instant::now();
            if now >= self.next_deed && matches!(self.dispatcher, Dispatcher::Up { .. }) {
                if self.run.only_dispatcher {
                    self.kill_dispatcher();
                } else {
                    self.misbehave(now < spare);
                }
                let most = if self.run.only_dispatcher { 400 } else { 250 };
                self.next_deed = now + Duration::from_millis(self.random.below(most));
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// Ends every fault, and waits until every process runs.
    pub fn relent(&mut self) {
        self.hostile = None;
        for index in (0..self.workers.len()).rev() {
            if self.workers[index].is_stuck() {
                self.kill(index);
            }
        }
        wait_until("the faults to end", || {
            self.mend();
            self.watch();
            self.replenish();
            matches!(self.dispatcher, Dispatcher::Up { stopped_until: None, .. })
                && self
                    .workers
                    .iter()
                    .all(|w| w.stopped_until.is_none() && w.starved_until.is_none())
                && self.workers.iter().filter(|w| !w.leaving && !w.is_stuck()).count() >= 3
        });
        for index in (0..self.workers.len()).rev() {
            if self.workers[index].is_stuck() {
                self.kill(index);
            }
        }
    }

    /// Every worker gets connections again.
    pub fn reload(&mut self) {
        wait_until("a reload", || http_post(&self.run.admin(), "/v1/reload", "{}"));
        wait_until("a resumption", || {
            http_post(&self.run.admin(), "/v1/workers", "{\"action\": \"resume\"}")
        });
    }

    /// Names of the workers that should be present.
    pub fn names(&self) -> Vec<String> {
        let staying = self.workers.iter().filter(|worker| !worker.leaving && !worker.is_stuck());
        staying.map(|worker| self.records[worker.number].name.clone()).collect()
    }

    /// Ends all workers with SIGTERM.
    pub fn dismiss_workers(&mut self) {
        for worker in &mut self.workers {
            if !worker.leaving {
                worker.process.signal(Signal::SIGTERM);
                worker.leaving = true;
            }
        }
        wait_until("the workers to end", || {
            self.watch();
            self.workers.is_empty()
        });
    }

    /// Ends the dispatcher with SIGTERM.
    pub fn dismiss_dispatcher(&mut self) {
        if let Dispatcher::Up { process, .. } = &mut self.dispatcher {
            process.signal(Signal::SIGTERM);
            let status = process.wait();
            if !status.success() {
                self.problems.push(format!("the dispatcher's last end: {status}"));
            }
        }
        self.dispatcher = Dispatcher::Down { until: Instant::now() };
    }

    pub fn dispatcher_fds(&self) -> usize {
        match &self.dispatcher {
            Dispatcher::Up { process, .. } | Dispatcher::Ending(process) => {
                // The journal of processes that serve on is open once there was one.
                let fds = std::fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap();
                let targets = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
                targets.filter(|target| !target.to_string_lossy().contains(".processes")).count()
            }
            Dispatcher::Down { .. } => 0,
        }
    }

    /// In KiB.
    pub fn dispatcher_memory(&self) -> u64 {
        let (Dispatcher::Up { process, .. } | Dispatcher::Ending(process)) = &self.dispatcher
        else {
            return 0;
        };
        process.memory()
    }

    fn did(&mut self, what: What, worker: Option<usize>) -> u64 {
        let at = now();
        self.deeds.push(Deed { at, what, worker });
        at
    }

    /// Ends the faults whose time is over.
    fn mend(&mut self) {
        let now = Instant::now();
        for worker in &mut self.workers {
            if worker.stopped_until.take_if(|until| *until <= now).is_some() {
                worker.process.signal(Signal::SIGCONT);
            }
            if worker.starved_until.take_if(|until| *until <= now).is_some() {
                worker.process.limit_descriptors(None);
            }
        }
        if let Dispatcher::Up { process, stopped_until } = &mut self.dispatcher
            && stopped_until.take_if(|until| *until <= now).is_some()
        {
            process.signal(Signal::SIGCONT);
        }
    }

    /// Notices which processes have ended, and which should not have.
    fn watch(&mut self) {
        for index in (0..self.workers.len()).rev() {
            let Some(status) = self.workers[index].process.child.try_wait().unwrap() else {
                continue;
            };
            let worker = self.workers.swap_remove(index);
            let record = &self.records[worker.number];
            if record.killed.is_none() && !(worker.leaving && status.success()) {
                self.problems.push(format!("worker {} ended by itself: {status}", record.name));
            }
        }
        let pause = Duration::from_millis(self.random.below(200));
        match &mut self.dispatcher {
            Dispatcher::Up { process, .. } => {
                if let Some(status) = process.child.try_wait().unwrap() {
                    self.problems.push(format!("the dispatcher ended by itself: {status}"));
                    self.dispatcher = Dispatcher::Down { until: Instant::now() + pause };
                }
            }
            Dispatcher::Ending(process) => {
                if let Some(status) = process.child.try_wait().unwrap() {
                    if !status.success() {
                        self.problems.push(format!("the dispatcher's end: {status}"));
                    }
                    self.dispatcher = Dispatcher::Down { until: Instant::now() + pause };
                }
            }
            Dispatcher::Down { until } if Instant::now() >= *until => {
                self.dispatcher =
                    Dispatcher::Up { process: self.run.start_dispatcher(), stopped_until: None };
                self.did(What::DispatcherStart, None);
            }
            Dispatcher::Down { .. } => {}
        }
    }

    fn replenish(&mut self) {
        let staying = self.workers.iter().filter(|worker| !worker.leaving).count();
        if staying < self.wanted && Instant::now() >= self.no_starts_until {
            let flavour = FLAVOURS[self.random.below(12) as usize];
            // One such worker is enough.
            if flavour != "nothing" || !self.workers.iter().any(Worker::is_stuck) {
                self.start_worker(flavour);
            }
        }
    }

    pub fn start_worker(&mut self, flavour: &'static str) {
        let number = self.records.len();
        let name = format!("{}{number}", &flavour[..1]);
        let process = self.run.start_worker(flavour, &name);
        self.records.push(Record { name, pid: process.pid(), killed: None });
        self.workers.push(Worker {
            number,
            process,
            stopped_until: None,
            starved_until: None,
            leaving: false,
            flavour,
        });
        self.did(What::Start, Some(number));
    }

    fn misbehave(&mut self, dispatcher_too: bool) {
        let choice = self.random.below(1000);
        match choice {
            0..4 => {
                // No worker is left, for longer than clients wait.
                let extra = Duration::from_millis(self.random.below(1000));
                self.no_starts_until = Instant::now() + WAIT_FOR_WORKER + extra;
                (0..self.workers.len()).rev().for_each(|index| self.kill(index));
            }
            4..45 if dispatcher_too => self.terminate_dispatcher(),
            45..95 if dispatcher_too => self.kill_dispatcher(),
            95..130 => self.stop_dispatcher(),
            130..170 => self.wanted = 3 + self.random.below(5) as usize,
            _ if self.workers.is_empty() => {}
            170..450 => {
                let index = self.any();
                self.kill(index);
            }
            450..500 => self.reconfigure(),
            500..560 => self.command(),
            560..590 => self.kill_spawned(),
            590..600 if self.hostile.is_none() => {
                self.hostile = Some(self.run.start_worker("hostile", "hostile"));
            }
            590..600 => self.hostile = None,
            600..670 => {
                let short = 5 + self.random.below(120);
                self.stop(What::StopShort, short);
            }
            670..750 => {
                let long = HANDOFF_TIMEOUT.as_millis() as u64 * (2 + self.random.below(6));
                self.stop(What::StopLong, long);
            }
            750..870 => self.say_goodbye(),
            _ => self.starve(),
        }
    }

    fn reconfigure(&mut self) {
        let run = self.run;
        let worker = &run.programs.worker;
        let text = configuration::any(&mut self.random, run.extra, worker, &run.directory);
        replace_config(&run.directory, &text);
        self.did(What::Reload, None);
        // A stopped dispatcher could not be continued from here otherwise.
        if let Dispatcher::Up { process, stopped_until: None } = &self.dispatcher
            && run.serves(process)
        {
            process.signal(Signal::SIGHUP);
        }
    }

    /// A random command of an operator. Its success depends on the other faults.
    fn command(&mut self) {
        let admin = self.run.admin();
        let names: Vec<String> = self.names();
        let (path, body) = match self.random.below(5) {
            0 | 1 if !names.is_empty() => {
                let name = &names[self.random.below(names.len() as u64) as usize];
                (format!("/v1/workers/web%2F{name}"), "{\"action\": \"drain\"}".to_owned())
            }
            2 | 3 => ("/v1/workers".to_owned(), "{\"action\": \"resume\"}".to_owned()),
            _ => {
                let count = 1 + self.random.below(4);
                let body = format!("{{\"action\": \"scale\", \"processes\": {count}}}");
                ("/v1/pools/web".to_owned(), body)
            }
        };
        self.did(What::Command, None);
        // The dispatcher may be stopped at this moment.
        std::thread::spawn(move || http_post(&admin, &path, &body));
    }

    fn kill_spawned(&mut self) {
        let Dispatcher::Up { stopped_until: None, .. } = self.dispatcher else { return };
        let Some(status) = self.run.status() else { return };
        let workers = status.pools.iter().flat_map(|pool| &pool.workers);
        let pids: Vec<i32> =
            workers.filter(|w| w.name.starts_with("web-")).map(|worker| worker.pid).collect();
        if pids.is_empty() {
            return;
        }
        let pid = pids[self.random.below(pids.len() as u64) as usize];
        let number = SPAWNED as usize + pid as usize;
        // The process is the dispatcher's child as long as the dispatcher lives and has not reaped
        // it.
        let at = self.did(What::KillSpawned, Some(number));
        self.killed.entry(number).or_insert(at);
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
    }

    fn any(&mut self) -> usize {
        self.random.below(self.workers.len() as u64) as usize
    }

    fn kill(&mut self, index: usize) {
        let number = self.workers[index].number;
        // Noted first, because the consequences can be visible before the call returns.
        let at = self.did(What::Kill, Some(number));
        self.records[number].killed.get_or_insert(at);
        let worker = &mut self.workers[index];
        worker.process.kill();
        // No fault is left to end.
        worker.stopped_until = None;
        worker.starved_until = None;
    }

    fn stop(&mut self, what: What, milliseconds: u64) {
        let index = self.any();
        self.did(what, Some(self.workers[index].number));
        let worker = &mut self.workers[index];
        worker.process.signal(Signal::SIGSTOP);
        worker.stopped_until = Some(Instant::now() + Duration::from_millis(milliseconds));
    }

    fn say_goodbye(&mut self) {
        let index = self.any();
        let number = self.workers[index].number;
        if self.workers[index].leaving || !self.run.has_answered(number) {
            return;
        }
        self.did(What::Goodbye, Some(number));
        self.workers[index].leaving = true;
        self.workers[index].process.signal(Signal::SIGTERM);
    }

    fn starve(&mut self) {
        let index = self.any();
        let spare = self.random.below(4) as usize;
        let until = Instant::now() + Duration::from_millis(50 + self.random.below(1500));
        let number = self.workers[index].number;
        if !self.run.has_answered(number) {
            return;
        }
        self.did(What::Starve, Some(number));
        let worker = &mut self.workers[index];
        worker.process.limit_descriptors(Some(spare));
        worker.starved_until = Some(until);
    }

    fn kill_dispatcher(&mut self) {
        if !matches!(self.dispatcher, Dispatcher::Up { .. }) {
            return;
        }
        self.did(What::DispatcherKill, None);
        if let Dispatcher::Up { process, .. } = &mut self.dispatcher {
            process.kill();
        }
        let pause = Duration::from_millis(self.random.below(200));
        self.dispatcher = Dispatcher::Down { until: Instant::now() + pause };
    }

    fn terminate_dispatcher(&mut self) {
        let down = Dispatcher::Down { until: Instant::now() };
        match std::mem::replace(&mut self.dispatcher, down) {
            Dispatcher::Up { process, stopped_until: None } if self.run.serves(&process) => {
                self.did(What::DispatcherTerm, None);
                process.signal(Signal::SIGTERM);
                self.dispatcher = Dispatcher::Ending(process);
            }
            other => self.dispatcher = other,
        }
    }

    fn stop_dispatcher(&mut self) {
        let until = Instant::now() + Duration::from_millis(5 + self.random.below(400));
        if let Dispatcher::Up { process, stopped_until } = &mut self.dispatcher {
            process.signal(Signal::SIGSTOP);
            *stopped_until = Some(until);
            self.did(What::DispatcherStop, None);
        }
    }
}

/// Passes the listening socket as descriptor 3, as a service manager does.
pub fn dispatcher_command(program: &PathBuf, listener: File, directory: &Path) -> Command {
    let mut command = Command::new("sh");
    let script = r#"export LISTEN_PID=$$; exec "$0" run --config "$1" 3<&0 </dev/null"#;
    command.args(["-c", script]).arg(program).arg(directory.join("dispatcher.toml"));
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "web");
    command
        .env("CHAOS_ROLE", "dispatcher")
        .env("DISPATCHER_LOG", "debug")
        .env_remove("NOTIFY_SOCKET");
    let log = File::options().create(true).append(true).open(directory.join("log")).unwrap();
    command.stdin(listener).stdout(Stdio::null()).stderr(log);
    command
}
