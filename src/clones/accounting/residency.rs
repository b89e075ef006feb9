//! How much of each template is in RAM once for all: the page cache of its inodes and backings.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::Path;

use crate::clones::find::{CloneProcess, Inodes, ServedFile};
use crate::control::{Mount, Residency};
use crate::error::Result;
use crate::store::{Digest, Serving, StorePath};
use crate::sys::{cachestat, handle, procfs, tasks};
use crate::units::Bytes;

/// Bytes in the page cache by template and serving. Each mount has its own page cache: they add up.
pub type Resident = BTreeMap<(Digest, Serving), Bytes>;

/// Measures all templates of all mounts.
///
/// # Errors
/// When a supervisor does not answer, or an inode may not be opened.
pub fn resident(mounts: &[Mount], inodes: &Inodes, clones: &[CloneProcess]) -> Result<Resident> {
    let mut resident = Resident::new();
    for (_, backing) in backings(mounts)? {
        *resident.entry((backing.digest, Serving::Passthrough)).or_default() += backing.resident_bytes;
    }
    each_inode(
        mounts,
        inodes,
        clones,
        |file| file.serving == Serving::Decode,
        |file, opened| {
            *resident.entry((file.digest, Serving::Decode)).or_default() +=
                cachestat::cached(&opened)?.bytes();
            Ok(())
        },
    )?;
    Ok(resident)
}

/// The passthrough backings of all mounts, each with the index of its mount, as those see them who have them open.
///
/// # Errors
/// When a supervisor does not answer, or it is dead and its server does not have what it kept.
pub fn backings(mounts: &[Mount]) -> Result<Vec<(usize, Residency)>> {
    let mut all = Vec::new();
    for (index, mount) in mounts.iter().enumerate() {
        all.extend(mount.residency()?.into_iter().map(|backing| (index, backing)));
    }
    Ok(all)
}

/// Calls `each` with every wanted inode of the mounts that the kernel holds now, opened.
///
/// # Errors
/// When an inode may not be opened, or what `each` says.
pub fn each_inode(
    mounts: &[Mount],
    inodes: &Inodes,
    clones: &[CloneProcess],
    wanted: impl Fn(&ServedFile) -> bool,
    mut each: impl FnMut(&ServedFile, File) -> Result<()>,
) -> Result<()> {
    let mapped = one_mapping_of_each(clones);
    let roots: Vec<Option<File>> = mounts.iter().map(root_of).collect();
    for (ino, file) in inodes.iter().filter(|(_, file)| wanted(file)) {
        let dev = mounts[file.mount].device;
        let opened = match (&roots[file.mount], mapped.get(&(dev, ino))) {
            (Some(root), _) => handle::open_fuse_inode(root, ino)?,
            // No path leads to a mount that was detached; a clone's own mapping does.
            (None, Some(path)) => File::open(path).ok(),
            (None, None) => None,
        };
        if let Some(opened) = opened {
            each(file, opened)?;
        }
    }
    Ok(())
}

/// The root of a mount, if it is still mounted there.
fn root_of(mount: &Mount) -> Option<File> {
    use std::os::unix::fs::MetadataExt;
    if mount.detached {
        return None;
    }
    let root = File::open(&mount.mountpoint).ok()?;
    (root.metadata().ok()?.dev() == mount.device).then_some(root)
}

fn one_mapping_of_each(clones: &[CloneProcess]) -> HashMap<(u64, u64), String> {
    let mut paths = HashMap::new();
    for clone in clones {
        for map in &clone.maps {
            let end = map.range().end;
            paths.entry((map.dev, map.ino)).or_insert_with(|| {
                // Only /proc/NUMBER has this folder, for the number of any thread.
                let tid = tasks::thread_with_memory(clone.pid).ok().flatten().unwrap_or(clone.pid);
                format!("/proc/{tid}/map_files/{:x}-{end:x}", map.start)
            });
        }
    }
    paths
}

/// Bytes of one file in the page cache; a file that is gone holds none.
///
/// # Errors
/// When it exists and cannot be opened.
pub fn cached_file(path: &Path) -> Result<Bytes> {
    cached(path, File::open(path))
}

/// As [`cached_file`], of a file of a store.
///
/// # Errors
/// When it exists and cannot be opened.
pub fn cached_store_file(path: &StorePath) -> Result<Bytes> {
    cached(path.as_ref(), path.file())
}

fn cached(path: &Path, opened: std::io::Result<File>) -> Result<Bytes> {
    match opened {
        Ok(file) => Ok(cachestat::cached(&file)?.bytes()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Bytes::ZERO),
        Err(error) => Err(crate::error::Error::io("cannot open a file of the store", path, error)),
    }
}

/// Private memory of the processes that serve these mounts: decoded blocks, reply buffers, tables.
///
/// # Errors
/// When their status cannot be read.
pub fn daemons(mounts: &[Mount]) -> Result<Bytes> {
    let mut sum = Bytes::ZERO;
    for mount in mounts {
        for pid in mount.processes().into_iter().flatten() {
            if let Some(status) = procfs::status(pid)? {
                sum += status.rss_anon;
                sum += status.page_tables;
            }
        }
    }
    Ok(sum)
}
