//! The status page in headless Chromium, with a real dispatcher and real workers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod advice;
mod appearance;
mod deploys;
mod hosts;
mod relay;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use dispatcher::api::status::{
    FaultStatus, ListenerStatus, PoolStatus, ProcessesStatus, Status, WorkerStatus,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use test_support::browser::Browser;
use test_support::shown::*;
use test_support::*;

/// A name that would run as script if it were used as markup, and a name that is too long for every
/// column.
const HOSTILE: &str = "<img/src=x/onerror=document.title='hit'>";
const LONG: &str = "a-worker-whose-name-is-sixty-four-characters-long-because-it-may";

/// A TCP proxy to the admin socket, because browsers cannot use Unix sockets.
struct Door {
    url: String,
}

impl Door {
    fn open(admin: PathBuf) -> Door {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // A dropped connection looks like a missing dispatcher.
                if let Ok(server) = UnixStream::connect(&admin) {
                    let (a, b) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                    std::thread::spawn(move || copy(a, b));
                    std::thread::spawn(move || copy(server, client));
                }
            }
        });
        Door { url }
    }
}

fn copy(mut from: impl Read, mut to: impl Write + Shut) {
    let _ = std::io::copy(&mut from, &mut to);
    to.shut();
}

trait Shut {
    fn shut(&self);
}

