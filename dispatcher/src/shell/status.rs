//! The side thread's requests and reports: answering the status, starting processes, noting their ends.

use rustix::rand::GetRandomFlags;
use worker_sdk::wire::Token;

use super::Shell;
use crate::admin::Request;
use crate::config::UnixSource;
use crate::pool::ProcessId;
use crate::spawner::{Report, SpawnRequest};
use crate::status::Status;

/// Most messages of the side thread handled in one turn; it wakes us again for the rest.
const MESSAGES_PER_TURN: usize = 256;

impl Shell {
    pub(super) fn handle_side(&mut self) {
        let mut count = 0;
        while count < MESSAGES_PER_TURN {
            let Ok(report) = self.side.reports.try_recv() else { break };
            self.note(report);
            count += 1;
        }
        while count < MESSAGES_PER_TURN {
            let Ok(request) = self.side.requests.try_recv() else { break };
            match request {
                Request::Status(answer) => {
                    // Whoever asked may have gone; that is no concern of ours.
                    let _ = answer.send(self.status());
                }
                Request::History { pool, after, answer } => {
                    let _ = answer.send(self.history(&pool, after));
                }
                Request::Explain { pool, peer, answer } => {
                    let _ = answer.send(self.explain(&pool, peer));
                }
                Request::InForce(answer) => {
                    let _ = answer.send(Box::new(self.in_force()));
                }
                Request::Reload { plan, answer } => {
                    let _ = answer.send(self.reload(*plan));
                }
                Request::Command { command, answer } => {
                    let _ = answer.send(self.command(command));
                }
            }
            count += 1;
        }
        if count == MESSAGES_PER_TURN {
            self.side_ready = true;
        }
    }

    fn status(&mut self) -> Status {
        let mut status = self.core.status();
        self.show_gauges(&mut status);
        status.version = env!("CARGO_PKG_VERSION").to_owned();
        status.pid = std::process::id();
        status.uptime_seconds = (self.now - self.started).as_secs();
        status.meters = self.meters_status();
        status.longest_turn_microseconds =
            u64::try_from(self.longest_turn.as_micros()).unwrap_or(u64::MAX);
        status.accepted_per_second = self.seconds.whole(self.now);
        status.faults = self.faults.status();
        for (id, listener) in self.core.listeners().zip(&mut status.listeners) {
            listener.state = self.listener_state(id).to_owned();
        }
        status
    }

    /// Has a process started by the side thread, with a token by which it will be known.
    pub(super) fn spawn(&mut self, process: ProcessId) {
        let pool = self.config.pools.get(usize::from(process.pool.0));
        let Some((pool, spawn)) = pool.and_then(|pool| Some((pool, pool.spawn.as_ref()?))) else {
            return;
        };
        let mut token = [0; 16];
        if rustix::rand::getrandom(&mut token, GetRandomFlags::empty()).is_err() {
            self.core.spawned(self.now, process, false);
            return;
        }
        let token = Token(token);
        self.tokens.retain(|_, other| *other != process);
        self.tokens.insert(token, process);
        let dispatch_socket = match &self.config.dispatch_socket.source {
            UnixSource::Path(path) => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
            UnixSource::Systemd(_) => {
                self.dispatch.address.trim_start_matches("unix:").to_owned().into()
            }
        };
        let request = SpawnRequest {
            process,
            pool: pool.settings.name.clone(),
            name: format!("{}-{}", pool.settings.name, process.number + 1),
            command: spawn.command.clone(),
            environment: spawn.environment.clone(),
            directory: spawn.directory.clone(),
            token,
            dispatch_socket,
            descriptors: self.descriptors,
        };
        if self.side.spawner.spawn(request).is_err() {
            self.core.spawned(self.now, process, false);
        }
    }

    fn note(&mut self, report: Report) {
        match report {
            Report::Spawned { process, pid } => {
                log::info!("event=process_started {} pid={pid}", self.process(process));
                self.core.spawned(self.now, process, true);
            }
            Report::SpawnFailed { process, error } => {
                log::error!(
                    "event=process_not_started {} error=\"{error}\"",
                    self.process(process)
                );
                let subject = self.process_name(process);
                self.fault("process_not_started", &subject, || format!("could not start: {error}"));
                self.core.spawned(self.now, process, false);
            }
            Report::Exited { process, pid, status_text } => {
                log::warn!(
                    "event=process_ended {} pid={pid} status=\"{status_text}\"",
                    self.process(process)
                );
                let subject = self.process_name(process);
                self.fault("process_ended", &subject, || {
                    format!("process {pid} ended: {status_text}")
                });
                self.core.exited(self.now, process);
            }
            // Only ever the answer to the end of a stop, which waits for it elsewhere.
            Report::Stopped { .. } => {}
        }
    }

    fn process(&self, process: ProcessId) -> String {
        let spawn =
            self.config.pools.get(usize::from(process.pool.0)).and_then(|p| p.spawn.as_ref());
        let program = spawn.and_then(|spawn| spawn.command.first()).map_or("", String::as_str);
        format!(
            "pool={} process={} program={program}",
            self.core.pool_name(process.pool),
            process.number + 1
        )
    }
}
