//! Creates the files of backings, and makes them immutable.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use stencilfs::control::Cache;
use stencilfs::error::{Error, Result};
use stencilfs::sys::memory::memfd;
use stencilfs::units::Bytes;

use crate::supervisor::cache;

/// Creates the empty file of a backing: `size` bytes long, of which `data` bytes will be written.
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
                    "the backing needs {data}, the file system of the cache has {free} free"
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
        Cache::Directory(_) => cache::freeze(&file).map_err(|e| fail(e.into()))?,
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
