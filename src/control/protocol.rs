//! What the control socket carries: one [`Request`], one [`Response`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error};
use crate::store::Digest;

/// Version of the words between the processes of a mount. Servers and supervisors of different versions do not mix, and
/// one cannot take over from the other: it would end what is mapped. So a request that is added or changed does not raise it. Who
/// does not know a request closes the connection, and who asked it says that `stencil restart` helps.
pub const CONTROL_VERSION: u32 = 4;

/// Most inode numbers of one request. Each has at most 20 digits and a comma: all of them fit into one message.
pub const MAX_INODES: usize = 2048;

/// What a supervisor can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
pub enum Request {
    /// What it knows. Answered by [`Response::Snapshot`].
    Snapshot,
    /// The descriptor of a ready backing, in the order of the snapshot. Answered by [`Response::Descriptor`].
    Backing {
        /// Which.
        index: usize,
    },
    /// Go on with another program, which comes as descriptor. Answered by [`Response::Done`] once its server answers.
    Restart {
        /// True where the supervisor itself is to be replaced too.
        supervisor: bool,
    },
    /// Hide templates: nobody finds or opens them, as long as this connection lives. Answered by [`Response::Settled`]
    /// when that is true of all of them.
    Condemn {
        /// The templates.
        digests: Vec<Digest>,
    },
    /// Whether all these templates have been hidden since [`Request::Condemn`]. Answered by [`Response::Done`].
    Confirm {
        /// The templates.
        digests: Vec<Digest>,
    },
    /// Show templates again; or, if they are removed, close their backings. Answered by [`Response::Settled`].
    Release {
        /// The templates.
        digests: Vec<Digest>,
        /// True if they are removed.
        removed: bool,
    },
    /// Which of these inodes of the mount the kernel has. The names of a hidden template are taken from the kernel, so it
    /// has the inodes of only those of its files that somebody uses, in whatever way. Answered by [`Response::Inodes`].
    Inodes {
        /// At most [`MAX_INODES`] numbers.
        numbers: Vec<u64>,
    },
    /// Something in the store was given back: what the server has open of it is closed. Answered by
    /// [`Response::Settled`].
    Refresh,
    /// End the mount.
    Unmount {
        /// How.
        mode: UnmountMode,
    },
}

/// How a mount is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnmountMode {
    /// Only if nobody uses it.
    Plain,
    /// Take it out of the tree now; supervisor and server go on until the last use has ended.
    Lazy,
    /// Take it out of the tree and abort the connection: who still needs a page from it dies.
    Force,
}

/// What a supervisor answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum Response {
    /// To [`Request::Snapshot`]: a [`Snapshot`](super::Snapshot) in the memory file that comes with it.
    Snapshot,
    /// To [`Request::Backing`]: the descriptor comes with it.
    Descriptor,
    /// It was done.
    Done,
    /// It was done, in every server of the mount. What an open that was answered before has given can be seen after so
    /// long.
    Settled {
        /// At most a second.
        milliseconds: u64,
    },
    /// To [`Request::Inodes`].
    Inodes {
        /// Those that the kernel has.
        known: Vec<u64>,
    },
    /// It was not done.
    Failed(Failure),
}

/// An [`Error`] on its way between two processes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    code: String,
    message: String,
    #[serde(serialize_with = "crate::shown::optional_path")]
    path: Option<PathBuf>,
    remedy: Option<String>,
    /// The system's error number: what may pass is tried again on the other side too.
    #[serde(default)]
    errno: Option<i32>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Failure {
        let mut message = error.message().to_owned();
        // A cause that is no error number has only words.
        if let Some(cause) = std::error::Error::source(error).filter(|_| error.errno().is_none()) {
            message = format!("{message}: {cause}");
        }
        Failure {
            code: error.code().name().to_owned(),
            message,
            errno: error.errno(),
            path: error.path().map(ToOwned::to_owned),
            remedy: error.remedy_text().map(str::to_owned),
        }
    }
}

impl Failure {
    /// The error that it was.
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
        // Last: a remedy that comes with a cause must not take the place of the one that was given.
        match self.remedy {
            Some(remedy) => error.remedy(remedy),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_way() {
        let error = Error::in_use("2 clones map it").at("/mnt").remedy("stop them");
        let text = serde_json::to_string(&Response::Failed(Failure::from(&error))).unwrap();
        let Response::Failed(back) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
        let back = back.into_error();
        assert_eq!(back.code(), Code::InUse);
        assert_eq!(back.to_string(), "2 clones map it: /mnt");
        assert_eq!(back.remedy_text(), Some("stop them"));
    }

    #[test]
    fn the_cause_survives_too_and_is_said_once() {
        let cause = std::io::Error::from_raw_os_error(libc::EROFS);
        let error = Error::io("cannot make a backing", "/cache", cause);
        let back = Failure::from(&error).into_error();
        assert_eq!((back.errno(), back.to_string()), (Some(libc::EROFS), error.to_string()));
        let words =
            Error::failed("it cannot be read").because(std::io::Error::other("four bytes are missing"));
        let back = Failure::from(&words).into_error();
        assert_eq!((back.errno(), back.to_string()), (None, words.to_string()));
        let old = r#"{"code":"error","message":"m","path":null,"remedy":null}"#;
        assert_eq!(serde_json::from_str::<Failure>(old).unwrap().into_error().errno(), None);
    }

    #[test]
    fn requests_have_stable_words() {
        let text = serde_json::to_string(&Request::Unmount { mode: UnmountMode::Lazy }).unwrap();
        assert_eq!(text, r#"{"ask":"unmount","mode":"lazy"}"#);
    }
}
