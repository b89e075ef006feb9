//! The copied memory of the clones of a template by their age.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::units::Bytes;

/// Most parts of the longest age.
const MAX_STEPS: u64 = 24;

/// Copied memory of a clone at one age.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measurement {
    /// Number of the clone's process.
    pub identity: u64,
    /// Age in milliseconds.
    pub age_ms: u64,
    /// Copied template pages in RAM and in swap.
    pub copied: Bytes,
}

/// Copied memory of the clones in one span of ages. Each clone counts once, by its last measurement in the span.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GrowthStep {
    /// Youngest age, in milliseconds.
    pub from_ms: u64,
    /// First age that is no longer in the span.
    pub to_ms: u64,
    /// Number of clones that were measured in the span.
    pub clones: u64,
    /// Quantiles of the copied memory of these clones.
    #[serde(flatten)]
    pub copied: Quantiles,
}

/// Values of which 10, 50 and 90 of 100 clones have at most as much (nearest rank).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Quantiles {
    pub p10_bytes: Bytes,
    pub p50_bytes: Bytes,
    pub p90_bytes: Bytes,
}

impl Quantiles {
    /// Returns the quantiles of these values; zeros without values.
    pub fn of(mut values: Vec<Bytes>) -> Quantiles {
        values.sort_unstable();
        Quantiles { p10_bytes: rank(&values, 1), p50_bytes: rank(&values, 5), p90_bytes: rank(&values, 9) }
    }
}

/// Returns the smallest of these sorted values that so many tenths of them do not exceed; zero without values.
fn rank<T: Copy + Default>(sorted: &[T], tenths: usize) -> T {
    let index = (sorted.len() * tenths).div_ceil(10).saturating_sub(1);
    sorted.get(index).copied().unwrap_or_default()
}

/// Divides the measurements of one template by age, into spans of equal length. Spans without a measurement are left out.
///
/// A span is as long as most times between two measurements of a clone. In shorter spans, different clones would be
/// measured, and their quantiles could not be compared.
pub fn growth(measurements: &[Measurement]) -> Vec<GrowthStep> {
    let Some(oldest) = measurements.iter().map(|m| m.age_ms).max() else { return Vec::new() };
    let width = (oldest / MAX_STEPS).max(usual_interval(measurements)) + 1;
    let mut steps: BTreeMap<u64, BTreeMap<u64, (u64, Bytes)>> = BTreeMap::new();
    for m in measurements {
        let last =
            steps.entry(m.age_ms / width).or_default().entry(m.identity).or_insert((m.age_ms, m.copied));
        if m.age_ms >= last.0 {
            *last = (m.age_ms, m.copied);
        }
    }
    let step = |(index, clones): (u64, BTreeMap<u64, (u64, Bytes)>)| GrowthStep {
        from_ms: index * width,
        to_ms: (index + 1) * width,
        clones: clones.len() as u64,
        copied: Quantiles::of(clones.into_values().map(|(_, copied)| copied).collect()),
    };
    steps.into_iter().map(step).collect()
}

/// Returns the time between two measurements of one clone that 9 of 10 do not exceed, in milliseconds; 0 if no clone was
/// measured twice.
fn usual_interval(measurements: &[Measurement]) -> u64 {
    let mut ages: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    measurements.iter().for_each(|m| ages.entry(m.identity).or_default().push(m.age_ms));
    let pairs = ages.values().flat_map(|ages| ages.windows(2));
    let mut intervals: Vec<u64> = pairs.map(|pair| pair[1].saturating_sub(pair[0])).collect();
    intervals.sort_unstable();
    rank(&intervals, 9)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: impl IntoIterator<Item = u64>) -> Vec<Bytes> {
        values.into_iter().map(Bytes::new).collect()
    }

    #[test]
    fn quantiles_are_values_that_occur() {
        let of = |values| {
            let q = Quantiles::of(values);
            [q.p10_bytes.get(), q.p50_bytes.get(), q.p90_bytes.get()]
        };
        assert_eq!(of(bytes([])), [0, 0, 0]);
        assert_eq!(of(bytes([7])), [7, 7, 7]);
        assert_eq!(of(bytes((1..=10).rev())), [1, 5, 9]);
        assert_eq!(of(bytes(1..=100)), [10, 50, 90]);
        assert_eq!(of(bytes([1, 2, 3])), [1, 2, 3]);
    }

    #[test]
    fn each_clone_counts_once_in_a_span() {
        let m = |identity, age_ms, copied| Measurement { identity, age_ms, copied: Bytes::new(copied) };
        let row = |step: &GrowthStep| (step.from_ms, step.to_ms, step.clones, step.copied.p50_bytes.get());
        let rows = |all: &[Measurement]| growth(all).iter().map(row).collect::<Vec<_>>();
        assert_eq!(
            rows(&[m(1, 0, 10), m(1, 5, 20), m(1, 9, 30), m(2, 3, 50), m(3, 239, 90)]),
            [(0, 10, 2, 30), (230, 240, 1, 90)]
        );
        // Clones of different ages are measured every 100 ms: each is in each span.
        let of = |identity, first| (0..10).map(move |n| m(identity, first + n * 100, n));
        let both: Vec<Measurement> = of(1, 0).chain(of(2, 50)).collect();
        assert!(growth(&both).iter().take(9).all(|step| step.clones == 2), "{:?}", growth(&both));
        assert_eq!(growth(&[]), []);
        assert_eq!(growth(&[m(1, 0, 5)]).len(), 1);
    }
}
