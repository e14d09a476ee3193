//! The rows of the table: scenarios with their requirements.

use std::time::Duration;

use simulator::waits::{Change, Kind, Rounds, Scenario, Service, WorkerPlan};

/// A requirement of a row, in addition to serving all clients.
#[derive(Clone, Copy, Debug)]
pub enum Need {
    /// The p99 of the waits is at most this multiple of that with never moving, without stops.
    OfNever(f64),
    /// The p99 of the waits is at most this much longer than with never moving.
    AsNever(Duration),
    /// The median and the p99 of the waits are at most these multiples of those with a shared
    /// queue.
    OfShared(f64),
    /// At most this fraction of the clients is moved.
    Moves(f64),
    /// No worker becomes suspect, trusted and suspect again.
    Settled,
    /// Clients of the worker that stops wait at most 3 × its usual longest take plus this number of
    /// rounds of another worker.
    Stop(u64),
    /// No client waits longer.
    Longest(Duration),
    /// The first client waits at most this long.
    First(Duration),
    /// After the first client: the first trial of each worker delays one client by at most 20 ms, a
    /// repeated trial by 5 ms, with at most one of these per second; a round of an honest worker is
    /// added to each.
    Tests {
        /// Workers that are not honest.
        hostile: u32,
        /// The longest round of an honest worker.
        round: Duration,
    },
    /// The worker has at least this fraction of an equal share.
    Share {
        /// The worker.
        worker: usize,
        /// Start of the interval.
        from: Duration,
        /// End of the interval.
        to: Duration,
        /// Fraction of an equal share.
        part: f64,
    },
    /// Loads of honest workers differ by at most this.
    Even(u64),
}

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its name, for `HANDOFF_ROWS`.
    pub name: String,
    /// The scenario.
    pub scenario: Scenario,
    /// Number of runs, each with a seed of its own; the waits are combined.
    pub runs: u32,
    /// The requirements, for each seed.
    pub needs: Vec<Need>,
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn exp(mean: Duration) -> Service {
    Service::Exponential(mean)
}

fn many(count: usize, kind: Kind) -> Vec<Kind> {
    vec![kind; count]
}

fn mix(parts: &[(usize, Kind)]) -> Vec<Kind> {
    parts.iter().flat_map(|&(count, kind)| many(count, kind)).collect()
}

fn row(name: impl Into<String>, scenario: Scenario, needs: impl Into<Vec<Need>>) -> Row {
    Row { name: name.into(), scenario, runs: 1, needs: needs.into() }
}

const ROUNDS: [(Rounds, &str); 3] =
    [(Rounds::Uniform, "±30 %"), (Rounds::Exponential, "exp"), (Rounds::LongTail, "3 % 10×")];

/// Every row.
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    rows.extend(loops());
    rows.extend(stops());
    rows.extend(serial());
    rows.extend(fast_stops());
    rows.extend(stuck());
    rows.extend(bursts());
    rows.extend(mixed());
    rows.extend(changes());
    rows.extend(joins());
    rows.extend(even());
    rows
}

fn name_of(count: usize, round: Duration, rate: f64, rounds: &str) -> String {
    format!("{count} loops {round:?} {rate}/s {rounds}")
}

