//! The kernel's read-ahead for the files of a mount: how much is read at a page fault or a sequential read.
//!
//! The kernel limits the value when it accepts a server's INIT reply, to at most the default of 128 KiB. Later the value
//! can be changed through sysfs (`read_ahead_kb` of the mount's `backing_dev_info`) only.

use std::io;
use std::path::PathBuf;

use rustix::fs::{major, minor};

use crate::units::Bytes;

/// The kernel's default.
pub const DEFAULT: Bytes = Bytes::new(128 << 10);

/// Returns the read-ahead of the mount with this device number (`st_dev`), in bytes.
///
/// # Errors
/// Returns an error if sysfs does not show the mount.
pub fn get(device: u64) -> io::Result<Bytes> {
    let text = std::fs::read_to_string(path(device))?;
    let kib = text.trim().parse::<u64>().map_err(io::Error::other)?;
    Ok(Bytes::new(kib.saturating_mul(1024)))
}

/// Sets the read-ahead of the mount with this device number, rounded down to whole pages. Zero disables read-ahead.
///
/// # Errors
/// Returns an error if sysfs does not show the mount or is read-only.
pub fn set(device: u64, size: Bytes) -> io::Result<()> {
    std::fs::write(path(device), (size.get() / 1024).to_string())
}

fn path(device: u64) -> PathBuf {
    format!("/sys/class/bdi/{}:{}/read_ahead_kb", major(device), minor(device)).into()
}
