//! Seeded chaos: workers send, receive, register again, read slowly and flood each other, while
//! they are killed and stopped and the directory is restarted. Afterwards the logs are checked:
//!
//! - an acknowledged message was received exactly once; it may be missing only if the worker that
//!   had it in its queue was killed, and then everything after it there is missing, too;
//! - messages of one sender to one id were received in order;
//! - a message that was not found, or refused by a full queue, was received by no member;
//! - every message of a worker that was not killed has exactly one outcome.
//!
//! `RELAY_CHAOS_SECONDS` (default 6) and `RELAY_CHAOS_SEED` change the run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use test_support::{Process, example, wait_until};

use super::Directory;

const WORKERS: usize = 4;
const IDS: u64 = 12;

/// Messages in each queue of a worker, as `worker.rs` configures it.
const QUEUE: usize = 64;

struct Run {
    name: String,
    log: PathBuf,
    process: Process,
    stopped: bool,
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn start(directory: &Directory, name: String, seed: u64) -> Run {
    let log = directory.path().join(format!("{name}.log"));
    let errors = std::fs::File::create(directory.path().join(format!("{name}.err"))).unwrap();
    let mut command = Command::new(example("relay-worker"));
    command.arg(directory.socket()).arg(&log).arg(&name);
    command.args([seed.to_string(), IDS.to_string()]).stdin(Stdio::null()).stderr(errors);
    let process = Process::start(&name, &mut command);
    Run { name, log, process, stopped: false }
}

#[test]
fn every_acknowledged_message_arrived_once_and_in_order() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
    };
    let seconds = number("RELAY_CHAOS_SECONDS", 6);
    let default_seed = std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos();
    let seed = number("RELAY_CHAOS_SEED", u64::from(default_seed));
    println!("RELAY_CHAOS_SEED={seed} RELAY_CHAOS_SECONDS={seconds}");
    let mut random = Random(seed | 1);
    let mut directory = Directory::start("grace = \"300ms\"");
    let mut count = 0;
    let mut next = |directory: &Directory, random: &mut Random| {
        count += 1;
        start(directory, format!("w{count}"), random.below(u64::MAX))
    };
    let mut running: Vec<Run> = (0..WORKERS).map(|_| next(&directory, &mut random)).collect();
    let mut ended: Vec<(Run, bool)> = Vec::new();
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50 + random.below(200)));
        let index = random.below(WORKERS as u64) as usize;
        match random.below(10) {
            0 | 1 => {
                let new = next(&directory, &mut random);
                let mut old = std::mem::replace(&mut running[index], new);
                old.process.kill();
                ended.push((old, true));
            }
            2 => {
                let new = next(&directory, &mut random);
                let mut old = std::mem::replace(&mut running[index], new);
                leave(&mut old);
                ended.push((old, false));
            }
            3..6 => {
                let run = &mut running[index];
                let signal = if run.stopped { Signal::SIGCONT } else { Signal::SIGSTOP };
                run.process.signal(signal);
                run.stopped = !run.stopped;
            }
            6 => directory.restart(),
            _ => {}
        }
    }
    for run in running.iter_mut().filter(|run| run.stopped) {
        run.process.signal(Signal::SIGCONT);
        run.stopped = false;
    }
    // All at once, so that none waits for one that has left.
    running.iter().for_each(|run| run.process.signal(Signal::SIGTERM));
    for mut run in running {
        let status = run.process.wait();
        assert!(status.success(), "{}: {status}, seed {seed}", run.name);
        ended.push((run, false));
    }
    let counts = check(&ended).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    println!("{counts:?}");
    assert!(counts["Delivered"] > 100 && counts["jobs"] > 100, "{counts:?}, seed {seed}");
}

fn leave(run: &mut Run) {
    if run.stopped {
        run.process.signal(Signal::SIGCONT);
    }
    run.process.signal(Signal::SIGTERM);
    let log = run.log.clone();
    wait_until("a worker to end", || {
        !run.process.running()
            && std::fs::read_to_string(&log).is_ok_and(|text| text.ends_with("bye\n"))
    });
}

