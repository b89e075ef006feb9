//! Descriptors that a process was handed by number: by the program it was before, by its parent, by a service manager.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::FdFlags;

/// Takes a descriptor that this process was started with, and marks it close-on-exec.
///
/// Each number is to be taken once, at the start of the process, and only by who was told that it is theirs: a number
/// that belongs to something else in this process would be closed under it.
///
/// # Errors
/// `EBADF` for a number that is not open; `EBUSY` for one that is marked close-on-exec already: such a one was opened
/// by this process, or taken before.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number is only asked for its flags here, which fails for what is not open; it is not stored.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    if rustix::io::fcntl_getfd(borrowed)?.contains(FdFlags::CLOEXEC) {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: the descriptor is open (checked above). Everything that this program opens is close-on-exec, so one that
    // was not has no owner in it yet; from now on it has one, and a second `take` fails.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Lets a descriptor survive exec, under its number, which is returned.
///
/// # Errors
/// The system's.
pub fn keep_at_exec(fd: impl AsFd) -> io::Result<RawFd> {
    rustix::io::fcntl_setfd(&fd, FdFlags::empty())?;
    Ok(fd.as_fd().as_raw_fd())
}

/// Lets a descriptor end with exec again.
///
/// # Errors
/// The system's.
pub fn close_at_exec(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_taken_once_and_only_if_it_was_inherited() {
        let file = tempfile::tempfile().unwrap();
        assert!(take(file.as_raw_fd()).is_err(), "it has an owner");
        assert!(take(1 << 20).is_err(), "it is not open");
        assert!(take(1).is_err(), "the standard ones belong to everybody");
        let inherited = rustix::io::dup(&file).unwrap();
        let number = keep_at_exec(&inherited).unwrap();
        std::mem::forget(inherited);
        let taken = take(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(take(number).is_err(), "it was taken");
    }
}
