//! The RAM that the clones of a template share.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::fs::MetadataExt;

use serde::Serialize;

use super::residency::{self, Resident};
use super::shares::{Parts, TemplatePages};
use crate::clones::find::{CloneProcess, TemplateMapping};
use crate::control::{BackingKind, Mount, Residency, Served};
use crate::error::{Error, Result};
use crate::store::{Digest, Store, StorePath, Template};
use crate::units::Bytes;

/// One template and the RAM that all its clones share.
#[derive(Debug, Clone, Serialize)]
pub struct TemplateMemory {
    /// Digest of the template.
    pub digest: Digest,
    /// All tags of the template, as `NAME:TAG`.
    pub tags: BTreeSet<String>,
    /// `kernel`, `passthrough`, `decode`, or `both` while the template is served in several ways, such as mappings from
    /// before a promotion; `idle` without pages or mappings.
    pub serving: String,
    /// Length of all files.
    pub size_bytes: Bytes,
    /// Size of the pages that are not zero.
    pub data_bytes: Bytes,
    /// Pages in the page cache, of both ways of serving and all mounts.
    pub resident_bytes: Bytes,
    /// Zero pages in the page cache, at least: what files have there beyond their data.
    pub resident_zero_bytes: Bytes,
    /// Page cache of the store's files that hold the template. A file that several templates share is counted for each.
    pub store_cache_bytes: Bytes,
    /// Number of clones that map the template.
    pub clones: u64,
    /// RAM that another clone takes, as the mean of the clones whose first mapping is of the template; null without
    /// such clones.
    pub bytes_per_further_clone: Option<Bytes>,
}

/// The templates of all mounted stores during a measurement.
pub(super) struct Templates {
    pub opened: BTreeMap<Digest, Template>,
    rows: BTreeMap<Digest, TemplateMemory>,
    servings: BTreeMap<Digest, BTreeSet<Served>>,
    /// Files of the stores that hold the templates.
    files: BTreeSet<StorePath>,
}

impl Templates {
    pub fn of(mounts: &[Mount], only: Option<&Digest>) -> Result<Templates> {
        let mut all = Templates {
            opened: BTreeMap::new(),
            rows: BTreeMap::new(),
            servings: BTreeMap::new(),
            files: BTreeSet::new(),
        };
        let mut stores = BTreeSet::new();
        for mount in mounts {
            let store = Store::open(&mount.store)?;
            // A store may be mounted by several paths. Through a bind mount, its files are the same.
            let dir = std::fs::metadata(store.dir());
            let dir = dir.map_err(|e| Error::io("cannot read the store", store.dir(), e))?;
            if stores.insert((dir.dev(), dir.ino())) {
                all.add_store(&store, only)?;
            }
        }
        Ok(all)
    }

    fn add_store(&mut self, store: &Store, only: Option<&Digest>) -> Result<()> {
        let tags = store.tags()?;
        if only.is_none() {
            self.files.extend(store.pack_files()?);
        }
        for digest in store.digests()? {
            if only.is_some_and(|only| *only != digest) {
                continue;
            }
            let template = match store.template(&digest) {
                Ok(template) => template,
                // Inodes::of has logged the error.
                Err(_) => continue,
            };
            let row = self.rows.entry(digest).or_insert_with(|| TemplateMemory {
                digest,
                tags: BTreeSet::new(),
                serving: String::new(),
                size_bytes: template.files().iter().map(|file| file.size).sum(),
                data_bytes: template.files().iter().map(|file| file.data_bytes).sum(),
                resident_bytes: Bytes::ZERO,
                resident_zero_bytes: Bytes::ZERO,
                store_cache_bytes: Bytes::ZERO,
                clones: 0,
                bytes_per_further_clone: None,
            });
            // Several stores may have the same template, with separate tags and files.
            let ours = tags.iter().filter(|tag| tag.digest == digest);
            row.tags.extend(ours.map(|tag| format!("{}:{}", tag.name, tag.tag)));
            for path in template.store_files() {
                row.store_cache_bytes += residency::cached_store_file(&path)?;
                self.files.insert(path);
            }
            self.opened.entry(digest).or_insert(template);
        }
        Ok(())
    }

