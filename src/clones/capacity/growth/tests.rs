//! Fits to measurements of invented clones.

use proptest::prelude::*;

use super::*;

const MIB: f64 = 1_048_576.0;

/// Random numbers with a fixed seed.
struct Random(u64);

impl Random {
    /// Returns a number from 0 to 1.
    fn uniform(&mut self) -> f64 {
        draw(&mut self.0, 1 << 30) as f64 / (1 << 30) as f64
    }

    /// Returns a number with mean 0 and standard deviation 1.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }
}

/// Clones whose memory grows along one curve. Clones differ by 10 %, and each measurement by 2 %.
struct Clones {
    mean: Mean,
    random: Random,
}

impl Clones {
    const DEVIATION: f64 = 0.10;

    fn new(mean: Mean, seed: u64) -> Clones {
        Clones { mean, random: Random(seed) }
    }

    fn factor(&mut self) -> f64 {
        1.0 + Self::DEVIATION * self.random.normal()
    }

    /// Measures `count` clones ten times each, until this age.
    fn measured(&mut self, count: usize, oldest: f64) -> Vec<Sample> {
        self.measured_often(count, oldest, 10)
    }

    /// Measures `count` clones so many times each, until this age.
    fn measured_often(&mut self, count: usize, oldest: f64, times: u32) -> Vec<Sample> {
        let mut samples = Vec::new();
        for clone in 0..count {
            let factor = self.factor();
            for step in 1..=times {
                let age_seconds = oldest * f64::from(step) / f64::from(times);
                let noise = 1.0 + 0.02 * self.random.normal();
                samples.push(Sample { clone, age_seconds, bytes: (self.mean)(age_seconds) * factor * noise });
            }
        }
        samples
    }

    /// Returns the mean memory of `count` other clones of this age.
    fn further(&mut self, count: usize, age: f64) -> f64 {
        let factors: f64 = (0..count).map(|_| self.factor()).sum();
        (self.mean)(age) * factors / count as f64
    }
}

fn constant(_age: f64) -> f64 {
    3.0 * MIB
}

fn saturating(age: f64) -> f64 {
    MIB + 4.0 * MIB * (1.0 - (-age / 20.0).exp())
}

fn square_root(age: f64) -> f64 {
    MIB + 0.4 * MIB * age.sqrt()
}

fn linear(age: f64) -> f64 {
    0.5 * MIB + 0.05 * MIB * age
}

/// Memory by age in seconds.
type Mean = fn(f64) -> f64;

const SHAPES: [(Mean, Shape); 4] = [
    (constant, Shape::Constant),
    (saturating, Shape::Saturating),
    (square_root, Shape::SquareRoot),
    (linear, Shape::Linear),
];

/// Returns in how many of 100 cases per shape the truth lies in the interval, and the widest half of an interval relative
/// to its estimate.
fn cases(measured: usize, further: usize, oldest: f64, age: f64) -> Vec<(Shape, usize, f64)> {
    let mut results = Vec::new();
    for (mean, shape) in SHAPES {
        let (mut inside, mut widest) = (0, 0f64);
        for seed in 0..100 {
            let mut clones = Clones::new(mean, 1000 + seed);
            let growth = Growth::of(&clones.measured(measured, oldest), age).unwrap();
            let interval = growth.of_further(further as f64);
            let truth = clones.further(further, age);
            inside += usize::from((interval.lower..=interval.upper).contains(&truth));
            widest = widest.max((interval.upper - interval.lower) / 2.0 / interval.estimate);
        }
        results.push((shape, inside, widest));
    }
    results
}

#[test]
fn the_truth_lies_in_at_least_95_percent_of_the_intervals() {
    // Measured clones, further clones, greatest measured age, age in question, and how wide half of an interval may be.
    for (measured, further, oldest, age, most) in
        [(20, 40, 100.0, 100.0, 0.12), (6, 12, 100.0, 60.0, 0.5), (20, 40, 100.0, 150.0, 0.5)]
    {
        for (shape, inside, widest) in cases(measured, further, oldest, age) {
            println!("{shape:?} of {measured} clones, age {age}: {inside} of 100 inside, {widest}");
            assert!(inside >= 95, "{shape:?} of {measured} clones, age {age}: {inside} of 100 inside");
            assert!(widest <= most, "{shape:?} of {measured} clones, age {age}: {widest}");
        }
    }
}

