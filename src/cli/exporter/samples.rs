//! The values of the metrics, from the last figures.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, prometheus_text, text};
use prometheus_client::registry::Registry;

use super::collector::View;
use super::figures::{ClonesFigures, Memory, MountFigures, MountsFigures, Subject};
use super::http::Format;
use super::metrics::*;
use crate::control::MountStatus;
use crate::units::Bytes;

/// Largest number of tags in a label.
const MAX_TAGS: usize = 8;

/// What a scrape shows.
#[derive(Debug)]
pub struct Scrape {
    pub clones: View<ClonesFigures>,
    pub mounts: View<MountsFigures>,
}

#[derive(Debug, Default)]
struct Samples(Vec<Sample>);

impl Samples {
    /// Adds a sample. `values` are those of the metric's labels, in order.
    fn add(&mut self, metric: &'static Metric, values: &[&str], value: Value) {
        self.0.push(metric.sample(values, value));
    }

    fn bytes(&mut self, metric: &'static Metric, values: &[&str], bytes: Bytes) {
        self.add(metric, values, Value::Integer(bytes.get()));
    }

    fn count(&mut self, metric: &'static Metric, values: &[&str], count: u64) {
        self.add(metric, values, Value::Integer(count));
    }

    fn collector<T>(&mut self, subject: Subject, view: &View<T>) {
        let name = [subject.name()];
        let mut seconds = |metric, time: Duration| self.add(metric, &name, Value::Number(time.as_secs_f64()));
        if let Some((_, began)) = &view.last {
            seconds(&AGE, began.elapsed());
            seconds(&DURATION, view.duration);
        }
        self.count(&BLOCKED, &name, view.blocked.into());
        self.count(&COLLECTIONS, &name, view.collections);
        self.count(&FAILURES, &name, view.failures);
    }

    fn clones(&mut self, figures: &ClonesFigures) {
        self.count(&CLONES, &[], figures.clones);
        for (part, bytes) in &figures.parts {
            self.bytes(&PARTS, &[part], *bytes);
        }
        self.bytes(&MAPPED, &[], figures.mapped_bytes);
        self.bytes(&UNSHARED, &[], figures.copied_bytes);
        self.bytes(&SWAP, &[], figures.swap_bytes);
        if let Some(bytes) = figures.per_further_clone_bytes {
            self.bytes(&FURTHER, &[], bytes);
        }
        for template in &figures.templates {
            let digest = template.digest.to_string();
            self.add(&TEMPLATE, &[&digest, &tags(&template.tags), &template.serving], Value::Info);
            let name = [digest.as_str()];
            self.bytes(&TEMPLATE_SIZE, &name, template.size_bytes);
            self.bytes(&TEMPLATE_DATA, &name, template.data_bytes);
            self.bytes(&TEMPLATE_RESIDENT, &name, template.resident_bytes);
            self.bytes(&TEMPLATE_CACHE, &name, template.store_cache_bytes);
            self.count(&TEMPLATE_CLONES, &name, template.clones);
            let Memory { private_bytes, swap_bytes, dirty_pages, page_table_bytes, .. } = template.memory;
            self.bytes(&SUM_PRIVATE, &name, private_bytes);
            self.bytes(&SUM_SWAP, &name, swap_bytes);
            self.count(&SUM_DIRTY, &name, dirty_pages.get());
            self.bytes(&SUM_TABLES, &name, page_table_bytes);
            self.bytes(&SUM_OVERHEAD, &name, template.memory.overhead_bytes);
            self.bytes(&SUM_DISK, &name, template.memory.disk_bytes);
            self.bytes(&SUM_MAPPED, &name, template.memory.mapped_bytes);
            self.bytes(&SUM_CLEAN, &name, template.memory.mapped_clean_bytes);
            self.bytes(&SUM_HUGE, &name, template.memory.pmd_mapped_bytes);
        }
        for clone in &figures.largest {
            let (pid, digest) = (clone.pid.to_string(), clone.digest.to_string());
            let labels = [clone.id.as_str(), &pid, &digest];
            self.bytes(&CLONE_PRIVATE, &labels, clone.memory.private_bytes);
            self.bytes(&CLONE_SWAP, &labels, clone.memory.swap_bytes);
            self.bytes(&CLONE_TABLES, &labels, clone.memory.page_table_bytes);
            self.bytes(&CLONE_OVERHEAD, &labels, clone.memory.overhead_bytes);
        }
    }

