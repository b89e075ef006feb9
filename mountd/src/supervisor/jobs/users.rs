//! Finds processes that use files of a mount: searches all processes for the device and inode numbers, never for paths.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use stencilfs::control::FileKey;
use stencilfs::error::Result;
use stencilfs::store::{Serving, Store, inode_number};
use stencilfs::sys::process::holders::{self, Users};

/// Longest time from the reply to an open until the open file is visible in `/proc` of the process.
const GRACE: Duration = Duration::from_millis(200);

/// Returns the indices of those `keys` whose files no process uses through a backing.
///
/// # Errors
/// Returns an error if the store or `/proc` cannot be read. If a process cannot be inspected within `timeout`, all
/// files count as used.
pub fn unused(store: &Path, device: u64, keys: &[FileKey], timeout: Duration) -> Result<Vec<u64>> {
    let secret = Store::open(store)?.secret();
    std::thread::sleep(GRACE);
    let all = holders::users_of(device, timeout)?;
    if !all.unseen.is_empty() {
        log::warn!(
            "cannot evict backings: these processes cannot be inspected: {}",
            holders::list_pids(&all.unseen.pids())
        );
        return Ok(Vec::new());
    }
    let used: HashSet<u64> = all.found.into_iter().flat_map(|u| u.mapped.into_iter().chain(u.open)).collect();
    let number = |k: &FileKey| inode_number(&secret, &k.digest, &k.file, Serving::Passthrough);
    Ok((0..).zip(keys).filter(|(_, key)| !used.contains(&number(key))).map(|(index, _)| index).collect())
}

/// Returns a list of the processes that use the mount, as text for the log.
///
/// # Errors
/// Returns an error if `/proc` cannot be read.
pub fn find(device: u64, timeout: Duration) -> Result<String> {
    let Users { found, unseen } = holders::users_of(device, timeout)?;
    let mut text =
        holders::list(found.iter().map(|u| (u.pid, u.name.as_str())).collect::<Vec<_>>().into_iter());
    if !unseen.is_empty() {
        text += &format!("; not inspected: {}", holders::list_pids(&unseen.pids()));
    }
    Ok(text)
}
