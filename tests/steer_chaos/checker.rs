//! The checker: each connection was answered by one server, which had accepted it, or has a reason.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use test_support::chaos::tail;

use super::census::Quiet;
use super::client::{End, Kind, Story, Told};
use super::nemesis::{Deed, What};
use super::place::{PUBLICS, Run, SHARED, Server};
use super::protocol::{SPAWNED, now, number_of, source_of};

/// The end of a server and the end of its connections, as clients see it, lie less than this apart,
/// in microseconds.
const AT_MOST: u64 = 5_000_000;

/// How long a new state of the dispatcher may take to be that of the kernel, or a process to end.
const MOMENT: u64 = 1_000_000;

/// The verdict on one run.
#[derive(Debug, Default)]
pub struct Verdict {
    served: u64,
    /// By the reason that allows it.
    lost: BTreeMap<&'static str, u64>,
    /// Results without a reason, with their connections.
    pub problems: Vec<(Option<u32>, String)>,
    /// Events of the dispatcher's log.
    told: BTreeMap<String, u64>,
}

pub struct Evidence<'a> {
    pub run: &'a Run,
    pub told: &'a Told,
    pub connections: u32,
    pub servers: &'a [Server],
    pub deeds: &'a [Deed],
}

/// What the dispatcher's log says, by pool.
#[derive(Default)]
struct Log {
    /// A process was ended although it had connections, or may have had some.
    hung: Vec<(u64, String)>,
    /// The programs were attached after the listeners were opened.
    early: Vec<(u64, String)>,
    /// No worker was usable, or all were full.
    unserved: Vec<(u64, String)>,
}

/// Events that are no consequence of any fault.
const NEVER: [&str; 14] = [
    "steering_corrected",
    "steering_failed",
    "steering_not_possible",
    "steering_not_pinned",
    "steer_not_adopted",
    "steer_not_detached",
    "worker_not_steered",
    "worker_refused",
    "task_failed",
    "admin_thread_panicked",
    "crash_loop",
    "process_not_started",
    "process_not_watched",
    "out_of_resources",
];

