//! What server and supervisor say to each other: the server asks, the supervisor answers, one at a time.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use stencilfs::control::{Channel, Failure};
use stencilfs::error::{Error, Result};
use stencilfs::store::Digest;

/// One file of one template.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileKey {
    /// The template.
    pub digest: Digest,
    /// Name of the file in it.
    pub file: String,
}

/// What the supervisor tells a new server, with the counters page as descriptor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    /// The kernel's INIT request, whole.
    pub init: Vec<u8>,
    /// True for a server that follows another one.
    pub successor: bool,
    /// Directory of the store.
    pub store: std::path::PathBuf,
    /// `auto`, `passthrough` or `decode`.
    pub serve: String,
    /// Milliseconds that an open may wait for its backing.
    pub hydrate_timeout_ms: u64,
    /// Where backings are made.
    pub cache: Cache,
    /// Backings that are ready, with their ids on the connection.
    pub backings: Vec<(FileKey, u32)>,
}

/// Where backings are made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// Unnamed files in that directory.
    Directory(std::path::PathBuf),
    /// Memory files.
    Memory,
    /// Nowhere, for that reason: everything is served by decode.
    Nowhere(String),
}

/// What a server asks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// The reply to INIT that this server gives, with the table of its requests in flight as descriptor. Answered by
    /// [`Answer::Done`] when it is the reply that the kernel has.
    Handshake {
        /// The whole packet.
        reply: Vec<u8>,
    },
    /// Room for a backing. Answered by `Done`, [`Answer::Evict`] or `Refused`.
    Reserve {
        /// For which file.
        key: FileKey,
        /// Bytes of data.
        bytes: u64,
    },
    /// These are handed out no more: close those that nobody uses. Answered by [`Answer::Evicted`].
    Evict {
        /// Which.
        keys: Vec<FileKey>,
    },
    /// The backing of the descriptor is full: freeze it. Answered by `Done`.
    Freeze {
        /// Of which file.
        key: FileKey,
    },
    /// The frozen backing holds what it must: register it. Answered by [`Answer::Backing`].
    Register {
        /// Of which file.
        key: FileKey,
    },
    /// No backing for that file, and why; `None` when it is tried anew. Answered by `Done`.
    Decode {
        /// Of which file.
        key: FileKey,
        /// In words.
        why: Option<String>,
    },
    /// The backing is given up: its room is free again. Answered by `Done`.
    GiveBack {
        /// Of which file.
        key: FileKey,
    },
    /// So much of a backing is filled. Answered by `Done`.
    Progress {
        /// Of which file.
        key: FileKey,
        /// Bytes of data.
        bytes: u64,
    },
    /// The server cannot start. Answered by `Done`.
    GiveUp {
        /// Why.
        failure: Failure,
    },
}

/// What the supervisor answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done,
    /// It is not.
    Refused(Failure),
    /// There would be room without these: hand them out no more, then ask to [`Ask::Evict`] them.
    Evict(Vec<FileKey>),
    /// These were closed; the others of the question are in use.
    Evicted(Vec<FileKey>),
    /// The backing's id on the connection.
    Backing(u32),
}

/// The server's end.
#[derive(Debug)]
pub struct Link(Mutex<Channel>);

impl Link {
    /// Asks through that socket.
    pub fn new(socket: OwnedFd) -> Link {
        Link(Mutex::new(Channel::new(socket)))
    }

    /// Waits for the supervisor's first word.
    ///
    /// # Errors
    /// When there is no supervisor, or it says something else.
    pub fn hello(&self) -> Result<(Hello, OwnedFd)> {
        let channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match channel.receive() {
            Ok(Some((hello, Some(counters)))) => Ok((hello, counters)),
            Ok(_) => Err(Error::failed("the supervisor said no hello")),
            Err(e) => Err(Error::failed("the supervisor cannot be understood").because(e)),
        }
    }

    /// Asks and waits. A refusal comes back as the error it is.
    ///
    /// # Errors
    /// When the supervisor refuses, or is gone.
    pub fn ask(&self, question: &Ask, fd: Option<BorrowedFd<'_>>) -> Result<Answer> {
        let channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = |e| Error::failed("the supervisor is gone").because(e);
        channel.send(question, fd).map_err(gone)?;
        match channel.receive().map_err(gone)? {
            Some((Answer::Refused(failure), _)) => Err(failure.into_error()),
            Some((answer, _)) => Ok(answer),
            None => Err(gone(std::io::ErrorKind::UnexpectedEof.into())),
        }
    }
}
