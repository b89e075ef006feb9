//! Who uses backings of a mount.

use std::collections::HashSet;

use stencilfs::error::Result;
use stencilfs::sys::users::{self, PATIENCE};

/// Those of `inodes` on `device` that some process has mapped or open. Where a process lets nobody look, all count as
/// used: a backing that is closed under its user costs that user its memory.
///
/// # Errors
/// When `/proc` cannot be listed.
pub fn in_use(device: u64, inodes: &HashSet<u64>) -> Result<HashSet<u64>> {
    let users = users::users_of(device, PATIENCE)?;
    if !users.unseen.is_empty() {
        log::warn!(
            "all backings count as used: these processes let nobody look: {}",
            users::list_pids(&users.unseen)
        );
        return Ok(inodes.clone());
    }
    let used = users.found.into_iter().flat_map(|user| user.mapped.into_iter().chain(user.open));
    Ok(used.filter(|ino| inodes.contains(ino)).collect())
}
