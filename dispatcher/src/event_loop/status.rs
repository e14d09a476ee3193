//! Requests and reports of the side thread: answers the status, starts processes, records their
//! ends.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use dispatch_protocol::wire::Token;
use rustix::rand::GetRandomFlags;

use super::EventLoop;
use super::fault_kind::FaultKind;
use super::gauges::show_gauges;
use super::rate_limit::{Cause, ProcessEvent};
use crate::api::status::Status;
use crate::background::logger::{quoted, value};
use crate::background::spawner::{Listeners, Report, SpawnRequest, UNKNOWN};
use crate::config::UnixSource;
use crate::mailbox::{DeferredStatus, Request};
use dispatcher_core::{ListenerId, ProcessId};

/// The exit statuses of a process that ends as ordered.
const ENDED_WELL: [&str; 2] = ["exit status 0", "signal 15 (SIGTERM)"];

/// Most reports of the side thread handled in one turn, beside one request; the rest waits for the
/// next turn.
const REPORTS_PER_TURN: usize = 256;

impl EventLoop {
    pub(super) fn handle_side(&mut self) {
        let mut count = 0;
        while count < REPORTS_PER_TURN {
            let Ok(report) = self.side.reports.try_recv() else { break };
            self.note(report);
            count += 1;
        }
        if let Some(need) = self.side.spawner.check_need() {
            self.serve_check(need);
            count = REPORTS_PER_TURN;
        }
        let request = self.side.request();
        if request.is_some() {
            // What follows from the reports is part of the answer, such as why a roll stopped.
            self.perform();
        }
        // There may be more, but clients come first.
        self.wakeup.side_ready = count == REPORTS_PER_TURN || request.is_some();
        if let Some(request) = request {
            self.answer(request);
        }
    }

    /// Answers one request. The receiver may already be gone, which is no error. Otherwise the
    /// answer wakes the side thread by one write to its eventfd.
    fn answer(&mut self, request: Request) {
        match request {
            Request::Status(answer) => drop(answer.send(self.gather())),
            Request::Alive(answer) => drop(answer.send(())),
            Request::Loads(answer) => drop(answer.send(self.loads())),
            Request::History { pool, after, answer } => {
                drop(answer.send(self.history(&pool, after)));
            }
            Request::Explain { pool, peer, answer } => {
                drop(answer.send(self.explain(&pool, peer)));
            }
            Request::Reload { plan, answer } => drop(answer.send(self.reload(*plan))),
            Request::Command { command, answer } => {
                let done = self.command(command);
                // The kernel knows of a drain before the operator does.
                self.perform();
                drop(answer.send(done));
            }
        }
    }

    /// Gathers what only this thread knows. The side thread reads the gauges and formats times.
    fn gather(&mut self) -> DeferredStatus {
        let mut status = Status::from(&self.core.snapshot());
        status.version = env!("CARGO_PKG_VERSION").to_owned();
        status.pid = std::process::id();
        status.instance.clone_from(&self.run.instance);
        status.uptime_seconds = (self.now - self.run.started).as_secs();
        status.meters = self.meters_status();
        status.longest_turn_microseconds =
            u64::try_from(self.observation.longest_turn.as_micros()).unwrap_or(u64::MAX);
        status.accepted_per_second = self.observation.seconds.whole(self.now);
        self.follow_conditions(true);
        self.note_socket_files();
        self.note_advice_peers();
        status.kept_sockets = self.kept_sockets();
        status.draining = self.host_drain_status();
        self.agent_status(&mut status);
        status.line = self.line_status();
        self.steer_status(&mut status);
        for pool in &mut status.pools {
            let Some(processes) = &mut pool.processes else { continue };
            let Some(id) = self.core.pool_named(&pool.name) else { continue };
            (processes.ready_checks_passed, processes.ready_checks_failed) = self.rolls.checks(id);
            processes.restart_needed = self.needs_restart(id);
            if let Some(roll) = &mut processes.roll {
                self.roll_status(id, roll);
            }
        }
        for (id, listener) in self.core.listeners().zip(&mut status.listeners) {
            listener.state = self.listener_state(id).to_owned();
            if let Some(headers) = &mut listener.proxy_headers {
                headers.from = self.trusted_proxies(id);
            }
        }
        let (boards, faults) = (self.boards(), self.observation.faults.clone());
        DeferredStatus(Box::new(move || {
            status.host = rustix::system::uname().nodename().to_string_lossy().into_owned();
            show_gauges(boards, &mut status);
            status.faults = faults.status();
            status
        }))
    }

    fn trusted_proxies(&self, id: ListenerId) -> Vec<String> {
        let resources = self.listeners.resources(id);
        resources.map_or_else(Vec::new, |resources| resources.trusted_proxies())
    }