#[test]
fn other_curves_lie_in_the_intervals_however_often_clones_are_measured() {
    let power: Mean = |age| MIB + 0.2 * MIB * age.powf(0.7);
    let logarithm: Mean = |age| MIB + MIB * (1.0 + age / 5.0).ln();
    for (name, mean) in [("power", power), ("logarithm", logarithm)] {
        for times in [10, 360] {
            let is_inside = |seed: u64| {
                let mut clones = Clones::new(mean, 2000 + seed);
                let growth = Growth::of(&clones.measured_often(20, 100.0, times), 400.0).unwrap();
                let interval = growth.of_further(40.0);
                (interval.lower..=interval.upper).contains(&clones.further(40, 400.0))
            };
            let inside = (0..100).filter(|seed| is_inside(*seed)).count();
            println!("{name}, {times} samples of each clone: {inside} of 100 inside");
            assert!(inside >= 95, "{name}, {times} samples of each clone: {inside} of 100 inside");
        }
    }
}

#[test]
fn recognizes_each_shape_without_noise() {
    for (mean, shape) in SHAPES {
        let samples: Vec<Sample> = (1..=50)
            .map(|step| f64::from(step) * 2.0)
            .map(|age_seconds| Sample { clone: 0, age_seconds, bytes: mean(age_seconds) })
            .collect();
        let growth = Growth::of(&samples, 100.0).unwrap();
        assert_eq!(growth.curve.shape(), shape);
        let error = growth.curve.at(80.0) / mean(80.0) - 1.0;
        assert!(error.abs() < 0.02, "{shape:?}: {error}");
    }
}

#[test]
fn each_age_may_come_from_another_clone() {
    let mut clones = Clones::new(square_root, 7);
    let samples: Vec<Sample> = (1..=40)
        .map(|clone| {
            let age_seconds = clone as f64 * 2.5;
            Sample { clone, age_seconds, bytes: square_root(age_seconds) * clones.factor() }
        })
        .collect();
    let Interval { lower, upper, .. } = Growth::of(&samples, 100.0).unwrap().mean;
    assert!((lower..=upper).contains(&square_root(100.0)), "{lower} to {upper}");
    assert!(upper - lower < 0.3 * square_root(100.0), "{lower} to {upper}");
}

#[test]
fn equal_ages_exclude_no_growth_at_greater_ages() {
    let at = |clone, bytes| Sample { clone, age_seconds: 10.0, bytes };
    let samples: Vec<Sample> = (0..20).map(|clone| at(clone, 2.0 * MIB)).collect();
    let mean = Growth::of(&samples, 40.0).unwrap().mean;
    assert!(mean.lower <= 2.0 * MIB && mean.upper >= 8.0 * MIB, "{mean:?}");
    let mean = Growth::of(&samples, 10.0).unwrap().mean;
    assert!((mean.upper - mean.lower) / mean.estimate < 1e-6, "{mean:?}");
}

#[test]
fn one_clone_gives_a_wide_interval_and_none_gives_no_interval() {
    let sample = Sample { clone: 0, age_seconds: 5.0, bytes: 100.0 };
    let mean = Growth::of(&[sample], 5.0).unwrap().mean;
    assert_eq!((mean.lower, mean.estimate, mean.upper), (50.0, 100.0, 200.0));
    assert_eq!(Growth::of(&[], 5.0), None);
}

#[test]
fn fewer_further_clones_vary_more() {
    let growth = Growth::of(&Clones::new(constant, 3).measured(20, 10.0), 10.0).unwrap();
    let width = |count| growth.of_further(count).upper - growth.of_further(count).lower;
    assert!(width(2.0) > 2.0 * width(1000.0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_measurements_give_ordered_finite_bounds(
        samples in prop::collection::vec((0usize..8, 0.0..1e7f64, 0.0..1e12f64), 1..40),
        age in 0.0..1e8f64,
    ) {
        let samples: Vec<Sample> = samples
            .into_iter()
            .map(|(clone, age_seconds, bytes)| Sample { clone, age_seconds, bytes })
            .collect();
        let growth = Growth::of(&samples, age).unwrap();
        let interval = growth.of_further(3.0);
        prop_assert!(interval.upper.is_finite());
        prop_assert!(0.0 <= interval.lower && interval.lower <= interval.estimate && interval.estimate <= interval.upper);
    }
}