impl Shut for TcpStream {
    fn shut(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Shut for UnixStream {
    fn shut(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

/// Waits until the page and the JSON agree.
fn wait_equal(browser: &mut Browser, dispatcher: &Dispatcher) -> Status {
    let mut last = String::new();
    let deadline = std::time::Instant::now() + PATIENCE;
    while std::time::Instant::now() < deadline {
        let status = dispatcher.status();
        match equals(browser, &status) {
            Ok(()) => return status,
            Err(difference) => last = difference,
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("the page and the JSON differ: {last}");
}

#[test]
fn the_page_shows_what_the_json_says() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let pool =
        "max_connections_per_worker = 3000\nwait_for_worker = \"10m\"\nhandoff_timeout = \"10m\"";
    let temp = configure(&format!(
        "{}\n[[listener]]\nname = \"idle\"\naddress = \"127.0.0.1:0\"\npool = \"idle\"\n[pool.idle]\n",
        one_pool(pool)
    ));
    let mut dispatcher = Dispatcher::start_in(temp.path());
    let address = dispatcher.address("web");
    let mut workers = dispatcher.workers("tokio", "web", 3);
    let hostile = dispatcher.worker("tokio", "web", HOSTILE);
    dispatcher.wait_joined("web", 4);
    let clients: Vec<Client> = (0..22).map(|_| Client::connect(address).unwrap()).collect();
    // Connections in flight: sent to a stopped worker.
    hostile.signal(Signal::SIGSTOP);
    let untaken: Vec<TcpStream> = (0..8).map(|_| connect(address)).collect();
    let door = Door::open(dispatcher.admin());
    browser.open(&door.url);
    let status = wait_equal(&mut browser, &dispatcher);
    assert!(status.in_flight > 0 && status.accepted == 30, "{status:?}");
    let host = nix::sys::utsname::uname().unwrap().nodename().to_string_lossy().into_owned();
    assert_eq!((&status.host, host.is_empty()), (&host, false));
    assert_eq!(browser.text("document.title"), format!("{host} – dispatcher"));
    assert_eq!(browser.value("document.images.length"), 0);
    let policy = "document.querySelectorAll('#pools > tr')[1].children[1].innerText";
    assert!(browser.text(policy).ends_with("no-worker"));

    // The page shows new clients without a reload.
    let mut more: Vec<TcpStream> = (0..12).map(|_| connect(address)).collect();
    dispatcher.wait_status("more clients", |status| status.accepted == 42);
    wait_until("a rate where they come, and only there", || {
        more.push(connect(address));
        let rates: Vec<f64> =
            cells(&mut browser, "pools").iter().map(|row| decimal(&row[6])).collect();
        rates[0] > 0.0 && rates[1] == 0.0
    });
    wait_equal(&mut browser, &dispatcher);

    // A drained worker is shown as draining until it is resumed.
    for (command, state) in [("drain", "draining"), ("resume", "active")] {
        let mut cli = std::process::Command::new(dispatcher_bin());
        cli.args([command, "web/w2", "--admin"]).arg(dispatcher.admin());
        assert!(cli.output().unwrap().status.success());
        browser.wait_true(&format!(
            "{}.some((row) => row[0].startsWith('w2 ') && row[1].endsWith('{state}'))",
            rows("workers")
        ));
    }

    // After its goodbye a worker is draining while it has clients. A killed worker disappears, and
    // the page shows the reason.
    workers[1].signal(Signal::SIGTERM);
    browser.wait_true(&format!(
        "{}.some((row) => row[0].startsWith('w1 ') && row[1].endsWith('draining'))",
        rows("workers")
    ));
    let pools = cells(&mut browser, "pools");
    assert!(pools[0][3].contains("1 draining"), "{pools:?}");
    workers[0].kill();
    browser.wait_true(&format!("{}.every((row) => !row[0].startsWith('w0 '))", rows("workers")));
    let faults = "document.getElementById('faults').innerText";
    browser.wait_true(&format!("{faults}.includes('worker gone web/w0: process')"));
    wait_equal(&mut browser, &dispatcher);

    // When the dispatcher ends, the page reports it, keeps the last figures, and continues with the
    // next dispatcher.
    dispatcher.process.kill();
    browser.wait_true("!document.getElementById('alarm').hidden");
    assert_eq!(browser.text("document.title"), format!("no answer – {host} – dispatcher"));
    let alarm = browser.text("document.getElementById('alarm').innerText");
    assert!(alarm.starts_with("No answer from the dispatcher since "), "{alarm}");
    assert!(
        alarm.contains("Is it running?")
            && alarm.contains("The figures are those of the last answer.")
    );
    assert_ne!(browser.value("document.querySelectorAll('#workers > tr').length"), 0);
    hostile.signal(Signal::SIGCONT);
    let again = Dispatcher::start_in(temp.path());
    browser.wait_true("document.getElementById('alarm').hidden");
    again.wait_status("the workers to come back", |s| {
        !test_support::pool(s, "web").workers.is_empty()
    });
    wait_equal(&mut browser, &again);
    assert_eq!(browser.complaints, [] as [Value; 0]);
    drop((untaken, more, clients));
}

/// Replaces the answer of the dispatcher.
fn pretend(browser: &mut Browser, status: &Status) {
    let json = serde_json::to_string(status).unwrap();
    browser.value(&format!("globalThis.fetch = async () => Response.json({json}), true"));
}

/// A dispatcher without workers, with its page open.
fn idle(browser: &mut Browser) -> (Dispatcher, Door) {
    let (dispatcher, _) = start_one_pool("");
    let door = Door::open(dispatcher.admin());
    browser.open(&door.url);
    (dispatcher, door)
}

fn crowd(count: u64) -> Status {
    let workers = (1..=count)
        .map(|id| WorkerStatus {
            id,
            name: if id == 700 { "needle".to_owned() } else { format!("{LONG}-{id}") },
            pid: i32::try_from(id).unwrap() + 1000,
            state: if id == 999 { "suspect" } else { "active" }.to_owned(),
            weight: 1,
            warm_percent: if id == 140 { 40 } else { 100 },
            max_connections: 10_000,
            load: id % 500,
            ..WorkerStatus::default()
        })
        .collect();
    Status {
        version: "1".to_owned(),
        accepted: 12_345_678_901,
        closed: [("no_worker".to_owned(), 3)].into(),
        accepted_per_second: (0..300).collect(),
        faults: (0..50)
            .map(|n| FaultStatus {
                time: format!("2026-01-02T03:04:{n:02}.000Z"),
                kind: "worker_gone".to_owned(),
                subject: format!("web/{HOSTILE}{LONG}{n}"),
                text: "x".repeat(300),
                count: n,
                ongoing: n % 7 == 0,
            })
            .collect(),
        pools: vec![PoolStatus {
            name: LONG.to_owned(),
            policy: "least-connections".to_owned(),
            state: "ready".to_owned(),
            workers,
            ..PoolStatus::default()
        }],
        ..Status::default()
    }
}

#[test]
fn processes_that_start_or_leave_are_shown() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    let mut status = crowd(3);
    let mut show = |browser: &mut Browser, processes: Option<ProcessesStatus>, text: &str| {
        status.pools[0].processes = processes;
        pretend(browser, &status);
        browser.wait_true(&format!("!!{}[0]?.[3]?.endsWith({text:?})", rows("pools")));
    };
    show(&mut browser, None, "3 active");
    let mut processes = ProcessesStatus { wanted: 3, active: 3, ..ProcessesStatus::default() };
    show(&mut browser, Some(processes.clone()), "3 active");
    (processes.starting, processes.leaving) = (1, 2);
    let text = "3 active; 3 processes wanted, 1 starting, 2 leaving";
    show(&mut browser, Some(processes.clone()), text);
    processes.crash_loop = true;
    show(&mut browser, Some(processes), &format!("{text}, crash loop"));
}

#[test]
fn a_thousand_workers_stay_usable() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    pretend(&mut browser, &crowd(1000));
    let count = "document.querySelectorAll('#workers > tr').length";
    browser.wait_true(&format!("{count} === 100"));
    let shown = browser.text("document.getElementById('shown').innerText");
    assert_eq!(shown, "100 of 1,000: those that are not active, then the busiest");
    let summary = cells(&mut browser, "pools");
    assert_eq!(summary[0][3], "999 active, 1 suspect");
    assert_eq!(summary[0][5], "0, 249.5, 499");
    assert!(cells(&mut browser, "workers").iter().any(|row| row[1].ends_with("suspect")));
    // Workers are found by name among all workers.
    let look_for = |what: &str| {
        format!(
            "(() => {{ const field = document.getElementById('filter'); field.value = '{what}';
               field.dispatchEvent(new Event('input')); return true; }})()"
        )
    };
    browser.value(&look_for("NEEDLE"));
    assert_eq!(browser.value(count), 1);
    browser.value(&look_for(""));
    browser.value("document.getElementById('order').value = 'load', document.getElementById('order').dispatchEvent(new Event('input'))");
    let loads: Vec<u64> = cells(&mut browser, "workers")
        .iter()
        .map(|row| digits(row[2].split(" of ").next().unwrap()))
        .collect();
    assert!(loads.is_sorted_by(|a, b| a >= b) && loads[0] == 499, "{loads:?}");
    browser.value("document.getElementById('all').click()");
    browser.wait_true(&format!("{count} === 1000"));
    assert_eq!(browser.complaints, [] as [Value; 0]);
}