    /// Asks the side thread to start a process, with a token that identifies it when it joins. In a
    /// steered pool it is to listen at `address`, or inherits `listeners`.
    pub(super) fn spawn_at(
        &mut self,
        process: ProcessId,
        address: Option<SocketAddr>,
        listeners: Vec<(String, OwnedFd)>,
    ) {
        let spawn = self.spawn_of(process).cloned();
        let (Some(spawn), Some(settings)) = (spawn, self.core.pool_settings(process.pool)) else {
            return;
        };
        let mut token = [0; 16];
        if rustix::rand::getrandom(&mut token, GetRandomFlags::empty()).is_err() {
            self.core.spawned(self.now, process, false);
            return;
        }
        let token = Token(token);
        self.workers.tokens.insert(token, process);
        let dispatch_socket = match &self.config.dispatch_socket.source {
            UnixSource::Path(path) => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
            UnixSource::Systemd(_) => {
                self.endpoints.dispatch_address.trim_start_matches("unix:").to_owned().into()
            }
        };
        let request = SpawnRequest {
            process,
            pool: settings.name.clone(),
            name: format!("{}-{}", settings.name, process.place + 1),
            generation: self.core.generation_of(process).map_or(1, |generation| generation.0),
            command: spawn.command,
            environment: spawn.environment,
            directory: spawn.directory,
            setup: spawn.setup,
            on_dispatcher_loss: spawn.on_dispatcher_loss,
            token,
            dispatch_socket,
            descriptors: self.run.descriptors,
            patience: settings.supervision.stop_timeout,
            max_memory: spawn.max_memory,
            fork: spawn.fork.then_some(settings.supervision.start_timeout),
            address,
            listeners: Listeners::new(listeners),
        };
        if self.side.spawner.spawn(request).is_err() {
            self.core.spawned(self.now, process, false);
        }
        // A roll may have come further.
        self.record_deploys(process.pool);
    }

    fn note(&mut self, report: Report) {
        match report {
            Report::Spawned { process, pid } => {
                let pool = Some(process.pool);
                if let Some(suppressed) =
                    self.observation.allow(self.now, pool, Cause::Process(ProcessEvent::Started))
                {
                    let process = self.process(process);
                    log::info!("event=process_started {process} pid={pid} suppressed={suppressed}");
                }
                self.core.spawned(self.now, process, true);
                self.steered_process_runs(process, pid);
            }
            Report::SpawnFailed { process, error } => {
                self.steered_process_ended(process);
                self.not_started(process, &error);
            }
            Report::Exited { process, pid, status_text } => {
                // A crash is a fault, even if the process was told to end.
                let well = ENDED_WELL.contains(&status_text.as_str()) || status_text == UNKNOWN;
                let wanted = self.run.stop_deadline.is_none() && self.core.wants_process(process);
                let ordered = self.observation.expected_ends.ended(process, pid) || !wanted;
                let pool = Some(process.pool);
                if let Some(suppressed) =
                    self.observation.allow(self.now, pool, Cause::Process(ProcessEvent::Ended))
                {
                    log::log!(
                        if ordered && well { log::Level::Info } else { log::Level::Warn },
                        "event=process_ended {} pid={pid} status={status_text} suppressed={suppressed}",
                        self.process(process),
                        status_text = quoted(&status_text)
                    );
                    if !(ordered && well) {
                        let subject = self.process_name(process);
                        let text = || format!("process {pid} ended: {status_text}");
                        self.fault(FaultKind::ProcessEnded, &subject, text);
                    }
                }
                self.workers.forget_tokens(process);
                self.side.spawner.forget(process);
                self.rolls.note(process, &status_text);
                self.steered_process_ended(process);
                self.core.exited(self.now, process);
            }
            Report::ExceedsMemory { process, bytes } => {
                log::info!("event=process_exceeds_memory {} bytes={bytes}", self.process(process));
                self.core.exceeds_memory(self.now, process);
            }
            Report::Checked { process, result } => self.checked(process, result),
            Report::StopKind(kind) => self.stop_kind(kind),
            // Only the end of a stop produces this report, and waits for it elsewhere.
            Report::Stopped { .. } => {}
        }
    }

    /// A process could not be started.
    pub(super) fn not_started(&mut self, process: ProcessId, error: &str) {
        let pool = Some(process.pool);
        if let Some(suppressed) =
            self.observation.allow(self.now, pool, Cause::Process(ProcessEvent::NotStarted))
        {
            log::error!(
                "event=process_not_started {} error={error} suppressed={suppressed}",
                self.process(process),
                error = quoted(error)
            );
            let subject = self.process_name(process);
            let text = || format!("could not start: {error}");
            self.fault(FaultKind::ProcessNotStarted, &subject, text);
        }
        self.workers.forget_tokens(process);
        self.side.spawner.forget(process);
        self.rolls.note(process, error);
        self.core.spawned(self.now, process, false);
    }

    fn process(&self, process: ProcessId) -> String {
        let spawn = self.spawn_of(process);
        let program = spawn.and_then(|spawn| spawn.command.first()).map_or("", String::as_str);
        format!(
            "pool={} process={} program={}",
            self.core.pool_name(process.pool),
            process.place + 1,
            value(program)
        )
    }
}
