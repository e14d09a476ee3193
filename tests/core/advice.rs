//! Advice in virtual time: hosts with a dispatcher each, and clients that follow their answers.

use std::time::Duration;

use simulator::advice::AdvisedWorld;

const WORLD: AdvisedWorld = AdvisedWorld {
    hosts: 4,
    interval: Duration::from_secs(1),
    connects_in: Duration::from_millis(50),
    session: Duration::from_secs(10),
};

/// The largest deviation from the mean, as a part of it.
fn unevenness(figures: &[f64]) -> f64 {
    let mean = figures.iter().sum::<f64>() / figures.len() as f64;
    figures.iter().map(|figure| (figure - mean).abs() / mean).fold(0.0, f64::max)
}

#[test]
fn a_thousand_requests_in_one_interval_are_spread_over_equal_hosts() {
    for askable in [1, 2, 4] {
        let mut worst = 0.0_f64;
        for seed in 0..50 {
            let loads = WORLD.one_interval(seed, 1_000, askable);
            let got: Vec<f64> = loads.got.iter().map(|&count| count as f64).collect();
            assert_eq!(loads.got.iter().sum::<u64>(), 1_000);
            worst = worst.max(unevenness(&got));
        }
        println!("{askable} dispatchers asked: at most {:.1} % from even", worst * 100.0);
        assert!(worst <= 0.10, "{askable} dispatchers asked: {worst}");
    }
}

#[test]
fn a_host_that_returns_has_its_share_again() {
    for hosts in [2, 3, 5] {
        for seed in 0..8 {
            let world = AdvisedWorld { hosts, ..WORLD };
            let loads = world.after_a_failure(seed, 20);
            let uneven = unevenness(&loads.mean);
            println!("{hosts} hosts, seed {seed}: {:.1} % from even, {:?}", uneven * 100.0, loads);
            assert!(uneven <= 0.10, "{hosts} hosts, seed {seed}: {loads:?}");
        }
    }
}
