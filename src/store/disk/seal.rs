//! Sealed packs. The kernel decodes sealed packs without a comparison with their hashes, so they must not change: a
//! sealed pack is an immutable file, until a garbage collection or [`Store::unseal`] makes it changeable again.

use std::fs::File;
use std::sync::atomic::AtomicBool;

use super::path::StorePath;
use crate::error::{Error, Result};
use crate::sanitize::path_text;
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
            .hint("run as root, with a store on ext4; or mount with another value of --serve")
    };
    let directory = path.parent();
    let owner = directory.metadata().map_err(|e| directory.error("cannot inspect the directory", e))?.st_uid;
    let was_sealed = immutable::is_set(&file);
    immutable::set(&file).map_err(failed)?;
    // Names and owner of an immutable file do not change any more.
    let pack = rustix::fs::fstat(&file).map_err(failed)?;
    let (why, hint) = match (pack.st_nlink, pack.st_uid == owner) {
        (1, true) => return Ok(file),
        (0, _) => return Err(gone(path)),
        (1, false) => (
            "the pack has another owner than its directory",
            "run 'stencil store unseal DIR' while the store is not mounted, then chown -R",
        ),
        (_, _) => ("the pack has a second name (a hard link)", "remove the other name (find -samefile)"),
    };
    // The owner of the store could otherwise make any file immutable that has a hard link in the store.
    if !was_sealed {
        immutable::clear(&file).map_err(failed)?;
    }
    Err(Error::failed(format!("{why}, so the pack cannot be sealed")).at(path).hint(hint))
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
    let mut sealed = unseal(path)?;
    let mut removed = path.remove_file();
    // A mount may have sealed the pack again meanwhile.
    for _ in 0..REMOVE_ATTEMPTS {
        if !removed.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied) {
            break;
        }
        sealed = unseal(path)?.or(sealed);
        removed = path.remove_file();
    }
    if let Some(Err(e)) = sealed.map(immutable::set) {
        log::warn!("cannot seal {} again, which a mount may still decode: {e}", path_text(path.as_ref()));
    }
    removed.map_err(|e| path.error("cannot remove pack", e))
}

/// Makes a sealed pack changeable. Returns its file, or `None` if the pack was not sealed.
fn unseal(path: &StorePath) -> Result<Option<File>> {
    let file = path.file().map_err(|e| path.error("cannot open pack", e))?;
    // A hard link may name a file that is not of the store.
    if rustix::fs::fstat(&file).is_ok_and(|stat| stat.st_nlink > 1) {
        return Ok(None);
    }
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

    /// Makes all sealed packs changeable. Returns their number. `check` must fail if a mount serves the store.
    ///
    /// # Errors
    /// Returns [`Code::TryAgain`](crate::error::Code::TryAgain) if a writer does not finish in time. Returns an error
    /// if the packs cannot be listed or opened, if this process lacks `CAP_LINUX_IMMUTABLE`, or if `interrupt` becomes
    /// true.
    pub fn unseal(&self, interrupt: &AtomicBool, check: impl Fn() -> Result<()>) -> Result<u64> {
        let _lock = self.lock_content_alone(interrupt)?;
        check()?;
        self.pack_files()?.iter().try_fold(0, |count, path| Ok(count + u64::from(unseal(path)?.is_some())))
    }

    /// Removes all templates and all other files of the store, except its directory. `check` must fail if a mount
    /// serves the store.
    ///
    /// # Errors
    /// Same as [`Store::unseal`]. Returns an error if a file cannot be removed.
    pub fn destroy(&self, interrupt: &AtomicBool, check: impl Fn() -> Result<()>) -> Result<()> {
        let _lock = self.lock_content_alone(interrupt)?;
        check()?;
        let packs = self.pack_files()?;
        // Fails before anything is removed if this process may not do it.
        packs.iter().try_for_each(|path| unseal(path).map(drop))?;
        self.remove_templates()?;
        packs.iter().try_for_each(remove_pack)?;
        self.remove_rest()
    }
}