    fn mounts(&mut self, figures: &MountsFigures) {
        self.count(&UNREADABLE, &[], figures.unreadable_records);
        let mut names = BTreeSet::new();
        // The first mount at a path is the topmost and keeps its name.
        for mount in &figures.mounts {
            let mut name = mount.mountpoint.clone();
            if !names.insert(name.clone()) {
                name = format!("{name} (device {})", mount.device);
                names.insert(name.clone());
            }
            self.count(&MOUNT_UP, &[&name], mount.status.is_some().into());
            if let Some(pending) = mount.pending {
                self.count(&PENDING, &[&name], pending);
            }
            if let Some(status) = &mount.status {
                self.status(&name, mount, status);
            }
        }
    }

    fn status(&mut self, name: &str, mount: &MountFigures, status: &MountStatus) {
        let server_version = status.server_version.as_deref().unwrap_or_default();
        let detached = if mount.detached { "true" } else { "false" };
        let info = [name, &mount.store, &status.serve, &status.version, server_version, detached];
        self.add(&MOUNT, &info, Value::Info);
        let (mount, has_templates) = ([name], mount.has_templates);
        self.count(&SERVER_UP, &mount, status.server_pid.is_some().into());
        for serving in ["kernel", "passthrough", "decode"].into_iter().filter(|_| has_templates) {
            let count = status.templates.iter().filter(|template| template.serving.name() == serving).count();
            self.count(&TEMPLATES, &[name, serving], count as u64);
        }
        self.bytes(&CACHE_LIMIT, &mount, status.cache_size);
        self.bytes(&CACHE_USED, &mount, status.cache_used);
        self.count(&RESTARTS, &mount, status.restarts);
        self.count(&EARLY_ENDS, &mount, status.early_ends.into());
        for (counter, metric, label) in COUNTERS {
            // A supervisor of an earlier version may lack a counter.
            if let Some(count) = status.counters.get(*counter) {
                let labels: Vec<&str> = [name].into_iter().chain(*label).collect();
                self.count(metric, &labels, *count);
            }
        }
        for (operation, metric) in [("read", &READ_TIME), ("open", &OPEN_TIME)] {
            if let Some(latency) = status.latencies.get(operation) {
                self.add(metric, &mount, Value::Histogram(latency.clone()));
            }
        }
    }
}

/// The counters of `stencil status`, with their metrics and the value of a second label.
static COUNTERS: &[(&str, &Metric, Option<&str>)] = &[
    ("watchdog_replaced", &STALLS, None),
    ("answers", &REQUESTS, None),
    ("lookups", &LOOKUPS, None),
    ("opens_passthrough", &OPENS, Some("passthrough")),
    ("opens_decode", &OPENS, Some("decode")),
    ("opens_refused", &REFUSED, Some("open")),
    ("writes_refused", &REFUSED, Some("modify")),
    ("reads", &READS, None),
    ("read_bytes", &READ_BYTES, None),
    ("blocks_decoded", &BLOCKS, Some("decoded")),
    ("blocks_zero", &BLOCKS, Some("zero")),
    ("blocks_cached", &BLOCKS, Some("cached")),
    ("damaged", &DAMAGED, None),
    ("failed", &FAILED, None),
    ("hydrations_started", &HYDRATIONS_STARTED, None),
    ("hydrations_done", &HYDRATIONS, Some("done")),
    ("hydrations_failed", &HYDRATIONS, Some("failed")),
    ("hydrated_bytes", &HYDRATED, None),
    ("evictions", &EVICTIONS, None),
    ("scrubs_done", &SCRUBS, Some("intact")),
    ("scrubs_damaged", &SCRUBS, Some("damaged")),
    ("scrubbed_bytes", &SCRUBBED, None),
    ("source_outages", &OUTAGES, None),
    ("slow_source", &OUTAGES_LONG, None),
    ("source_waits", &OUTAGE_READS, None),
];

