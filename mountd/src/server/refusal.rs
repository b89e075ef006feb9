//! Why a request is refused, and the error number for it: one exhaustive match.

use fuser::Errno;
use stencilfs::error::{Code, Error};

/// Why a request gets no other answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No such name.
    NoEntry,
    /// The inode number means nothing (any more).
    Stale,
    /// A name was sought in something that is no directory.
    NotDirectory,
    /// A directory was opened or read as a file.
    IsDirectory,
    /// Not a symbolic link.
    Invalid,
    /// It would change a template, or make or remove a name.
    Writes,
    /// It would change mode, owner or times of a file: that is policy of the store.
    Policy,
    /// No such position in the file.
    NoPosition,
    /// Not part of this filesystem; the kernel asks once.
    Unsupported,
    /// Stored bytes are not what was stored.
    Damaged,
    /// The backing does not fit, and decode is not allowed.
    NoSpace,
    /// So many opens wait that this one cannot.
    Crowded,
    /// The store cannot be reached now.
    Away,
    /// Our own trouble.
    Failed,
}

impl Refusal {
    /// What the caller sees.
    pub fn errno(self) -> Errno {
        match self {
            Refusal::NoEntry => Errno::ENOENT,
            Refusal::Stale => Errno::ESTALE,
            Refusal::NotDirectory => Errno::ENOTDIR,
            Refusal::IsDirectory => Errno::EISDIR,
            Refusal::Invalid => Errno::EINVAL,
            Refusal::Writes => Errno::EACCES,
            Refusal::Policy => Errno::EPERM,
            Refusal::NoPosition => Errno::ENXIO,
            Refusal::Unsupported => Errno::ENOSYS,
            Refusal::Damaged | Refusal::Away | Refusal::Failed => Errno::EIO,
            Refusal::NoSpace => Errno::ENOSPC,
            Refusal::Crowded => Errno::EAGAIN,
        }
    }
}

impl From<&Error> for Refusal {
    fn from(error: &Error) -> Refusal {
        match error.code() {
            Code::NotFound => Refusal::NoEntry,
            Code::Damage => Refusal::Damaged,
            Code::Failed if error.errno() == Some(libc::ENOSPC) => Refusal::NoSpace,
            // Of the store's errors only this one says that the same call may succeed later.
            Code::TryAgain => Refusal::Away,
            Code::Failed | Code::Usage | Code::InUse | Code::CheckFailed => Refusal::Failed,
        }
    }
}
