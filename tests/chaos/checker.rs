//! The checker: compares the results of clients, the connections that workers took, the
//! dispatcher's counts and the faults.

use std::collections::BTreeMap;
use std::path::Path;

use super::client::{End, Story, Told};
use super::nemesis::{Deed, Record, What};
use super::protocol::{SPAWNED, address_of, id_at, number_of};

/// The end of a process and the end of its connections as clients see it lie less than this apart,
/// in microseconds.
const AT_MOST: u64 = 15_000_000;

/// The verdict on one run.
#[derive(Debug, Default)]
pub struct Verdict {
    pub served: u64,
    pub abandoned: u64,
    /// Answered, then cut because the worker was killed.
    pub cut: u64,
    /// Unanswered, by the reason that allows it.
    pub lost: BTreeMap<&'static str, u64>,
    /// Results without a reason, with their connections.
    pub problems: Vec<(Option<u32>, String)>,
    /// Events of the dispatcher's log, and the sums of their numbers.
    pub told: BTreeMap<&'static str, u64>,
}

/// Which worker took which connection.
struct Taken {
    /// By id: the number of the worker, plus one.
    by: Vec<u32>,
}

pub struct Evidence<'a> {
    pub told: &'a Told,
    pub connections: u32,
    pub records: &'a [Record],
    pub deeds: &'a [Deed],
    /// When processes of the dispatcher were killed, by number.
    pub killed: &'a BTreeMap<usize, u64>,
    pub directory: &'a Path,
}

/// How long a killed process may remain, in microseconds.
const DYING: u64 = 200_000;

const TAKEN_BY_KILLED: &str = "its worker was killed after taking it";
const UNWRITTEN: &str = "its worker was killed between taking it and writing that down";
const DISPATCHER_KILLED: &str = "the dispatcher was killed: accepted, and queued or not yet sent";
const BOTH_KILLED: &str = "the dispatcher was killed, then the worker it had been sent to";

