//! Takes one sample.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use super::sample::{
    CloneSample, FilePlaces, HostMemory, MAX_BUCKETS, ReasonSample, Sample, TemplateSample, Time,
    TotalsSample, WorkingSetSample,
};
use crate::clones::accounting::{self, CloneRow, Reasons, Survey, Totals};
use crate::control::Mount;
use crate::error::{Code, Result};
use crate::store::{DEFAULT_SET, Digest, Store, WorkingSet};
use crate::sys::process::{ProcessId, procfs, times};
use crate::units::{Bytes, PAGE_SIZE, PageCount, to_usize};

/// Fields of `/proc/meminfo` in a sample.
const FIELDS: [&str; 21] = [
    "MemTotal",
    "MemFree",
    "MemAvailable",
    "Buffers",
    "Cached",
    "SwapCached",
    "AnonPages",
    "Shmem",
    "Slab",
    "SReclaimable",
    "SUnreclaim",
    "KernelStack",
    "PageTables",
    "SecPageTables",
    "Percpu",
    "Hugetlb",
    "SwapTotal",
    "SwapFree",
    "CommitLimit",
    "Committed_AS",
    "Unevictable",
];

/// Takes samples, and knows the start times of the clones of the last one.
#[derive(Debug)]
pub struct Measuring {
    boot_id: String,
    /// Start times, since boot.
    started: HashMap<ProcessId, Duration>,
}

impl Measuring {
    /// Prepares for samples.
    ///
    /// # Errors
    /// Returns an error if the id of the boot cannot be read.
    pub fn new() -> Result<Measuring> {
        let boot_id = procfs::read_text(Path::new("/proc/sys/kernel/random/boot_id"))?.trim().to_owned();
        Ok(Measuring { boot_id, started: HashMap::new() })
    }

