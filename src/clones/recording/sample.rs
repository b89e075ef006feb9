//! The lines of a recording, as JSON. Fields that a later version adds are ignored by this one.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::store::Digest;
use crate::units::{Bytes, PageCount};

/// The `format` of every header.
const FORMAT: &str = "stencil-recording";

/// The version that this program writes, and the only one that it reads.
const VERSION: u32 = 1;

/// Maximum number of buckets of a file in [`FilePlaces`].
pub const MAX_BUCKETS: u64 = 256;

/// Bound of every size, time and number, so that sums of some of them fit into 64 bits.
const MAX_NUMBER: u64 = 1 << 53;

/// Bound of the pages of a file or a working set: 4 PiB.
const MAX_PAGES: u64 = 1 << 40;

/// The first line of a recording.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    format: String,
    version: u32,
}

impl Default for Header {
    fn default() -> Header {
        Header { format: FORMAT.to_owned(), version: VERSION }
    }
}

impl Header {
    /// Returns true if this program can read the recording.
    pub(super) fn is_supported(&self) -> bool {
        *self == Header::default()
    }

    /// Returns true if the header is of a recording, of any version.
    pub(super) fn is_of_recording(&self) -> bool {
        self.format == FORMAT
    }

    /// Returns the version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }
}

/// A wall-clock time with milliseconds; RFC 3339 as text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub(super) i64);

impl Time {
    /// Returns the present time.
    pub fn now() -> Time {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Time(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }

    /// Returns the time that passed since an earlier time, zero after a later one.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = jiff::Timestamp::from_millisecond(self.0).unwrap_or_default();
        f.pad(&format!("{time:.3}"))
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Time, D::Error> {
        let text = String::deserialize(deserializer)?;
        let time: jiff::Timestamp = text.parse().map_err(D::Error::custom)?;
        Ok(Time(time.as_millisecond()))
    }
}

/// All figures of one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// When the measurement began.
    pub time: Time,
    /// How long the measurement took, in milliseconds.
    pub took_ms: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Ids of the mounted stores.
    pub stores: Vec<String>,
    /// Memory of the host.
    pub host: HostMemory,
    /// Sums over all clones.
    pub totals: TotalsSample,
    /// Templates of all mounts.
    pub templates: Vec<TemplateSample>,
    /// All clones.
    pub clones: Vec<CloneSample>,
    /// Why clones take more memory than they need; absent unless asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasons: Option<Vec<ReasonSample>>,
}

impl Sample {
    /// Returns what is out of bounds. A recording may come from another host.
    pub(super) fn problem(&self) -> Option<&'static str> {
        let of_template = |t: &TemplateSample| {
            let set = t.working_set.map_or(0, |set| set.pages.get());
            let numbers =
                [t.size_bytes, t.data_bytes, t.resident_bytes].iter().all(|bytes| bytes.get() <= MAX_NUMBER);
            numbers && t.clones <= MAX_NUMBER && set <= MAX_PAGES && t.places.iter().all(FilePlaces::is_valid)
        };
        let is_small = |bytes: &Bytes| bytes.get() <= MAX_NUMBER;
        let checks = [
            ("took_ms", self.took_ms <= MAX_NUMBER),
            ("host", self.host.0.values().all(is_small)),
            ("totals", self.totals.clones <= MAX_NUMBER && self.totals.sizes().iter().all(is_small)),
            ("templates", self.templates.iter().all(of_template)),
            ("clones", self.clones.iter().all(CloneSample::is_valid)),
            ("reasons", self.reasons.iter().flatten().all(|r| is_small(&r.bytes) && r.clones <= MAX_NUMBER)),
        ];
        checks.into_iter().find(|(_, is_valid)| !is_valid).map(|(field, _)| field)
    }
}

/// Fields of `/proc/meminfo`, in bytes, by their names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostMemory(pub BTreeMap<String, Bytes>);

impl HostMemory {
    /// Returns a field, such as `MemAvailable`; `None` if the kernel does not have the field.
    pub fn get(&self, field: &str) -> Option<Bytes> {
        self.0.get(field).copied()
    }
}

/// Sums over all clones, with the names and meanings of `totals` in `stencil density --json`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "documented in accounting::Totals")]
pub struct TotalsSample {
    pub clones: u64,
    pub mapped_bytes: Bytes,
    pub copied_bytes: Bytes,
    pub template_bytes: Bytes,
    pub store_cache_bytes: Bytes,
    pub private_bytes: Bytes,
    pub page_table_bytes: Bytes,
    pub overhead_bytes: Bytes,
    pub disk_bytes: Bytes,
    pub swap_bytes: Bytes,
    pub host_bytes: Bytes,
    pub bytes_per_further_clone: Option<Bytes>,
}

impl TotalsSample {
    fn sizes(&self) -> [Bytes; 11] {
        [
            self.mapped_bytes,
            self.copied_bytes,
            self.template_bytes,
            self.store_cache_bytes,
            self.private_bytes,
            self.page_table_bytes,
            self.overhead_bytes,
            self.disk_bytes,
            self.swap_bytes,
            self.host_bytes,
            self.bytes_per_further_clone.unwrap_or_default(),
        ]
    }
}

