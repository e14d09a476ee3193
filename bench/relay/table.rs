//! Medians with their spread, and ratios made in each round.

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Latency, in µs.
    pub p50: f64,
    /// Latency, in µs.
    pub p99: f64,
    /// Messages a second.
    pub rate: f64,
}

/// The measurements of a contender, one for each round.
#[derive(Debug, Default)]
pub struct Samples(pub Vec<Figures>);

fn spread(mut values: Vec<f64>, digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (first, last) = (values[0], values[values.len() - 1]);
    let median = values[values.len() / 2];
    format!("{median:.digits$} [{first:.digits$}–{last:.digits$}]")
}

/// Prints a table. `base` is the contender to which ratios are made.
pub fn print(size: usize, names: &[(&str, &str)], samples: &[Samples], base: usize) {
    println!("\n| {size} B | p50 µs | p99 µs | thousand/s | p50 ratio | p99 ratio | rate ratio |");
    println!("|---|---|---|---|---|---|---|");
    for ((_, name), own) in names.iter().zip(samples) {
        let column =
            |of: fn(&Figures) -> f64, digits| spread(own.0.iter().map(of).collect(), digits);
        let ratio = |of: fn(&Figures) -> f64| {
            let pairs = own.0.iter().zip(&samples[base].0);
            spread(pairs.map(|(own, base)| of(own) / of(base)).collect(), 2)
        };
        println!(
            "| {name} | {} | {} | {} | {} | {} | {} |",
            column(|it| it.p50, 1),
            column(|it| it.p99, 0),
            column(|it| it.rate / 1000.0, 1),
            ratio(|it| it.p50),
            ratio(|it| it.p99),
            ratio(|it| it.rate),
        );
    }
}
