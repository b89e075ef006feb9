//! The figures of a report: the page, its pictures and the JSON output show these, and no others.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::Serialize;

use super::growth::{GrowthStep, Measurement, Quantiles, growth};
use crate::clones::recording::{
    CloneSample, FilePlaces, HostMemory, ReasonSample, Recording, Sample, TemplateSample, Time, TotalsSample,
    WorkingSetSample,
};
use crate::error::{Error, Result};
use crate::sanitize;
use crate::store::Digest;
use crate::units::Bytes;

/// Maximum number of samples in the history.
const MAX_HISTORY: usize = 60;

/// All figures of one recording.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// The recording.
    #[serde(serialize_with = "sanitize::path")]
    pub file: PathBuf,
    /// Number of samples.
    pub samples: u64,
    /// Times of the first and the last sample.
    pub first: Time,
    pub last: Time,
    /// Ids of all stores in the recording.
    pub stores: BTreeSet<String>,
    /// The last sample with clones; absent if no sample has clones.
    pub further_clone: Option<FurtherClone>,
    /// The last sample.
    pub totals: TotalsSample,
    pub host: Vec<HostPart>,
    /// The first, the last, and samples between them.
    pub history: Vec<Moment>,
    /// Templates that had clones in a sample.
    pub templates: Vec<TemplateFigures>,
    /// The last reasons; absent if none were recorded.
    pub reasons: Option<RecordedReasons>,
}

/// What one more clone costs, as the mean of the clones in one sample.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct FurtherClone {
    pub time: Time,
    pub clones: u64,
    /// `bytes_per_further_clone` of `stencil density`.
    pub bytes: Bytes,
    /// Its parts, rounded down: sums over all clones divided by their number.
    pub private_bytes: Bytes,
    pub page_table_bytes: Bytes,
    pub overhead_bytes: Bytes,
    pub disk_bytes: Bytes,
    /// The same figure of single clones. Frames that several clones share count in each of them.
    #[serde(flatten)]
    pub of_single_clones: Quantiles,
}

/// A part of the host's memory, by `/proc/meminfo`. The parts add up to `MemTotal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct HostPart {
    pub part: &'static str,
    pub bytes: Bytes,
}

/// The sums of one sample.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Moment {
    pub time: Time,
    /// Seconds since the first sample, by the wall clock.
    pub seconds: f64,
    #[serde(flatten)]
    pub totals: TotalsSample,
    /// `MemAvailable` of the host.
    pub available_bytes: Option<Bytes>,
}

/// One template, in the last sample in which it had clones.
#[derive(Debug, Clone, Serialize)]
pub struct TemplateFigures {
    pub digest: Digest,
    pub tags: Vec<String>,
    pub time: Time,
    pub serving: String,
    pub size_bytes: Bytes,
    pub data_bytes: Bytes,
    pub resident_bytes: Bytes,
    pub clones: u64,
    pub working_set: Option<WorkingSetSample>,
    /// Copied memory by age, over all samples. A clone counts for the template of its first mapping.
    pub growth: Vec<GrowthStep>,
    pub places: Vec<FilePlaces>,
}

/// Reasons and the time of their sample.
#[derive(Debug, Clone, Serialize)]
pub struct RecordedReasons {
    pub time: Time,
    pub reasons: Vec<ReasonSample>,
}

