//! Writes the events of the core as log lines: `event=NAME key=value …`. Writing never blocks; see
//! `logger`.

use std::time::Duration;

use dispatch_protocol::ClientAddr;

use dispatch_protocol::scoreboard::gauge::GaugeName;

use super::EventLoop;
use super::event_kind::EventKind;
use super::rate_limit::Cause;
use crate::background::logger::{quoted, value};
use dispatcher_core::{
    CloseReason, ConnId, Departure, EndReason, Event, ListenerId, PoolId, WorkerId,
};

impl EventLoop {
    /// Writes a line, unless the rate limit of its kind is exceeded: workers can cause most events
    /// as often as they like.
    pub(super) fn write_event(&mut self, event: &Event) {
        self.note_roll(event);
        let ordered = self.note_order(event);
        let kind = EventKind::of(event);
        let pool = self.pool_of_event(event);
        match self.observation.allow(self.now, pool, Cause::Event(kind)) {
            None => return,
            Some(0) => {}
            Some(count) => self.write_suppressed_one(kind.name(), pool, count),
        }
        self.write(event, ordered);
        self.note_fault(event, ordered);
    }

    /// Reports suppressed lines that no later line has reported. A flood that continues reports
    /// them itself.
    pub(super) fn write_suppressed(&mut self) {
        for unreported in self.observation.rate_limits.unreported(self.now) {
            self.write_suppressed_one(unreported.kind, unreported.pool, unreported.count);
        }
    }

    fn write_suppressed_one(&self, kind: &str, pool: Option<PoolId>, count: u64) {
        let pool = pool.map_or("-", |pool| self.core.pool_name(pool));
        log::warn!("event=lines_suppressed kind={kind} pool={pool} count={count}");
    }

    fn pool_of_event(&self, event: &Event) -> Option<PoolId> {
        match *event {
            Event::Joined { worker, .. }
            | Event::Goodbye { worker, .. }
            | Event::Gone { worker, .. }
            | Event::Suspect { worker, .. }
            | Event::Draining { worker, .. }
            | Event::DrainOver { worker, .. }
            | Event::Resumed { worker }
            | Event::Paused { worker, .. }
            | Event::Updated { worker, .. }
            | Event::Trusted { worker, .. }
            | Event::Lost { worker }
            | Event::ChannelFull { worker }
            | Event::Clamped { worker, .. }
            | Event::BadGauge { worker, .. } => self.core.pool_of_worker(worker),
            Event::NoUsableWorker { pool }
            | Event::Refusing { pool, .. }
            | Event::StillRefusing { pool, .. }
            | Event::Served { pool }
            | Event::BackPressure { pool }
            | Event::Relieved { pool }
            | Event::CrashLoopOver { pool }
            | Event::Rolled { pool, .. } => Some(pool),
            Event::Restarting { process, .. }
            | Event::Replacing { process, .. }
            | Event::ProcessStopped { process, .. }
            | Event::CrashLoop { process, .. }
            | Event::RollStopped { process, .. } => Some(process.pool),
            Event::OutOfResources { .. } | Event::HostDraining { .. } | Event::HostResumed => None,
        }
    }

