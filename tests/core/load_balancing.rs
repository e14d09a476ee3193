//! The charts of docs/LOAD_BALANCING.md, from the core with simulated workers in virtual time. The
//! test compares the charts in docs/ with the current code. To draw them again:
//!
//!     WRITE_CHARTS=1 cargo test -p dispatcher-core --test core load_balancing
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use dispatch_protocol::scoreboard::gauge::Reading;
use dispatch_protocol::wire::Hello;
use dispatcher_core::*;
use simulator::{Driver, Random};

const LISTENER: ListenerId = ListenerId(0);
const MILLISECOND: u64 = 1_000_000;

/// A pool with its workers and clients.
struct Scene {
    driver: Driver,
    random: Random,
    workers: Vec<WorkerId>,
    ends: BinaryHeap<Reverse<(Time, u64)>>,
}

impl Scene {
    fn new(policy: Policy, slow_start: Duration) -> Scene {
        let name = "queue_wait".parse().unwrap();
        let pool = PoolSettings {
            name: "web".to_owned(),
            policy,
            slow_start,
            scores: Scores {
                gauges: vec![ScoredGauge { name, multiplier: 100.0 }],
                valid_for: Duration::from_secs(3_600),
                ..Scores::default()
            },
            access: AllowedAccounts { users: vec![0], groups: vec![] },
            ..PoolSettings::default()
        };
        let listener =
            ListenerSettings { name: "web".to_owned(), address: String::new(), pool: PoolId(0) };
        let mut driver = Driver::new(vec![pool], vec![listener]);
        driver.core.set_seed(1);
        Scene { driver, random: Random::new(1), workers: Vec::new(), ends: BinaryHeap::new() }
    }

    fn join(&mut self, priority: u16) {
        let name = format!("w{}", self.workers.len());
        let hello = Hello {
            pool: "web".to_owned(),
            name,
            priority,
            max_connections: 10_000,
            ..Hello::default()
        };
        self.workers.push(self.driver.join(hello).unwrap());
    }

    /// The last worker that joined sets its gauge to this value.
    fn show(&mut self, wait: f64) {
        let at = self.driver.now.0;
        for gauge in self.driver.links.iter_mut().last().into_iter().flat_map(|l| &mut l.gauges) {
            *gauge = Some(Reading { value: wait, at });
        }
    }

    /// One client: it arrives up to 2 ms after the last one, and stays 20 ms with probability 1/2,
    /// 40 ms with probability 1/4, and so on up to 20 s. Most connections are short, and the long
    /// ones make half of the load.
    fn client(&mut self) {
        let gap = self.random.below(2 * MILLISECOND);
        let doublings = self.random.number().trailing_zeros().min(10);
        let time = Duration::from_nanos((20 << doublings) * MILLISECOND);
        // Some clients connect more often than others.
        let number = self.random.below(20) * self.random.below(20);
        self.advance(Duration::from_nanos(gap));
        self.driver.log.clear();
        let peer = SocketAddr::from(([10, 0, (number / 256) as u8, (number % 256) as u8], 1));
        self.driver.accept_only_from(LISTENER, peer.into());
        self.driver.pump();
        let sent = self.driver.log.iter().find_map(|effect| match effect {
            Effect::Send { worker, .. } => Some(*worker),
            _ => None,
        });
        let worker = sent.expect("there is room");
        self.driver.take(worker).unwrap();
        self.driver.turn();
        self.ends.push(Reverse((self.driver.now + time, worker.serial)));
    }

    fn advance(&mut self, time: Duration) {
        let until = self.driver.now + time;
        while let Some(&Reverse((end, serial))) = self.ends.peek()
            && end <= until
        {
            self.ends.pop();
            let index = serial as usize - 1;
            self.driver.links[index].finished += 1;
        }
        self.driver.now = until;
        self.driver.turn();
    }

    fn loads(&self) -> Vec<u64> {
        self.workers.iter().map(|&worker| self.driver.core.load(worker).unwrap()).collect()
    }
}

