//! Who uses files of a mount: found by device and inode number in every process, never by path or open count.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use stencilfs::control::FileKey;
use stencilfs::error::Result;
use stencilfs::store::{Serving, Store, inode_number};
use stencilfs::sys::users::{self, Users};

/// An open that was just answered with a backing reaches it within this time.
const GRACE: Duration = Duration::from_millis(200);

/// Which of `keys` no process uses by passthrough, by their place.
///
/// # Errors
/// When a process cannot be looked into within `patience`, or the store cannot be read: then all count as used.
pub fn unused(store: &Path, device: u64, keys: &[FileKey], patience: Duration) -> Result<Vec<u64>> {
    let secret = Store::open(store)?.secret();
    std::thread::sleep(GRACE);
    let all = users::users_of(device, patience)?;
    if !all.unseen.is_empty() {
        log::warn!(
            "these could not be looked into, no backing is evicted: {}",
            users::list_pids(&all.unseen.pids())
        );
        return Ok(Vec::new());
    }
    let used: HashSet<u64> = all.found.into_iter().flat_map(|u| u.mapped.into_iter().chain(u.open)).collect();
    let number = |k: &FileKey| inode_number(&secret, &k.digest, &k.file, Serving::Passthrough);
    Ok((0..).zip(keys).filter(|(_, key)| !used.contains(&number(key))).map(|(place, _)| place).collect())
}

/// Names who uses the mount, for the log.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn find(device: u64, patience: Duration) -> Result<String> {
    let Users { found, unseen } = users::users_of(device, patience)?;
    let mut text =
        users::list(found.iter().map(|u| (u.pid, u.name.as_str())).collect::<Vec<_>>().into_iter());
    if !unseen.is_empty() {
        text += &format!("; not seen into: {}", users::list_pids(&unseen.pids()));
    }
    Ok(text)
}