fn tags(tags: &[String]) -> String {
    let mut text = tags.iter().take(MAX_TAGS).cloned().collect::<Vec<_>>().join(",");
    if tags.len() > MAX_TAGS {
        text.push_str(&format!(" and {} more", tags.len() - MAX_TAGS));
    }
    text
}

impl Collector for Samples {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for metric in ALL {
            let samples: Vec<&Sample> =
                self.0.iter().filter(|sample| std::ptr::eq(sample.metric, *metric)).collect();
            if !samples.is_empty() {
                metric.encode(&samples, &mut encoder)?;
            }
        }
        Ok(())
    }
}

/// Returns the metrics as text.
///
/// # Errors
/// Returns an error if the figures are not consistent: a program error.
pub fn encode(scrape: &Scrape, format: Format) -> Result<String, fmt::Error> {
    let mut samples = Samples::default();
    samples.add(&BUILD, &[env!("CARGO_PKG_VERSION")], Value::Info);
    samples.collector(Subject::Clones, &scrape.clones);
    samples.collector(Subject::Mounts, &scrape.mounts);
    if let Some((figures, _)) = &scrape.clones.last {
        samples.clones(figures);
    }
    if let Some((figures, _)) = &scrape.mounts.last {
        samples.mounts(figures);
    }
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Arc::new(samples)));
    let mut out = String::new();
    match format {
        Format::OpenMetrics => text::encode(&mut out, &registry)?,
        Format::Text => prometheus_text::encode(&mut out, &registry)?,
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view<T>(figures: T) -> View<T> {
        let last = Some((Arc::new(figures), std::time::Instant::now()));
        View { last, duration: Duration::ZERO, collections: 1, failures: 0, blocked: false }
    }

    #[test]
    fn mounts_at_one_path_have_different_names_and_names_are_escaped() {
        let mount = |mountpoint: &str, device, detached| MountFigures {
            mountpoint: mountpoint.to_owned(),
            store: "/store".to_owned(),
            device,
            detached,
            status: None,
            has_templates: false,
            pending: Some(device),
        };
        let mounts = vec![mount("/a", 8, false), mount("/a", 7, true), mount("/b \"\\\n", 9, false)];
        let clones = View { last: None, ..view(ClonesFigures::default()) };
        let scrape = Scrape { clones, mounts: view(MountsFigures { mounts, unreadable_records: 0 }) };
        for format in [Format::OpenMetrics, Format::Text] {
            let text = encode(&scrape, format).unwrap();
            for line in [
                "stencil_mount_pending_requests{mount=\"/a\"} 8\n",
                "stencil_mount_pending_requests{mount=\"/a (device 7)\"} 7\n",
                "stencil_mount_pending_requests{mount=\"/b \\\"\\\\\\n\"} 9\n",
            ] {
                assert!(text.contains(line), "{line}{text}");
            }
            assert!(!text.contains("stencil_clones"), "there are no figures of clones yet");
        }
    }

    #[test]
    fn a_label_names_a_bounded_number_of_tags() {
        let many: Vec<String> = (0..MAX_TAGS + 3).map(|number| format!("web:{number}")).collect();
        assert_eq!(tags(&many[..2]), "web:0,web:1");
        assert!(tags(&many).ends_with("web:7 and 3 more"), "{}", tags(&many));
    }
}
