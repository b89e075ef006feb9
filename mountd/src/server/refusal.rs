//! Reasons for the refusal of a request, with the errno and the counter of each.

use stencilfs::error::{Code, Error};

use crate::protocol::stats::Counter;

/// Reason for the refusal of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The name does not exist.
    NoEntry,
    /// The inode number does not exist, or no longer exists.
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
    pub fn errno(self) -> i32 {
        match self {
            Refusal::NoEntry => libc::ENOENT,
            Refusal::Stale => libc::ESTALE,
            Refusal::NotDirectory => libc::ENOTDIR,
            Refusal::IsDirectory => libc::EISDIR,
            Refusal::Invalid => libc::EINVAL,
            Refusal::Writes => libc::EACCES,
            Refusal::Policy => libc::EPERM,
            Refusal::NoPosition => libc::ENXIO,
            Refusal::Unsupported => libc::ENOSYS,
            Refusal::Damaged | Refusal::Away | Refusal::Failed => libc::EIO,
            Refusal::NoSpace => libc::ENOSPC,
            Refusal::Crowded => libc::EAGAIN,
        }
    }

    /// Returns the counter of such refusals.
    pub fn counter(self) -> Option<Counter> {
        match self {
            Refusal::Damaged => Some(Counter::Damaged),
            Refusal::Failed | Refusal::NoSpace | Refusal::Away => Some(Counter::Failed),
            Refusal::Writes | Refusal::Policy => Some(Counter::WritesRefused),
            Refusal::NoEntry
            | Refusal::Stale
            | Refusal::NotDirectory
            | Refusal::IsDirectory
            | Refusal::Invalid
            | Refusal::NoPosition
            | Refusal::Crowded
            | Refusal::Unsupported => None,
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
