//! The goals, and what the samples say about them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use stencilfs::error::{Error, Result};

use crate::model::{Bench, Row};

/// Smallest number of rounds of a row that measures times.
const MIN_ROUNDS: usize = 5;
/// Rows that may have fewer rounds: two count bytes, and `floors` only compares programs.
const ONCE: [&str; 3] = ["disk", "disk-scattered", "floors"];
/// Rows that a complete run has.
const ROWS: [&str; 23] = [
    "first-byte",
    "verification",
    "hydration",
    "sequential",
    "sequential-zeros",
    "random-20000",
    "random-zeros",
    "random-advised",
    "warm",
    "warm-huge",
    "disk",
    "disk-scattered",
    "launch",
    "density",
    "import-lz4",
    "import-zstd",
    "resume-firecracker-1",
    "resume-firecracker-8",
    "resume-firecracker-64",
    "resume-qemu-1",
    "resume-qemu-8",
    "resume-qemu-64",
    "floors",
];
/// Largest distance of the bound of a miss from the measured ratio, as a factor.
const SLACK: f64 = 1.5;

/// The file of goals.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Goals {
    /// The number of rounds that a row needs at least.
    pub rounds: usize,
    /// Rows that need one round only, because they count bytes.
    pub once: BTreeSet<String>,
    pub goals: Vec<Goal>,
}

/// A limit of one ratio.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Goal {
    pub row: String,
    pub subject: String,
    /// The subject whose median divides that of `subject`. Without it the median itself is limited.
    #[serde(default)]
    pub against: Option<String>,
    /// A number of the samples, or the quotient of two.
    pub metric: String,
    #[serde(default)]
    pub at_most: Option<f64>,
    #[serde(default)]
    pub at_least: Option<f64>,
    /// Set while the goal is not met.
    #[serde(default)]
    pub missed: Option<Missed>,
}

/// How far a goal is missed, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Missed {
    /// Limit that holds instead: a miss may not grow.
    pub bound: f64,
    pub because: String,
}

impl Goals {
    pub fn read(path: &Path) -> Result<Goals> {
        let failed = |cause: &dyn std::fmt::Display| {
            Error::failed(format!("cannot read the goals in {}: {cause}", path.display()))
        };
        let text = fs::read(path).map_err(|e| failed(&e))?;
        let goals: Goals = serde_json::from_slice(&text).map_err(|e| failed(&e))?;
        match goals.rounds >= MIN_ROUNDS && goals.once.iter().all(|row| ONCE.contains(&row.as_str())) {
            true => Ok(goals),
            false => Err(failed(&format!(
                "fewer than {MIN_ROUNDS} rounds, or a row in 'once' that needs all rounds"
            ))),
        }
    }

    /// The goals that the samples do not meet, and marks of missed goals that are not needed.
    pub fn problems(&self, bench: &Bench) -> Vec<String> {
        self.goals.iter().filter_map(|goal| goal.problem(bench).err()).collect()
    }

    /// The problems of one row with twice the distance to each limit, by the number of the goal. For short measurements,
    /// in which only ratios count.
    pub fn gross_problems(&self, row: &Row) -> BTreeMap<usize, String> {
        let of_row = |goal: &&Goal| goal.row == row.name && goal.against.is_some();
        let goals = self.goals.iter().enumerate().filter(|(_, goal)| of_row(goal));
        goals.filter_map(|(number, goal)| Some((number, goal.gross_problem(row).err()?))).collect()
    }

    /// Rows that are missing in the samples or have no goal.
    pub fn missing_rows(&self, bench: &Bench) -> Vec<String> {
        let is_complete =
            |row: &&&str| bench.row(row).is_some() && self.goals.iter().any(|goal| goal.row == **row);
        ROWS.iter()
            .filter(|row| !is_complete(row))
            .map(|row| format!("{row}: no samples or no goal"))
            .collect()
    }

    /// Faults of the samples that do not depend on goals: missing rounds, missing inputs.
    pub fn problems_of_samples(&self, bench: &Bench) -> Vec<String> {
        let mut found = Vec::new();
        let mut names = BTreeSet::new();
        for row in &bench.rows {
            let needed = if self.once.contains(&row.name) { 1 } else { self.rounds };
            if !names.insert(&row.name) {
                found.push(format!("{}: the row occurs twice", row.name));
            }
            if !bench.inputs.iter().any(|input| input.name == row.input) {
                found.push(format!("{}: no input '{}'", row.name, row.input));
            }
            let first = row.subjects.first().and_then(|subject| subject.round_numbers());
            if first.as_ref().is_none_or(|rounds| rounds.len() < needed) {
                found.push(format!("{}: fewer than {needed} rounds", row.name));
            }
            for subject in &row.subjects {
                if subject.round_numbers() != first {
                    found.push(format!("{}: the rounds of {} differ", row.name, subject.name));
                }
            }
        }
        found
    }
}

