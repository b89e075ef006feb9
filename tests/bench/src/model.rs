//! The file of samples: measured values, and no value that can be computed from others.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Number;
use stencilfs::error::{Error, Result};

use crate::statistics::Summary;

/// All samples of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bench {
    /// Version of this format.
    pub schema: u32,
    /// Commit of the programs; ends with `+` if the work tree had other changes than results.
    pub commit: String,
    /// Time of the run, RFC 3339.
    pub date: String,
    pub host: Host,
    pub inputs: Vec<Input>,
    pub rows: Vec<Row>,
}

/// Where the run took place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    pub kernel: String,
    pub cpu: String,
    pub cpus: u64,
    pub memory_bytes: u64,
    /// File system and device of all files.
    pub file_system: String,
    /// Versions of the programs that are measured beside Stencil, by name.
    #[serde(default)]
    pub tools: BTreeMap<String, String>,
}

/// Data that was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    pub name: String,
    pub about: String,
    pub bytes: u64,
    /// BLAKE3 of the data.
    pub digest: String,
}

/// One operation, done by several subjects in turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    pub name: String,
    pub about: String,
    /// Name of the input.
    pub input: String,
    /// State of the caches before each sample.
    pub caches: String,
    /// Commit of the programs, if the row is of an earlier run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    pub subjects: Vec<Subject>,
}

/// One way to do the operation of a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    pub name: String,
    /// The command line that does it.
    pub command: String,
    /// Read-ahead of the file, where files are read and the kernel shows it.
    pub read_ahead_bytes: Option<u64>,
    pub samples: Vec<Sample>,
}

/// The numbers of one measurement. `round` is the number of the round, from 1.
pub type Sample = BTreeMap<String, Number>;

impl Bench {
    /// Adds the rows and inputs of an earlier run that this run does not have.
    pub fn keep_other_rows(&mut self, earlier: Bench) {
        let Bench { commit, inputs, rows, .. } = earlier;
        let mut new = std::mem::take(&mut self.rows);
        for mut row in rows {
            match new.iter().position(|own| own.name == row.name) {
                Some(index) => self.rows.push(new.remove(index)),
                None => {
                    if commit != self.commit {
                        row.commit.get_or_insert_with(|| commit.clone());
                    }
                    self.rows.push(row);
                }
            }
        }
        self.rows.append(&mut new);
        let others = inputs.into_iter().filter(|input| self.inputs.iter().all(|own| own.name != input.name));
        self.inputs.extend(others.collect::<Vec<_>>());
    }

    pub fn read(path: &Path) -> Result<Bench> {
        let failed = |cause: &dyn std::fmt::Display| {
            Error::failed(format!("cannot read the samples in {}: {cause}", path.display()))
        };
        let text = fs::read(path).map_err(|e| failed(&e))?;
        let bench: Bench = serde_json::from_slice(&text).map_err(|e| failed(&e))?;
        match bench.schema {
            1 => Ok(bench),
            other => Err(failed(&format_args!("schema {other}, expected 1"))),
        }
    }

    /// Replaces the file: an interrupted run leaves the earlier or the new file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let new = path.with_extension("json.new");
        fs::write(&new, self.to_text()?)
            .and_then(|()| fs::rename(&new, path))
            .map_err(|e| Error::io("cannot write the samples", path, e))
    }

    pub fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    /// The text of the file: one line a sample.
    pub fn to_text(&self) -> Result<String> {
        let failed = |e| Error::failed(format!("cannot write the samples: {e}"));
        let mut bare = self.clone();
        let mut samples = Vec::new();
        for subject in bare.rows.iter_mut().flat_map(|row| &mut row.subjects) {
            samples.push(std::mem::take(&mut subject.samples));
        }
        let text = serde_json::to_string_pretty(&bare).map_err(failed)?;
        let mut parts = text.split("\"samples\": []");
        let mut out = parts.next().unwrap_or_default().to_owned();
        for (part, samples) in parts.zip(&samples) {
            let lines: Vec<String> = samples
                .iter()
                .map(|sample| serde_json::to_string(sample).map(|line| format!("            {line}")))
                .collect::<std::result::Result<_, _>>()
                .map_err(failed)?;
            out += &format!("\"samples\": [\n{}\n          ]", lines.join(",\n"));
            out += part;
        }
        out.push('\n');
        Ok(out)
    }
}

impl Row {
    pub fn subject(&self, name: &str) -> Option<&Subject> {
        self.subjects.iter().find(|subject| subject.name == name)
    }
}

impl Subject {
    /// Median and spread of a metric: the name of a number of the samples, or the quotient of two, `a/b`. `None` if a
    /// sample lacks it.
    pub fn summary(&self, metric: &str) -> Option<Summary> {
        let values: Option<Vec<f64>> = self.samples.iter().map(|sample| value(sample, metric)).collect();
        Summary::of(&values?)
    }

