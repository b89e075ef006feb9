//! Where the bytes of a store are.

use std::ffi::OsStr;
use std::sync::atomic::AtomicBool;

use rustix::fs::FileType;
use serde::Serialize;

use super::census::{Census, Owner};
use super::path::StorePath;
use super::{Digest, Store};
use crate::error::Result;
use crate::sys::folder::Folder;
use crate::units::Bytes;

/// Depth to which a store is searched.
const MAX_DEPTH: usize = 32;

/// One template's part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TemplateUsage {
    /// Which.
    pub digest: Digest,
    /// Its names.
    pub tags: Vec<String>,
    /// Length of its files.
    pub logical_bytes: Bytes,
    /// How much of it lies in 4 KiB pages that are not zero.
    pub data_bytes: Bytes,
    /// Records that it alone needs: a collection gives these back once it is removed.
    pub unique_bytes: Bytes,
    /// Records that others need too.
    pub shared_bytes: Bytes,
    /// Both.
    pub stored_bytes: Bytes,
    /// What its tables take on the disk.
    pub table_bytes: Bytes,
}

/// What a store takes, in parts that add up.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StoreUsage {
    /// Its templates, by digest.
    #[serde(skip)]
    pub templates: Vec<TemplateUsage>,
    /// Length of all files of all templates.
    pub logical_bytes: Bytes,
    /// How much of these lies in 4 KiB pages that are not zero.
    pub data_bytes: Bytes,
    /// Records that one template needs, all templates together.
    pub unique_bytes: Bytes,
    /// Records that several need, each counted once.
    pub shared_bytes: Bytes,
    /// Records that nobody needs: `gc` gives most of them back.
    pub dead_bytes: Bytes,
    /// What packs take beside their records: headers, indexes, rounding to blocks. Below zero where the filesystem
    /// compresses.
    pub overhead_bytes: i64,
    /// Tables of all templates.
    pub table_bytes: Bytes,
    /// Of commands under way, and what killed ones left.
    pub session_bytes: Bytes,
    /// Tags, locks, folders.
    pub other_bytes: Bytes,
    /// The sum of the seven before: what du(1) says of the folder.
    pub store_bytes: Bytes,
}

impl Store {
    /// Counts. A template that is damaged is left out, with a warning in the log; what it alone needs counts as dead.
    ///
    /// # Errors
    /// When the store cannot be read, or `interrupt` became true.
    pub fn usage(&self, interrupt: &AtomicBool) -> Result<StoreUsage> {
        let census = Census::take(self, interrupt)?;
        for (digest, error) in &census.unreadable {
            log::warn!("template {digest} is left out: {error}");
        }
        let mut usage = StoreUsage::default();
        let mut parts = vec![(0, 0); census.templates.len()];
        let (mut unique, mut shared, mut dead) = (0, 0, 0);
        for (length, owner) in census.packs.values().flat_map(|p| p.records()) {
            match owner {
                Owner::Nobody => dead += length,
                Owner::One(template) => {
                    unique += length;
                    parts[template].0 += length;
                }
                Owner::Several => shared += length,
            }
        }
        census.shared_by(|template, length| parts[template].1 += length)?;
        let tags = self.tags()?;
        for (template, (unique, shared)) in census.templates.iter().zip(parts) {
            let digest = *template.digest();
            let names = tags.iter().filter(|t| t.digest == digest).map(|t| format!("{}:{}", t.name, t.tag));
            let mut folder = Parts::default();
            walk(&template.folder(), |_, bytes| folder.total += bytes)?;
            usage.templates.push(TemplateUsage {
                digest,
                tags: names.collect(),
                logical_bytes: template.size(),
                data_bytes: template.data_bytes(),
                unique_bytes: Bytes::new(unique),
                shared_bytes: Bytes::new(shared),
                stored_bytes: Bytes::new(unique + shared),
                table_bytes: Bytes::new(folder.total),
            });
        }
        usage.logical_bytes = usage.templates.iter().map(|t| t.logical_bytes).sum();
        usage.data_bytes = usage.templates.iter().map(|t| t.data_bytes).sum();
        let parts = self.parts()?;
        usage.unique_bytes = Bytes::new(unique);
        usage.shared_bytes = Bytes::new(shared);
        usage.dead_bytes = Bytes::new(dead);
        usage.overhead_bytes = parts.packs as i64 - (unique + shared + dead) as i64;
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

/// Bytes of blocks on the disk.
#[derive(Debug, Default)]
struct Parts {
    packs: u64,
    tables: u64,
    sessions: u64,
    total: u64,
}

/// Calls `each` for the folder and everything below it, with what that takes on the disk. What lies in a subfolder comes
/// with the name of the subfolder. What vanishes meanwhile is passed over.
fn walk(path: &StorePath, mut each: impl FnMut(Option<&OsStr>, u64)) -> Result<()> {
    let fail = |e| path.error("cannot see what it takes", e);
    let gone = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
    let folder = match path.folder() {
        Ok(folder) => folder,
        Err(e) if gone(&e) => return Ok(()),
        Err(e) => return Err(fail(e)),
    };
    each(None, folder.own_metadata().map_err(fail)?.st_blocks as u64 * 512);
    for name in folder.names().map_err(fail)? {
        walk_below(&folder, &name, MAX_DEPTH, &mut |depth, bytes| {
            each((depth < MAX_DEPTH).then_some(&*name), bytes);
        })
        .or_else(|e| {
            if gone(&e) { Ok(()) } else { Err(path.join(&name).error("cannot see what it takes", e)) }
        })?;
    }
    Ok(())
}

fn walk_below(
    folder: &Folder,
    name: &OsStr,
    depth: usize,
    each: &mut dyn FnMut(usize, u64),
) -> std::io::Result<()> {
    let found = folder.metadata(name)?;
    each(depth, found.st_blocks as u64 * 512);
    if FileType::from_raw_mode(found.st_mode) != FileType::Directory || depth == 0 {
        return Ok(());
    }
    let below = folder.folder(name)?;
    for name in below.names()? {
        match walk_below(&below, &name, depth - 1, each) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}
