//! Chooses the location of the backings and the limit on their size.

use std::path::Path;

use rustix::fs::{statfs, statvfs};
use stencilfs::control::{BackingKind, Cache, Chosen, MountOptions, ServeMode, probe_kernel_decode};
use stencilfs::error::{Error, Result};
use stencilfs::sys::files::immutable;
use stencilfs::sys::process::procfs;
use stencilfs::units::Bytes;

const OVERLAYFS_MAGIC: i64 = 0x794c_7630;
/// `FUSE_PASSTHROUGH`, bit 37 of the INIT flags: bit 5 of `flags2`.
const PASSTHROUGH_FLAGS2: u32 = 1 << 5;
/// Offset of `flags2` in an INIT request: a header of 40 bytes, then major, minor, max_readahead and flags.
const FLAGS2_OFFSET: usize = 40 + 16;

/// Chooses the location and the limit. The choice depends on the options of the mount, the kernel's INIT request
/// `init`, and the features of the file systems.
///
/// # Errors
/// Returns an error if passthrough or a cache directory was requested explicitly and cannot be used.
pub fn choose(options: &MountOptions, init: &[u8]) -> Result<Chosen> {
    let kind = match options.serve {
        ServeMode::Kernel => BackingKind::Kernel,
        ServeMode::Auto | ServeMode::Passthrough | ServeMode::Decode => BackingKind::Copy,
    };
    let nowhere =
        |why: &str| Chosen { kind, cache: Cache::Nowhere(why.to_owned()), why: None, most: Bytes::ZERO };
    if options.serve == ServeMode::Decode {
        return Ok(nowhere("the mount is configured to decode"));
    }
    let flags2 = init.get(FLAGS2_OFFSET..FLAGS2_OFFSET + 4).and_then(|b| b.try_into().ok());
    if flags2.map_or(0, u32::from_le_bytes) & PASSTHROUGH_FLAGS2 == 0 {
        if options.serve == ServeMode::Passthrough {
            return Err(Error::failed("the kernel does not support FUSE passthrough")
                .hint("use Linux 6.9 or later with CONFIG_FUSE_PASSTHROUGH, or mount with --serve decode"));
        }
        return Ok(nowhere("the kernel does not support FUSE passthrough"));
    }
    if let Some(dir) = &options.cache_dir {
        probe(dir).map_err(|e| {
            let e = e.context("the cache directory cannot hold backings");
            if e.hint_text().is_some() { e } else { e.hint("use a directory on ext4 or xfs") }
        })?;
        let dir = std::fs::canonicalize(dir)
            .map_err(|e| Error::io("cannot resolve the cache directory", dir, e))?;
        let most = options.cache_size.map_or_else(|| half_of_free(&dir), Ok)?;
        if kind == BackingKind::Kernel
            && let Err(error) = probe_kernel_decode(&dir, &options.store)
        {
            return Ok(nowhere(&unsupported(&error)));
        }
        return Ok(Chosen { kind, cache: Cache::Directory(dir), why: None, most });
    }
    if kind == BackingKind::Kernel {
        return Ok(match probe_kernel_decode(&options.store, &options.store) {
            Ok(()) => {
                let most = options.cache_size.map_or_else(|| half_of_free(&options.store), Ok)?;
                Chosen { kind, cache: Cache::Directory(options.store.clone()), why: None, most }
            }
            Err(error) => nowhere(&unsupported(&error)),
        });
    }
    match probe(&options.store) {
        Ok(()) => {
            let most = options.cache_size.map_or_else(|| half_of_free(&options.store), Ok)?;
            Ok(Chosen { kind, cache: Cache::Directory(options.store.clone()), why: None, most })
        }
        Err(error) => {
            let why = format!("backings are in memory: the store's file system cannot hold them: {error}");
            log::warn!("{why}");
            let most = options.cache_size.map_or_else(quarter_of_memory, Ok)?;
            Ok(Chosen { kind, cache: Cache::Memory, why: Some(why), most })
        }
    }
}

