//! The RAM that the clones of a template share: the page cache of the template's inodes and backings.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use super::frames;
use crate::clones::find::{CloneProcess, Inodes, ServedFile};
use crate::control::{BackingKind, Mount, Residency, Served};
use crate::error::{Code, Error, Result};
use crate::store::{Digest, Serving, StorePath};
use crate::sys::files::file_handle;
use crate::sys::memory::cachestat;
use crate::sys::memory::mapping::{Advice, Mapping, Request};
use crate::sys::memory::pagemap::Pagemap;
use crate::sys::process::{procfs, tasks};
use crate::units::{Bytes, PageCount};

/// One file of a template in the page cache. Each mount has its own page cache, so the sizes add up.
#[derive(Debug, Clone)]
pub struct Resident {
    /// The template.
    pub digest: Digest,
    /// Name of the file.
    pub file: String,
    /// How the pages are served.
    pub served: Served,
    /// Size of the pages.
    pub bytes: Bytes,
}

/// Measures all files of the templates of all mounts.
///
/// # Errors
/// Returns an error if a supervisor does not respond or an inode cannot be opened.
pub fn resident(
    mounts: &[Mount],
    backings: &[(usize, Residency)],
    inodes: &Inodes,
    clones: &[&CloneProcess],
) -> Result<Vec<Resident>> {
    let of_backing = |(_, backing): &(usize, Residency)| Resident {
        digest: backing.digest,
        file: backing.file.clone(),
        served: Served::of(Serving::Passthrough, backing.kind),
        bytes: backing.resident_bytes,
    };
    let mut resident: Vec<Resident> = backings.iter().map(of_backing).collect();
    each_inode(
        mounts,
        inodes,
        clones,
        |file| file.serving == Serving::Decode,
        |file, opened| {
            let bytes = cachestat::cached(&opened)?.bytes();
            let (digest, file) = (file.digest, file.name.clone());
            resident.push(Resident { digest, file, served: Served::Decode, bytes });
            Ok(())
        },
    )?;
    for ((digest, file, served), frames) in mapped_of_dead(mounts, clones)? {
        let bytes = PageCount::new(frames.len() as u64).bytes();
        resident.push(Resident { digest, file, served, bytes });
    }
    Ok(resident)
}

/// Returns the frames of template pages that clones map through dead mounts. Nothing answers an open of a file there, so
/// of the page cache only the pages in page tables are known.
fn mapped_of_dead(
    mounts: &[Mount],
    clones: &[&CloneProcess],
) -> Result<BTreeMap<(Digest, String, Served), HashSet<u64>>> {
    let mut found: BTreeMap<_, HashSet<u64>> = BTreeMap::new();
    let mut hidden = false;
    for clone in clones {
        for map in clone.maps.iter().filter(|map| !map.anonymous && mounts[map.mount].is_dead()) {
            let served = Served::of(map.serving, BackingKind::Copy);
            let frames = found.entry((map.digest, map.file.clone(), served)).or_default();
            let read = Pagemap::open(clone.pid).and_then(|pagemap| {
                pagemap.each_entry(map.range(), |_, entry| {
                    if entry.is_present() && entry.is_file() {
                        hidden |= entry.frame().is_none();
                        frames.extend(entry.frame());
                    }
                })
            });
            match read {
                Err(error) if error.code() == Code::NotFound => {}
                read => read?,
            }
        }
    }
    if hidden { Err(frames::hidden_frames()) } else { Ok(found) }
}

/// Returns the passthrough backings of all mounts, each with the index of its mount. The daemons that have the backings
/// open report their sizes.
///
/// # Errors
/// Returns an error if a supervisor does not respond, or is dead and its server has no mount state.
pub fn backings(mounts: &[Mount]) -> Result<Vec<(usize, Residency)>> {
    let mut all = Vec::new();
    for (index, mount) in mounts.iter().enumerate() {
        all.extend(mount.residency()?.into_iter().map(|backing| (index, backing)));
    }
    Ok(all)
}

