//! Whether a host can decode templates in the kernel.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::store::{KERNEL_IMAGE_FILE, KernelProbe};
use crate::sys::files::erofs;
use crate::sys::files::immutable::unnamed;

/// Checks that this host can decode in the kernel: mounts a small image with every kind of record, whose metadata is in
/// `metadata_dir` and whose data is in `store`, in files that are immutable, and compares the bytes.
///
/// # Errors
/// Returns the reason why the host cannot decode in the kernel.
pub fn probe_kernel_decode(metadata_dir: &Path, store: &Path) -> Result<()> {
    let probe = KernelProbe::new()?;
    let (metadata, device) = (unnamed(metadata_dir, &probe.metadata)?, unnamed(store, &probe.device)?);
    let file = File::from(erofs::open_file(&metadata, &[device], KERNEL_IMAGE_FILE, None)?);
    let mut read = vec![0; probe.plain.len()];
    file.read_exact_at(&mut read, 0)
        .map_err(|e| Error::failed("the kernel cannot decode a small image").because(e))?;
    match read == probe.plain {
        true => Ok(()),
        false => Err(Error::failed("the kernel decodes wrong bytes")),
    }
}
