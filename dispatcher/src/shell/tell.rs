//! Events of the core as log lines: `event=NAME key=value …`. Writing never waits; see `logger`.

use humantime::format_duration;

use worker_sdk::scoreboard::gauge::GaugeName;

use super::limit::Limit;
use super::{Limits, Shell};
use crate::pool::{Departure, Event, WorkerId};

impl Limits {
    fn of(&mut self, event: &Event) -> (&'static str, &mut Limit) {
        let (name, at) = match event {
            Event::Joined { .. } => ("worker_joined", 0),
            Event::Goodbye { .. } => ("worker_goodbye", 1),
            Event::Gone { .. } => ("worker_gone", 2),
            Event::Suspect { .. } => ("worker_suspect", 3),
            Event::Trusted { .. } => ("worker_trusted", 4),
            Event::Lost { .. } => ("connection_lost_by_worker", 5),
            Event::ChannelFull { .. } => ("channel_full", 6),
            Event::Clamped { .. } => ("counter_clamped", 7),
            Event::NoUsableWorker { .. } => ("no_worker", 8),
            Event::Refusing { .. } => ("refusing", 9),
            Event::BackPressure { .. } => ("back_pressure", 10),
            Event::Relieved { .. } => ("back_pressure_over", 11),
            Event::Choked { .. } => ("choked", 12),
            Event::Restarting { .. } => ("process_restarting", 13),
            Event::Draining { .. } => ("worker_draining", 14),
            Event::DrainOver { .. } => ("drain_over", 16),
            Event::Resumed { .. } => ("worker_resumed", 15),
            Event::BadGauge { .. } => ("gauge_impossible", 16),
        };
        (name, &mut self.events[at])
    }
}

impl Shell {
    /// Writes a line, unless this kind has had its share of the second: workers can cause most of these as often as
    /// they like.
    pub(super) fn tell(&mut self, event: &Event) {
        let (kind, limit) = self.limits.of(event);
        match limit.allow(self.now) {
            None => return,
            Some(0) => {}
            Some(count) => log::warn!("event=lines_left_out kind={kind} count={count}"),
        }
        self.write(event);
        self.note_fault(event);
    }

    fn write(&self, event: &Event) {
        match event {
            Event::Joined { worker, live } => {
                log::info!("event=worker_joined {} live={live}", self.worker(*worker));
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
                    Departure::Disconnected => log::warn!(
                        "event=worker_gone {worker} why=disconnected resent={resent} live={live}"
                    ),
                    Departure::Died => {
                        log::warn!(
                            "event=worker_gone {worker} why=died resent={resent} live={live}"
                        );
                    }
                    Departure::Expelled(reason) => log::warn!(
                        "event=worker_gone {worker} why=expelled reason=\"{reason}\" resent={resent} live={live}"
                    ),
                }
            }
            Event::Suspect { worker, revoked, waited } => log::warn!(
                "event=worker_suspect {} revoked={revoked} waited={}",
                self.worker(*worker),
                format_duration(*waited)
            ),
            Event::Draining { worker, live, deadline } => log::info!(
                "event=worker_draining {} live={live} deadline={}",
                self.worker(*worker),
                deadline.map_or("none".to_owned(), |wait| format_duration(wait).to_string())
            ),
            Event::DrainOver { worker, resent, live, told: true } => {
                log::info!("event=drain_over {} resent={resent} ended={live}", self.worker(*worker))
            }
            Event::DrainOver { worker, resent, live, told: false } => log::warn!(
                "event=drain_over {} resent={resent} left={live} \
                 hint=\"the SDK it was built with cannot be told to end them: restart it\"",
                self.worker(*worker)
            ),
            Event::Resumed { worker } => {
                log::info!("event=worker_resumed {}", self.worker(*worker));
            }
            Event::Trusted { worker, after } => log::info!(
                "event=worker_trusted {} after={}",
                self.worker(*worker),
                format_duration(*after)
            ),
            Event::Lost { worker } => log::warn!(
                "event=connection_lost_by_worker {} hint=\"is it at its file descriptor limit?\"",
                self.worker(*worker)
            ),
            Event::ChannelFull { worker } => {
                log::warn!("event=channel_full {}", self.worker(*worker));
            }
            Event::Clamped { worker, what, said, used } => log::warn!(
                "event=counter_clamped {} counter=\"{what}\" said={said} used={used}",
                self.worker(*worker)
            ),
            Event::BadGauge { worker, gauge, problem } => log::warn!(
                "event=gauge_impossible {} gauge={} problem=\"{}\"",
                self.worker(*worker),
                gauge.as_ref().map_or("-", GaugeName::as_str),
                problem.text()
            ),
            Event::NoUsableWorker { pool } => {
                log::warn!("event=no_worker pool={} clients=wait", self.core.pool_name(*pool))
            }
            Event::Refusing { pool, closed } => log::error!(
                "event=refusing pool={} reason=\"no worker for wait_for_worker\" closed={closed}",
                self.core.pool_name(*pool)
            ),
            Event::BackPressure { pool } => log::warn!(
                "event=back_pressure pool={} reason=\"every worker is full or suspect\" clients=wait",
                self.core.pool_name(*pool)
            ),
            Event::Relieved { pool } => {
                log::info!("event=back_pressure_over pool={}", self.core.pool_name(*pool));
            }
            Event::Choked { pause } => log::warn!(
                "event=choked reason=\"out of descriptors or memory\" pause={}",
                format_duration(*pause)
            ),
            Event::Restarting { process, delay } => log::warn!(
                "event=process_restarting pool={} process={} delay={}",
                self.core.pool_name(process.pool),
                process.number,
                format_duration(*delay)
            ),
        }
    }

    pub(super) fn worker(&self, id: WorkerId) -> String {
        let pool = self.core.pool_of_worker(id).map_or("", |pool| self.core.pool_name(pool));
        let pid = self.core.worker_pid(id).unwrap_or_default();
        format!("worker={id} pool={pool} name={} pid={pid}", self.core.worker_name(id))
    }
}
