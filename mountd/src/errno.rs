//! Reasons for the refusal of a request, with the errno of each: one exhaustive match.

use fuser::Errno;
use stencilfs::error::{Code, Error};

/// Reason for the refusal of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The name does not exist.
    NoEntry,
    /// The inode number does not exist (any more).
    Stale,
    /// A lookup in a node that is not a directory.
    NotDirectory,
    /// An open or read of a directory as a file.
    IsDirectory,
    /// The node is not a symbolic link, or an argument is invalid.
    Invalid,
    /// The request would change a template, or create or remove a name.
    Writes,
    /// The request would change mode, owner or times of a file, which the policy in the store determines.
    Policy,
    /// The position does not exist in the file.
    NoPosition,
    /// The file system does not support the operation; the kernel stops sending it.
    Unsupported,
    /// Stored bytes are damaged.
    Damaged,
    /// The backing does not fit into the cache, and decode is not allowed.
    NoSpace,
    /// Too many opens are waiting.
    Crowded,
    /// The store cannot be reached at present.
    Away,
    /// Another failure of the server.
    Failed,
}

impl Refusal {
    /// Returns the errno of the reply.
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
            // The store returns this code only while it cannot be reached.
            Code::TryAgain => Refusal::Away,
            Code::Failed | Code::Usage | Code::InUse | Code::CheckFailed => Refusal::Failed,
        }
    }
}
