//! The figures of one collection, which a child process prints as one line of JSON.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cli::Global;
use crate::cli::output::{Report, to_json};
use crate::cli::store_filter::StoreFilter;
use crate::clones::accounting::{self, CloneMemory, CloneRow, Density};
use crate::control::{self, Mount, MountStatus, TemplateStatus};
use crate::error::Result;
use crate::sanitize::path_text;
use crate::store::Digest;
use crate::sys::fuse::control_fs::Waiting;
use crate::sys::process::procfs;
use crate::units::{Bytes, PageCount};

/// Longest wait for the supervisors of all mounts.
const SUPERVISORS_TIMEOUT: Duration = Duration::from_secs(4);

/// What a collection is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Subject {
    /// Memory of clones and templates.
    Clones,
    /// Mounts, their supervisors and servers.
    Mounts,
}

impl Subject {
    /// Returns the name on the command line and in labels.
    pub fn name(self) -> &'static str {
        match self {
            Subject::Clones => "clones",
            Subject::Mounts => "mounts",
        }
    }
}

/// The result of a collection.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome<T> {
    /// The figures.
    Figures(T),
    /// Why there are none.
    Error(String),
}

/// Memory of clones, as sums over the clones of a template or for one clone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    pub private_bytes: Bytes,
    pub swap_bytes: Bytes,
    pub dirty_pages: PageCount,
    pub page_table_bytes: Bytes,
    pub overhead_bytes: Bytes,
    pub disk_bytes: Bytes,
    pub mapped_bytes: Bytes,
    pub mapped_clean_bytes: Bytes,
    pub pmd_mapped_bytes: Bytes,
}

impl Memory {
    fn add(&mut self, of: &CloneMemory) {
        self.private_bytes += of.private_bytes;
        self.swap_bytes += of.swap_bytes;
        self.dirty_pages += of.dirty_pages;
        self.page_table_bytes += of.page_table_bytes;
        self.overhead_bytes += of.overhead_bytes;
        self.disk_bytes += of.disk_bytes;
        self.mapped_bytes += of.mapped_bytes;
        self.mapped_clean_bytes += of.mapped_clean_bytes;
        self.pmd_mapped_bytes += of.pmd_mapped_bytes;
    }
}

/// Figures of one template.
#[derive(Debug, Serialize, Deserialize)]
pub struct TemplateFigures {
    pub digest: Digest,
    pub tags: Vec<String>,
    pub serving: String,
    pub size_bytes: Bytes,
    pub data_bytes: Bytes,
    pub resident_bytes: Bytes,
    pub store_cache_bytes: Bytes,
    pub clones: u64,
    /// Sums over the clones whose first mapping is of this template.
    pub memory: Memory,
}

/// Figures of one clone.
#[derive(Debug, Serialize, Deserialize)]
pub struct CloneFigures {
    pub id: String,
    pub pid: u32,
    pub digest: Digest,
    pub memory: Memory,
}

/// Figures of all clones and templates.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct ClonesFigures {
    pub clones: u64,
    pub mapped_bytes: Bytes,
    pub copied_bytes: Bytes,
    pub swap_bytes: Bytes,
    pub per_further_clone_bytes: Option<Bytes>,
    /// Parts of the host's memory; their sum is `host_bytes` of `stencil density`.
    pub parts: [(String, Bytes); 6],
    pub templates: Vec<TemplateFigures>,
    /// The clones with the most copied memory.
    pub largest: Vec<CloneFigures>,
}

/// Figures of all mounts.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct MountsFigures {
    /// Sorted by mountpoint; of several mounts at one path, the topmost is the first.
    pub mounts: Vec<MountFigures>,
    /// Number of records that cannot be read.
    pub unreadable_records: u64,
}

/// Figures of one mount.
#[derive(Debug, Serialize, Deserialize)]
pub struct MountFigures {
    pub mountpoint: String,
    pub store: String,
    pub device: u64,
    pub detached: bool,
    /// `None` if no supervisor answers.
    pub status: Option<MountStatus>,
    /// True if `status` has the templates: the store was read.
    pub has_templates: bool,
    /// Requests that the kernel has sent and that are not answered; `None` if unknown.
    pub pending: Option<u64>,
}

/// Collects figures. An error is part of the result.
pub fn collect(subject: Subject, per_clone: u32, global: &Global) -> Value {
    fn outcome(found: Result<impl Serialize>) -> Value {
        to_json(&found.map_or_else(|error| Outcome::Error(error.to_string()), Outcome::Figures))
    }
    match subject {
        Subject::Clones => outcome(clones(per_clone, global)),
        Subject::Mounts => outcome(mounts(global)),
    }
}