/// Event loops with all combinations of number, round, rate and distribution for which the arrivals
/// of a round of `longer` times the mean fit into half of the rings of `serving` workers.
fn grid(
    serving: impl Fn(usize) -> usize,
    longer: impl Fn(Rounds) -> f64,
) -> Vec<(String, Scenario, Rounds)> {
    let mut found = Vec::new();
    for (rounds, text) in ROUNDS {
        for count in [1, 2, 8, 30] {
            for round in [ms(50), ms(320), s(1), s(3)] {
                for rate in [20.0, 100.0, 500.0] {
                    let arrivals = rate * round.as_secs_f64() * longer(rounds);
                    if arrivals > 128.0 * serving(count) as f64 {
                        continue;
                    }
                    let kinds = many(count, Kind::event_loop(round));
                    let mut scenario = Scenario::new(kinds, rate);
                    scenario.rounds = rounds;
                    scenario.warm = round * 10;
                    // The few longest rounds determine the p99, so there must be enough of them.
                    if rounds != Rounds::Uniform {
                        scenario.clients = 120_000;
                    }
                    // A pool whose only worker has a round of 30 s takes nothing for 30 s.
                    if rounds != Rounds::Uniform && round >= s(1) {
                        scenario.wait_for_worker = s(120);
                    }
                    // `handoff_timeout` must be longer than the longest honest round.
                    if rounds == Rounds::LongTail && round >= s(3) {
                        scenario.max_handoff_timeout = s(60);
                    }
                    found.push((name_of(count, round, rate, text), scenario, rounds));
                }
            }
        }
    }
    found
}

fn loops() -> Vec<Row> {
    let of = |(name, scenario, rounds): (String, Scenario, Rounds)| {
        let needs = match rounds {
            Rounds::Uniform => vec![Need::OfNever(1.1), Need::Moves(0.001), Need::Settled],
            Rounds::Exponential | Rounds::LongTail => {
                vec![Need::OfNever(1.1), Need::Moves(0.1)]
            }
        };
        row(name, scenario, needs)
    };
    let mut rows: Vec<Row> = grid(|count| count, |_| 1.0).into_iter().map(of).collect();
    for rate in [100.0, 180.0] {
        let kinds = many(4, Kind::Loop { round: ms(20), most: 1 });
        let scenario = Scenario::new(kinds, rate);
        rows.push(row(
            format!("4 loops 20ms one per round {rate}/s"),
            scenario,
            [Need::OfNever(1.1)],
        ));
    }
    for (count, round, rate) in [(2, s(3), 0.2), (4, s(1), 1.0)] {
        let mut scenario = Scenario::new(many(count, Kind::event_loop(round)), rate);
        scenario.warm = s(60);
        scenario.service = exp(s(2));
        rows.push(row(
            name_of(count, round, rate, "sparse"),
            scenario,
            [Need::OfNever(1.1), Need::Moves(0.001), Need::Settled],
        ));
    }
    rows
}

fn stops() -> Vec<Row> {
    let mut rows = Vec::new();
    // The remaining workers must have room for the arrivals of a long round.
    let serving = |count: usize| (count - 1).max(1);
    let longer = |rounds| match rounds {
        Rounds::Uniform => 1.3,
        Rounds::Exponential => 3.0,
        Rounds::LongTail => 13.0,
    };
    for (name, mut scenario, rounds) in grid(serving, longer) {
        // The clients of one stop must be fewer than 1 % of all.
        scenario.clients = scenario.clients.max((200.0 * scenario.rate) as u32);
        // By then each worker has taken connections.
        let share = scenario.workers.len() as f64 / scenario.rate;
        let at = scenario.warm + s(20) + Duration::from_secs_f64(20.0 * share);
        let most = match rounds {
            Rounds::Uniform => 1,
            // The other worker may be in such a long round that it is suspect, too; then neither is
            // better.
            Rounds::Exponential | Rounds::LongTail => 2,
        };
        if rounds != Rounds::Uniform && scenario.workers.len() == 2 {
            // One worker remains, and has half as many long rounds.
            scenario.clients *= 4;
        }
        let mut for_5_s = scenario.clone();
        for_5_s.changes = vec![(at, 0, Change::Stop), (at + s(5), 0, Change::Continue)];
        if scenario.workers.len() == 1 {
            // There is no other worker: all clients are served when it continues.
            rows.push(row(format!("stop 5 s: {name}"), for_5_s, []));
            continue;
        }
        let needs = [Need::Stop(most), Need::OfNever(1.1)];
        rows.push(row(format!("stop 5 s: {name}"), for_5_s, needs));
        let mut for_good = scenario;
        for_good.changes = vec![(at, 0, Change::Stop)];
        rows.push(row(format!("stop for good: {name}"), for_good, needs));
    }
    rows
}