impl Goal {
    /// The ratio that the goal limits.
    pub fn ratio(&self, row: &Row) -> Result<f64, String> {
        let median = |name: &str| {
            let subject =
                row.subject(name).ok_or_else(|| format!("{self}: the row has no subject '{name}'"))?;
            let summary = subject.summary(&self.metric);
            Ok::<_, String>(summary.ok_or_else(|| format!("{self}: {name} lacks {}", self.metric))?.median)
        };
        let ours = median(&self.subject)?;
        let ratio = match &self.against {
            Some(against) => ours / median(against)?,
            None => ours,
        };
        Some(ratio).filter(|r| r.is_finite()).ok_or_else(|| format!("{self}: division by zero"))
    }

    /// True if a ratio is within the limits.
    pub fn is_met(&self, ratio: f64) -> bool {
        self.at_most.is_none_or(|limit| ratio <= limit) && self.at_least.is_none_or(|limit| ratio >= limit)
    }

    fn problem(&self, bench: &Bench) -> Result<(), String> {
        let row = bench.row(&self.row).ok_or_else(|| format!("{self}: the row is missing"))?;
        if self.at_most.is_none() && self.at_least.is_none() {
            return Err(format!("{self}: the goal has no limit"));
        }
        let ratio = self.ratio(row)?;
        match (&self.missed, self.is_met(ratio)) {
            (None, true) => Ok(()),
            (None, false) => Err(format!("{self}: {ratio:.3} misses the goal")),
            (Some(_), true) => Err(format!("{self}: {ratio:.3} meets the goal: remove 'missed'")),
            (Some(missed), false) if self.exceeds(ratio, missed.bound) => {
                Err(format!("{self}: {ratio:.3} exceeds even the bound of the miss, {}", missed.bound))
            }
            (Some(missed), false) if self.is_loose(ratio, missed.bound) => Err(format!(
                "{self}: {ratio:.3} is far from the bound of the miss, {}: tighten the bound",
                missed.bound
            )),
            (Some(missed), false) if missed.because.trim().is_empty() => {
                Err(format!("{self}: a missed goal needs a reason"))
            }
            (Some(_), false) => Ok(()),
        }
    }

    /// True if a miss is larger than its bound, on the side of the limit that is missed.
    fn exceeds(&self, ratio: f64, bound: f64) -> bool {
        match self.at_most.is_some_and(|limit| ratio > limit) {
            true => ratio > bound,
            false => ratio < bound,
        }
    }

    /// True if the bound of a miss allows much more than was measured.
    fn is_loose(&self, ratio: f64, bound: f64) -> bool {
        match self.at_most.is_some_and(|limit| ratio > limit) {
            true => bound > ratio * SLACK,
            false => bound < ratio / SLACK,
        }
    }

    fn gross_problem(&self, row: &Row) -> Result<(), String> {
        let ratio = self.ratio(row)?;
        let bound = self.missed.as_ref().map(|missed| missed.bound);
        let most = self.at_most.map(|limit| 2.0 * bound.unwrap_or(limit).max(limit));
        let least = self.at_least.map(|limit| 0.5 * bound.unwrap_or(limit).min(limit));
        match most.is_none_or(|limit| ratio <= limit) && least.is_none_or(|limit| ratio >= limit) {
            true => Ok(()),
            false => Err(format!("{self}: {ratio:.3} is worse than half the goal")),
        }
    }
}