/// One registration of an id: its order, its end, and what it received from each sender.
#[derive(Default)]
struct Incarnation {
    stamp: u64,
    worker: String,
    killed: bool,
    received: BTreeMap<String, Vec<u64>>,
}

fn check(runs: &[(Run, bool)]) -> Result<BTreeMap<String, u64>, String> {
    let mut incarnations: BTreeMap<String, Vec<Incarnation>> = BTreeMap::new();
    // By sender and id: outcome of each sequence.
    let mut outcomes: BTreeMap<(String, String), BTreeMap<u64, String>> = BTreeMap::new();
    let mut jobs: BTreeMap<(String, u64), u64> = BTreeMap::new();
    let mut job_outcomes: BTreeMap<(String, u64), String> = BTreeMap::new();
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    let mut unordered: BTreeSet<String> = BTreeSet::new();
    for (run, killed) in runs {
        let text = std::fs::read_to_string(&run.log).unwrap_or_default();
        let mut open: BTreeMap<String, Incarnation> = BTreeMap::new();
        let mut tried = None;
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["try", id] => tried = Some(id.to_owned()),
                ["reg", id, stamp] => {
                    tried = None;
                    let stamp = stamp.parse().map_err(|_| line.to_owned())?;
                    let new =
                        Incarnation { stamp, worker: run.name.clone(), ..Incarnation::default() };
                    if open.insert(id.to_owned(), new).is_some() {
                        return Err(format!("{}: {line}: registered twice", run.name));
                    }
                }
                ["end", id] => {
                    let ended = open.remove(id).ok_or_else(|| line.to_owned())?;
                    incarnations.entry(id.to_owned()).or_default().push(ended);
                }
                ["in", id, sender, sequence] => {
                    let sequence = sequence.parse().map_err(|_| line.to_owned())?;
                    let open = open.get_mut(id).ok_or_else(|| format!("{}: {line}", run.name))?;
                    open.received.entry(sender.to_owned()).or_default().push(sequence);
                }
                ["out", id, sequence, outcome] => {
                    let sequence = sequence.parse().map_err(|_| line.to_owned())?;
                    *counts.entry(outcome.to_owned()).or_default() += 1;
                    let stream = outcomes.entry((run.name.clone(), id.to_owned())).or_default();
                    if stream.insert(sequence, outcome.to_owned()).is_some() {
                        return Err(format!("{}: {line}: a second outcome", run.name));
                    }
                }
                ["any", sequence, outcome] => {
                    let sequence = sequence.parse().map_err(|_| line.to_owned())?;
                    job_outcomes.insert((run.name.clone(), sequence), outcome.to_owned());
                }
                ["job", sender, sequence] => {
                    let sequence = sequence.parse().map_err(|_| line.to_owned())?;
                    *jobs.entry((sender.to_owned(), sequence)).or_default() += 1;
                }
                ["bye"] => {}
                _ => return Err(format!("{}: {line}", run.name)),
            }
        }
        // It was killed before it knew the order of its registration, which may have received.
        unordered.extend(tried.filter(|_| *killed));
        for (id, mut one) in open {
            one.killed = *killed;
            if !killed {
                return Err(format!("{}: {id} has no end", run.name));
            }
            incarnations.entry(id).or_default().push(one);
        }
    }
    for all in incarnations.values_mut() {
        all.sort_by_key(|one| one.stamp);
    }
    let none = Vec::new();
    for ((sender, id), stream) in &outcomes {
        let killed_sender = runs.iter().any(|(run, killed)| *killed && run.name == *sender);
        // Sequences count up from 1, so a gap is a message without an outcome.
        let last = stream.keys().last().copied().unwrap_or(0);
        if !killed_sender && stream.len() as u64 != last {
            return Err(format!("{sender} to {id}: {last} sent, {} outcomes", stream.len()));
        }
        let all = incarnations.get(id).unwrap_or(&none);
        check_stream(sender, id, stream, all, unordered.contains(id), &mut counts)?;
    }
    let killed: BTreeSet<String> =
        runs.iter().filter(|(_, killed)| *killed).map(|(run, _)| run.name.clone()).collect();
    check_jobs(&jobs, &job_outcomes, &killed)?;
    *counts.entry("jobs".to_owned()).or_default() += jobs.len() as u64;
    Ok(counts)
}

