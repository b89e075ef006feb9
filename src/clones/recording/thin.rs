//! Which samples of a full recording are kept.

use std::time::Duration;

use super::sample::Time;

/// A sample in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// Offset of the line.
    pub start: u64,
    /// Length of the line, with its line feed.
    pub length: u64,
    /// Time of the sample.
    pub time: Time,
}

/// Returns which lines to keep, so that they take at most `limit` bytes: the first, the last, and lines between them at
/// even distances in time. If even the first and the last take more, only these are kept.
///
/// Dropping every second line would halve the early samples again each time: a long recording would keep few of its
/// first day.
pub fn keep(lines: &[Line], limit: u64) -> Vec<Line> {
    // Steps back of the wall clock count as no time.
    let steps = lines.windows(2).map(|pair| pair[1].time.since(pair[0].time));
    let span: Duration = steps.sum();
    let intervals = u32::try_from(lines.len().saturating_sub(1)).unwrap_or(u32::MAX).max(1);
    let mut distance = (span / intervals).max(Duration::from_millis(1));
    loop {
        distance = distance.saturating_mul(2);
        let kept = at_distance(lines, distance);
        if kept.len() <= 2 || kept.iter().map(|line| line.length).sum::<u64>() <= limit {
            return kept;
        }
    }
}

/// Returns the first line, the last line, and between them each line that is this much later than the one kept before.
fn at_distance(lines: &[Line], distance: Duration) -> Vec<Line> {
    let mut kept: Vec<Line> = lines.first().copied().into_iter().collect();
    let mut passed = Duration::ZERO;
    for (index, pair) in lines.windows(2).enumerate() {
        passed += pair[1].time.since(pair[0].time);
        if passed >= distance || index + 2 == lines.len() {
            kept.push(pair[1]);
            passed = Duration::ZERO;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(times: &[i64]) -> Vec<Line> {
        times.iter().map(|ms| Line { start: 0, length: 10, time: Time(*ms) }).collect()
    }

    fn kept(times: &[i64], limit: u64) -> Vec<i64> {
        keep(&lines(times), limit).iter().map(|line| line.time.0).collect()
    }

    #[test]
    fn distances_become_even() {
        assert_eq!(kept(&[0, 10, 20, 30, 40, 50, 60], 40), [0, 20, 40, 60]);
        assert_eq!(kept(&[0, 10, 20, 30, 40, 50], 40), [0, 20, 40, 50]);
        // The early samples were thinned before.
        assert_eq!(kept(&[0, 40, 80, 90, 100, 110, 120], 40), [0, 40, 80, 120]);
        assert_eq!(kept(&[0, 10, 20, 30, 40, 50, 60], 20), [0, 60]);
        assert_eq!(kept(&[0, 10, 20], 0), [0, 20]);
        assert_eq!(kept(&[5], 0), [5]);
        assert!(kept(&[], 0).is_empty());
    }

    proptest! {
        #[test]
        fn keeps_both_ends_and_the_limit(times in prop::collection::vec(0..1_000_000_i64, 2..60), limit in 0..700_u64) {
            let all = lines(&times);
            let kept = keep(&all, limit);
            prop_assert_eq!(kept.first(), all.first());
            prop_assert_eq!(kept.last(), all.last());
            prop_assert!(kept.len() == 2 || kept.len() as u64 * 10 <= limit);
            // At least every second line goes, but for the last one.
            prop_assert!(kept.len() <= all.len() / 2 + 2);
        }
    }
}
