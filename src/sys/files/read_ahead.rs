//! The kernel's read-ahead for the files of a mount: how much is read at a page fault or a sequential read.
//!
//! The value belongs to the mount's `backing_dev_info` and can be changed through sysfs (`read_ahead_kb`). A file takes
//! the value when the file is opened. FUSE limits the value to 128 KiB when it accepts a server's INIT reply, and only
//! then.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{major, minor};

use crate::units::Bytes;

const ALL: &str = "/sys/class/bdi";

/// Returns the read-ahead of the mount with this device number (`st_dev`), in bytes.
///
/// # Errors
/// Returns an error if sysfs does not show the mount.
pub fn get(device: u64) -> io::Result<Bytes> {
    let text = fs::read_to_string(path(name(device)))?;
    let kib = text.trim().parse::<u64>().map_err(io::Error::other)?;
    Ok(Bytes::new(kib.saturating_mul(1024)))
}

/// Sets the read-ahead of the mount with this device number, rounded down to whole pages. Zero disables read-ahead.
///
/// # Errors
/// Returns an error if sysfs does not show the mount or is read-only.
pub fn set(device: u64, size: Bytes) -> io::Result<()> {
    write(name(device), size)
}

/// The mounts of one file system type that sysfs shows, if the type names them by a running number (`erofs-7`): sysfs
/// does not tell which mount has which number.
#[derive(Debug)]
pub struct Numbered {
    prefix: &'static str,
    names: BTreeSet<OsString>,
}

impl Numbered {
    /// Lists the mounts whose names begin with `prefix`.
    ///
    /// # Errors
    /// Returns an error if sysfs cannot be read.
    pub fn list(prefix: &'static str) -> io::Result<Numbered> {
        let entries = fs::read_dir(ALL)?.map(|entry| Ok(entry?.file_name()));
        let mut names = entries.collect::<io::Result<BTreeSet<_>>>()?;
        names.retain(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes()));
        Ok(Numbered { prefix, names })
    }

    /// Sets the read-ahead of the only mount that was made since the list. Returns false if several mounts were made.
    ///
    /// # Errors
    /// Returns an error if sysfs does not show the new mount, or is read-only.
    pub fn set_of_new(&self, size: Bytes) -> io::Result<bool> {
        let now = Numbered::list(self.prefix)?;
        let mut new = now.names.difference(&self.names);
        match (new.next(), new.next()) {
            (Some(name), None) => write(Path::new(name), size).map(|()| true),
            (Some(_), Some(_)) => Ok(false),
            (None, _) => Err(io::Error::other(format!("cannot find the new mount in {ALL}"))),
        }
    }
}

fn name(device: u64) -> String {
    format!("{}:{}", major(device), minor(device))
}

fn write(name: impl AsRef<Path>, size: Bytes) -> io::Result<()> {
    fs::write(path(name), (size.get() / 1024).to_string())
}

fn path(name: impl AsRef<Path>) -> std::path::PathBuf {
    Path::new(ALL).join(name).join("read_ahead_kb")
}
