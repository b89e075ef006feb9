//! The FUSE control filesystem: which connections wait for answers, and how many requests each has.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{Dir, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use crate::error::{Error, Result};

/// How often a connection is looked at before it counts as stuck, and how long after each other: half a second.
const LOOKS: u32 = 25;
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// One FUSE connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Its number: the minor device number of its mount.
    pub number: u32,
    /// Requests that nobody has answered.
    pub waiting: u64,
}

/// An instance of fusectl of our own, attached nowhere.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn open() -> io::Result<OwnedFd> {
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}

/// The number of requests that nobody has answered on one connection, to be read as often as one likes. It does not keep
/// the connection.
#[derive(Debug)]
pub struct Waiting {
    root: OwnedFd,
    path: CString,
}

impl Waiting {
    /// That of the connection of that device (`st_dev`).
    ///
    /// # Errors
    /// `ENOENT` where no such connection exists; else the kernel's.
    pub fn of(device: u64) -> io::Result<Waiting> {
        let path = CString::new(format!("{}/waiting", rustix::fs::minor(device)))?;
        let waiting = Waiting { root: open()?, path };
        waiting.read().map(|_| waiting)
    }

    /// Reads it. Allocates nothing.
    ///
    /// # Errors
    /// The kernel's, when the connection is over.
    pub fn read(&self) -> io::Result<u64> {
        // The file is no more than a stream, with a number that is read once: each time it is opened anew.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.root, self.path.as_c_str(), flags, Mode::empty())?;
        let mut text = [0; 24];
        let length = rustix::io::read(file, &mut text)?;
        let number = std::str::from_utf8(&text[..length]).ok().and_then(|t| t.trim().parse().ok());
        number.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// All connections of this host.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn connections() -> Result<Vec<Connection>> {
    let failed = |e: io::Error| {
        Error::failed("cannot look at the host's FUSE connections").because(e).remedy("run it as root")
    };
    let root = open().map_err(failed)?;
    let mut found = Vec::new();
    // The mount's own descriptor is only a path: nothing can be read from it.
    let folder =
        rustix::fs::openat(&root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let folder = folder.and_then(Dir::new).map_err(|e| failed(e.into()))?;
    for entry in folder {
        let entry = entry.map_err(|e| failed(e.into()))?;
        let Some(number) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A connection may end between the listing and the look.
        if let Some(waiting) = waiting(&root, number) {
            found.push(Connection { number, waiting });
        }
    }
    Ok(found)
}

fn waiting(root: &OwnedFd, number: u32) -> Option<u64> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(root, format!("{number}/waiting"), flags, Mode::empty()).ok()?;
    let mut text = String::new();
    File::from(file).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Connections that had requests waiting and, for half a second, never fewer. A busy connection of many readers can
/// look like that, too: who knows its server asks that as well.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn stuck_connections() -> Result<Vec<Connection>> {
    let mut stuck = connections()?;
    stuck.retain(|c| c.waiting > 0);
    for _ in 0..LOOKS {
        if stuck.is_empty() {
            break;
        }
        std::thread::sleep(BETWEEN_LOOKS);
        let now = connections()?;
        stuck.retain(|old| now.iter().any(|new| new.number == old.number && new.waiting >= old.waiting));
    }
    Ok(stuck)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{fuse_dev, mount, procfs};

    #[test]
    fn connections_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        let fuse = fuse_dev::open().unwrap();
        mount::mount_fuse(&fuse, "stencil-test".as_ref(), dir.path(), false).unwrap();
        let device =
            procfs::mounts().unwrap().into_iter().rfind(|m| m.mountpoint == dir.path()).map(|m| m.dev);
        let listed = connections();
        // Its INIT has not been read, so that one request waits.
        let number = rustix::fs::minor(device.unwrap());
        let waiting = Waiting::of(device.unwrap()).and_then(|w| Ok((w.read()?, w.read()?)));
        mount::unmount(dir.path(), true).unwrap();
        assert!(listed.unwrap().contains(&Connection { number, waiting: 1 }));
        assert_eq!(waiting.unwrap(), (1, 1), "as often as one likes");
    }
}