/// One template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateSample {
    /// Digest of the template.
    pub digest: Digest,
    /// All tags of the template, as `NAME:TAG`.
    pub tags: Vec<String>,
    /// How the template is served, as in `stencil density --json`.
    pub serving: String,
    /// Length of all files.
    pub size_bytes: Bytes,
    /// Size of the pages that are not zero.
    pub data_bytes: Bytes,
    /// Pages in the page cache.
    pub resident_bytes: Bytes,
    /// Number of clones that map the template.
    pub clones: u64,
    /// The working set `default`; absent if none was recorded, or if the template has no clones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set: Option<WorkingSetSample>,
    /// Where copies lie in each file that clones map.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub places: Vec<FilePlaces>,
}

/// A working set of a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSetSample {
    /// Number of recordings that were merged.
    pub recordings: u32,
    /// Used pages of all files.
    pub pages: PageCount,
}

/// Numbers of pages by their place in a file. Bucket `i` holds the pages from `i * bucket_pages` on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePlaces {
    /// File of the template.
    pub file: String,
    /// Number of pages of the file.
    pub file_pages: PageCount,
    /// Number of pages of each bucket; the last one may be shorter.
    pub bucket_pages: PageCount,
    /// Dirty pages in each bucket, as the sum over all clones.
    pub dirty_pages: Vec<u64>,
    /// Pages of the working set in each bucket; empty without a working set of the file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub working_set_pages: Vec<u64>,
}

impl FilePlaces {
    fn is_valid(&self) -> bool {
        let (buckets, counts) =
            (self.dirty_pages.len(), self.dirty_pages.iter().chain(&self.working_set_pages));
        buckets as u64 <= MAX_BUCKETS
            && (self.working_set_pages.is_empty() || self.working_set_pages.len() == buckets)
            && self.file_pages.get() <= MAX_PAGES
            && self.bucket_pages.get() <= MAX_PAGES
            && counts.into_iter().all(|pages| *pages <= MAX_NUMBER)
    }
}

/// One clone. The names are those of `clones` in `stencil density --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneSample {
    /// Id that `stencil clone` assigned, or the process id.
    pub id: String,
    /// Process id.
    pub pid: u32,
    /// A number that no other process has.
    pub identity: u64,
    /// `simulated`, `qemu`, `firecracker`, `command`, …, or `other` for a process that Stencil did not launch.
    pub kind: String,
    /// Template of the first mapping.
    pub digest: Digest,
    /// Time since the start of the process, in milliseconds: the start is `time - age_ms`. Null if the process ended
    /// before its start time was read.
    pub age_ms: Option<u64>,
    /// Size of the template mappings.
    pub mapped_bytes: Bytes,
    /// Template pages that the page tables map unchanged.
    pub mapped_clean_bytes: Bytes,
    /// Copied template pages and replaced pages, in RAM and in swap.
    pub dirty_pages: PageCount,
    /// Copied template pages, and memory of replaced pages, in RAM.
    pub private_bytes: Bytes,
    /// The same in swap.
    pub swap_bytes: Bytes,
    /// Page tables.
    pub page_table_bytes: Bytes,
    /// Private memory outside template mappings, in RAM.
    pub overhead_bytes: Bytes,
    /// Disks and jail in a file system without other storage.
    pub disk_bytes: Bytes,
}

impl CloneSample {
    fn is_valid(&self) -> bool {
        let sizes = [
            self.mapped_bytes,
            self.mapped_clean_bytes,
            self.private_bytes,
            self.swap_bytes,
            self.page_table_bytes,
            self.overhead_bytes,
            self.disk_bytes,
        ];
        sizes.iter().all(|bytes| bytes.get() <= MAX_NUMBER)
            && self.dirty_pages.get() <= MAX_NUMBER
            && self.age_ms.is_none_or(|age| age <= MAX_NUMBER)
    }
}

/// One reason for memory that clones would not need, as the sum over all clones and templates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonSample {
    /// Code of the reason, as in `stencil density --why`.
    pub code: String,
    /// Number of clones with this reason; 0 if the reason concerns all clones of a template.
    pub clones: u64,
    /// Memory that the reason explains. Two reasons may explain the same bytes.
    pub bytes: Bytes,
    /// What to do.
    pub remedy: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_the_same_after_text() {
        for (ms, text) in [
            (0, "\"1970-01-01T00:00:00.000Z\""),
            (1_735_689_599_007, "\"2024-12-31T23:59:59.007Z\""),
            (-1, "\"1969-12-31T23:59:59.999Z\""),
        ] {
            assert_eq!(serde_json::to_string(&Time(ms)).unwrap(), text);
            assert_eq!(serde_json::from_str::<Time>(text).unwrap(), Time(ms));
        }
        assert!(serde_json::from_str::<Time>("\"yesterday\"").is_err());
        assert_eq!(Time(7).since(Time(5)), Duration::from_millis(2));
        assert_eq!(Time(5).since(Time(7)), Duration::ZERO);
    }

    #[test]
    fn a_sample_without_optional_fields_is_read() {
        let mut value = serde_json::to_value(Sample::default()).unwrap();
        assert!(value.get("reasons").is_none());
        value["added_later"] = 1.into();
        assert_eq!(serde_json::from_value::<Sample>(value).unwrap(), Sample::default());
    }
}