    /// Returns the round numbers of the samples; `None` if a sample has no round number, or two samples have the same.
    pub fn round_numbers(&self) -> Option<BTreeSet<u64>> {
        let all: Option<BTreeSet<u64>> = self.samples.iter().map(|s| s.get("round")?.as_u64()).collect();
        all.filter(|all| all.len() == self.samples.len())
    }
}

/// The value of a metric in one sample.
fn value(sample: &Sample, metric: &str) -> Option<f64> {
    let number = |name: &str| sample.get(name)?.as_f64();
    match metric.split_once('/') {
        None => number(metric),
        Some((above, below)) => Some(number(above)? / number(below)?).filter(|v| v.is_finite()),
    }
}

/// Returns a fraction as the file stores it, with six significant digits: timers and counters are not more exact. `None`
/// for a value that is no number.
pub fn rounded(value: f64) -> Option<Number> {
    let text = format!("{value:.5e}");
    Number::from_f64(text.parse().unwrap_or(value))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A subject with these values of `seconds`.
    pub fn subject(name: &str, seconds: &[f64]) -> Subject {
        let sample = |(round, seconds): (u64, &f64)| {
            Sample::from([
                ("round".to_owned(), round.into()),
                ("seconds".to_owned(), rounded(*seconds).unwrap()),
            ])
        };
        let samples = (1..).zip(seconds).map(sample).collect();
        Subject { name: name.into(), command: format!("run {name}"), read_ahead_bytes: Some(4096), samples }
    }

    /// A run with one row.
    pub fn bench(subjects: Vec<Subject>) -> Bench {
        let row = Row {
            name: "read".into(),
            about: "Reads <all> of it".into(),
            input: "dense".into(),
            caches: "cold".into(),
            commit: None,
            subjects,
        };
        let host = Host {
            kernel: "6.18".into(),
            cpu: "a & b".into(),
            cpus: 2,
            memory_bytes: 1 << 30,
            file_system: "ext4 on /dev/vda".into(),
            tools: BTreeMap::new(),
        };
        let input = Input { name: "dense".into(), about: "files".into(), bytes: 4096, digest: "00".into() };
        Bench {
            schema: 1,
            commit: "abc".into(),
            date: "2025-01-01T00:00:00Z".into(),
            host,
            inputs: vec![input],
            rows: vec![row],
        }
    }

    #[test]
    fn a_run_of_some_rows_keeps_the_others_with_their_commit() {
        let named = |name: &str, commit: &str, value: f64| {
            let mut bench = bench(vec![subject("a", &[value])]);
            (bench.rows[0].name, bench.commit) = (name.to_owned(), commit.to_owned());
            bench
        };
        let mut old = named("first", "old", 1.0);
        old.rows.extend(named("second", "", 2.0).rows);
        old.inputs.push(Input { name: "guest".into(), ..old.inputs[0].clone() });
        let mut new = named("second", "new", 3.0);
        new.keep_other_rows(old);
        let rows: Vec<_> = new.rows.iter().map(|row| (row.name.as_str(), row.commit.as_deref())).collect();
        assert_eq!((rows, new.commit.as_str()), (vec![("first", Some("old")), ("second", None)], "new"));
        assert_eq!(new.rows[1].subjects[0].summary("seconds").unwrap().median, 3.0);
        let inputs: Vec<_> = new.inputs.iter().map(|input| input.name.as_str()).collect();
        assert_eq!(inputs, ["dense", "guest"]);
    }

    #[test]
    fn samples_are_written_one_a_line_and_read_back() {
        let written = bench(vec![subject("a", &[1.0, 2.5]), subject("b", &[]), subject("c", &[0.1234567])]);
        let text = written.to_text().unwrap();
        assert!(text.lines().any(|line| line.trim() == r#"{"round":2,"seconds":2.5}"#), "{text}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bench.json");
        fs::write(&path, &text).unwrap();
        assert_eq!(Bench::read(&path).unwrap(), written);
        fs::write(&path, text.replace("\"schema\": 1", "\"schema\": 2")).unwrap();
        assert!(Bench::read(&path).unwrap_err().to_string().contains("schema 2"));
        fs::write(&path, text.replace("\"commit\"", "\"comit\"")).unwrap();
        Bench::read(&path).unwrap_err();
    }

    #[test]
    fn a_metric_is_a_number_or_a_quotient() {
        let one = subject("a", &[2.0, 4.0, 8.0]);
        assert_eq!(one.summary("seconds").unwrap().median, 4.0);
        assert_eq!(one.summary("round/seconds").unwrap().least, 0.375);
        assert_eq!(one.summary("minutes"), None);
        assert_eq!(one.summary("seconds/minutes"), None);
        assert_eq!(subject("a", &[0.0]).summary("seconds/seconds"), None);
    }

    #[test]
    fn fractions_keep_six_digits() {
        assert_eq!(rounded(f64::NAN), None);
        let text =
            [0.123_456_789, 1_234.567_89, 0.0, 0.000_012_345_678].map(|v| rounded(v).unwrap().to_string());
        assert_eq!(text, ["0.123457", "1234.57", "0.0", "0.0000123457"]);
    }
}
