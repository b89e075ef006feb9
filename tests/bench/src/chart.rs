//! Draws a row as horizontal bars: the medians, with lines from the smallest to the largest sample.

use std::fmt::Write;

use stencilfs::units::approximate;

use crate::model::Row;
use crate::report::quantity;

const WIDTH: f64 = 760.0;
const BAR: f64 = 18.0;
const STEP: f64 = 26.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 130.0;
const TOP: f64 = 34.0;

/// Colours for light and for dark backgrounds; the background is the page's.
const STYLE: &str = "text{font:13px sans-serif;fill:#24292f}.bar{fill:#4078c0}.other{fill:#9aa4af}\
                     .spread{stroke:#24292f;stroke-width:1.5}\
                     @media(prefers-color-scheme:dark){text{fill:#d0d7de}.bar{fill:#58a6ff}.other{fill:#6e7681}\
                     .spread{stroke:#d0d7de}}";

/// Draws one metric of a row. Subjects without it are left out. Those in `others` are floors and peers.
pub fn draw(row: &Row, metric: &str, others: &[&str]) -> String {
    let bars: Vec<_> =
        row.subjects.iter().filter_map(|subject| Some((&subject.name, subject.summary(metric)?))).collect();
    let most = bars.iter().map(|(_, summary)| summary.most).fold(f64::MIN_POSITIVE, f64::max);
    let length = |value: f64| value / most * (WIDTH - LEFT - RIGHT);
    let height = TOP + STEP * approximate(bars.len() as u64) + 8.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\">\n<style>{STYLE}</style>\n<text x=\"8\" y=\"20\">{}: {}</text>\n",
        escaped(&row.name),
        escaped(metric)
    );
    for (place, (name, summary)) in (0..).zip(&bars) {
        let y = TOP + STEP * approximate(place);
        let (end, middle) = (LEFT + length(summary.most), y + BAR / 2.0);
        let class = if others.contains(&name.as_str()) { "other" } else { "bar" };
        // Writing to a string does not fail.
        let _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n\
             <rect class=\"{class}\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\"/>\n\
             <line class=\"spread\" x1=\"{:.1}\" y1=\"{middle:.1}\" x2=\"{end:.1}\" y2=\"{middle:.1}\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
            LEFT - 8.0,
            y + 14.0,
            escaped(name),
            length(summary.median),
            LEFT + length(summary.least),
            end + 8.0,
            y + 14.0,
            escaped(&quantity(metric, summary.median)),
        );
    }
    out + "</svg>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{bench, subject};

    /// The names of open elements must match those of closed ones, and text must have no other markup.
    fn assert_well_formed(text: &str) {
        let mut open = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('<') {
            assert!(!before.contains('>'), "{before}");
            for entity in before.split('&').skip(1) {
                assert!(["amp;", "lt;", "gt;", "quot;"].iter().any(|e| entity.starts_with(e)), "{entity}");
            }
            let (tag, after) = after.split_once('>').expect("an element that does not end");
            assert!(!tag.contains('<'), "{tag}");
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "{text}");
            } else if !tag.ends_with('/') {
                open.push(tag.split(' ').next().unwrap());
            }
            rest = after;
        }
        assert!(open.is_empty(), "{open:?}");
        assert_eq!(rest, "\n");
    }

    #[test]
    fn a_drawing_is_well_formed_and_has_a_bar_for_each_subject() {
        let mut row = bench(vec![
            subject("<ours> & \"more\"", &[1.0, 2.0, 4.0]),
            subject("floor", &[1.0, 1.0, 1.0]),
            subject("unmeasured", &[]),
        ])
        .rows
        .remove(0);
        row.name = "a & b < c".into();
        let text = draw(&row, "seconds", &["floor"]);
        assert_well_formed(&text);
        assert_eq!(text.matches("<rect ").count(), 2);
        assert!(text.contains("class=\"other\""));
        // The largest sample takes the whole width, the median of the same subject half of it.
        assert!(text.contains("width=\"220.0\"") && text.contains("x2=\"630.0\""), "{text}");
        assert!(text.contains("prefers-color-scheme:dark"));
        assert_well_formed(&draw(&bench(vec![]).rows[0], "seconds", &[]));
    }
}
