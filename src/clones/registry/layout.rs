//! Names in the runtime directory: the directories of clones, the markers of launches, and the ids of both.

use std::path::PathBuf;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::control::runtime::{self, is_plain_name};
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;

/// File in a clone's directory with its record.
pub(super) const RECORD: &str = "clone.json";

/// Directories in the runtime directory.
pub(super) const CLONES: &str = "clones";
pub(super) const LAUNCHES: &str = "launches";

/// Returns the absolute path of the runtime directory: clones and helpers change their working directory.
pub fn runtime_root() -> PathBuf {
    runtime::runtime_dir()
}

/// Opens the directory of all records. Returns `None` if it does not exist.
///
/// # Errors
/// Returns an error if the directory cannot be opened, or another user owns it or can write it.
pub fn clones() -> Result<Option<Directory>> {
    runtime::open(CLONES)
}

/// Returns the path of the directory of all records.
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
/// Returns an error if the kernel returns no random number.
pub fn random_id() -> Result<String> {
    let mut bytes = [0; 4];
    // getrandom(2) neither returns fewer bytes nor EINTR for up to 256 bytes.
    getrandom(&mut bytes[..], GetRandomFlags::empty())
        .map_err(|e| Error::failed("cannot read a random number").because(e.into()))?;
    Ok(format!("c{:07x}", u32::from_ne_bytes(bytes) >> 4))
}
