//! Reads the content of the status page from its document and compares it with the JSON.

use dispatcher::api::status::Status;

use crate::browser::Browser;

/// The cells of a table on the page, by row.
pub fn rows(body: &str) -> String {
    format!(
        "[...document.querySelectorAll('#{body} > tr')].map((row) => [...row.children].map((cell) => cell.innerText.trim()))"
    )
}

pub fn cells(browser: &mut Browser, body: &str) -> Vec<Vec<String>> {
    serde_json::from_value(browser.value(&rows(body))).unwrap()
}

/// The digits of a formatted number.
pub fn digits(text: &str) -> u64 {
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("no number: {text:?}"))
}

/// A number with at most one decimal, in the page's format.
pub fn decimal(text: &str) -> f64 {
    text.replace(',', "").parse().unwrap_or_else(|_| panic!("no number: {text:?}"))
}

pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, shown: T, said: T) -> Result<(), String> {
    (shown == said).then_some(()).ok_or_else(|| format!("{what}: {shown:?} and not {said:?}"))
}

/// Compares numbers that the page rounds, or that are measured in pixels.
pub fn near(what: &str, shown: f64, said: f64, within: f64) -> Result<(), String> {
    let near = (shown - said).abs() <= within;
    near.then_some(()).ok_or_else(|| format!("{what}: {shown} and not {said}"))
}

/// The line of accepted connections: a point for each second, the last one at the right edge, the
/// most at the top.
pub fn chart_equals(browser: &mut Browser, said: &[u64]) -> Result<(), String> {
    let (peak, latest) = (said.iter().max().unwrap_or(&0), said.last().unwrap_or(&0));
    let parts = browser.value(
        "['peak', 'latest', 'chart-text'].map((id) => document.getElementById(id).textContent)
           .concat([...document.querySelectorAll('#chart path')].map((path) => path.getAttribute('d')))",
    );
    let [most, now, text, area, line]: [String; 5] = serde_json::from_value(parts).unwrap();
    same("points", line.split('L').count(), said.len())?;
    same("most per second", most, format!("most {peak}"))?;
    same("this second", now, format!("now {latest}"))?;
    let mean = said.iter().sum::<u64>() as f64 / said.len() as f64;
    let words = format!("{latest} in the last second; at most {peak}, on average ");
    let (average, rest) = text.strip_prefix(&words).ok_or(text.clone())?.split_once(',').unwrap();
    near("average", decimal(average), mean, 0.051)?;
    same("seconds", digits(rest) as usize, said.len())?;
    let points = line.strip_prefix('M').ok_or("no line")?.split('L');
    for (i, (point, &count)) in points.zip(said).enumerate() {
        let (x, y) = point.split_once(',').unwrap();
        same("second", digits(x) as usize, 300 - said.len() + i)?;
        near("height", decimal(y), 98.0 - count as f64 / (*peak).max(1) as f64 * 94.0, 0.051)?;
    }
    same("area", area, format!("{line}L299,100L{},100Z", 300 - said.len()))
}

/// How much of its place each bar fills: connections taken, those in flight, rate.
pub fn bars(browser: &mut Browser) -> Vec<[f64; 3]> {
    let bars = browser.value(
        "[...document.querySelectorAll('#workers > tr')].map((row) => [...row.querySelectorAll('.bar i')]
           .map((bar) => bar.getBoundingClientRect().width / bar.parentElement.clientWidth))",
    );
    serde_json::from_value(bars).unwrap()
}

