//! Ports of the host that clones were given. A port is free until a clone's command binds it, so the kernel alone would
//! give it twice: a link in `runtime_dir()/ports`, named after the port, names the clone that has it.

use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::fs::{readlinkat, symlinkat};
use rustix::io::Errno;

use super::registry::{Entry, clones_dir};
use crate::control::runtime::{self, is_plain_name};
use crate::error::{Error, Result};
use crate::sys::folder::Folder;
use crate::sys::{locks, users};

const PORTS: &str = "ports";

/// How long another command may change links.
const LIMIT: Duration = Duration::from_secs(10);

/// Notes that a port is this clone's. False when it is another one's: as long as its folder is there, whether its
/// process has bound the port or not.
///
/// # Errors
/// When the runtime directory cannot be written; [`Code::TryAgain`](crate::error::Code::TryAgain) when another command
/// changes links all the time, or `is_over` says that nobody wants the port any more.
pub fn claim(port: u16, id: &str, is_over: impl Fn() -> bool) -> Result<bool> {
    let links = take_turn(is_over)?;
    let name = port.to_string();
    let claim = || -> io::Result<bool> {
        match owner(&links, &name) {
            Ok(Some(owner)) if clones_dir().join(&owner).exists() => return Ok(owner == id),
            Ok(Some(_)) => links.remove_file(&name)?,
            Ok(None) => {}
            Err(e) => {
                // It is left to its owner, whoever that is: there are more ports.
                log::warn!("{}: it is not the link of a port: {e}", links.path_of(&name).display());
                return Ok(false);
            }
        }
        symlinkat(id, &links, &name)?;
        Ok(true)
    };
    claim().map_err(|e| runtime::failed("cannot note whose a port of the host is", &links.path_of(&name), e))
}

/// The clone that a link names.
fn owner(links: &Folder, name: &str) -> io::Result<Option<String>> {
    match readlinkat(links, name, Vec::new()) {
        Ok(owner) => {
            let owner = std::ffi::OsStr::from_bytes(owner.as_bytes()).to_str().filter(|id| is_plain_name(id));
            let owner = owner.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "it names no clone"))?;
            Ok(Some(owner.to_owned()))
        }
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Locks the folder of links, so that one process at a time changes them: a link must not become another clone's between
/// the check and the removal. Only the owner can open the folder.
fn take_turn(is_over: impl Fn() -> bool) -> Result<Folder> {
    let links = runtime::create(PORTS)?;
    match locks::wait(&links, true, LIMIT, is_over) {
        Ok(true) => Ok(links),
        Ok(false) => {
            let holders = users::list_pids(&locks::flock_holders(&links));
            Err(Error::try_again(format!("another command has locked the ports of clones: {holders}"))
                .at(links.path())
                .remedy("see whether that process was stopped: let it go on, or end it"))
        }
        Err(e) => Err(runtime::failed("cannot lock the ports of clones", links.path(), e)),
    }
}

/// Gives the ports of a clone back.
pub fn give_back(entry: &Entry) {
    if entry.ports.is_empty() {
        return;
    }
    let Ok(links) = take_turn(|| false) else { return };
    for port in entry.ports.values() {
        let name = port.to_string();
        // What cannot be removed is nobody's as soon as the clone's folder has gone.
        if owner(&links, &name).is_ok_and(|owner| owner.as_deref() == Some(entry.id.as_str())) {
            let _ = links.remove_file(&name);
        }
    }
}