impl Evidence<'_> {
    pub fn judge(&self) -> Verdict {
        let mut verdict = Verdict::default();
        let log = self.read_log(&mut verdict);
        let taken = self.read_taken(&mut verdict);
        for (id, &served) in (0..).zip(&self.told.served).filter(|(_, served)| **served > 0) {
            verdict.served += 1;
            if taken.get(id as usize) != Some(&served) {
                let problem = format!("answered by server {}, which did not accept it", served - 1);
                verdict.problems.push((Some(id), problem));
            }
        }
        let given_up = std::fs::read_to_string(self.run.directory.join("given-up")).unwrap();
        let given_up: BTreeSet<u32> = given_up.lines().filter_map(|id| id.parse().ok()).collect();
        for story in &self.told.broken {
            let taker = taken[story.id as usize].checked_sub(1).map(|number| number as usize);
            match self.excuse(story, taker, &log) {
                // The crowd waits for a client whose SYNs are dropped.
                Err(_) if given_up.contains(&story.id) && story.kind == Kind::Crowd => {
                    *verdict.lost.entry("it said nothing for too long").or_default() += 1;
                }
                Ok(reason) => *verdict.lost.entry(reason).or_default() += 1,
                Err(problem) => verdict.problems.push((Some(story.id), problem)),
            }
        }
        let reported = verdict.served
            + self.told.abandoned
            + self.told.refused
            + self.told.broken.len() as u64;
        if reported != u64::from(self.connections) {
            let problem = format!("{} connections, {reported} reported", self.connections);
            verdict.problems.push((None, problem));
        }
        verdict
    }

    /// By id: the number of the server that accepted it, plus one.
    fn read_taken(&self, verdict: &mut Verdict) -> Vec<u32> {
        let mut by = vec![0; self.connections as usize];
        let text = std::fs::read_to_string(self.run.directory.join("taken")).unwrap();
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let place = match words[..] {
                [name, id, _] => number_of(name).zip(id.parse::<u32>().ok()),
                _ => None,
            };
            // The dispatcher's own checks of new processes.
            if place.is_some_and(|(_, id)| id == u32::MAX) {
                continue;
            }
            let Some((server, id)) = place.filter(|&(server, id)| {
                id < self.connections && server < SPAWNED.min(self.servers.len() as u32)
            }) else {
                verdict.problems.push((None, format!("no such connection was made: {line:?}")));
                continue;
            };
            let before = std::mem::replace(&mut by[id as usize], server + 1);
            if before > 0 {
                let problem = format!("accepted twice, by {} and {server}", before - 1);
                verdict.problems.push((Some(id), problem));
            }
        }
        by
    }

    /// The reason that allows this end of a connection.
    fn excuse(
        &self,
        story: &Story,
        taker: Option<usize>,
        log: &Log,
    ) -> Result<&'static str, String> {
        let pool = PUBLICS.iter().find(|(address, _)| *address == story.to).map_or("", |it| it.1);
        // What was written down a moment after it happened is allowed for.
        let near = |at: u64, before: u64| {
            at <= story.ended + MOMENT / 2
                && at + before >= story.began.max(story.ended.saturating_sub(AT_MOST))
        };
        let deeds = || self.deeds.iter().filter(|deed| near(deed.at, MOMENT));
        let did = |what| deeds().any(|deed| deed.what == what);
        let of_pool = |list: &[(u64, String)], before: u64| {
            list.iter().any(|(at, of)| of == pool && near(*at, before))
        };
        let lost = match &story.end {
            End::Served | End::Abandoned => return Err("a good end is no broken one".to_owned()),
            End::Wrong(what) => return Err(what.clone()),
            End::Refused(how) => {
                if self.was_away(story) {
                    return Ok("refused: there was no dispatcher, or it began or ended");
                }
                if of_pool(&log.unserved, 15 * MOMENT) {
                    return Ok("refused: no worker was usable, or all were full");
                }
                format!("refused: {how}")
            }
            End::Cut(how) | End::Lost(how) => how.clone(),
        };
        if did(What::DispatcherTerm) {
            return Ok("the dispatcher was stopped, and ended its processes");
        }
        let ended = |deed: &Deed, number: usize| {
            let own = deed.server.as_ref().is_some_and(|server| server.number == number);
            // Servers with even numbers end after their last connection.
            own && (matches!(deed.what, What::Kill | What::Hangup)
                || (deed.what == What::Term && !number.is_multiple_of(2)))
        };
        if let Some(number) = taker {
            // It may have been told to end while it was stopped.
            let ended = self.deeds.iter().any(|deed| {
                // The nemesis sees a moment later that a dispatcher has ended.
                let late = if deed.what == What::Hangup { MOMENT / 2 } else { 0 };
                deed.at <= story.ended + late && ended(deed, number)
            });
            let pool_of = self.servers.get(number).map(|server| server.pool.as_str());
            return match ended {
                _ if pool_of != Some(pool) => Err(format!("accepted in another pool ({lost})")),
                true => Ok("its server was killed after accepting it"),
                false if of_pool(&log.hung, MOMENT) => Ok("its server hung, and was ended"),
                false => Err(format!("lost by server {number}, which was not killed ({lost})")),
            };
        }
        let listener_ended = deeds().any(|deed| {
            matches!(deed.what, What::Kill | What::Term | What::Hangup)
                && deed.server.as_ref().is_some_and(|server| server.pool == pool)
        });
        // What waits at a shared port goes to other servers.
        if listener_ended && pool != SHARED {
            return Ok("a server of its pool was killed, and with it its accept queue");
        }
        if of_pool(&log.early, MOMENT) {
            return Ok("it came before the programs of a new dispatcher were attached");
        }
        if pool == SHARED && (self.was_away(story) || of_pool(&log.unserved, 15 * MOMENT)) {
            return Ok("there was no dispatcher and no server that could take it");
        }
        if of_pool(&log.hung, MOMENT) && pool != SHARED {
            return Ok("a server of its pool hung, and was ended with its accept queue");
        }
        Err(format!("{lost}, for no reason"))
    }

    /// Whether there was no dispatcher at some time of this connection.
    fn was_away(&self, story: &Story) -> bool {
        let mut since = Some(0);
        for deed in self.deeds {
            match deed.what {
                What::DispatcherServes => {
                    if let Some(from) = since.take()
                        && from <= story.ended
                        && deed.at + MOMENT >= story.began
                    {
                        return true;
                    }
                }
                What::DispatcherKill
                | What::DispatcherLeaves
                | What::DispatcherTerm
                | What::TakeOver
                | What::DispatcherEnded => {
                    since.get_or_insert(deed.at);
                }
                _ => {}
            }
        }
        since.is_some_and(|from| from <= story.ended)
    }

    fn read_log(&self, verdict: &mut Verdict) -> Log {
        let mut log = Log::default();
        let bytes = std::fs::read(self.run.directory.join("log")).unwrap();
        // From the clock of the log to that of the test.
        let micros = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros();
        let ahead = i64::try_from(micros).unwrap() - i64::try_from(now()).unwrap();
        for line in String::from_utf8_lossy(&bytes).lines() {
            let Some((_, rest)) = line.split_once("event=") else {
                if line.contains("panicked") || line.contains("error:") {
                    verdict.problems.push((None, format!("the log says: {line}")));
                }
                continue;
            };
            let event = rest.split([' ', '\n']).next().unwrap_or_default();
            *verdict.told.entry(event.to_owned()).or_default() += 1;
            // The end of a listener that was open before is found out.
            let late = event == "steering_corrected" && !line.contains("connections of ");
            if NEVER.contains(&event) && !late {
                verdict.problems.push((None, format!("the dispatcher said {line}")));
            }
            let list = match event {
                "early_clients_reset" => &mut log.early,
                "process_stopping" if line.contains(" warn ") => &mut log.hung,
                "no_worker" | "refusing" | "still_refusing" | "back_pressure" => &mut log.unserved,
                _ => continue,
            };
            let time = line.split(' ').next().unwrap_or_default();
            let at = humantime::parse_rfc3339(time).ok();
            let at = at.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
            let at = at.and_then(|at| i64::try_from(at.as_micros()).ok());
            let pool = rest.split_once("pool=").map(|(_, rest)| rest);
            let pool = pool.and_then(|rest| rest.split(' ').next()).unwrap_or_default();
            match at.and_then(|at| u64::try_from(at - ahead).ok()) {
                Some(at) => list.push((at, pool.to_owned())),
                None => verdict.problems.push((None, format!("no time: {line}"))),
            }
        }
        log
    }

    /// Everything known about one connection, in order.
    fn history(&self, id: u32) -> String {
        let mut lines: Vec<(u64, String)> = Vec::new();
        let (mut from, mut to) = (u64::MAX, 0);
        if let Some(story) = self.told.broken.iter().find(|story| story.id == id) {
            (from, to) = (story.began, story.ended);
            let source = source_of(id, story.to.is_ipv6());
            lines.push((story.began, format!("client {source}: {:?} to {}", story.kind, story.to)));
            lines.push((story.ended, format!("client: {:?}", story.end)));
        }
        let taken = std::fs::read_to_string(self.run.directory.join("taken")).unwrap();
        for line in taken.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            if let [name, of, at] = words[..]
                && of == id.to_string()
            {
                let at = at.parse().unwrap_or(0);
                (from, to) = (from.min(at), to.max(at));
                lines.push((at, format!("server {name}: accepts it")));
            }
        }
        for deed in self.deeds {
            if deed.at + 2 * MOMENT >= from && deed.at <= to.saturating_add(MOMENT) {
                let of = deed.server.as_ref().map_or(String::new(), |server| format!("{server:?}"));
                lines.push((deed.at, format!("nemesis: {:?} {of}", deed.what)));
            }
        }
        lines.sort();
        let start = lines.first().map_or(0, |line| line.0);
        let mut text = format!("--- connection {id}:\n");
        for (at, line) in lines {
            text.push_str(&format!("{:>12} µs  {line}\n", at - start));
        }
        text
    }
}

