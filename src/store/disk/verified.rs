//! The store's memory of verifications for kernel decode, which lasts across mounts and restarts of the host.
//!
//! The proof of a verification is a hash of everything that the verification depends on: template, file name, metadata,
//! sealed packs, kernel and host. The proof is an extended attribute of the image's directory, in the namespace
//! `trusted`, which only root can write: the store may belong to another user.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{XattrFlags, fgetxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::store::{Digest, Store};
use crate::sys::probe;

/// Length of a proof in bytes.
const LENGTH: usize = 32;
/// Length of the attribute: the proof, and the time of the verification.
const VALUE: usize = LENGTH + 8;

/// Bytes of an image that are read at once.
const CHUNK: usize = 128 << 10;

/// Proof that a file was verified: a hash of all that the verification depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof([u8; LENGTH]);

impl Proof {
    /// Returns the proof of a file of a template, which the kernel of this host decodes with an image from sealed
    /// packs. Unsealing a pack changes its `st_ctime`, and so the proof.
    ///
    /// # Errors
    /// Returns an error if a pack cannot be inspected.
    pub fn of(digest: &Digest, file: &str, image: &File, packs: &[File]) -> std::io::Result<Proof> {
        let mut hasher = blake3::Hasher::new();
        let kernel = rustix::system::uname();
        let host = probe::setting("/etc/machine-id").unwrap_or_default();
        for text in
            [kernel.release().to_bytes(), kernel.version().to_bytes(), host.as_bytes(), file.as_bytes()]
        {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text);
        }
        hasher.update(digest.bytes());
        let mut chunk = vec![0; CHUNK];
        let mut at = 0;
        while let length @ 1.. = image.read_at(&mut chunk, at)? {
            hasher.update(&chunk[..length]);
            at += length as u64;
        }
        hasher.update(&at.to_le_bytes());
        for pack in packs {
            let stat = pack.metadata()?;
            let changed = [stat.ctime(), stat.ctime_nsec()].map(i64::cast_unsigned);
            for number in [stat.ino(), stat.size(), changed[0], changed[1]] {
                hasher.update(&number.to_le_bytes());
            }
        }
        Ok(Proof(*hasher.finalize().as_bytes()))
    }
}

impl Store {
    /// Returns the time of the last verification of a file with this proof, in seconds since 1970.
    pub fn verified_at(&self, digest: &Digest, file: &str, proof: Proof) -> Option<u64> {
        let mut value = [0; VALUE];
        let directory = self.image_dir(digest).folder().ok()?;
        let length = fgetxattr(directory, attribute(file), &mut value[..]).ok()?;
        let (found, at) = value.split_first_chunk::<LENGTH>().filter(|_| length == VALUE)?;
        (*found == proof.0).then_some(u64::from_le_bytes(at.try_into().ok()?))
    }

    /// Remembers that a file of a template was verified with this proof at this time.
    ///
    /// # Errors
    /// Returns an error if the file system has no extended attributes or no space for another one, or if this process
    /// lacks `CAP_SYS_ADMIN`.
    pub fn set_verified(&self, digest: &Digest, file: &str, proof: Proof, at: u64) -> Result<()> {
        let path = self.image_dir(digest);
        let directory = path.folder().map_err(|e| path.error("cannot open template", e))?;
        let value = [&proof.0[..], &at.to_le_bytes()].concat();
        fsetxattr(directory, attribute(file), &value, XattrFlags::empty()).map_err(|e| {
            let what = "cannot remember that a file was verified, so the next mount verifies it again";
            Error::io(what, &path, e.into())
        })
    }

    /// Forgets that a file of a template was verified.
    ///
    /// # Errors
    /// Returns an error if the kernel refuses to remove the attribute.
    pub fn forget_verified(&self, digest: &Digest, file: &str) -> Result<()> {
        let path = self.image_dir(digest);
        let directory = path.folder().map_err(|e| path.error("cannot open template", e))?;
        match fremovexattr(directory, attribute(file)) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(()),
            Err(e) => Err(Error::io("cannot forget that a file was verified", &path, e.into())
                .hint("run 'stencil store unseal' when the store is not mounted: the next mount then verifies again")),
        }
    }
}

fn attribute(file: &str) -> String {
    format!("trusted.stencil.verified.{file}")
}