impl Evidence<'_> {
    pub fn judge(&self) -> Verdict {
        let mut verdict = Verdict { abandoned: self.told.abandoned, ..Verdict::default() };
        let log = std::fs::read(self.directory.join("log")).unwrap();
        let log = String::from_utf8_lossy(&log);
        let taken = self.read_taken(&mut verdict);
        let closed = read_log(&log, &mut verdict);
        for (id, &served) in (0..).zip(&self.told.served) {
            if served > 0 {
                verdict.served += 1;
                if taken.by.get(id as usize) != Some(&served) {
                    let problem =
                        format!("answered by worker {}, which did not take it", served - 1);
                    verdict.problems.push((Some(id), problem));
                }
            }
        }
        // At most two threads of a worker take connections, so no more can be taken and not written
        // down.
        let mut unwritten = BTreeMap::new();
        for story in &self.told.broken {
            match self.excuse(story, &taken, &closed, &mut unwritten) {
                Ok(None) => verdict.cut += 1,
                Ok(Some(reason)) => *verdict.lost.entry(reason).or_default() += 1,
                Err(problem) => verdict.problems.push((Some(story.id), problem)),
            }
        }
        verdict
    }

    fn read_taken(&self, verdict: &mut Verdict) -> Taken {
        let mut by = vec![0; self.connections as usize];
        let text = std::fs::read_to_string(self.directory.join("taken")).unwrap();
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let place = match words[..] {
                [name, id, _] => number_of(name).zip(id.parse::<u32>().ok()),
                _ => None,
            };
            let Some((worker, id)) = place.filter(|&(_, id)| id < self.connections) else {
                verdict.problems.push((None, format!("no such connection was made: {line:?}")));
                continue;
            };
            let before = std::mem::replace(&mut by[id as usize], worker + 1);
            if before > 0 {
                let problem = format!("taken twice, by worker {} and worker {worker}", before - 1);
                verdict.problems.push((Some(id), problem));
            }
        }
        Taken { by }
    }

    /// The reason that allows this end of a connection; `None` if it was answered before.
    fn excuse(
        &self,
        story: &Story,
        taken: &Taken,
        closed: &BTreeMap<u32, &'static str>,
        unwritten: &mut BTreeMap<usize, u32>,
    ) -> Result<Option<&'static str>, String> {
        let taker = taken.by[story.id as usize].checked_sub(1).map(|worker| worker as usize);
        let killed = |worker: usize| {
            let own = self.records.get(worker).and_then(|record| record.killed);
            own.or(self.killed.get(&worker).copied()).is_some_and(|at| at <= story.ended)
        };
        match &story.end {
            End::Served | End::Abandoned => Ok(None),
            End::Wrong(what) | End::Refused(what) => Err(what.clone()),
            End::Cut(how) => match (taker, story.answered_by) {
                (Some(taker), Some(answered)) if taker == answered as usize && killed(taker) => {
                    Ok(None)
                }
                _ => Err(format!("broken off ({how}) by taker {taker:?}, which was not killed")),
            },
            End::Lost(how) => {
                if let Some(taker) = taker {
                    return if killed(taker) {
                        Ok(Some(TAKEN_BY_KILLED))
                    } else {
                        Err(format!("lost ({how}) by worker {taker}, which was not killed"))
                    };
                }
                if let Some(reason) = closed.get(&story.id) {
                    return Ok(Some(reason));
                }
                let during = |deed: &&Deed| story.began <= deed.at && deed.at <= story.ended;
                let at_the_end = |deed: &&Deed| story.ended - deed.at < AT_MOST;
                let of =
                    |what| self.deeds.iter().filter(move |deed| deed.what == what).filter(during);
                // A process that was killed a moment ago may still be ending, with its listener.
                let dies = |deed: &&Deed| {
                    deed.what == What::DispatcherKill
                        && deed.at + DYING >= story.began
                        && deed.at <= story.ended
                };
                if self.deeds.iter().filter(dies).any(|deed| at_the_end(&deed)) {
                    return Ok(Some(DISPATCHER_KILLED));
                }
                let mut kills = of(What::Kill).filter(at_the_end);
                if of(What::DispatcherKill).next().is_some() && kills.clone().next().is_some() {
                    return Ok(Some(BOTH_KILLED));
                }
                let suspect = kills.find_map(|deed| {
                    deed.worker
                        .filter(|worker| unwritten.get(worker).is_none_or(|&count| count < 2))
                });
                if let Some(worker) = suspect {
                    *unwritten.entry(worker).or_default() += 1;
                    return Ok(Some(UNWRITTEN));
                }
                Err(format!("lost ({how}) for no reason"))
            }
        }
    }

    /// Everything known about one connection, in order.
    pub fn history(&self, id: u32) -> String {
        let mut lines: Vec<(u64, String)> = Vec::new();
        let (mut from, mut to) = (u64::MAX, 0);
        if let Some(story) = self.told.broken.iter().find(|story| story.id == id) {
            (from, to) = (story.began, story.ended);
            lines.push((story.began, format!("client: opens {:?}", story.kind)));
            let by = story
                .answered_by
                .map_or("no worker".to_owned(), |worker| self.name(worker as usize));
            lines.push((story.ended, format!("client: {:?}, answered by {by}", story.end)));
        }
        let taken = std::fs::read_to_string(self.directory.join("taken")).unwrap();
        for line in taken.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            if let [name, of, at] = words[..]
                && of == id.to_string()
            {
                let at = at.parse().unwrap_or(0);
                (from, to) = (from.min(at), to.max(at));
                lines.push((at, format!("worker {name}: takes it")));
            }
        }
        let margin = 1_000_000;
        for deed in self.deeds {
            if deed.at + margin >= from && deed.at <= to.saturating_add(margin) {
                let worker = deed.worker.map_or(String::new(), |worker| self.name(worker));
                lines.push((deed.at, format!("nemesis: {:?} {worker}", deed.what)));
            }
        }
        lines.sort();
        let start = lines.first().map_or(0, |line| line.0);
        let mut text = format!("--- connection {id}, from {}:\n", address_of(id));
        for (at, line) in lines {
            text.push_str(&format!("{:>12} µs  {line}\n", at - start));
        }
        let log = std::fs::read(self.directory.join("log")).unwrap();
        let peer = format!("{}:", address_of(id));
        for line in String::from_utf8_lossy(&log).lines().filter(|line| line.contains(&peer)) {
            text.push_str(&format!("  dispatcher: {line}\n"));
        }
        text
    }

    fn name(&self, worker: usize) -> String {
        let spawned = || match worker.checked_sub(SPAWNED as usize) {
            Some(pid) => format!("x{pid}"),
            None => "?".to_owned(),
        };
        self.records
            .get(worker)
            .map_or_else(spawned, |record| format!("{} (pid {})", record.name, record.pid))
    }
}

