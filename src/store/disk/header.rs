//! The store's header and its copy. The header is stored twice because it holds the secret, without which the inode
//! numbers of all templates would change.

use std::io;

use super::path::StorePath;
use super::session::replace_file;
use crate::error::{Code, Error, Result};
use crate::store::format::Invalid;
use crate::store::format::superblock::Superblock;
use crate::units::Bytes;

/// Name of the header file in the store directory.
pub(in crate::store) const HEADER: &str = "format";
/// Name of the copy of the header file.
pub(in crate::store) const COPY: &str = "format.copy";

/// Maximum length in bytes of a header that is read; the header of a later version may be longer than this version's.
const MAX_LENGTH: Bytes = Bytes::new(64 << 10);

/// The store's superblock, and the damage of its two files.
#[derive(Debug)]
pub(in crate::store) struct Header {
    pub superblock: Superblock,
    /// Encoded header, from the intact file.
    bytes: Vec<u8>,
    /// The damaged file and its error; at most one of the two files is damaged.
    pub damaged: Option<(StorePath, Error)>,
}

impl Header {
    /// Reads the header of the store in the directory `root`, or its copy if the header is missing or damaged.
    ///
    /// # Errors
    /// Returns the header's error if neither file is intact, if the header needs a newer Stencil, or if the user may
    /// not read the header.
    pub fn read(root: &StorePath) -> Result<Header> {
        let (path, copy_path) = (root.join(HEADER), root.join(COPY));
        match (read(&path), read(&copy_path)) {
            (Ok((superblock, bytes)), copy) => {
                let is_same =
                    |copy: &Superblock| (copy.id, copy.secret) == (superblock.id, superblock.secret);
                let damage = match copy {
                    Ok((copy, _)) if is_same(&copy) => None,
                    Ok(_) => Some(
                        Invalid::damage("the file belongs to another store")
                            .in_file("copy of the store header", &copy_path),
                    ),
                    Err(e) if e.code() == Code::NotFound => Some(
                        Invalid::damage("the file is missing")
                            .in_file("copy of the store header", &copy_path),
                    ),
                    Err(e) => Some(e),
                };
                Ok(Header { superblock, bytes, damaged: damage.map(|e| (copy_path, e)) })
            }
            (Err(e), Ok((superblock, bytes))) if is_lost(&e) => {
                let e = match e.code() {
                    Code::NotFound => Invalid::damage("the file is missing").in_file("store header", &path),
                    _ => e,
                };
                Ok(Header { superblock, bytes, damaged: Some((path, e)) })
            }
            (Err(e), _) => Err(e),
        }
    }

    /// Rewrites the damaged file. The caller holds the names lock.
    pub fn repair(&self, tmp: &StorePath) -> Result<()> {
        let Some((path, why)) = &self.damaged else { return Ok(()) };
        replace_file(tmp, path, &self.bytes)?;
        log::warn!("{why}; rewrote the file");
        Ok(())
    }
}

/// Returns the superblock in the directory of a store, or `None` if the superblock cannot be decoded.
///
/// # Errors
/// Returns an error if neither the header nor its copy can be read.
pub(in crate::store) fn identify(root: &StorePath) -> io::Result<Option<Superblock>> {
    let read = |name| root.join(name).read(MAX_LENGTH).map(|bytes| Superblock::decode(&bytes).ok());
    let first = read(HEADER);
    match &first {
        Ok(Some(_)) => first,
        _ => read(COPY).ok().flatten().map_or(first, |copy| Ok(Some(copy))),
    }
}

/// Returns true if the copy may replace the header. Returns false if the header needs a newer Stencil or the user may
/// not read the header.
fn is_lost(error: &Error) -> bool {
    let is_closed = error.errno().is_some_and(|e| matches!(e, libc::EACCES | libc::EPERM));
    let is_newer = error.code() == Code::Failed && std::error::Error::source(error).is_none();
    !is_closed && !is_newer
}

fn read(path: &StorePath) -> Result<(Superblock, Vec<u8>)> {
    let bytes = path.read(MAX_LENGTH).map_err(|e| path.error("cannot open store", e))?;
    let superblock = Superblock::decode(&bytes).map_err(|e| e.in_file("store header", path))?;
    Ok((superblock, bytes))
}
