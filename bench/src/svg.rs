//! The chart: for each case the ratios to the first baseline, as bars with the spread of the
//! rounds.

use std::fmt::Write;

use crate::load::Metrics;
use crate::report::{Ratio, ratios};
use crate::work::Case;

const WIDTH: f64 = 960.0;
const LABELS: f64 = 230.0;
const ROW: f64 = 20.0;
const BARS: f64 = WIDTH - LABELS - 90.0;

/// The cases that have ratios, one below the other.
pub fn chart<'a>(cases: impl Iterator<Item = (&'a Case, &'a [Vec<Metrics>])>) -> String {
    let mut body = String::new();
    let mut y = 10.0;
    for (case, results) in cases {
        let rows: Vec<(&str, Ratio)> = case
            .variants
            .iter()
            .enumerate()
            .filter_map(|(at, variant)| {
                let ratio = ratios(case, case.main, results, at).into_iter().next()?;
                Some((variant.label.as_str(), ratio))
            })
            .collect();
        if !rows.is_empty() {
            y = draw(&mut body, case, &rows, y);
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn draw(body: &mut String, case: &Case, rows: &[(&str, Ratio)], mut y: f64) -> f64 {
    let top = rows.iter().map(|(_, ratio)| ratio.max).fold(1.0, f64::max) * 1.05;
    let x = |value: f64| LABELS + (value / top) * BARS;
    let title = escape(&format!("{}: {}, ratio {}", case.title, case.main.label, rows[0].1.to));
    let _ = writeln!(body, "<text x=\"10\" y=\"{}\" font-weight=\"bold\">{title}</text>", y + 14.0);
    y += 24.0;
    let bottom = y + rows.len() as f64 * ROW;
    for (label, Ratio { median, min, max, .. }) in rows {
        let color = if label.starts_with("dispatcher") || label.contains("workers") {
            "#2b6cb0"
        } else {
            "#a0aec0"
        };
        let middle = y + ROW / 2.0;
        let _ = writeln!(
            body,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LABELS}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{color}\"/>\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle}\" y2=\"{middle}\" stroke=\"black\" stroke-width=\"1.5\"/>\
             <text x=\"{:.1}\" y=\"{}\">{median:.2}</text>",
            LABELS - 8.0,
            middle + 4.0,
            escape(label),
            y + 3.0,
            x(*median) - LABELS,
            ROW - 6.0,
            x(*min),
            x(*max),
            x(*max) + 6.0,
            middle + 4.0,
        );
        y += ROW;
    }
    let one = x(1.0);
    let _ = writeln!(
        body,
        "<line x1=\"{one:.1}\" x2=\"{one:.1}\" y1=\"{}\" y2=\"{bottom}\" stroke=\"#c53030\" stroke-dasharray=\"4 3\"/>",
        y - rows.len() as f64 * ROW
    );
    bottom + 18.0
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    #[test]
    fn markup_is_escaped() {
        assert_eq!(super::escape("a<b & c"), "a&lt;b &amp; c");
    }
}