    /// An end that was `ordered` is logged at a lower level.
    fn write(&self, event: &Event, ordered: bool) {
        match event {
            Event::Joined { worker, live } => {
                let kind = if self.lines.has(*worker) { " kind=line" } else { "" };
                log::info!("event=worker_joined {} live={live}{kind}", self.worker(*worker));
            }
            Event::Goodbye { worker, resent, live } => log::info!(
                "event=worker_goodbye {} resent={resent} live={live}",
                self.worker(*worker)
            ),
            Event::Gone { worker, why, resent, live } => {
                let worker = self.worker(*worker);
                match why {
                    Departure::Disconnected if *live == 0 && *resent == 0 => {
                        log::info!("event=worker_gone {worker} why=disconnected resent=0 live=0");
                    }
                    Departure::Released => {
                        log::info!(
                            "event=worker_gone {worker} why=released resent={resent} live={live}"
                        );
                    }
                    Departure::Disconnected | Departure::Died if ordered => log::info!(
                        "event=worker_gone {worker} why={} resent={resent} live={live}",
                        if *why == Departure::Died { "died" } else { "disconnected" }
                    ),
                    Departure::Disconnected => log::warn!(
                        "event=worker_gone {worker} why=disconnected resent={resent} live={live}"
                    ),
                    Departure::Died => {
                        log::warn!(
                            "event=worker_gone {worker} why=died resent={resent} live={live}"
                        );
                    }
                    Departure::Expelled(reason) => log::warn!(
                        "event=worker_gone {worker} why=expelled reason={reason} resent={resent} live={live}",
                        reason = quoted(&reason)
                    ),
                }
            }
            Event::Suspect { worker, revoked, waited } => log::warn!(
                "event=worker_suspect {} revoked={revoked} waited={}",
                self.worker(*worker),
                span(*waited)
            ),
            Event::Draining { worker, live, deadline } => log::info!(
                "event=worker_draining {} live={live} deadline={}",
                self.worker(*worker),
                deadline.map_or("none".to_owned(), span)
            ),
            Event::DrainOver { worker, resent, live, notified: true } => {
                log::info!("event=drain_over {} resent={resent} ended={live}", self.worker(*worker))
            }
            Event::DrainOver { worker, resent, live, notified: false } => {
                let why = match self.lines.has(*worker) {
                    true => "the line protocol has no notices",
                    false => "its SDK does not support notices",
                };
                log::warn!(
                    "event=drain_over {} resent={resent} left={live} hint={}",
                    self.worker(*worker),
                    quoted(&format!("{why}: restart the worker to end them"))
                );
            }
            Event::Resumed { worker } => {
                log::info!("event=worker_resumed {}", self.worker(*worker));
            }
            Event::HostDraining { live, after, deadline } => log::info!(
                "event=host_draining live={live} after={} deadline={}",
                span(*after),
                deadline.map_or("none".to_owned(), span)
            ),
            Event::HostResumed => log::info!("event=host_resumed"),
            Event::Paused { worker, resent, live } => {
                log::info!(
                    "event=worker_paused {} resent={resent} live={live}",
                    self.worker(*worker)
                );
            }
            Event::Updated { worker, weight, max, paused } => log::info!(
                "event=worker_updated {} weight={weight} max_connections={max} paused={paused}",
                self.worker(*worker)
            ),
            Event::Trusted { worker, after } => {
                log::info!("event=worker_trusted {} after={}", self.worker(*worker), span(*after))
            }
            Event::Lost { worker } => log::warn!(
                "event=connection_lost_by_worker {} hint=\"is it at its file descriptor limit?\"",
                self.worker(*worker)
            ),
            Event::ChannelFull { worker } => {
                log::warn!("event=channel_full {}", self.worker(*worker));
            }
            Event::Clamped { worker, what, said, used } => log::warn!(
                "event=counter_clamped {} counter={what} said={said} used={used}",
                self.worker(*worker),
                what = quoted(&what)
            ),
            Event::BadGauge { worker, gauge, problem } => log::warn!(
                "event=gauge_impossible {} gauge={} problem={}",
                self.worker(*worker),
                value(gauge.as_ref().map_or("-", GaugeName::as_str)),
                quoted(problem.text())
            ),
            Event::NoUsableWorker { pool } => {
                log::warn!("event=no_worker pool={} clients=wait", self.core.pool_name(*pool))
            }
            Event::Refusing { pool, closed, unserved } => log::error!(
                "event=refusing pool={} reason={} closed={closed}",
                self.core.pool_name(*pool),
                quoted(match unserved {
                    true => "no worker took a connection for wait_for_worker",
                    false => "no worker for wait_for_worker",
                })
            ),
            Event::StillRefusing { pool, unserved, since } => log::error!(
                "event=still_refusing pool={} reason={} since={}",
                self.core.pool_name(*pool),
                quoted(if *unserved { "no worker takes a connection" } else { "no worker" }),
                span(*since)
            ),
            Event::Served { pool } => {
                log::info!("event=served_again pool={}", self.core.pool_name(*pool));
            }
            Event::BackPressure { pool } => log::warn!(
                "event=back_pressure pool={} reason=\"every worker is full or suspect\" clients=wait",
                self.core.pool_name(*pool)
            ),
            Event::Relieved { pool } => {
                log::info!("event=back_pressure_over pool={}", self.core.pool_name(*pool));
            }
            Event::OutOfResources { pause } => log::warn!(
                "event=out_of_resources reason=\"out of descriptors or memory\" pause={}",
                span(*pause)
            ),
            Event::Restarting { process, delay } => log::warn!(
                "event=process_restarting pool={} process={} delay={}",
                self.core.pool_name(process.pool),
                process.place + 1,
                span(*delay)
            ),
            Event::Replacing { process, why } => log::info!(
                "event=process_replacing pool={} process={} reason={}",
                self.core.pool_name(process.pool),
                process.place + 1,
                why.name()
            ),
            Event::ProcessStopped { process, reason } => {
                let level = match reason {
                    EndReason::Late | EndReason::Hung | EndReason::NotReady => log::Level::Warn,
                    EndReason::Left | EndReason::Unwanted => log::Level::Info,
                };
                log::log!(
                    level,
                    "event=process_stopping pool={} process={} reason={}",
                    self.core.pool_name(process.pool),
                    process.place + 1,
                    quoted(stop_reason(*reason))
                );
            }
            Event::CrashLoop { process, failures } => log::error!(
                "event=crash_loop pool={} process={} failures={failures} \
                 hint=\"see the exit status and the output of the process; dispatcher restart {} \
                 tries again at once\"",
                self.core.pool_name(process.pool),
                process.place + 1,
                self.core.pool_name(process.pool)
            ),
            Event::CrashLoopOver { pool } => {
                log::info!("event=crash_loop_over pool={}", self.core.pool_name(*pool));
            }
            Event::RollStopped { process, .. } => {
                let name = self.core.pool_name(process.pool);
                log::error!(
                    "event=roll_stopped pool={name} process={} reason={} \
                     hint=\"dispatcher rollout status {name}\"",
                    process.place + 1,
                    quoted(&self.roll_reason(process.pool))
                );
            }
            Event::Rolled { pool, generation } => log::info!(
                "event=roll_done pool={} generation={}",
                self.core.pool_name(*pool),
                generation.0
            ),
        }
    }

