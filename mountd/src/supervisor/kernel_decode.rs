//! Kernel decode: opens the files of EROFS mounts that are its backings.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use stencilfs::control::{FileKey, MountOptions, ServeMode};
use stencilfs::error::{Error, Result};
use stencilfs::store::{KERNEL_IMAGE_FILE, Proof, Store};
use stencilfs::sys::files::erofs;

/// A file that the kernel decodes.
#[derive(Debug)]
pub struct Opened {
    /// The file, in an EROFS mount.
    pub file: OwnedFd,
    /// Proof of the verification of the file.
    pub proof: Proof,
    /// Time of an earlier verification with the same proof, in seconds since 1970.
    pub verified_at: Option<u64>,
}

/// Seals the packs that an immutable image names, and opens the file that the kernel decodes out of them. A
/// verification counts for the scrub interval of the mount.
///
/// # Errors
/// Returns [`Code::NotFound`](stencilfs::error::Code::NotFound) if a pack is gone, or an error if a pack cannot be
/// sealed or the kernel refuses the image.
pub fn open(options: &MountOptions, key: &FileKey, image: impl AsFd) -> Result<Opened> {
    let fail = |e| Error::failed("cannot read an image for kernel decode").because(e);
    let metadata = File::from(image.as_fd().try_clone_to_owned().map_err(fail)?);
    let store = Store::open(&options.store)?;
    let packs = store.sealed_packs(&metadata)?;
    let proof = Proof::of(&key.digest, &key.file, &metadata, &packs)
        .map_err(|e| Error::failed("cannot inspect a pack").because(e))?;
    let file =
        erofs::open_file(image, &packs, KERNEL_IMAGE_FILE, Some(options.read_ahead(ServeMode::Kernel)))?;
    let valid = options.scrub_interval;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    // The clock may have been set back.
    let is_valid = |at: &u64| *at <= now && (valid.is_zero() || now - at < valid.as_secs().max(1));
    let verified_at = store.verified_at(&key.digest, &key.file, proof).filter(is_valid);
    Ok(Opened { file, proof, verified_at })
}
