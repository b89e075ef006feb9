//! Immutable files (`FS_IMMUTABLE_FL`, `chattr +i`): no process can change, rename or remove them, not even through
//! descriptors that are already open. Changing the flag needs `CAP_LINUX_IMMUTABLE`.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::{Errno, Result};

use crate::error::{self, Error};

/// Makes a file immutable. If the file is immutable already, its time of change (`st_ctime`) stays the same.
///
/// # Errors
/// Returns `ENOTTY` or `EOPNOTSUPP` if the file system has no such flag, and `EPERM` without the capability.
pub fn set(file: impl AsFd) -> Result<()> {
    let flags = ioctl_getflags(&file)?;
    match flags.contains(IFlags::IMMUTABLE) {
        true => Ok(()),
        false => ioctl_setflags(&file, flags | IFlags::IMMUTABLE),
    }
}

/// Makes a file changeable again. Returns true if the file was immutable.
///
/// # Errors
/// Returns `EPERM` without the capability.
pub fn clear(file: impl AsFd) -> Result<bool> {
    let flags = match ioctl_getflags(&file) {
        // The file system has no such flag.
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => return Ok(false),
        other => other?,
    };
    if !flags.contains(IFlags::IMMUTABLE) {
        return Ok(false);
    }
    ioctl_setflags(&file, flags - IFlags::IMMUTABLE)?;
    Ok(true)
}

/// Returns true if a file is immutable.
pub fn is_set(file: impl AsFd) -> bool {
    ioctl_getflags(file).is_ok_and(|flags| flags.contains(IFlags::IMMUTABLE))
}

/// Creates an unnamed file with these bytes, which no process can change.
///
/// # Errors
/// Returns an error if the file system has no unnamed files (`O_TMPFILE`), no space or no immutable files, or if
/// immutable files stay writable through open descriptors.
pub fn unnamed(dir: &Path, bytes: &[u8]) -> error::Result<File> {
    let failed = |what: &'static str| move |e: std::io::Error| Error::io(what, dir, e);
    let create = failed("cannot create an unnamed file (O_TMPFILE)");
    let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let file: File =
        rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR).map_err(|e| create(e.into()))?.into();
    file.write_all_at(bytes, 0).map_err(failed("cannot write an unnamed file"))?;
    set(&file).map_err(|e| failed("cannot make a file immutable")(e.into()))?;
    match file.write_all_at(b"x", 0) {
        Err(_) => Ok(file),
        // tmpfs, for example, checks the flag only in open(2).
        Ok(()) => {
            Err(Error::failed("immutable files stay writable through open descriptors on this file system")
                .at(dir))
        }
    }
}
