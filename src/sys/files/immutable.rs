//! Immutable files (`FS_IMMUTABLE_FL`, `chattr +i`): no process can change, rename or remove them, not even through
//! descriptors that are already open. Changing the flag needs `CAP_LINUX_IMMUTABLE`.

use std::os::fd::AsFd;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::{Errno, Result};

/// Makes a file immutable. The time of change (`st_ctime`) of a file that is immutable already stays.
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
