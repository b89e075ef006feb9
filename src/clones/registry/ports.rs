//! Host ports of clones. The kernel considers a port free until the clone's command binds it, and could assign it
//! twice. Therefore a symbolic link in `runtime_dir()/ports`, named after the port, records the clone that owns the
//! port.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::fs::{readlinkat, symlinkat};
use rustix::io::Errno;

use super::layout::clones_dir;
use crate::control::runtime::{self, is_plain_name};
use crate::error::{Error, Result};
use crate::sys::files::directory::Directory;
use crate::sys::files::file_locks;
use crate::sys::process::holders;

const PORTS: &str = "ports";

/// Timeout for the lock on the directory of links.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// Claims a port for a clone. Returns false if another clone owns the port, which holds while the directory of that
/// clone exists, whether or not its process has bound the port.
///
/// # Errors
/// Returns an error if the runtime directory is not writable, and [`Code::TryAgain`](crate::error::Code::TryAgain) if
/// another command holds the lock on the links for 10 s, or `is_over` returns true meanwhile.
pub fn claim(port: u16, id: &str, is_over: impl Fn() -> bool) -> Result<bool> {
    let links = lock_links(is_over)?;
    let name = port.to_string();
    let claim = || -> io::Result<bool> {
        match owner(&links, &name) {
            Ok(Some(owner)) if clones_dir().join(&owner).exists() => return Ok(owner == id),
            Ok(Some(_)) => links.remove_file(&name)?,
            Ok(None) => {}
            Err(e) => {
                // Leaves the unexpected file alone and skips the port.
                log::warn!("{}: not a link of a port: {e}", links.path_of(&name).display());
                return Ok(false);
            }
        }
        symlinkat(id, &links, &name)?;
        Ok(true)
    };
    claim().map_err(|e| runtime::failed("cannot record the owner of a host port", &links.path_of(&name), e))
}

/// Returns the id of the clone that owns a port; `None` if there is no link.
fn owner(links: &Directory, name: &str) -> io::Result<Option<String>> {
    match readlinkat(links, name, Vec::new()) {
        Ok(owner) => {
            let owner = std::ffi::OsStr::from_bytes(owner.as_bytes()).to_str().filter(|id| is_plain_name(id));
            let owner = owner
                .ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "its target is not a clone id"))?;
            Ok(Some(owner.to_owned()))
        }
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Locks the directory of links, so that no other process replaces a link between the check and the removal. Only the
/// user who owns the directory can open it.
fn lock_links(is_over: impl Fn() -> bool) -> Result<Directory> {
    let links = runtime::create(PORTS)?;
    match file_locks::wait(&links, true, LOCK_TIMEOUT, is_over) {
        Ok(true) => Ok(links),
        Ok(false) => {
            let holders = holders::list_pids(&file_locks::flock_holders(&links));
            Err(Error::try_again(format!(
                "the host ports of clones are locked by another command: {holders}"
            ))
            .at(links.path())
            .hint("continue that process with `kill -CONT` if it is stopped, or end it"))
        }
        Err(e) => Err(runtime::failed("cannot lock the host ports of clones", links.path(), e)),
    }
}

/// Releases the ports of a clone.
pub fn release(id: &str, ports: &BTreeMap<String, u16>) {
    if ports.is_empty() {
        return;
    }
    let Ok(links) = lock_links(|| false) else { return };
    for port in ports.values() {
        let name = port.to_string();
        // A link that remains here becomes invalid when the clone's directory is removed.
        if owner(&links, &name).is_ok_and(|owner| owner.as_deref() == Some(id)) {
            let _ = links.remove_file(&name);
        }
    }
}
