//! Atomic publication: write a temporary file, fsync, rename, fsync the directory.

use std::fs::File;
use std::io::Write;

use rustix::rand::{GetRandomFlags, getrandom};

use super::path::StorePath;
use crate::error::{Error, Result};

/// Makes renames and removals in a directory durable.
pub(in crate::store) fn sync_directory(path: &StorePath) -> Result<()> {
    path.sync().map_err(|e| path.error("cannot sync directory", e))
}

/// Creates a directory of the store, with mode 0700.
pub(in crate::store) fn make_directory(path: &StorePath) -> Result<()> {
    path.create_folder().map(drop).map_err(|e| path.error("cannot create", e))
}

/// Renames a complete and durable file or directory to its public name.
pub(in crate::store) fn publish(from: &StorePath, to: &StorePath) -> Result<()> {
    from.rename(to).map_err(|e| to.error("cannot publish", e))
}

/// Creates a file in a session, for reading and writing.
pub(in crate::store) fn create(path: &StorePath) -> Result<File> {
    path.create().map_err(|e| path.error("cannot create", e))
}

/// Writes and syncs a new file, without publishing it.
pub(in crate::store) fn write_new(path: &StorePath, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = path.create()?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| path.error("cannot write", e))
}

/// Returns random bytes from the kernel.
pub(in crate::store) fn random<const N: usize>() -> Result<[u8; N]> {
    // getrandom(2) neither returns fewer bytes nor EINTR for up to 256 bytes.
    const { assert!(N <= 256) };
    let mut bytes = [0; N];
    getrandom(&mut bytes[..], GetRandomFlags::empty())
        .map_err(|e| Error::failed("cannot get random bytes from the kernel").because(e.into()))?;
    Ok(bytes)
}

/// Returns 16 random bytes as 32 hex digits, for a file name.
pub(in crate::store) fn random_hex() -> Result<String> {
    random::<16>().map(|bytes| crate::store::format::PackId(bytes).to_string())
}
