//! Sorted lists of ranges that do not overlap: addresses, offsets or pages.

use std::ops::Range;

/// Sorts ranges and joins those that touch or overlap.
pub fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Returns the parts of the sorted `ranges` that are in none of the sorted `others`.
pub fn subtract(ranges: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::with_capacity(ranges.len());
    for range in ranges {
        let mut start = range.start;
        let first = others.partition_point(|other| other.end <= range.start);
        for other in others[first..].iter().take_while(|other| other.start < range.end) {
            if start < other.start {
                left.push(start..other.start);
            }
            start = start.max(other.end);
        }
        if start < range.end {
            left.push(start..range.end);
        }
    }
    left
}

/// Returns the parts of the sorted `ranges` that are in one of the sorted `others`.
pub fn intersect(ranges: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut common = Vec::new();
    for range in ranges {
        let first = others.partition_point(|other| other.end <= range.start);
        let others = others[first..].iter().take_while(|other| other.start < range.end);
        common.extend(others.map(|other| other.start.max(range.start)..other.end.min(range.end)));
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_and_subtracts_ranges() {
        assert_eq!(joined(vec![20..30, 0..5, 5..8, 25..27]), [0..8, 20..30]);
        let ranges = [0..10, 20..30, 40..50];
        assert_eq!(subtract(&ranges, &[]), ranges);
        assert_eq!(subtract(&ranges, &[5..25, 28..29, 50..60]), [0..5, 25..28, 29..30, 40..50]);
        #[expect(clippy::single_range_in_vec_init, reason = "a list of one range is meant")]
        let everything = [0..100];
        assert_eq!(subtract(&ranges, &everything), []);
        assert_eq!(intersect(&ranges, &[5..25, 28..29, 50..60]), [5..10, 20..25, 28..29]);
        assert_eq!(intersect(&ranges, &everything), ranges);
        assert_eq!(intersect(&ranges, &[10..20, 30..40]), []);
    }
}
