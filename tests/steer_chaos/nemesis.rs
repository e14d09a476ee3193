//! The nemesis: kills, stops and restarts servers and dispatchers, floods, reloads and gives
//! commands, from a seed.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use simulator::Random;
use test_support::chaos::replace_config;
use test_support::forger::{Forger, SYN};
use test_support::{Process, http_get, http_post};

use super::place::{MEMBERS, PUBLICS, Run, SPAWNED, Server, kernel};
use super::protocol::now;

/// The longest time that a dispatcher may need to start, to stop or to hand over.
const CHANGE: Duration = Duration::from_secs(60);

/// One action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deed {
    pub at: u64,
    pub what: What,
    /// The server that it was done to.
    pub server: Option<Server>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// SIGKILL of a server.
    Kill,
    /// SIGTERM of a server.
    Term,
    /// SIGSTOP of a server, for a while.
    Stop,
    /// The dispatcher of a stopped server ended. The kernel sends SIGHUP to a group of processes
    /// that becomes orphaned while one of them is stopped.
    Hangup,
    /// A member is started.
    Member,
    DispatcherStart,
    /// It answers.
    DispatcherServes,
    DispatcherKill,
    /// SIGUSR1: it leaves processes and pins to the next one.
    DispatcherLeaves,
    /// SIGTERM: it ends processes and removes pins.
    DispatcherTerm,
    /// It has ended.
    DispatcherEnded,
    DispatcherStop,
    TakeOver,
    /// One of the two is killed meanwhile.
    TakeOverKill,
    Reload,
    Command,
    /// SYNs of forged clients.
    Flood,
    /// How the kernel treats SYNs: SYN cookies never, when needed, always.
    Cookies,
}

enum State {
    Up {
        process: Process,
        stopped_until: Option<Instant>,
    },
    /// It has been told to end.
    Ending(Process, Instant),
    /// Two of them: the former one and the next one.
    TakeOver(Process, Process, Instant),
    Down {
        until: Instant,
    },
}

struct Member {
    name: &'static str,
    port: u16,
    process: Option<Process>,
    until: Instant,
}

pub struct Nemesis<'a> {
    run: &'a Run,
    random: Random,
    state: State,
    serves: bool,
    /// The programs are attached.
    attached: bool,
    /// One of two dispatchers was killed in a take-over: the other one may end, too.
    doubtful: bool,
    members: Vec<Member>,
    stopped: Vec<(Server, Instant)>,
    forgers: Vec<Forger>,
    pub forged: u64,
    next_deed: Instant,
    pub deeds: Vec<Deed>,
    pub problems: Vec<String>,
}

fn signal(pid: i32, signal: Signal) {
    // It may have ended.
    let _ = kill(Pid::from_raw(pid), signal);
}