fn serial() -> Vec<Row> {
    let mut rows = Vec::new();
    for (threads, text) in [(1, "4 serial"), (8, "4 × 8 threads")] {
        for service in [ms(1), ms(5), ms(20), ms(100), ms(300)] {
            for (law, times) in [("exp", exp(service)), ("pareto", Service::Pareto(service))] {
                let rate = 0.9 * 4.0 * f64::from(threads) / service.as_secs_f64();
                let mut scenario = Scenario::new(many(4, Kind::Serial { threads }), rate);
                scenario.service = times;
                rows.push(row(
                    format!("{text} {service:?} {law} load .9"),
                    scenario,
                    [Need::OfShared(1.2)],
                ));
            }
        }
    }
    let mut scenario = Scenario::new(many(4, Kind::Serial { threads: 1 }), 32_000.0);
    scenario.service = exp(Duration::from_micros(100));
    rows.push(row("4 serial 100µs exp load .8", scenario, []));
    for (count, service, load, stop) in [
        (8, s(1), 0.9, None),
        (8, s(1), 0.5, None),
        (4, ms(1), 0.9, None),
        (4, s(1), 0.9, Some(s(5))),
    ] {
        let others = if stop.is_some() { count as f64 * 0.9 } else { count as f64 - 1.0 };
        let rate = load * others / service.as_secs_f64();
        let mut scenario = Scenario::new(many(count, Kind::Serial { threads: 1 }), rate);
        scenario.service = exp(service);
        let at = s(20).min(Duration::from_secs_f64(3_000.0 / rate));
        scenario.changes = vec![(at, 0, Change::Stop)];
        if let Some(stop) = stop {
            scenario.changes.push((at + stop, 0, Change::Continue));
        }
        let end = stop.map_or("for good".to_owned(), |stop| format!("{stop:?}"));
        rows.push(row(format!("stop {end}: {count} serial {service:?} load {load}"), scenario, []));
    }
    rows
}

fn fast_stops() -> Vec<Row> {
    let mut rows = Vec::new();
    for count in [2, 4, 8] {
        for rate in [20.0, 100.0, 1000.0] {
            for stop in [None, Some(s(5))] {
                let mut scenario = Scenario::new(many(count, Kind::Fast), rate);
                scenario.service = exp(s(1));
                let at = s(10);
                scenario.changes = vec![(at, 0, Change::Stop)];
                scenario.changes.extend(stop.map(|stop| (at + stop, 0, Change::Continue)));
                let end = stop.map_or("for good".to_owned(), |stop| format!("{stop:?}"));
                rows.push(row(
                    format!("stop {end}: {count} fast {rate}/s"),
                    scenario,
                    [Need::Longest(ms(300))],
                ));
            }
        }
    }
    rows
}

