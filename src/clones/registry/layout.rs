//! Names in the runtime directory: the directories of clones, the markers of launches, and the ids of both.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::control::runtime::{self, is_plain_name};
use crate::error::{Error, Result};

/// File in a clone's directory with its record.
pub(super) const RECORD: &str = "clone.json";

/// Directories in the runtime directory.
pub(super) const CLONES: &str = "clones";
pub(super) const LAUNCHES: &str = "launches";

/// Returns the absolute path of the runtime directory: clones and helpers change their working directory.
pub fn runtime_root() -> PathBuf {
    runtime::runtime_dir()
}

/// Returns the path of the directory of all records.
pub(super) fn clones_dir() -> PathBuf {
    runtime_root().join(CLONES)
}

/// Returns the name of the directory that the simulated clones of a launch share.
pub(super) fn shared_name(launch: &str) -> &str {
    launch.split('.').next().unwrap_or_default()
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

/// Removes the directory of a clone, or the directory that simulated clones share.
///
/// # Errors
/// Returns an error if the directory cannot be removed. A directory that does not exist is no error.
pub(super) fn remove_directory(path: &Path) -> Result<()> {
    // A process that is exiting may still create files.
    for _ in 0..50 {
        match fs::remove_dir_all(path) {
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => {
                std::thread::sleep(Duration::from_millis(10))
            }
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(Error::io("cannot remove the directory of a clone", path, e));
            }
            _ => return Ok(()),
        }
    }
    Err(Error::failed("cannot remove the directory of a clone: a process still writes files to it")
        .at(path)
        .hint("stop the process that writes to the directory, then run the command again"))
}