    /// A connection was closed. Every close is logged at `debug`; access denials and clients turned
    /// away are also logged at a higher level, within the rate limit.
    pub(super) fn write_closed(
        &mut self,
        conn: ConnId,
        peer: &ClientAddr,
        listener: ListenerId,
        reason: CloseReason,
    ) {
        let pool = self.core.pool_of_listener(listener);
        let about = format_args!(
            "listener={} pool={} conn={conn} peer={peer} reason={}",
            self.core.listener_name(listener),
            pool.map_or("", |pool| self.core.pool_name(pool)),
            reason.name()
        );
        log::debug!("event=client_closed {about}");
        // The client closed the connection.
        if reason == CloseReason::ClientGone {
            return;
        }
        let limit = self.observation.allow(self.now, pool, Cause::Closed(reason));
        let Some(suppressed) = limit else { return };
        match reason {
            CloseReason::NoWorker | CloseReason::Shutdown | CloseReason::Unsendable => {
                log::info!("event=client_turned_away {about} suppressed={suppressed}");
            }
            _ => log::warn!("event=client_kept_out {about} suppressed={suppressed}"),
        }
    }

    /// An untaken connection of another worker goes to this worker.
    pub(super) fn write_resent(&mut self, to: WorkerId, conn: ConnId, peer: &ClientAddr) {
        let pool = self.core.pool_of_worker(to);
        if let Some(suppressed) = self.observation.allow(self.now, pool, Cause::Resent) {
            log::info!(
                "event=connection_resent conn={conn} peer={peer} {} suppressed={suppressed}",
                self.worker(to)
            );
        }
    }

    pub(super) fn worker(&self, id: WorkerId) -> String {
        let pool = self.core.pool_of_worker(id).map_or("", |pool| self.core.pool_name(pool));
        let pid = self.core.worker_pid(id).unwrap_or_default();
        format!("worker={id} pool={pool} name={} pid={pid}", value(self.core.worker_name(id)))
    }
}

/// Why a process is stopped, for the log and the faults.
pub(super) fn stop_reason(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Late => "its worker did not join within start_timeout",
        EndReason::Hung => "its worker was suspect for kill_hung_after",
        EndReason::Left => "it left and did not end by itself",
        EndReason::Unwanted => "it is not wanted any more",
        EndReason::NotReady => "it did not become ready",
    }
}

/// A duration as one word, such as `101.3ms`: a value with spaces would be several values.
pub(super) fn span(duration: Duration) -> String {
    let text = format!("{duration:.1?}");
    match text.split_once(".0") {
        Some((whole, unit)) => format!("{whole}{unit}"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_one_word() {
        let shown = [0, 999, 1_500, 101_027_026, 100_000_000, 10_000_000_000, 3_600_000_000_000]
            .map(|nanoseconds| span(Duration::from_nanos(nanoseconds)));
        assert_eq!(shown, ["0ns", "999ns", "1.5µs", "101ms", "100ms", "10s", "3600s"]);
    }
}
