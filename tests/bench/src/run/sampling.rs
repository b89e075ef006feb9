//! One measurement, and the rounds of a row.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Number, Value};
use stencilfs::error::{Error, Result};
use stencilfs::units::approximate;

use super::site::{Mount, Site, json_of, run};
use crate::model::{Row, Sample, Subject, rounded};

/// Result of one measurement.
#[derive(Debug, Default)]
pub struct Measurement {
    pub sample: Sample,
    /// Checksum of the bytes that were read; equal for all subjects of a round.
    pub checksum: Option<u64>,
}

impl Measurement {
    /// A sample with these seconds.
    pub fn seconds(seconds: f64) -> Measurement {
        Measurement::default().with("seconds", seconds)
    }

    #[must_use]
    pub fn with(mut self, name: &str, value: f64) -> Measurement {
        // A metric without a number is missing, which the check of the samples reports.
        self.sample.extend(rounded(value).map(|value| (name.to_owned(), value)));
        self
    }

    #[must_use]
    pub fn count(mut self, name: &str, value: u64) -> Measurement {
        self.sample.insert(name.to_owned(), value.into());
        self
    }
}

/// A subject of a row, and how it is measured.
pub struct Procedure<'a> {
    pub name: &'a str,
    pub command: String,
    pub read_ahead_bytes: Option<u64>,
    /// Takes one sample; the argument is the number of the round.
    pub take: Box<dyn FnMut(u64) -> Result<Measurement> + 'a>,
}

/// Name and description of a row.
#[derive(Debug, Clone, Copy)]
pub struct Title<'a> {
    pub name: &'a str,
    pub about: &'a str,
    pub input: &'a str,
    pub caches: &'a str,
}

/// Measures all subjects in each round, each time beginning with another one.
pub fn measure(title: Title, rounds: u64, subjects: &mut [Procedure]) -> Result<Row> {
    let mut results: Vec<Subject> = subjects
        .iter()
        .map(|subject| Subject {
            name: subject.name.to_owned(),
            command: subject.command.clone(),
            read_ahead_bytes: subject.read_ahead_bytes,
            samples: Vec::new(),
        })
        .collect();
    let count = subjects.len();
    for round in 1..=rounds {
        let mut checksum: Option<u64> = None;
        subjects.rotate_left(1.min(count));
        for subject in &mut *subjects {
            let mut measurement =
                (subject.take)(round).map_err(|e| e.context(format!("{}, {}", title.name, subject.name)))?;
            if let Some(own) = measurement.checksum
                && *checksum.get_or_insert(own) != own
            {
                let text = format!(
                    "{}: the bytes that {} has read differ from those of another subject",
                    title.name, subject.name
                );
                return Err(Error::damage(text));
            }
            measurement.sample.insert("round".to_owned(), round.into());
            let seconds = measurement.sample.get("seconds").and_then(Number::as_f64);
            eprintln!(
                "{:<18}{round:>3}  {:<20}{}",
                title.name,
                subject.name,
                seconds.map_or_else(String::new, |seconds| format!("{seconds:>10.4} s"))
            );
            if let Some(result) = results.iter_mut().find(|result| result.name == subject.name) {
                result.samples.push(measurement.sample);
            }
        }
    }
    Ok(Row {
        name: title.name.to_owned(),
        about: title.about.to_owned(),
        input: title.input.to_owned(),
        caches: title.caches.to_owned(),
        commit: None,
        subjects: results,
    })
}

/// Counters of the host before a measurement.
pub struct Counters {
    processor_seconds: f64,
    read_bytes: u64,
    began: Instant,
}

impl Counters {
    pub fn now(site: &Site) -> Result<Counters> {
        Ok(Counters {
            processor_seconds: processor_seconds()?,
            read_bytes: read_bytes(site.device()?)?,
            began: Instant::now(),
        })
    }

    /// Adds processor time and bytes read since then, of the whole host: kernel threads that decode for a process are
    /// not in its own figures.
    pub fn add_to(&self, measurement: Measurement, site: &Site) -> Result<Measurement> {
        let processor = processor_seconds()? - self.processor_seconds;
        let read = read_bytes(site.device()?)?.saturating_sub(self.read_bytes);
        Ok(measurement.with("cpu_seconds", processor).count("read_bytes", read))
    }

    /// Returns the same with the time since the beginning as `seconds`.
    pub fn finish(&self, site: &Site) -> Result<Measurement> {
        let seconds = self.began.elapsed().as_secs_f64();
        self.add_to(Measurement::seconds(seconds), site)
    }
}

/// Processor time of the whole host since its start, without the idle time.
fn processor_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").map_err(|e| Error::io("cannot read", "/proc/stat", e))?;
    let numbers: Vec<u64> =
        text.lines().next().unwrap_or_default().split(' ').filter_map(|word| word.parse().ok()).collect();
    match numbers[..] {
        [user, nice, system, _idle, _iowait, irq, softirq, ..] => {
            let ticks = approximate(user + nice + system + irq + softirq);
            Ok(ticks / approximate(rustix::param::clock_ticks_per_second()))
        }
        _ => Err(Error::failed("cannot parse the first line of /proc/stat")),
    }
}

