//! The memory of one clone as a function of its age: a curve that is fitted to measurements, and its uncertainty.
//!
//! The curve is `base + rise × f(age)` with a function `f` that never falls and never steepens: clones write what they
//! have not written before more and more rarely. Shape, base and rise follow from least squares over all measurements.
//! The uncertainty follows from a bootstrap: the fit is repeated for clones that are drawn with repetition from the
//! measured ones. Whole clones are drawn, because the measurements of one clone are not independent of each other.

use serde::Serialize;

use crate::units::approximate;

/// Memory of one clone at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Number of the clone. Samples of one clone have the same number.
    pub clone: usize,
    /// Time since the start of the clone.
    pub age_seconds: f64,
    /// Memory that the clone takes alone.
    pub bytes: f64,
}

/// How the memory of a clone grows with its age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// It does not grow.
    Constant,
    /// It approaches a limit: `1 − exp(−age / τ)`.
    Saturating,
    /// It grows with the square root of the age.
    SquareRoot,
    /// It grows evenly.
    Linear,
}

impl Shape {
    /// Returns the shape in words.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Constant => "no growth",
            Shape::Saturating => "growth to a limit",
            Shape::SquareRoot => "growth with the square root of the age",
            Shape::Linear => "even growth",
        }
    }

    fn parameters(self) -> u64 {
        match self {
            Shape::Constant => 1,
            Shape::SquareRoot | Shape::Linear => 2,
            Shape::Saturating => 3,
        }
    }
}

/// A number between two bounds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Interval {
    /// Lower bound.
    pub lower: f64,
    /// Most likely value.
    pub estimate: f64,
    /// Upper bound.
    pub upper: f64,
}

impl Interval {
    /// Returns the interval with these bounds around the estimate; bounds on its wrong side are moved to it.
    pub fn new(lower: f64, estimate: f64, upper: f64) -> Interval {
        Interval { lower: lower.min(estimate), estimate, upper: upper.max(estimate) }
    }
}

/// Number of draws of the bootstrap.
const DRAWS: usize = 400;

/// Share of the draws beyond each bound. The interval has a nominal confidence of 98 %: with few clones and a curve that
/// is chosen by the measurements themselves, more than 95 % remain.
const TAIL: f64 = 0.01;

/// With fewer clones than this, the bootstrap says little about shapes.
const FEW_CLONES: usize = 5;

/// Shapes whose Akaike criterion is worse by more, for one sample of each clone, are not plausible.
const PLAUSIBLE: f64 = 10.0;

/// Number of time constants of [`Shape::Saturating`], from 2 % to twice the largest age.
const TIME_CONSTANTS: u32 = 19;

/// The function of a shape. Ages are in units of the largest measured age.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Function {
    shape: Shape,
    /// Time constant of [`Shape::Saturating`].
    tau: f64,
}

impl Function {
    fn all() -> Vec<Function> {
        let plain = [Shape::Constant, Shape::SquareRoot, Shape::Linear];
        let step = 100f64.powf(1.0 / f64::from(TIME_CONSTANTS - 1));
        let saturating = (0..TIME_CONSTANTS)
            .map(|index| Function { shape: Shape::Saturating, tau: 0.02 * step.powi(index.cast_signed()) });
        plain.into_iter().map(|shape| Function { shape, tau: 1.0 }).chain(saturating).collect()
    }

    fn at(self, age: f64) -> f64 {
        match self.shape {
            Shape::Constant => 0.0,
            Shape::Saturating => 1.0 - (-age / self.tau).exp(),
            Shape::SquareRoot => age.sqrt(),
            Shape::Linear => age,
        }
    }
}

/// A fitted curve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Curve {
    function: Function,
    /// Largest measured age, in seconds.
    oldest: f64,
    base: f64,
    rise: f64,
}

impl Curve {
    /// Returns the memory of a clone of this age.
    pub fn at(&self, age_seconds: f64) -> f64 {
        self.base + self.rise * self.function.at(age_seconds / self.oldest)
    }

    /// Returns the shape of the curve.
    pub fn shape(&self) -> Shape {
        if self.rise > 0.0 { self.function.shape } else { Shape::Constant }
    }
}

/// Sums over samples from which least squares follow: of ones, bytes and squared bytes, and for each function of the
/// function's value, its square and its product with bytes.
#[derive(Debug, Clone, Default)]
struct Sums {
    count: f64,
    y: f64,
    yy: f64,
    of_functions: Vec<[f64; 3]>,
}

impl Sums {
    fn empty(functions: usize) -> Sums {
        Sums { of_functions: vec![[0.0; 3]; functions], ..Sums::default() }
    }