/// A drawing of `width` by `height` with a title.
fn svg(width: u32, height: u32, title: &str, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\" role=\"img\">\n<title>{title}</title>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}

fn points(points: impl Iterator<Item = (f64, f64)>) -> String {
    let mut text = String::new();
    for (x, y) in points {
        let _ = write!(text, "{x:.0},{y:.0} ");
    }
    text.trim_end().to_owned()
}

/// Writes the chart, or compares it with the file.
fn check(name: &str, chart: &str) {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs")).join(name);
    if std::env::var_os("WRITE_CHARTS").is_some() {
        return std::fs::write(path, chart).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == chart,
        "{} is not what the code does: WRITE_CHARTS=1 cargo test -p dispatcher-core --test core load_balancing",
        path.display()
    );
}

const PANEL: (f64, f64) = (250.0, 150.0);

/// The load of the least and the most loaded worker over time, and the mean.
fn panel(at: (f64, f64), policy: Policy) -> String {
    const SAMPLES: usize = 100;
    let mut scene = Scene::new(policy, Duration::ZERO);
    for n in 0..8 {
        // With failover, two of eight workers have the highest priority.
        scene.join(u16::from(policy == Policy::Failover && n < 2));
        // With scores, requests wait at two of eight workers; the wait costs as much as ten
        // connections.
        scene.show(if n < 2 { 0.1 } else { 0.0 });
    }
    let mut samples = Vec::new();
    for _ in 0..SAMPLES {
        for _ in 0..25 {
            scene.client();
        }
        let loads = scene.loads();
        let mean = loads.iter().sum::<u64>() as f64 / loads.len() as f64;
        let (least, most) = (*loads.iter().min().unwrap(), *loads.iter().max().unwrap());
        samples.push((least as f64, mean, most as f64));
    }
    let scale = |n: usize, load: f64| {
        let x = at.0 + PANEL.0 * n as f64 / (SAMPLES - 1) as f64;
        (x, at.1 + PANEL.1 * (1.0 - load.min(60.0) / 60.0))
    };
    let indexed = || samples.iter().copied().enumerate();
    let top = indexed().map(|(n, (_, _, most))| scale(n, most));
    let bottom = indexed().rev().map(|(n, (least, _, _))| scale(n, least));
    let late = &samples[SAMPLES / 2..];
    let ratio = late.iter().map(|(_, mean, most)| most / mean).sum::<f64>() / late.len() as f64;
    let mut text = String::new();
    let (x, y) = at;
    let base = y + PANEL.1;
    let _ = writeln!(
        text,
        "<text x=\"{x}\" y=\"{}\" font-weight=\"bold\">{}</text>",
        y - 8.0,
        policy.name()
    );
    let _ = writeln!(
        text,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#555555\">most / mean {ratio:.1}</text>",
        x + PANEL.0,
        y - 8.0
    );
    let _ = writeln!(text, "<polygon points=\"{}\" fill=\"#9ecae1\"/>", points(top.chain(bottom)));
    let mean = points(indexed().map(|(n, (_, mean, _))| scale(n, mean)));
    let _ = writeln!(
        text,
        "<polyline points=\"{mean}\" fill=\"none\" stroke=\"#08519c\" stroke-width=\"1.5\"/>"
    );
    let _ = writeln!(
        text,
        "<path d=\"M{x},{y} V{base} H{}\" fill=\"none\" stroke=\"#888888\"/>",
        x + PANEL.0
    );
    for load in [0.0, 30.0, 60.0] {
        let (_, y) = scale(0, load);
        let _ = writeln!(
            text,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#555555\">{load:.0}</text>",
            x - 5.0,
            y + 4.0
        );
    }
    text
}

#[test]
fn uneven_lifetimes() {
    let policies = [
        Policy::LeastConnections,
        Policy::RoundRobin,
        Policy::Random,
        Policy::TwoChoices,
        Policy::Hash,
        Policy::Failover,
        Policy::LeastScore,
    ];
    let mut body = String::new();
    for (n, policy) in policies.into_iter().enumerate() {
        let at = (40.0 + 310.0 * (n % 3) as f64, 40.0 + 215.0 * (n / 3) as f64);
        body += &panel(at, policy);
    }
    body += "<text x=\"40\" y=\"655\" fill=\"#555555\">Live connections of 8 workers while 2,500 clients come: from the least to the most \
             loaded one (band), and the mean (line).</text>\n";
    check(
        "load-balancing-lifetimes.svg",
        &svg(960, 670, "Loads under uneven lifetimes, by policy", &body),
    );
}

#[test]
fn slow_start() {
    const SAMPLES: usize = 80;
    let mut body = String::new();
    let (x, y, width, height) = (50.0, 40.0, 560.0, 200.0);
    let most = 1_200.0;
    for (color, slow, label) in
        [("#d95f02", 0, "slow_start = \"0s\""), ("#1b9e77", 2, "slow_start = \"2s\"")]
    {
        let mut scene = Scene::new(Policy::LeastConnections, Duration::from_secs(slow));
        (0..2).for_each(|_| scene.join(0));
        scene.advance(Duration::from_secs(60));
        (0..2_000).for_each(|_| scene.client());
        scene.join(0);
        // The connections that it got in each 50 ms: its rate.
        let (mut line, mut before) = (Vec::new(), 0);
        for n in 0..SAMPLES {
            let end = scene.driver.now + Duration::from_millis(50);
            while scene.driver.now < end {
                scene.client();
            }
            let status = scene.driver.core.snapshot();
            let sent = status.pools[0].workers[2].sent;
            let rate = (sent - before) as f64 * 20.0;
            before = sent;
            line.push((
                x + width * n as f64 / (SAMPLES - 1) as f64,
                y + height * (1.0 - rate.min(most) / most),
            ));
        }
        let _ = writeln!(
            body,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\"/>",
            points(line.into_iter())
        );
        let row = y + 12.0 + if slow == 0 { 0.0 } else { 18.0 };
        let _ = writeln!(
            body,
            "<text x=\"{}\" y=\"{row}\" fill=\"{color}\" text-anchor=\"end\">{label}</text>",
            x + width
        );
    }
    let base = y + height;
    let _ = writeln!(
        body,
        "<path d=\"M{x},{y} V{base} H{}\" fill=\"none\" stroke=\"#888888\"/>",
        x + width
    );
    for rate in [0.0, 400.0, 800.0, 1_200.0] {
        let at = y + height * (1.0 - rate / most) + 4.0;
        let _ = writeln!(
            body,
            "<text x=\"{}\" y=\"{at}\" text-anchor=\"end\" fill=\"#555555\">{rate:.0}</text>",
            x - 5.0
        );
    }
    for second in 0..=4 {
        let _ = writeln!(
            body,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555555\">{second} s</text>",
            x + width * f64::from(second) / 4.0,
            base + 18.0
        );
    }
    body += "<text x=\"50\" y=\"24\" fill=\"#555555\">Connections a second that a third worker gets after it has joined; 1,000 come in all.</text>\n";
    check(
        "load-balancing-slow-start.svg",
        &svg(640, 275, "A new worker with and without slow start", &body),
    );
}