/// Bytes read from a block device since the start of the host.
fn read_bytes(device: u64) -> Result<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let path = format!("/sys/dev/block/{major}:{minor}/stat");
    let text = fs::read_to_string(&path).map_err(|e| Error::io("cannot read", &path, e))?;
    let sectors = text.split_ascii_whitespace().nth(2).and_then(|word| word.parse::<u64>().ok());
    Ok(sectors.ok_or_else(|| Error::failed("cannot parse the counters").at(&path))? * 512)
}

/// The kernel's read-ahead for the files of this device.
pub fn read_ahead(device: u64) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let text = fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb")).ok()?;
    Some(text.trim().parse::<u64>().ok()? * 1024)
}

/// Drops all caches, then reads the programs of a measurement again. `bytes` as for [`settle`].
pub fn drop_caches(site: &Site, bytes: u64) -> Result<()> {
    rustix::fs::sync();
    let path = "/proc/sys/vm/drop_caches";
    fs::write(path, "3").map_err(|e| Error::io("cannot drop the caches", path, e))?;
    claim(site, bytes)?;
    run(Command::new(&site.touch).arg(&site.touch).arg("first")).map(drop)
}

/// Writes everything to the disk, so that nothing is written during a measurement, and claims memory.
pub fn settle(site: &Site, bytes: u64) -> Result<()> {
    rustix::fs::sync();
    claim(site, bytes)
}

/// Takes and frees as much memory as a measurement may need: the host may have taken free pages back from a virtual
/// machine, and such a page costs several times as much as other free pages.
fn claim(site: &Site, bytes: u64) -> Result<()> {
    run(Command::new(&site.touch).arg("claim").arg(bytes.to_string())).map(drop)
}

/// Touches pages of a file: the arguments of `touch.c` after the path. `mount` serves the file and counts READs.
pub fn touch(site: &Site, file: &Path, words: &[&str], mount: Option<&Mount>) -> Result<Measurement> {
    touch_after(site, file, words, mount, || Ok(()))
}

/// Touches pages after the caches of the kernel and the server's cache of decoded blocks were emptied.
pub fn touch_cold(site: &Site, file: &Path, words: &[&str], mount: Option<&Mount>) -> Result<Measurement> {
    if let Some(mount) = mount.filter(|mount| mount.serve == "decode") {
        mount.restart()?;
    }
    let length = fs::metadata(file).map_err(|e| Error::io("cannot inspect", file, e))?.len();
    touch_after(site, file, words, mount, || drop_caches(site, length + length / 4))
}

fn touch_after(
    site: &Site,
    file: &Path,
    words: &[&str],
    mount: Option<&Mount>,
    prepare: impl FnOnce() -> Result<()>,
) -> Result<Measurement> {
    let reads = mount.map(Mount::reads).transpose()?;
    prepare()?;
    let before = Counters::now(site)?;
    let found = json_of(Command::new(&site.touch).arg(file).args(words))?;
    let mut measurement = before.add_to(Measurement::default(), site)?;
    if let (Some(mount), Some(reads)) = (mount, reads) {
        measurement = measurement.count("reads", mount.reads()?.saturating_sub(reads));
    }
    let count = |name: &str| {
        found[name].as_u64().ok_or_else(|| Error::failed(format!("touch has printed no '{name}': {found}")))
    };
    measurement = measurement.count("touched_bytes", count("pages")? * 4096);
    measurement.checksum = Some(count("checksum")?);
    for (name, value) in found.as_object().into_iter().flatten() {
        if let Value::Number(number) = value
            && !["pages", "checksum", "minor_faults", "written_pages"].contains(&name.as_str())
        {
            measurement.sample.insert(name.clone(), number.clone());
        }
    }
    Ok(measurement)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    const TITLE: Title = Title { name: "read", about: "", input: "dense", caches: "cold" };

    #[test]
    fn each_round_begins_with_another_subject() {
        let order = RefCell::new(String::new());
        let subject = |name: &'static str| Procedure {
            name,
            command: String::new(),
            read_ahead_bytes: None,
            take: Box::new(|round| {
                order.borrow_mut().push_str(name);
                Ok(Measurement::seconds(stencilfs::units::approximate(round)))
            }),
        };
        let row = measure(TITLE, 3, &mut ["a", "b", "c"].map(subject)).unwrap();
        assert_eq!(*order.borrow(), "bcacababc");
        let names: Vec<&str> = row.subjects.iter().map(|subject| subject.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert!(row.subjects.iter().all(|s| s.round_numbers().is_some_and(|numbers| numbers.len() == 3)));
        assert_eq!(row.subjects[1].summary("seconds").unwrap().median, 2.0);
    }

    #[test]
    fn other_bytes_than_those_of_another_subject_end_the_run() {
        let subject = |(name, wrong): (&'static str, u64)| Procedure {
            name,
            command: String::new(),
            read_ahead_bytes: None,
            take: Box::new(move |round| {
                let checksum = Some(if round == wrong { 0 } else { round });
                Ok(Measurement { checksum, ..Measurement::default() })
            }),
        };
        measure(TITLE, 3, &mut [("a", 9), ("b", 9)].map(subject)).unwrap();
        let error = measure(TITLE, 3, &mut [("a", 9), ("b", 2)].map(subject)).unwrap_err();
        assert!(error.to_string().contains("differ from those of another subject"), "{error}");
    }
}