    fn add_sample(&mut self, functions: &[Function], age: f64, y: f64) {
        self.count += 1.0;
        self.y += y;
        self.yy += y * y;
        for (sums, function) in self.of_functions.iter_mut().zip(functions) {
            let x = function.at(age);
            for (sum, term) in sums.iter_mut().zip([x, x * x, x * y]) {
                *sum += term;
            }
        }
    }

    fn add(&mut self, other: &Sums) {
        self.count += other.count;
        self.y += other.y;
        self.yy += other.yy;
        for (sums, others) in self.of_functions.iter_mut().zip(&other.of_functions) {
            sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
        }
    }

    /// Returns base and rise, both at least 0, with the least squared error, and this error.
    fn solve(&self, function: usize) -> (f64, f64, f64) {
        let Sums { count, y, yy, .. } = *self;
        let [x, xx, xy] = self.of_functions[function];
        let spread = count * xx - x * x;
        let rise = (count * xy - x * y) / spread;
        let (base, rise) = if spread <= 1e-9 * count * xx || rise <= 0.0 {
            (y / count, 0.0)
        } else if y < rise * x {
            (0.0, xy / xx)
        } else {
            ((y - rise * x) / count, rise)
        };
        let error = yy - 2.0 * (base * y + rise * xy)
            + base * base * count
            + 2.0 * base * rise * x
            + rise * rise * xx;
        // Rounding errors of the sums are of this size.
        (base, rise, error.max(1e-12 * yy))
    }
}

/// The samples of each clone as sums.
struct Fit {
    functions: Vec<Function>,
    oldest: f64,
    clones: Vec<Sums>,
}

impl Fit {
    fn new(samples: &[Sample], oldest: f64) -> Fit {
        let functions = Function::all();
        let count = samples.iter().map(|sample| sample.clone + 1).max().unwrap_or(0);
        let mut clones = vec![Sums::empty(functions.len()); count];
        for sample in samples {
            clones[sample.clone].add_sample(&functions, sample.age_seconds / oldest, sample.bytes);
        }
        clones.retain(|sums| sums.count > 0.0);
        Fit { functions, oldest, clones }
    }

    /// Returns the best curve of each function through these clones, with its Akaike criterion.
    fn curves(&self, clones: impl Iterator<Item = usize>) -> impl Iterator<Item = (f64, Curve)> {
        let mut all = Sums::empty(self.functions.len());
        clones.for_each(|index| all.add(&self.clones[index]));
        self.functions.iter().enumerate().map(move |(index, function)| {
            let (base, rise, error) = all.solve(index);
            let criterion = all.count * (error / all.count).max(f64::MIN_POSITIVE).ln()
                + 2.0 * approximate(function.shape.parameters());
            (criterion, Curve { function: *function, oldest: self.oldest, base, rise })
        })
    }

    fn best(&self, clones: impl Iterator<Item = usize>) -> Option<(f64, Curve)> {
        self.curves(clones).min_by(|one, other| one.0.total_cmp(&other.0))
    }
}

/// The memory of a clone at one age, from measurements of other clones.
#[derive(Debug, Clone, PartialEq)]
pub struct Growth {
    /// The fitted curve.
    pub curve: Curve,
    /// Mean memory of a clone of the wanted age.
    pub mean: Interval,
    /// Standard deviation between clones, as a share of the mean.
    deviation: f64,
    /// Number of measured clones.
    pub clones: usize,
    /// Largest measured age, in seconds.
    pub oldest_seconds: f64,
    /// Whether the largest measured age is less than twice the smallest.
    pub ages_are_equal: bool,
}

