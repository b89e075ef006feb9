//! The FUSE control file system: FUSE connections and their numbers of pending requests.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{Dir, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use crate::error::{Error, Result};

/// A connection is stuck if its number of pending requests does not fall in so many checks, half a second in total.
const CHECKS: u32 = 25;
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// One FUSE connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Number of the connection: the minor device number of its mount.
    pub number: u32,
    /// Number of pending requests.
    pub waiting: u64,
}

/// Creates a private, unattached mount of fusectl.
///
/// # Errors
/// Returns an error without `CAP_SYS_ADMIN`.
pub fn open() -> io::Result<OwnedFd> {
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}

/// The number of pending requests of one connection, which can be read repeatedly. The value does not keep the
/// connection alive.
#[derive(Debug)]
pub struct Waiting {
    root: OwnedFd,
    path: CString,
}

impl Waiting {
    /// Opens the counter of the connection with this device number (`st_dev`).
    ///
    /// # Errors
    /// Returns `ENOENT` if no such connection exists, and an error if a system call fails.
    pub fn of(device: u64) -> io::Result<Waiting> {
        let path = CString::new(format!("{}/waiting", rustix::fs::minor(device)))?;
        let waiting = Waiting { root: open()?, path };
        waiting.read().map(|_| waiting)
    }

    /// Returns the current number of pending requests. Does not allocate.
    ///
    /// # Errors
    /// Returns an error if the connection has ended.
    pub fn read(&self) -> io::Result<u64> {
        // The file is not seekable and returns the number only once, so it is opened for each read.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.root, self.path.as_c_str(), flags, Mode::empty())?;
        let mut text = [0; 24];
        let length = rustix::io::read(file, &mut text)?;
        let number = std::str::from_utf8(&text[..length]).ok().and_then(|t| t.trim().parse().ok());
        number.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// Returns all FUSE connections of the host.
///
/// # Errors
/// Returns an error without `CAP_SYS_ADMIN`.
pub fn connections() -> Result<Vec<Connection>> {
    let failed = |e: io::Error| {
        Error::failed("cannot list the FUSE connections of the host")
            .because(e)
            .hint("run the command as root")
    };
    let root = open().map_err(failed)?;
    let mut found = Vec::new();
    // The descriptor of the mount is an O_PATH descriptor, which cannot be listed.
    let folder =
        rustix::fs::openat(&root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let folder = folder.and_then(Dir::new).map_err(|e| failed(e.into()))?;
    for entry in folder {
        let entry = entry.map_err(|e| failed(e.into()))?;
        let Some(number) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A connection may end while the directory is listed.
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

/// Returns the connections that had pending requests whose number did not fall for half a second. A busy connection
/// with many readers can look the same: a caller that can reach the server should also check the server.
///
/// # Errors
/// Returns an error without `CAP_SYS_ADMIN`.
pub fn stuck_connections() -> Result<Vec<Connection>> {
    let mut stuck = connections()?;
    stuck.retain(|c| c.waiting > 0);
    for _ in 0..CHECKS {
        if stuck.is_empty() {
            break;
        }
        std::thread::sleep(CHECK_INTERVAL);
        let now = connections()?;
        stuck.retain(|old| now.iter().any(|new| new.number == old.number && new.waiting >= old.waiting));
    }
    Ok(stuck)
}