impl Figures {
    /// Computes the figures of a recording.
    ///
    /// # Errors
    /// Returns the errors of reading the recording, and [`Code::Usage`](crate::error::Code) if it has no sample.
    pub fn of(recording: &Recording) -> Result<Figures> {
        let mut moments = Vec::new();
        let mut stores = BTreeSet::new();
        let mut templates: BTreeMap<Digest, (Time, TemplateSample)> = BTreeMap::new();
        let mut measurements: BTreeMap<Digest, Vec<Measurement>> = BTreeMap::new();
        let (mut further_clone, mut reasons, mut host) = (None, None, HostMemory::default());
        for sample in recording.samples() {
            let sample = sample?;
            let time = sample.time;
            moments.push((time, sample.totals, sample.host.get("MemAvailable")));
            for clone in &sample.clones {
                if let Some(age_ms) = clone.age_ms {
                    let copied = clone.private_bytes + clone.swap_bytes;
                    let measured = Measurement { identity: clone.identity, age_ms, copied };
                    measurements.entry(clone.digest).or_default().push(measured);
                }
            }
            further_clone = FurtherClone::of(&sample).or(further_clone);
            reasons = sample.reasons.map(|reasons| RecordedReasons { time, reasons }).or(reasons);
            stores.extend(sample.stores);
            host = sample.host;
            let with_clones = sample.templates.into_iter().filter(|template| template.clones > 0);
            templates.extend(with_clones.map(|template| (template.digest, (time, template))));
        }
        let (Some((first, ..)), Some((last, totals, _))) = (moments.first(), moments.last()) else {
            return Err(Error::usage("the recording has no sample")
                .at(recording.path())
                .hint("add a sample: stencil record FILE --count 1"));
        };
        let template = |(digest, (time, template)): (Digest, (Time, TemplateSample))| {
            let measured = measurements.remove(&digest).unwrap_or_default();
            TemplateFigures {
                digest,
                tags: template.tags,
                time,
                serving: template.serving,
                size_bytes: template.size_bytes,
                data_bytes: template.data_bytes,
                resident_bytes: template.resident_bytes,
                clones: template.clones,
                working_set: template.working_set,
                growth: growth(&measured),
                places: template.places,
            }
        };
        Ok(Figures {
            file: recording.path().to_owned(),
            samples: moments.len() as u64,
            first: *first,
            last: *last,
            stores,
            further_clone,
            totals: *totals,
            host: parts(&host),
            history: history(&moments),
            templates: templates.into_iter().map(template).collect(),
            reasons,
        })
    }
}

impl FurtherClone {
    fn of(sample: &Sample) -> Option<FurtherClone> {
        let totals = &sample.totals;
        let bytes = totals.bytes_per_further_clone?;
        let mean = |sum: Bytes| Bytes::new(sum.get().checked_div(totals.clones).unwrap_or(0));
        let single = |clone: &CloneSample| {
            clone.private_bytes + clone.page_table_bytes + clone.overhead_bytes + clone.disk_bytes
        };
        Some(FurtherClone {
            time: sample.time,
            clones: totals.clones,
            bytes,
            private_bytes: mean(totals.private_bytes),
            page_table_bytes: mean(totals.page_table_bytes),
            overhead_bytes: mean(totals.overhead_bytes),
            disk_bytes: mean(totals.disk_bytes),
            of_single_clones: Quantiles::of(sample.clones.iter().map(single).collect()),
        })
    }
}

/// Divides `MemTotal`; empty if the kernel does not report it.
fn parts(host: &HostMemory) -> Vec<HostPart> {
    let Some(total) = host.get("MemTotal") else { return Vec::new() };
    let sum = |fields: &[&str]| fields.iter().filter_map(|field| host.get(field)).sum();
    let mut parts: Vec<HostPart> = [
        ("anonymous memory of processes", sum(&["AnonPages"])),
        // Not `SwapCached`: its mapped pages are in `AnonPages` already.
        ("page cache, with templates and shared memory", sum(&["Cached", "Buffers"])),
        ("slab caches of the kernel", sum(&["Slab"])),
        ("page tables", sum(&["PageTables", "SecPageTables"])),
        ("kernel stacks and per-CPU memory", sum(&["KernelStack", "Percpu"])),
        ("reserved huge pages", sum(&["Hugetlb"])),
        ("free", sum(&["MemFree"])),
    ]
    .map(|(part, bytes)| HostPart { part, bytes })
    .to_vec();
    // The kernel counts these fields one after another, so a sum may exceed the total by a little.
    let known: Bytes = parts.iter().map(|part| part.bytes).sum();
    let rest = total.saturating_sub(known);
    parts.insert(parts.len() - 1, HostPart { part: "other memory", bytes: rest });
    parts
}

