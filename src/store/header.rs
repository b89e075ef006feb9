//! The store's header and its copy: without the secret in it no inode number would mean what it did, so it is kept twice.

use std::io;

use super::format::Invalid;
use super::format::superblock::Superblock;
use super::path::StorePath;
use super::publish::replace_file;
use crate::error::{Code, Error, Result};
use crate::units::Bytes;

/// Name of the header in the folder of a store.
pub(super) const HEADER: &str = "format";
/// Name of its copy.
pub(super) const COPY: &str = "format.copy";

/// Longest header that is read; that of a later version may be longer than ours.
const MAX_LENGTH: Bytes = Bytes::new(64 << 10);

/// What a store is, and what is wrong with the two files that say so.
#[derive(Debug)]
pub(super) struct Header {
    pub superblock: Superblock,
    /// The bytes of the sound file.
    bytes: Vec<u8>,
    /// Each damaged file with its damage; one of them at most.
    pub damaged: Option<(StorePath, Error)>,
}

impl Header {
    /// Reads the header of the store in the folder `root`, or its copy where the header is missing or damaged.
    ///
    /// # Errors
    /// That of the header where neither of them is sound, or where it is of a newer Stencil or closed to this user.
    pub fn read(root: &StorePath) -> Result<Header> {
        let (path, copy_path) = (root.join(HEADER), root.join(COPY));
        match (read(&path), read(&copy_path)) {
            (Ok((superblock, bytes)), copy) => {
                let is_same =
                    |copy: &Superblock| (copy.id, copy.secret) == (superblock.id, superblock.secret);
                let damage = match copy {
                    Ok((copy, _)) if is_same(&copy) => None,
                    Ok(_) => Some(
                        Invalid::damage("it is of another store")
                            .in_file("copy of the store header", &copy_path),
                    ),
                    Err(e) if e.code() == Code::NotFound => {
                        Some(Invalid::damage("it is missing").in_file("copy of the store header", &copy_path))
                    }
                    Err(e) => Some(e),
                };
                Ok(Header { superblock, bytes, damaged: damage.map(|e| (copy_path, e)) })
            }
            (Err(e), Ok((superblock, bytes))) if is_lost(&e) => {
                let e = match e.code() {
                    Code::NotFound => Invalid::damage("it is missing").in_file("store header", &path),
                    _ => e,
                };
                Ok(Header { superblock, bytes, damaged: Some((path, e)) })
            }
            (Err(e), _) => Err(e),
        }
    }

    /// Writes the damaged file again. The caller holds the lock of names.
    pub fn mend(&self, tmp: &StorePath) -> Result<()> {
        let Some((path, why)) = &self.damaged else { return Ok(()) };
        replace_file(tmp, path, &self.bytes)?;
        log::warn!("{why}; written again");
        Ok(())
    }
}

/// What lies where a store was: its superblock, or nothing where that cannot be decoded.
///
/// # Errors
/// When neither the header nor its copy can be read.
pub(super) fn identify(root: &StorePath) -> io::Result<Option<Superblock>> {
    let read = |name| root.join(name).read(MAX_LENGTH).map(|bytes| Superblock::decode(&bytes).ok());
    let first = read(HEADER);
    match &first {
        Ok(Some(_)) => first,
        _ => read(COPY).ok().flatten().map_or(first, |copy| Ok(Some(copy))),
    }
}

/// True for a header in whose place the copy counts: not for one of a newer Stencil, or one that this user may not read.
fn is_lost(error: &Error) -> bool {
    let is_closed = error.errno().is_some_and(|e| matches!(e, libc::EACCES | libc::EPERM));
    let is_newer = error.code() == Code::Failed && std::error::Error::source(error).is_none();
    !is_closed && !is_newer
}

fn read(path: &StorePath) -> Result<(Superblock, Vec<u8>)> {
    let bytes = path.read(MAX_LENGTH).map_err(|e| path.error("cannot open the store", e))?;
    let superblock = Superblock::decode(&bytes).map_err(|e| e.in_file("store header", path))?;
    Ok((superblock, bytes))
}
