//! Messages of the control socket: one [`Request`], one [`Response`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error};
use crate::store::Digest;

/// Version of the protocol between the processes of a mount. Servers and supervisors of different versions do not work
/// together, and a supervisor cannot take over from one of another version without ending all mappings. A new or
/// changed request of the control socket therefore does not raise the version: a supervisor that cannot parse a request
/// closes the connection, and the caller suggests `stencil restart`.
pub const CONTROL_VERSION: u32 = 5;

/// Largest number of inode numbers in one request. Each has at most 20 digits and a comma, so that all of them fit into
/// one message.
pub const MAX_INODES: usize = 2048;

/// A request to a supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
pub enum Request {
    /// Return the state. Answered by [`Response::Snapshot`].
    Snapshot,
    /// Return the descriptor of a ready backing. Answered by [`Response::Descriptor`].
    Backing {
        /// Index of the backing in the snapshot.
        index: usize,
    },
    /// Start the program whose descriptor comes with the request. Answered by [`Response::Done`] when the new server
    /// serves the kernel.
    Restart {
        /// True to replace the supervisor too.
        supervisor: bool,
    },
    /// Hide templates from lookups and opens for as long as this connection is open. Answered by [`Response::Settled`]
    /// when all of them are hidden.
    Condemn {
        /// The templates.
        digests: Vec<Digest>,
    },
    /// Check that all these templates have been hidden since [`Request::Condemn`]. Answered by [`Response::Done`].
    Confirm {
        /// The templates.
        digests: Vec<Digest>,
    },
    /// Show templates again or, if they are removed, close their backings. Answered by [`Response::Settled`].
    Release {
        /// The templates.
        digests: Vec<Digest>,
        /// True if the templates are removed.
        removed: bool,
    },
    /// Return those of these inodes of the mount that the kernel holds. The directory entries of a hidden template are
    /// invalidated, so that the kernel holds the inode of a file only while the file is in use. Answered by
    /// [`Response::Inodes`].
    Inodes {
        /// At most [`MAX_INODES`] numbers.
        numbers: Vec<u64>,
    },
    /// Close the files that were deleted from the store. Answered by [`Response::Settled`].
    Refresh,
    /// Unmount. Answered by [`Response::Done`].
    Unmount {
        /// Mode.
        mode: UnmountMode,
    },
}

/// Mode of an unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnmountMode {
    /// Fail if the mount is in use.
    Plain,
    /// Detach the mount from the tree now; supervisor and server run until the last use has ended.
    Lazy,
    /// Detach the mount and abort its connection: a process that still needs a page from the mount dies of `SIGBUS`.
    Force,
}

/// The reply of a supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum Response {
    /// Reply to [`Request::Snapshot`]: the memory file that comes with the reply holds a
    /// [`Snapshot`](crate::control::Snapshot).
    Snapshot,
    /// Reply to [`Request::Backing`]: the descriptor comes with the reply.
    Descriptor,
    /// The request was executed.
    Done,
    /// The request was executed in every server of the mount. An open that was answered before is visible in its
    /// process after this time.
    Settled {
        /// Time in milliseconds, at most 1000.
        milliseconds: u64,
    },
    /// Reply to [`Request::Inodes`].
    Inodes {
        /// The inodes that the kernel holds.
        known: Vec<u64>,
    },
    /// The request failed.
    Failed(Failure),
}

/// An [`Error`] in transit between two processes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    code: String,
    message: String,
    #[serde(serialize_with = "crate::sanitize::optional_path")]
    path: Option<PathBuf>,
    remedy: Option<String>,
    /// Error number: the other side retries temporary errors too.
    errno: Option<i32>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Failure {
        let mut message = error.message().to_owned();
        // A cause without an error number is sent as text.
        if let Some(cause) = std::error::Error::source(error).filter(|_| error.errno().is_none()) {
            message = format!("{message}: {cause}");
        }
        Failure {
            code: error.code().name().to_owned(),
            message,
            errno: error.errno(),
            path: error.path().map(ToOwned::to_owned),
            remedy: error.hint_text().map(str::to_owned),
        }
    }
}

impl Failure {
    /// Returns the error that was sent.
    pub fn into_error(self) -> Error {
        const CODES: [Code; 6] =
            [Code::Failed, Code::Usage, Code::Damage, Code::NotFound, Code::InUse, Code::TryAgain];
        let code = CODES.into_iter().find(|c| c.name() == self.code).unwrap_or(Code::Failed);
        let mut error = Error::new(code, self.message);
        if let Some(path) = self.path {
            error = error.at(path);
        }
        if let Some(errno) = self.errno {
            error = error.because(std::io::Error::from_raw_os_error(errno));
        }
        // The remedy is set last, so that it replaces a remedy that `because` adds.
        match self.remedy {
            Some(remedy) => error.hint(remedy),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::control::protocol::messages::*;

    #[test]
    fn an_error_round_trips() {
        let error = Error::in_use("2 clones map it").at("/mnt").hint("stop them");
        let text = serde_json::to_string(&Response::Failed(Failure::from(&error))).unwrap();
        let Response::Failed(back) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
        let back = back.into_error();
        assert_eq!(back.code(), Code::InUse);
        assert_eq!(back.to_string(), "2 clones map it: /mnt");
        assert_eq!(back.hint_text(), Some("stop them"));
    }

    #[test]
    fn a_cause_round_trips_and_is_reported_once() {
        let cause = std::io::Error::from_raw_os_error(libc::EROFS);
        let error = Error::io("cannot make a backing", "/cache", cause);
        let back = Failure::from(&error).into_error();
        assert_eq!((back.errno(), back.to_string()), (Some(libc::EROFS), error.to_string()));
        let text_cause =
            Error::failed("cannot read the file").because(std::io::Error::other("four bytes are missing"));
        let back = Failure::from(&text_cause).into_error();
        assert_eq!((back.errno(), back.to_string()), (None, text_cause.to_string()));
    }

    #[test]
    fn requests_have_a_stable_encoding() {
        let text = serde_json::to_string(&Request::Unmount { mode: UnmountMode::Lazy }).unwrap();
        assert_eq!(text, r#"{"ask":"unmount","mode":"lazy"}"#);
    }
}
