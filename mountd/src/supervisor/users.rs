//! Who uses files of a mount: found by device and inode number in every process, never by path or open count.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, statx};
use stencilfs::error::Result;
use stencilfs::sys::procfs;

/// Those of `inodes` on `device` that some process has mapped or open.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn in_use(device: u64, inodes: &HashSet<u64>) -> Result<HashSet<u64>> {
    let mut used = HashSet::new();
    let me = std::process::id();
    for pid in procfs::pids()?.into_iter().filter(|&pid| pid != me) {
        match procfs::maps(pid, |dev, ino| dev == device && inodes.contains(&ino)) {
            Ok(maps) => used.extend(maps.into_iter().flatten().map(|m| m.ino)),
            Err(error) => log::debug!("{error}"),
        }
        used.extend(open_inodes(pid, device).into_iter().filter(|ino| inodes.contains(ino)));
    }
    Ok(used)
}

/// Inodes on `device` that a process has open. The mount itself is never asked: its server may be dead.
fn open_inodes(pid: u32, device: u64) -> Vec<u64> {
    let folder = format!("/proc/{pid}/fd");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(dir) = rustix::fs::open(Path::new(&folder), flags, Mode::empty()) else { return Vec::new() };
    let Ok(entries) = rustix::fs::Dir::read_from(&dir) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let stat =
                statx(dir.as_fd(), entry.file_name(), AtFlags::STATX_DONT_SYNC, StatxFlags::INO).ok()?;
            let dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
            (dev == device).then_some(stat.stx_ino)
        })
        .collect()
}