impl Growth {
    /// Fits a curve to the samples, and reads off the memory at an age. Returns `None` without samples.
    pub fn of(samples: &[Sample], age_seconds: f64) -> Option<Growth> {
        if samples.is_empty() {
            return None;
        }
        // A clone has lived for some time before it can be measured.
        let ages = || samples.iter().map(|sample| sample.age_seconds);
        let oldest = ages().fold(1e-3, f64::max);
        let fit = Fit::new(samples, oldest);
        let count = fit.clones.len();
        let (criterion, curve) = fit.best(0..count)?;
        let estimate = curve.at(age_seconds);
        let deviation = deviation(samples, &curve, count);
        let (below, above) = bootstrap(&fit, age_seconds, estimate);
        // The quantiles of few clones vary by chance: never narrower than the interval of a mean.
        let of_mean = t_quantile(count) * deviation * estimate / approximate(count as u64).sqrt();
        let (mut lower, mut upper) = (estimate - below.max(of_mean), estimate + above.max(of_mean));
        let ages_are_equal = oldest < 2.0 * ages().fold(f64::INFINITY, f64::min);
        if age_seconds > oldest * 1.01 {
            // The samples of a clone depend on each other: together they say about as much about shapes as one.
            let per_clone = approximate(samples.len() as u64) / approximate(count as u64);
            let limit = if count < FEW_CLONES { f64::INFINITY } else { PLAUSIBLE * per_clone };
            for (other, curve) in fit.curves(0..count) {
                if other - criterion <= limit {
                    lower = lower.min(curve.at(age_seconds));
                    upper = upper.max(curve.at(age_seconds));
                }
            }
            // Without different ages, no shape can be excluded: from no growth at all to even growth since the start.
            if ages_are_equal {
                let now = curve.at(oldest);
                lower = lower.min(now);
                upper = upper.max(now * age_seconds / oldest);
            }
        }
        if count == 1 {
            // The difference between clones is unknown.
            lower = lower.min(estimate / 2.0);
            upper = upper.max(estimate * 2.0);
        }
        Some(Growth {
            curve,
            mean: Interval::new(lower.max(0.0), estimate, upper),
            deviation,
            clones: count,
            oldest_seconds: oldest,
            ages_are_equal,
        })
    }

    /// Returns the mean memory of `count` further clones of the wanted age. The fewer they are, the more their mean
    /// varies.
    pub fn of_further(&self, count: f64) -> Interval {
        let Interval { lower, estimate, upper } = self.mean;
        let chance = t_quantile(self.clones) * self.deviation * estimate / count.max(1.0).sqrt();
        let below = (estimate - lower).hypot(chance);
        Interval::new((estimate - below).max(0.0), estimate, estimate + (upper - estimate).hypot(chance))
    }
}

/// Returns how far the memory at an age may lie below and above the estimate, because other clones would have been
/// measured.
fn bootstrap(fit: &Fit, age_seconds: f64, estimate: f64) -> (f64, f64) {
    let count = fit.clones.len();
    if count < 2 {
        return (0.0, 0.0);
    }
    // The seed is fixed: the same measurements give the same figures.
    let mut random = 0x5DEE_CE66_u64;
    let mut values: Vec<f64> = (0..DRAWS)
        .filter_map(|_| {
            let drawn: Vec<usize> = (0..count).map(|_| draw(&mut random, count)).collect();
            Some(fit.best(drawn.into_iter())?.1.at(age_seconds))
        })
        .collect();
    values.sort_unstable_by(f64::total_cmp);
    let tail = crate::units::to_usize(crate::units::whole(approximate(values.len() as u64) * TAIL));
    let (low, high) = (values[tail], values[values.len() - 1 - tail]);
    // A bootstrap over few clones is too narrow: the spread lacks a degree of freedom, and its tails are too light.
    let clones = approximate(count as u64);
    let widening = (clones / (clones - 1.0)).sqrt() * t_quantile(count) / T_NORMAL;
    ((estimate - low).max(0.0) * widening, (high - estimate).max(0.0) * widening)
}

fn draw(state: &mut u64, count: usize) -> usize {
    // SplitMix64.
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    crate::units::to_usize(z % count as u64)
}

/// The 99 % quantile of the normal distribution.
const T_NORMAL: f64 = 2.33;

/// Returns the 99 % quantile of Student's t distribution for a mean over `clones` clones.
fn t_quantile(clones: usize) -> f64 {
    const SMALL: [f64; 10] = [31.821, 6.965, 4.541, 3.747, 3.365, 3.143, 2.998, 2.896, 2.821, 2.764];
    let degrees = clones.saturating_sub(1).max(1);
    SMALL.get(degrees - 1).copied().unwrap_or_else(|| T_NORMAL + 4.4 / approximate(degrees as u64))
}

/// Returns the standard deviation between clones: of the ratio of a clone's memory to the curve.
fn deviation(samples: &[Sample], curve: &Curve, clones: usize) -> f64 {
    if clones < 2 {
        return 0.0;
    }
    let count = samples.iter().map(|sample| sample.clone + 1).max().unwrap_or(0);
    let mut sums = vec![(0.0, 0.0); count];
    for sample in samples {
        let (measured, fitted) = &mut sums[sample.clone];
        *measured += sample.bytes;
        *fitted += curve.at(sample.age_seconds);
    }
    let squares: f64 = sums
        .iter()
        .filter(|(_, fitted)| *fitted > 0.0)
        .map(|(measured, fitted)| (measured / fitted - 1.0).powi(2))
        .sum();
    (squares / approximate(clones as u64 - 1)).sqrt()
}

#[cfg(test)]
mod tests;
