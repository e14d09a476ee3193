//! Memory and start time of forked workers beside workers that are started one by one.
//!
//! `TEST_ROUNDS` and `TEST_MIB` set the number of rounds and what the application loads; with
//! `--nocapture` the medians are printed.

use super::*;

use std::time::Duration;

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// What one dispatcher shows.
#[derive(Default)]
struct Figures {
    /// From the order for one more worker to its join.
    start: Vec<Duration>,
    /// KiB of each worker.
    proportional: Vec<u64>,
    resident: Vec<u64>,
    /// KiB of the workers and the parent together.
    total: Vec<u64>,
}

fn median<T: Ord + Copy>(values: &[T]) -> T {
    let mut values = values.to_vec();
    values.sort();
    values[values.len() / 2]
}

fn kib(pid: i32, line: &str) -> u64 {
    words(pid, "smaps_rollup", line)[0].parse().unwrap()
}

/// The time of the first line of the log with this text.
fn logged(dispatcher: &Dispatcher, text: &str) -> Duration {
    wait_for_log(dispatcher, text);
    let log = dispatcher.log();
    let line = log.lines().find(|line| line.contains(text)).unwrap();
    let time = line.split(' ').next().unwrap();
    let clock = time.split('T').nth(1).unwrap().trim_end_matches('Z');
    let parts: Vec<f64> = clock.split(':').map(|part| part.parse().unwrap()).collect();
    Duration::from_secs_f64(parts[0] * 3600.0 + parts[1] * 60.0 + parts[2])
}

fn measure(fork: bool, mib: usize, figures: &mut Figures) {
    let mode = if fork { "prefork" } else { "loaded" };
    let body = one_pool(&format!(
        "[pool.web.spawn]\ncommand = [\"DIR/test-worker\", {mode:?}, \"blocking\"]\nfork = {fork}\n\
         processes = 4\nenvironment = {{ TEST_TABLE = \"{mib}\" }}\n"
    ));
    let mut dispatcher = start(directory(), &body);
    dispatcher.wait_joined("web", 4);
    let all = pids(&dispatcher);
    figures.proportional.extend(all.iter().map(|&pid| kib(pid, "Pss:")));
    figures.resident.extend(all.iter().map(|&pid| kib(pid, "Rss:")));
    let parent = fork.then(|| parent(&dispatcher));
    figures.total.push(all.iter().copied().chain(parent).map(|pid| kib(pid, "Pss:")).sum());
    let output = run(&dispatcher, &["scale", "web", "5"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let ordered = logged(&dispatcher, "event=pool_scaled");
    let joined = logged(&dispatcher, "name=web-5");
    // A run across midnight shows nothing.
    figures.start.extend(joined.checked_sub(ordered));
    assert!(dispatcher.stop().success());
}

#[test]
fn forked_workers_share_what_was_loaded() {
    let (rounds, mib) = (setting("TEST_ROUNDS", 1), setting("TEST_MIB", 64));
    let (mut forked, mut started) = (Figures::default(), Figures::default());
    for _ in 0..rounds {
        measure(true, mib, &mut forked);
        measure(false, mib, &mut started);
    }
    let loaded = 1024 * mib as u64;
    for (name, figures) in [("fork", &forked), ("exec", &started)] {
        println!(
            "{name}: start {:?} of {}, Pss {} MiB, Rss {} MiB, 4 workers and parent {} MiB",
            median(&figures.start),
            figures.start.len(),
            median(&figures.proportional) / 1024,
            median(&figures.resident) / 1024,
            median(&figures.total) / 1024
        );
        assert!(figures.resident.iter().all(|&size| size > loaded), "{:?}", figures.resident);
    }
    // Five processes share the table; started one by one, each worker has its own.
    assert!(forked.proportional.iter().all(|&size| size < loaded / 2), "{:?}", forked.proportional);
    assert!(forked.total.iter().all(|&size| size < 2 * loaded), "{:?}", forked.total);
    assert!(started.proportional.iter().all(|&size| size > loaded), "{:?}", started.proportional);
}