/// Checks that a directory can hold backings: unnamed files that can be made immutable, on a file system that FUSE
/// passthrough accepts.
fn probe(dir: &Path) -> Result<()> {
    let kind = statfs(dir).map_err(|e| Error::io("cannot inspect the file system", dir, e.into()))?.f_type;
    if kind == OVERLAYFS_MAGIC {
        return Err(Error::failed(
            "FUSE passthrough rejects overlayfs, because overlayfs is a stacked file system",
        )
        .at(dir)
        .hint("use --cache-dir with a directory on ext4 or xfs"));
    }
    immutable::unnamed(dir, &[]).map(drop)
}

/// Returns, and logs, why files are served by decode although kernel decode was requested.
fn unsupported(error: &Error) -> String {
    let hint = error.hint_text().map_or(String::new(), |hint| format!(" ({hint})"));
    let why = format!("the host does not support kernel decode: {error}{hint}");
    log::warn!("{why}");
    why
}

/// Returns the free space for unprivileged users on the file system of `dir`.
///
/// # Errors
/// Returns an error if statvfs(3) fails.
pub fn free_in(dir: &Path) -> Result<Bytes> {
    let stat = statvfs(dir).map_err(|e| Error::io("cannot get the free space", dir, e.into()))?;
    Ok(Bytes::new(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

fn half_of_free(dir: &Path) -> Result<Bytes> {
    Ok(Bytes::new(free_in(dir)?.get() / 2))
}

fn quarter_of_memory() -> Result<Bytes> {
    Ok(Bytes::new(procfs::meminfo("MemTotal")?.map_or(0, Bytes::get) / 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An INIT request of a kernel with or without passthrough.
    fn init(has_passthrough: bool) -> Vec<u8> {
        let mut init = vec![0; 104];
        init[FLAGS2_OFFSET] = if has_passthrough { 1 << 5 } else { 0 };
        init
    }

    fn options(store: &Path, words: &[&str]) -> MountOptions {
        let store = format!("--store={}", store.display());
        let words = [&[store.as_str()], words, &["--", "/mnt"]].concat();
        MountOptions::from_args(words.into_iter().map(Into::into)).unwrap()
    }

    #[test]
    fn backings_need_a_kernel_and_a_mode_with_passthrough() {
        let dir = tempfile::tempdir().unwrap();
        let reason = |words: &[&str], init: &[u8]| match choose(&options(dir.path(), words), init) {
            Ok(Chosen { cache: Cache::Nowhere(why), .. }) => why,
            other => panic!("{other:?}"),
        };
        assert!(reason(&["--serve=decode"], &init(true)).contains("configured to decode"));
        assert!(reason(&[], &init(false)).contains("the kernel does not support"));
        assert!(reason(&[], b"truncated").contains("the kernel does not support"));
        let error = choose(&options(dir.path(), &["--serve=passthrough"]), &init(false)).unwrap_err();
        assert!(error.hint_text().unwrap().contains("--serve decode"), "{error}");
    }

    #[test]
    fn backings_are_next_to_the_store_or_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let chosen = choose(&options(dir.path(), &["--cache-size=1000000"]), &init(true)).unwrap();
        assert_eq!(chosen.most, Bytes::new(1_000_000));
        match chosen.cache {
            Cache::Directory(place) => assert_eq!((place.as_path(), chosen.why), (dir.path(), None)),
            // An ordinary user cannot make a file immutable.
            Cache::Memory => assert!(chosen.why.unwrap().contains("cannot hold them")),
            other => panic!("{other:?}"),
        }
        assert!(choose(&options(dir.path(), &[]), &init(true)).unwrap().most > Bytes::ZERO);
    }

    #[test]
    fn a_requested_cache_directory_must_be_usable() {
        let dir = tempfile::tempdir().unwrap();
        let missing = format!("--cache-dir={}", dir.path().join("missing").display());
        let error = choose(&options(dir.path(), &[&missing]), &init(true)).unwrap_err();
        assert!(error.to_string().contains("the cache directory cannot hold backings"), "{error}");
        assert!(error.hint_text().is_some());
    }
}
