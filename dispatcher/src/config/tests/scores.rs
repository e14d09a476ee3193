//! `[pool.NAME.scores]`.

use super::*;
use dispatcher_core::{Policy, Scores};

fn scored(lines: &str) -> String {
    format!("{GOOD}policy = \"least-score\"\n[pool.web.scores]\n{lines}\n")
}

#[track_caller]
fn scores_refused(line: &str, message: &str, help: &str) {
    refused(&scored(line), message, help);
}

fn scores(text: &str) -> Scores {
    let config = good(text);
    assert_eq!(config.warnings, []);
    assert_eq!(config.pools[0].settings.policy, Policy::LeastScore);
    config.pools[0].settings.scores.clone()
}

#[test]
fn connections_count_by_default() {
    for text in [format!("{GOOD}policy = \"least-score\"\n"), scored("")] {
        let scores = scores(&text);
        assert_eq!(scores, Scores::default());
        assert_eq!((scores.connections, scores.gauges.len()), (1.0, 0));
        assert_eq!((scores.valid_for, scores.interval), (Duration::from_secs(5), None));
    }
}

#[test]
fn multipliers_in_the_order_of_the_file() {
    let scores = scores(&scored(
        "multipliers = { queue_wait = 100, my.own = 0.5, off = 0, free_memory = -0.001, connections = 2 }\n\
         valid_for = \"3s\"\nmode = \"interval\"\ninterval = \"200ms\"",
    ).replace("my.own", "\"my.own\""));
    let gauges: Vec<_> = scores.gauges.iter().map(|g| (g.name.as_str(), g.multiplier)).collect();
    assert_eq!(gauges, [("queue_wait", 100.0), ("my.own", 0.5), ("free_memory", -0.001)]);
    assert_eq!(scores.connections, 2.0);
    assert_eq!(scores.valid_for, Duration::from_secs(3));
    assert_eq!(scores.interval, Some(Duration::from_millis(200)));
}

#[test]
fn a_pool_overrides_the_defaults_key_by_key() {
    let defaults = "[defaults]\npolicy = \"least-score\"\n[defaults.scores]\n\
                    multipliers = { sessions = 1 }\nvalid_for = \"9s\"\n";
    let first = scores(&format!("{defaults}{GOOD}"));
    assert_eq!((first.gauges.len(), first.valid_for), (1, Duration::from_secs(9)));
    let own = "[pool.web.scores]\nmultipliers = { queue_wait = 3, scheduled_jobs = 1 }\n";
    let second = scores(&format!("{defaults}{GOOD}{own}"));
    assert_eq!((second.gauges.len(), second.valid_for), (2, Duration::from_secs(9)));
}

#[test]
fn mistakes() {
    scores_refused("‹valid_fr› = \"1s\"", "unknown key `valid_fr`", "did you mean `valid_for`?");
    scores_refused("mode = ‹\"fres\"›", "unknown value `fres`", "did you mean `fresh`?");
    scores_refused("valid_for = ‹\"0s\"›", "must be at least \"1ms\"", "");
    scores_refused(
        "mode = \"interval\"\nvalid_for = ‹\"1s\"›",
        "`valid_for` must be longer than `interval`",
        "stale",
    );
    scores_refused(
        "mode = \"interval\"\ninterval = ‹\"5s\"›",
        "`valid_for` must be longer than `interval`",
        "",
    );
    scores_refused("multipliers = { x = ‹\"1\"› }", "wrong type", "");
    scores_refused("multipliers = { x = ‹nan› }", "must be from -1000000000 to 1000000000", "");
    scores_refused("multipliers = { x = ‹2e9› }", "must be from", "");
    scores_refused("multipliers = { x = ‹-inf› }", "must be from", "");
    scores_refused(
        "multipliers = { ‹\"two words\"› = 1 }",
        "not a name for a gauge",
        "1 to 48 ASCII letters",
    );
    let many: Vec<String> = (0..24).map(|n| format!("g{n} = 1")).collect();
    scores_refused(
        &format!("multipliers = {{ {}, ‹one_more› = 1 }}", many.join(", ")),
        "more than 24 gauges",
        "",
    );
    pool_refused(
        "‹multipliers› = {}",
        "unknown key `multipliers`",
        "belongs in [pool.NAME.scores]",
    );
}

#[track_caller]
fn warned(text: &str, message: &str, help: &str) {
    let warnings = good(text).warnings;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let said = warnings[0].to_string();
    assert!(said.contains(message) && said.contains(help), "{said}");
}

#[test]
fn options_without_effect_are_warnings() {
    warned(
        &format!("{GOOD}[pool.web.scores]\n"),
        "`scores` has no effect with this policy",
        "least-score",
    );
    warned(&scored("interval = \"1s\""), "`interval` has no effect in this mode", "interval");
    warned(
        &scored("multipliers = { queue_wiat = 1 }"),
        "`queue_wiat` is not a predefined gauge",
        "did you mean `queue_wait`?",
    );
    warned(&scored("multipliers = { conections = 1 }"), "`conections`", "`connections`");
    warned(&scored("multipliers = { connections = 0 }"), "all multipliers are zero", "");
}
