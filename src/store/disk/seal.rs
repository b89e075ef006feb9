//! Sealed packs. The kernel decodes sealed packs without a comparison with their hashes, so they must not change: a
//! sealed pack is an immutable file, until a garbage collection or [`Store::unseal`] makes it changeable again.

use std::fs::File;
use std::sync::atomic::AtomicBool;

use super::path::StorePath;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::sys::files::immutable;

/// Attempts to remove a pack that a mount seals at the same time.
const REMOVE_ATTEMPTS: usize = 3;

/// Opens a pack and seals it.
///
/// # Errors
/// Returns [`Code::NotFound`](crate::error::Code) if the pack is gone. Returns an error if the file is not the store's
/// alone (it has a second name, or another owner), or if its file system cannot make files immutable.
pub(in crate::store) fn open_sealed(path: &StorePath) -> Result<File> {
    let file = path.file().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => gone(path),
        _ => path.error("cannot open pack", e),
    })?;
    let failed = |e: rustix::io::Errno| {
        Error::io("cannot seal a pack (make its file immutable)", path, e.into())
            .hint("use a store on ext4 or xfs, or mount with another value of --serve")
    };
    let directory = path.parent();
    let owner = directory.metadata().map_err(|e| directory.error("cannot inspect the directory", e))?.st_uid;
    immutable::set(&file).map_err(failed)?;
    // Names and owner of an immutable file do not change any more.
    let pack = rustix::fs::fstat(&file).map_err(failed)?;
    let why = match (pack.st_nlink, pack.st_uid == owner) {
        (1, true) => return Ok(file),
        (0, _) => return Err(gone(path)),
        (1, false) => "the pack has another owner than its directory",
        (_, _) => "the pack has a second name (a hard link)",
    };
    // The owner of the store could otherwise make any file immutable that has a hard link in the store.
    immutable::clear(&file).map_err(failed)?;
    Err(Error::failed(format!("{why}, so it is not sealed"))
        .at(path)
        .hint("remove the other name (find -samefile), or give the whole store to one owner (chown -R)"))
}

fn gone(path: &StorePath) -> Error {
    Error::not_found("the pack is not in the store any more").at(path)
}

/// Removes a pack, sealed or not. A mount that still decodes a sealed pack keeps the file, which is sealed again after
/// its name is gone.
///
/// # Errors
/// Returns an error if the pack cannot be opened or removed, or if it is sealed and this process lacks
/// `CAP_LINUX_IMMUTABLE`.
pub(in crate::store) fn remove_pack(path: &StorePath) -> Result<()> {
    let sealed = unseal(path)?;
    let mut removed = path.remove_file();
    // A mount may have sealed the pack again meanwhile.
    for _ in 0..REMOVE_ATTEMPTS {
        if !removed.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied) {
            break;
        }
        unseal(path)?;
        removed = path.remove_file();
    }
    if let Some(file) = sealed {
        immutable::set(&file).map_err(|e| Error::io("cannot seal a pack again", path, e.into()))?;
    }
    removed.map_err(|e| path.error("cannot remove pack", e))
}

/// Makes a sealed pack changeable. Returns its file, or `None` if the pack was not sealed.
fn unseal(path: &StorePath) -> Result<Option<File>> {
    let file = path.file().map_err(|e| path.error("cannot open pack", e))?;
    let was_sealed = immutable::clear(&file).map_err(|e| {
        Error::io("cannot unseal a pack", path, e.into())
            .hint("run the command as root: a mount with kernel decode has made the packs immutable")
    })?;
    Ok(was_sealed.then_some(file))
}

impl Store {
    /// Returns the number of sealed packs, without those that cannot be opened.
    pub fn sealed(&self) -> u64 {
        let packs = self.pack_files().unwrap_or_default();
        let is_sealed = |path: &&StorePath| path.file().is_ok_and(immutable::is_set);
        packs.iter().filter(is_sealed).count() as u64
    }

    /// Makes all sealed packs changeable. Returns their number. The caller has made sure that no mount serves the store.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) if a writer does not finish in time. Returns an error if
    /// the packs cannot be listed or opened, if this process lacks `CAP_LINUX_IMMUTABLE`, or if `interrupt` becomes true.
    pub fn unseal(&self, interrupt: &AtomicBool) -> Result<u64> {
        let _lock = self.lock_content_alone(interrupt)?;
        self.pack_files()?.iter().try_fold(0, |count, path| Ok(count + u64::from(unseal(path)?.is_some())))
    }

    /// Removes all templates and all other files of the store, except its directory. The caller has made sure that no
    /// mount serves the store.
    ///
    /// # Errors
    /// Same as [`Store::unseal`]. Returns an error if a file cannot be removed.
    pub fn destroy(&self, interrupt: &AtomicBool) -> Result<()> {
        let _lock = self.lock_content_alone(interrupt)?;
        self.remove_templates()?;
        for path in self.pack_files()? {
            remove_pack(&path)?;
        }
        self.remove_rest()
    }
}