#[test]
fn load_bars_are_visible_for_any_maximum() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    for (loads, maximum, wanted) in [
        // No worker is near its maximum: the bars show relative load.
        ([100, 50, 0], u32::MAX, [0.8, 0.4, 0.0]),
        ([3, 2, 1], 10_000_000, [0.8, 0.533, 0.267]),
        // One worker is near its maximum: the bars show the used share.
        ([100, 50, 0], 110, [0.909, 0.455, 0.0]),
        ([100, 100, 100], 100, [1.0, 1.0, 1.0]),
        ([0, 0, 0], 100, [0.0, 0.0, 0.0]),
    ] {
        let mut status = crowd(3);
        for (worker, load) in status.pools[0].workers.iter_mut().zip(loads) {
            (worker.load, worker.max_connections) = (load, maximum);
        }
        pretend(&mut browser, &status);
        wait_until("the bars to be that long", || {
            let shown = bars(&mut browser).into_iter().map(|[live, ..]| live);
            let near = |(shown, wanted)| near("bar", shown, wanted, 0.02).is_ok();
            shown.len() == 3 && shown.zip(wanted).all(near)
        });
    }
}

#[test]
fn rates_are_of_what_the_last_answers_counted() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (_dispatcher, _door) = idle(&mut browser);
    let mut status = crowd(3);
    status.pools.push(PoolStatus { name: "other".to_owned(), ..status.pools[0].clone() });
    // One second passes between two answers, independent of the clock of the machine.
    let json = serde_json::to_string(&status).unwrap();
    browser.value(&format!(
        "{{ const status = {json}, every = [[40, 10, 0], [2, 2, 0.5]]; let seconds = 0;
           status.pools[1].workers.forEach((worker) => worker.id += 10);
           performance.now = () => seconds * 1000;
           globalThis.fetch = async () => {{
             seconds += 1;
             status.pools.forEach((pool, p) => pool.workers.forEach((worker, w) => worker.sent = every[p][w] * seconds * 2));
             return Response.json(status);
           }}; }}"
    ));
    let column = |browser: &mut Browser, body, column: usize| -> Vec<String> {
        cells(browser, body).into_iter().map(|mut row| row.swap_remove(column)).collect()
    };
    wait_until("the rates of the workers", || {
        column(&mut browser, "workers", 3) == ["80.0", "20.0", "0.0", "4.0", "4.0", "1.0"]
    });
    assert_eq!(column(&mut browser, "pools", 6), ["100.0", "9.0"]);
    // Bars compare the workers of a pool.
    wait_until("the bars to be that long", || {
        let shown = bars(&mut browser).into_iter().map(|[_, _, rate]| rate);
        let wanted = [1.0, 0.25, 0.0, 1.0, 1.0, 0.25];
        shown.zip(wanted).all(|(shown, wanted)| near("bar", shown, wanted, 0.01).is_ok())
    });
    browser.value("document.getElementById('order').value = 'rate', document.getElementById('order').dispatchEvent(new Event('input'))");
    assert_eq!(column(&mut browser, "workers", 3), ["80.0", "20.0", "4.0", "4.0", "1.0", "0.0"]);
    assert_eq!(browser.complaints, [] as [Value; 0]);
}

