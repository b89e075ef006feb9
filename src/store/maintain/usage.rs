//! Disk usage of a store, by template and by kind of data.

use std::ffi::OsStr;
use std::sync::atomic::AtomicBool;

use rustix::fs::FileType;
use serde::Serialize;

use super::liveness::{Liveness, Owner};
use crate::error::Result;
use crate::progress::Progress;
use crate::store::disk::path::StorePath;
use crate::store::{Digest, Store};
use crate::sys::files::directory::Directory;
use crate::units::Bytes;

/// Maximum depth of the search below a store.
const MAX_DEPTH: usize = 32;

/// Disk usage of one template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TemplateUsage {
    /// Digest of the template.
    pub digest: Digest,
    /// Tags of the template.
    pub tags: Vec<String>,
    /// Size of the files in bytes.
    pub logical_bytes: Bytes,
    /// Bytes in 4 KiB pages that are not zero.
    pub data_bytes: Bytes,
    /// Bytes of records that only this template references. After the template is removed, `gc --all` frees all of
    /// them; `gc` may leave some in packs with mostly referenced records.
    pub unique_bytes: Bytes,
    /// Bytes of records that other templates reference too.
    pub shared_bytes: Bytes,
    /// Sum of unique and shared bytes.
    pub stored_bytes: Bytes,
    /// Bytes allocated for the tables.
    pub table_bytes: Bytes,
}

/// Disk usage of a store, in parts that add up to the whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StoreUsage {
    /// Usage of the templates, sorted by digest.
    #[serde(skip)]
    pub templates: Vec<TemplateUsage>,
    /// Size of all files of all templates in bytes.
    pub logical_bytes: Bytes,
    /// Bytes of all files in 4 KiB pages that are not zero.
    pub data_bytes: Bytes,
    /// Bytes of records that exactly one template references.
    pub unique_bytes: Bytes,
    /// Bytes of records that several templates reference, each record counted once.
    pub shared_bytes: Bytes,
    /// Bytes of unreferenced records; `gc` frees most of them.
    pub dead_bytes: Bytes,
    /// Bytes allocated for packs minus the bytes of all records: headers, indexes, rounding to file-system blocks.
    /// Negative if the file system compresses.
    pub overhead_bytes: i64,
    /// Bytes allocated for the tables of all templates.
    pub table_bytes: Bytes,
    /// Bytes allocated for sessions of running and killed commands.
    pub session_bytes: Bytes,
    /// Bytes allocated for tags, locks and directories.
    pub other_bytes: Bytes,
    /// Sum of the seven values from `unique_bytes` on: the usage that du(1) reports for the directory.
    pub store_bytes: Bytes,
}

impl Store {
    /// Computes the disk usage. A damaged template is skipped with a warning in the log, and records that only this
    /// template references count as unreferenced.
    ///
    /// # Errors
    /// Returns an error if the store cannot be read, or if `interrupt` becomes true.
    pub fn usage(&self, interrupt: &AtomicBool, progress: &dyn Progress) -> Result<StoreUsage> {
        let liveness = Liveness::analyze(self, interrupt, progress)?;
        for (digest, error) in &liveness.unreadable {
            log::warn!(
                "template {digest} is left out, and records that only this template references count as \
                 unreferenced: {error}"
            );
        }
        let mut usage = StoreUsage::default();
        let mut parts = vec![(0, 0); liveness.templates.len()];
        let (mut unique, mut shared, mut dead) = (0, 0, 0);
        for (length, owner) in liveness.packs.values().flat_map(|p| p.records()) {
            match owner {
                Owner::Unreferenced => dead += length,
                Owner::One(template) => {
                    unique += length;
                    parts[template].0 += length;
                }
                Owner::Shared => shared += length,
            }
        }
        liveness.shared_by(progress, |template, length| parts[template].1 += length)?;
        let tags = self.tags()?;
        for (template, (unique, shared)) in liveness.templates.iter().zip(parts) {
            let digest = *template.digest();
            let names = tags.iter().filter(|t| t.digest == digest).map(|t| format!("{}:{}", t.name, t.tag));
            let mut directory = Parts::default();
            walk(&template.directory(), |_, bytes| directory.total += bytes)?;
            usage.templates.push(TemplateUsage {
                digest,
                tags: names.collect(),
                logical_bytes: template.size(),
                data_bytes: template.data_bytes(),
                unique_bytes: Bytes::new(unique),
                shared_bytes: Bytes::new(shared),
                stored_bytes: Bytes::new(unique + shared),
                table_bytes: Bytes::new(directory.total),
            });
        }
        usage.logical_bytes = usage.templates.iter().map(|t| t.logical_bytes).sum();
        usage.data_bytes = usage.templates.iter().map(|t| t.data_bytes).sum();
        let parts = self.parts()?;
        usage.unique_bytes = Bytes::new(unique);
        usage.shared_bytes = Bytes::new(shared);
        usage.dead_bytes = Bytes::new(dead);
        usage.overhead_bytes = parts.packs.cast_signed() - (unique + shared + dead).cast_signed();
        usage.table_bytes = Bytes::new(parts.tables);
        usage.session_bytes = Bytes::new(parts.sessions);
        usage.other_bytes = Bytes::new(parts.total - parts.packs - parts.tables - parts.sessions);
        usage.store_bytes = Bytes::new(parts.total);
        Ok(usage)
    }

    fn parts(&self) -> Result<Parts> {
        let mut parts = Parts::default();
        walk(&self.tmp_dir().parent(), |top, bytes| {
            parts.total += bytes;
            match top.map(OsStr::as_encoded_bytes) {
                Some(b"packs") => parts.packs += bytes,
                Some(b"images") => parts.tables += bytes,
                Some(b"tmp") => parts.sessions += bytes,
                _ => {}
            }
        })?;
        Ok(parts)
    }
}

/// Allocated bytes, by directory of the store.
#[derive(Debug, Default)]
struct Parts {
    packs: u64,
    tables: u64,
    sessions: u64,
    total: u64,
}

/// Calls `each` with the allocated bytes of the directory and of every file below. A file in a subdirectory is reported
/// with the name of the top-level subdirectory. Files that are removed during the walk are skipped.
fn walk(path: &StorePath, mut each: impl FnMut(Option<&OsStr>, u64)) -> Result<()> {
    let fail = |e| path.error("cannot read disk usage", e);
    let is_removed = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
    let directory = match path.folder() {
        Ok(directory) => directory,
        Err(e) if is_removed(&e) => return Ok(()),
        Err(e) => return Err(fail(e)),
    };
    each(None, directory.own_metadata().map_err(fail)?.st_blocks.cast_unsigned() * 512);
    for name in directory.names().map_err(fail)? {
        walk_below(&directory, &name, MAX_DEPTH, &mut |depth, bytes| {
            each((depth < MAX_DEPTH).then_some(&*name), bytes);
        })
        .or_else(|e| {
            if is_removed(&e) { Ok(()) } else { Err(path.join(&name).error("cannot read disk usage", e)) }
        })?;
    }
    Ok(())
}

fn walk_below(
    directory: &Directory,
    name: &OsStr,
    depth: usize,
    each: &mut dyn FnMut(usize, u64),
) -> std::io::Result<()> {
    let found = directory.metadata(name)?;
    each(depth, found.st_blocks.cast_unsigned() * 512);
    if FileType::from_raw_mode(found.st_mode) != FileType::Directory || depth == 0 {
        return Ok(());
    }
    let below = directory.folder(name)?;
    for name in below.names()? {
        match walk_below(&below, &name, depth - 1, each) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}