impl<'a> Nemesis<'a> {
    pub fn new(run: &'a Run, seed: u64) -> Nemesis<'a> {
        let now = Instant::now();
        let member = |(name, port)| Member { name, port, process: None, until: now };
        let v4 = PUBLICS.iter().filter(|(address, _)| address.is_ipv4());
        Nemesis {
            run,
            random: Random::new(seed),
            state: State::Down { until: now },
            serves: false,
            attached: false,
            doubtful: false,
            members: MEMBERS.map(member).into(),
            stopped: Vec::new(),
            forgers: v4.map(|(address, _)| Forger::to(address.port())).collect(),
            forged: 0,
            next_deed: now,
            deeds: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// Causes faults until `end`.
    pub fn rage(&mut self, end: Instant) {
        while Instant::now() < end
            && !self.run.clients.stop.load(std::sync::atomic::Ordering::SeqCst)
        {
            self.mend();
            self.watch();
            if Instant::now() >= self.next_deed {
                self.misbehave();
                let pause = self.random.below(300);
                self.next_deed = Instant::now() + Duration::from_millis(pause);
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// Ends every fault, and waits until every process runs.
    pub fn relent(&mut self) -> Result<(), String> {
        kernel("net/ipv4/tcp_syncookies", 1);
        kernel("net/ipv4/tcp_max_syn_backlog", 512);
        self.stopped.iter_mut().for_each(|(_, until)| *until = Instant::now());
        let deadline = Instant::now() + CHANGE;
        let up = |state: &State| matches!(state, State::Up { stopped_until: None, .. });
        while !(up(&self.state)
            && self.serves
            && self.members.iter().all(|it| it.process.is_some()))
        {
            if Instant::now() > deadline {
                return Err("waited for a dispatcher".to_owned());
            }
            self.mend();
            self.watch();
            std::thread::sleep(Duration::from_millis(3));
        }
        self.mend();
        replace_config(&self.run.directory, &self.run.configuration(None));
        let admin = self.run.admin();
        let must = |path: &str, body: &str| {
            let deadline = Instant::now() + CHANGE;
            while !http_post(&admin, path, body) {
                if Instant::now() > deadline {
                    return Err(format!("not carried out: {path} {body}"));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        };
        must("/v1/reload", "{}")?;
        must("/v1/workers", "{\"action\": \"resume\"}")?;
        for (pool, processes) in SPAWNED {
            let body = format!("{{\"action\": \"scale\", \"processes\": {processes}}}");
            must(&format!("/v1/pools/{pool}"), &body)?;
        }
        Ok(())
    }

    /// Ends no process, and starts those that ended a moment ago.
    pub fn tend(&mut self) {
        self.mend();
        self.watch();
    }

    /// The dispatcher, while it runs.
    pub fn dispatcher(&self) -> Option<&Process> {
        match &self.state {
            State::Up { process, .. } => Some(process),
            _ => None,
        }
    }

    /// Ends the dispatcher with SIGTERM, and waits for it.
    pub fn dismiss(&mut self) {
        if let State::Up { process, .. } = &mut self.state {
            process.signal(Signal::SIGTERM);
            let status = process.wait();
            if !status.success() {
                self.problems.push(format!("the dispatcher's last end: {status}"));
            }
        }
        self.state = State::Down { until: Instant::now() + CHANGE };
    }

    /// Ends the members.
    pub fn dismiss_members(&mut self) {
        self.members.clear();
    }

    fn did(&mut self, what: What, server: Option<Server>) {
        self.deeds.push(Deed { at: now(), what, server });
    }

    /// Ends the faults whose time is over.
    fn mend(&mut self) {
        let now = Instant::now();
        let mut over = Vec::new();
        self.stopped.retain(|(server, until)| {
            let ends = *until <= now;
            over.extend(ends.then_some(server.pid));
            !ends
        });
        over.into_iter().for_each(|pid| signal(pid, Signal::SIGCONT));
        if let State::Up { process, stopped_until } = &mut self.state
            && stopped_until.take_if(|until| *until <= now).is_some()
        {
            process.signal(Signal::SIGCONT);
        }
    }

    /// Notices which processes have ended, and starts what should run.
    fn watch(&mut self) {
        let now = Instant::now();
        let mut started = 0;
        for member in &mut self.members {
            let ended = |it: &mut Process| it.child.try_wait().unwrap().is_some();
            if member.process.as_mut().is_some_and(ended) {
                member.process = None;
                member.until = now + Duration::from_millis(self.random.below(1_500));
            }
            // A listener that was opened before the programs were attached is not seen to end.
            let counted = self.attached && now >= member.until;
            if member.process.is_none() && counted {
                member.process = Some(self.run.start_member(member.name, member.port));
                started += 1;
            }
        }
        (0..started).for_each(|_| self.did(What::Member, None));
        let until = now + Duration::from_millis(self.random.below(1_000));
        let state = std::mem::replace(&mut self.state, State::Down { until });
        self.state = match state {
            State::Up { mut process, stopped_until } => match process.child.try_wait().unwrap() {
                Some(status) => {
                    if !self.doubtful {
                        let problem = format!("the dispatcher ended by itself: {status}");
                        self.problems.push(problem);
                    }
                    self.ended()
                }
                None => State::Up { process, stopped_until },
            },
            State::Ending(mut process, deadline) => match process.child.try_wait().unwrap() {
                Some(status) => {
                    if !status.success() {
                        self.problems.push(format!("the dispatcher's end: {status}"));
                    }
                    self.ended()
                }
                None if now > deadline => {
                    self.problems.push(format!("the dispatcher did not end in {CHANGE:?}"));
                    process.kill();
                    self.ended()
                }
                None => State::Ending(process, deadline),
            },
            State::TakeOver(former, next, deadline) => self.watch_take_over(former, next, deadline),
            State::Down { until } if now >= until => {
                self.did(What::DispatcherStart, None);
                State::Up { process: self.run.start_dispatcher(false), stopped_until: None }
            }
            down @ State::Down { .. } => down,
        };
        if !self.serves
            && let State::Up { process, stopped_until: None } = &self.state
            && http_get(&self.run.admin(), "/healthz").is_ok()
            && self.run.status().is_some_and(|it| it.pid == process.pid().cast_unsigned())
        {
            (self.serves, self.attached, self.doubtful) = (true, true, false);
            self.did(What::DispatcherServes, None);
        }
    }

    fn ended(&mut self) -> State {
        self.serves = false;
        self.hang_up();
        self.did(What::DispatcherEnded, None);
        State::Down { until: Instant::now() + Duration::from_millis(self.random.below(1_000)) }
    }

    fn hang_up(&mut self) {
        let spawned = self.stopped.iter().filter(|(server, _)| server.pool != "units");
        let stopped: Vec<Server> = spawned.map(|(server, _)| server.clone()).collect();
        stopped.into_iter().for_each(|server| self.did(What::Hangup, Some(server)));
    }

    fn watch_take_over(
        &mut self,
        mut former: Process,
        mut next: Process,
        deadline: Instant,
    ) -> State {
        let (first, second) = (former.child.try_wait().unwrap(), next.child.try_wait().unwrap());
        let killed = self.doubtful;
        match (first, second) {
            (None, None) if Instant::now() > deadline => {
                self.problems.push(format!("no take-over in {CHANGE:?}"));
                former.kill();
                next.kill();
                self.ended()
            }
            (None, None) => {
                if self.random.once_in(300) {
                    self.did(What::TakeOverKill, None);
                    self.doubtful = true;
                    self.serves = false;
                    let either = if self.random.once_in(2) { &mut former } else { &mut next };
                    either.kill();
                }
                State::TakeOver(former, next, deadline)
            }
            (Some(status), None) => {
                if !(status.success() || killed) {
                    self.problems.push(format!("the former dispatcher's end: {status}"));
                }
                self.serves = false;
                self.hang_up();
                State::Up { process: next, stopped_until: None }
            }
            (None, Some(status)) => {
                if !killed {
                    self.problems.push(format!("a take-over failed: {status}"));
                }
                State::Up { process: former, stopped_until: None }
            }
            (Some(_), Some(status)) => {
                if !killed {
                    self.problems.push(format!("no dispatcher is left of a take-over: {status}"));
                }
                self.ended()
            }
        }
    }

    fn misbehave(&mut self) {
        match self.random.below(1000) {
            0..260 => self.end_server(What::Kill, Signal::SIGKILL),
            260..370 => self.end_server(What::Term, Signal::SIGTERM),
            370..500 => self.stop_server(),
            500..570 => self.kill_dispatcher(),
            570..600 => self.tell_dispatcher(What::DispatcherLeaves, Signal::SIGUSR1),
            600..606 => self.tell_dispatcher(What::DispatcherTerm, Signal::SIGTERM),
            606..640 => self.stop_dispatcher(),
            640..690 => self.take_over(),
            690..770 => self.reload(),
            770..900 => self.command(),
            900..960 => self.flood(),
            _ => {
                self.did(What::Cookies, None);
                kernel("net/ipv4/tcp_syncookies", self.random.below(3) as u32);
                let most = [8, 64, 512][self.random.below(3) as usize];
                kernel("net/ipv4/tcp_max_syn_backlog", most);
            }
        }
    }

    /// A server that is not stopped.
    fn victim(&mut self) -> Option<Server> {
        let mut servers = self.run.servers();
        servers.retain(|server| self.stopped.iter().all(|(it, _)| it != server));
        // A dispatcher can have the process id of a server that has ended.
        let dispatchers = match &self.state {
            State::Up { process, .. } | State::Ending(process, _) => vec![process.pid()],
            State::TakeOver(former, next, _) => vec![former.pid(), next.pid()],
            State::Down { .. } => Vec::new(),
        };
        servers.retain(|server| !dispatchers.contains(&server.pid));
        let at = self.random.below(servers.len() as u64) as usize;
        servers.into_iter().nth(at)
    }

    fn end_server(&mut self, what: What, with: Signal) {
        if let Some(server) = self.victim() {
            // Noted first, because the consequences can be visible before the call returns.
            self.did(what, Some(server.clone()));
            signal(server.pid, with);
        }
    }

    fn stop_server(&mut self) {
        let longest = [100, 600, 2_500][self.random.below(3) as usize];
        let until = Instant::now() + Duration::from_millis(self.random.below(longest));
        if let Some(server) = self.victim() {
            self.did(What::Stop, Some(server.clone()));
            signal(server.pid, Signal::SIGSTOP);
            self.stopped.push((server, until));
        }
    }

    fn kill_dispatcher(&mut self) {
        if let State::Up { process, .. } = &mut self.state {
            process.kill();
            self.did(What::DispatcherKill, None);
            self.state = self.ended();
        }
    }

    fn tell_dispatcher(&mut self, what: What, with: Signal) {
        if !self.serves || !matches!(self.state, State::Up { stopped_until: None, .. }) {
            return;
        }
        self.did(what, None);
        self.serves = false;
        if what == What::DispatcherTerm {
            self.attached = false;
            self.members.iter_mut().for_each(|member| member.process = None);
        }
        let down = State::Down { until: Instant::now() };
        if let State::Up { process, .. } = std::mem::replace(&mut self.state, down) {
            process.signal(with);
            self.state = State::Ending(process, Instant::now() + CHANGE);
        }
    }

    fn stop_dispatcher(&mut self) {
        let until = Instant::now() + Duration::from_millis(5 + self.random.below(600));
        if let State::Up { process, stopped_until } = &mut self.state {
            process.signal(Signal::SIGSTOP);
            *stopped_until = Some(until);
            self.did(What::DispatcherStop, None);
        }
    }

    fn take_over(&mut self) {
        if !self.serves || !matches!(self.state, State::Up { stopped_until: None, .. }) {
            return;
        }
        self.did(What::TakeOver, None);
        let down = State::Down { until: Instant::now() };
        if let State::Up { process, .. } = std::mem::replace(&mut self.state, down) {
            let next = self.run.start_dispatcher(true);
            self.state = State::TakeOver(process, next, Instant::now() + CHANGE);
        }
    }

    fn reload(&mut self) {
        let text = self.run.configuration(Some(&mut self.random));
        replace_config(&self.run.directory, &text);
        self.did(What::Reload, None);
        if self.serves
            && let State::Up { process, stopped_until: None } = &self.state
        {
            process.signal(Signal::SIGHUP);
        }
    }

    /// A random command of an operator. Its success depends on the other faults.
    fn command(&mut self) {
        let (pool, usual) = SPAWNED[self.random.below(SPAWNED.len() as u64) as usize];
        let worker = match self.random.below(3) {
            0 => format!("/v1/workers/units%2F{}", MEMBERS[self.random.below(3) as usize].0),
            _ => {
                let place = 1 + self.random.below(usual as u64);
                format!("/v1/workers/{pool}%2F{pool}-{place}")
            }
        };
        let processes = 1 + self.random.below(usual as u64 + 2);
        let weight = 1 + self.random.below(4);
        let (path, body) = match self.random.below(12) {
            0 | 1 => (worker, "{\"action\": \"drain\"}".to_owned()),
            2 | 3 => (worker, "{\"action\": \"resume\"}".to_owned()),
            4 | 5 => (worker, format!("{{\"action\": \"weight\", \"weight\": {weight}}}")),
            6 => (worker, "{\"action\": \"restart\"}".to_owned()),
            7 => (format!("/v1/pools/{pool}"), "{\"action\": \"restart\"}".to_owned()),
            8 | 9 => {
                let body = format!("{{\"action\": \"scale\", \"processes\": {processes}}}");
                (format!("/v1/pools/{pool}"), body)
            }
            _ => ("/v1/workers".to_owned(), "{\"action\": \"resume\"}".to_owned()),
        };
        self.did(What::Command, None);
        let admin = self.run.admin();
        // The dispatcher may be stopped at this moment.
        std::thread::spawn(move || http_post(&admin, &path, &body));
    }

    fn flood(&mut self) {
        self.did(What::Flood, None);
        let many = 100 + self.random.below(1_500) as u32;
        let first = self.random.below(60_000) as u32;
        let port = 1_024 + self.random.below(60_000) as u16;
        let at = self.random.below(self.forgers.len() as u64) as usize;
        (0..many).for_each(|n| self.forgers[at].send((first + n) % 60_000, port, SYN));
        self.forged += u64::from(many);
    }
}

impl Drop for Nemesis<'_> {
    /// What is stopped could not end by SIGTERM.
    fn drop(&mut self) {
        self.stopped.iter().for_each(|(server, _)| signal(server.pid, Signal::SIGCONT));
    }
}
