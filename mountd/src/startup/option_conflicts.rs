//! Compares a requested mount with an existing mount that the supervisor takes over.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use stencilfs::control::{self, MountOptions};
use stencilfs::error::{Error, Result};
use stencilfs::store::Store;

/// Largest number of symbolic links that the kernel follows in one path (`MAXSYMLINKS` in `include/linux/namei.h`).
const MAX_LINKS: usize = 40;

/// Rejects a request for another store than the store of the existing mount, as the names of its templates would have
/// other content. `store` and `id` are the path and the identity of the existing mount's store. If the request names
/// that path, the existing mount's store may be away.
///
/// # Errors
/// Returns [`Code::InUse`](stencilfs::error::Code::InUse) for another store, and an error if the requested store cannot
/// be opened.
pub fn same_store(requested: &MountOptions, store: &Path, id: &str) -> Result<()> {
    if resolves_to(&requested.store, store)
        || control::is_of_store(store, id, &Store::open(&requested.store)?)
    {
        return Ok(());
    }
    let mountpoint = requested.mountpoint.display();
    Err(Error::in_use(format!(
        "the mountpoint is in use by a mount of the store {}, whose supervisor is dead",
        store.display()
    ))
    .at(&requested.mountpoint)
    .hint(format!(
        "run 'stencil umount {mountpoint}', or 'stencil --store {} mount {mountpoint}' to take over that mount",
        store.display()
    )))
}

/// Returns true if `path` resolves to the path `store`, even if the store or directories of the path are missing.
fn resolves_to(path: &Path, store: &Path) -> bool {
    let path = std::path::absolute(path).unwrap_or_else(|_| PathBuf::from(path));
    let mut components: Vec<OsString> = path.iter().rev().map(OsStr::to_owned).collect();
    let (mut reached, mut links) = (PathBuf::new(), 0);
    while let Some(name) = components.pop() {
        if name == ".." {
            reached.pop();
            continue;
        }
        let next = reached.join(&name);
        match std::fs::read_link(&next) {
            // An absolute target begins with the root directory, which replaces `reached` in `join`.
            Ok(to) if links < MAX_LINKS => {
                components.extend(to.iter().rev().filter(|name| *name != ".").map(OsStr::to_owned));
                links += 1;
            }
            _ => reached = next,
        }
    }
    reached == store
}

/// Logs the requested options that have no effect, as a mount that is taken over keeps its options.
pub fn warn_about_differences(requested: &MountOptions, current: &MountOptions) {
    let differing: Vec<&str> = [
        ("serve", requested.serve != current.serve),
        ("cache-dir", requested.cache_dir != current.cache_dir),
        ("cache-size", requested.cache_size != current.cache_size),
        ("hydrate-timeout", requested.hydrate_timeout != current.hydrate_timeout),
        ("watchdog", requested.watchdog != current.watchdog),
        ("on-damage", requested.on_damage != current.on_damage),
        ("scrub-interval", requested.scrub_interval != current.scrub_interval),
        ("read-ahead", requested.read_ahead != current.read_ahead),
        ("noexec", requested.noexec != current.noexec),
    ]
    .into_iter()
    .filter_map(|(name, differs)| differs.then_some(name))
    .collect();
    if !differing.is_empty() {
        log::warn!(
            "took over {} with its previous options; the requested values of {} are ignored",
            current.mountpoint.display(),
            differing.join(", ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn recognizes_a_store_that_is_away_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let real = std::fs::canonicalize(dir.path()).unwrap();
        symlink(&real, real.join("here")).unwrap();
        symlink("second", real.join("first")).unwrap();
        symlink("away", real.join("second")).unwrap();
        symlink("loop", real.join("loop")).unwrap();
        let away = real.join("away");
        assert!(resolves_to(&away, &away) && resolves_to(&real.join("first"), &away));
        assert!(!resolves_to(&real.join("loop"), &away) && !resolves_to(&real.join("other"), &away));
        assert!(resolves_to(&real.join("here/away"), &away) && resolves_to(&real.join("here/first"), &away));
        symlink("gone/../away", real.join("third")).unwrap();
        assert!(resolves_to(&real.join("third"), &away));
        std::fs::create_dir(&away).unwrap();
        assert!(resolves_to(&real.join("here/away"), &away));
    }
}
