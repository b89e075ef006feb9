//! Names in the runtime directory: the directories of clones, the markers of launches, and the ids of both.

use std::path::{Path, PathBuf};

use crate::control::runtime::{self, is_plain_name};
use crate::error::{Error, Result};
use crate::sys::process::procfs;

/// File in a clone's directory with its record.
pub(super) const RECORD: &str = "clone.json";

/// Directories in the runtime directory.
pub(super) const CLONES: &str = "clones";
pub(super) const LAUNCHES: &str = "launches";

/// Returns the absolute path of the runtime directory: clones and helpers change their working directory.
pub fn runtime_root() -> PathBuf {
    runtime::runtime_dir()
}

/// Returns the directory of all records.
pub(super) fn clones_dir() -> PathBuf {
    runtime_root().join(CLONES)
}

/// Returns true until the clones of the launch are released or removed.
pub fn is_held(launch: &str) -> bool {
    is_plain_name(launch) && runtime::runtime_dir().join(LAUNCHES).join(launch).symlink_metadata().is_ok()
}

/// Returns a random id: `c` and seven hex digits.
///
/// # Errors
/// Returns an error if the kernel returns no random UUID.
pub fn random_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/uuid");
    let uuid = procfs::read_text(path)?;
    let hex: String = uuid.chars().filter(char::is_ascii_hexdigit).take(7).collect();
    if hex.len() < 7 {
        return Err(Error::failed("the kernel returned no random UUID").at(path));
    }
    Ok(format!("c{hex}"))
}