fn stuck() -> Vec<Row> {
    let mut rows = Vec::new();
    for (kind, text) in [(Kind::Stuck, "stuck"), (Kind::Dead, "dead")] {
        for hostile in [1, 2, 5, 10, 50] {
            for honest in [1, 2, 3] {
                for rate in [2.0, 20.0, 200.0] {
                    let kinds = mix(&[(hostile, kind), (honest, Kind::Fast)]);
                    let mut scenario = Scenario::new(kinds, rate);
                    scenario.service = exp(s(1));
                    scenario.clients = 3_000;
                    let name = format!("{hostile} {text} + {honest} fast {rate}/s");
                    let tests = Need::Tests { hostile: hostile as u32, round: Duration::ZERO };
                    rows.push(Row {
                        name,
                        scenario,
                        runs: 10,
                        needs: vec![Need::First(ms(200)), tests],
                    });
                }
            }
        }
    }
    for (hostile, honest, round) in [(1, 2, ms(320)), (5, 2, ms(320)), (10, 4, s(1))] {
        let kinds = mix(&[(hostile, Kind::Stuck), (honest, Kind::event_loop(round))]);
        let mut scenario = Scenario::new(kinds, 20.0);
        scenario.clients = 3_000;
        let longest = round.mul_f64(1.3);
        let tests = Need::Tests { hostile: hostile as u32, round: longest };
        rows.push(Row {
            name: format!("{hostile} stuck + {honest} loops {round:?} 20/s"),
            scenario,
            runs: 10,
            // The first clients may get trials at two honest workers.
            needs: vec![Need::First(ms(200) + 2 * longest), tests],
        });
    }
    for (serves, rests) in [(ms(100), s(1)), (s(1), s(10)), (s(5), s(5))] {
        let kinds = mix(&[(3, Kind::Flapping { serves, rests }), (3, Kind::Fast)]);
        let mut scenario = Scenario::new(kinds, 100.0);
        scenario.service = exp(s(1));
        rows.push(row(
            format!("3 flapping {serves:?}/{rests:?} + 3 fast"),
            scenario,
            [Need::OfNever(1.1)],
        ));
    }
    rows
}

fn bursts() -> Vec<Row> {
    let mut rows = Vec::new();
    let fast = Kind::Fast;
    for (name, kinds) in [
        ("8 fast", many(8, fast)),
        ("3 fast", many(3, fast)),
        ("50 stuck + 3 fast", mix(&[(50, Kind::Stuck), (3, fast)])),
        ("5 dead + 3 fast", mix(&[(5, Kind::Dead), (3, fast)])),
        ("8 loops 1s", many(8, Kind::event_loop(s(1)))),
        ("8 loops 50ms", many(8, Kind::event_loop(ms(50)))),
        ("5 stuck + 8 loops 1s", mix(&[(5, Kind::Stuck), (8, Kind::event_loop(s(1)))])),
        ("4 fast + 4 loops 1s", mix(&[(4, fast), (4, Kind::event_loop(s(1)))])),
    ] {
        let mut scenario = Scenario::new(kinds.clone(), 20.0);
        scenario.burst = 1_000;
        scenario.clients = 1_100;
        scenario.service = exp(s(30));
        let all_fast = kinds.iter().all(|&kind| kind == fast);
        let needs = if all_fast {
            // Each worker first gets one connection as a trial.
            vec![Need::AsNever(ms(1))]
        } else {
            Vec::new()
        };
        rows.push(Row { name: format!("burst 1000: {name}"), scenario, runs: 28, needs });
    }
    rows
}

fn mixed() -> Vec<Row> {
    let fast = Kind::Fast;
    let serial = |threads| Kind::Serial { threads };
    [
        ("4 fast + 4 loops 1s", mix(&[(4, fast), (4, Kind::event_loop(s(1)))]), 200.0, s(5), true),
        (
            "4 fast + 2 loops 320ms",
            mix(&[(4, fast), (2, Kind::event_loop(ms(320)))]),
            100.0,
            s(2),
            true,
        ),
        ("4 serial 1s + 4 fast", mix(&[(4, serial(1)), (4, fast)]), 50.0, s(1), false),
        (
            "4 serial .3s + 2 loops 320ms",
            mix(&[(4, serial(1)), (2, Kind::event_loop(ms(320)))]),
            12.0,
            ms(300),
            true,
        ),
    ]
    .into_iter()
    .map(|(name, kinds, rate, service, compare)| {
        let mut scenario = Scenario::new(kinds, rate);
        scenario.service = exp(service);
        scenario.warm = s(10);
        let needs = if compare { vec![Need::OfNever(1.1)] } else { vec![Need::Longest(s(1))] };
        row(format!("mixed: {name}"), scenario, needs)
    })
    .collect()
}

