//! Identities and duplicates of open files.

use std::os::fd::{AsFd, OwnedFd};

use stencilfs::error::{Error, Result};

/// Returns `st_dev` and `st_ino` of an open file. No other file has the same pair while the file is open.
///
/// # Errors
/// Returns an error if fstat(2) fails.
pub fn identity(file: impl AsFd) -> Result<(u64, u64)> {
    let stat =
        rustix::fs::fstat(file).map_err(|e| Error::failed("cannot stat a descriptor").because(e.into()))?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Returns true if the open file has this identity.
pub fn has_identity(file: impl AsFd, expected: (u64, u64)) -> bool {
    identity(file).is_ok_and(|found| found == expected)
}

/// Duplicates a descriptor, with `FD_CLOEXEC` set.
///
/// # Errors
/// Returns an error if the process is out of descriptors.
pub fn copy(file: impl AsFd) -> Result<OwnedFd> {
    file.as_fd().try_clone_to_owned().map_err(|e| {
        Error::failed("out of file descriptors").because(e).hint("raise the limit of open files: ulimit -n")
    })
}