/// Jobs have no order, and any worker may have one in its queue when it is killed; but no more than
/// that queue holds.
fn check_jobs(
    received: &BTreeMap<(String, u64), u64>,
    outcomes: &BTreeMap<(String, u64), String>,
    killed: &BTreeSet<String>,
) -> Result<(), String> {
    let mut last: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (sender, sequence) in outcomes.keys() {
        let (count, last) = last.entry(sender).or_default();
        *count += 1;
        *last = (*last).max(*sequence);
    }
    for (sender, (count, last)) in last {
        if !killed.contains(sender) && count != last {
            return Err(format!("jobs of {sender}: {last} sent, {count} outcomes"));
        }
    }
    for (job, times) in received {
        let outcome = outcomes.get(job).map(String::as_str);
        let fits = match outcome {
            Some("Delivered" | "Lost") => true,
            Some(_) => false,
            // It was killed before it knew.
            None => killed.contains(&job.0),
        };
        if *times > 1 || !fits {
            return Err(format!("job {job:?}: received {times} times, {outcome:?}"));
        }
    }
    let missing = outcomes
        .iter()
        .filter(|(job, outcome)| *outcome == "Delivered" && !received.contains_key(job))
        .count();
    if missing > killed.len() * QUEUE {
        let dead = killed.len();
        return Err(format!("{missing} acknowledged jobs were not received, {dead} were killed"));
    }
    Ok(())
}

fn check_stream(
    sender: &str,
    id: &str,
    stream: &BTreeMap<u64, String>,
    incarnations: &[Incarnation],
    unordered: bool,
    counts: &mut BTreeMap<String, u64>,
) -> Result<(), String> {
    let received: Vec<&[u64]> = incarnations
        .iter()
        .map(|one| one.received.get(sender).map_or(&[][..], Vec::as_slice))
        .collect();
    let flat: Vec<u64> = received.iter().flat_map(|list| list.iter().copied()).collect();
    if let Some(pair) = flat.windows(2).find(|pair| pair[0] >= pair[1]) {
        let around = stream.range(pair[1].saturating_sub(3)..=pair[0] + 3).collect::<Vec<_>>();
        let of = |one: &Incarnation| {
            let list = one.received.get(sender).map_or(&[][..], Vec::as_slice);
            (one.stamp, one.worker.clone(), one.killed, list.first().copied(), list.last().copied())
        };
        let all: Vec<_> = incarnations.iter().map(of).collect();
        return Err(format!(
            "{sender} to {id}: {} before {}\n{all:?}\n{around:?}",
            pair[0], pair[1]
        ));
    }
    let got: BTreeSet<u64> = flat.iter().copied().collect();
    for (sequence, outcome) in stream {
        match (outcome.as_str(), got.contains(sequence)) {
            ("Delivered", true) | ("NotFound" | "Backpressure", false) => {}
            ("Lost", arrived) => {
                let what = if arrived { "lost and received" } else { "lost and not received" };
                *counts.entry(what.to_owned()).or_default() += 1;
            }
            ("Delivered", false) => {
                // It was in the queue of a worker that was killed before it took it.
                let fits = |index: &usize| {
                    let before = received[..=*index].iter().flat_map(|list| list.iter());
                    let after = received[index + 1..].iter().flat_map(|list| list.iter());
                    incarnations[*index].killed
                        && before.copied().all(|other| other < *sequence)
                        && after.copied().all(|other| other > *sequence)
                };
                if !unordered && !(0..incarnations.len()).any(|index| fits(&index)) {
                    return Err(format!("{sender} to {id}: {sequence} was acknowledged and lost"));
                }
                *counts.entry("in the queue of a killed worker".to_owned()).or_default() += 1;
            }
            (outcome, true) => {
                return Err(format!("{sender} to {id}: {sequence} is {outcome} and was received"));
            }
            (outcome, _) => return Err(format!("outcome {outcome}")),
        }
    }
    Ok(())
}

