//! The distributions of the first round as bars, for the README: light and dark, without fonts of
//! its own.

use std::fmt::Write;

use super::websockets::{CLIENTS, Distribution, evenness};

const WIDTH: usize = 760;
const LEFT: usize = 250;
const BARS: usize = 420;
const BAR: usize = 14;
const ROW: usize = 18;

pub fn picture(all: &[Distribution]) -> String {
    let most = all.iter().flat_map(|it| &it.rounds[0]).copied().max().unwrap_or(1).max(1);
    let length =
        |count: u64| BARS * usize::try_from(count).unwrap() / usize::try_from(most).unwrap();
    let mut body = String::new();
    let mut y = 44;
    for (at, distribution) in all.iter().enumerate() {
        let class = if at == 0 { "even" } else { "other" };
        let middle = y + 2 * ROW - 8;
        let _ = writeln!(
            body,
            "<text x=\"{}\" y=\"{middle}\" text-anchor=\"end\">{}</text>\n\
             <text x=\"{}\" y=\"{}\" text-anchor=\"end\" class=\"small\">max/mean {:.2}</text>",
            LEFT - 14,
            distribution.name,
            LEFT - 14,
            middle + 18,
            evenness(&distribution.rounds[0])
        );
        for count in &distribution.rounds[0] {
            let width = length(*count).max(1);
            let _ = writeln!(
                body,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width}\" height=\"{BAR}\" rx=\"2\" \
                 class=\"{class}\"/>\n<text x=\"{}\" y=\"{}\" class=\"small\">{count}</text>",
                LEFT + width + 6,
                y + 12
            );
            y += ROW;
        }
        y += ROW;
    }
    // Where all bars would end if each process had the same number.
    let mean = CLIENTS as u64 / all.first().map_or(1, |it| it.rounds[0].len().max(1) as u64);
    let mean_x = LEFT + length(mean);
    let end = y - ROW;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" \
         width=\"{WIDTH}\" height=\"{y}\" role=\"img\" font-family=\"sans-serif\" \
         font-size=\"14\">\n\
         <title>{CLIENTS} WebSockets on four processes</title>\n\
         <style>text{{fill:#1f2328}}.small{{font-size:12px;fill:#59636e}}\
         .even{{fill:#1a7f37}}.other{{fill:#8c959f}}.mean{{stroke:#59636e}}\
         @media(prefers-color-scheme:dark){{text{{fill:#f0f6fc}}.small{{fill:#9198a1}}\
         .even{{fill:#3fb950}}.other{{fill:#6e7681}}.mean{{stroke:#9198a1}}}}</style>\n\
         <text x=\"14\" y=\"18\" class=\"small\">connections of each of four processes; {CLIENTS} \
         WebSockets that came one after the other</text>\n\
         {body}<path d=\"M{mean_x} 34V{end}\" class=\"mean\" stroke-dasharray=\"3 4\"/>\n\
         <text x=\"{mean_x}\" y=\"{}\" text-anchor=\"middle\" class=\"small\">{mean} each</text>\n\
         </svg>\n",
        end + 16
    )
}