/// Whether the page shows exactly this.
pub fn equals(browser: &mut Browser, status: &Status) -> Result<(), String> {
    let about = browser.text("document.getElementById('about').innerText");
    if !about.starts_with(&format!("{}, pid {}, up ", status.version, status.pid)) {
        return Err(format!("nothing of this dispatcher is shown yet: {about}"));
    }
    // First, because it changes every second.
    chart_equals(browser, &status.accepted_per_second)?;
    let workers =
        || status.pools.iter().flat_map(|pool| pool.workers.iter().map(move |w| (pool, w)));
    for (tile, said) in [
        ("accepted", status.accepted),
        ("queued", status.queued),
        ("in-flight", status.in_flight),
        ("taken", status.taken),
        ("closed", status.closed.values().sum()),
        ("live", workers().map(|(_, worker)| worker.load).sum()),
    ] {
        let shown = browser.text(&format!("document.getElementById('{tile}').innerText"));
        same(tile, digits(&shown), said)?;
    }
    let conserved = browser.text("document.getElementById('conserved').innerText");
    same("conserved", conserved.starts_with('✓'), true)?;
    let closed = cells(browser, "closed");
    same("reasons", closed.len(), status.closed.len())?;
    for ((reason, count), row) in status.closed.iter().zip(&closed) {
        assert_eq!(row[0], reason.replace('_', " "));
        same(reason, digits(&row[1]), *count)?;
    }
    let listeners = cells(browser, "listeners");
    same("listeners", listeners.len(), status.listeners.len())?;
    for (listener, row) in status.listeners.iter().zip(&listeners) {
        assert_eq!(row[..3], [&*listener.name, &*listener.address, &*listener.pool]);
        same(&listener.name, row[3].ends_with(&listener.state), true)?;
        same(&listener.name, digits(&row[4]), listener.accepted)?;
        same(&listener.name, digits(&row[5]), listener.closed.values().sum())?;
    }
    let pools = cells(browser, "pools");
    same("pools", pools.len(), status.pools.len())?;
    for (pool, row) in status.pools.iter().zip(&pools) {
        let loads: Vec<u64> = pool.workers.iter().map(|worker| worker.load).collect();
        assert_eq!((&*row[0], &*row[2]), (&*pool.name, &*pool.policy));
        if !row[1].ends_with(&pool.state) {
            return Err(format!("{row:?} and not {}", pool.state));
        }
        let total: u64 = loads.iter().sum();
        same(&pool.name, digits(&row[4]), total)?;
        same(&pool.name, digits(&row[7]), pool.workers.iter().map(|w| w.in_flight).sum())?;
        same(&pool.name, digits(&row[8]), pool.queued)?;
        let Some(least) = loads.iter().min() else {
            same("an empty pool", [&*row[3], &*row[5]], ["none", "–"])?;
            continue;
        };
        let even: Vec<f64> = row[5].split(", ").map(decimal).collect();
        same(
            "least and most",
            [even[0], even[2]],
            [*least, *loads.iter().max().unwrap()].map(|n| n as f64),
        )?;
        near("mean", even[1], total as f64 / loads.len() as f64, 0.051)?;
        let mut states = std::collections::BTreeMap::new();
        pool.workers.iter().for_each(|w| *states.entry(&*w.state).or_insert(0) += 1);
        let shown = row[3].split(", ").map(|part| part.split_once(' ').unwrap());
        let shown = shown.map(|(count, state)| (state, digits(count)));
        same("states", shown.collect(), states)?;
    }
    let shown = cells(browser, "workers");
    same("workers", shown.len(), workers().count())?;
    for (((pool, worker), row), bar) in workers().zip(&shown).zip(bars(browser)) {
        let who = format!("{} {}, id {}, pid {}", worker.name, pool.name, worker.id, worker.pid);
        if row[0] != who || !row[1].ends_with(&worker.state) {
            return Err(format!("{row:?} and not {who} {}", worker.state));
        }
        let (load, most) = row[2].split_once(" of ").unwrap();
        same("maximum", digits(most), worker.max_connections.into())?;
        for (shown, said) in [
            (load, worker.load),
            (&*row[4], worker.in_flight),
            (&*row[5], worker.weight.into()),
            (&*row[6], worker.taken),
            (&*row[7], worker.revoked),
        ] {
            same(&who, digits(shown), said)?;
        }
        let most = pool.workers.iter().map(|worker| worker.load).max().unwrap_or(0).max(1) as f64;
        let full = (most * 1.25).min(worker.max_connections.into()).max(1.0);
        near("bar", bar[0], (worker.load - worker.in_flight) as f64 / full, 0.01)?;
        near("bar of in flight", bar[1], worker.in_flight as f64 / full, 0.01)?;
    }
    let faults = browser.value(
        "[...document.querySelectorAll('#faults > li')].map((row) => [row.querySelector('time').dateTime, row.textContent])",
    );
    let faults: Vec<[String; 2]> = serde_json::from_value(faults).unwrap();
    same("faults", faults.len(), status.faults.len())?;
    for ([time, text], fault) in faults.iter().zip(status.faults.iter().rev()) {
        same("time", time, &fault.time)?;
        let times = match (fault.count > 1, fault.ongoing) {
            (true, false) => format!(" ({} times)", fault.count),
            (true, true) => format!(" ({} times, ongoing)", fault.count),
            (false, true) => " (ongoing)".to_owned(),
            (false, false) => String::new(),
        };
        let kind = fault.kind.replace('_', " ");
        let said = format!(" {kind} {}: {}{times}", fault.subject, fault.text);
        same(&fault.kind, text.ends_with(&said), true)
            .map_err(|_| format!("{text} and not {said}"))?;
    }
    Ok(())
}