#[test]
fn the_checker_finds_what_is_wrong() {
    let incarnation = |stamp, killed, received: &[u64]| Incarnation {
        stamp,
        worker: "w".to_owned(),
        killed,
        received: BTreeMap::from([("a".to_owned(), received.to_vec())]),
    };
    let stream = |outcomes: &[&str]| -> BTreeMap<u64, String> {
        (1..).zip(outcomes.iter().map(|&outcome| outcome.to_owned())).collect()
    };
    let check = |outcomes: &[&str], all: &[Incarnation]| {
        check_stream("a", "x", &stream(outcomes), all, false, &mut BTreeMap::new()).is_ok()
    };
    let (d, n, l) = ("Delivered", "NotFound", "Lost");
    assert!(check(&[d, d, n, l], &[incarnation(1, false, &[1, 2, 4])]));
    assert!(!check(&[d, d], &[incarnation(1, false, &[2, 1])]), "order");
    assert!(!check(&[d, d], &[incarnation(1, false, &[1, 1, 2])]), "twice");
    assert!(!check(&[d, d], &[incarnation(1, false, &[1]), incarnation(2, false, &[1, 2])]));
    assert!(!check(&[d, d], &[incarnation(1, false, &[1])]), "acknowledged and lost");
    assert!(check(&[d, d], &[incarnation(1, true, &[1])]), "in a killed queue");
    assert!(!check(&[d, d, d], &[incarnation(1, true, &[1, 3])]), "not at the end of the queue");
    assert!(!check(&[n], &[incarnation(1, false, &[1])]), "not found and received");
}

#[test]
fn the_checker_finds_wrong_jobs() {
    let of = |sender: &str, sequence: u64| (sender.to_owned(), sequence);
    let check = |received: &[(&str, u64, u64)], outcomes: &[(&str, u64, &str)], killed: &[&str]| {
        let received = received.iter().map(|&(s, n, times)| (of(s, n), times)).collect();
        let outcomes = outcomes.iter().map(|&(s, n, what)| (of(s, n), what.to_owned())).collect();
        let killed = killed.iter().map(|&name| name.to_owned()).collect();
        check_jobs(&received, &outcomes, &killed).is_ok()
    };
    let (d, l) = ("Delivered", "Lost");
    assert!(check(&[("a", 1, 1), ("a", 2, 1)], &[("a", 1, d), ("a", 2, l)], &[]));
    assert!(!check(&[("a", 1, 2)], &[("a", 1, d)], &[]), "twice");
    assert!(!check(&[("a", 1, 1), ("a", 2, 1)], &[("a", 1, d)], &[]), "received and never sent");
    assert!(check(&[("a", 1, 1), ("a", 2, 1)], &[("a", 1, d)], &["a"]), "killed before it knew");
    assert!(!check(&[("a", 1, 1)], &[("a", 1, "Backpressure")], &[]), "refused and received");
    assert!(!check(&[("a", 2, 1)], &[("a", 2, d)], &[]), "one has no outcome");
    assert!(!check(&[], &[("a", 1, d)], &[]), "acknowledged and not received");
    let many: Vec<_> = (1..=QUEUE as u64).map(|n| ("a", n, d)).collect();
    assert!(check(&[], &many, &["b"]), "in the queue of the killed one");
    let more: Vec<_> = (1..=QUEUE as u64 + 1).map(|n| ("a", n, d)).collect();
    assert!(!check(&[], &more, &["b"]), "more than that queue holds");
    assert!(!check(&[], &many, &[]), "none was killed");
}
