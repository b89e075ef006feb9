//! Messages between a server and its supervisor. The server sends requests, one at a time; the supervisor replies.
//!
//! Requests are numbered. A supervisor that replaces a dead one sends [`ServerReply::AskAgain`]: a server that waits for
//! a reply sends its request again, and ignores replies to earlier requests. Each request may therefore arrive twice.

use serde::{Deserialize, Serialize};
use stencilfs::control::Failure;
pub use stencilfs::control::{Cache, FileKey};

/// Most backings that one request or reply names.
pub const MAX_KEYS: usize = 64;

/// A message with the number of its request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbered<T> {
    /// Greater than the number of each earlier request of the same server; never 0.
    pub number: u64,
    /// The message.
    pub body: T,
}

/// What a server requests.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerRequest {
    /// Introduces the server. The in-flight table comes as a descriptor. The reply is [`ServerReply::Done`] if the
    /// protocol version is the supervisor's and the INIT reply is the one that the kernel has.
    Handshake {
        /// The server's [`CONTROL_VERSION`](stencilfs::control::CONTROL_VERSION).
        control_version: u32,
        /// The server's package version.
        version: String,
        /// Sandbox restrictions that this kernel lacks, as text.
        lacks: Vec<String>,
        /// The whole INIT reply packet.
        init_reply: Vec<u8>,
    },
    /// The server answers the kernel from now on. The reply is `Done`.
    Serving,
    /// Reserves room in the cache and creates an empty file for a backing. The reply is [`ServerReply::Created`] with the
    /// file, [`ServerReply::Evict`], or [`ServerReply::Registered`] with the file of a backing that is ready.
    Reserve {
        /// The file to be backed.
        key: FileKey,
        /// Length of the file in bytes.
        size: u64,
        /// Bytes of data in the file.
        data_bytes: u64,
    },
    /// The server no longer hands out these backings: close the unused ones. The reply is [`ServerReply::Evicted`].
    Evict {
        /// At most [`MAX_KEYS`] keys.
        keys: Vec<FileKey>,
    },
    /// The backing is filled: make it immutable. The reply is `Done`.
    Freeze {
        /// The backed file.
        key: FileKey,
    },
    /// The server has compared each block of the frozen backing with its hash: register the backing with the kernel. The
    /// reply is [`ServerReply::Registered`].
    Register {
        /// The backed file.
        key: FileKey,
        /// `st_dev` and `st_ino` of the file that was compared.
        identity: (u64, u64),
    },
    /// Records why a file has no backing; `None` clears the reason when hydration starts again. The reply is `Done`.
    NoBacking {
        /// The file.
        key: FileKey,
        /// The reason, as text.
        reason: Option<String>,
    },
    /// The server abandons a backing that is not registered: its room is free again. The reply is `Done`.
    Abandon {
        /// The file.
        key: FileKey,
    },
    /// Reports the progress of a hydration. The reply is `Done`.
    Progress {
        /// The file.
        key: FileKey,
        /// Bytes of data in the backing.
        bytes: u64,
    },
    /// The list of condemned templates is in force in this server. The reply is `Done`.
    Condemned {
        /// Count of rings when the server read the list.
        ring: u32,
        /// Milliseconds after which the last open of a condemned template is visible in its process.
        grace_ms: u64,
    },
    /// The server cannot start. The reply is `Done`.
    GiveUp {
        /// Why.
        failure: Failure,
    },
}

/// What the supervisor replies.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerReply {
    /// The request was carried out.
    Done,
    /// The request failed.
    Refused(Failure),
    /// The empty file of a backing comes as a descriptor.
    Created,
    /// There would be room without these backings: stop handing them out, then request [`ServerRequest::Evict`].
    Evict(Vec<FileKey>),
    /// These backings were closed; the other backings of the request are in use.
    Evicted(Vec<FileKey>),
    /// The id of the backing on the FUSE connection.
    Registered(u32),
    /// Another supervisor reads this socket now: send the request again that waits for a reply.
    AskAgain,
}
