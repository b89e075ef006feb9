//! File descriptors that a process inherits by number from the program that it replaced, its parent or a service
//! manager.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::FdFlags;

/// Takes ownership of a descriptor that this process inherited, and marks it close-on-exec.
///
/// Call this function once per number, at startup, and only for numbers that were passed to this code: a descriptor
/// with another owner in this process would be closed while the owner uses it.
///
/// # Errors
/// Returns `EBADF` if the number is not open, `InvalidInput` for the standard streams, and `ResourceBusy` if the
/// descriptor is already close-on-exec: this process opened or took it.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number is only used to read its flags, which fails if it is not open; the borrow is not stored.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    if rustix::io::fcntl_getfd(borrowed)?.contains(FdFlags::CLOEXEC) {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: the descriptor is open (checked above). This program opens all its descriptors close-on-exec, so a
    // descriptor without the flag has no owner yet; a second `take` fails because the flag is now set.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Clears the close-on-exec flag and returns the number, under which the next program inherits the descriptor.
///
/// # Errors
/// Returns an error if the system call fails.
pub fn clear_cloexec(fd: impl AsFd) -> io::Result<RawFd> {
    rustix::io::fcntl_setfd(&fd, FdFlags::empty())?;
    Ok(fd.as_fd().as_raw_fd())
}

/// Sets the close-on-exec flag.
///
/// # Errors
/// Returns an error if the system call fails.
pub fn set_cloexec(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)?)
}

#[cfg(test)]
mod tests {
    use crate::sys::files::descriptor::*;

    #[test]
    fn takes_only_inherited_descriptors_and_only_once() {
        let file = tempfile::tempfile().unwrap();
        assert!(take(file.as_raw_fd()).is_err(), "the descriptor has an owner");
        assert!(take(1 << 20).is_err(), "the descriptor is not open");
        assert!(take(1).is_err(), "standard streams are refused");
        let inherited = rustix::io::dup(&file).unwrap();
        let number = clear_cloexec(&inherited).unwrap();
        std::mem::forget(inherited);
        let taken = take(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(take(number).is_err(), "the descriptor was taken before");
    }
}