/// The closed connections in the log by reason, and the number of each event.
fn read_log(log: &str, verdict: &mut Verdict) -> BTreeMap<u32, &'static str> {
    let mut closed = BTreeMap::new();
    let value = |line: &str, key: &str| -> Option<String> {
        let (_, rest) = line.split_once(&format!(" {key}="))?;
        Some(rest.split(' ').next().unwrap_or(rest).to_owned())
    };
    for line in log.lines() {
        let Some((_, rest)) = line.split_once("event=") else {
            if line.contains("panicked") {
                verdict.problems.push((None, format!("the dispatcher panicked: {line}")));
            }
            continue;
        };
        let number = |key| value(line, key).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        let mut add = |what: &'static str, count: u64| {
            *verdict.told.entry(what).or_default() += count;
        };
        match rest.split([' ', '\n']).next().unwrap_or_default() {
            "client_closed" => {
                let peer = value(line, "peer").and_then(|peer| peer.parse().ok());
                let id = match peer {
                    Some(std::net::SocketAddr::V4(peer)) => id_at(*peer.ip()),
                    _ => None,
                };
                let reason = match value(line, "reason").as_deref() {
                    Some("no_worker") => "the dispatcher closed it: no_worker",
                    Some("shutdown") => "the dispatcher closed it: shutdown",
                    // The client would not have waited for an answer.
                    _ => continue,
                };
                closed.extend(id.map(|id| (id, reason)));
            }
            "worker_gone" => add("resent after a worker's end", number("resent")),
            "worker_goodbye" => add("resent after a goodbye", number("resent")),
            "worker_suspect" => {
                add("times a worker was suspect", 1);
                add("revoked from suspects", number("revoked"));
            }
            "worker_trusted" => add("times a worker was trusted again", 1),
            "connection_lost_by_worker" => {
                add("lost by workers without descriptors, and resent", 1)
            }
            "channel_full" => add("times a channel was full", 1),
            "back_pressure" => add("times of back-pressure", 1),
            "no_worker" => add("times without a worker", 1),
            "reloaded" => add("reloads", 1),
            "worker_draining" => add("drains", 1),
            "worker_resumed" => add("resumptions", 1),
            "pool_scaled" => add("times a pool was scaled", 1),
            "listener_closed" => add("listeners taken out", 1),
            "process_started" => add("processes of the dispatcher's own", 1),
            "worker_refused" => add("workers refused", 1),
            "slow_turn" => add("turns longer than any before, and than 100 ms", 1),
            event @ ("worker_expelled"
            | "counter_clamped"
            | "worker_broke_protocol"
            | "out_of_resources"
            | "accept_paused")
                // A hostile worker does this on purpose.
                if !line.contains(" name=hostile ") =>
            {
                verdict.problems.push((None, format!("the dispatcher said {event}: {line}")));
            }
            _ => {}
        }
    }
    closed
}