impl std::fmt::Display for Goal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} of {}", self.row, self.metric, self.subject)?;
        if let Some(against) = &self.against {
            write!(f, " to {against}")?;
        }
        if let Some(limit) = self.at_most {
            write!(f, ", at most {limit}")?;
        }
        if let Some(limit) = self.at_least {
            write!(f, ", at least {limit}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::model::tests::{bench, subject};

    /// A goal about the row `read`: `ours` to `floor`.
    pub fn goal(at_most: f64) -> Goal {
        Goal {
            row: "read".into(),
            subject: "ours".into(),
            against: Some("floor".into()),
            metric: "seconds".into(),
            at_most: Some(at_most),
            at_least: None,
            missed: None,
        }
    }

    pub fn goals(goals: Vec<Goal>) -> Goals {
        Goals { rounds: 3, once: BTreeSet::new(), goals }
    }

    /// The median of ours is 3 times that of the floor; means and single rounds would say something else.
    fn measured() -> Bench {
        bench(vec![subject("ours", &[3.0, 9.0, 3.0]), subject("floor", &[1.0, 1.0, 0.1])])
    }

    fn problem(goal: Goal) -> String {
        goals(vec![goal]).problems(&measured()).join("; ")
    }

    fn missed(bound: f64) -> Option<Missed> {
        Some(Missed { bound, because: "a reason".into() })
    }

    #[test]
    fn a_goal_compares_medians() {
        assert_eq!(problem(goal(3.0)), "");
        assert!(problem(goal(2.9)).contains("3.000 misses the goal"));
        assert_eq!(problem(Goal { at_most: None, at_least: Some(3.0), ..goal(0.0) }), "");
        assert!(problem(Goal { at_most: None, at_least: Some(3.1), ..goal(0.0) }).contains("misses"));
        assert!(problem(Goal { at_least: Some(3.1), ..goal(9.0) }).contains("misses"));
        assert_eq!(problem(Goal { against: None, ..goal(3.0) }), "");
        assert!(
            problem(Goal { metric: "seconds/round".into(), against: None, ..goal(2.9) }).contains("3.000")
        );
    }

    #[test]
    fn a_missed_goal_stays_within_its_bound_and_has_a_reason() {
        assert_eq!(problem(Goal { missed: missed(3.0), ..goal(2.0) }), "");
        assert!(problem(Goal { missed: missed(4.6), ..goal(2.0) }).contains("tighten the bound"));
        assert!(problem(Goal { missed: missed(2.9), ..goal(2.0) }).contains("exceeds even the bound"));
        let slow = Goal { at_most: None, at_least: Some(4.0), ..goal(0.0) };
        assert_eq!(problem(Goal { missed: missed(2.5), ..slow.clone() }), "");
        assert!(problem(Goal { missed: missed(3.5), ..slow }).contains("exceeds even the bound"));
        let silent = Some(Missed { bound: 4.0, because: " ".into() });
        assert!(problem(Goal { missed: silent, ..goal(2.0) }).contains("needs a reason"));
    }

    #[test]
    fn a_mark_of_a_miss_without_a_miss_is_a_problem() {
        assert!(problem(Goal { missed: missed(9.0), ..goal(3.0) }).contains("remove 'missed'"));
    }

    #[test]
    fn goals_about_nothing_are_problems() {
        assert!(problem(Goal { row: "write".into(), ..goal(9.0) }).contains("the row is missing"));
        assert!(problem(Goal { subject: "theirs".into(), ..goal(9.0) }).contains("no subject 'theirs'"));
        assert!(problem(Goal { against: Some("x".into()), ..goal(9.0) }).contains("no subject 'x'"));
        assert!(problem(Goal { metric: "bytes".into(), ..goal(9.0) }).contains("ours lacks bytes"));
        assert!(problem(Goal { at_most: None, ..goal(9.0) }).contains("no limit"));
        let still = bench(vec![subject("ours", &[1.0]), subject("floor", &[0.0])]);
        assert!(goals(vec![goal(1.0)]).problems(&still)[0].contains("division by zero"));
    }

    #[test]
    fn each_subject_needs_the_same_rounds() {
        let all = goals(vec![]);
        assert_eq!(all.problems_of_samples(&measured()), Vec::<String>::new());
        let few = bench(vec![subject("ours", &[1.0, 1.0])]);
        assert!(all.problems_of_samples(&few)[0].contains("fewer than 3 rounds"));
        let once = Goals { once: BTreeSet::from(["read".to_owned()]), ..goals(vec![]) };
        assert_eq!(once.problems_of_samples(&few), Vec::<String>::new());
        let odd = bench(vec![subject("ours", &[1.0; 3]), subject("floor", &[1.0; 4])]);
        assert!(all.problems_of_samples(&odd)[0].contains("the rounds of floor differ"));
        let mut twice = measured();
        twice.rows[0].subjects[1].samples[2].insert("round".into(), 1.into());
        assert!(all.problems_of_samples(&twice)[0].contains("the rounds of floor differ"));
        let mut other = measured();
        other.rows.push(other.rows[0].clone());
        other.inputs.clear();
        let found = all.problems_of_samples(&other).join("; ");
        assert!(found.contains("occurs twice") && found.contains("no input 'dense'"), "{found}");
        assert!(all.problems_of_samples(&bench(vec![]))[0].contains("fewer than 3 rounds"));
    }

    #[test]
    fn a_short_measurement_has_twice_the_distance() {
        let gross = |goal: Goal| goals(vec![goal]).gross_problems(&measured().rows[0]).len();
        assert_eq!((gross(goal(1.5)), gross(goal(1.4))), (0, 1));
        assert_eq!(gross(Goal { missed: missed(1.5), ..goal(1.0) }), 0);
        let least = |limit| Goal { at_most: None, at_least: Some(limit), ..goal(0.0) };
        assert_eq!((gross(least(6.0)), gross(least(6.1))), (0, 1));
        assert_eq!(gross(Goal { missed: missed(6.0), ..least(9.0) }), 0);
        assert_eq!(gross(Goal { row: "other".into(), ..goal(0.1) }), 0);
        assert_eq!(gross(Goal { against: None, ..goal(0.1) }), 0);
    }

    #[test]
    fn every_row_needs_samples_and_a_goal() {
        let found = goals(vec![goal(1.0)]).missing_rows(&measured());
        assert_eq!(found.len(), ROWS.len());
        assert!(found[0].contains("first-byte"), "{found:?}");
    }
}
