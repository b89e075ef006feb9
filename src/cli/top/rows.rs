//! The rows of clones: their order, and which of them match a filter.

use std::cmp::Reverse;
use std::collections::HashMap;

use super::figures::Figures;
use crate::clones::accounting::CloneMemory;
use crate::clones::accounting::sampler::Layout;
use crate::store::Digest;
use crate::sys::process::ProcessId;

/// The figure by which clones are sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SortKey {
    /// Copied pages, the most first
    Copied,
    /// Copied pages per second, the most first
    Rate,
    /// Clean template pages, the most first
    Clean,
    /// Page tables, the largest first
    Tables,
    /// Memory outside the template, the most first
    Overhead,
    /// Name of the clone
    Name,
    /// Process id
    Pid,
}

impl SortKey {
    /// All of them, in the order of the key `s`.
    pub const ALL: [SortKey; 7] = [
        SortKey::Copied,
        SortKey::Rate,
        SortKey::Clean,
        SortKey::Tables,
        SortKey::Overhead,
        SortKey::Name,
        SortKey::Pid,
    ];

    /// Returns the name on the screen and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            SortKey::Copied => "copied",
            SortKey::Rate => "rate",
            SortKey::Clean => "clean",
            SortKey::Tables => "tables",
            SortKey::Overhead => "overhead",
            SortKey::Name => "name",
            SortKey::Pid => "pid",
        }
    }

    /// Returns the next one.
    pub fn next(self) -> SortKey {
        let at = Self::ALL.iter().position(|key| *key == self).unwrap_or(0);
        Self::ALL[(at + 1) % Self::ALL.len()]
    }
}

/// A clone, or a process that may be one.
#[derive(Debug, Clone)]
pub struct Row {
    pub process: ProcessId,
    /// Id of the clone, or the process id.
    pub id: String,
    /// Reference given at launch; otherwise the command.
    pub name: String,
    pub kind: String,
    pub digest: Option<Digest>,
    /// `None` if the process could not be inspected.
    pub memory: Option<CloneMemory>,
    pub rate: Option<f64>,
    pub blocked: bool,
    pub layout: Option<Layout>,
    /// Texts that a filter searches, in lower case, one a line.
    text: String,
}

impl Row {
    /// Returns all rows of a sample, those that are blocked first.
    pub fn all(figures: &Figures, sort: SortKey) -> Vec<Row> {
        let blocked = figures.blocked.iter().map(|blocked| {
            let pid = blocked.process.pid;
            let (id, reference) = blocked.clone.clone().unwrap_or_else(|| (pid.to_string(), String::new()));
            Row {
                process: blocked.process,
                text: format!("{id}\n{pid}\n{reference}\n{}", blocked.command).to_lowercase(),
                id,
                name: if reference.is_empty() { blocked.command.clone() } else { reference },
                kind: "unknown".into(),
                digest: None,
                memory: None,
                rate: None,
                blocked: true,
                layout: None,
            }
        });
        // Template, tags and labels are the same for many clones.
        let mut of_templates: HashMap<Digest, String> = HashMap::new();
        for template in &figures.templates {
            let mut text = template.digest.to_string();
            let labels = figures.labels.get(&template.digest).into_iter().flatten();
            template.tags.iter().chain(labels).for_each(|word| {
                text.push('\n');
                text.push_str(word);
            });
            of_templates.insert(template.digest, text);
        }
        let clones = figures.clones.iter().map(|clone| {
            let row = &clone.row;
            let mut text = format!("{}\n{}\n{}\n{}\n", row.id, row.pid, row.command, row.kind);
            row.maps
                .iter()
                .filter_map(|map| of_templates.get(&map.digest))
                .for_each(|words| text.push_str(words));
            text.push('\n');
            text.push_str(row.reference.as_deref().unwrap_or_default());
            Row {
                process: clone.process,
                id: row.id.clone(),
                name: row.reference.as_ref().unwrap_or(&row.command).clone(),
                kind: row.kind.clone(),
                digest: Some(row.digest),
                memory: Some(row.memory),
                rate: clone.copied_pages_per_second,
                blocked: clone.blocked,
                layout: clone.layout.clone(),
                text: text.to_lowercase(),
            }
        });
        let mut rows: Vec<Row> = blocked.chain(clones).collect();
        rows.sort_by(|a, b| a.compare(b, sort));
        rows
    }

    fn compare(&self, other: &Row, sort: SortKey) -> std::cmp::Ordering {
        let figure = |row: &Row| {
            let memory = row.memory.unwrap_or_default();
            Reverse(match sort {
                SortKey::Copied => memory.dirty_pages.get(),
                SortKey::Clean => memory.mapped_clean_bytes.get(),
                SortKey::Tables => memory.page_table_bytes.get(),
                SortKey::Overhead => memory.overhead_bytes.get(),
                SortKey::Rate | SortKey::Name | SortKey::Pid => 0,
            })
        };
        let rate = |row: &Row| row.rate.unwrap_or(f64::NEG_INFINITY);
        (!self.blocked)
            .cmp(&!other.blocked)
            .then_with(|| match sort {
                SortKey::Rate => rate(other).total_cmp(&rate(self)),
                SortKey::Name => self.id.cmp(&other.id),
                _ => figure(self).cmp(&figure(other)),
            })
            .then_with(|| self.process.pid.cmp(&other.process.pid))
    }

