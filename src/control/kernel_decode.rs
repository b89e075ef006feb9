//! Whether a host can decode templates in the kernel.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Result};
use crate::store::{KERNEL_IMAGE_FILE, KernelProbe};
use crate::sys::files::{erofs, immutable};

/// Checks that this host can decode in the kernel: mounts a small image with every kind of record, whose metadata is in
/// `metadata_dir` and whose data is in `store`, in files that are immutable, and compares the bytes.
///
/// # Errors
/// Returns the reason why the host cannot decode in the kernel.
pub fn probe_kernel_decode(metadata_dir: &Path, store: &Path) -> Result<()> {
    let probe = KernelProbe::new()?;
    let (metadata, device) = (frozen(metadata_dir, &probe.metadata)?, frozen(store, &probe.device)?);
    let file = File::from(erofs::open_file(&metadata, &[device], KERNEL_IMAGE_FILE)?);
    let mut read = vec![0; probe.plain.len()];
    file.read_exact_at(&mut read, 0)
        .map_err(|e| Error::failed("the kernel cannot decode a small image").because(e))?;
    match read == probe.plain {
        true => Ok(()),
        false => Err(Error::failed("the kernel decodes wrong bytes")),
    }
}

/// Creates an unnamed file with these bytes, which no process can change.
fn frozen(dir: &Path, bytes: &[u8]) -> Result<File> {
    let failed = |what: &'static str| move |e: std::io::Error| Error::io(what, dir, e);
    let create = failed("cannot create an unnamed file (O_TMPFILE)");
    let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let file: File =
        rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).map_err(|e| create(e.into()))?.into();
    file.write_all_at(bytes, 0).map_err(failed("cannot write an unnamed file"))?;
    immutable::set(&file).map_err(|e| failed("cannot make a file immutable")(e.into()))?;
    match file.write_all_at(b"x", 0) {
        Err(_) => Ok(file),
        // tmpfs, for example, checks the flag only in open(2).
        Ok(()) => {
            Err(Error::failed("immutable files stay writable through open descriptors on this file system")
                .at(dir))
        }
    }
}
