//! Messages between a server and its supervisor. The server sends requests, one at a time; the supervisor replies.
//!
//! Requests are numbered. A supervisor that takes over from a dead supervisor sends [`ServerReply::AskAgain`]: a server
//! that waits for a reply then sends its request again, and ignores replies to earlier requests. Each request may
//! therefore arrive twice.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use stencilfs::control::Failure;
pub use stencilfs::control::{Cache, FileKey};

/// Largest number of backings in one request or reply.
pub const MAX_KEYS: usize = 64;

/// A message with the number of its request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbered<T> {
    /// Greater than the numbers of all earlier requests of the same server; never 0.
    pub number: u64,
    /// The message.
    pub body: T,
}

/// A request of a server.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerRequest {
    /// Introduces the server. The descriptor of the message is the in-flight table. The reply is [`ServerReply::Done`]
    /// if the control version is that of the supervisor, and the INIT reply is equal to the one that the kernel has
    /// received, if any.
    Handshake {
        /// The server's [`CONTROL_VERSION`](stencilfs::control::CONTROL_VERSION).
        control_version: u32,
        /// The server's package version.
        version: String,
        /// Restrictions of the sandbox that this kernel does not support, as text.
        lacks: Vec<String>,
        /// The complete packet of the INIT reply.
        init_reply: Vec<u8>,
    },
    /// Reports that the server answers the kernel from now on. The reply is `Done`.
    Serving,
    /// Reserves space in the cache and creates the file of a backing, at its full length and without data. The reply is
    /// [`ServerReply::Created`] with the file, [`ServerReply::Evict`], or [`ServerReply::Registered`] with the file if
    /// the backing is already registered.
    Reserve {
        /// The file that the backing is for.
        key: FileKey,
        /// Length of the file in bytes.
        size: u64,
        /// Bytes of data in the file.
        data_bytes: u64,
    },
    /// Closes those of the given backings that no process uses. The server must have stopped answering opens with them.
    /// The reply is [`ServerReply::Evicted`].
    Evict {
        /// At most [`MAX_KEYS`] keys.
        keys: Vec<FileKey>,
    },
    /// Makes a filled backing immutable. The reply is [`ServerReply::Frozen`].
    Freeze {
        /// The backed file.
        key: FileKey,
    },
    /// Registers a frozen backing with the kernel. The server must have compared each block of the backing with its
    /// hash. The reply is [`ServerReply::Registered`].
    Register {
        /// The backed file.
        key: FileKey,
        /// `st_dev` and `st_ino` of the file that the server verified.
        identity: (u64, u64),
        /// With kernel decode, when the file was verified, in seconds since 1970.
        verified_at: Option<u64>,
    },
    /// Reports the result of a scrub of a registered backing. The reply is `Done`. In case of damage the reply follows
    /// when the store has forgotten the verification. After a report of damage the server answers no more opens with
    /// the backing.
    Scrubbed {
        /// The file.
        key: FileKey,
        /// When it was verified, in seconds since 1970.
        at: u64,
        /// The damage, as text.
        damage: Option<String>,
    },
    /// Records why a file has no backing; `None` clears the reason when hydration starts again. The reply is `Done`.
    NoBacking {
        /// The file.
        key: FileKey,
        /// The reason, as text.
        reason: Option<String>,
    },
    /// Abandons a backing that is not registered, and frees its space. The reply is `Done`.
    Abandon {
        /// The file.
        key: FileKey,
    },
    /// Reports the progress of a hydration. The reply is `Done`.
    Progress {
        /// The file.
        key: FileKey,
        /// Bytes of data that have been written to the backing.
        bytes: u64,
    },
    /// Reports that this server applies the list of condemned templates. The reply is `Done`.
    Condemned {
        /// The ring (in the counters page) before the server read the list.
        ring: u32,
        /// Milliseconds until the last answered open of a condemned template is visible in `/proc` of its process.
        grace_ms: u64,
    },
    /// Stops the process of a thread that needs a damaged block, as the mount's options demand. The server sends this
    /// request before it answers the READ, and waits for the reply. The reply is `Done` whether the process was
    /// signalled or not.
    StopReader {
        /// The thread that requested the READ.
        thread: u32,
        /// The file.
        key: FileKey,
        /// Offset of the READ in the file.
        offset: u64,
        /// When a server read the request, in time since boot. A thread that started later is another thread with the
        /// same number.
        arrived: Duration,
    },
    /// Reports that the server cannot start. The reply is `Done`.
    GiveUp {
        /// The reason.
        failure: Failure,
    },
}

/// A reply of the supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerReply {
    /// The request was carried out.
    Done,
    /// The request failed.
    Refused(Failure),
    /// The descriptor of the message is the file of a backing: at its full length, without data.
    Created,
    /// The backing is immutable. The descriptor of the message is the file to verify: the file of the backing or, if
    /// the server has filled it with an image for kernel decode, the file that the kernel decodes.
    Frozen {
        /// When the file was verified before, in seconds since 1970, if nothing has changed since.
        verified_at: Option<u64>,
    },
    /// The cache is full, but would have space without these backings: the server should stop answering opens with them
    /// and then send [`ServerRequest::Evict`].
    Evict(Vec<FileKey>),
    /// These backings were closed; the other backings of the request may be in use.
    Evicted(Vec<FileKey>),
    /// The id of the backing on the FUSE connection.
    Registered(u32),
    /// Another supervisor now reads this socket: the server must send its pending request again, if it has one.
    AskAgain,
}
