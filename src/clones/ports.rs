//! Ports of the host that clones were given. A port is free until a clone's command binds it, so the kernel alone would
//! give it twice: a link in `runtime_dir()/ports`, named after the port, names the clone that has it.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

use super::registry::{Entry, clones_dir, runtime_root};
use crate::error::{Error, Result};

/// Notes that a port is this clone's. False when it is another one's: as long as its folder is there, whether its
/// process has bound the port or not.
///
/// # Errors
/// When the runtime directory cannot be written.
pub fn claim(port: u16, id: &str) -> Result<bool> {
    let link = link_of(port);
    let claim = || {
        let _turn = take_turn()?;
        match fs::read_link(&link) {
            Ok(owner) if clones_dir().join(&owner).exists() => return Ok(owner.as_os_str() == id),
            Ok(_) => fs::remove_file(&link)?,
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        symlink(id, &link)?;
        io::Result::Ok(true)
    };
    claim().map_err(|e| Error::io("cannot note whose a port of the host is", &link, e))
}

fn link_of(port: u16) -> PathBuf {
    runtime_root().join("ports").join(port.to_string())
}

/// Whoever changes links does it alone: between the look at a link and its removal it must not become another clone's.
fn take_turn() -> io::Result<File> {
    let all = runtime_root().join("ports");
    fs::create_dir_all(&all)?;
    let folder = File::open(&all)?;
    rustix::io::retry_on_intr(|| flock(&folder, FlockOperation::LockExclusive))?;
    Ok(folder)
}

/// Gives the ports of a clone back.
pub fn give_back(entry: &Entry) {
    if entry.ports.is_empty() {
        return;
    }
    let Ok(_turn) = take_turn() else { return };
    for &port in entry.ports.values() {
        let link = link_of(port);
        // What cannot be removed is nobody's as soon as the clone's folder has gone.
        if fs::read_link(&link).is_ok_and(|owner| owner.as_os_str() == entry.id.as_str()) {
            let _ = fs::remove_file(&link);
        }
    }
}