pub fn report(
    verdict: &Verdict,
    evidence: &Evidence<'_>,
    quiets: &[Quiet],
    forged: u64,
    samples: u64,
) {
    let row = |name: &str, count: u64| println!("  {name:<66} {count:>9}");
    row("connections", evidence.connections.into());
    for (kind, count) in &evidence.told.kinds {
        row(&format!("- {kind:?}"), *count);
    }
    row("answered, whole", verdict.served);
    row("given up by the client itself", evidence.told.abandoned);
    row("lost or refused", verdict.lost.values().sum());
    verdict.lost.iter().for_each(|(reason, count)| row(&format!("- {reason}"), *count));
    row("servers started", evidence.servers.len() as u64);
    let count = |what| evidence.deeds.iter().filter(|deed| deed.what == what).count() as u64;
    for (what, name) in [
        (What::Kill, "servers ended by SIGKILL"),
        (What::Term, "servers ended by SIGTERM"),
        (What::Stop, "servers stopped for a while"),
        (What::Hangup, "stopped servers whose dispatcher ended: SIGHUP by the kernel"),
        (What::DispatcherStart, "dispatchers started"),
        (What::DispatcherKill, "dispatchers ended by SIGKILL"),
        (What::DispatcherLeaves, "dispatchers that left everything to the next one"),
        (What::DispatcherTerm, "dispatchers that ended everything"),
        (What::DispatcherStop, "dispatchers stopped for a while"),
        (What::TakeOver, "take-overs"),
        (What::TakeOverKill, "take-overs in which one of the two was killed"),
        (What::Reload, "other configurations"),
        (What::Command, "drains, resumptions, weights, scalings, restarts"),
        (What::Flood, "SYN floods"),
        (What::Cookies, "changes of SYN cookies and backlogs"),
    ] {
        row(name, count(what));
    }
    row("forged SYNs", forged);
    verdict.told.iter().for_each(|(event, count)| row(&format!("log: {event}"), *count));
    row("status samples that balanced", samples);
    row("quiet points at which all counts were those of the kernel", quiets.len() as u64);
    row("connections compared there", quiets.iter().map(|it| it.compared as u64).sum());
    if let (Some(first), Some(last)) = (quiets.first(), quiets.last()) {
        let fds = |quiet: &Quiet| quiet.used.fds.values().sum::<usize>();
        println!("  descriptors at first and last: {} and {}", fds(first), fds(last));
        println!("  memory: {} and {} KiB", first.used.memory, last.used.memory);
        println!("  handshakes remembered: {} and {}", first.remembered, last.remembered);
    }
    if verdict.problems.is_empty() {
        return println!("nothing was lost without a reason, and nothing is left");
    }
    println!("{} PROBLEMS", verdict.problems.len());
    let mut histories = 0;
    for (number, (id, problem)) in verdict.problems.iter().enumerate().take(40) {
        let of = id.map_or(String::new(), |id| format!("connection {id}: "));
        println!("{}. {of}{problem}", number + 1);
        // The history of many problems would only hide the first.
        if let Some(id) = id.filter(|_| histories < 5) {
            histories += 1;
            println!("{}", evidence.history(id));
        }
    }
    tail(&evidence.run.directory.join("servers.log"), 10);
    tail(&evidence.run.directory.join("log"), 60);
}
