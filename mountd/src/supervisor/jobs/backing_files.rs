//! Creates the files of backings, and makes them immutable.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use stencilfs::control::Cache;
use stencilfs::error::{Error, Result};
use stencilfs::sys::files::immutable;
use stencilfs::sys::memory::memfd;
use stencilfs::units::Bytes;

use crate::supervisor::cache;

/// Creates the file of a backing, without data: `size` bytes long, of which `data` bytes will be written.
///
/// # Errors
/// Returns [`Code::TryAgain`](stencilfs::error::Code::TryAgain) if the file system has too little free space, or an
/// error if the file cannot be created.
pub fn create(cache: &Cache, size: Bytes, data: Bytes) -> Result<OwnedFd> {
    match cache {
        Cache::Directory(dir) => {
            let free = cache::free_in(dir)?;
            if data > free {
                return Err(Error::try_again(format!(
                    "the backing needs {data}, but the file system of the cache has only {free} free"
                ))
                .at(dir)
                .hint("free space on that file system, or mount with another --cache-dir"));
            }
            unnamed_file(dir, size)
        }
        Cache::Memory => memfd::create("stencil-backing", size)
            .map_err(|e| Error::failed("cannot create a memory file").because(e)),
        Cache::Nowhere(why) => Err(Error::failed(why.clone())),
    }
}

fn unnamed_file(dir: &Path, size: Bytes) -> Result<OwnedFd> {
    let fail = |e: rustix::io::Errno| Error::io("cannot create a backing", dir, e.into());
    // With O_EXCL, linkat(2) cannot give the file a name later.
    let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
    rustix::fs::ftruncate(&fd, size.get()).map_err(fail)?;
    Ok(fd)
}

/// Makes a filled backing immutable: from here on no process can change the file, not even through an open descriptor.
/// A backing that occupies more space than was reserved is refused.
///
/// # Errors
/// Returns an error if the file system cannot make the file immutable, or if the file occupies too much space.
pub fn freeze(cache: &Cache, file: impl AsFd, reserved: Bytes) -> Result<()> {
    /// Space that a file system may use in addition to the data: extent trees, preallocation.
    const SLACK: u64 = 16 << 20;
    let fail = |e: io::Error| Error::failed("cannot freeze the backing").because(e);
    match cache {
        Cache::Directory(_) => immutable::set(&file).map_err(|e| fail(e.into()))?,
        Cache::Memory => memfd::freeze(&file).map_err(fail)?,
        Cache::Nowhere(why) => return Err(Error::failed(why.clone())),
    }
    let taken = rustix::fs::fstat(&file).map_err(|e| fail(e.into()))?.st_blocks.cast_unsigned() * 512;
    if taken > reserved.get() + reserved.get() / 64 + SLACK {
        return Err(Error::failed(format!(
            "the backing occupies {}, but only {reserved} are reserved",
            Bytes::new(taken)
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use stencilfs::error::Code;

    use super::*;

    #[test]
    fn a_backing_in_memory_cannot_be_changed_after_the_freeze() {
        let (size, data) = (Bytes::new(1 << 20), Bytes::new(8192));
        let file = create(&Cache::Memory, size, data).unwrap();
        assert_eq!(rustix::fs::fstat(&file).unwrap().st_size, 1 << 20);
        rustix::io::pwrite(&file, b"data", 0).unwrap();
        freeze(&Cache::Memory, &file, data).unwrap();
        assert!(rustix::io::pwrite(&file, b"late", 0).is_err());
    }

    #[test]
    fn a_backing_that_outgrew_its_reservation_is_refused() {
        let size = Bytes::new(32 << 20);
        let file = create(&Cache::Memory, size, Bytes::new(4096)).unwrap();
        let mebibyte = vec![1; 1 << 20];
        (0..32).for_each(|n| assert!(rustix::io::pwrite(&file, &mebibyte, n << 20).is_ok()));
        let error = freeze(&Cache::Memory, &file, Bytes::new(4096)).unwrap_err();
        assert!(error.to_string().contains("only 4.00 KiB are reserved"), "{error}");
    }

    #[test]
    fn a_directory_needs_room_for_the_data() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::Directory(dir.path().to_owned());
        let error = create(&cache, Bytes::new(1 << 62), Bytes::new(1 << 62)).unwrap_err();
        assert_eq!(error.code(), Code::TryAgain);
        assert!(create(&cache, Bytes::new(4096), Bytes::new(4096)).is_ok());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the file has no name");
        let nowhere = Cache::Nowhere("no passthrough".to_owned());
        assert!(create(&nowhere, Bytes::ZERO, Bytes::ZERO).is_err());
        assert!(freeze(&nowhere, std::io::stdin(), Bytes::ZERO).is_err());
    }
}
