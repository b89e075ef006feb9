//! Where backings are made, and how much room they have.

use std::path::Path;

use rustix::fs::{IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags, statfs, statvfs};
use stencilfs::control::{Cache, Chosen, MountOptions, ServeMode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::procfs;
use stencilfs::units::Bytes;

const OVERLAYFS_MAGIC: i64 = 0x794c_7630;
/// `FUSE_PASSTHROUGH`, bit 37 of INIT's flags: bit 5 of its second word.
const PASSTHROUGH_FLAGS2: u32 = 1 << 5;
/// Where `flags2` lies in an INIT request: header of 40 bytes, then major, minor, max_readahead, flags.
const FLAGS2_OFFSET: usize = 40 + 16;

/// Chooses by what was asked for and what the kernel and the filesystems can do.
///
/// # Errors
/// When passthrough or a directory was asked for by name and cannot be.
pub fn choose(options: &MountOptions, init: &[u8]) -> Result<Chosen> {
    let nowhere = |why: &str| Chosen { cache: Cache::Nowhere(why.to_owned()), why: None, most: Bytes::ZERO };
    if options.serve == ServeMode::Decode {
        return Ok(nowhere("the mount was asked to decode"));
    }
    let flags2 = init.get(FLAGS2_OFFSET..FLAGS2_OFFSET + 4).and_then(|b| b.try_into().ok());
    if flags2.map_or(0, u32::from_le_bytes) & PASSTHROUGH_FLAGS2 == 0 {
        if options.serve == ServeMode::Passthrough {
            return Err(Error::failed("the kernel has no FUSE passthrough")
                .remedy("it needs Linux 6.9 with CONFIG_FUSE_PASSTHROUGH; mount with --serve decode"));
        }
        return Ok(nowhere("the kernel has no FUSE passthrough"));
    }
    if let Some(dir) = &options.cache_dir {
        probe(dir).map_err(|e| {
            let e = e.context("the cache directory cannot hold backings");
            if e.remedy_text().is_some() { e } else { e.remedy("name a directory on ext4 or xfs") }
        })?;
        let dir =
            std::fs::canonicalize(dir).map_err(|e| Error::io("cannot use the cache directory", dir, e))?;
        let most = options.cache_size.map_or_else(|| half_of_free(&dir), Ok)?;
        return Ok(Chosen { cache: Cache::Directory(dir), why: None, most });
    }
    match probe(&options.store) {
        Ok(()) => {
            let most = options.cache_size.map_or_else(|| half_of_free(&options.store), Ok)?;
            Ok(Chosen { cache: Cache::Directory(options.store.clone()), why: None, most })
        }
        Err(error) => {
            let why =
                format!("backings are in memory, since the store's filesystem cannot hold them: {error}");
            log::warn!("{why}");
            let most = options.cache_size.map_or_else(quarter_of_memory, Ok)?;
            Ok(Chosen { cache: Cache::Memory, why: Some(why), most })
        }
    }
}

/// Tries what a backing needs: an unnamed file that can be frozen, on a filesystem that passthrough accepts.
fn probe(dir: &Path) -> Result<()> {
    let fail = |what: &str| {
        let what = what.to_owned();
        move |e: rustix::io::Errno| Error::io(what, dir, e.into())
    };
    let kind = statfs(dir).map_err(fail("cannot use it"))?.f_type;
    if kind == OVERLAYFS_MAGIC {
        return Err(Error::failed(
            "it lies on overlayfs, which is stacked already: passthrough accepts no other layer",
        )
        .at(dir)
        .remedy("name a directory on ext4 or xfs with --cache-dir"));
    }
    let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)
        .map_err(fail("no unnamed file can be made in it"))?;
    freeze(&file).map_err(fail("its files cannot be made immutable"))?;
    match rustix::io::pwrite(&file, b"x", 0) {
        Err(_) => Ok(()),
        // tmpfs is such a one: it looks at the flag only when a file is opened.
        Ok(_) => {
            Err(Error::failed("its immutable files can be written through descriptors opened before").at(dir))
        }
    }
}

/// Makes a file immutable for every descriptor of it, those opened before too.
pub fn freeze(file: impl std::os::fd::AsFd) -> rustix::io::Result<()> {
    let flags = ioctl_getflags(&file)?;
    ioctl_setflags(&file, flags | IFlags::IMMUTABLE)
}

/// Bytes that an ordinary user could still write there.
///
/// # Errors
/// The filesystem's.
pub fn free_in(dir: &Path) -> Result<Bytes> {
    let stat = statvfs(dir).map_err(|e| Error::io("cannot see how much is free", dir, e.into()))?;
    Ok(Bytes::new(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

fn half_of_free(dir: &Path) -> Result<Bytes> {
    Ok(Bytes::new(free_in(dir)?.get() / 2))
}

fn quarter_of_memory() -> Result<Bytes> {
    Ok(Bytes::new(procfs::meminfo("MemTotal")?.map_or(0, Bytes::get) / 4))
}