fn clones(per_clone: u32, global: &Global) -> Result<ClonesFigures> {
    let filter = StoreFilter::of(global)?;
    let control::Listing { mut mounts, dead, unread } = control::list()?;
    if let Some(error) = unread.into_iter().next() {
        return Err(error);
    }
    mounts.extend(control::with_store(dead));
    mounts.retain(|mount| filter.has(&mount.store, &mount.store_id));
    let Density { templates, clones, totals, .. } = accounting::survey(&mounts, None)?.density;
    let mut sums: BTreeMap<Digest, Memory> = BTreeMap::new();
    for clone in &clones {
        sums.entry(clone.digest).or_default().add(&clone.memory);
    }
    let templates = templates.into_iter().map(|template| TemplateFigures {
        memory: sums.get(&template.digest).copied().unwrap_or_default(),
        digest: template.digest,
        tags: template.tags.into_iter().collect(),
        serving: template.serving,
        size_bytes: template.size_bytes,
        data_bytes: template.data_bytes,
        resident_bytes: template.resident_bytes,
        store_cache_bytes: template.store_cache_bytes,
        clones: template.clones,
    });
    let part = |name: &str, bytes| (name.to_owned(), bytes);
    Ok(ClonesFigures {
        clones: totals.clones,
        mapped_bytes: totals.mapped_bytes,
        copied_bytes: totals.copied_bytes,
        swap_bytes: totals.swap_bytes,
        per_further_clone_bytes: totals.bytes_per_further_clone,
        parts: [
            part("template", totals.template_bytes),
            part("store_cache", totals.store_cache_bytes),
            part("private", totals.private_bytes),
            part("page_table", totals.page_table_bytes),
            part("overhead", totals.overhead_bytes),
            part("disk", totals.disk_bytes),
        ],
        templates: templates.collect(),
        largest: largest(clones, per_clone),
    })
}

fn largest(mut clones: Vec<CloneRow>, count: u32) -> Vec<CloneFigures> {
    clones.sort_by_key(|clone| (Reverse(clone.memory.private_bytes), clone.pid));
    clones.truncate(usize::try_from(count).unwrap_or(usize::MAX));
    let figures = |clone: CloneRow| {
        let mut memory = Memory::default();
        memory.add(&clone.memory);
        CloneFigures { id: clone.id, pid: clone.pid, digest: clone.digest, memory }
    };
    clones.into_iter().map(figures).collect()
}

/// Asks all supervisors at the same time: a supervisor that does not answer delays no figures of another mount, and a
/// store that cannot be read hides no answer of its supervisor.
fn mounts(global: &Global) -> Result<MountsFigures> {
    let filter = StoreFilter::of(global)?;
    let listing = control::list()?;
    let mounts: Vec<Mount> =
        listing.mounts.into_iter().filter(|mount| filter.has(&mount.store, &mount.store_id)).collect();
    let mut figures: Vec<MountFigures> = mounts
        .iter()
        .map(|mount| MountFigures {
            mountpoint: path_text(&mount.mountpoint).into_owned(),
            store: path_text(&mount.store).into_owned(),
            device: mount.device,
            detached: mount.detached,
            status: None,
            has_templates: false,
            pending: Waiting::of(mount.device).and_then(|waiting| waiting.read()).ok(),
        })
        .collect();
    let (sender, answers) = mpsc::channel();
    for (index, mount) in mounts.into_iter().enumerate().filter(|(_, mount)| !mount.orphaned) {
        let sender = sender.clone();
        // This process exits without the thread.
        thread::spawn(move || {
            let Ok(snapshot) = mount.snapshot() else { return };
            let status = MountStatus::without_templates(snapshot.clone(), &mount);
            let _ = sender.send((index, status.clone(), false));
            if let Ok(templates) = TemplateStatus::all(&snapshot) {
                let _ = sender.send((index, MountStatus { templates, ..status }, true));
            }
        });
    }
    drop(sender);
    let until = Instant::now() + SUPERVISORS_TIMEOUT;
    let left = || until.saturating_duration_since(Instant::now());
    while let Ok((index, status, has_templates)) = answers.recv_timeout(left()) {
        (figures[index].status, figures[index].has_templates) = (Some(status), has_templates);
    }
    let dead = listing.dead.into_iter().filter(|mount| filter.has(&mount.store, &mount.store_id));
    figures.extend(dead.map(|mount| MountFigures {
        mountpoint: path_text(&mount.mountpoint).into_owned(),
        store: path_text(&mount.store).into_owned(),
        device: mount.device,
        detached: mount.detached,
        status: None,
        has_templates: false,
        pending: None,
    }));
    // A mount covers the earlier ones at its path. A detached mount is not in the table.
    let table = procfs::mounts()?;
    let position = |device| table.iter().rposition(|line| line.dev == device);
    figures.sort_by_cached_key(|mount| (mount.mountpoint.clone(), Reverse(position(mount.device))));
    Ok(MountsFigures { mounts: figures, unreadable_records: listing.unread.len() as u64 })
}

/// The output of a child.
pub struct Collected(pub Value);

impl Report for Collected {
    fn text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}", self.0)
    }

    fn json(&self) -> Value {
        json!({})
    }
}
