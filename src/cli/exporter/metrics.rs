//! The metrics: names, units, labels and help texts.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use crate::control::Latency;

/// The definition of a metric.
#[derive(Debug)]
pub struct Metric {
    /// Name without the unit and without a suffix such as `_total`.
    name: &'static str,
    kind: Kind,
    unit: Option<Unit>,
    labels: &'static [&'static str],
    help: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Gauge,
    Counter,
    Info,
    Histogram,
}

macro_rules! metrics {
    ($($constant:ident $kind:ident $name:literal $unit:expr, [$($label:literal)*] $help:literal;)*) => {
        $(pub static $constant: Metric = Metric {
            name: $name,
            kind: Kind::$kind,
            unit: $unit,
            labels: &[$($label),*],
            help: $help,
        };)*
        /// All metrics, in the order of the output.
        pub static ALL: &[&Metric] = &[$(&$constant),*];
    };
}

metrics! {
    BUILD Info "stencil_exporter_build" None, ["version"] "Version of the exporter.";
    AGE Gauge "stencil_exporter_figures_age" Some(Unit::Seconds), ["collector"]
        "Time since the collection of the figures began.";
    BLOCKED Gauge "stencil_exporter_blocked" None, ["collector"]
        "1 if the last collection failed, or the present one takes longer than 5 s; the figures are then old.";
    DURATION Gauge "stencil_exporter_collection_duration" Some(Unit::Seconds), ["collector"]
        "Duration of the last collection that succeeded.";
    COLLECTIONS Counter "stencil_exporter_collections" None, ["collector"] "Collections that have ended.";
    FAILURES Counter "stencil_exporter_collection_failures" None, ["collector"] "Collections that failed.";

    CLONES Gauge "stencil_clones" None, [] "Processes that map a template.";
    PARTS Gauge "stencil_memory" Some(Unit::Bytes), ["part"]
        "RAM that templates and clones occupy, by part. Each page is counted once; the sum over the parts is \
         the total.";
    MAPPED Gauge "stencil_memory_mapped" Some(Unit::Bytes), [] "Size of all template mappings.";
    UNSHARED Gauge "stencil_memory_unshared" Some(Unit::Bytes), []
        "RAM that the same clones would take if each had its own copy of the data of the template.";
    SWAP Gauge "stencil_memory_swap" Some(Unit::Bytes), [] "Copied pages in swap.";
    FURTHER Gauge "stencil_memory_per_further_clone" Some(Unit::Bytes), []
        "Estimated RAM of one more clone: the mean of the running clones.";

    TEMPLATE Info "stencil_template" None, ["template" "tags" "serving"]
        "Tags of the template, and how the template is served: kernel, passthrough, decode, both or idle.";
    TEMPLATE_SIZE Gauge "stencil_template_size" Some(Unit::Bytes), ["template"] "Length of the files.";
    TEMPLATE_DATA Gauge "stencil_template_data" Some(Unit::Bytes), ["template"] "Size of the pages that are not zero.";
    TEMPLATE_RESIDENT Gauge "stencil_template_resident" Some(Unit::Bytes), ["template"]
        "Pages of the template in the page cache, which all clones share.";
    TEMPLATE_CACHE Gauge "stencil_template_store_cache" Some(Unit::Bytes), ["template"]
        "Page cache of the files of the store that hold the template. A file of several templates counts for each.";
    TEMPLATE_CLONES Gauge "stencil_template_clones" None, ["template"] "Clones that map the template.";
    SUM_PRIVATE Gauge "stencil_template_clones_private" Some(Unit::Bytes), ["template"]
        "Copied pages of the clones in RAM. A page that several clones share counts for each.";
    SUM_SWAP Gauge "stencil_template_clones_swap" Some(Unit::Bytes), ["template"] "Copied pages of the clones in swap.";
    SUM_DIRTY Gauge "stencil_template_clones_dirty_pages" None, ["template"]
        "Pages of 4096 bytes that the clones have copied or replaced.";
    SUM_TABLES Gauge "stencil_template_clones_page_table" Some(Unit::Bytes), ["template"]
        "Page tables of the clones, without those of KVM.";
    SUM_OVERHEAD Gauge "stencil_template_clones_overhead" Some(Unit::Bytes), ["template"]
        "Private memory of the clones outside template mappings.";
    SUM_DISK Gauge "stencil_template_clones_disk" Some(Unit::Bytes), ["template"]
        "Disks and jails of the clones in a file system without other storage.";
    SUM_MAPPED Gauge "stencil_template_clones_mapped" Some(Unit::Bytes), ["template"]
        "Size of the template mappings of the clones.";
    SUM_CLEAN Gauge "stencil_template_clones_mapped_clean" Some(Unit::Bytes), ["template"]
        "Template pages that the page tables of the clones map unchanged.";
    SUM_HUGE Gauge "stencil_template_clones_pmd_mapped" Some(Unit::Bytes), ["template"]
        "Part of the unchanged template pages that 2 MiB entries map.";

    CLONE_PRIVATE Gauge "stencil_clone_private" Some(Unit::Bytes), ["clone" "pid" "template"]
        "Copied pages of one clone in RAM. Only with --per-clone.";
    CLONE_SWAP Gauge "stencil_clone_swap" Some(Unit::Bytes), ["clone" "pid" "template"]
        "Copied pages of one clone in swap. Only with --per-clone.";
    CLONE_TABLES Gauge "stencil_clone_page_table" Some(Unit::Bytes), ["clone" "pid" "template"]
        "Page tables of one clone, without those of KVM. Only with --per-clone.";
    CLONE_OVERHEAD Gauge "stencil_clone_overhead" Some(Unit::Bytes), ["clone" "pid" "template"]
        "Private memory of one clone outside template mappings. Only with --per-clone.";

    UNREADABLE Gauge "stencil_unreadable_records" None, []
        "Records of mounts that cannot be read; the metrics of their mounts are missing.";
    MOUNT Info "stencil_mount" None, ["mount" "store" "serve" "version" "server_version" "detached"]
        "Store, serve mode and versions of a mount whose supervisor answers.";
    MOUNT_UP Gauge "stencil_mount_up" None, ["mount"] "1 if the supervisor of the mount answers.";
    SERVER_UP Gauge "stencil_server_up" None, ["mount"] "1 if the mount has a server.";
    PENDING Gauge "stencil_mount_pending_requests" None, ["mount"]
        "Requests of the kernel to the mount that are not answered yet.";
    TEMPLATES Gauge "stencil_mount_templates" None, ["mount" "serving"]
        "Templates by how the next open of their largest file is served: kernel, passthrough or decode.";
    CACHE_LIMIT Gauge "stencil_mount_backings_limit" Some(Unit::Bytes), ["mount"] "Limit of all backings.";
    CACHE_USED Gauge "stencil_mount_backings" Some(Unit::Bytes), ["mount"] "Bytes that all backings occupy.";

    RESTARTS Counter "stencil_server_restarts" None, ["mount"] "Servers that were started to replace another server.";
    EARLY_ENDS Gauge "stencil_server_early_ends" None, ["mount"]
        "Servers in a row that ended soon after their start.";
    STALLS Counter "stencil_server_stalls" None, ["mount"]
        "Servers that the watchdog replaced because a request made no progress.";
    REQUESTS Counter "stencil_server_requests" None, ["mount"] "Requests of the kernel that were answered.";
    LOOKUPS Counter "stencil_server_lookups" None, ["mount"] "LOOKUP requests.";
    OPENS Counter "stencil_server_opens" None, ["mount" "serving"]
        "OPEN requests, by how the file is served: passthrough (also kernel decode) or decode.";
    REFUSED Counter "stencil_server_refused_requests" None, ["mount" "request"]
        "Opens for writing, and other requests that would modify a file. All of them are refused.";
    READS Counter "stencil_server_reads" None, ["mount"] "READ requests to files served by decode.";
    READ_BYTES Counter "stencil_server_read" Some(Unit::Bytes), ["mount"] "Bytes sent in replies to READ requests.";
    BLOCKS Counter "stencil_server_blocks" None, ["mount" "source"]
        "Blocks in replies to READ requests: decoded from the store, zero, or in the cache of decoded blocks.";
    DAMAGED Counter "stencil_server_damaged_requests" None, ["mount"]
        "Requests that failed with EIO because of damage.";
    FAILED Counter "stencil_server_failed_requests" None, ["mount"]
        "Requests that failed in the server for other reasons.";
    READ_TIME Histogram "stencil_server_read_duration" Some(Unit::Seconds), ["mount"]
        "Time from the arrival of a READ request in the server until the reply. Passthrough causes no READ requests.";
    OPEN_TIME Histogram "stencil_server_open_duration" Some(Unit::Seconds), ["mount"]
        "Time from the arrival of an OPEN request at the server until the reply, including the wait for a hydration.";
    HYDRATIONS_STARTED Counter "stencil_hydrations_started" None, ["mount"] "Hydrations that were started.";
    HYDRATIONS Counter "stencil_hydrations" None, ["mount" "result"] "Hydrations that have ended: done or failed.";
    HYDRATED Counter "stencil_hydrated" Some(Unit::Bytes), ["mount"] "Bytes of data written to backings.";
    EVICTIONS Counter "stencil_evictions" None, ["mount"] "Unused backings that were evicted.";
    SCRUBS Counter "stencil_scrubbed_files" None, ["mount" "result"]
        "Files that the scrub of kernel decode has verified again: intact or damaged.";
    SCRUBBED Counter "stencil_scrubbed" Some(Unit::Bytes), ["mount"] "Bytes that the scrub has verified again.";
    OUTAGES Counter "stencil_store_outages" None, ["mount"] "Times that the store was unreachable.";
    OUTAGES_LONG Counter "stencil_store_long_outages" None, ["mount"]
        "Outages of the store that were longer than the limit of the watchdog.";
    OUTAGE_READS Counter "stencil_store_outage_reads" None, ["mount"] "READ requests that waited for the store.";
}