fn history(moments: &[(Time, TotalsSample, Option<Bytes>)]) -> Vec<Moment> {
    let (count, last) = (moments.len().min(MAX_HISTORY), moments.len().saturating_sub(1));
    let index = |n: usize| n * last / count.saturating_sub(1).max(1);
    let moment = |(time, totals, available): (Time, TotalsSample, Option<Bytes>)| Moment {
        time,
        seconds: time.since(moments[0].0).as_secs_f64(),
        totals,
        available_bytes: available,
    };
    (0..count).map(|n| moment(moments[index(n)])).collect()
}

/// A figure of two recordings.
#[derive(Debug, Clone, Serialize)]
pub struct Change {
    pub figure: &'static str,
    pub unit: Unit,
    pub before: Option<u64>,
    pub after: Option<u64>,
}

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    Bytes,
    Clones,
}

/// Two recordings beside each other.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    pub before: Figures,
    pub after: Figures,
    pub changes: Vec<Change>,
}

impl Comparison {
    /// Compares the last samples of two recordings.
    pub fn new(before: Figures, after: Figures) -> Comparison {
        type Figure = fn(&Figures) -> Option<u64>;
        let figures: [(&'static str, Unit, Figure); 10] = [
            ("clones", Unit::Clones, |f| Some(f.totals.clones)),
            ("one more clone", Unit::Bytes, |f| Some(f.further_clone?.bytes.get())),
            ("copied pages of one more clone", Unit::Bytes, |f| Some(f.further_clone?.private_bytes.get())),
            ("page tables of one more clone", Unit::Bytes, |f| Some(f.further_clone?.page_table_bytes.get())),
            ("overhead of one more clone", Unit::Bytes, |f| Some(f.further_clone?.overhead_bytes.get())),
            ("template pages", Unit::Bytes, |f| Some(f.totals.template_bytes.get())),
            ("copied pages", Unit::Bytes, |f| Some(f.totals.private_bytes.get())),
            ("page tables", Unit::Bytes, |f| Some(f.totals.page_table_bytes.get())),
            ("overhead", Unit::Bytes, |f| Some(f.totals.overhead_bytes.get())),
            ("memory of all clones", Unit::Bytes, |f| Some(f.totals.host_bytes.get())),
        ];
        let changes = figures
            .into_iter()
            .map(|(figure, unit, of)| Change { figure, unit, before: of(&before), after: of(&after) })
            .collect();
        Comparison { before, after, changes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_has_both_ends_and_no_moment_twice() {
        let moment = |clones| (Time::default(), TotalsSample { clones, ..TotalsSample::default() }, None);
        for count in [1, 2, 59, 60, 61, 119, 1000] {
            let moments: Vec<_> = (0..count).map(moment).collect();
            let found: Vec<u64> = history(&moments).iter().map(|m| m.totals.clones).collect();
            assert_eq!(found.len() as u64, count.min(60));
            assert_eq!((found[0], found[found.len() - 1]), (0, count - 1));
            assert!(found.is_sorted_by(|a, b| a < b), "{found:?}");
        }
        assert!(history(&[]).is_empty());
    }

    #[test]
    fn parts_of_the_host_add_up_to_its_memory() {
        let fields = [
            ("MemTotal", 100),
            ("AnonPages", 20),
            ("Cached", 30),
            ("MemFree", 25),
            ("Slab", 5),
            ("SwapCached", 9),
        ];
        let host = HostMemory(fields.map(|(name, n)| (name.to_owned(), Bytes::new(n))).into());
        let parts = parts(&host);
        assert_eq!(parts.iter().map(|part| part.bytes.get()).sum::<u64>(), 100);
        assert!(parts.contains(&HostPart { part: "other memory", bytes: Bytes::new(20) }));
        assert_eq!(super::parts(&HostMemory::default()), []);
    }
}
