//! What was asked for, beside a mount that is there already.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use stencilfs::control::{self, MountOptions};
use stencilfs::error::{Error, Result};
use stencilfs::store::Store;

/// As many links lead nowhere for the kernel too.
const MOST_LINKS: usize = 40;

/// Refuses to go on with a mount of another store than the one that is asked for: under its names lie other bytes.
/// `store` and `id` are the mount's own. A store that is away hinders nobody, as long as it is asked for by its path.
///
/// # Errors
/// [`Code::InUse`](stencilfs::error::Code::InUse) for another store; that the one that is asked for cannot be opened.
pub fn same_store(asked: &MountOptions, store: &Path, id: Option<&str>) -> Result<()> {
    if leads_to(&asked.store, store) || control::is_of_store(store, id, &Store::open(&asked.store)?) {
        return Ok(());
    }
    let mountpoint = asked.mountpoint.display();
    Err(Error::in_use(format!(
        "a mount of the store {}, which has lost its supervisor, is there",
        store.display()
    ))
    .at(&asked.mountpoint)
    .remedy(format!(
        "end it: stencil umount {mountpoint}; or go on with it: stencil --store {} mount {mountpoint}",
        store.display()
    )))
}

/// True when the path is that of the store, be the store there or not, and the disks on the way to it.
fn leads_to(path: &Path, store: &Path) -> bool {
    let path = std::path::absolute(path).unwrap_or_else(|_| PathBuf::from(path));
    let mut left: Vec<OsString> = path.iter().rev().map(OsStr::to_owned).collect();
    let (mut reached, mut links) = (PathBuf::new(), 0);
    while let Some(name) = left.pop() {
        if name == ".." {
            reached.pop();
            continue;
        }
        let next = reached.join(&name);
        match std::fs::read_link(&next) {
            // An absolute one begins with the root, which takes the place of what was reached.
            Ok(to) if links < MOST_LINKS => {
                left.extend(to.iter().rev().filter(|name| *name != ".").map(OsStr::to_owned));
                links += 1;
            }
            _ => reached = next,
        }
    }
    reached == store
}

/// Says which options have no effect: a mount that is taken over keeps those that it was made with.
pub fn warn(asked: &MountOptions, kept: &MountOptions) {
    let differing: Vec<&str> = [
        ("serve", asked.serve != kept.serve),
        ("cache-dir", asked.cache_dir != kept.cache_dir),
        ("cache-size", asked.cache_size != kept.cache_size),
        ("hydrate-timeout", asked.hydrate_timeout != kept.hydrate_timeout),
        ("watchdog", asked.watchdog != kept.watchdog),
        ("noexec", asked.noexec != kept.noexec),
    ]
    .into_iter()
    .filter_map(|(name, differs)| differs.then_some(name))
    .collect();
    if !differing.is_empty() {
        log::warn!(
            "{} is taken over with the options that it was made with; not as asked for are: {}",
            kept.mountpoint.display(),
            differing.join(", ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_store_that_is_away_is_known_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let real = std::fs::canonicalize(dir.path()).unwrap();
        symlink(&real, real.join("here")).unwrap();
        symlink("second", real.join("first")).unwrap();
        symlink("away", real.join("second")).unwrap();
        symlink("loop", real.join("loop")).unwrap();
        let away = real.join("away");
        assert!(leads_to(&away, &away) && leads_to(&real.join("first"), &away));
        assert!(!leads_to(&real.join("loop"), &away) && !leads_to(&real.join("other"), &away));
        assert!(leads_to(&real.join("here/away"), &away) && leads_to(&real.join("here/first"), &away));
        symlink("gone/../away", real.join("third")).unwrap();
        assert!(leads_to(&real.join("third"), &away));
        std::fs::create_dir(&away).unwrap();
        assert!(leads_to(&real.join("here/away"), &away));
    }
}
