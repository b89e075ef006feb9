//! Atomic publication: temporary → fsync → rename → fsync of the folder.

use std::fs::File;
use std::io::Write;

use super::path::StorePath;
use super::session::Session;
use crate::error::{Error, Result};

/// Makes renames and removals in a folder last.
pub(super) fn sync_folder(path: &StorePath) -> Result<()> {
    path.sync().map_err(|e| path.error("cannot sync the folder", e))
}

/// Makes a folder of the store, for its owner.
pub(super) fn make_folder(path: &StorePath) -> Result<()> {
    path.create_folder().map(drop).map_err(|e| path.error("cannot create", e))
}

/// Moves what is complete and durable to the place where it counts.
pub(super) fn publish(from: &StorePath, to: &StorePath) -> Result<()> {
    from.rename(to).map_err(|e| to.error("cannot publish", e))
}

/// Makes a new file of a session, for reading and writing.
pub(super) fn create(path: &StorePath) -> Result<File> {
    path.create().map_err(|e| path.error("cannot create", e))
}

/// Writes a new file, durable, without publishing it.
pub(super) fn write_new(path: &StorePath, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = path.create()?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| path.error("cannot write", e))
}

/// Replaces a small file as a whole: a reader sees the old or the new bytes, never a mixture. `tmp` is
/// the store's folder for what is not published yet.
pub(super) fn replace_file(tmp: &StorePath, path: &StorePath, bytes: &[u8]) -> Result<()> {
    let session = Session::begin(tmp)?;
    let temporary = session.path().join("new");
    write_new(&temporary, bytes)?;
    temporary.rename(path).map_err(|e| path.error("cannot replace", e))?;
    sync_folder(&path.parent())
}

/// Random bytes of the kernel.
pub(super) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut bytes))
        .map_err(|e| Error::io("cannot read random bytes", "/dev/urandom", e))?;
    Ok(bytes)
}

/// Sixteen random bytes as a file name.
pub(super) fn random_hex() -> Result<String> {
    random::<16>().map(|bytes| super::format::PackId(bytes).to_string())
}