/// Calls `each` with every wanted inode of the mounts that is now in the kernel's inode cache, opened. Leaves out dead
/// mounts.
///
/// # Errors
/// Returns an error if an inode cannot be opened, and every error of `each`.
pub fn each_inode(
    mounts: &[Mount],
    inodes: &Inodes,
    clones: &[&CloneProcess],
    wanted: impl Fn(&ServedFile) -> bool,
    mut each: impl FnMut(&ServedFile, File) -> Result<()>,
) -> Result<()> {
    let mapped = one_mapping_of_each(clones);
    let roots: Vec<Option<File>> = mounts.iter().map(root_of).collect();
    for (ino, file) in inodes.iter().filter(|(_, file)| !mounts[file.mount].is_dead() && wanted(file)) {
        let dev = mounts[file.mount].device;
        let opened = match (&roots[file.mount], mapped.get(&(dev, ino))) {
            (Some(root), _) => file_handle::open_fuse_inode(root, ino)?,
            // A detached mount has no path, but a clone's mapping leads to its file.
            (None, Some(path)) => File::open(path).ok(),
            (None, None) => None,
        };
        if let Some(opened) = opened {
            each(file, opened)?;
        }
    }
    Ok(())
}

/// Calls `each` with the offset and the frame of every page of a file that is in the page cache. Needs `CAP_SYS_ADMIN`,
/// without which the kernel hides the frames.
///
/// # Errors
/// Returns an error if the file cannot be mapped or its page cache cannot be read.
pub fn each_page(file: &File, mut each: impl FnMut(u64, u64)) -> Result<()> {
    let size = file.metadata().map_err(|e| Error::failed("cannot read its size").because(e))?.len();
    if size == 0 {
        return Ok(());
    }
    let whole_pages = Bytes::new(size).pages().bytes();
    let view = Mapping::new(&Request::view(file.as_fd(), whole_pages))
        .map_err(|e| Error::failed("cannot map the file").because(e))?;
    // A fault on a page with the readahead mark would read further pages.
    let advised = view.advise_all(Advice::Random);
    advised.map_err(|e| Error::failed("cannot disable readahead").because(e))?;
    let pagemap = Pagemap::this_process()?;
    let start = view.address();
    for range in cachestat::in_core(&view)? {
        // Only pages in RAM are populated, so that the page cache stays as it is.
        view.advise(range.clone(), Advice::PopulateRead)
            .map_err(|e| Error::failed("cannot populate page tables").because(e))?;
        pagemap.each_entry(start + range.start..start + range.end, |address, entry| {
            if let Some(frame) = entry.frame() {
                each(address - start, frame);
            }
        })?;
    }
    Ok(())
}

/// Opens the root of a mount, if the mount is still at its mountpoint.
fn root_of(mount: &Mount) -> Option<File> {
    use std::os::unix::fs::MetadataExt;
    if mount.detached || mount.is_dead() {
        return None;
    }
    let root = File::open(&mount.mountpoint).ok()?;
    (root.metadata().ok()?.dev() == mount.device).then_some(root)
}

fn one_mapping_of_each(clones: &[&CloneProcess]) -> HashMap<(u64, u64), String> {
    let mut paths = HashMap::new();
    for clone in clones {
        for map in clone.maps.iter().filter(|map| !map.anonymous) {
            let end = map.range().end;
            paths.entry((map.dev, map.ino)).or_insert_with(|| {
                // /proc/TID has map_files, /proc/PID/task/TID does not. A main thread that has exited shows no memory.
                let tid = tasks::thread_with_memory(clone.pid).ok().flatten().unwrap_or(clone.pid);
                format!("/proc/{tid}/map_files/{:x}-{end:x}", map.start)
            });
        }
    }
    paths
}

/// Returns the size of one file in the page cache, 0 for a file that does not exist.
///
/// # Errors
/// Returns an error if the file exists and cannot be opened.
pub fn cached_file(path: &Path) -> Result<Bytes> {
    cached(path, File::open(path))
}

/// Same as [`cached_file`], for a file of a store.
///
/// # Errors
/// Returns an error if the file exists and cannot be opened.
pub fn cached_store_file(path: &StorePath) -> Result<Bytes> {
    cached(path.as_ref(), path.file())
}

fn cached(path: &Path, opened: std::io::Result<File>) -> Result<Bytes> {
    match opened {
        Ok(file) => Ok(cachestat::cached(&file)?.bytes()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Bytes::ZERO),
        Err(error) => Err(Error::io("cannot open a file of the store", path, error)),
    }
}

/// Returns the private memory of the daemons of these mounts: decoded blocks, reply buffers, page tables.
///
/// # Errors
/// Returns an error if the status of a daemon cannot be read.
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