    /// Measures all clones of these mounts once.
    ///
    /// # Errors
    /// Same as [`accounting::survey`] and, with reasons, [`accounting::reasons`].
    pub fn sample(&mut self, mounts: &[Mount], with_reasons: bool) -> Result<Sample> {
        let (time, now, began) = (Time::now(), times::since_boot(), Instant::now());
        let survey = accounting::survey(mounts, None)?;
        let host = HostMemory(meminfo(&procfs::read_text(Path::new("/proc/meminfo"))?));
        let clones = self.clones(&survey, now)?;
        let reasons = with_reasons.then(|| accounting::reasons(mounts, &survey)).transpose()?;
        let stores: BTreeSet<&String> = mounts.iter().map(|mount| &mount.store_id).collect();
        Ok(Sample {
            time,
            boot_id: self.boot_id.clone(),
            stores: stores.into_iter().cloned().collect(),
            host,
            totals: (&survey.density.totals).into(),
            templates: templates(&survey),
            clones,
            reasons: reasons.as_ref().map(sums),
            took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    }

    /// `now` is the time of the sample, since boot.
    fn clones(&mut self, survey: &Survey, now: Duration) -> Result<Vec<CloneSample>> {
        let mut started = HashMap::new();
        let mut clones = Vec::with_capacity(survey.clones.len());
        for (row, (clone, _)) in survey.density.clones.iter().zip(&survey.clones) {
            let process = clone.process();
            let start = match self.started.get(&process) {
                Some(start) => Some(*start),
                // The pid may have been reused: the time is of this process only if the process lives.
                None => times::start_since_boot(process.pid)?.filter(|_| process.is_alive()),
            };
            started.extend(start.map(|start| (process, start)));
            let age = start.map(|start| now.saturating_sub(start).as_millis());
            let age_ms = age.map(|ms| u64::try_from(ms).unwrap_or(u64::MAX));
            clones.push(clone_sample(row, process, age_ms));
        }
        self.started = started;
        Ok(clones)
    }
}

fn clone_sample(row: &CloneRow, process: ProcessId, age_ms: Option<u64>) -> CloneSample {
    let memory = &row.memory;
    CloneSample {
        id: row.id.clone(),
        pid: process.pid,
        identity: process.identity,
        kind: row.kind.clone(),
        digest: row.digest,
        age_ms,
        mapped_bytes: memory.mapped_bytes,
        mapped_clean_bytes: memory.mapped_clean_bytes,
        dirty_pages: memory.dirty_pages,
        private_bytes: memory.private_bytes,
        swap_bytes: memory.swap_bytes,
        page_table_bytes: memory.page_table_bytes,
        overhead_bytes: memory.overhead_bytes,
        disk_bytes: memory.disk_bytes,
    }
}

impl From<&Totals> for TotalsSample {
    fn from(totals: &Totals) -> TotalsSample {
        TotalsSample {
            clones: totals.clones,
            mapped_bytes: totals.mapped_bytes,
            copied_bytes: totals.copied_bytes,
            template_bytes: totals.template_bytes,
            store_cache_bytes: totals.store_cache_bytes,
            private_bytes: totals.private_bytes,
            page_table_bytes: totals.page_table_bytes,
            overhead_bytes: totals.overhead_bytes,
            disk_bytes: totals.disk_bytes,
            swap_bytes: totals.swap_bytes,
            host_bytes: totals.host_bytes,
            bytes_per_further_clone: totals.bytes_per_further_clone,
        }
    }
}

fn meminfo(text: &str) -> BTreeMap<String, Bytes> {
    let fields = FIELDS.into_iter();
    fields.filter_map(|field| Some((field.to_owned(), procfs::parse_meminfo(text, field)?))).collect()
}

fn templates(survey: &Survey) -> Vec<TemplateSample> {
    let mut places = dirty_places(survey);
    let stores: HashMap<Digest, usize> =
        survey.inodes.iter().map(|(_, file)| (file.digest, file.mount)).collect();
    let sample = |row: &accounting::TemplateMemory| {
        let mut places = places.remove(&row.digest).unwrap_or_default();
        let store = stores.get(&row.digest).and_then(|mount| survey.inodes.store(*mount));
        let set = store.filter(|_| row.clones > 0).and_then(|store| working_set(store, &row.digest));
        if let Some(set) = &set {
            add_working_set(&mut places, set);
        }
        TemplateSample {
            digest: row.digest,
            tags: row.tags.iter().cloned().collect(),
            serving: row.serving.clone(),
            size_bytes: row.size_bytes,
            data_bytes: row.data_bytes,
            resident_bytes: row.resident_bytes,
            clones: row.clones,
            working_set: set.map(|set| WorkingSetSample { recordings: set.recordings, pages: set.pages() }),
            places: places.into_values().collect(),
        }
    };
    survey.density.templates.iter().map(sample).collect()
}

/// Returns the working set of a template. A set that cannot be read does not prevent a sample.
fn working_set(store: &Store, digest: &Digest) -> Option<WorkingSet> {
    store.working_set(digest, DEFAULT_SET).unwrap_or_else(|error| {
        // The template may have been removed since the survey.
        if error.code() != Code::NotFound {
            log::warn!("cannot read the working set of template {digest}: {error}");
        }
        None
    })
}

/// The places of the files of a template, by name.
type Places = BTreeMap<String, FilePlaces>;

impl FilePlaces {
    /// Creates the buckets of a file.
    pub(super) fn new(file: &str, size: Bytes) -> FilePlaces {
        let pages = size.pages().get();
        let bucket = pages.div_ceil(MAX_BUCKETS).max(1);
        FilePlaces {
            file: file.to_owned(),
            file_pages: size.pages(),
            bucket_pages: PageCount::new(bucket),
            dirty_pages: vec![0; to_usize(pages.div_ceil(bucket))],
            working_set_pages: Vec::new(),
        }
    }
}

/// Adds pages of a file to its buckets. Pages behind the end of the file are counted in the last bucket.
fn add(buckets: &mut [u64], bucket_pages: PageCount, pages: Range<u64>) {
    let (Some(last), size) = (buckets.len().checked_sub(1), bucket_pages.get().max(1)) else { return };
    let mut start = pages.start;
    while start < pages.end {
        let bucket = to_usize(start / size).min(last);
        let end = if bucket == last { pages.end } else { pages.end.min((bucket as u64 + 1) * size) };
        buckets[bucket] += end - start;
        start = end;
    }
}

/// Counts the dirty pages of all clones by their place in the files of the templates.
fn dirty_places(survey: &Survey) -> BTreeMap<Digest, Places> {
    let mut all: BTreeMap<Digest, Places> = BTreeMap::new();
    for (clone, measured) in &survey.clones {
        let copied = clone.maps.iter().zip(&measured.copied);
        let copied = copied
            .map(|(map, copied)| (map, copied.iter().map(|copy| copy.range.clone()).collect::<Vec<_>>()));
        let replaced = measured.replaced.iter();
        let replaced = replaced.map(|(found, _)| (&clone.maps[found.map], vec![found.range.clone()]));
        for (map, ranges) in copied.chain(replaced) {
            let places = all.entry(map.digest).or_default();
            let places =
                places.entry(map.file.clone()).or_insert_with(|| FilePlaces::new(&map.file, map.file_size));
            for range in ranges {
                // A replaced page may lie before the mapping.
                let page = |address: u64| address.wrapping_sub(map.distance()) / PAGE_SIZE;
                add(&mut places.dirty_pages, places.bucket_pages, page(range.start)..page(range.end));
            }
        }
    }
    all
}

fn add_working_set(places: &mut Places, set: &WorkingSet) {
    for (file, used) in &set.files {
        if let Some(places) = places.get_mut(file) {
            let mut buckets = vec![0; places.dirty_pages.len()];
            for pages in used.touched.sorted() {
                add(&mut buckets, places.bucket_pages, pages);
            }
            places.working_set_pages = buckets;
        }
    }
}

/// Sums reasons by code and remedy.
fn sums(reasons: &Reasons) -> Vec<ReasonSample> {
    let of_clones = reasons.clones.iter().flatten().map(|reason| (reason, 1));
    let of_templates = reasons.templates.values().flatten().map(|reason| (reason, 0));
    let mut sums: BTreeMap<(&str, &str), (u64, Bytes)> = BTreeMap::new();
    for (reason, count) in of_templates.chain(of_clones) {
        let (clones, bytes) = sums.entry((reason.code.name(), reason.remedy)).or_default();
        *clones += count;
        *bytes += reason.bytes;
    }
    let sample = |((code, remedy), (clones, bytes)): ((&str, &str), (u64, Bytes))| ReasonSample {
        code: code.to_owned(),
        clones,
        bytes,
        remedy: remedy.to_owned(),
    };
    sums.into_iter().map(sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_each_page_once() {
        let mut places = FilePlaces::new("memory", Bytes::new(1000 * PAGE_SIZE + 1));
        assert_eq!((places.bucket_pages.get(), places.dirty_pages.len()), (4, 251));
        add(&mut places.dirty_pages, places.bucket_pages, 2..9);
        assert_eq!(places.dirty_pages[..4], [2, 4, 1, 0]);
        // Behind the end of the file.
        add(&mut places.dirty_pages, places.bucket_pages, 999..2000);
        assert_eq!(places.dirty_pages[249..], [1, 1000]);
        assert_eq!(places.dirty_pages.iter().sum::<u64>(), 7 + 1001);
        let small = FilePlaces::new("memory", Bytes::new(3 * PAGE_SIZE));
        assert_eq!((small.bucket_pages.get(), small.dirty_pages.len()), (1, 3));
        let empty = FilePlaces::new("state", Bytes::ZERO);
        assert_eq!(empty.dirty_pages.len(), 0);
        add(&mut [], empty.bucket_pages, 0..5);
    }

    #[test]
    fn meminfo_has_the_fields_of_this_kernel() {
        let text = "MemTotal:       16384 kB\nMemAvailable:    4 kB\nNew: 5 kB\n";
        let found = HostMemory(meminfo(text));
        assert_eq!(found.get("MemTotal"), Some(Bytes::new(16 << 20)));
        assert_eq!((found.get("SwapFree"), found.get("New")), (None, None));
        let now = meminfo(&procfs::read_text(Path::new("/proc/meminfo")).unwrap());
        assert!(now.len() > 15 && now["MemTotal"] > now["MemAvailable"], "{now:?}");
    }
}