    pub fn add_residency(&mut self, resident: &[Resident]) {
        for Resident { digest, file, served, bytes } in resident {
            let Some(row) = self.rows.get_mut(digest) else { continue };
            row.resident_bytes += *bytes;
            if *bytes > Bytes::ZERO {
                self.servings.entry(*digest).or_default().insert(*served);
            }
            let files = self.opened.get(digest).into_iter().flat_map(Template::files);
            // The page cache has whole pages.
            let data: Bytes =
                files.filter(|its| its.name == *file).map(|its| its.data_bytes.pages().bytes()).sum();
            row.resident_zero_bytes += bytes.saturating_sub(data);
        }
    }

    /// Returns the templates with the figures of these clones.
    pub fn rows(&self, clones: &[&CloneProcess], backings: &[(usize, Residency)]) -> Vec<TemplateMemory> {
        let (mut rows, mut servings) = (self.rows.clone(), self.servings.clone());
        let key = |(mount, its): &(usize, Residency)| ((*mount, its.digest, its.file.clone()), its.kind);
        let kinds: HashMap<(usize, Digest, String), BackingKind> = backings.iter().map(key).collect();
        let kind = |map: &TemplateMapping| {
            let of_map = kinds.get(&(map.mount, map.digest, map.file.clone()));
            of_map.copied().unwrap_or(BackingKind::Copy)
        };
        for clone in clones {
            for digest in digests_of(clone) {
                if let Some(row) = rows.get_mut(&digest) {
                    row.clones += 1;
                }
            }
            for map in &clone.maps {
                let served = Served::of(map.serving, kind(map));
                servings.entry(map.digest).or_default().insert(served);
            }
        }
        for (digest, row) in &mut rows {
            let mut seen = servings.get(digest).into_iter().flatten();
            row.serving = match (seen.next(), seen.next()) {
                (Some(_), Some(_)) => "both",
                (Some(served), None) => served.name(),
                (None, _) => "idle",
            }
            .to_owned();
        }
        rows.into_values().collect()
    }

    /// Returns the labels of each template that has some, as `KEY=VALUE`.
    pub fn labels(&self) -> BTreeMap<Digest, Vec<String>> {
        let labels = |template: &Template| -> Vec<String> {
            template.policy().labels.iter().map(|(key, value)| format!("{key}={value}")).collect()
        };
        let all = self.opened.iter().map(|(digest, template)| (*digest, labels(template)));
        all.filter(|(_, labels)| !labels.is_empty()).collect()
    }

    pub fn store_cache(&self) -> Result<Bytes> {
        self.files.iter().map(residency::cached_store_file).sum()
    }

    /// Returns the pages of each template, and which of the clones map it.
    pub fn pages(&self, clones: &[&CloneProcess]) -> Vec<TemplatePages> {
        let mut users: BTreeMap<Digest, Vec<usize>> = BTreeMap::new();
        for (index, clone) in clones.iter().enumerate() {
            for digest in digests_of(clone) {
                users.entry(digest).or_default().push(index);
            }
        }
        let pages = |row: &TemplateMemory| TemplatePages {
            resident: row.resident_bytes,
            users: users.remove(&row.digest).unwrap_or_default(),
        };
        self.rows.values().map(pages).collect()
    }
}

/// Returns the templates that a clone maps.
fn digests_of(clone: &CloneProcess) -> BTreeSet<Digest> {
    clone.maps.iter().map(|map| map.digest).collect()
}

/// Sets what another clone of each template takes, from the shares of these clones.
pub(super) fn add_shares(rows: &mut [TemplateMemory], clones: &[&CloneProcess], shares: &[Parts]) {
    for row in rows {
        let its = clones.iter().zip(shares).filter(|(clone, _)| clone.maps[0].digest == row.digest);
        let (count, sum) =
            its.fold((0, Bytes::ZERO), |(count, sum), (_, parts)| (count + 1, sum + parts.of_the_clones()));
        row.bytes_per_further_clone = sum.get().checked_div(count).map(Bytes::new);
    }
}