    /// Returns true if the template, a tag, a label, the id, the process id, the reference, the kind or the command
    /// contains this text, in lower case.
    pub fn matches(&self, filter: &str) -> bool {
        self.text.contains(filter)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::cli::top::figures::CloneFigures;
    use crate::clones::accounting::CloneRow;
    use crate::clones::accounting::sampler::{BlockedProcess, PageState};
    use crate::clones::accounting::{TemplateMemory, Totals};
    use crate::clones::find::TemplateMapping;
    use crate::units::{Bytes, PageCount};
    use std::collections::BTreeMap;

    const MIB: u64 = 1 << 20;

    fn clone(pid: u32, dirty: u64, rate: Option<f64>, template: u8) -> CloneFigures {
        let digest = Digest::new([template; 32]);
        let memory = CloneMemory {
            mapped_bytes: Bytes::new(64 * MIB),
            mapped_clean_bytes: Bytes::new(u64::from(pid) * 4096),
            private_bytes: PageCount::new(dirty).bytes(),
            dirty_pages: PageCount::new(dirty),
            page_table_bytes: Bytes::new(200 << 10),
            overhead_bytes: Bytes::new(300 << 10),
            ..CloneMemory::default()
        };
        let row = CloneRow {
            labels: BTreeMap::new(),
            id: format!("c{pid}"),
            pid,
            pids: vec![pid],
            reference: pid.is_multiple_of(2).then(|| "web:1".to_owned()),
            command: "vmm-Prog".into(),
            cgroup: "/".into(),
            uid: 0,
            digest,
            kind: "command".into(),
            memory,
            maps: vec![TemplateMapping { digest, ..TemplateMapping::of_pages(0, 0..16384, 16384) }],
        };
        let ranges = vec![(0..dirty, PageState::Copied), (dirty..dirty + u64::from(pid), PageState::Clean)];
        let layout = Some(Layout { pages: 16384, ranges });
        let process = ProcessId { pid, identity: u64::from(pid) };
        CloneFigures { row, copied_pages_per_second: rate, blocked: pid == 13, process, layout }
    }

    /// Figures of five clones and a process that cannot be inspected.
    pub fn figures() -> Figures {
        let template = |byte: u8, tag: &str| TemplateMemory {
            resident_zero_bytes: Bytes::ZERO,
            bytes_per_further_clone: None,
            digest: Digest::new([byte; 32]),
            tags: [tag.to_owned()].into(),
            serving: "passthrough".into(),
            size_bytes: Bytes::new(64 * MIB),
            data_bytes: Bytes::new(48 * MIB),
            resident_bytes: Bytes::new(40 * MIB),
            store_cache_bytes: Bytes::new(8 * MIB),
            clones: 3,
        };
        let totals = Totals {
            clones: 5,
            mapped_bytes: Bytes::new(320 * MIB),
            template_bytes: Bytes::new(80 * MIB),
            private_bytes: Bytes::new(44 * MIB),
            host_bytes: Bytes::new(130 * MIB),
            bytes_per_further_clone: Some(Bytes::new(9 * MIB)),
            clones_per_gib: Some(113.8),
            ..Totals::default()
        };
        Figures {
            time: 1_767_323_045,
            interval_seconds: Some(1.0),
            templates: vec![template(1, "web:1"), template(2, "Database:7")],
            clones: vec![
                clone(10, 4000, Some(0.0), 1),
                clone(11, 900, Some(250.5), 2),
                clone(12, 6000, None, 1),
                clone(13, 20, Some(0.0), 2),
                clone(14, 900, Some(-3.0), 1),
            ],
            totals: Some(totals),
            copied_pages_per_second: Some(247.5),
            templates_age_seconds: Some(0.0),
            blocked: vec![BlockedProcess {
                process: ProcessId { pid: 77, identity: 77 },
                command: "actor".into(),
                clone: None,
            }],
            labels: [(Digest::new([2; 32]), vec!["os=Debian".to_owned()])].into(),
            problem: None,
        }
    }

    fn ids(sort: SortKey) -> Vec<String> {
        Row::all(&figures(), sort).into_iter().map(|row| row.id).collect()
    }

    #[test]
    fn blocked_rows_come_first_and_equal_figures_are_in_the_order_of_pids() {
        assert_eq!(ids(SortKey::Copied), ["c13", "77", "c12", "c10", "c11", "c14"]);
        assert_eq!(ids(SortKey::Rate), ["c13", "77", "c11", "c10", "c14", "c12"]);
        assert_eq!(ids(SortKey::Clean), ["c13", "77", "c14", "c12", "c11", "c10"]);
        for sort in [SortKey::Tables, SortKey::Overhead, SortKey::Pid] {
            assert_eq!(ids(sort)[2..], ["c10", "c11", "c12", "c14"], "{sort:?}");
        }
        assert_eq!(ids(SortKey::Name), ["77", "c13", "c10", "c11", "c12", "c14"]);
    }

    #[test]
    fn a_filter_finds_template_tag_id_label_reference_and_command() {
        let found = |filter: &str| -> Vec<String> {
            let rows = Row::all(&figures(), SortKey::Pid);
            rows.into_iter().filter(|row| row.matches(filter)).map(|row| row.id).collect()
        };
        assert_eq!(found("database"), ["c13", "c11"]);
        assert_eq!(found("os=debian"), ["c13", "c11"]);
        assert_eq!(found("010101"), ["c10", "c12", "c14"]);
        assert_eq!(found("c12"), ["c12"]);
        assert_eq!(found("77"), ["77"]);
        assert_eq!(found("vmm-prog").len(), 5);
        assert_eq!(found("actor"), ["77"]);
        assert_eq!(found("").len(), 6);
        // Words of different fields are not one text.
        assert!(found("0202database").is_empty());
    }

    #[test]
    fn the_key_goes_through_all_figures() {
        let mut key = SortKey::Copied;
        for expected in &SortKey::ALL[1..] {
            key = key.next();
            assert_eq!(key, *expected);
        }
        assert_eq!(key.next(), SortKey::Copied);
    }
}