/// Names and values of labels.
pub type Labels = Vec<(&'static str, String)>;

/// The value of a sample.
#[derive(Debug)]
pub enum Value {
    Integer(u64),
    Number(f64),
    Info,
    Histogram(Latency),
}

/// One sample of a metric.
#[derive(Debug)]
pub struct Sample {
    pub metric: &'static Metric,
    pub labels: Labels,
    pub value: Value,
}

impl Metric {
    /// Creates a sample. `values` are those of the labels, in order.
    pub fn sample(&'static self, values: &[&str], value: Value) -> Sample {
        debug_assert_eq!(self.labels.len(), values.len(), "{}", self.name);
        let values = values.iter().map(|value| (*value).to_owned());
        Sample { metric: self, labels: self.labels.iter().copied().zip(values).collect(), value }
    }

    /// Writes the metric with these samples.
    ///
    /// # Errors
    /// Returns an error if a value does not fit the kind of the metric.
    pub fn encode(&self, samples: &[&Sample], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Gauge => MetricType::Gauge,
            Kind::Counter => MetricType::Counter,
            Kind::Info => MetricType::Info,
            Kind::Histogram => MetricType::Histogram,
        };
        let mut encoder = encoder.encode_descriptor(self.name, self.help, self.unit.as_ref(), kind)?;
        samples.iter().try_for_each(|sample| self.encode_sample(sample, &mut encoder))
    }

    fn encode_sample(&self, sample: &Sample, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        if self.kind == Kind::Info {
            return encoder.encode_info(&sample.labels);
        }
        let mut encoder = encoder.encode_family(&sample.labels)?;
        match &sample.value {
            Value::Integer(count) if self.kind == Kind::Counter => {
                encoder.encode_counter::<Labels, _, u64>(count, None)
            }
            Value::Integer(value) => encoder.encode_gauge(value),
            Value::Number(value) => encoder.encode_gauge(value),
            Value::Info => Err(fmt::Error),
            Value::Histogram(latency) => {
                let bounds = latency.bounds_seconds.iter().copied().chain([f64::INFINITY]);
                let buckets: Vec<(f64, u64)> = bounds.zip(latency.counts.iter().copied()).collect();
                let count = buckets.iter().map(|(_, count)| count).sum();
                encoder.encode_histogram::<Labels>(latency.sum_seconds, count, &buckets, None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    impl Metric {
        /// The row of the metric in the reference.
        fn row(&self) -> String {
            let kind = match self.kind {
                Kind::Gauge => "gauge",
                Kind::Counter => "counter",
                Kind::Info => "info",
                Kind::Histogram => "histogram",
            };
            let suffix = match self.kind {
                Kind::Counter => "_total",
                Kind::Info => "_info",
                Kind::Gauge | Kind::Histogram => "",
            };
            let unit = self.unit.as_ref().map_or_else(String::new, |unit| format!("_{}", unit.as_str()));
            let labels = self.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
            format!("| `{}{unit}{suffix}` | {kind} | {labels} | {} |", self.name, self.help)
        }
    }

    #[test]
    fn the_reference_has_exactly_these_metrics() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reference/metrics.md"));
        let page = page.unwrap();
        let found: Vec<&str> = page.lines().filter(|line| line.starts_with("| `stencil_")).collect();
        let wanted: Vec<String> = ALL.iter().map(|metric| metric.row()).collect();
        assert_eq!(found, wanted, "the rows should be:\n{}", wanted.join("\n"));
    }

    #[test]
    fn names_and_help_texts_follow_the_conventions() {
        let mut names = BTreeSet::new();
        for metric in ALL {
            let Metric { name, help, labels, .. } = metric;
            assert!(names.insert(*name), "{name}");
            assert!(name.starts_with("stencil_") && !name.ends_with("_total"), "{name}");
            let units = ["bytes", "seconds", "total", "info"].map(|unit| format!("_{unit}"));
            assert!(units.iter().all(|unit| !name.ends_with(unit)), "{name}: the unit is a field");
            assert!(help.ends_with('.') && !help.contains(['\\', '\n', '|']), "{name}: {help}");
            let pages = ["page", "address", "frame", "path", "file"];
            assert!(labels.iter().all(|label| !pages.contains(label)), "{name}: unbounded labels");
            let of_processes = labels.contains(&"pid") || labels.contains(&"clone");
            assert_eq!(of_processes, name.starts_with("stencil_clone_"), "{name}");
        }
    }
}