fn changes() -> Vec<Row> {
    let slow = Kind::event_loop(s(1));
    let becomes = |from: u64, worker, kind| (s(from), worker, Change::Become(kind));
    let mut rows = Vec::new();

    let mut one = Scenario::new(many(4, Kind::Fast), 300.0);
    one.service = exp(s(2));
    one.changes = vec![becomes(20, 0, slow), becomes(40, 0, Kind::Fast)];
    let share = |worker, from, to| Need::Share { worker, from: s(from), to: s(to), part: 0.8 };
    rows.push(row(
        "change: 1 of 4 fast is slow 20 to 40 s",
        one,
        [share(0, 50, 100), share(1, 50, 100)],
    ));

    let mut all = Scenario::new(many(4, Kind::Fast), 300.0);
    all.service = exp(s(2));
    for worker in 0..4 {
        all.changes.push(becomes(20, worker, slow));
        all.changes.push(becomes(40, worker, Kind::Fast));
    }
    rows.push(row("change: 4 of 4 fast are slow 20 to 40 s", all, [share(0, 50, 100)]));

    let quick = Kind::event_loop(ms(50));
    let mut loops = Scenario::new(many(8, quick), 300.0);
    loops.service = exp(s(2));
    for worker in 0..8 {
        loops.changes.push(becomes(20, worker, slow));
        loops.changes.push(becomes(40, worker, quick));
    }
    rows.push(row("change: 8 loops 50ms are slow 20 to 40 s", loops, [share(0, 50, 100)]));
    rows
}

fn joins() -> Vec<Row> {
    let later = |first: Vec<Kind>, then: Vec<Kind>, at: Duration, rate| {
        let mut scenario = Scenario::new(first, rate);
        scenario.service = exp(s(2));
        scenario.workers.extend(then.into_iter().map(|kind| WorkerPlan { kind, joins: at }));
        scenario
    };
    let share = |worker, from, to| Need::Share { worker, from: s(from), to: s(to), part: 0.8 };
    let slow = Kind::event_loop(s(1));
    let mut stuck_join = later(many(3, Kind::Fast), many(20, Kind::Stuck), s(10), 300.0);
    stuck_join.warm = s(5);
    let mut slow_stuck = later(many(4, slow), many(10, Kind::Stuck), s(20), 50.0);
    slow_stuck.warm = s(15);
    vec![
        row(
            "join: 5 fast join 3",
            later(many(3, Kind::Fast), many(5, Kind::Fast), s(10), 300.0),
            [share(7, 20, 100), Need::Longest(ms(300))],
        ),
        row(
            "join: 20 stuck join 3 fast",
            stuck_join,
            [Need::Tests { hostile: 20, round: Duration::ZERO }],
        ),
        row(
            "join: 5 loops 1s join 3",
            later(many(3, slow), many(5, slow), s(20), 50.0),
            [share(7, 40, 400), Need::Longest(ms(2800))],
        ),
        row(
            "join: 10 stuck join 4 loops 1s",
            slow_stuck,
            [Need::Tests { hostile: 10, round: ms(1300) }],
        ),
    ]
}

fn even() -> Vec<Row> {
    [
        ("4 fast", many(4, Kind::Fast), 0),
        ("4 fast, burst", many(4, Kind::Fast), 1_000),
        ("8 loops 10ms", many(8, Kind::event_loop(ms(10))), 0),
        ("8 loops 1s", many(8, Kind::event_loop(s(1))), 0),
        ("8 × 16 threads", many(8, Kind::Serial { threads: 16 }), 0),
    ]
    .into_iter()
    .map(|(name, kinds, burst)| {
        let is_serial = matches!(kinds[0], Kind::Serial { .. });
        let mut scenario = Scenario::new(kinds, if is_serial { 50.0 } else { 100.0 });
        scenario.service = if is_serial { exp(ms(1_500)) } else { Service::Forever };
        scenario.burst = burst;
        scenario.warm = s(30);
        scenario.compare_loads = true;
        row(format!("even: {name}"), scenario, if is_serial { vec![] } else { vec![Need::Even(1)] })
    })
    .collect()
}