#[test]
fn the_page_polls_only_while_visible() {
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let (dispatcher, _door) = idle(&mut browser);
    wait_equal(&mut browser, &dispatcher);
    // Counts the requests of the page.
    browser.value(
        "(() => { const ask = globalThis.fetch; globalThis.asked = 0;
           globalThis.fetch = (...all) => { globalThis.asked += 1; return ask(...all); }; return true; })()",
    );
    browser.wait_true("asked >= 2");
    let quiet = |browser: &mut Browser| {
        // Pending requests end first; then several rounds.
        browser.value(
            "(async () => { const wait = (ms) => new Promise((done) => setTimeout(done, ms));
               await wait(1000); const before = asked; await wait(5000); return asked - before; })()",
        )
    };
    browser.press("Tab");
    browser.press("Tab");
    browser.press("Enter");
    assert_eq!(
        browser.text("document.getElementById('pause').getAttribute('aria-pressed')"),
        "true"
    );
    assert_eq!(quiet(&mut browser), 0);
    browser.press("Enter");
    browser.wait_true("globalThis.asked > 0 && (globalThis.mark ??= asked, asked > mark)");
    let hide = |yes: bool| {
        format!(
            "Object.defineProperty(document, 'hidden', {{ value: {yes}, configurable: true }}),
             document.dispatchEvent(new Event('visibilitychange'))"
        )
    };
    browser.value(&hide(true));
    assert_eq!(quiet(&mut browser), 0);
    browser.value("globalThis.mark = asked");
    browser.value(&hide(false));
    browser.wait_true("asked > mark");
    assert_eq!(browser.complaints, [] as [Value; 0]);
}

#[test]
fn the_content_security_policy_blocks_other_scripts() {
    let (dispatcher, _) = start_one_pool("");
    let whole = |path: &str| {
        let mut stream = UnixStream::connect(dispatcher.admin()).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let (first, second) = (whole("/"), whole("/"));
    let nonce = |text: &str| {
        let (_, rest) = text.split_once("script-src 'nonce-").expect("a policy");
        let nonce = rest.split('\'').next().unwrap().to_owned();
        assert_eq!(text.matches(&format!("nonce=\"{nonce}\"")).count(), 2, "script and style");
        assert!(nonce.len() >= 22 && !text.contains("nonce=\"NONCE\""));
        nonce
    };
    assert_ne!(nonce(&first), nonce(&second));
    let head = first.split("\r\n\r\n").next().unwrap().to_ascii_lowercase();
    for part in [
        "content-type: text/html; charset=utf-8",
        "default-src 'none'",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "x-content-type-options: nosniff",
    ] {
        assert!(head.contains(part), "{part}: {head}");
    }
    assert!(!head.contains("unsafe"));
    // No external assets, and no function that turns text into markup.
    for word in [
        "http:",
        "https:",
        "//cdn",
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
    ] {
        assert!(!first.contains(word), "{word}");
    }
    // No script runs without the nonce.
    let Some(shared) = Browser::shared() else { return };
    let mut browser = Browser::take(&shared);
    let door = Door::open(dispatcher.admin());
    browser.open(&door.url);
    browser.wait_true("document.getElementById('about').innerText.includes('pid')");
    browser.value(
        "(() => { const script = document.createElement('script'); script.textContent = 'globalThis.hit = 1';
           document.body.append(script);
           const cell = document.createElement('div'); cell.innerHTML = '<img src=x onerror=\"globalThis.hit = 1\">';
           document.body.append(cell); return true; })()",
    );
    assert_eq!(browser.value("globalThis.hit === undefined"), true);
    let forbidden = |complaint: &Value| complaint.to_string().contains("Content Security Policy");
    assert!(!browser.complaints.is_empty() && browser.complaints.iter().all(forbidden));
}
